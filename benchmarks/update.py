"""One update of T5-base's 192 pairs: AdamW, LoRA-Pro's modes, dense Adam, and a PyTorch package.

    python -m benchmarks.update [--peer]

Float32, random factors and gradients. One call is one whole step, parameters included, jitted with
donated buffers. "dense adam" is optax.adamw on the (m, n) weights themselves: four arrays of them,
3.2 GB. `--peer` adds lora-pro-adamw on PyTorch, on the same numbers: install exactly
`pip install torch==2.13.0`, then `pip install --no-deps lora-pro-adamw==0.2.1`.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import t5, timing

SLOW = ("full", "dense adam", "peer efficient", "peer full")


def stepper(tx: optax.GradientTransformation, params: Any, grads: Any) -> Callable[[], None]:
    """One whole step, which keeps its own parameters and state."""
    update = t5.step(tx)
    carry = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def call() -> None:
        carry[:] = update(*carry, grads)
        jax.block_until_ready(carry)

    return call


def ours(shapes: t5.Shapes, rank: int) -> dict[str, Callable[[], None]]:
    """The library's steps, plain AdamW's, and dense Adam's."""
    params, grads = (t5.normal(t5.abstract(shapes, rank), seed) for seed in (0, 1))
    calls = {name: stepper(tx, params, grads) for name, tx in t5.transformations().items()}
    dense = {name: jnp.full(shape, 1e-2, jnp.float32) for name, shape in shapes.items()}
    adam = optax.adamw(t5.RATE, weight_decay=0.0)
    return calls | {"dense adam": stepper(adam, dense, jax.tree.map(jnp.copy, dense))}


def peers(shapes: t5.Shapes, rank: int) -> dict[str, Callable[[], None]]:
    """The PyTorch package's steps in both modes; an ImportError where it is not installed."""
    import torch
    from lora_pro import LoRAProAdamW

    params, grads = (t5.normal(t5.abstract(shapes, rank), seed) for seed in (0, 1))

    def transposed(x: jax.Array) -> Any:  # its A is (r, in) and its B (out, r)
        return torch.tensor(np.array(x).T.copy())

    class Pair(torch.nn.Module):
        def __init__(self, node: dict):
            super().__init__()
            self.lora_A = torch.nn.Parameter(transposed(node["lora_a"]))
            self.lora_B = torch.nn.Parameter(transposed(node["lora_b"]))
            self.lora_alpha, self.r = t5.SCALE * rank, rank

    def one(mode: str) -> Callable[[], None]:
        model = torch.nn.ModuleList(Pair(node) for node in params.values())
        optimizer = LoRAProAdamW(model, lr=t5.RATE, weight_decay=0.0, lorapro_mode=mode)
        gradients = [transposed(node[x]) for node in grads.values() for x in ("lora_a", "lora_b")]

        def call() -> None:
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()  # the package overwrites gradients in place
            optimizer.step()

        return call

    return {f"peer {mode}": one(mode) for mode in ("efficient", "full")}


def bounds(times: timing.Times) -> list[dict]:
    """The ratios that have a bound."""
    wanted = [("factored", "adamw", 8.0, 0.0), ("full", "dense adam", 2.0, 0.0)]
    wanted += [("muon", "factored", 1.3, 0.0)]
    if "peer full" in times:
        wanted += [("peer efficient", "chain", None, 25.0), ("peer full", "full", None, 10.0)]
    return [timing.ratio(times, *pair, most=most, least=least) for *pair, most, least in wanted]


def main(
    rounds: int = 40,
    slow_rounds: int = 10,
    rank: int = 8,
    peer: bool = False,
    out: pathlib.Path = timing.RESULTS / "update.jsonl",
) -> None:
    """Measures, shows, and appends JSON lines."""
    shapes = t5.base()
    calls = ours(shapes, rank) | (peers(shapes, rank) if peer else {})
    times = timing.by_turns(calls, rounds, dict.fromkeys(SLOW, slow_rounds))
    settings = {"rounds": rounds, "slow_rounds": slow_rounds, "rank": rank}
    timing.report("update", timing.medians(times), bounds(times), settings, out)


if __name__ == "__main__":
    tyro.cli(main)
