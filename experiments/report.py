"""Results to a table and plots: python -m experiments.report writes them into docs/results.md.

Reads experiments/results/*.jsonl, one line per run; groups the runs that differ in their seed only;
gives mean ± sample standard deviation over n seeds, and the best rate of every method in bold. A
sweep over learning rates has tables of its own; where there are many rows, instead of its rows. A
section on a T5 pretrained here follows, and last the paper's table with our runs of its set-up.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import rich.box
import rich.table
import tyro

from experiments import paper, plots, sensitivity, small_t5
from experiments.checkpoint import write_atomic
from experiments.summary import SCORES, Row, best_rows, read, spread, summarise

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# What has a column, a row or a note of its own; the rest is noted where rows differ in it.
_SHOWN = {"task", "model", "method", "learning_rate", "seed", "epochs", "train_examples"}


LONG = 30  # rows; of a longer table, those that belong to a sweep are left to the JSON lines


def _cells(row: Row, digits: int = 4) -> list[str]:
    record = row.records[0]
    return [
        row.task,
        row.method,
        f"{row.learning_rate:g}",
        str(row.n),
        *(spread(row, name, digits) for name in SCORES),
        f"{record['trainable_parameters']:,}",
        f"{record['optimizer_state_bytes'] / 1e6:.2f}",
        f"{record['step_memory_bytes'] / 1e6:.0f}",
        *(
            "–" if row.diverged else f"{row.mean[name]:.0f}"
            for name in ("examples_per_second", "wall_seconds")
        ),
    ]


_HEADINGS = [
    "task",
    "method",
    "learning rate",
    "n",
    "accuracy",
    "F1",
    "Matthews",
    "loss",
    "trained parameters",
    "optimizer state (MB)",
    "step memory (MB)",
    "examples/s",
    "time (s)",
]
_STEP_MEMORY = _HEADINGS.index("step memory (MB)")


def rich_table(rows: Sequence[Row]) -> rich.table.Table:
    """The rows for a terminal: short headings, the best rate of every method in bold."""
    about = ", ".join(_unique(f"{row.model} on {row.task}" for row in rows))
    table = rich.table.Table(
        title=f"{about}: validation scores, mean ± std over n seeds",
        box=rich.box.SIMPLE,
        padding=(0, 0, 0, 1),
    )
    table.add_column("method", no_wrap=True)
    headings = ("rate", "n", "accuracy", "F1", "Matthews", "loss", "trained", "state MB", "ex./s")
    for heading in (*headings, "s"):
        table.add_column(heading, justify="right")
    best = best_rows(rows)
    several = len(best) < len(rows)
    for row in rows:
        cells = [cell.replace(" ± ", "±") for cell in _cells(row, digits=3)[1:]]
        del cells[_STEP_MEMORY - 1]
        bold = several and any(row is other for other in best)
        table.add_row(*cells, style="bold" if bold else None)
    return table


def rich_sensitivity(made: sensitivity.Table) -> rich.table.Table:
    """One of a sweep's tables for a terminal."""
    table = rich.table.Table(
        title=made.title, caption=made.note, box=rich.box.SIMPLE, padding=(0, 0, 0, 1)
    )
    for number, heading in enumerate(made.headings):
        justify = "right" if number else "left"
        table.add_column(heading.replace(" ", "\n"), justify=justify, no_wrap=True)
    for cells in made.cells:
        # What is long is broken here, lest rich cut the numbers.
        short = [cell.replace(" ± 0.", "±.").replace(" (", "\n(") for cell in cells]
        table.add_row(*(cell.replace(" − ", "\n− ") for cell in short))
    return table


def markdown_sensitivity(made: sensitivity.Table) -> str:
    """One of a sweep's tables as Markdown."""
    escaped = [[cell.replace("*", "\\*") for cell in cells] for cells in made.cells]
    lines = ["| " + " | ".join(cells) + " |" for cells in (made.headings, *escaped)]
    rule = "|---|" + "---:|" * (len(made.headings) - 1)
    return f"**{made.title}.** {made.note}\n\n" + "\n".join([lines[0], rule, *lines[1:]])


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, the best rate's headline metric of every method in bold."""
    best = best_rows(rows)
    lines = ["| " + " | ".join(_HEADINGS) + " |"]
    lines.append("|" + "---|" * 2 + "---:|" * (len(_HEADINGS) - 2))
    for row in sorted(rows, key=lambda row: (row.task, row.model)):
        cells = _cells(row)
        if any(row is other for other in best):
            place = 4 + SCORES.index(row.metric)
            cells[place] = f"**{cells[place]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(rows: Sequence[Row], listed: bool = True) -> str:
    """What the numbers are of: data, epochs, machines, versions; `listed`: there is a table."""
    lines = []
    for task, model in sorted({(row.task, row.model) for row in rows}):
        mine = [r for row in rows if (row.task, row.model) == (task, model) for r in row.records]
        lines.append(f"- {task}, {model}: {'; '.join(_unique(map(_data, mine)))}.")
    records = [record for row in rows for record in row.records]
    about_table = [
        "- Bold: each method's learning rate with the highest headline metric (accuracy; "
        "Matthews where the task's own is that). It is chosen on the validation split that is "
        "reported, so it flatters every method alike.",
        "- ± is the sample standard deviation over n seeds. Step memory is that of the largest "
        "compiled step: parameters, optimizer state, batch and temporaries.",
    ]
    lines += about_table if listed else []
    lines.append(f"- Measured on {'; '.join(_unique(map(_machine, records)))}.")
    if others := _other_differences(records):
        lines.append(f"- The rows also differ in {', '.join(others)}.")
    return "\n".join(lines)


def _data(record: dict[str, Any]) -> str:
    used, available = record["train_examples"], record["train_examples_available"]
    epochs = record["config"]["epochs"]
    share = f"all {used:,}" if used == available else f"{used:,} ({used / available:.0%})"
    return (
        f"{share} training examples, {epochs} epoch{'s' if epochs > 1 else ''}, "
        f"{record['steps']:,} steps of {record['config']['batch_size']}, validated on "
        f"{record['eval_examples']:,}; headline {record['metric']}"
    )


def _machine(record: dict[str, Any]) -> str:
    p = record["provenance"]
    device = p["cpu"] if p["platform"] == "cpu" else p["device"]
    cores = f", {p['cpu_count']} cores" if p["platform"] == "cpu" else ""
    commit = (p["commit"] or "no commit")[:8] + (" with changes" if p["dirty"] else "")
    return f"{device}{cores}, jax {p['versions']['jax']}, commit {commit}"


def _other_differences(records: list[dict[str, Any]]) -> list[str]:
    """What else the rows were made with; a row from before there was an option says nothing."""
    configs = [record["config"] for record in records]
    names = _unique(name for config in configs for name in config if name not in _SHOWN)
    values = {name: _unique(str(c[name]) for c in configs if name in c) for name in names}
    return [f"{name} ({', '.join(found)})" for name, found in values.items() if len(found) > 1]


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def splice(text: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what stands between the two markers replaced by `section`."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin} and, after it, one line {end} in the page")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{section.strip()}\n\n{end}{rest.split(end)[1]}"


@dataclasses.dataclass(frozen=True)
class Report:
    """Write the table and the plots of the results into a page."""

    results: pathlib.Path = pathlib.Path("experiments/results")
    """Folder of the *.jsonl files; the plots are written there."""
    page: pathlib.Path = pathlib.Path("docs/results.md")
    """File with the two markers."""


def write(command: Report) -> list[pathlib.Path]:
    """Writes the plots, then the page; returns what was written."""
    rows = summarise(read(command.results))
    text = command.page.read_text()
    splice(text, "")  # a page without markers is found out before anything is written
    images = plots.draw(rows, command.results, prefix="finetune-")
    links = [
        f"![{alt}]({os.path.relpath(image, command.page.parent)})" for alt, image in images.items()
    ]
    small = small_t5.section(command.results)
    parts = [*text_of(rows), *links, *([small] if small else []), paper.section(rows)]
    section = "\n\n".join(parts)
    write_atomic(command.page, splice(text, section).encode(), "the report")
    return [command.page, *images.values()]


def text_of(rows: Sequence[Row]) -> list[str]:
    """The tables and the notes: sweeps first, then the rows, but for a long list's swept ones."""
    parts = [markdown_sensitivity(table) for table in sensitivity.tables(rows)]
    swept = sensitivity.rows_of(sensitivity.sweeps(rows)) if len(rows) > LONG else []
    listed = [row for row in rows if not any(row is other for other in swept)]
    if listed:
        parts.append(markdown_table(listed))
    return [*parts, notes(rows, bool(listed))]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    command = tyro.cli(Report, args=argv, prog="python -m experiments.report")
    try:
        for path in write(command):
            print(f"wrote {path}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
