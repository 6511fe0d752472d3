"""The update alone, on the adapters of T5-base: ours, plain Adam, and lora-pro-adamw on PyTorch.

    python -m experiments.bench.update [--rounds 60]

192 pairs under T5-base's own names (16 kinds in 12 layers each: the library makes a group of each
kind), 144 of 768 x 768 and 48 of 768 x 3072 (half of them transposed), r = 8, float32, random
factors and gradients. `--one-kind` names them alike: a few large groups in the place of 16. One
call is one whole optimizer step, parameters included, jitted with donated buffers. The reference is
optax.adamw on the same tree. "dense floor" is one pass over two (m, n) moments a pair, which full
mode cannot do without (`floors.dense_floor`), "dense adam" plain Adam on (m, n) weights, which
reads a gradient and writes an update besides. The PyTorch rows appear where `torch` and
`lora-pro-adamw` are installed (pip install torch==2.13.0; pip install --no-deps
lora-pro-adamw==0.2.1); its efficient mode runs its default solver. `ratio_to_ours` compares a row
with our row of the same mode (the dense ones with full), round by round.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console

import lorapro_jax as lp
from experiments.bench import floors, timing

T5_MLP = {"wi": (768, 3072), "wo": (3072, 768)}
SHAPES = {
    f"{stack}/block_{i}/{place}": T5_MLP.get(place[-2:], (768, 768))
    for stack, attentions in (("encoder", ("self",)), ("decoder", ("self", "cross")))
    for i in range(12)
    for place in (*(f"{kind}/{x}" for kind in attentions for x in "qkvo"), "mlp/wi", "mlp/wo")
}
SCALE = 2.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are T5-base's adapters."""

    rounds: int = 60
    torch_rounds: int = 20  # of PyTorch's efficient mode
    full_rounds: int = 10  # of both full modes and the dense variants
    rank: int = 8
    one_kind: bool = False
    results: pathlib.Path = pathlib.Path("experiments/results/bench_update.jsonl")


def tree(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> dict:
    """{name: {lora_a (m, r), lora_b (r, n)}} of normals with a variance of 1/m, float32."""
    rng = np.random.default_rng(seed)

    def factor(rows: int, cols: int, m: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((rows, cols), np.float32) / np.float32(m**0.5))

    return {
        name: {"lora_a": factor(m, rank, m), "lora_b": factor(rank, n, m)}
        for name, (m, n) in shapes.items()
    }


def transformations() -> dict[str, optax.GradientTransformation]:
    """The reference and our modes."""
    return {
        "adamw": optax.adamw(1e-4, weight_decay=0.0),
        "efficient": lp.lorapro_adamw(1e-4, SCALE, mode="efficient"),
        "factored": lp.lorapro_adamw(1e-4, SCALE, mode="factored"),
        "full": lp.lorapro_adamw(1e-4, SCALE, mode="full"),
    }


def stepper(tx: optax.GradientTransformation, params: dict, grads: dict) -> tuple[Callable, int]:
    """(one whole step, bytes of optimizer state); the step keeps its own parameters and state."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    carry = [jax.tree.map(jnp.copy, params), tx.init(params)]
    held = sum(x.nbytes for x in jax.tree.leaves(carry[1]) if x.ndim)

    def call() -> None:
        carry[:] = step(*carry, grads)
        jax.block_until_ready(carry)

    return call, held


def torch_steppers(params: dict, grads: dict, rank: int) -> dict[str, Callable]:
    """The PyTorch package in both modes, on the same numbers."""
    import torch
    from lora_pro import LoRAProAdamW

    class Pair(torch.nn.Module):
        def __init__(self, node: dict):
            super().__init__()
            # its A is (r, in) and its B (out, r): the transposes of our b and a
            self.lora_A = torch.nn.Parameter(torch.tensor(np.array(node["lora_a"]).T.copy()))
            self.lora_B = torch.nn.Parameter(torch.tensor(np.array(node["lora_b"]).T.copy()))
            self.lora_alpha, self.r = SCALE * rank, rank

    def one(mode: str) -> Callable:
        model = torch.nn.ModuleList(Pair(node) for node in params.values())
        optimizer = LoRAProAdamW(model, lr=1e-4, weight_decay=0.0, lorapro_mode=mode)
        gradients = [
            torch.tensor(np.array(node[name]).T.copy())
            for node in grads.values()
            for name in ("lora_a", "lora_b")
        ]

        def call() -> None:
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()  # the package overwrites gradients in place
            optimizer.step()

        return call

    return {f"torch {mode}": one(mode) for mode in ("efficient", "full")}


def main(settings: Settings) -> None:
    """Measures, shows, and appends one JSON line per variant."""
    shapes = SHAPES
    if settings.one_kind:
        shapes = {f"layer_{i:03d}": shape for i, shape in enumerate(sorted(SHAPES.values()))}
    params, grads = (tree(shapes, settings.rank, seed) for seed in (0, 1))
    made = {name: stepper(tx, params, grads) for name, tx in transformations().items()}
    made["dense floor"] = floors.dense_floor(list(shapes.values()))
    made["dense adam"] = floors.dense_adam(list(shapes.values()))
    calls = {name: call for name, (call, _) in made.items()}
    few = dict.fromkeys(("full", "dense floor", "dense adam"), settings.full_rounds)
    if all(importlib.util.find_spec(name) for name in ("torch", "lora_pro")):
        theirs = torch_steppers(params, grads, settings.rank)
        calls |= theirs
        few |= {"torch efficient": settings.torch_rounds, "torch full": settings.full_rounds}
    else:
        Console().print("torch or lora_pro is not installed: its rows are left out")
    times = timing.by_turns(calls, settings.rounds, few)
    rows = timing.summary(times, "adamw")
    for row in rows:
        mode = row["variant"].removeprefix("torch ")
        mode = "full" if mode.startswith("dense") else mode
        pairs = zip(times[row["variant"]], times[mode], strict=False)
        row["ratio_to_ours"] = statistics.median(x / y for x, y in pairs)
        row["state_bytes"] = made[row["variant"]][1] if row["variant"] in made else None
    timing.show(rows, f"one update of {len(shapes)} pairs, r = {settings.rank}, float32")
    timing.append(rows, "update", settings, settings.results)


if __name__ == "__main__":
    main(tyro.cli(Settings))
