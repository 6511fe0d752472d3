"""Pretrains a small T5 on this machine: python -m experiments.pretrain --data-dir ../shared/tfds

For where no published weights can be had: 11 million random parameters learn span corruption on a
million tokens of text for as long as they are given, 50 minutes by default. `--model t5 --weights
FOLDER` fine-tunes what comes out text to text. It is a model of that size and that text, and says
nothing about T5-base.

    <out>/config.json, model.safetensors, tokenizer.json   the model as Hugging Face keeps a T5
    <out>/pretraining/                                     the run: its settings, log.jsonl,
                                                           checkpoints and, last, result.json

A run that was killed goes on from its last checkpoint when the same command is given again.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import tokenizers
import tyro
from flax import nnx

from experiments import checkpoint, pretrain_loop, progress
from experiments.data import corpus, spans
from experiments.models import t5_files, t5_vocabulary
from experiments.models.t5 import T5
from experiments.models.t5_config import T5Config
from experiments.pretrain_loop import History, Training
from experiments.provenance import provenance

RUN, LOG, TOKENIZER = "pretraining", "log.jsonl", "tokenizer.json"
HELD_OUT_SEED = 10**6  # of the spans hidden in held-out rows: no run's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """What decides the parameters, the text apart."""

    vocabulary: int = 8192
    """Tokens of the vocabulary, at most, the 100 sentinels included."""
    width: int = 256
    """Of the residual stream."""
    mlp_width: int = 1024
    """Of the MLPs inside."""
    heads: int = 4
    """Of every attention, each of width 64."""
    encoder_layers: int = 3
    """Layers of the encoder, which reads four times as many tokens as the decoder."""
    decoder_layers: int = 6
    """Layers of the decoder."""
    row_length: int = 128
    """Tokens of a row before spans are hidden."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(Settings):
    """A run: its settings and its text."""

    texts: str  # the corpus's digest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Settings):
    """Pretrain a small T5 by span corruption.

    Example: python -m experiments.pretrain --data-dir ../shared/tfds --minutes 50
    """

    data_dir: str | None = None
    """Where the prepared GLUE tasks cola, mrpc and sst2 are; None: pydoc's prose alone."""
    out: pathlib.Path = pathlib.Path("runs/t5-small-local")
    """Folder of the model and, inside, of its run."""
    log_every: int = 50
    """Steps between lines of the log."""
    evaluate_every: int = 250
    """Steps between measurements of the held-out text."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""


class Made(NamedTuple):
    """What a command works on, made from its settings and texts alone."""

    setup: pretrain_loop.Setup
    params: nnx.State
    tokenizer: tokenizers.Tokenizer
    facts: dict[str, Any]  # about the text and the model, for the result


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    command = tyro.cli(Command, args=argv, prog="python -m experiments.pretrain")
    console = rich.console.Console()
    try:
        check(command)
        result = run_or_read(command, console)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores = ", ".join(f"{name} {value:.4g}" for name, value in result["final"].items())
    console.print(f"{scores}; the model is in {command.out}", highlight=False, soft_wrap=True)
    return 0


def check(command: Command) -> None:
    """Raises ValueError for the first number that is out of its range."""
    for name, value in vars(command).items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("seed", "steps"):
            if value is not None and value < 0:
                raise ValueError(f"{flag} must be at least 0, not {value}")
        elif isinstance(value, int | float) and not 0 < value < math.inf:
            raise ValueError(f"{flag} must be a finite number above 0, not {value}")
        if name in ("b1", "b2") and value >= 1:
            raise ValueError(f"{flag} must be less than 1, not {value}")


def run_or_read(command: Command, console: rich.console.Console) -> dict[str, Any]:
    """The result of the command's run: read if it is complete, else trained to its end."""
    texts = corpus.load(command.data_dir, seed=command.seed)
    folder = command.out / RUN
    with checkpoint.locked(folder):
        checkpoint.claim(folder, Identity(**vars(settings_of(command)), texts=texts.digest))
        if (result := checkpoint.read_result(folder)) is not None:
            console.print(f"complete, nothing to do ({folder})", soft_wrap=True)
            return result
        return train(command, texts, console)


def settings_of(command: Command) -> Settings:
    """The command's settings alone."""
    return Settings(**{f.name: getattr(command, f.name) for f in dataclasses.fields(Settings)})


def train(command: Command, texts: corpus.Corpus, console: rich.console.Console) -> dict[str, Any]:
    """Trains from the last checkpoint to the end, and leaves the folder complete."""
    folder = command.out / RUN
    made = build(settings_of(command), texts, folder)
    every = pretrain_loop.Every(command.log_every, command.evaluate_every, command.checkpoint_every)
    with (
        contextlib.closing(checkpoint.Checkpoints(folder)) as checkpoints,
        progress.by_share(console, "pretraining") as show,
    ):
        params, history = pretrain_loop.pretrain(
            made.setup,
            made.params,
            checkpoints,
            every,
            observe=lambda history: show(*_now(history, command)),
            saved=lambda history: write_log(folder, history),
        )
    t5_files.save(nnx.merge(made.setup.graph, params), command.out, made.tokenizer)
    result = summary(command, made.facts, history)
    checkpoint.finish(folder, None, result)
    return result


def build(command: Settings, texts: corpus.Corpus, folder: pathlib.Path) -> Made:
    """The tokenizer, kept in `folder`, the batches and the random model."""
    tokenizer = kept_tokenizer(folder / TOKENIZER, texts, command.vocabulary)
    size = tokenizer.get_vocab_size()
    how = spans.Spans(
        command.row_length,
        sentinel=tokenizer.token_to_id("<extra_id_0>"),
        end=tokenizer.token_to_id("</s>"),
        sentinels=t5_files.SENTINELS,
    )
    train, held_out = (spans.encode(found, tokenizer) for found in (texts.train, texts.held_out))
    batches = spans.span_batches(train, how, command.batch_size, seed=command.seed)
    validation = spans.SpanBatches(held_out, how, command.batch_size, HELD_OUT_SEED)
    config = config_of(command, size)
    graph, params = nnx.split(T5(config, rngs=nnx.Rngs(command.seed)))
    held = [validation[i] for i in range(validation.per_epoch)]
    setup = pretrain_loop.Setup(command, graph, batches, held, how)
    facts = {
        "sources": texts.sources,
        "texts": len(texts.train),
        "text_tokens": len(train.tokens),
        "held_out_texts": len(texts.held_out),
        "held_out_tokens": sum(batch["targets"].size for batch in held),
        "unigram_loss": unigram_loss(train.tokens, held, how, size),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
    }
    return Made(setup, nnx.as_pure(params), tokenizer, facts)


def config_of(settings: Settings, vocabulary: int) -> T5Config:
    """T5 v1.0's architecture in the settings' sizes; no dropout, on a text read a few times."""
    return T5Config(
        vocab_size=vocabulary,
        d_model=settings.width,
        d_ff=settings.mlp_width,
        num_heads=settings.heads,
        num_layers=settings.encoder_layers,
        num_decoder_layers=settings.decoder_layers,
        dropout_rate=0.0,
    )


def kept_tokenizer(
    file: pathlib.Path, texts: corpus.Corpus, vocabulary: int
) -> tokenizers.Tokenizer:
    """The run's tokenizer: trained at its first start, and read from then on."""
    if not file.exists():
        made = t5_vocabulary.trained(texts.train, vocabulary)
        checkpoint.write_atomic(file, made.to_str(pretty=True).encode(), "the tokenizer")
    return t5_files.tokenizer(file.parent)


def unigram_loss(train: np.ndarray, held_out: list[dict], how: spans.Spans, size: int) -> float:
    """What knowing only how often each token comes would cost per hidden token, in nats."""
    counts = np.bincount(train, minlength=size) + 1.0  # one more each: none is impossible
    costs = np.log(counts.sum()) - np.log(counts)
    targets = np.concatenate([batch["targets"].ravel() for batch in held_out])
    return float(costs[targets[how.is_text(targets)]].mean())


def write_log(folder: pathlib.Path, history: History) -> None:
    """Makes log.jsonl anew: what a kill cut off is neither lost nor there twice."""
    lines = "".join(json.dumps(line) + "\n" for line in [*history.log, *history.evaluations])
    checkpoint.write_atomic(folder / LOG, lines.encode(), "the log")


def summary(command: Command, facts: dict[str, Any], history: History) -> dict[str, Any]:
    """What a run measured, ready for JSON."""
    steps, settings = len(history.losses), settings_of(command)
    tokens = steps * command.batch_size * command.row_length
    return {
        "kind": "pretrain",
        "config": dataclasses.asdict(settings),
        "final": {k: v for k, v in history.evaluations[-1].items() if k != "step"},
        **facts,
        "steps": steps,
        "tokens": tokens,
        "seconds": history.seconds,
        "tokens_per_second": tokens / history.seconds if steps else 0.0,
        "evaluations": history.evaluations,
        "log": history.log,
        "provenance": provenance(),
    }


def _now(history: History, command: Command) -> tuple[float, str]:
    """The share of the run that is done, and a line about it."""
    done, loss = len(history.losses), np.mean(history.losses[-command.log_every :])
    share = history.seconds / (60 * command.minutes)
    if history.last is not None:
        share = done / history.last
    rate = done * command.batch_size * command.row_length / history.seconds
    return share, f"step {done}, loss {loss:.4f}, {rate:,.0f} tokens/s"


if __name__ == "__main__":
    sys.exit(main())
