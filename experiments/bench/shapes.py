"""The update alone at the adapters of T5-base, Llama-3-8B and Llama-3-70B, one layer of each.

    python -m experiments.bench.shapes [--models t5-base] [--ranks 8 16] [--rounds 20]

Float32, random factors and gradients, whole jitted steps with donated buffers, as in `update`.

`least_bytes` is what a variant must read and write once: with F entries in a model's factors and
D in its weights, adamw and efficient 7 F (factors, moments; and gradients, read only), factored 5 F
and twice its row and column means, full 3 F + 4 D, dense floor 4 D, dense adam 7 D. `over_copy` is
the time over that of moving as many bytes by a copy (x + 1 in place on 256 MiB) in the same run. A
layer of T5-base at rank 8 stays in the caches, where calls and small kernels cost more than bytes;
there it says little.

Full mode at Llama-3-70B holds 6.8 GB and takes seconds: it runs at `full_ranks_70b` only. Dense
variants do not depend on the rank, are measured once, and are left out where their arrays would be
more than `dense_gib` (dense adam of a layer of Llama-3-70B is 12.7 GiB). Groups of variants that
need not be in memory together are measured one after the other, each with its own adamw and copy.

The exponents are slopes of log time against log rank, and of T5-base at rank 8 against the log of
the number of layers and, in six layers, of m + n: all widths times `widths`.
"""

import dataclasses
import gc
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import tyro

from experiments.bench import floors, timing
from experiments.bench.update import T5_MLP, stepper, transformations, tree
from experiments.provenance import provenance

# input and output widths of a layer's linear maps
LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "t5-base": dict.fromkeys("qkvo", (768, 768)) | T5_MLP,
    "llama-3-8b": dict.fromkeys("qo", (4096, 4096))
    | dict.fromkeys("kv", (4096, 1024))
    | dict.fromkeys(("gate", "up"), (4096, 14336))
    | {"down": (14336, 4096)},
    "llama-3-70b": dict.fromkeys("qo", (8192, 8192))
    | dict.fromkeys("kv", (8192, 1024))
    | dict.fromkeys(("gate", "up"), (8192, 28672))
    | {"down": (28672, 8192)},
}
LARGE = "llama-3-70b"
BY_SIZE = "t5-base"
PROJECTED = ("efficient", "factored", "full")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    models: tuple[str, ...] = tuple(LAYERS)
    ranks: tuple[int, ...] = (8, 16, 64, 128)
    layers: int = 1
    layer_counts: tuple[int, ...] = (1, 2, 4, 12)
    """Of T5-base, for the exponent in the number of layers; none: not measured."""
    widths: tuple[int, ...] = (1, 2, 4)
    """Multiples of T5-base's, for the exponent in m + n; none: not measured."""
    full_ranks_70b: tuple[int, ...] = (8, 64)
    dense_gib: float = 8.0
    rounds: int = 20
    slow_rounds: int = 3
    """Of variants that hold (m, n) arrays."""
    results: pathlib.Path = pathlib.Path("experiments/results/bench_shapes.jsonl")


def weights(model: str, layers: int, width: int = 1) -> dict[str, tuple[int, int]]:
    """{layer_i/place: (m, n)}, all of them `width` times the model's."""
    return {
        f"layer_{i}/{place}": (width * m, width * n)
        for i in range(layers)
        for place, (m, n) in LAYERS[model].items()
    }


def least_bytes(variant: str, shapes: dict[str, tuple[int, int]], rank: int) -> int:
    """Bytes that a variant must read and write at least, each once, in float32."""
    factors = rank * sum(m + n for m, n in shapes.values())
    dense = sum(m * n for m, n in shapes.values())
    means = sum(m + n for m, n in shapes.values())
    entries = {
        "adamw": 7 * factors,
        "efficient": 7 * factors,
        "factored": 5 * factors + 2 * means,
        "full": 3 * factors + 4 * dense,
        "dense floor": 4 * dense,
        "dense adam": 7 * dense,
    }
    return 4 * entries[variant]


def measured(
    model: str, layers: int, rank: int, variants: tuple[str, ...], s: Settings, width: int = 1
) -> list[dict]:
    """Rows of the variants that are in memory together; adamw is the first of them."""
    shapes = weights(model, layers, width)
    calls: dict[Any, Callable] = {}
    held: dict[str, int] = {}
    calls["copy"], copied = floors.copy()
    params, grads = (tree(shapes, rank, seed) for seed in (0, 1))
    dense = {"dense floor": floors.dense_floor, "dense adam": floors.dense_adam}
    for name in ("adamw", *variants):
        if name in dense:
            calls[name], held[name] = dense[name](list(shapes.values()))
        else:
            calls[name], held[name] = stepper(transformations()[name], params, grads)
    few = dict.fromkeys(("full", *dense), s.slow_rounds)
    times: dict[Any, list[float]] = timing.by_turns(calls, s.rounds, few)
    per_byte = statistics.median(times.pop("copy")) / copied
    rows = []
    for row in timing.summary(times, "adamw"):
        name = row["variant"]
        least = least_bytes(name, shapes, rank)
        rows.append(
            {"model": model, "layers": layers, "width": width}
            | {"rank": None if name in dense else rank}
            | row
            | {
                "state_bytes": held[name],
                "least_bytes": least,
                "over_copy": row["median_s"] / (least * per_byte),
                "copy_gb_s": 1e-9 / per_byte,
            }
        )
    return rows


def by_rank(model: str, s: Settings) -> list[dict]:
    """All variants at all ranks, in parts that fit the memory."""
    rows = []
    for rank in s.ranks:
        rows += measured(model, s.layers, rank, ("efficient", "factored"), s)
        gc.collect()
        if model != LARGE or rank in s.full_ranks_70b:
            rows += measured(model, s.layers, rank, ("full",), s)[1:]
            gc.collect()
    dense = sum(m * n for m, n in weights(model, s.layers).values())
    for name, arrays in (("dense floor", 2), ("dense adam", 4)):
        if 4 * arrays * dense <= s.dense_gib * 2**30:
            rows += measured(model, s.layers, s.ranks[0], (name,), s)[1:]
            gc.collect()
    return rows


def by_layers(s: Settings) -> list[dict]:
    """T5-base at rank 8 with several numbers of layers."""
    return [r for n in s.layer_counts for r in measured(BY_SIZE, n, 8, PROJECTED, s)]


def by_width(s: Settings) -> list[dict]:
    """Six layers of T5-base at rank 8, and of wider ones."""
    return [r for k in s.widths for r in measured(BY_SIZE, 6, 8, PROJECTED, s, width=k)]


def exponents(rows: list[dict], of: str) -> list[dict]:
    """Slopes of log time by log `of`, for each model and variant with two values or more."""
    result = []
    for model, variant in dict.fromkeys((row["model"], row["variant"]) for row in rows):
        mine = [r for r in rows if (r["model"], r["variant"]) == (model, variant) and r[of]]
        values = [r[of] for r in mine]
        if len(set(values)) < 2:
            continue
        slope = np.polyfit(np.log(values), np.log([r["median_s"] for r in mine]), 1)[0]
        told = {"model": model, "variant": variant, "time_by": of, "exponent": float(slope)}
        result.append(told | {"from": values})
    return result


def main(settings: Settings) -> None:
    """Measures, shows, and appends one JSON line per variant, and one per exponent."""
    born, rows, slopes = provenance(), [], []  # all lines are of one measurement

    def keep(mine: list[dict], title: str, of: str) -> None:
        timing.show(mine, f"one update of {title}, float32")
        rows.extend(mine)
        slopes.extend(exponents(mine, of))

    for model in settings.models:
        keep(by_rank(model, settings), f"{settings.layers} layer(s) of {model}", "rank")
    if settings.layer_counts:
        keep(by_layers(settings), f"{BY_SIZE} by number of layers", "layers")
    if settings.widths:
        keep(by_width(settings), f"{BY_SIZE} by width", "width")
    timing.append(rows, "shapes", settings, settings.results, born)
    if slopes:
        timing.show(slopes, "time ~ x ** exponent")
        timing.append(slopes, "shapes_exponent", settings, settings.results, born)


if __name__ == "__main__":
    main(tyro.cli(Settings))
