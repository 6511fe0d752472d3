"""What an update costs on a TPU v5e, by its compiler's own estimate, on a machine without one.

    python -m benchmarks.tpu [--llama v5e:4x4]

Needs libtpu. T5-base's 192 pairs, r = 8, float32, on one chip, jitted with donated buffers: the sum
of the estimated cycles of all kernels, loops times their trips, and the custom calls, whose inside
is not counted. `--llama` compiles Llama-3-8B's training step (bf16, 2,048 tokens a chip, r = 16)
for a slice, and tells the update's share of its cycles. Waiting for other chips is in neither, so
that the true share is smaller.
"""

import pathlib
import time
from typing import Any

import jax
import tyro
from jax.sharding import SingleDeviceSharding

from benchmarks import hlo, t5, timing
from experiments.pod import slice as pod_slice
from experiments.pod import step as pod_step
from experiments.pod import workloads as pod_work

SMALLEST = "v5e:2x2"
LLAMA = "llama3-8b"


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
    found = hlo.cycles(text)
    return {
        "variant": variant,
        "cycles": found.total,
        "kernels": found.kernels,
        "custom_calls": found.custom_calls,
        "unknown_loops": found.unknown_loops,
        "without_estimate": [f"{n} {name}" for name, n in found.without_estimate.most_common()],
        "dearest": [f"{n} {name}" for name, n in found.by_operation.most_common(6)],
        "seconds": seconds,
    }


def measure(variants: tuple[str, ...], shapes: t5.Shapes, rank: int) -> list[dict]:
    """One row for each variant."""
    device, rows = pod_slice.devices(SMALLEST)[0], []
    for variant in variants:
        start = time.perf_counter()
        text = compiled_update(variant, shapes, rank, device)
        rows.append(row(variant, text, time.perf_counter() - start))
    return rows


def measure_llama(model: str, topology: str, mode: str) -> list[dict]:
    """The update alone and the whole step of a model on a slice, cut along `fsdp`."""
    chips = pod_slice.chips_of(topology)
    sizes = pod_work.MODELS[model]
    work = sizes.build(chips * sizes.rows, sizes.length, sizes.rank)
    mesh, rows = pod_slice.mesh(topology, chips, 1), []
    for part, make in (("update", pod_step.make_update), ("whole step", pod_step.make)):
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            step = make(work, mode, mesh)
            text = step.jitted.lower(*step.args).compile().as_text()
        rows.append(row(f"{model} {part}", text, time.perf_counter() - start))
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
    if f"{LLAMA} update" in by:
        share = by[f"{LLAMA} update"]["cycles"] / by[f"{LLAMA} whole step"]["cycles"]
        found.append(timing.bounded(f"update / whole step of {LLAMA}, cycles", share, most=0.01))
    return found


def main(
    variants: tuple[str, ...] = ("adamw", "chain", "factored", "full"),
    layers: int = t5.LAYERS,
    rank: int = 8,
    llama: str | None = None,
    out: pathlib.Path = timing.RESULTS / "tpu.jsonl",
) -> None:
    """Compiles, shows, and appends JSON lines."""
    rows = measure(variants, t5.base(layers), rank)
    if llama:
        rows += measure_llama(LLAMA, llama, "factored")
    settings = {"layers": layers, "rank": rank, "topology": SMALLEST, "llama": llama}
    timing.report("tpu", rows, bounds(rows), settings, out)


if __name__ == "__main__":
    tyro.cli(main)
