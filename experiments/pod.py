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

import contextlib
import dataclasses
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import rich.console
import rich.table
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments import hlo_cost, pod_step
from experiments.bench import timing
from experiments.config import one_of

LIBTPU = "pip install libtpu==0.0.42.1"
GIB = 2**30
# generation -> (name in TPU_ACCELERATOR_TYPE, cores a chip that it counts, GiB of memory a chip)
GENERATIONS = {
    "v4": ("v4", 2, 32),
    "v5e": ("v5litepod", 1, 16),
    "v5p": ("v5p", 2, 95),
    "v6e": ("v6e", 1, 32),
}
BASELINE = "sgd"
SHARES = ("flops", "memory_traffic_bytes", "sent_bytes", "temporary_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Compile a training step for a TPU slice and tell what it costs, per chip."""

    topology: str = "v5e:16x16"
    """Generation and shape of the slice: v5e:4x4, v5e:16x16, v6e:8x8, v5p:4x4x4, v4:2x2x4."""
    model: str = "llama3-8b"
    """llama3-8b, t5-base or t5-3b (synthetic, of their shapes), minilm, or tiny (for tests)."""
    mode: str = "factored,full,efficient,lora"
    """Any of factored, full, efficient, lora (AdamW on the factors), with commas between."""
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
    model = pod_step.MODELS[one_of("model", settings.model, pod_step.MODELS)]
    chips = chips_of(settings.topology)
    fsdp, tensor = mesh_of(settings.mesh, chips)
    batch = model.rows * fsdp if settings.batch is None else settings.batch
    length = model.length if settings.length is None else settings.length
    rank = model.rank if settings.rank is None else settings.rank
    check(batch, length, rank, fsdp)
    mesh = Mesh(np.array(devices(settings.topology)).reshape(fsdp, tensor), ("fsdp", "tensor"))
    work = model.build(batch, length, rank)
    work = work._replace(sharded=work.sharded and not settings.whole)
    shape = {"chips": chips, "fsdp": fsdp, "tensor": tensor, "batch": batch, "length": length}
    shape |= {"rank": rank, "sharded": work.sharded}
    found: list[dict[str, Any]] = []
    for mode in (BASELINE, *modes):
        with console.status(f"compiling {mode} for {settings.topology}"):
            row = {"variant": mode} | shape | {"update": update_alone(work, mode, mesh)}
            if not settings.update_only:
                row |= measure(work, mode, mesh, memory(settings.topology))
                row |= {"over_sgd": difference(row, found[0] if found else row)}
        found.append(row)
        timing.append(found[-1:], "pod", settings, settings.results)
    return found


# The request


def chips_of(topology: str) -> int:
    """How many chips a topology has; a ValueError for a name that is none."""
    generation, _, shape = topology.partition(":")
    one_of("TPU generation", generation, GENERATIONS)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise ValueError(
            f"--topology {topology!r} has no shape such as 4x4; write GENERATION:SHAPE, "
            "as in v5e:4x4, v5e:16x16 or v5p:4x4x4"
        )
    return int(np.prod([int(n) for n in shape.split("x")]))


def mesh_of(mesh: str | None, chips: int) -> tuple[int, int]:
    """(fsdp, tensor) sizes."""
    if mesh is None:
        return chips, 1
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", mesh):
        raise ValueError(f"--mesh {mesh!r} is not FSDPxTENSOR, such as {chips}x1")
    fsdp, tensor = map(int, mesh.split("x"))
    if fsdp * tensor != chips:
        raise ValueError(
            f"--mesh {mesh} is {fsdp * tensor} chips, the topology has {chips}; "
            f"their product must be {chips}, such as {chips}x1"
        )
    return fsdp, tensor


def check(batch: int, length: int, rank: int, fsdp: int) -> None:
    """Raises ValueError for sizes that no step can have."""
    for flag, value, least in (("--batch", batch, 1), ("--length", length, 2), ("--rank", rank, 1)):
        if value < least:
            raise ValueError(f"{flag} must be at least {least}, not {value}")
    if batch % fsdp:
        raise ValueError(
            f"--batch {batch} rows cannot be shared by {fsdp} chips along fsdp; "
            f"take a multiple of {fsdp}, or a smaller fsdp in --mesh"
        )


def memory(topology: str) -> int:
    """Bytes of main memory of a chip."""
    return GENERATIONS[topology.partition(":")[0]][2] * GIB


def devices(topology: str) -> list[Any]:
    """The devices of a slice that need not exist.

    Raises:
      OSError: libtpu is missing.
      ValueError: libtpu does not know the topology.
    """
    generation = topology.partition(":")[0]
    name, cores, _ = GENERATIONS[generation]
    # libtpu reads these when it is loaded: which slice this host belongs to (one that it would
    # else ask the cloud's metadata server for), and where the other hosts are.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{name}-{cores * chips_of(topology)}",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no chip is taken: another process may compile too
    )
    jax.config.update("jax_platforms", "cpu")  # tracing must not take a TPU that is there
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # what libtpu raises has no type of its own
        if "TPU support not installed" in str(error):
            raise OSError(
                f"libtpu, which holds the TPU compiler, is not installed; `{LIBTPU}`"
            ) from error
        first = str(error).splitlines()[0]
        raise ValueError(f"libtpu has no topology {topology!r}: {first}") from error


# Measuring


@contextlib.contextmanager
def tracing_for_tpu(mesh: Mesh) -> Iterator[None]:
    """Code that asks for the default backend gets the answer that it would get on the slice."""
    with jax.set_mesh(mesh), mock.patch.object(jax, "default_backend", return_value="tpu"):
        yield


def measure(work: pod_step.Workload, mode: str, mesh: Mesh, memory_bytes: int) -> dict[str, Any]:
    """What one chip holds and does in a step of `mode`."""
    start = time.perf_counter()
    with tracing_for_tpu(mesh):
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


def update_alone(work: pod_step.Workload, mode: str, mesh: Mesh) -> dict[str, Any]:
    """What one chip does in the update of `mode`."""
    start = time.perf_counter()
    with tracing_for_tpu(mesh):
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


if __name__ == "__main__":
    sys.exit(main())
