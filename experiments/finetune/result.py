"""A run's result as JSON: what it was asked, what it measured, or where it diverged."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.data.tasks import task_named
from experiments.finetune.checkpoint import RESULT
from experiments.finetune.config import RunConfig
from experiments.finetune.prepare import Data
from experiments.finetune.train import DivergedError, History, Setup
from experiments.provenance import provenance
from experiments.storage import Path

CURVE_POINTS = 200  # of the loss curve in a result


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
        "metric": task_named(run.task).metric,
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
        "provenance": provenance(),
    }


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
        name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for name, tree in (trees | {"frozen_bytes": setup.frozen}).items()
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
    record, ids = folder / RESULT, "the ids of the step's examples"
    left = f"{record} has {ids}"
    if "checkpoint" in result:  # runs trained together have none
        left = f"{folder / result['checkpoint']} has the parameters before that, {record} {ids}"
    return (
        f"error: {folder.name} diverged: {result['reason']}; try lower --learning-rates, a longer "
        f"--warmup-ratio or a smaller --clip-norm. {left}. The run is not made again: for that, "
        f"delete {folder}"
    )
