"""One training step of MiniLM's six layers: LoRA under AdamW, LoRA-Pro, and full fine-tuning.

    python -m benchmarks.train_step

32 x 64 positions, rank 8 on all 36 linear maps, random weights, in Flax NNX and in Linen. A step is
loss, gradients, update and new parameters, jitted with donated buffers. Embeddings are left out:
they cost LoRA nothing, and full fine-tuning has 12 million more parameters with them.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks import stacks, t5, timing
from experiments.models.bert import BertConfig
from experiments.pod.step import updated

MINILM = BertConfig(30_522, 384, 6, 12, 1536)  # vocabulary, width, layers, heads, the MLP's width
ADAPTED = ("adamw", "factored", "full", "muon")  # rules that train the factors
MOST = {"factored": 1.08}  # over LoRA under AdamW; the others have no bound


def stepper(layers: Callable, tx: Any, trained: Any, *fixed: Any) -> Callable[[], None]:
    """One training step, which keeps its own parameters and state."""

    def loss(trained, *fixed):  # any would do that has a gradient
        return jnp.mean(jnp.square(layers(trained, *fixed) - 0.1))

    def step(trained, state, *fixed):
        value, grads = jax.value_and_grad(loss)(trained, *fixed)
        return *updated(tx, grads, state, trained), value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    carry = [jax.tree.map(jnp.copy, trained), tx.init(trained)]

    def call() -> None:
        *carry[:], value = compiled(*carry, *fixed)
        jax.block_until_ready((carry, value))

    return call


def steppers(framework: str, config: BertConfig, rank: int, inputs: tuple) -> dict[str, Callable]:
    """{variant: step} of one framework."""
    stack, tx = stacks.FRAMEWORKS[framework](config, rank), t5.transformations()
    calls = {"fine-tuning adamw": stepper(stack.plain, tx["adamw"], stack.weights, *inputs)}
    for name in ADAPTED:
        adapted = stepper(stack.adapted, tx[name], stack.factors, stack.weights, *inputs)
        calls[f"lora {name}"] = adapted
    return {f"{framework} {name}": call for name, call in calls.items()}


def measure(config: BertConfig, batch: int, length: int, rank: int, rounds: int) -> timing.Times:
    """Seconds of all variants in both frameworks."""
    x_BTD = jax.random.normal(jax.random.key(0), (batch, length, config.hidden_size), jnp.float32)
    inputs = x_BTD, jnp.zeros((batch, 1, 1, length), jnp.float32)  # nothing is padded
    by_framework = [steppers(name, config, rank, inputs) for name in stacks.FRAMEWORKS]
    return timing.by_turns(by_framework[0] | by_framework[1], rounds)


def bounds(times: timing.Times) -> list[dict]:
    """The ratios, with their bounds where they have one."""
    return [
        timing.ratio(times, f"{framework} {over}", f"{framework} {under}", most=most)
        for framework in stacks.FRAMEWORKS
        for over, under, most in (
            *((f"lora {name}", "lora adamw", MOST.get(name)) for name in ADAPTED[1:]),
            ("lora adamw", "fine-tuning adamw", 0.95),
        )
    ]


def main(
    rounds: int = 20,
    out: pathlib.Path = timing.RESULTS / "train_step.jsonl",
) -> None:
    """Measures, shows, and appends JSON lines."""
    sizes = {"batch": 32, "length": 64, "rank": 8, "rounds": rounds}
    times = measure(MINILM, **sizes)
    timing.report("train_step", timing.medians(times), bounds(times), sizes, out)


if __name__ == "__main__":
    tyro.cli(main)
