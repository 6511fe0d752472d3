"""Trains all rates and seeds of a method at once: python -m experiments.sweep --learning-rates ...

A grid of small runs fills a GPU that one of them does not: see `experiments.together`. What it
leaves is what `experiments.finetune` leaves of the same runs, in folders of the same names, but
for three things: no checkpoints and no metrics.jsonl, for a sweep takes minutes; no trained
parameters; and "together" in a result, how many runs were trained at once. The `seconds` and
`step_memory_bytes` of such a result are those of all these runs together, a run that diverged
having the seconds up to there; `examples_per_second` are the run's own examples over them.

The results of a method are written when all its runs are through. Those that are there already,
from an earlier sweep or from `experiments.finetune`, are only reported. Several processes may share
--out, each with methods of its own. A process uses its first device only.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import tyro

from experiments import checks, storage
from experiments.finetune import checkpoint, config, prepare, progress
from experiments.finetune import command as finetune
from experiments.finetune.config import RunConfig
from experiments.provenance import provenance
from experiments.sweep import together

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(config.Grid):
    """Train all learning rates and seeds of a method at once, and compare the methods.

    Example: python -m experiments.sweep --methods lora --learning-rates 1e-4,1e-3 --seeds 0,1,2
    """

    at_once: int | None = None
    """Runs that are trained together, at most, to bound the memory; None: all of a method."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if a run diverged."""
    command = tyro.cli(
        Command,
        args=argv,
        prog="python -m experiments.sweep",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        failed = sweep(config.shrunk(command), finetune.terminal())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: {error}; train fewer runs together with --at-once", file=sys.stderr)
        return 2
    return 1 if failed else 0


def sweep(command: Command, console: rich.console.Console) -> int:
    """Makes every run of the command, then the table and the plots; returns how many diverged."""
    if command.at_once is not None:
        checks.at_least("--at-once", command.at_once, 1)
    grid, results = finetune.checked_runs(command), []
    for method in command.methods:
        results += of_method([run for run in grid if run.method == method], command, console)
    finetune.show(results, command.out, console)
    return sum("diverged" in result for result in results)


def of_method(
    runs: Sequence[RunConfig], command: Command, console: rich.console.Console
) -> list[Result]:
    """The results of a method's runs: read where they are there, else trained together."""
    folders = {run: command.out / run.folder_name for run in runs}
    with contextlib.ExitStack() as held:
        found = {}
        for run, folder in folders.items():
            held.enter_context(storage.locked(folder))
            checkpoint.claim(folder, run)
            if (result := checkpoint.read_result(folder)) is not None:
                found[run] = result
        for group in _groups([run for run in runs if run not in found], command.at_once):
            for run, result in zip(group, trained(group, command, console), strict=True):
                checkpoint.finish(folders[run], None, result)
                found[run] = result
    for run, folder in folders.items():
        _tell(found[run], folder, console)
    return [found[run] for run in runs]


def _groups(runs: list[RunConfig], at_once: int | None) -> list[list[RunConfig]]:
    """The runs in groups of `at_once` at most, about equally large."""
    if not runs:
        return []
    parts = np.array_split(np.arange(len(runs)), -(-len(runs) // (at_once or len(runs))))
    return [[runs[i] for i in part] for part in parts]


def _tell(result: Result, folder, console: rich.console.Console) -> None:
    if "diverged" in result:
        print(finetune.divergence(result, folder), file=sys.stderr)
        return
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result["final"].items())
    console.print(f"{folder.name}: {scores}", highlight=False, soft_wrap=True)


def trained(
    runs: Sequence[RunConfig], command: Command, console: rich.console.Console
) -> list[Result]:
    """The results of runs that are trained together, in order."""
    seeds = sorted({run.seed for run in runs})
    loaded = [prepare.load_data(_first(runs, seed), command.data_dir) for seed in seeds]
    group, params, sizes = _joined(runs, seeds, loaded)
    steps, rows = len(group.setups[0].batches), len(runs) * runs[0].batch_size
    title = f"{runs[0].method}, {len(runs)} run{'s' if len(runs) > 1 else ''} together"
    with progress.shown(console, title, steps, rows) as observe:
        outcomes = together.train(group, params, observe=observe)
    about = sizes | finetune.peak_memory()
    about |= {"devices": 1, "together": len(runs), "provenance": provenance()}
    return [
        finetune.summary(run, loaded[place], *outcome)
        | (finetune.batch_ids(group.setups[place], outcome.diverged) if outcome.diverged else {})
        | about
        for run, place, outcome in zip(runs, group.of_run, outcomes, strict=True)
    ]


def _first(runs: Sequence[RunConfig], seed: int) -> RunConfig:
    return next(run for run in runs if run.seed == seed)


def _joined(runs: Sequence[RunConfig], seeds: list[int], loaded: list[prepare.Data]) -> tuple:
    """The group, its parameters, and the sizes of one run; what is built by seed is let go."""
    built = [
        prepare.build(_first(runs, seed), data) for seed, data in zip(seeds, loaded, strict=True)
    ]
    return *together.join(runs, seeds, built), finetune.sizes_of(*built[0])
