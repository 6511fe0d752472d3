"""Which leaves of a parameter tree form a LoRA pair, and which of their axes are m, r and n."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lorapro_jax._paths import check_matches, path_str
from lorapro_jax._sharding import joined, placed, spec_of


@dataclasses.dataclass(frozen=True)
class LoRADimensionNumbers:
    """Which axes of a pair's two leaves are the rank and the batch; the rest are m and n.

    The axes of `a` that are neither are the rows m of K = K0 + s a b, for each batch index; such
    axes of `b` are the columns n. Axes may be negative.

    Args:
      a_rank: the rank axis of `a`; None for the last axis that is not a batch axis.
      b_rank: the rank axis of `b`; None for the first axis that is neither batch nor summed.
      a_batch: axes of `a` over which pairs are independent (scanned layers, heads, experts).
      b_batch: the axes of `b` that match them, in the same order.
      b_sum: axes of `b` that the forward pass sums over. Slices get equal shares of the step.

    Example:
      Twelve scanned layers, a (12, 768, 8) and b (12, 8, 3072):
      >>> import lorapro_jax as lp
      >>> lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))
      LoRADimensionNumbers(a_rank=None, b_rank=None, a_batch=(0,), b_batch=(0,), b_sum=())
    """

    a_rank: int | None = None
    b_rank: int | None = None
    a_batch: tuple[int, ...] = ()
    b_batch: tuple[int, ...] = ()
    b_sum: tuple[int, ...] = ()


def unbatched(path: str, a_ndim: int, b_ndim: int) -> LoRADimensionNumbers | None:
    """The rule of most layouts: where one leaf is a matrix, no axis can be a batch axis."""
    return LoRADimensionNumbers() if 2 in (a_ndim, b_ndim) else None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to find pairs by path, and how the axes of their leaves lie.

    Args:
      a, b: regexes of the whole paths of both factors, whose group `pair` names the pair.
      dims: {regex of the pair's path: LoRADimensionNumbers}, for what `infer` cannot tell.
      infer: (path, a.ndim, b.ndim) -> LoRADimensionNumbers, or None where that is ambiguous.

    Example:
      >>> import lorapro_jax as lp
      >>> scanned = lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))
      >>> layout = lp.layouts.FLAX.declare({r"decoder/layers/.*": scanned})
    """

    a: str
    b: str
    dims: Mapping[str, LoRADimensionNumbers] = dataclasses.field(default_factory=dict)
    infer: Callable[[str, int, int], LoRADimensionNumbers | None] = unbatched

    def declare(self, dims: Mapping[str, LoRADimensionNumbers]) -> "Layout":
        """This layout with the dimension numbers of some pairs declared, the new ones first."""
        return dataclasses.replace(self, dims={**dims, **self.dims})


# lora_a and lora_b of one node (flax.nnx.LoRA), or <kernel>_lora_a and _lora_b beside the kernel.
FLAX = Layout(a=r"(?P<pair>(.*[/_])?)lora_a", b=r"(?P<pair>(.*[/_])?)lora_b")


class Axes(NamedTuple):
    """One leaf's axes by role."""

    batch: tuple[int, ...]
    summed: tuple[int, ...]
    rank: int
    others: tuple[int, ...]
    order: tuple[int, ...]  # all of them as `read` has them, the summed ones after the batch


class Pair(NamedTuple):
    """One pair: its path, where its leaves stand in the flattened tree, how their axes lie."""

    path: str
    a: int
    b: int
    a_axes: Axes
    b_axes: Axes
    rank: int


def flatten(tree: Any, is_leaf: Callable | None = None) -> tuple[list[str], list[Any], Any]:
    """Normalised paths, leaves and treedef."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return [path_str(path) for path, _ in leaves], [leaf for _, leaf in leaves], treedef


def check_leaves(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Raises ValueError for a leaf without a gradient: integers, booleans, float0."""
    for path, leaf in zip(paths, leaves, strict=True):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"{path} has dtype {dtype}, which cannot be trained; take it out of the tree "
                "before jax.grad (lora, base = lp.split(params)), or freeze it with lp.freeze_base"
            )


def _axes(path: str, name: str, ndim: int, rank: int | None, batch: Any, summed: Any) -> Axes:
    """The declared axes of one leaf, non-negative and complete."""
    roles: dict[int, str] = {}
    ranks = () if rank is None else (rank,)
    for role, axes in (("batch", batch), ("summed", summed), ("rank", ranks)):
        for axis in axes:
            where = f"{path}: axis {axis} of {name}"
            if not -ndim <= axis < ndim:
                raise ValueError(f"{where} was declared {role}, but {name} has {ndim} axes")
            if axis % ndim in roles:
                raise ValueError(f"{where} was declared both {role} and {roles[axis % ndim]}")
            roles[axis % ndim] = role
    free = [axis for axis in range(ndim) if axis not in roles]
    if rank is None:
        if not free:
            raise ValueError(f"{path}: the declaration leaves no axis of {name} for the rank")
        rank = free.pop(-1 if name == "a" else 0)
    batch, summed = (tuple(axis % ndim for axis in axes) for axes in (batch, summed))
    rank, others = rank % ndim, tuple(free)
    order = (*others, rank) if name == "a" else (rank, *others)
    return Axes(batch, summed, rank, others, (*batch, *summed, *order))


def _make_pair(path: str, index: Mapping[str, int], leaves: Sequence[Any], layout: Layout) -> Pair:
    """The pair of two leaves, by its declared dimension numbers or the layout's rule."""
    a, b = (tuple(leaves[index[role]].shape) for role in ("a", "b"))
    declared = (dims for pattern, dims in layout.dims.items() if re.fullmatch(pattern, path))
    dims = next(declared, None) or layout.infer(path, len(a), len(b))
    if dims is None:
        raise ValueError(
            f"{path} is ambiguous: a {a} and b {b} may be one matrix, or stacked layers, heads or "
            "experts. Declare it: layout=<yours, or lp.layouts.FLAX>.declare("
            f'{{r"{re.escape(path)}": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))}}) for '
            "layers on axis 0, lp.LoRADimensionNumbers() for one matrix"
        )
    a_axes = _axes(path, "a", len(a), dims.a_rank, dims.a_batch, ())
    b_axes = _axes(path, "b", len(b), dims.b_rank, dims.b_batch, dims.b_sum)
    a_batch, b_batch = [a[i] for i in a_axes.batch], [b[i] for i in b_axes.batch]
    rank = a[a_axes.rank]
    if rank != b[b_axes.rank] or a_batch != b_batch:
        raise ValueError(
            f"{path}: a {a} has rank {rank} and batch {a_batch}, b {b} has rank {b[b_axes.rank]} "
            f"and batch {b_batch}; declare the axes: layout=lp.layouts.FLAX.declare({{...}})"
        )
    return Pair(path, index["a"], index["b"], a_axes, b_axes, rank)


def _path_of(name: str) -> str:
    """The path of a pair from its name, which may end in a separator."""
    return name.rstrip("/_.") or "lora"


def _by_name(paths: Sequence[str], layout: Layout) -> dict[str, dict[str, int]]:
    """{pair's name: {"a": leaf index, "b": leaf index}}, complete or an error."""
    found: dict[str, dict[str, int]] = {}
    for i, path in enumerate(paths):
        for role, pattern in (("a", layout.a), ("b", layout.b)):
            if match := re.fullmatch(pattern, path):
                factors = found.setdefault(match["pair"], {})
                if role in factors:
                    raise ValueError(
                        f"{paths[factors[role]]} and {path} are both the {role} of one pair; "
                        "pass a layout= whose group `pair` tells them apart"
                    )
                factors[role] = i
                break
    for name, factors in found.items():
        if len(factors) == 1:
            ((role, i),) = factors.items()
            raise ValueError(
                f"{_path_of(name)} has {paths[i].rsplit('/', 1)[-1]} ({role}) but no matching "
                f"{'b' if role == 'a' else 'a'}; train and freeze both together, or pass layout=..."
            )
    if len({_path_of(name) for name in found}) < len(found):
        raise ValueError(f"two pairs share one path among {sorted(found)}; rename one of them")
    return found


def find_pairs(
    paths: Sequence[str], leaves: Sequence[Any], layout: Layout | None, *, require_pairs: bool
) -> tuple[Pair, ...]:
    """The pairs of a flattened tree, sorted by path; raises ValueError where that is not clear."""
    layout = FLAX if layout is None else layout
    found = _by_name(paths, layout)
    pairs = [_make_pair(_path_of(name), index, leaves, layout) for name, index in found.items()]
    for i in sorted(factor_indices(pairs)):
        check_leaves(paths[i : i + 1], leaves[i : i + 1])
        dtype, shape = leaves[i].dtype, tuple(leaves[i].shape)
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2 or 0 in shape:
            raise ValueError(
                f"{paths[i]} is a LoRA factor of dtype {dtype} and shape {shape}; LoRA-Pro trains "
                "bfloat16, float16, float32 and float64 without empty axes"
            )
    if require_pairs and leaves:
        if not pairs:
            raise ValueError(
                f"none of {len(leaves)} leaves is a LoRA factor (such as {paths[0]}): no path "
                f"matches {layout.a!r} or {layout.b!r}. Pass layout=..., or require_pairs=False"
            )
        check_matches("layout.dims", layout.dims, [pair.path for pair in pairs])
    return tuple(sorted(pairs))


def _canonical(x: Array, axes: Axes) -> Array:
    """`x` in canonical order, gathered along its rank axis: (r, r) matrices are on every device."""
    x = placed(x, [None if i == axes.rank else entry for i, entry in enumerate(spec_of(x))])
    return x.transpose(axes.order)


def read(pair: Pair, leaves: Sequence[Array], *, gradients: bool = False) -> tuple[Array, Array]:
    """A pair of factors or of steps, or of `gradients`, as a (*batch, *m, r) and b (*batch, r, *n).

    Along a summed axis factors and steps add up; every slice has the gradient of the sum.
    """
    a, b = _canonical(leaves[pair.a], pair.a_axes), _canonical(leaves[pair.b], pair.b_axes)
    first, summed = len(pair.b_axes.batch), len(pair.b_axes.summed)
    if summed:
        b = (jnp.mean if gradients else jnp.sum)(b, axis=range(first, first + summed))
    # one batch for both: where the factors' batch axes are sharded differently, as that of a
    return a, placed(b, joined(spec_of(a)[:first], spec_of(b)[first:]))


def write(pair: Pair, a: Array, b: Array, leaves: list[Any]) -> None:
    """Puts canonical factors or steps back, in the axes and dtype of the leaves that stand there.

    Along a summed axis each slice gets an equal share, the change of least norm.
    """
    first, slices = len(pair.b_axes.batch), [leaves[pair.b].shape[i] for i in pair.b_axes.summed]
    if slices:
        share = jnp.expand_dims(b / math.prod(slices), range(first, first + len(slices)))
        b = jnp.broadcast_to(share, [*b.shape[:first], *slices, *b.shape[first:]])
    for x, i, axes in ((a, pair.a, pair.a_axes), (b, pair.b, pair.b_axes)):
        back = [axes.order.index(axis) for axis in range(x.ndim)]
        leaves[i] = placed(jnp.transpose(x, back).astype(leaves[i].dtype), spec_of(leaves[i]))


def factor_specs(pair: Pair, a_spec: Sequence[Any], b_spec: Sequence[Any]) -> tuple[tuple, tuple]:
    """How (*batch, *m, r), (*batch, r, *n) are sharded where the leaves are sharded so."""
    batch = [a_spec[i] for i in pair.a_axes.batch] or [None]  # (pairs,), if there is no batch
    rows, columns = [a_spec[i] for i in pair.a_axes.others], [b_spec[i] for i in pair.b_axes.others]
    return joined(batch, rows, [None]), joined(batch, [None], columns)


def kernel_spec(pair: Pair, a_spec: Sequence[Any], b_spec: Sequence[Any]) -> tuple[Any, ...]:
    """How (*batch, *m, *n) is sharded. A mesh axis that shards rows and columns shards the rows."""
    a, b = factor_specs(pair, a_spec, b_spec)
    return joined(a[:-1], b[len(b) - len(pair.b_axes.others) :])


def factor_indices(pairs: Iterable[Pair]) -> frozenset[int]:
    """Indices of all leaves that belong to a pair."""
    return frozenset(index for pair in pairs for index in (pair.a, pair.b))
