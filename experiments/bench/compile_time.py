"""Compile time of the update at 12 to 1000 pairs of three shapes.

    python -m experiments.bench.compile_time

Tracing and compilation of `tx.update` alone, each in a fresh jit, for optax.adamw on the same tree
(which compiles one kernel per distinct leaf, too), the stateless projection, and the modes of
lorapro_adamw. `growth` is the time over the time at 12 pairs.
"""

import dataclasses
import pathlib
import time

import jax
import optax
import tyro

import lorapro_jax as lp
from experiments.bench import timing
from experiments.bench.update import SCALE, T5_MLP, transformations


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    pairs: tuple[int, ...] = (12, 48, 192, 1000)
    rank: int = 8
    results: pathlib.Path = pathlib.Path("experiments/results/bench_compile_time.jsonl")


def shapes(pairs: int) -> list[tuple[int, int]]:
    """T5-base's three shapes in T5-base's proportions (6 : 1 : 1)."""
    eighth = max(pairs // 8, 1)
    return [(768, 768)] * (pairs - 2 * eighth) + [T5_MLP["wi"]] * eighth + [T5_MLP["wo"]] * eighth


def tree(rank: int, pairs: list[tuple[int, int]]) -> dict:
    """Shapes of {name: {lora_a (m, r), lora_b (r, n)}} in float32."""
    return {
        f"layer_{i:03d}": {
            "lora_a": jax.ShapeDtypeStruct((m, rank), "float32"),
            "lora_b": jax.ShapeDtypeStruct((rank, n), "float32"),
        }
        for i, (m, n) in enumerate(pairs)
    }


def seconds(tx: optax.GradientTransformation, params: dict) -> tuple[float, float]:
    """(tracing and lowering, compilation) of one update; no array is allocated."""
    state = jax.eval_shape(tx.init, params)
    start = time.perf_counter()
    lowered = jax.jit(lambda g, s, p: tx.update(g, s, p)).lower(params, state, params)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def main(settings: Settings) -> None:
    """Measures, shows, and appends one JSON line per variant and number of pairs."""
    rows = []
    for name, tx in (transformations() | {"projection": lp.lorapro(SCALE)}).items():
        first = None
        for pairs in settings.pairs:
            trace, compile_ = seconds(tx, tree(settings.rank, shapes(pairs)))
            first = first or trace + compile_
            rows.append(
                {
                    "variant": name,
                    "pairs": pairs,
                    "trace_s": trace,
                    "compile_s": compile_,
                    "growth": (trace + compile_) / first,
                }
            )
    timing.show(rows, "compile time of the update")
    timing.append(rows, "compile_time", settings, settings.results)


if __name__ == "__main__":
    main(tyro.cli(Settings))
