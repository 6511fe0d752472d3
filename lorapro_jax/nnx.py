"""LoRA on NNX models in place: y = x (K + s a b) + bias.

An adapted nnx.Linear or nnx.LinearGeneral gains the leaves lora_a (m, r) and lora_b (r, n), both
nnx.LoRAParam; m and n are all of the kernel's input and output axes.
"""

import math
import re
from typing import Any

from flax import nnx

from lorapro_jax import _adapter
from lorapro_jax._checks import check_positive, check_rank
from lorapro_jax._paths import check_matches


def _adapted_call(self: Any, inputs, out_sharding=None):
    """The base layer's output with s (x a) b added."""
    base = nnx.LinearGeneral if hasattr(self, "axis") else nnx.Linear
    y = base.__call__(self, inputs, out_sharding=out_sharding)
    x = inputs if self.lora_dropout is None else self.lora_dropout(inputs)
    b = self.lora_b[...] * self.lora_scale
    x, a, b = self.promote_dtype((x, self.lora_a[...], b), dtype=self.dtype)
    x = _adapter.inputs_last(x, getattr(self, "axis", (-1,)))
    delta = _adapter.low_rank(x, a, b, self.precision)
    return y + delta.reshape(y.shape).astype(y.dtype)


# Each has the one base: with a mixin beside it, Python refuses to change an instance's class.
class LoRALinear(nnx.Linear):
    """An nnx.Linear that `add_lora` adapted; construct an nnx.Linear and adapt it."""

    lora_dropout: nnx.Dropout | None = None
    __call__ = _adapted_call


class LoRALinearGeneral(nnx.LinearGeneral):
    """An nnx.LinearGeneral that `add_lora` adapted; construct the base and adapt it."""

    lora_dropout: nnx.Dropout | None = None
    __call__ = _adapted_call


_ADAPTED = {nnx.Linear: LoRALinear, nnx.LinearGeneral: LoRALinearGeneral}
_BASE = {adapted: base for base, adapted in _ADAPTED.items()}


def _targets(model: nnx.Module, pattern: str) -> dict[str, Any]:
    """The modules to adapt, by path; raises if there is none or if one cannot be adapted."""
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    matched = {path: module for path, module in modules.items() if re.fullmatch(pattern, path)}
    found = {path: module for path, module in matched.items() if type(module) in _ADAPTED}
    for path, module in matched.items():
        if type(module) in _BASE:
            raise ValueError(f"{path} has an adapter already; merge_lora it first")
        if not found:
            raise ValueError(
                f"targets {pattern!r} matches no linear layer: {path!r} is a "
                f"{type(module).__name__}; supported are exactly nnx.Linear, nnx.LinearGeneral"
            )
    check_matches("targets", [pattern], (p for p, x in modules.items() if type(x) in _ADAPTED))
    return found


def _matrix_shape(path: str, module: Any) -> tuple[int, int]:
    """(m, n): the sizes of the kernel's input and output axes together."""
    general, shape = type(module) is nnx.LinearGeneral, module.kernel.shape
    inputs, outputs = (len(module.axis), len(module.out_features)) if general else (1, 1)
    batch = dict(getattr(module, "batch_axis", {}))
    if batch or len(shape) != inputs + outputs:
        raise ValueError(
            f"{path}/kernel has shape {shape} and batch_axis {batch}, not {inputs} + {outputs} "
            "axes; leave it out of targets, or call add_lora inside the function that nnx.vmap maps"
        )
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def add_lora(
    model: nnx.Module,
    rank: int = 8,
    alpha: float | int = 16.0,
    *,
    targets: str,
    rslora: bool = False,
    dropout: float | int = 0.0,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> None:
    """Adds a low-rank adapter to every linear layer of `model` whose path matches, in place.

    y = x (K + s a b) + bias, a (m, r) uniform in ±1/sqrt(m) (PEFT's kaiming-uniform with a = √5),
    b (r, n) = 0. A layer stays the object it was, of a subclass of its class: paths, isinstance,
    checkpoints and the model's code remain valid. Matched containers are left alone.

    Args:
      model: any nnx module.
      rank: r, at least 1. More than min(m, n) is allowed and adds nothing.
      alpha, rslora: s = alpha / r, or alpha / sqrt(r) with `rslora`; positive.
      targets: regex, compared with the whole module path ("encoder/layers/0/attention/query").
      dropout: rate in [0, 1) on the adapter's input only; it follows model.train() and .eval().
      dtype: of the factors; None is the kernel's, but at least float32.
      rngs: keys for a ("params") and for the dropout ("dropout").

    Raises:
      ValueError: no match can be adapted, one has an adapter already, a layer holds more than one
        matrix (batch axes, nnx.vmap), a number is out of range. The model is then unchanged.

    Example:
      >>> from flax import nnx
      >>> from lorapro_jax import nnx as lora
      >>> model = nnx.Sequential(nnx.Linear(4, 16, rngs=nnx.Rngs(0)), nnx.relu)
      >>> lora.add_lora(model, rank=2, targets=r"layers/0", rngs=nnx.Rngs(1))
      >>> model.layers[0].lora_a.shape, model.layers[0].lora_b.shape
      ((4, 2), (2, 16))

    References:
      LoRA, arXiv:2106.09685, section 4.1; rsLoRA, arXiv:2312.03732, theorem 3.2.
    """
    check_rank(rank)
    check_positive("alpha", alpha)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; pass a rate in [0, 1)")
    modules = _targets(model, targets)
    shapes = {path: _matrix_shape(path, module) for path, module in modules.items()}
    key = rngs.params()
    for path, module in modules.items():
        a, b = _adapter.init_pair(key, path, shapes[path], rank, dtype, module.kernel.dtype)
        object.__setattr__(module, "__class__", _ADAPTED[type(module)])
        module.lora_a, module.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        module.lora_scale = float(alpha) / (math.sqrt(rank) if rslora else rank)
        if dropout:
            module.lora_dropout = nnx.Dropout(dropout, rngs=rngs)


def merge_lora(model: nnx.Module) -> None:
    """Folds every adapter of `model` into its kernel, K ← K + s a b, and removes it, in place.

    The sum is computed in float32 or better and rounded once to the kernel's dtype.

    Args:
      model: a module with adapters from `add_lora`.

    Raises:
      ValueError: the model has no adapter.

    Example:
      >>> from flax import nnx
      >>> from lorapro_jax import nnx as lora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> lora.add_lora(model, rank=2, targets="", rngs=nnx.Rngs(1))
      >>> lora.merge_lora(model)
      >>> type(model).__name__, hasattr(model, "lora_a")
      ('Linear', False)

    References:
      LoRA, arXiv:2106.09685, section 4.1: no additional inference latency.
    """
    adapted: list[Any] = [module for _, module in nnx.iter_modules(model) if type(module) in _BASE]
    if not adapted:
        raise ValueError("the model has no adapter to merge")
    for module in adapted:
        pair = module.lora_a[...], module.lora_b[...]
        module.kernel[...] = _adapter.fold(module.kernel[...], *pair, module.lora_scale)
        for name in ("lora_a", "lora_b", "lora_scale", "lora_dropout"):
            if name in vars(module):
                delattr(module, name)
        object.__setattr__(module, "__class__", _BASE[type(module)])
