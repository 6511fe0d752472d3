"""LoRA on Linen models: y = x (K + s a b) + bias at every adapted Dense, by nn.intercept_methods.

The factors are a tree of their own: to params["layer"]["kernel"] belong lora["layer"]["lora_a"]
(m, r) and ["lora_b"] (r, n); m and n are all of the kernel's input and output axes.
"""

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import unflatten_dict
from jaxtyping import Array

from lorapro_jax import _adapter
from lorapro_jax._checks import check_rank
from lorapro_jax._groups import Scale
from lorapro_jax._layouts import flatten
from lorapro_jax._paths import check_matches, scale_at

# The functions below flax's wrappers: intercepting these, and not subclasses' overrides or the
# outer shell of a lifted transformation, adapts each linear map exactly once.
_FORWARDS = (inspect.unwrap(nn.Dense.__call__), inspect.unwrap(nn.DenseGeneral.__call__))


def _by_module(tree: Any, name: str) -> dict[str, Any]:
    """{module's path: its leaf of that name}; the root's path is empty."""
    paths, leaves, _ = flatten(tree)
    split = [(path.rpartition("/"), leaf) for path, leaf in zip(paths, leaves, strict=True)]
    return {module: leaf for (module, _, last), leaf in split if last == name}


def _input_axes(path: str, shape: tuple[int, ...], declared: Mapping[str, int]) -> int:
    """How many leading axes of a kernel are inputs: one of two, or what the caller declares."""
    found = {count for pattern, count in declared.items() if re.fullmatch(pattern, path)}
    found = found or ({1} if len(shape) == 2 else set())
    if len(found) != 1 or not 0 < min(found) < len(shape):
        counts = " or ".join(map(str, sorted(found))) or "no"
        raise ValueError(
            f"{path}/kernel has shape {shape}, and input_axes declares {counts} input axes. Its "
            f"patterns may not disagree: input_axes={{{re.escape(path)!r}: 1}}, or more, but not "
            "all. Leave layers stacked by nn.scan or nn.vmap out of targets"
        )
    return min(found)


def init_lora(
    key: Array,
    params: Any,
    rank: int = 8,
    *,
    targets: str,
    input_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> dict:
    """a (m, r), uniform in ±1/sqrt(m), and b (r, n) = 0 for every kernel whose module path matches.

    Args:
      key: a PRNG key; each adapter's own key is folded from it and the path.
      params: variables["params"]: dicts or FrozenDict, boxed or not, arrays or ShapeDtypeStructs.
      rank: r, at least 1. More than min(m, n) is allowed and adds nothing.
      targets: regex, compared with the whole path of the kernel without its final "/kernel".
      input_axes: {regex of the module path: number of leading kernel axes that are inputs}, needed
        for kernels of more than two axes: (D, N, H) is D -> N H with 1 and D N -> H with 2.
      dtype: of the factors; None is the kernel's, but at least float32.

    Returns:
      A dict, nested as `params` and pruned to the matches: {..., "query": {"lora_a", "lora_b"}}.

    Raises:
      ValueError: no kernel matches, a kernel's inputs are not known, a number is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lorapro_jax import linen as lora
      >>> params = {name: {"kernel": jnp.ones((4, 16))} for name in ("query", "value")}
      >>> factors = lora.init_lora(jax.random.key(0), params, rank=2, targets="query")
      >>> jax.tree.map(jnp.shape, factors)
      {'query': {'lora_a': (4, 2), 'lora_b': (2, 16)}}

    References:
      LoRA, arXiv:2106.09685, section 4.1.
    """
    check_rank(rank)
    kernels, flat = _by_module(params, "kernel"), {}
    check_matches("targets", [targets], kernels)
    for path, kernel in kernels.items():
        if re.fullmatch(targets, path):
            inputs = _input_axes(path, kernel.shape, input_axes or {})
            shape = math.prod(kernel.shape[:inputs]), math.prod(kernel.shape[inputs:])
            a, b = _adapter.init_pair(key, path, shape, rank, dtype, kernel.dtype)
            flat |= {f"{path}/lora_a".lstrip("/"): a, f"{path}/lora_b".lstrip("/"): b}
    return unflatten_dict(flat, sep="/")


def _pairs(lora: Any) -> dict[str, tuple[Array, Array]]:
    """{module's path: (a, b)}; raises where one of the two is missing or a leaf is neither."""
    for path in flatten(lora)[0]:
        if path.rpartition("/")[2] not in ("lora_a", "lora_b"):
            raise ValueError(f"{path} in the lora tree is neither lora_a nor lora_b; remove it")
    a, b = _by_module(lora, "lora_a"), _by_module(lora, "lora_b")
    for path in sorted(a.keys() ^ b.keys()):
        raise ValueError(f"{path or 'the root'} has no lora_{'b' if path in a else 'a'}; pass both")
    return {path: (a[path], b[path]) for path in sorted(a)}


def _adapted_call(next_call, inputs, module: Any, path: str, a: Array, b: Array):
    """The intercepted Dense with (x a) b added."""
    if getattr(module, "batch_dims", ()):
        raise ValueError(f"{path} has batch_dims {module.batch_dims}; leave it out of targets")
    y = next_call(inputs)
    axis = getattr(module, "axis", -1)
    axis = (axis,) if isinstance(axis, int) else tuple(axis)
    kernel = meta.unbox(module.get_variable("params", "kernel"))
    m, n = math.prod(kernel.shape[: len(axis)]), math.prod(kernel.shape[len(axis) :])
    if (a.shape, b.shape) != ((m, *a.shape[-1:]), (*a.shape[-1:], n)):
        raise ValueError(
            f"{path}: the kernel {kernel.shape} needs lora_a ({m}, r) and lora_b (r, {n}), not "
            f"{a.shape} and {b.shape}; check input_axes. Factors cannot be stacked for nn.scan"
        )
    x, a, b = module.promote_dtype(inputs, a, b, dtype=module.dtype)
    delta = _adapter.low_rank(_adapter.inputs_last(x, axis), a, b, module.precision)
    return y + delta.reshape(y.shape).astype(y.dtype)


def apply_with_lora(
    module: nn.Module,
    variables: Any,
    lora: Any,
    *args: Any,
    scale: Scale = 2.0,
    allow_unused: bool = False,
    **kwargs: Any,
) -> Any:
    """module.apply(variables, *args, **kwargs) with K + s a b in place of every adapted kernel.

    Adapted is every nn.Dense or nn.DenseGeneral (subclasses, nn.remat) whose path is in `lora`.

    Args:
      module: the model, unbound.
      variables, *args, **kwargs: as in module.apply, but for `scale` and `allow_unused`.
      lora: the tree from `init_lora`; differentiate with respect to it.
      scale: s, a positive float (alpha / r), or a callable of the module path.
      allow_unused: accept factors that no layer used, as when `method` runs a part of the model.

    Returns:
      What module.apply returns.

    Raises:
      ValueError: an adapter is unused, does not fit, lacks a factor or is for a layer with
        batch_dims; a scale is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from lorapro_jax import linen as lora
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> factors = lora.init_lora(jax.random.key(1), variables["params"], rank=2, targets="")
      >>> lora.apply_with_lora(model, variables, factors, x, scale=2.0).shape
      (2, 3)

    References:
      LoRA, arXiv:2106.09685, section 4.1.
    """
    pairs = {path: (a, b * scale_at(scale, path)) for path, (a, b) in _pairs(lora).items()}
    used = set()

    def intercept(next_call, call_args, call_kwargs, context):
        path = "/".join(context.module.path)
        if path not in pairs or context.orig_method.func not in _FORWARDS:
            return next_call(*call_args, **call_kwargs)
        used.add(path)
        inputs = inspect.signature(next_call).bind(*call_args, **call_kwargs).args[0]
        return _adapted_call(next_call, inputs, context.module, path, *pairs[path])

    with nn.intercept_methods(intercept):
        out = module.apply(variables, *args, **kwargs)
    unused = sorted(pairs.keys() - used)
    if unused and not allow_unused:
        raise ValueError(
            f"no nn.Dense or nn.DenseGeneral ran at {', '.join(unused)}: these adapters would not "
            "train; remove them, or pass allow_unused=True if the call runs a part of the model"
        )
    return out


def merge_lora(params: Any, lora: Any, scale: Scale) -> Any:
    """Folds the adapters into the kernels, K + s a b, for serving without them.

    The sum is computed in float32 or better and rounded once to the kernel's dtype.

    Args:
      params: variables["params"], as given to `init_lora`.
      lora, scale: as in `apply_with_lora`.

    Returns:
      A tree like `params` (boxes and FrozenDicts kept), the adapted kernels replaced.

    Raises:
      ValueError: a pair has no kernel, does not fit it, or a scale is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorapro_jax import linen as lora
      >>> factors = {"out": {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 3))}}
      >>> lora.merge_lora({"out": {"kernel": jnp.zeros((2, 3))}}, factors, scale=0.5)
      {'out': {'kernel': Array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], dtype=float...)}}

    References:
      LoRA, arXiv:2106.09685, section 4.1: no additional inference latency.
    """
    paths, leaves, treedef = flatten(params)
    kernels, pairs = _by_module(params, "kernel"), _pairs(lora)
    check_matches("the adapter's module path", map(re.escape, pairs), kernels)
    for path, (a, b) in pairs.items():
        kernel = kernels[path]
        if kernel.size != a.shape[0] * b.shape[-1] or a.shape[-1] != b.shape[0]:
            raise ValueError(f"{path}: {a.shape}, {b.shape} do not make a matrix of {kernel.shape}")
        i = paths.index(f"{path}/kernel".lstrip("/"))
        leaves[i] = _adapter.fold(kernel, a, b, scale_at(scale, path))
    return jax.tree.unflatten(treedef, leaves)
