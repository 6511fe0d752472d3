"""Fine-tunes a model by several methods: python -m experiments.finetune --methods full,lora

Every run, a method with a learning rate and a seed, has a folder under --out. A run that was killed
goes on from its last checkpoint and ends with the same parameters bit for bit; one that is complete
or has diverged is only reported. Runs that differ in rates and seed only share their compiled
programs. Several processes, each with its devices, share every batch of a run when each is started
with --distributed and either a cluster that jax.distributed knows, or its own id:

    python -m experiments.finetune --distributed --coordinator HOST:PORT --num-processes 2 \\
        --process-id 0
"""

import dataclasses
import json
import sys
from typing import Any

import jax
from rich.console import Console

from experiments.exits import reported
from experiments.finetune.checkpoint import belongs, collect
from experiments.finetune.config import Command
from experiments.finetune.devices import devices_of
from experiments.finetune.export import check as check_export
from experiments.finetune.grid import AnyGrid, read, runs, shrunk
from experiments.finetune.hosts import abandon, connect, is_first, once
from experiments.finetune.methods import method_named
from experiments.finetune.preemption import STATUS, noticed
from experiments.finetune.run import Session, divergence, run_or_read
from experiments.finetune.train import PreemptedError
from experiments.models import get as model_named
from experiments.models.quantized import check_trainable
from experiments.report import samples
from experiments.report.plots import draw
from experiments.report.summary import summarise
from experiments.report.tables import rich_table, tables
from experiments.storage import Path, check_folder, locked, write_atomic

SAMPLES = "samples.md"


@reported
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if a run diverged."""
    # Checked before the process waits for others.
    command = checked(read(argv, "python -m experiments.finetune", Command))
    try:
        connect(command)
        with noticed() as told_to_end:
            failed = compare(Session(command, devices_of(command), terminal(), told_to_end))
    except PreemptedError as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return STATUS
    except jax.errors.JaxRuntimeError as error:
        if not command.distributed:
            raise
        print(f"error: {error}", file=sys.stderr)
        abandon()
    return 1 if failed else 0


def terminal() -> Console:
    """Where what goes on is shown."""
    console = Console(quiet=not is_first(), markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 140  # a pipe has no width; 80 would cut the table
    return console


def compare(session: Session) -> int:
    """Makes every run of the command, then the table and the plots; returns how many diverged."""
    out, results = session.command.out, []
    grid = runs(session.command)
    once(lambda: [belongs(out / run.folder_name, run) for run in grid])
    for number, run in enumerate(grid, 1):
        results.append(run_or_read(run, session, f"[{number}/{len(grid)}] {run.folder_name}"))
        if "diverged" in results[-1]:
            print(divergence(results[-1], out / run.folder_name), file=sys.stderr)
    show(results, out, session.console)
    return sum("diverged" in result for result in results)


def show(results: list[dict[str, Any]], out: Path, console: Console) -> None:
    """Shows the tables of these results; writes the file and the plots of all that are in `out`."""
    rows = summarise(results)
    written = once(lambda: list(map(str, write_all(out))))
    for table in tables(rows):
        console.print(rich_table(table))
    for runs_of_task in samples.chosen(results):
        console.print(samples.rich_table(runs_of_task))
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def write_all(out: Path) -> list[Path]:
    """results.jsonl, its plots and samples: the last of the commands that share `out` has all."""
    path = collect(out)
    with locked(out, wait=True):
        results = [json.loads(line) for line in path.read_text().splitlines()]
        written = [path, *draw(summarise(results), out).values()]
        if samples.chosen(results):
            page = samples.markdown(results).encode()
            write_atomic(out / SAMPLES, page, "the answers")
            written.append(out / SAMPLES)
        return written


def checked(command: AnyGrid) -> AnyGrid:
    """The command, its names and numbers known to be good, with --smoke carried out."""
    model = model_named(command.model)
    if command.quantize != "none" and model.kind != "decoder":
        raise ValueError(f"--quantize is for a language model; {command.model} is none")
    for name in command.methods:
        check_trainable(command.quantized, name, method_named(name).adapted)
    if command.weights is None:
        command = dataclasses.replace(command, weights=model.weights)
    elif not model.other_weights:
        raise ValueError(
            f"--weights {command.weights} is for --model llama or t5; {command.model} has its own"
        )
    if command.weights is None and model.other_weights:
        raise ValueError(
            f"--model {command.model} needs --weights: a folder, a .gguf file or NAME@COMMIT"
        )
    check_folder(command.out, "--out")
    runs(command)
    if isinstance(command, Command):
        check_export(command)
    return shrunk(command)
