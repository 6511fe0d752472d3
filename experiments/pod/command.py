"""Compiles a training step for a TPU slice ahead of time, on a machine without one.

    python -m experiments.pod --topology v5e:16x16 --model llama3-8b --mode factored,full,lora

Needs libtpu (`pip install libtpu`), which holds the TPU compiler; no TPU. For every mode the whole
step is compiled (loss, gradients of the adapters, clipping, update, new parameters, buffers
donated), and the update alone. Told per chip: bytes of parameters, optimizer state and temporaries,
whether they fit, the compiler's estimate of the cycles, and the bytes sent to other chips.
"""

import dataclasses
import json
import math
import pathlib
import re
import time
from typing import Annotated, Any

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from experiments.checks import Count, Range, in_range, one_of
from experiments.exits import reported
from experiments.pod.costs import cost
from experiments.pod.slice import chips_of, memory, mesh_of, sizes_of
from experiments.pod.step import MODES, Step, bytes_per_chip, make, make_update
from experiments.pod.workloads import MODELS, Workload
from experiments.provenance import provenance
from experiments.storage import check_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Compile a training step for a TPU slice and tell what it costs, per chip."""

    topology: str = "v5e:16x16"
    """Generation and shape of the slice: v5e:4x4, v5e:16x16, v6e:8x8, v5p:4x4x4, v4:2x2x4."""
    model: str = "llama3-8b"
    """llama3-8b (its shapes, no weights), or tiny (for tests)."""
    mode: str = "factored,full,lora"
    """Any of factored, full, muon, chain (lorapro, then AdamW) and lora (AdamW), with commas."""
    mesh: str | None = None
    """FSDPxTENSOR, such as 64x4; None: all chips along fsdp."""
    batch: Count | None = None
    """Rows of a step over the whole slice; None: 1 for each chip along fsdp."""
    length: Annotated[int, Range(2)] | None = None
    """Tokens of a row; None: 2048 (llama3-8b)."""
    rank: Count | None = None
    """Rank of the adapters, on every linear layer; None: 16."""
    results: pathlib.Path = pathlib.Path("experiments/results/pod.jsonl")
    """Where a JSON line for every mode is appended."""


@reported
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for a request that cannot be served."""
    settings = tyro.cli(Settings, args=argv, prog="python -m experiments.pod")
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table(compare(settings, console), settings))
    return 0


def compare(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """One row a mode, each appended to the results as soon as it is measured."""
    in_range(settings)
    check_folder(settings.results.parent, "the folder of --results")
    if settings.results.is_dir():
        raise ValueError(f"--results {settings.results} is a folder; name a file in it")
    modes = [one_of("mode", mode, MODES) for mode in settings.mode.split(",")]
    work, mesh, sizes = planned(settings)
    about = sizes | {"config": dataclasses.asdict(settings) | {"results": str(settings.results)}}
    rows: list[dict[str, Any]] = []
    for mode in modes:
        with console.status(f"compiling {mode} for {settings.topology}"):
            row = {
                "bench": "pod",
                "variant": mode,
                **about,
                **measure(make(work, mode, mesh), mesh),
            }
            row["fits"] = row.get("total_bytes", math.inf) <= memory(settings.topology)
            row["update"] = measure(make_update(work, mode, mesh), mesh)
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
    return (
        model.build(*given.values()),
        mesh,
        given | {"chips": chips, "fsdp": fsdp, "tensor": tensor},
    )


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
        used = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ hbm", str(error))
        return held | {"compiler_says": used[0] if used else str(error).splitlines()[0]}
    m, found = compiled.memory_analysis(), cost(compiled.as_text())
    kept = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return held | {
        "temporary_bytes": m.temp_size_in_bytes,
        "total_bytes": kept + m.temp_size_in_bytes + m.generated_code_size_in_bytes,
        "cycles": found.cycles,
        "sent_bytes": sum(found.sent.values()),
        "sent": found.sent,
        "custom_calls": found.custom_calls,
        "loops_counted_once": found.unknown_loops,
        "compile_s": time.perf_counter() - start,
    }


_COLUMNS = {  # of the table: the figure of a row, and its unit
    "base GB": ("frozen_bytes", 1e9),
    "factors MB": ("trained_bytes", 1e6),
    "state MB": ("state_bytes", 1e6),
    "temporaries GB": ("temporary_bytes", 1e9),
    "total GB": ("total_bytes", 1e9),
    "Mcycles": ("cycles", 1e6),
    "sent GB": ("sent_bytes", 1e9),
}


def table(rows: list[dict[str, Any]], settings: Settings) -> Table:
    """A row for each mode: one step per chip, and the update compiled alone."""
    headings = "mode", *_COLUMNS, "fits", "update Mcycles", "of the step", "update sent MB"
    shown = Table(*headings, title=f"{settings.model} on {settings.topology}, one step, per chip")
    for row in rows:
        figures = [f"{row[name] / x:.4g}" if name in row else "-" for name, x in _COLUMNS.values()]
        fits = "yes" if row["fits"] else f"no: {row.get('compiler_says', 'over the memory')}"
        nan, update = math.nan, row["update"]
        cycles, sent = update.get("cycles", nan), update.get("sent_bytes", nan)
        share = f"{cycles / row.get('cycles', nan):.3%}"
        alone = f"{cycles / 1e6:.4g}", share, f"{sent / 1e6:.4g}"
        shown.add_row(row["variant"], *figures, fits, *alone)
    return shown
