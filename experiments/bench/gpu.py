"""The update alone on a GPU: full mode's kernel against a copy, and every mode by device time.

    python -m experiments.bench.gpu

"pass" is one pair of each shape and rank: full mode with its kernel ("full"), as XLA does it where
the kernel does not take a shape ("blocks", of 16 columns more), and "floor", which reads and writes
two (m, n) arrays once by Adam's elementwise rule. Calls follow each other without waiting, the
state donated; seconds are of one call. `gb_s` is 16 m n bytes over them; "copy" is x + 1 of a GiB.

"update" is whole steps of many pairs, parameters included, as in `bench.update`: T5-base's 192 and
one layer of Llama-3-8B. `device_s` is the time that the device was busy in one step, by JAX's
profiler: with hundreds of arrays a call's own time is mostly the host's, which hands them over.
"""

import dataclasses
import functools
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.bench import floors, full_pass, shapes, timing, update
from experiments.provenance import provenance

COPIED = 2**28  # floats of "copy"
CALLS = 5  # that follow each other


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (8192, 28672))
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Of one pair."""
    layer_ranks: tuple[int, ...] = (8, 64)
    """Of a layer of Llama-3-8B."""
    rounds: int = 5
    results: pathlib.Path = pathlib.Path("experiments/results/bench_gpu.jsonl")


def chained(step: Callable, state: Any, *args: Any) -> Callable[[], None]:
    """`CALLS` calls of a jitted step that donates its state."""
    program, held = jax.jit(step, donate_argnums=0), [state]

    def call() -> None:
        for _ in range(CALLS):
            held[0] = program(held[0], *args)
        jax.block_until_ready(held)

    return call


def one_pass(shape: tuple[int, int], rank: int, rounds: int) -> list[dict]:
    """Full mode in both forms, and its floor."""
    moments = jnp.zeros(shape), jnp.zeros(shape)
    calls = {"floor": chained(full_pass.floor, moments, jnp.ones((), jnp.float32))}
    m, n = shape
    for name, own in (("full", shape), ("blocks", (m, n + 16))):
        calls[name] = chained(*full_pass.full(own, rank))
    rows = timing.summary(timing.by_turns(calls, rounds), "floor")
    return [per_call(row, 16 * m * n) | {"m": m, "n": n, "rank": rank} for row in rows]


def copy(rounds: int) -> list[dict]:
    """What the card copies."""
    x = jnp.ones(COPIED)
    times = timing.by_turns({"copy": chained(lambda x: x + 1, x)}, rounds)
    (row,) = timing.summary(times, "copy")
    return [per_call(row, 8 * COPIED) | {"m": None, "n": None, "rank": None}]


def per_call(row: dict, moved: int) -> dict:
    """A row of `CALLS` calls as one of one, with the bandwidth of so many bytes a call."""
    times = {name: row[name] / CALLS for name in ("median_s", "min_s")}
    row = {k: v for k, v in row.items() if k != "ratio_to_copy"} | times
    return row | {"gb_s": moved / times["median_s"] / 1e9}


def device_seconds(call: Callable[[], None], calls: int = 3) -> tuple[float, float]:
    """(seconds that the device was busy, kernels) in one call, by the profiler."""
    call()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                call()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = [
            event.duration_ns
            for plane in planes
            if "GPU" in plane.name
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return 1e-9 * sum(events) / calls, len(events) / calls


def updates(name: str, shapes_of: dict[str, tuple[int, int]], rank: int) -> list[dict]:
    """Every mode on a tree of such pairs."""
    params, grads = (update.tree(shapes_of, rank, seed) for seed in (0, 1))
    rows = []
    made = {
        variant: functools.partial(update.stepper, tx, params, grads)
        for variant, tx in update.transformations().items()
    }
    made["dense floor"] = functools.partial(floors.dense_floor, list(shapes_of.values()))
    for variant, make in made.items():
        call, held = make()
        times = timing.by_turns({variant: call}, 10)[variant]
        seconds, kernels = device_seconds(call)
        rows.append(
            {"variant": variant, "device_s": seconds, "kernels": kernels}
            | {"call_s": statistics.median(times), "state_bytes": held}
            | {"model": name, "rank": rank, "pairs": len(shapes_of)}
        )
        del call
    base = rows[0]["device_s"]
    return [row | {"device_over_adamw": row["device_s"] / base} for row in rows]


def main(settings: Settings) -> None:
    """Measures, shows, and appends one JSON line per row."""
    if jax.default_backend() != "gpu":
        raise SystemExit(f"this needs a GPU that JAX sees, and it sees {jax.devices()}")
    born = provenance()

    def keep(rows: list[dict], bench: str, title: str) -> None:
        timing.show(rows, title)
        timing.append(rows, bench, settings, settings.results, born)

    keep(copy(settings.rounds), "gpu_pass", "copy")
    for shape in settings.shapes:
        for rank in settings.ranks:
            title = f"{shape[0]} x {shape[1]}, r = {rank}"
            keep(one_pass(shape, rank, settings.rounds), "gpu_pass", title)
    keep(updates("t5-base", update.SHAPES, 8), "gpu_update", "T5-base, r = 8")
    layer = shapes.LAYERS["llama-3-8b"]
    for rank in settings.layer_ranks:
        title = f"one layer of Llama-3-8B, r = {rank}"
        keep(updates("llama-3-8b, one layer", layer, rank), "gpu_update", title)


if __name__ == "__main__":
    main(tyro.cli(Settings))
