"""Full mode's pass over the moments of one pair, against Adam's own pass over the same arrays.

    python -m experiments.bench.full_pass [--rounds 10]

One pair of each shape and rank, float32, random factors and gradients. A call is one update,
jitted, with the state donated. The reference, "floor", is a pass that reads and writes two (m, n)
arrays once by Adam's elementwise rule, donated too. "products" has no moments: it forms g~ from the
factors and projects it, 8 r floating point operations an entry, in blocks of rows that fit a cache.
"square" does as many operations in products of square matrices. `temp_bytes` and `bytes_accessed`
are what XLA says of the compiled program; the least that can be accessed is 16 m n bytes. XLA
counts the body of a loop once for all of its trips.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import lorapro_jax as lp
from experiments.bench import timing

BLOCK = 4 << 20  # bytes of g~ in a block of `products`
SQUARE = 512  # rows of the matrices of `square`
dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)

SHAPES = ((768, 3072), (4096, 4096), (8192, 28672))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    rounds: int = 10
    ranks: tuple[int, ...] = (8, 64)
    shapes: tuple[tuple[int, int], ...] = SHAPES
    results: pathlib.Path = pathlib.Path("experiments/results/bench_full_pass.jsonl")


def floor(state: tuple, seed: jax.Array) -> tuple:
    """Adam's new moments and no direction, from a gradient that costs no memory traffic."""
    m, v = state
    g = jnp.broadcast_to(seed, m.shape)
    return 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g


def products(carry: tuple, params: dict, grads: dict) -> tuple:
    """(h_a, h_b) of g~ = da b + a db, a block of rows at a time; (da, db) are the gradients."""
    a, b, da, db = (x["q"][name] for x in (params, grads) for name in ("lora_a", "lora_b"))
    wanted = 1 << (4 * a.shape[0] * b.shape[1] // BLOCK).bit_length()
    blocks = math.gcd(a.shape[0], wanted)
    rows = [x.reshape(blocks, -1, x.shape[1]) for x in (a, da)]

    def block(h_b, rows):
        a, da = rows
        g = dot(jnp.concatenate([da, a], axis=1), jnp.concatenate([b, db]))
        return h_b + dot(a.T, g), dot(g, b.T)

    _, old_h_b = carry
    h_b, h_a = jax.lax.scan(block, jnp.zeros_like(old_h_b), rows)
    return h_a.reshape(a.shape), h_b


def square(carry: tuple, x: jax.Array, count: int) -> tuple:
    """`count` products of x with itself, one after the other."""
    (y,) = carry
    return (jax.lax.fori_loop(0, count, lambda _, y: dot(x, y), y),)


def pair(key: jax.Array, shape: tuple[int, int], rank: int) -> dict:
    """A pair's factors, or their gradients."""
    (m, n), keys = shape, jax.random.split(key)
    a, b = jax.random.normal(keys[0], (m, rank)), jax.random.normal(keys[1], (rank, n))
    return {"q": {"lora_a": a / m**0.5, "lora_b": b / n**0.5}}


def compiled(step: Callable, state: Any, *args: Any) -> tuple[Callable, dict]:
    """(a call that keeps its own state, what XLA says of the program)."""
    program = jax.jit(step, donate_argnums=0).lower(state, *args).compile()
    memory, cost = program.memory_analysis(), program.cost_analysis()
    held = [state]

    def call() -> None:
        held[0] = program(held[0], *args)
        jax.block_until_ready(held)

    told = {"temp_bytes": memory.temp_size_in_bytes, "bytes_accessed": cost["bytes accessed"]}
    return call, told


def full(shape: tuple[int, int], rank: int) -> tuple[Callable, tuple, dict, dict]:
    """Full mode on one pair: a step, what it carries, and its other two arguments."""
    params, grads = (pair(jax.random.key(i), shape, rank) for i in range(2))
    tx = lp.scale_by_lorapro_adam(2.0, mode="full")

    def step(carry, params, grads):
        state, _ = carry
        updates, state = tx.update(grads, state, params)
        return state, updates

    return step, (tx.init(params), jax.tree.map(jnp.zeros_like, params)), params, grads


def programs(shape: tuple[int, int], rank: int) -> dict[str, tuple[Callable, dict]]:
    """The floors and full mode."""
    step, state, params, grads = full(shape, rank)
    moments = jnp.zeros(shape), jnp.zeros(shape)
    slopes = jnp.zeros((shape[0], rank)), jnp.zeros((rank, shape[1]))
    count = max(1, round(8 * rank * math.prod(shape) / (2 * SQUARE**3)))
    eye = jnp.eye(SQUARE)
    return {
        "floor": compiled(floor, moments, jnp.ones((), jnp.float32)),
        "products": compiled(products, slopes, params, grads),
        "square": compiled(functools.partial(square, count=count), (eye + 0,), eye),
        "full": compiled(step, state, params, grads),
    }


def main(settings: Settings) -> None:
    """Measures, shows, and appends one JSON line per variant, shape and rank."""
    for shape in settings.shapes:
        for rank in settings.ranks:
            made = programs(shape, rank)
            times = timing.by_turns({k: call for k, (call, _) in made.items()}, settings.rounds)
            rows = timing.summary(times, "floor")
            for row in rows:
                row |= {
                    "m": shape[0],
                    "n": shape[1],
                    "rank": rank,
                    "floor_bytes": 16 * shape[0] * shape[1],
                    "products_flops": 8 * rank * shape[0] * shape[1],
                }
                row |= made[row["variant"]][1]
            timing.show(rows, f"{shape[0]} x {shape[1]}, r = {rank}, float32")
            timing.append(rows, "full_pass", settings, settings.results)


if __name__ == "__main__":
    main(tyro.cli(Settings))
