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
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
from flax import nnx

from experiments import data, models, storage
from experiments.finetune import (
    checkpoint,
    config,
    devices,
    hosts,
    methods,
    metrics,
    preemption,
    prepare,
    progress,
    train,
)
from experiments.finetune.config import Command, Grid, RunConfig
from experiments.finetune.devices import Devices
from experiments.provenance import provenance
from experiments.report import plots, sensitivity
from experiments.report import tables as report
from experiments.report.summary import summarise

CURVE_POINTS = 200  # of the loss curve in a result


class Session(NamedTuple):
    """What the runs of a command share."""

    command: Command
    devices: Devices
    console: rich.console.Console
    told_to_end: Callable[[int], bool]  # asked after every step


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 1 if a run diverged."""
    command = Command()
    try:
        command = config.shrunk(config.read(argv, "python -m experiments.finetune"))
        checked_runs(command)  # before the process waits for others
        hosts.connect(command)
        with preemption.noticed() as told_to_end:
            failed = compare(Session(command, devices.of(command), terminal(), told_to_end))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except train.PreemptedError as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return preemption.STATUS
    except jax.errors.JaxRuntimeError as error:
        if not command.distributed:
            raise
        print(f"error: {error}", file=sys.stderr)
        hosts.abandon()
    return 1 if failed else 0


def terminal() -> rich.console.Console:
    """Where what goes on is shown."""
    console = rich.console.Console(quiet=not hosts.is_first())
    if not console.is_terminal:
        console.width = 140  # a pipe has no width; 80 would cut the table
    return console


def compare(session: Session) -> int:
    """Makes every run of the command, then the table and the plots; returns how many diverged."""
    out, console, results = session.command.out, session.console, []
    grid = checked_runs(session.command)
    for number, run in enumerate(grid, 1):
        results.append(run_or_read(run, session, f"[{number}/{len(grid)}] {run.folder_name}"))
        if "diverged" in results[-1]:
            print(divergence(results[-1], out / run.folder_name), file=sys.stderr)
    show(results, out, console)
    return sum("diverged" in result for result in results)


def show(results: list[dict[str, Any]], out: storage.Path, console: rich.console.Console) -> None:
    """Shows the table of these results; writes the file of all that are in `out`, and the plots."""
    rows = summarise(results)
    made = hosts.once(
        lambda: list(map(str, [checkpoint.collect(out), *plots.draw(rows, out).values()]))
    )
    console.print(report.rich_table(rows))
    for table in sensitivity.tables(rows):
        console.print(report.rich_sensitivity(table))
    for path in made:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def divergence(result: dict[str, Any], folder: storage.Path) -> str:
    """What happened to a run that diverged, where to look, and what to do."""
    record, ids = folder / checkpoint.RESULT, "the ids of the step's examples"
    left = f"{record} has {ids}"
    if "checkpoint" in result:  # runs trained together have none
        left = f"{folder / result['checkpoint']} has the parameters before that, {record} {ids}"
    return (
        f"error: {folder.name} diverged: {result['reason']}; try lower --learning-rates, a longer "
        f"--warmup-ratio or a smaller --clip-norm. {left}. The run is not made again: for that, "
        f"delete {folder}"
    )


def checked_runs(command: Grid) -> list[RunConfig]:
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


def run_or_read(run: RunConfig, session: Session, title: str) -> dict[str, Any]:
    """The result of a run: read if it is complete, else trained, from a checkpoint if any."""
    folder = session.command.out / run.folder_name
    with contextlib.ExitStack() as held:

        def opened() -> dict | None:
            held.enter_context(storage.locked(folder))
            checkpoint.claim(folder, run)
            return checkpoint.read_result(folder)

        if (result := hosts.once(opened)) is not None:
            ended = "diverged" if "diverged" in result else "complete"
            session.console.print(f"{title}: {ended}, nothing to do ({folder})", soft_wrap=True)
            return result
        hosts.can_go_on_from(f"the last checkpoint of {folder}")
        return train_run(run, session, folder, title)


def train_run(run: RunConfig, session: Session, folder: storage.Path, title: str) -> dict[str, Any]:
    """Trains one run and leaves its folder complete, also if it diverges."""
    command, shared_by = session.command, session.devices
    loaded = prepare.load_data(run, command.data_dir)
    setup, params = prepare.build(run, loaded, shared_by)
    sizes, evidence, diverged = sizes_of(setup, params), {}, None
    with contextlib.closing(checkpoint.Checkpoints(folder, command.keep)) as saved:
        with observed(run, session, setup, folder, title) as observe:
            try:
                params, history = train.train(
                    setup,
                    params,
                    saved,
                    rhythm(command),
                    observe=observe,
                    told_to_end=session.told_to_end,
                    profile=folder / "profile",
                )
            except train.DivergedError as error:
                params, history, diverged = None, error.history, error
        if diverged is not None:
            evidence = replay(run, loaded, shared_by, saved, diverged)
    trained = None if params is None else named_arrays(params, shared_by)

    def finished() -> dict[str, Any]:
        result = summary(run, loaded, history, diverged) | evidence | sizes | peak_memory()
        result |= {"devices": shared_by.count, "provenance": provenance()}
        checkpoint.finish(folder, trained, result)
        return result

    result = hosts.once(finished)
    if diverged is None:
        scores = ", ".join(f"{k} {v:.4f}" for k, v in result["final"].items())
        session.console.print(f"{title}: {scores}", highlight=False, soft_wrap=True)
    return result


def rhythm(command: Command) -> train.Rhythm:
    """What the command says of when to do what."""
    return train.Rhythm(
        checkpoint_every=command.checkpoint_every,
        evaluate_every=command.evaluate_every,
        evaluate_first=command.evaluate_first,
        diagnose_every=command.diagnose_every,
        profile_steps=command.profile_steps,
    )


@contextlib.contextmanager
def observed(
    run: RunConfig, session: Session, setup: train.Setup, folder: storage.Path, title: str
) -> Iterator[Callable[[train.History], None]]:
    """Yields what shows and logs a history; of several processes, the first does."""
    steps, observers = len(setup.batches), []
    rate = methods.schedule(run.learning_rate, run.warmup_ratio, steps)

    def observe(history: train.History) -> None:
        for one in observers:
            one(history)

    with contextlib.ExitStack() as held:
        if hosts.is_first():
            bar = progress.shown(session.console, title, steps, run.batch_size)
            log = metrics.logged(
                folder, np.asarray(rate(np.arange(steps))), tensorboard=session.command.tensorboard
            )
            observers += [held.enter_context(bar), held.enter_context(log)]
        yield observe


def replay(
    run: RunConfig,
    loaded: prepare.Data,
    shared_by: Devices,
    saved: checkpoint.Checkpoints,
    diverged: train.DivergedError,
) -> dict[str, Any]:
    """Leaves a checkpoint of where a run stood before it went wrong; says which, and on what.

    The loop runs ahead and its buffers are donated, so that state is gone when the loss is read:
    the steps from the last checkpoint on are made again.
    """
    saved.wait()
    setup, params = prepare.build(run, loaded, shared_by)
    train.train(setup, params, saved, train.Rhythm(last=diverged.before))
    return {"checkpoint": f"{checkpoint.CHECKPOINTS}/{diverged.before}"} | batch_ids(
        setup, diverged
    )


def batch_ids(setup: train.Setup, diverged: train.DivergedError) -> dict[str, list[int]]:
    """The ids of the examples of the step that went wrong; nothing if that was the validation."""
    if diverged.before == diverged.step:
        return {}
    batch = setup.devices.shard(setup.batches[diverged.step - 1])
    ids = setup.devices.gather(batch["ids"]).tolist()
    return {"batch_ids": [number for number in ids if number >= 0]}


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


def named_arrays(params: nnx.State, shared_by: Devices) -> dict[str, np.ndarray]:
    """The leaves as numpy arrays under their paths, for safetensors; asked of every process."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.ascontiguousarray(
            shared_by.gather(leaf)
        )
        for path, leaf in leaves
    }
