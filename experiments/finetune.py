"""Fine-tunes a model by several methods: python -m experiments.finetune --methods full,lora

Every run, a method with a learning rate and a seed, has a folder under --out. A run that was killed
goes on from its last checkpoint and ends with the same parameters bit for bit; one that is complete
or has diverged is only reported. Runs that differ in rates and seed only share their compiled
programs. Several processes, each with its devices, share every batch of a run when each is started
with --distributed and either a cluster that jax.distributed knows, or its own id:

    python -m experiments.finetune --distributed --coordinator HOST:PORT --num-processes 2 \\
        --process-id 0
"""

import contextlib
import dataclasses
import pathlib
import resource
import sys
from typing import Any

import jax
import numpy as np
import rich.console
from flax import nnx

from experiments import (
    checkpoint,
    config,
    data,
    hosts,
    methods,
    models,
    plots,
    prepare,
    progress,
    report,
    sensitivity,
    train,
)
from experiments.config import Command, RunConfig
from experiments.provenance import provenance
from experiments.summary import summarise

CURVE_POINTS = 200  # of the loss curve in a result


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if a run diverged."""
    command = config.shrunk(config.read(argv, "python -m experiments.finetune"))
    try:
        checked_runs(command)  # before the process waits for others
        hosts.connect(command)
        failed = compare(command, _console())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if not command.distributed:
            raise
        print(f"error: {error}", file=sys.stderr)
        hosts.abandon()
    return 1 if failed else 0


def _console() -> rich.console.Console:
    console = rich.console.Console(quiet=not hosts.is_first())
    if not console.is_terminal:
        console.width = 140  # a pipe has no width; 80 would cut the table
    return console


def compare(command: Command, console: rich.console.Console) -> int:
    """Makes every run of the command, then the table and the plots; returns how many diverged."""
    grid, devices = checked_runs(command), hosts.devices(command)
    results = []
    for number, run in enumerate(grid, 1):
        title = f"[{number}/{len(grid)}] {run.folder_name}"
        results.append(run_or_read(run, command, devices, console, title))
        if "diverged" in results[-1]:
            print(divergence(results[-1], command.out / run.folder_name), file=sys.stderr)
    rows = summarise(results)
    made = hosts.once(
        lambda: [checkpoint.collect(command.out), *plots.draw(rows, command.out).values()]
    )
    console.print(report.rich_table(rows))
    for table in sensitivity.tables(rows):
        console.print(report.rich_sensitivity(table))
    for path in made:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return sum("diverged" in result for result in results)


def divergence(result: dict[str, Any], folder: pathlib.Path) -> str:
    """What happened to a run that diverged, and what to do."""
    return (
        f"error: {folder.name} diverged: {result['reason']}; try lower --learning-rates, a longer "
        "--warmup-ratio or a smaller --clip-norm. Its result says that it diverged, and the run is "
        f"not made again: for that, delete {folder}"
    )


def checked_runs(command: Command) -> list[RunConfig]:
    """The command's runs, once every name and number in them is known to be good."""
    for name in command.methods:
        methods.get(name)
    model = models.get(command.model)
    if command.weights is None:
        command = dataclasses.replace(command, weights=model.weights)
    elif model.weights is None:
        raise ValueError(
            f"--weights {command.weights} is for --model t5; {command.model} has its own"
        )
    data.get(command.task)
    return config.runs(command)


def run_or_read(
    run: RunConfig,
    command: Command,
    devices: hosts.Devices,
    console: rich.console.Console,
    title: str,
) -> dict[str, Any]:
    """The result of a run: read if it is complete, else trained, from a checkpoint if any."""
    folder = command.out / run.folder_name
    with contextlib.ExitStack() as held:

        def opened() -> dict | None:
            held.enter_context(checkpoint.locked(folder))
            checkpoint.claim(folder, run)
            return checkpoint.read_result(folder)

        if (result := hosts.once(opened)) is not None:
            ended = "diverged" if "diverged" in result else "complete"
            console.print(f"{title}: {ended}, nothing to do ({folder})", soft_wrap=True)
            return result
        hosts.can_go_on_from(f"the last checkpoint of {folder}")
        return train_run(run, command, devices, folder, console, title)


def train_run(
    run: RunConfig,
    command: Command,
    devices: hosts.Devices,
    folder: pathlib.Path,
    console: rich.console.Console,
    title: str,
) -> dict[str, Any]:
    """Trains one run and leaves its folder complete, also if it diverges."""
    loaded = prepare.load_data(run, command.data_dir)
    setup, params = prepare.build(run, loaded, devices)
    sizes = sizes_of(setup, params)
    saved, diverged = checkpoint.Checkpoints(folder), None
    with progress.shown(console, title, len(setup.batches), run.batch_size) as observe:
        try:
            params, history = train.train(
                setup,
                params,
                saved,
                checkpoint_every=command.checkpoint_every,
                diagnose_every=command.diagnose_every,
                observe=observe,
            )
        except train.DivergedError as error:
            params, history, diverged = None, error.history, error
    saved.close()

    def finished() -> dict[str, Any]:
        result = summary(run, loaded, history, diverged) | sizes | peak_memory()
        result |= {"devices": devices.count, "provenance": provenance()}
        checkpoint.finish(folder, None if params is None else named_arrays(params), result)
        return result

    result = hosts.once(finished)
    if diverged is None:
        scores = ", ".join(f"{k} {v:.4f}" for k, v in result["final"].items())
        console.print(f"{title}: {scores}", highlight=False, soft_wrap=True)
    return result


def sizes_of(setup: train.Setup, params: nnx.State) -> dict[str, int]:
    """Parameters and bytes of what trains, of the optimizer's state and of what is frozen."""
    state = jax.eval_shape(setup.programs.init, params)
    return {
        "trainable_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "trainable_bytes": _bytes(params),
        "optimizer_state_bytes": _bytes(state),
        "frozen_bytes": _bytes(setup.frozen),
    }


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def peak_memory() -> dict[str, Any]:
    """The largest memory of the process so far, earlier runs in it included, and what it is of."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {
            "process_peak_bytes": int(stats["peak_bytes_in_use"]),
            "process_peak_of": "device memory in use, highest of the process so far",
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "process_peak_of": "resident memory, highest of the process so far",
    }


def summary(
    run: RunConfig,
    loaded: prepare.Data,
    history: train.History,
    diverged: train.DivergedError | None,
) -> dict[str, Any]:
    """What a run measured, ready for JSON; one that diverged has no final scores."""
    if diverged is None:
        end = {"final": {k: v for k, v in history.evaluations[-1].items() if k != "step"}}
    else:
        end = {"final": None, "diverged": diverged.step, "reason": str(diverged)}
    steps_an_epoch = -(-len(loaded.train) // run.batch_size)
    examples = len(history.losses) / steps_an_epoch * len(loaded.train)
    return {
        "kind": "finetune",
        "config": dataclasses.asdict(run),
        "metric": data.get(run.task).metric,
        **end,
        "train_examples": len(loaded.train),
        "train_examples_available": loaded.available,
        "eval_examples": len(loaded.validation),
        "steps": len(history.losses),
        "examples_per_second": examples / history.seconds["train"],
        "wall_seconds": sum(history.seconds.values()),
        "seconds": history.seconds,
        "step_memory_bytes": history.step_memory_bytes,
        "evaluations": history.evaluations,
        "diagnostics": history.diagnostics,
        "losses": thinned(history.losses, CURVE_POINTS),
    }


def thinned(losses: list[float], points: int) -> list[list[float]]:
    """[last step, mean loss] of at most `points` equal stretches."""
    if not losses:  # it diverged at once
        return []
    stretches = np.array_split(np.arange(len(losses)), min(points, len(losses)))
    return [[int(s[-1]) + 1, float(np.mean([losses[i] for i in s]))] for s in stretches]


def named_arrays(params: nnx.State) -> dict[str, np.ndarray]:
    """The leaves as numpy arrays under their paths, for safetensors."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.ascontiguousarray(leaf)
        for path, leaf in leaves
    }


if __name__ == "__main__":
    sys.exit(main())
