"""Trains all rates and seeds of a method at once: python -m experiments.sweep --learning-rates ...

A grid of small runs fills a GPU that one of them does not (`experiments.sweep.together`). What it
leaves is what `experiments.finetune` leaves of the same runs, in folders of the same names, but
without checkpoints and metrics.jsonl, for a sweep takes minutes; without trained parameters and a
language model's answers; and with "together" in a result: how many runs were trained at once. The
`seconds` and `step_memory_bytes` of such a result are those of all these runs together, a run that
diverged having the seconds up to there; `examples_per_second` are the run's own examples over them.

The results of a method are written when all its runs are through. Those that are there already,
from an earlier sweep or from `experiments.finetune`, are only reported. Several processes may share
--out, each with methods of its own. A process uses its first device only.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from experiments.checks import Count
from experiments.exits import reported
from experiments.finetune.checkpoint import belongs, claim, finish, read_result
from experiments.finetune.command import checked, show, terminal
from experiments.finetune.config import Grid, RunConfig
from experiments.finetune.grid import read, runs
from experiments.finetune.prepare import build, load_data
from experiments.finetune.progress import shown
from experiments.finetune.run import batch_ids, divergence, result_of, sizes_of
from experiments.models import get as model_named
from experiments.storage import locked
from experiments.sweep.together import join, train

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together:
    """How many runs share a step."""

    at_once: Count | None = None
    """Runs that are trained together, at most, to bound the memory; None: all of a method."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Together, Grid):
    """Train all learning rates and seeds of a method at once, and compare the methods.

    Example: python -m experiments.sweep --methods lora --learning-rates 1e-4,1e-3 --seeds 0,1,2
    """


@reported
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if a run diverged."""
    asked = read(argv, "python -m experiments.sweep", Command)
    if model_named(asked.model).kind == "decoder":
        asked = dataclasses.replace(asked, answers=0)
    command = checked(asked)
    return 1 if sweep(command, terminal()) else 0


def sweep(command: Command, console: Console) -> int:
    """Makes every run of the command, then the table and the plots; returns how many diverged."""
    grid, results = runs(command), []
    for run in grid:
        belongs(command.out / run.folder_name, run)
    for method in command.methods:
        results += of_method([run for run in grid if run.method == method], command, console)
    show(results, command.out, console)
    return sum("diverged" in result for result in results)


def of_method(runs: Sequence[RunConfig], command: Command, console: Console) -> list[Result]:
    """The results of a method's runs: read where they are there, else trained together."""
    folders = {run: command.out / run.folder_name for run in runs}
    with contextlib.ExitStack() as held:
        found = {}
        for run, folder in folders.items():
            held.enter_context(locked(folder))
            claim(folder, run)
            if (result := read_result(folder)) is not None:
                found[run] = result
        missing = [run for run in runs if run not in found]
        parts = -(-len(missing) // (command.at_once or max(len(missing), 1)))
        for part in np.array_split(np.arange(len(missing)), parts) if parts else ():
            group = [missing[i] for i in part]
            for run, result in zip(group, trained(group, command, console), strict=True):
                finish(folders[run], None, result)
                found[run] = result
    for run, folder in folders.items():
        if "diverged" in (result := found[run]):
            print(divergence(result, folder), file=sys.stderr)
        else:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in result["final"].items())
            console.print(f"{folder.name}: {scores}", highlight=False, soft_wrap=True)
    return [found[run] for run in runs]


def trained(runs: Sequence[RunConfig], command: Command, console: Console) -> list[Result]:
    """The results of runs that are trained together, in order."""
    of_seed = {run.seed: run for run in runs}
    seeds = sorted(of_seed)
    loaded = [load_data(of_seed[seed], command.data_dir) for seed in seeds]
    built = [build(of_seed[seed], data) for seed, data in zip(seeds, loaded, strict=True)]
    about = sizes_of(*built[0]) | {"devices": 1, "together": len(runs)}
    group, params = join(runs, seeds, built)
    del built  # the parameters of every seed
    steps, rows = len(group.setups[0].batches), len(runs) * runs[0].batch_size
    title = f"{runs[0].method}, {len(runs)} run{'s' if len(runs) > 1 else ''} together"
    with shown(console, title, steps, rows) as observe:
        outcomes = train(group, params, observe)
    return [
        result_of(run, loaded[place], history, diverged)
        | (batch_ids(group.setups[place], diverged) if diverged else {})
        | about
        for run, place, (history, diverged) in zip(runs, group.of_run, outcomes, strict=True)
    ]
