"""What a training step of T5-base costs by method: time, memory, optimizer state, compilation.

    python -m experiments.bench.t5_step  # on a GPU
    python -m experiments.bench.t5_step --batch 4 --rounds 4 --dtypes float32  # on a CPU

The step of experiments.finetune itself (compiled ahead, donated), text to text, on random weights
of t5-base's shapes, which need no file: full rows of random tokens, CoLA's two answers as two
tokens each, r = 8 on all 192 linears. The reference is plain LoRA with optax.adamw.

First each method runs alone, in a process of its own, where it compiles cold and no other method's
memory hides its own. `memory_bytes` is the compiler's figure for the step: arguments, outputs and
temporaries, donated buffers once. `peak_bytes` is measured over two steps: what the allocator of a
GPU gave out, or on a CPU the memory in which the process resides, Python and the compiler
included. Then all methods take turns in one process, in which those with adapters share the frozen
weights.

`dtypes` are the activations'; parameters and state are float32. float32's products are tf32's on a
GPU, unless JAX_DEFAULT_MATMUL_PRECISION=highest.
"""

import concurrent.futures
import ctypes
import dataclasses
import multiprocessing
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments import methods
from experiments.bench import timing, train_step
from experiments.config import CONFIGS, RunConfig, runs
from experiments.data.prompts import PROMPTS
from experiments.devices import ONE
from experiments.models import t5_tiny
from experiments.models.t5 import T5
from experiments.models.t5_classifier import T5Classifier, answers_of
from experiments.models.t5_config import T5Config
from experiments.programs import Programs, varied
from experiments.provenance import provenance

STEPS = 100  # of the schedule; a step costs the same wherever it stands in it


class Shape(NamedTuple):
    """A T5 by its sizes."""

    config: T5Config
    adapters: int  # parameters of r = 8 on all its linears


# One layer in each stack, and all the tokens that `train_step.batch` draws from.
_TINY = dataclasses.replace(t5_tiny.CONFIG, vocab_size=500, num_layers=1, num_decoder_layers=1)
SHAPES = {"t5-base": Shape(T5Config(), 3_244_032), "t5-tiny": Shape(_TINY, 9_216)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are for a GPU."""

    rounds: int = 20
    batch: int = 32
    length: int = 128
    methods: tuple[str, ...] = tuple(methods.METHODS)  # with lora, the reference
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    model: Literal["t5-base", "t5-tiny"] = "t5-base"
    at_once: int = 1
    """Processes that compile at the same time. It changes `compile_s`, and no memory figure but a
    CPU's `peak_bytes`; all of them must fit the device."""
    results: pathlib.Path = pathlib.Path("experiments/results/bench_t5_step.jsonl")


class Parts(NamedTuple):
    """A model, as a method divides it."""

    graph: nnx.GraphDef
    params: nnx.State  # what trains
    frozen: nnx.State


class Variant(NamedTuple):
    """One method's step, compiled."""

    call: Callable[[], None]  # makes one step, on parameters and state of its own, and waits
    costs: dict[str, float]  # what is known before it runs


def config(method: str, dtype: str, settings: Settings) -> RunConfig:
    """The run that `experiments.finetune --config t5_glue` would make of it."""
    sizes = {"batch_size": settings.batch, "max_length": settings.length, "dtype": dtype}
    command = dataclasses.replace(CONFIGS["t5_glue"], methods=(method,), seeds=(0,), **sizes)
    return runs(command)[0]


def split(run: RunConfig, shape: Shape) -> Parts:
    """Random weights, the same for every method."""
    rngs = nnx.Rngs(run.seed)
    sizes = dataclasses.replace(shape.config, dropout_rate=run.dropout)
    answers = answers_of(PROMPTS[run.task].words, t5_tiny.tokenizer())
    model = T5Classifier(T5(sizes, dtype=jnp.dtype(run.dtype), rngs=rngs), answers)
    parts = Parts(*methods.split(model, run, rngs))
    if methods.get(run.method).adapted:
        assert sum(x.size for x in jax.tree.leaves(parts.params)) == shape.adapters
    return parts


def variant(run: RunConfig, settings: Settings, parts: Parts) -> Variant:
    """The run's step. Adapters are copied, for other methods start from them; a base is donated."""
    adapted = methods.get(run.method).adapted
    params = jax.tree.map(jnp.copy, parts.params) if adapted else parts.params
    programs = Programs(run, STEPS, parts.graph, ONE)
    carry = [params, programs.init(params)]
    rest = parts.frozen, train_step.batch(settings), np.int32(0), varied(run)
    start, busy = time.perf_counter(), time.process_time()
    programs.step.compile(settings.length, (*carry, *rest))
    costs = {
        "compile_s": time.perf_counter() - start,  # tracing included
        "compile_cpu_s": time.process_time() - busy,  # which a busy machine disturbs less
        "memory_bytes": programs.step.memory_bytes(settings.length),
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(carry[1]) if x.ndim),
        "trainable_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
    }

    def call() -> None:
        *carry[:], metrics = programs.step[settings.length](*carry, *rest)
        jax.block_until_ready((carry, metrics))
        assert np.isfinite(metrics.loss)

    return Variant(call, costs)


def alone(run: RunConfig, settings: Settings) -> dict[str, float | None]:
    """The costs of a run's step, in a process that has done nothing else."""
    made = variant(run, settings, split(run, SHAPES[settings.model]))
    return made.costs | {"peak_bytes": peak_bytes(made.call)}


def peak_bytes(call: Callable[[], None]) -> int | None:
    """The most memory in use during two calls; None where nothing tells."""
    device, status = jax.devices()[0], pathlib.Path("/proc/self/status")
    if device.memory_stats() is not None:
        call()
        call()
        return device.memory_stats()["peak_bytes_in_use"]
    if not status.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what compiling left behind is no cost of the step
    status.with_name("clear_refs").write_text("5")  # forgets the peak so far
    call()
    call()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


def in_new_processes(
    function: Callable[..., Any], items: Sequence[Any], *args: Any, at_once: int = 1, cache: str
) -> list[Any]:
    """What the function returns of each item, in a process of its own.

    They compile into the folder `cache`: cold where it holds nothing of the kind.
    """
    fresh = multiprocessing.get_context("spawn")  # a fork would inherit the arrays and the threads
    with concurrent.futures.ProcessPoolExecutor(
        at_once, fresh, _compile_into, (cache,), max_tasks_per_child=1
    ) as pool:
        asked = [pool.submit(function, item, *args) for item in items]
        return [one.result() for one in asked]


def _compile_into(folder: str) -> None:
    """Keeps what this process compiles there, every program, and reads what others kept."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def by_turns(found: dict[RunConfig, dict], settings: Settings) -> list[dict]:
    """A row for each run of one dtype: its times, and the costs that were `found` for it."""
    parts, calls = {}, {}  # parts by whether there are adapters
    for run in found:
        adapted = methods.get(run.method).adapted
        if adapted not in parts:
            parts[adapted] = split(run, SHAPES[settings.model])
        calls[run.method] = variant(run, settings, parts[adapted]).call
    rows = timing.summary(timing.by_turns(calls, settings.rounds), "lora")
    costs = {run.method: costs for run, costs in found.items()}
    for row in rows:
        row["examples_per_s"] = settings.batch / row["median_s"]
        row |= costs[row["variant"]]
        row["memory_over_lora"] = row["memory_bytes"] / costs["lora"]["memory_bytes"]
    return rows


def main(settings: Settings) -> None:
    """Measures, shows, and appends one JSON line per method and dtype."""
    asked = [config(m, d, settings) for d in settings.dtypes for m in settings.methods]
    with tempfile.TemporaryDirectory() as cache:
        # All of it before the first array here: jax takes most of a GPU's memory for its process.
        costs = in_new_processes(alone, asked, settings, at_once=settings.at_once, cache=cache)
        found = dict(zip(asked, costs, strict=True))
        _compile_into(cache)
        born, title = provenance(), f"{settings.model}, {settings.batch} x {settings.length} tokens"
        for dtype in settings.dtypes:
            own = {run: costs for run, costs in found.items() if run.dtype == dtype}
            rows = [{"dtype": dtype} | row for row in by_turns(own, settings)]
            timing.show(rows, f"one training step of {title}")
            timing.append(rows, "t5_step", settings, settings.results, born)


if __name__ == "__main__":
    main(tyro.cli(Settings))
