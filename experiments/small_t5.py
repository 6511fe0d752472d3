"""The report's section on a T5 pretrained here, from results/t5_small_local: it has its own tables.

pretrain.jsonl holds what `experiments.pretrain` measured, the other files the fine-tunes from its
model and, to compare, from the same model before its first step.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.config import PAPER_EPOCHS, Command
from experiments.summary import SCORES, Row, best_rows, read, spread, summarise

FOLDER, PRETRAINING = "t5_small_local", "pretrain.jsonl"
RANDOM = "t5-small-random"
# Share of the commoner class in the whole validation split.
COMMONER = {"cola": 0.691, "mrpc": 0.684, "sst2": 0.509}
# What a reader must not take the tables for.
_CAVEAT = """
It is no T5-base: these figures show that the whole way works, from text to a fine-tuned
text-to-text model, and how the methods compare on so weak a start; they say nothing about the
paper's table.
"""


def section(results: pathlib.Path) -> str | None:
    """The section as Markdown; None where there is no such folder."""
    folder = results / FOLDER
    if not folder.is_dir():
        return None
    pretrained = [json.loads(line) for line in (folder / PRETRAINING).read_text().splitlines()]
    rows = summarise(read(folder))
    parts = ["### A small T5 pretrained here", *map(about, pretrained), _CAVEAT.strip()]
    return "\n\n".join([*parts, table(rows), notes(rows)])


def about(record: dict[str, Any]) -> str:
    """What one pretraining was, and what it reached."""
    config, final, p = record["config"], record["final"], record["provenance"]
    epochs = record["tokens"] / record["text_tokens"]
    sources = ", ".join(f"{name} {count:,}" for name, count in record["sources"].items())
    return (
        f"No published weights could be had here. `{command(config)}` pretrained a T5 v1.0 of "
        f"{record['parameters'] / 1e6:.1f} million parameters ({config['encoder_layers']} + "
        f"{config['decoder_layers']} layers of width {config['width']}, a vocabulary of its own of "
        f"at most {config['vocabulary']:,}) from random weights by span corruption, on training "
        f"text alone ({sources} texts; {record['text_tokens']:,} tokens): {record['steps']:,} "
        f"steps, {record['tokens']:,} tokens ({epochs:.1f} passes) in "
        f"{record['seconds'] / 60:.0f} minutes, {record['tokens_per_second']:,.0f} tokens/s on "
        f"{p['cpu_count']} shared cores of {p['cpu']}, commit {(p['commit'] or 'none')[:8]}. "
        f"Held-out loss {final['loss']:.3f} nats per target token, {final['hidden_loss']:.3f} per "
        f"hidden one, of which {final['hidden_accuracy']:.1%} come first; the tokens' frequencies "
        f"alone would give {record['unigram_loss']:.3f}."
    )


def command(config: dict[str, Any]) -> str:
    """The command line, but for what has its default."""
    from experiments.pretrain import Settings  # with JAX and what else the training needs

    default = dataclasses.asdict(Settings())
    given = {k: v for k, v in config.items() if v != default[k] or k == "minutes"}
    return _command("pretrain", given)


def finetune_command(config: dict[str, Any]) -> str:
    """The command line of a run, its method, rate and seed apart, but for what has its default."""
    default = dataclasses.asdict(Command()) | {"epochs": PAPER_EPOCHS}
    varied = {k: v for k, v in config.items() if k in default and v != default[k]}
    return _command("finetune", varied)


def _command(module: str, given: dict[str, Any]) -> str:
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    return f"python -m experiments.{module} --data-dir ../shared/tfds {flags}"


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown, the headline metric of every method's best rate in bold."""
    headings = ["task", "from", "method", "learning rate", "n", *SCORES]
    lines = ["| " + " | ".join(headings) + " |", "|---|---|---|" + "---:|" * (len(headings) - 3)]
    best = best_rows(rows)
    for row in sorted(rows, key=lambda row: (row.task, start_of(row))):
        scores = [spread(row, name, digits=3) for name in SCORES]
        if any(row is other for other in best):
            place = SCORES.index(row.metric)
            scores[place] = f"**{scores[place]}**"
        cells = [row.task, start_of(row), row.method, f"{row.learning_rate:g}", str(row.n)]
        lines.append("| " + " | ".join([*cells, *scores]) + " |")
    return "\n".join(lines)


def start_of(row: Row) -> str:
    """The name of the folder whose weights the row starts from."""
    return pathlib.PurePath(row.records[0]["config"]["weights"]).name


def notes(rows: Sequence[Row]) -> str:
    """What the fine-tunes are of."""
    lines = []
    for task in sorted({row.task for row in rows}):
        record = next(row.records[0] for row in rows if row.task == task)
        used, available = record["train_examples"], record["train_examples_available"]
        lines.append(
            f"- {task}, `{finetune_command(record['config'])}` with the table's methods, rates and "
            f"seeds: {used:,} of {available:,} training examples, {record['steps']:,} steps of "
            f"{record['config']['batch_size']}, validated on {record['eval_examples']:,}; headline "
            f"{record['metric']}. The commoner class is {COMMONER[task]:.1%} of the whole split."
        )
    lines.append(
        "- ± is the sample standard deviation over n seeds. Bold: each method's best rate by the "
        "headline, chosen on the split that is reported."
    )
    if any(start_of(row) == RANDOM for row in rows):
        lines.append(f"- {RANDOM} is the same model before its first step of pretraining.")
    return "\n".join(lines)
