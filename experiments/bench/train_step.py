"""One whole training step of MiniLM by method: forward, backward, clipping, update, parameters.

    python -m experiments.bench.train_step [--rounds 20]

The step of experiments.finetune itself (jitted, donated), pretrained weights, one batch of 32 rows
of 64 random tokens, rank 8 on all 36 linear layers of the encoder. The reference is plain LoRA
with optax.adamw.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import tyro

from experiments import prepare
from experiments.bench import timing
from experiments.config import Command, runs
from experiments.methods import METHODS


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    rounds: int = 20
    batch: int = 32
    length: int = 64
    model: str = "minilm"
    results: pathlib.Path = pathlib.Path("experiments/results/bench_train_step.jsonl")


def batch(settings: Settings) -> dict[str, np.ndarray]:
    """Full rows of random tokens, as experiments.data makes them."""
    rng = np.random.default_rng(0)
    shape = settings.batch, settings.length
    return {
        "tokens": rng.integers(5, 500, shape, np.int32),
        "segments": np.zeros(shape, np.int32),
        "mask": np.ones(shape, bool),
        "labels": rng.integers(0, 2, settings.batch, np.int32),
        "weights": np.ones(settings.batch, np.float32),
        "ids": np.arange(settings.batch, dtype=np.int32),
    }


def stepper(method: str, settings: Settings) -> tuple[Callable[[], None], int]:
    """(one training step that keeps its own parameters and state, bytes of optimizer state)."""
    (run,) = runs(Command(model=settings.model, methods=(method,), train_examples=64))
    setup, params = prepare.build(run, prepare.load_data(run, None))
    step, carry = setup.programs.step.jitted, [params, setup.programs.init(params)]
    held = sum(x.nbytes for x in jax.tree.leaves(carry[1]) if x.ndim)
    inputs = batch(settings)

    def call() -> None:
        params, state, loss = step(*carry, setup.frozen, inputs, np.int32(0), setup.varied)
        carry[:] = params, state
        jax.block_until_ready((carry, loss))

    return call, held


def main(settings: Settings) -> None:
    """Measures, shows, and appends one JSON line per method."""
    made = {method: stepper(method, settings) for method in METHODS}
    calls = {name: call for name, (call, _) in made.items()}
    rows = timing.summary(timing.by_turns(calls, settings.rounds), "lora")
    for row in rows:
        row["state_bytes"] = made[row["variant"]][1]
    timing.show(rows, f"one training step, {settings.batch} x {settings.length} tokens")
    timing.append(rows, "train_step", settings, settings.results)


if __name__ == "__main__":
    main(tyro.cli(Settings))
