"""Seconds to trace and compile one update: 1,000 separate pairs, and 30 stacked over 32 layers.

    python -m benchmarks.compile_time

Separate pairs are 100 decoder layers of T5-base's widths, layers/<i>/...; stacked ones are three
such layers, each with a leading axis of 32, as a scan over layers has. What is compiled is
`tx.update` alone, without donation. Every figure is of a fresh process without a compilation cache;
no array is allocated.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Literal

import jax
import tyro

import lorapro_jax as lp
from benchmarks import t5, timing

Variant = Literal["adamw", "chain", "factored", "full"]
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


def measure(kind: Kind, variant: Variant, layers: int, rank: int) -> dict:
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


def in_fresh_process(kind: Kind, variant: Variant, layers: int, rank: int) -> dict:
    """The same row from a process that has compiled nothing."""
    flags = ["--only", kind, variant, "--layers", str(layers), "--rank", str(rank)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_time", *flags],
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def bounds(rows: list[dict]) -> list[dict]:
    """The figures that have a bound."""
    return [
        timing.bounded(
            f"factored, {row['pairs']} {row['kind']} pairs, seconds",
            row["total_s"],
            most=LIMITS[row["kind"]],
        )
        for row in rows
        if row["variant"] == "factored"
    ]


def main(
    kinds: tuple[Kind, ...] = ("separate", "stacked"),
    variants: tuple[Variant, ...] = ("adamw", "factored", "full"),
    layers: int | None = None,
    rank: int = 8,
    only: tuple[Kind, Variant] | None = None,
    out: pathlib.Path = timing.RESULTS / "compile_time.jsonl",
) -> None:
    """Measures, shows, and appends JSON lines; with `only`, prints one row of this process."""
    if only:
        print(json.dumps(measure(*only, layers or LAYERS[only[0]], rank)))
        return
    rows = [
        in_fresh_process(kind, variant, layers or LAYERS[kind], rank)
        for kind in kinds
        for variant in variants
    ]
    timing.report("compile_time", rows, bounds(rows), {"rank": rank, "layers": layers}, out)


if __name__ == "__main__":
    tyro.cli(main)
