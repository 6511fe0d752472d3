"""Compiles a training step for a TPU slice ahead of time, on a machine without one.

    python -m experiments.pod --topology v5e:16x16 --model llama3-8b --mode factored,full,lora

Needs libtpu (`pip install libtpu`), which holds the TPU compiler; no TPU. For every mode the whole
step is compiled (loss, gradients of the adapters, clipping, update, new parameters, buffers
donated), and then told per chip: bytes of parameters, optimizer state and temporaries, whether it
fits, the compiler's own estimate of its cycles, and the bytes sent to other chips
(`experiments.pod.costs`). The update's part is what the update costs when it is compiled alone.
"""

import dataclasses
import json
import math
import pathlib
import re
import time
from typing import Annotated, Any

import jax
import rich.console
import tyro
from jax.sharding import Mesh

from experiments.checks import Count, Range, in_range, one_of
from experiments.exits import reported
from experiments.pod.costs import cost
from experiments.pod.slice import chips_of, memory, mesh_of, sizes_of
from experiments.pod.step import MODES, Step, bytes_per_chip, make, make_update
from experiments.pod.tables import tables
from experiments.pod.workloads import MODELS, Workload
from experiments.provenance import provenance
from experiments.storage import check_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Compile a training step for a TPU slice and tell what it costs, per chip."""

    topology: str = "v5e:16x16"
    """Generation and shape of the slice: v5e:4x4, v5e:16x16, v6e:8x8, v5p:4x4x4, v4:2x2x4."""
    model: str = "llama3-8b"
    """llama3-8b, t5-base or t5-3b (synthetic, of their shapes), or tiny (for tests)."""
    mode: str = "factored,full,lorapro-adamw,lora"
    """Any of factored, full, lorapro-adamw (the projection, then optax's AdamW) and lora (AdamW on
    the factors), with commas between."""
    mesh: str | None = None
    """FSDPxTENSOR, such as 64x4; None: all chips along fsdp."""
    batch: Count | None = None
    """Rows of a step over the whole slice; None: for each chip along fsdp 1 (llama3-8b), 8 (t5-3b)
    or 32 (t5-base)."""
    length: Annotated[int, Range(2)] | None = None
    """Tokens of a row; None: 2048 (llama3-8b), 512 (t5-3b), 128 (t5-base)."""
    rank: Count | None = None
    """Rank of the adapters, on every linear layer; None: 8, the paper's, for a T5, else 16."""
    whole: bool = False
    """Every chip holds all parameters, and fsdp shares the batch only."""
    update_only: bool = False
    """Compile the updates alone: seconds instead of minutes."""
    results: pathlib.Path = pathlib.Path("experiments/results/pod.jsonl")
    """Where a JSON line for every mode is appended."""


@reported
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for a request that cannot be served."""
    settings = tyro.cli(Settings, args=argv, prog="python -m experiments.pod")
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=160)
    for table in tables(compare(settings, console)):
        console.print(table)
    return 0


def compare(settings: Settings, console: rich.console.Console) -> list[dict[str, Any]]:
    """One row a mode, each appended to the results as soon as it is measured."""
    in_range(settings)
    check_folder(settings.results.parent, "the folder of --results")
    if settings.results.is_dir():
        raise ValueError(f"--results {settings.results} is a folder; name a file in it")
    modes = settings.mode.split(",")
    for mode in modes:
        one_of("mode", mode, MODES)
    work, mesh, about = planned(settings)
    config = {k: v for k, v in dataclasses.asdict(settings).items() if k != "results"}
    rows: list[dict[str, Any]] = []
    for mode in modes:
        with console.status(f"compiling {mode} for {settings.topology}"):
            row = {"bench": "pod", "variant": mode, **about, "config": config}
            row["update"] = measure(make_update(work, mode, mesh), mesh)
            if not settings.update_only:
                row |= measure(make(work, mode, mesh), mesh)
                row["fits"] = row.get("total_bytes", math.inf) <= memory(settings.topology)
        rows.append(row)
        settings.results.parent.mkdir(parents=True, exist_ok=True)
        with settings.results.open("a") as file:
            file.write(json.dumps(row | provenance()) + "\n")
    return rows


def planned(settings: Settings) -> tuple[Workload, Mesh, dict[str, Any]]:
    """The model, the slice, and the sizes that were chosen or left to the model."""
    model = MODELS[one_of("model", settings.model, MODELS)]
    chips = chips_of(settings.topology)
    fsdp, tensor = sizes_of(settings.mesh, chips)
    given = {"batch": model.rows * fsdp, "length": model.length, "rank": model.rank}
    given |= {name: x for name in given if (x := getattr(settings, name)) is not None}
    if given["batch"] % fsdp:
        raise ValueError(
            f"--batch {given['batch']} rows cannot be shared by {fsdp} chips along fsdp; "
            f"take a multiple of {fsdp}, or a smaller fsdp in --mesh"
        )
    mesh = mesh_of(settings.topology, (fsdp, tensor))
    work = model.build(*given.values())._replace(sharded=not settings.whole)
    return work, mesh, given | {"chips": chips, "fsdp": fsdp, "tensor": tensor}


def measure(step: Step, mesh: Mesh) -> dict[str, Any]:
    """What one chip holds and does in a step or an update."""
    names = "trained_bytes", "state_bytes", "frozen_bytes"
    held = dict(zip(names, map(bytes_per_chip, step.args), strict=False))
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = step.jitted.lower(*step.args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ hbm[^.]*\.?[^.]*\.", str(error))
        return held | {"compiler_says": used[0] if used else str(error).splitlines()[0]}
    return held | figures(compiled) | {"compile_s": time.perf_counter() - start}


def figures(compiled: Any) -> dict[str, Any]:
    """Memory, cycles and traffic of a compiled program, per chip."""
    m, found = compiled.memory_analysis(), cost(compiled.as_text())
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return {
        "temporary_bytes": m.temp_size_in_bytes,
        "total_bytes": held + m.temp_size_in_bytes + m.generated_code_size_in_bytes,
        "cycles": found.cycles,
        "sent_bytes": sum(found.sent.values()),
        "sent": dict(found.sent),
        "custom_calls": found.custom_calls,
        "without_estimate": dict(found.without_estimate),
        "loops_counted_once": found.unknown_loops,
    }
