"""What an update costs on a TPU v5e, by its compiler's own estimate, on a machine without one.

    python -m benchmarks.tpu

Needs libtpu. T5-base's 192 pairs, r = 8, float32, on one chip, jitted with donated buffers: the sum
of the estimated cycles of all kernels, loops times their trips, and the custom calls, whose inside
is not counted. `python -m experiments.pod` compiles whole training steps.
"""

import pathlib
import time
from typing import Any

import jax
import tyro
from jax.sharding import SingleDeviceSharding

from benchmarks import t5, timing
from experiments.pod.costs import cost
from experiments.pod.slice import devices

SMALLEST = "v5e:2x2"


def on(device: Any, tree: Any) -> Any:
    """The abstract tree with every leaf on one device."""
    where = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def compiled_update(variant: str, shapes: t5.Shapes, rank: int, device: Any) -> str:
    """The text of one update."""
    tx, params = t5.transformations()[variant], t5.abstract(shapes, rank)
    params, state = on(device, params), on(device, jax.eval_shape(tx.init, params))
    return t5.step(tx).lower(params, state, params).compile().as_text()


def row(variant: str, text: str, seconds: float) -> dict:
    """One row of figures from a compiled text."""
    found = cost(text)
    return {
        "variant": variant,
        "cycles": found.cycles,
        "kernels": found.kernels,
        "custom_calls": found.custom_calls,
        "unknown_loops": found.unknown_loops,
        "without_estimate": [f"{n} {name}" for name, n in found.without_estimate.most_common()],
        "dearest": [f"{n} {name}" for name, n in found.by_operation.most_common(6)],
        "seconds": seconds,
    }


def measure(variants: tuple[str, ...], shapes: t5.Shapes, rank: int) -> list[dict]:
    """One row for each variant."""
    device, rows = devices(SMALLEST)[0], []
    for variant in variants:
        start = time.perf_counter()
        text = compiled_update(variant, shapes, rank, device)
        rows.append(row(variant, text, time.perf_counter() - start))
    return rows


def bounds(rows: list[dict]) -> list[dict]:
    """The figures that have a bound."""
    by = {row["variant"]: row for row in rows}
    found = []
    if {"adamw", "factored"} <= by.keys():
        share = by["factored"]["cycles"] / by["adamw"]["cycles"]
        calls = sum(len(by[name]["custom_calls"]) for name in by if name in ("factored", "full"))
        found += [
            timing.bounded("factored / adamw, cycles", share, most=3.0),
            timing.bounded("custom calls in LoRA-Pro's updates", calls, most=0),
        ]
    return found


def main(
    variants: tuple[str, ...] = ("adamw", "chain", "factored", "full"),
    layers: int = t5.LAYERS,
    rank: int = 8,
    out: pathlib.Path = timing.RESULTS / "tpu.jsonl",
) -> None:
    """Compiles, shows, and appends JSON lines."""
    rows = measure(variants, t5.base(layers), rank)
    settings = {"layers": layers, "rank": rank, "topology": SMALLEST}
    timing.report("tpu", rows, bounds(rows), settings, out)


if __name__ == "__main__":
    tyro.cli(main)
