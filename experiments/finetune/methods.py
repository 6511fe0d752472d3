"""The methods that are compared: which parameters train, and by which optimizer.

A method splits a model into what it trains and what it only reads. Gradients are taken of the first
part alone, so the frozen base costs neither weight gradients nor optimizer state.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lorapro_jax as lp
from experiments.checks import one_of
from experiments.finetune.config import RunConfig
from experiments.models import get as model_named

HEAD = r"head/.*"  # fresh, so that the LoRA methods train it too


class Method(NamedTuple):
    """How one method trains: `optimizer` makes that of the adapters, or of every parameter."""

    adapted: bool  # adapters and the head train; otherwise every parameter does
    optimizer: Callable[[RunConfig, optax.Schedule], optax.GradientTransformation]


def _adam(run: RunConfig) -> dict[str, float]:
    return {"b1": run.b1, "b2": run.b2, "eps": run.eps, "weight_decay": run.weight_decay}


def layout_of(run: RunConfig) -> lp.Layout | None:
    """Of the model's factors."""
    return model_named(run.model).layout


def _adamw(run: RunConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, **_adam(run))


def _lorapro(run: RunConfig, rate: optax.Schedule, mode: str) -> optax.GradientTransformation:
    return lp.lorapro_adamw(rate, run.scale, mode=mode, layout=layout_of(run), **_adam(run))


def _muon(run: RunConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Its own momentum; of b1, b2 and eps only the leaves in no pair know."""
    adam = {"adam_b1": run.b1, "adam_b2": run.b2, "adam_eps": run.eps}
    layout, decay = layout_of(run), run.weight_decay
    return lp.lorapro_muon(rate, run.scale, layout=layout, weight_decay=decay, **adam)


def _projected_adamw(run: RunConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """The paper's efficient form: AdamW, which is given the projected gradients."""
    return optax.chain(lp.lorapro(run.scale, layout=layout_of(run)), _adamw(run, rate))


def _full_muon(run: RunConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Optax's Muon on the layers' kernels, AdamW on the rest, at AdamW's rates (rms 0.2)."""

    def sides(params):
        def of(path, x) -> optax.contrib.MuonDimensionNumbers | None:
            del x
            names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            kernel = "layers" in names and names[-1] == "kernel"  # (in, out), or a stack of them
            return optax.contrib.MuonDimensionNumbers(-2, -1) if kernel else None

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.muon(
        rate,
        weight_decay=run.weight_decay,
        adam_weight_decay=run.weight_decay,
        adam_b1=run.b1,
        adam_b2=run.b2,
        muon_weight_dimension_numbers=sides,
        consistent_rms=0.2,
    )


METHODS: dict[str, Method] = {
    "full": Method(False, _adamw),
    "full-muon": Method(False, _full_muon),
    "lora": Method(True, _adamw),
    "lorapro-full": Method(True, functools.partial(_lorapro, mode="full")),
    "lorapro-factored": Method(True, functools.partial(_lorapro, mode="factored")),
    "lorapro-muon": Method(True, _muon),
    "lorapro-adamw": Method(True, _projected_adamw),
}


def method_named(name: str) -> Method:
    """The named method; a ValueError with the near misses if there is none of that name."""
    return METHODS[one_of("method", name, METHODS)]


class Peaks(NamedTuple):
    """Peak learning rates: numbers, or traced in a program that serves every rate."""

    method: jax.typing.ArrayLike  # of what the method's own rule trains
    head: jax.typing.ArrayLike  # of the head beside adapters


def peaks_of(run: RunConfig) -> Peaks:
    """The run's own."""
    return Peaks(run.learning_rate, run.head_learning_rate or run.learning_rate)


def schedule(run: RunConfig, peak: jax.typing.ArrayLike, steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` over the warm-up, then to 0 at the last of `steps`."""
    warmup = min(math.ceil(run.warmup_ratio * steps), steps - 1)
    # optax.warmup_cosine_decay_schedule compares the peak with 0 and so takes no traced one.
    if run.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, steps - warmup)
    else:
        fall = optax.linear_schedule(peak, 0.0, steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), fall], [warmup])


def optimizer(
    run: RunConfig, steps: int, given: Peaks | None = None
) -> optax.GradientTransformation:
    """Global-norm clipping of the raw gradients, then the method's rule.

    `given` stand in for the run's own; the state's structure depends on neither.
    """
    method, peak = method_named(run.method), given or peaks_of(run)
    tx = method.optimizer(run, schedule(run, peak.method, steps))
    if method.adapted:
        head = {HEAD: _adamw(run, schedule(run, peak.head, steps))}
        head = head if model_named(run.model).kind == "encoder" else None
        tx = lp.freeze_base(tx, extra=head, layout=layout_of(run))
    return optax.chain(optax.clip_by_global_norm(run.clip_norm), tx) if run.clip_norm else tx


def split(
    model: nnx.Module, run: RunConfig, rngs: nnx.Rngs
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, what trains, the rest) of `model`, which gains adapters if the method uses them."""
    trains = nnx.Param
    if method_named(run.method).adapted:
        spec = model_named(run.model)
        spec.adapt(
            model,
            rank=run.rank,
            alpha=run.alpha,
            targets=run.targets or spec.adapted,
            rslora=run.rslora,
            dropout=run.dropout,
            rngs=rngs,
        )
        head = nnx.All(nnx.Param, lambda path, _: path[0] == "head")
        trains = nnx.Any(nnx.LoRAParam, head)
    graph, trainable, rest = nnx.split(model, trains, ...)
    # Steps donate what trains, and the next run may begin from the same pretrained arrays.
    return graph, jax.tree.map(jnp.copy, nnx.as_pure(trainable)), nnx.as_pure(rest)


def diagnosis_of(run: RunConfig) -> Callable[..., dict[str, jax.Array]] | None:
    """measure(params, grads, updates) -> means over the pairs; None for a method without pairs.

    Each is the cosine between a step of the full weight and the part of the full gradient that the
    adapters can reach: LoRA's gradient step, LoRA-Pro's, and the step the optimizer takes.
    """
    if not method_named(run.method).adapted:
        return None

    def measure(params, grads, updates) -> dict[str, jax.Array]:
        given, layout = (params, grads, run.scale), layout_of(run)
        projected = lp.diagnose(*given, layout=layout).values()
        taken = lp.diagnose(*given, updates=updates, layout=layout).values()
        cosines = {
            "lora_cosine": [pair.lora_cosine for pair in projected],
            "lorapro_cosine": [pair.cosine for pair in projected],
            "step_cosine": [pair.cosine for pair in taken],
        }
        return {name: jnp.mean(jnp.stack(found)) for name, found in cosines.items()}

    return measure
