"""Seconds to trace and compile one update: 1,000 separate pairs, and 30 stacked over 32 layers.

    python -m benchmarks.compile_time

Separate pairs are 100 decoder layers of T5-base's widths, layers/<i>/...; stacked ones are three
such layers, each with a leading axis of 32, as a scan over layers has. What is compiled is
`tx.update` alone, without donation, each in a fresh process. No array is allocated.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import pathlib
import time
from typing import Literal

import jax
import tyro

import lorapro_jax as lp
from benchmarks import t5, timing

Kind = Literal["separate", "stacked"]
LAYERS = {"separate": 100, "stacked": 3}
DEPTH = 32  # of a stack
LIMITS = {"separate": 20.0, "stacked": 5.0}  # seconds, of factored mode


def workload(kind: Kind, layers: int, rank: int) -> tuple[dict, lp.Layout | None]:
    """The abstract pairs and their layout."""
    shapes = {f"layers/{i}/{x}": mn for i in range(layers) for x, mn in t5.DECODER.items()}
    if kind == "separate":
        return t5.abstract(shapes, rank), None
    dimensions = lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))
    return t5.abstract(shapes, rank, (DEPTH,)), lp.layouts.FLAX.declare({r".*": dimensions})


def measure(kind: Kind, variant: str, layers: int, rank: int) -> dict:
    """One row, measured in this process."""
    params, layout = workload(kind, layers, rank)
    tx = t5.transformations(layout)[variant]
    state = jax.eval_shape(tx.init, params)
    start = time.perf_counter()
    lowered = jax.jit(tx.update).lower(params, state, params)
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    row = {"kind": kind, "variant": variant, "pairs": len(params)}
    return row | {"trace_s": middle - start, "compile_s": end - middle, "total_s": end - start}


def bounds(rows: list[dict]) -> list[dict]:
    """The figures that have a bound."""
    factored = [row for row in rows if row["variant"] == "factored"]
    names = [f"factored, {row['pairs']} {row['kind']} pairs, seconds" for row in factored]
    return [
        timing.bounded(name, row["total_s"], most=LIMITS[row["kind"]])
        for name, row in zip(names, factored, strict=True)
    ]


def main(rank: int = 8, out: pathlib.Path = timing.RESULTS / "compile_time.jsonl") -> None:
    """Measures, shows, and appends JSON lines."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # of the fresh processes
    rows, context = [], multiprocessing.get_context("spawn")
    for kind, variant in itertools.product(LAYERS, ("adamw", "factored", "full")):
        with concurrent.futures.ProcessPoolExecutor(1, context) as fresh:
            rows.append(fresh.submit(measure, kind, variant, LAYERS[kind], rank).result())
    timing.report("compile_time", rows, bounds(rows), {"rank": rank}, out)


if __name__ == "__main__":
    tyro.cli(main)
