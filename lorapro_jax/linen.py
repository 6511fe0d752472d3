"""LoRA on Linen models: y = x (K + s a b) + bias at every adapted Dense, by nn.intercept_methods.

The factors live in a tree of their own, pruned to the adapted layers: the kernel at
params["layer"]["kernel"] has lora["layer"]["lora_a"] (m, r) and ["lora_b"] (r, n) beside it, where
m and n are all of the kernel's input and output axes. `params` and the model's code do not change.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array

from lorapro_jax import _adapter
from lorapro_jax._checks import check_rank, check_scale
from lorapro_jax._paths import no_match_error, path_str

Scale = float | int | Array | Callable[[str], Any]

# The functions below flax's wrappers: intercepting these, and not subclasses' overrides or the
# outer shell of a lifted transformation, adapts each linear map exactly once.
_FORWARDS = (inspect.unwrap(nn.Dense.__call__), inspect.unwrap(nn.DenseGeneral.__call__))


def _leaves(tree) -> dict[str, Any]:
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _module_of(path: str, leaf: str) -> str | None:
    """The module path of a leaf of that name: ".../query" of ".../query/kernel"."""
    head, _, tail = path.rpartition("/")
    return head if tail == leaf else None


def _under(module: str, leaf: str) -> str:
    return f"{module}/{leaf}" if module else leaf


def _scale_at(scale: Scale, path: str):
    value = scale(path) if callable(scale) else scale
    check_scale(value, f"{path}: scale")
    return value


def _input_axes(path: str, shape: tuple[int, ...], declared: Mapping[str, int]) -> int:
    """How many leading axes of a kernel are inputs: one of two, or what the caller declares."""
    found = [count for pattern, count in declared.items() if re.fullmatch(pattern, path)]
    if len(set(found)) > 1:
        raise ValueError(f"{path}: the patterns of input_axes disagree: {found}; leave one of them")
    if not found and len(shape) != 2:
        raise ValueError(
            f"{path}/kernel has shape {shape}, which does not say how many of its leading axes are "
            f"inputs; declare it: input_axes={{{re.escape(path)!r}: 1}} if the product is "
            f"({shape[0] if shape else 1}, ...), 2 if two axes are contracted. A layer stacked by "
            "nn.scan or nn.vmap is not supported: leave it out of targets"
        )
    count = found[0] if found else 1
    if not 0 < count < len(shape):
        raise ValueError(
            f"{path}/kernel has shape {shape}, and input_axes declares {count} input axes; at "
            "least one axis must be an input and one an output"
        )
    return count


def _nest(flat: Mapping[str, Any]) -> dict:
    """{"a/b": leaf} as {"a": {"b": leaf}}."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def init_lora(
    key: Array,
    params: Any,
    rank: int = 8,
    *,
    targets: str,
    input_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> dict:
    """The low-rank factors for every kernel whose module path matches: a random, b zero.

    K + s a b, a (m, r) uniform in ±1/sqrt(m) (PEFT's kaiming-uniform with a = √5), b (r, n) = 0;
    m is the product of the kernel's input axes, n of its output axes.

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
      ValueError: no kernel matches, a kernel's input axes are not known, or a number is out of
        range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from lorapro_jax import linen as lora
      >>> model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> factors = lora.init_lora(jax.random.key(1), variables["params"], 2, targets="layers_0")
      >>> jax.tree.map(jnp.shape, factors)
      {'layers_0': {'lora_a': (4, 2), 'lora_b': (2, 16)}}

    References:
      LoRA, arXiv:2106.09685, section 4.1.
    """
    check_rank(rank)
    kernels = {_module_of(path, "kernel"): leaf for path, leaf in _leaves(params).items()}
    kernels = {path: leaf for path, leaf in kernels.items() if path is not None}
    matched = {path: leaf for path, leaf in kernels.items() if re.fullmatch(targets, path)}
    if not matched:
        raise no_match_error("targets", targets, kernels)
    flat = {}
    for path, kernel in matched.items():
        inputs = _input_axes(path, kernel.shape, input_axes or {})
        shape = math.prod(kernel.shape[:inputs]), math.prod(kernel.shape[inputs:])
        chosen = _adapter.factor_dtype(dtype, kernel.dtype)
        a, b = _adapter.init_pair(key, path, shape, rank, chosen)
        flat |= {_under(path, "lora_a"): a, _under(path, "lora_b"): b}
    return _nest(flat)


def _pairs(lora) -> dict[str, tuple[Array, Array]]:
    """{module path: (a, b)}; raises where one of the two is missing or a leaf is neither."""
    leaves = _leaves(lora)
    for path in leaves:
        name = path.rpartition("/")[2]
        if name not in ("lora_a", "lora_b"):
            raise ValueError(f"{path} in the lora tree is neither lora_a nor lora_b; remove it")
    modules = sorted({path.rpartition("/")[0] for path in leaves})
    for module in modules:
        for name in ("lora_a", "lora_b"):
            if _under(module, name) not in leaves:
                raise ValueError(f"{module or 'the root'} has no {name}; pass both factors")
    return {m: (leaves[_under(m, "lora_a")], leaves[_under(m, "lora_b")]) for m in modules}


def _check_shapes(path: str, kernel_shape, inputs: int, a: Array, b: Array) -> None:
    shape = math.prod(kernel_shape[:inputs]), math.prod(kernel_shape[inputs:])
    expected = (a.shape[:-1], b.shape[1:], a.shape[-1:]) == (shape[:1], shape[1:], b.shape[:1])
    if a.ndim != 2 or b.ndim != 2 or not expected:
        raise ValueError(
            f"{path}: the kernel {tuple(kernel_shape)} is a matrix {shape}, so lora_a must be "
            f"({shape[0]}, r) and lora_b (r, {shape[1]}), but they are {a.shape} and {b.shape}; "
            "make them by init_lora on these params, with input_axes as the layer contracts. "
            "Factors stacked for nn.scan are not supported"
        )


def _axes(module: Any) -> tuple[int, ...]:
    axis = getattr(module, "axis", -1)
    return (axis,) if isinstance(axis, int) else tuple(axis)


def _adapted_call(next_call, inputs, module: Any, path: str, a: Array, b: Array):
    """The intercepted Dense with (x a) b added."""
    axis = _axes(module)
    if getattr(module, "batch_dims", ()):
        raise ValueError(
            f"{path} is an nn.DenseGeneral with batch_dims {module.batch_dims}: a kernel per batch "
            "entry, not one matrix; leave it out of targets"
        )
    y = next_call(inputs)
    kernel = meta.unbox(module.get_variable("params", "kernel"))
    _check_shapes(path, kernel.shape, len(axis), a, b)
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

    Every nn.Dense and nn.DenseGeneral whose path is in `lora` computes y = x (K + s a b) + bias,
    also inside nn.remat and in subclasses; the others are not touched.

    Args:
      module: the model, unbound.
      variables: as in module.apply.
      lora: the tree from `init_lora`; differentiate with respect to it.
      *args: as in module.apply.
      scale: s, a positive float (alpha / r), or a callable of the module path.
      allow_unused: accept factors that no layer used in this call, as when `method` runs only a
        part of the model.
      **kwargs: as in module.apply: method, rngs, mutable, capture_intermediates and the model's own
        (but for `scale` and `allow_unused`, which do not reach it).

    Returns:
      What module.apply returns.

    Raises:
      ValueError: an adapter was not used (it would silently not train), does not fit its kernel,
        lacks a factor or belongs to a layer with batch_dims; or a scale is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from lorapro_jax import linen as lora
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> factors = lora.init_lora(jax.random.key(1), variables["params"], rank=2, targets="")
      >>> y = lora.apply_with_lora(model, variables, factors, x, scale=2.0)
      >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-6))  # b is still zero
      True

    References:
      LoRA, arXiv:2106.09685, section 4.1.
    """
    pairs = _pairs(lora)
    scales = {path: _scale_at(scale, path) for path in pairs}
    used = set()

    def intercept(next_call, call_args, call_kwargs, context):
        path = "/".join(context.module.path)
        if path not in pairs or context.orig_method.func not in _FORWARDS:
            return next_call(*call_args, **call_kwargs)
        used.add(path)
        a, b = pairs[path]
        inputs = inspect.signature(next_call).bind(*call_args, **call_kwargs).args[0]
        return _adapted_call(next_call, inputs, context.module, path, a, b * scales[path])

    with nn.intercept_methods(intercept):
        out = module.apply(variables, *args, **kwargs)
    unused = sorted(set(pairs) - used)
    if unused and not allow_unused:
        raise ValueError(
            f"no nn.Dense or nn.DenseGeneral ran at {', '.join(unused)}: these adapters change "
            "nothing and would not train; remove them, or pass allow_unused=True if this call runs "
            "only a part of the model"
        )
    return out


def merge_lora(params: Any, lora: Any, scale: Scale) -> Any:
    """Folds the adapters into the kernels, K + s a b, for serving without them.

    The sum is computed in float32 or better and rounded once to the kernel's dtype.

    Args:
      params: variables["params"], as given to `init_lora`.
      lora: the tree of factors, a (m, r) and b (r, n).
      scale: s, a positive float, or a callable of the module path.

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
    pairs = _pairs(lora)
    kernels = {_module_of(path, "kernel") for path in _leaves(params)} - {None}
    for path in pairs:
        if path not in kernels:
            raise no_match_error("the adapter's module path", path, {str(k) for k in kernels})

    def fold(path, leaf):
        module = _module_of(path_str(path), "kernel")
        if module is None or module not in pairs:
            return leaf
        a, b = pairs[module]
        if leaf.size != a.shape[0] * b.shape[-1] or a.shape[-1] != b.shape[0]:
            raise ValueError(
                f"{module}: lora_a {a.shape} and lora_b {b.shape} do not make a matrix of the "
                f"kernel's size, {leaf.shape}; pass the tree that init_lora made for these params"
            )
        return _adapter.fold(leaf, a, b, _scale_at(scale, module))

    return jax.tree_util.tree_map_with_path(fold, params)
