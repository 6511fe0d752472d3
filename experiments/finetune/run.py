"""One run: read from its folder if it is complete, else trained to its end from where it is.

Its result is JSON: what it was asked, and what it measured or where it diverged.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from experiments.finetune import adapter_config, checkpoint
from experiments.finetune.checkpoint import CHECKPOINTS, Checkpoints
from experiments.finetune.config import Command, RunConfig
from experiments.finetune.devices import Devices
from experiments.finetune.export import export
from experiments.finetune.hosts import can_go_on_from, is_first, once
from experiments.finetune.language import headline
from experiments.finetune.methods import schedule
from experiments.finetune.prepare import Data, build, load_data
from experiments.finetune.progress import logged, shown
from experiments.finetune.train import DivergedError, History, Rhythm, Setup, train
from experiments.finetune.trained import names_of
from experiments.models.quantized import nbytes
from experiments.provenance import provenance
from experiments.storage import Path, locked

CURVE_POINTS = 200  # of the loss curve in a result


class Session(NamedTuple):
    """What the runs of a command share."""

    command: Command
    devices: Devices
    console: Console
    told_to_end: Callable[[int], bool]  # asked after every step


def run_or_read(run: RunConfig, session: Session, title: str) -> dict[str, Any]:
    """The result of a run: read if it is complete, else trained, from a checkpoint if any."""
    folder = session.command.out / run.folder_name
    with contextlib.ExitStack() as held:

        def opened() -> dict | None:
            held.enter_context(locked(folder))
            checkpoint.claim(folder, run)
            if (result := checkpoint.read_result(folder)) is None:
                adapter_config.write(folder, run)
            return result

        if (result := once(opened)) is not None:
            ended = "diverged" if "diverged" in result else "complete"
            session.console.print(f"{title}: {ended}, nothing to do ({folder})", soft_wrap=True)
        else:
            can_go_on_from(f"the last checkpoint of {folder}")
            result = train_run(run, session, folder, title)
        if "diverged" not in result:
            export_run(run, session, folder, title)
        return result


def export_run(run: RunConfig, session: Session, folder: Path, title: str) -> None:
    """Writes what --export asks for of a complete run, unless it is there."""

    def written() -> str:
        with session.devices.loading():
            return str(export(run, folder, session.command.export))

    if session.command.export != "none":
        session.console.print(f"{title}: exported to {once(written)}", soft_wrap=True)


def train_run(run: RunConfig, session: Session, folder: Path, title: str) -> dict[str, Any]:
    """Trains one run and leaves its folder complete, also if it diverges."""
    command, shared_by = session.command, session.devices
    loaded = load_data(run, command.data_dir)
    if loaded.left_out:
        told = f"{title}: {loaded.left_out:,} examples are longer than {run.max_length} tokens"
        session.console.print(f"{told}, and left out (--max-length)", soft_wrap=True)
    setup, params = build(run, loaded, shared_by)
    about, diverged = sizes_of(setup, params) | {"devices": shared_by.count}, None
    rhythm = Rhythm(**{name: getattr(command, name) for name in Rhythm._fields if name != "last"})
    if command.profile_steps and command.profile_steps[1] > len(setup.batches):
        raise ValueError(
            f"--profile-steps ends at {command.profile_steps[1]}, and the run has "
            f"{len(setup.batches)} steps; trace earlier ones"
        )
    with contextlib.closing(Checkpoints(folder, command.keep)) as saved:
        with observed(run, session, setup, folder, title) as observe:
            try:
                params, history = train(
                    setup, params, saved, rhythm, observe=observe, told_to_end=session.told_to_end
                )
            except DivergedError as error:
                params, history, diverged = None, error.history, error
        if diverged is not None:
            about |= replay(run, loaded, shared_by, saved, diverged)
    trained = None if params is None else named_arrays(params, shared_by)

    def finished() -> dict[str, Any]:
        result = result_of(run, loaded, history, diverged) | about
        checkpoint.finish(folder, trained, result)
        return result

    result = once(finished)
    if diverged is None:
        scores = ", ".join(f"{k} {v:.4f}" for k, v in result["final"].items())
        session.console.print(f"{title}: {scores}", highlight=False, soft_wrap=True)
    return result


@contextlib.contextmanager
def observed(
    run: RunConfig, session: Session, setup: Setup, folder: Path, title: str
) -> Iterator[Callable[[History], None]]:
    """Yields what shows and logs a history; of several processes, the first does."""
    if not is_first():
        yield lambda history: None
        return
    steps = len(setup.batches)
    rates = np.asarray(schedule(run, run.learning_rate, steps)(np.arange(steps)))
    with (
        shown(session.console, title, steps, run.batch_size) as show,
        logged(folder, rates, tensorboard=session.command.tensorboard) as log,
    ):

        def observe(history: History) -> None:
            show(history)
            log(history)

        yield observe


def replay(
    run: RunConfig, loaded: Data, shared_by: Devices, saved: Checkpoints, diverged: DivergedError
) -> dict[str, Any]:
    """Leaves a checkpoint of where a run stood before it went wrong; says which, and on what.

    The loop runs ahead and its buffers are donated, so that state is gone when the loss is read:
    the steps from the last checkpoint on are made again.
    """
    saved.wait()
    setup, params = build(run, loaded, shared_by)
    train(setup, params, saved, Rhythm(last=diverged.before))
    return {"checkpoint": f"{CHECKPOINTS}/{diverged.before}"} | batch_ids(setup, diverged)


def named_arrays(params: nnx.State, shared_by: Devices) -> dict[str, np.ndarray]:
    """The leaves as numpy arrays under their paths, for safetensors; asked of every process."""
    arrays = [np.ascontiguousarray(shared_by.gather(leaf)) for leaf in jax.tree.leaves(params)]
    return dict(zip(names_of(params), arrays, strict=True))


def result_of(
    run: RunConfig, loaded: Data, history: History, diverged: DivergedError | None
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
        "metric": headline(run),
        **end,
        "train_examples": len(loaded.train),
        "train_examples_available": loaded.available,
        "eval_examples": len(loaded.validation),
        "steps": len(history.losses),
        "examples_per_second": examples / history.seconds["train"],
        "wall_seconds": sum(history.seconds.values()),
        "seconds": history.seconds,
        "step_memory_bytes": history.step_memory_bytes,
        "left_out": loaded.left_out,
        "evaluations": history.evaluations,
        "diagnostics": history.diagnostics,
        "losses": thinned(history.losses, CURVE_POINTS),
        "samples": samples_of(loaded, history),
        "provenance": provenance(),
    }


def samples_of(loaded: Data, history: History) -> list[dict[str, str]]:
    """The prompts of a language model, with its answers before and after."""
    return [
        {"prompt": prompt.text, "reference": prompt.references[0]}
        | {when: answers[i] for when, answers in history.answers.items()}
        for i, prompt in enumerate(loaded.prompts)
    ]


def thinned(losses: list[float], points: int) -> list[list[float]]:
    """[last step, mean loss] of at most `points` equal stretches."""
    if not losses:  # it diverged at once
        return []
    stretches = np.array_split(np.arange(len(losses)), min(points, len(losses)))
    return [[int(s[-1]) + 1, float(np.mean([losses[i] for i in s]))] for s in stretches]


def sizes_of(setup: Setup, params: nnx.State) -> dict[str, int]:
    """Parameters and bytes of what trains, of the optimizer's state and of what is frozen."""
    state = jax.eval_shape(setup.programs.init, params)
    trees = {"trainable_bytes": params, "optimizer_state_bytes": state}
    return {"trainable_parameters": sum(x.size for x in jax.tree.leaves(params))} | {
        name: nbytes(tree) for name, tree in (trees | {"frozen_bytes": setup.frozen}).items()
    }


def batch_ids(setup: Setup, diverged: DivergedError) -> dict[str, list[int]]:
    """The ids of the examples of the step that went wrong; nothing if that was the validation."""
    if diverged.before == diverged.step:
        return {}
    batch = setup.devices.shard(setup.batches[diverged.step - 1])
    ids = setup.devices.gather(batch["ids"]).tolist()
    return {"batch_ids": [number for number in ids if number >= 0]}


def divergence(result: dict[str, Any], folder: Path) -> str:
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
