"""Compiles a training step for a TPU slice ahead of time, on a machine without one.

    python -m experiments.pod --topology v5e:16x16 --model llama3-8b --mode factored,full,lora

Needs libtpu (`pip install libtpu`), which holds the TPU compiler; no TPU. For every mode the whole
step is compiled (loss, gradients of the adapters, clipping, update, new parameters, buffers
donated), and then told per chip: bytes of parameters, optimizer state and temporaries, FLOPs, bytes
of main memory, bytes sent to other chips, and whether it fits. The update's own part is what the
update costs when it is compiled alone, over the whole step. Beside it stands the difference to the
same step with plain gradient descent (`sgd`), which does least of all that uses the gradients; the
compiler plans every program anew, so that it carries per mille of traffic and gigabytes of
temporaries that the update has nothing to do with.

FLOPs and bytes come from the compiled program with every loop counted as often as it runs
(`experiments.hlo_cost`); XLA's own figures, kept in the JSON lines, count a loop's body once.
"""

import dataclasses
import json
import pathlib
import re
import sys
import time
from typing import Any

import jax
import rich.console
import rich.table
import tyro
from jax.sharding import Mesh

from experiments.checks import one_of
from experiments.pod import costs as hlo_cost
from experiments.pod import slice as pod_slice
from experiments.pod import step as pod_step
from experiments.pod import workloads as pod_work
from experiments.provenance import provenance

BASELINE = "sgd"
SHARES = ("flops", "memory_traffic_bytes", "sent_bytes", "temporary_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Compile a training step for a TPU slice and tell what it costs, per chip."""

    topology: str = "v5e:16x16"
    """Generation and shape of the slice: v5e:4x4, v5e:16x16, v6e:8x8, v5p:4x4x4, v4:2x2x4."""
    model: str = "llama3-8b"
    """llama3-8b, t5-base or t5-3b (synthetic, of their shapes), minilm, or tiny (for tests)."""
    mode: str = "factored,full,lorapro-adamw,lora"
    """Any of factored, full, lorapro-adamw (the projection, then optax's AdamW) and lora (AdamW on
    the factors), with commas between."""
    mesh: str | None = None
    """FSDPxTENSOR, such as 64x4; None: all chips along fsdp."""
    batch: int | None = None
    """Rows of a step over the whole slice; None: for each chip along fsdp 1 (llama3-8b), 8 (t5-3b)
    or 32 (t5-base, minilm)."""
    length: int | None = None
    """Tokens of a row; None: 2048 (llama3-8b), 512 (t5-3b), 128 (t5-base, minilm)."""
    rank: int | None = None
    """Rank of the adapters, on every linear layer; None: 8, the paper's, for a T5, else 16."""
    whole: bool = False
    """Every chip holds all parameters, and fsdp shares the batch only; minilm is always so."""
    update_only: bool = False
    """Compile the updates alone: seconds instead of minutes."""
    results: pathlib.Path = pathlib.Path("experiments/results/pod.jsonl")
    """Where a JSON line for every mode is appended."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for a request that cannot be served."""
    settings = tyro.cli(Settings, args=argv, prog="python -m experiments.pod")
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=160)
    try:
        rows = compare(settings, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not settings.update_only:
        console.print(table(rows, settings))
    console.print(shares(rows))
    return 0


def compare(settings: Settings, console: rich.console.Console) -> list[dict[str, Any]]:
    """One row a mode, each appended to the results as soon as it is measured."""
    modes = settings.mode.split(",")
    for mode in modes:
        one_of("mode", mode, [name for name in pod_step.MODES if name != BASELINE])
    work, mesh, about = planned(settings)
    found: list[dict[str, Any]] = []
    for mode in (BASELINE, *modes):
        with console.status(f"compiling {mode} for {settings.topology}"):
            row = {"variant": mode} | about | {"update": update_alone(work, mode, mesh)}
            if not settings.update_only:
                row |= measure(work, mode, mesh, pod_slice.memory(settings.topology))
                row |= {"over_sgd": difference(row, found[0] if found else row)}
        found.append(row)
        append(row, settings)
    return found


def append(row: dict[str, Any], settings: Settings) -> None:
    """Writes one JSON line: the row, what was asked for, and where it was compiled."""
    config = {k: v for k, v in dataclasses.asdict(settings).items() if k != "results"}
    settings.results.parent.mkdir(parents=True, exist_ok=True)
    with settings.results.open("a") as file:
        file.write(json.dumps({"bench": "pod", **row, "config": config, **provenance()}) + "\n")


def planned(settings: Settings) -> tuple[pod_work.Workload, Mesh, dict[str, Any]]:
    """The model, the slice, and the sizes that were chosen or left to the model."""
    model = pod_work.MODELS[one_of("model", settings.model, pod_work.MODELS)]
    chips = pod_slice.chips_of(settings.topology)
    fsdp, tensor = pod_slice.mesh_of(settings.mesh, chips)
    batch = model.rows * fsdp if settings.batch is None else settings.batch
    length = model.length if settings.length is None else settings.length
    rank = model.rank if settings.rank is None else settings.rank
    pod_slice.check(batch, length, rank, fsdp)
    mesh = pod_slice.mesh(settings.topology, fsdp, tensor)
    work = model.build(batch, length, rank)
    work = work._replace(sharded=work.sharded and not settings.whole)
    about = {"chips": chips, "fsdp": fsdp, "tensor": tensor, "batch": batch, "length": length}
    return work, mesh, about | {"rank": rank, "sharded": work.sharded}


# Measuring


def measure(work: pod_work.Workload, mode: str, mesh: Mesh, memory_bytes: int) -> dict[str, Any]:
    """What one chip holds and does in a step of `mode`."""
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        step = pod_step.make(work, mode, mesh)
        lowered = step.jitted.lower(*step.args)
    middle = time.perf_counter()
    trainable, state, frozen, _ = map(pod_step.bytes_per_chip, step.args)
    held = {
        "frozen_bytes": frozen,
        "trained_bytes": trainable,
        "state_bytes": state,
        "trace_s": middle - start,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return held | {"fits": False, "compiler_says": _out_of_memory(str(error))}
    return held | figures(compiled, memory_bytes) | {"compile_s": time.perf_counter() - middle}


def update_alone(work: pod_work.Workload, mode: str, mesh: Mesh) -> dict[str, Any]:
    """What one chip does in the update of `mode`."""
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        step = pod_step.make_update(work, mode, mesh)
        compiled = step.jitted.lower(*step.args).compile()
    cost = hlo_cost.cost(compiled.as_text())
    return {
        "flops": cost.flops,
        "memory_traffic_bytes": cost.bytes,
        "sent_bytes": cost.collective_bytes,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "loops_counted_once": list(cost.unknown_loops),
        "state_bytes": pod_step.bytes_per_chip(step.args[1]),
        "seconds": time.perf_counter() - start,
    }


def _out_of_memory(message: str) -> str:
    found = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ hbm[^.]*\.?[^.]*\.", message)
    return found[0] if found else message.splitlines()[0]


def figures(compiled: Any, memory_bytes: int) -> dict[str, Any]:
    """Memory, FLOPs and traffic of a compiled step, per chip."""
    found, cost = compiled.memory_analysis(), hlo_cost.cost(compiled.as_text())
    total = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    xla = compiled.cost_analysis()
    return {
        "temporary_bytes": found.temp_size_in_bytes,
        "program_bytes": found.generated_code_size_in_bytes,
        "total_bytes": total,
        "fits": total <= memory_bytes,
        "flops": cost.flops,
        "memory_traffic_bytes": cost.bytes,
        "sent_bytes": cost.collective_bytes,
        "collectives": {
            kind: {"operand_bytes": own, "sent_bytes": sent}
            for kind, (own, sent) in sorted(cost.collectives.items())
        },
        "loops_counted_once": list(cost.unknown_loops),
        "xla_once": {"flops": xla.get("flops"), "bytes": xla.get("bytes accessed")},
    }


def difference(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """What a mode's whole step costs beyond the baseline's."""
    if "flops" not in row or "flops" not in base:
        return {}
    return {name: row[name] - base[name] for name in SHARES}


# Showing


def table(rows: list[dict[str, Any]], settings: Settings) -> rich.table.Table:
    """Per chip, the whole step."""
    first = rows[0]
    made = rich.table.Table(
        "mode", "base GB", "factors MB", "state MB", "temporaries GB", "total GB", "fits",
        "TFLOP", "memory traffic GB", "sent GB", "compile s",
        title=f"{settings.model} on {settings.topology}, fsdp {first['fsdp']} x tensor "
        f"{first['tensor']}, {first['batch']} x {first['length']} tokens: one step, per chip",
    )  # fmt: skip
    for row in rows:
        made.add_row(
            row["variant"],
            *_scaled(row, ("frozen_bytes", 1e9), ("trained_bytes", 1e6), ("state_bytes", 1e6)),
            *_scaled(row, ("temporary_bytes", 1e9), ("total_bytes", 1e9)),
            "yes" if row["fits"] else f"no: {row.get('compiler_says', 'over the memory')}",
            *_scaled(row, ("flops", 1e12), ("memory_traffic_bytes", 1e9), ("sent_bytes", 1e9)),
            *_scaled(row, ("compile_s", 1.0)),
        )
    return made


def shares(rows: list[dict[str, Any]]) -> rich.table.Table:
    """The updates alone, and their share of the step where that was compiled."""
    made = rich.table.Table(
        "mode", "MFLOP", "memory traffic MB", "sent MB", "temporaries MB", "state MB", "compile s",
        title="of which the update, per chip, compiled alone",
    )  # fmt: skip
    for row in rows:
        update = row["update"]
        parts = [
            f"{update[name] / 1e6:.4g}"
            + (f" ({update[name] / row[name]:.3%})" if row.get(name) else "")
            for name in SHARES
        ]
        made.add_row(
            row["variant"], *parts, *_scaled(update, ("state_bytes", 1e6), ("seconds", 1.0))
        )
    return made


def _scaled(row: dict[str, Any], *fields: tuple[str, float]) -> list[str]:
    return [f"{row[name] / unit:.4g}" if name in row else "-" for name, unit in fields]
