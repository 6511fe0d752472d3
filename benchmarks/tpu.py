"""What an update costs on a TPU v5e, by its compiler's own estimate, on a machine without one.

    python -m benchmarks.tpu [--llama v5e:4x4]

Needs libtpu. T5-base's 192 pairs, r = 8, float32, on one chip, jitted with donated buffers: the sum
of the estimated cycles of all kernels, loops times their trips. `--llama` adds llama3-8b's whole
training step on that slice, and the share of the update in it: minutes to compile.
"""

import pathlib
from typing import Annotated

import jax
import tyro
from jax.sharding import SingleDeviceSharding

from benchmarks import t5, timing
from experiments.pod.command import Settings, planned
from experiments.pod.costs import Cost, cost
from experiments.pod.slice import devices
from experiments.pod.step import Step, make, make_update

SMALLEST = "v5e:2x2"
OURS = ("factored", "full", "muon")


def update(variant: str, shapes: t5.Shapes, rank: int) -> Step:
    """One update on one chip."""
    tx, params = t5.transformations()[variant], t5.abstract(shapes, rank)
    args = params, jax.eval_shape(tx.init, params), params
    chip = SingleDeviceSharding(devices(SMALLEST)[0])
    return Step(
        t5.step(tx),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), args),
    )


def compiled(step: Step) -> Cost:
    """What its program costs."""
    return cost(step.jitted.lower(*step.args).compile().as_text())


def row(variant: str, found: Cost) -> dict:
    """The figures of one program."""
    kept = "cycles", "kernels", "custom_calls", "unknown_loops"
    return {"variant": variant} | {name: getattr(found, name) for name in kept}


def measure(variants: tuple[str, ...], shapes: t5.Shapes, rank: int) -> list[dict]:
    """One row for each variant."""
    return [row(variant, compiled(update(variant, shapes, rank))) for variant in variants]


def llama(topology: str) -> list[dict]:
    """Factored mode's step of llama3-8b on a slice, and its update alone."""
    work, mesh, _ = planned(Settings(topology=topology))
    with jax.set_mesh(mesh):
        return [
            row(f"llama3-8b {name}", compiled(of(work, "factored", mesh)))
            for name, of in (("step", make), ("update", make_update))
        ]


def bounds(rows: list[dict]) -> list[dict]:
    """The figures that have a bound."""
    cycles = {row["variant"]: row["cycles"] for row in rows}
    calls = sum(len(row["custom_calls"]) for row in rows if row["variant"] in OURS)
    found = [
        *(
            timing.bounded(f"{name} / adamw, cycles", cycles[name] / cycles["adamw"], most=3.0)
            for name in ("factored", "muon")
        ),
        timing.bounded("custom calls in LoRA-Pro's updates", calls, most=0),
    ]
    if whole := cycles.get("llama3-8b step"):
        share = cycles["llama3-8b update"] / whole
        found.append(timing.bounded("update / llama3-8b's step, cycles", share, most=0.01))
    return found


def main(
    rank: int = 8,
    llama_on: Annotated[str | None, tyro.conf.arg(name="llama")] = None,
    out: pathlib.Path = timing.RESULTS / "tpu.jsonl",
) -> None:
    """Compiles, shows, and appends JSON lines."""
    rows = measure(("adamw", "chain", *OURS), t5.base(), rank)
    rows += llama(llama_on) if llama_on else []
    settings = {"rank": rank, "topology": SMALLEST, "llama": llama_on}
    timing.report("tpu", rows, bounds(rows), settings, out)


if __name__ == "__main__":
    tyro.cli(main)
