"""Which leaves of a parameter tree form a LoRA pair, and which of their axes are m, r and n."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lorapro_jax._paths import no_match_error, path_str
from lorapro_jax._sharding import joined, placed, spec_of


@dataclasses.dataclass(frozen=True)
class LoRADimensionNumbers:
    """Which axes of a pair's two leaves are the rank and the batch; the rest are m and n.

    Per batch index the pair is K = K0 + s a b: every axis of `a` that is neither rank nor batch
    is flattened into the rows m, every such axis of `b` into the columns n. Axes may be
    negative. As for `jax.lax.ConvDimensionNumbers`, nothing is inferred from sizes.

    Args:
      a_rank: the rank axis of `a`; None for the last axis that is not a batch axis.
      b_rank: the rank axis of `b`; None for the first axis that is not a batch axis.
      a_batch: axes of `a` over which pairs are independent (scanned layers, heads, experts).
      b_batch: the axes of `b` that match them, in the same order.
      b_sum: axes of `b` that the forward pass sums over before it meets the rank: the product is
        a (sum of b over them). Each slice gets an equal share of the step.

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
    del path
    return LoRADimensionNumbers() if 2 in (a_ndim, b_ndim) else None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to find pairs by path, and the axes of those that are not plain matrices.

    Args:
      a: regex that matches the whole path of a first factor; its group `pair` names the pair.
      b: the same for the second factor; two leaves with the same `pair` belong together.
      dims: {regex of the pair's path: LoRADimensionNumbers}. What `infer` cannot tell must be
        declared here.
      infer: (path, axes of a, axes of b) -> LoRADimensionNumbers, or None where they could be
        more than one thing. By default a pair needs no declaration if one leaf is a matrix,
        (m, r) or (r, n): then no axis of the other is a batch axis.

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

    def role(self, path: str) -> tuple[str, str] | None:
        """("a" or "b", the pair's raw name) of a leaf, or None where it is no factor."""
        for role, pattern in (("a", self.a), ("b", self.b)):
            if match := re.fullmatch(pattern, path):
                return role, match["pair"]
        return None


# One node with leaves lora_a and lora_b (flax.nnx.LoRA, lorapro_jax), or siblings of the
# kernel named <kernel>_lora_a and <kernel>_lora_b.
FLAX = Layout(a=r"(?P<pair>(.*[/_])?)lora_a", b=r"(?P<pair>(.*[/_])?)lora_b")


_SEPARATORS = "/_."  # between the name of a pair and the role of a leaf


class Axes(NamedTuple):
    """One leaf's axes in canonical order: batch, the summed ones, then the rank and the others."""

    batch: tuple[int, ...]
    rank: int
    others: tuple[int, ...]
    summed: tuple[int, ...] = ()


class Pair(NamedTuple):
    """One pair: its path, where its leaves stand in the flattened tree, how their axes lie."""

    path: str
    a: int
    b: int
    a_axes: Axes
    b_axes: Axes
    rank: int


def flatten(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[str], list[Any], Any]:
    """Normalised paths, leaves and treedef."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return [path_str(path) for path, _ in leaves], [leaf for _, leaf in leaves], treedef


def check_trainable(path: str, leaf: Any) -> None:
    """Raises ValueError for a leaf without a gradient: integers, booleans, float0."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    float0 = dtype == jax.dtypes.float0
    if float0 or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"{path} has dtype {'float0' if float0 else dtype}, which cannot be trained; take it "
            "out of the tree before jax.grad (lora, base = lp.split(params)), or freeze it with "
            "lp.freeze_base"
        )


def _check_factor(path: str, leaf: Any) -> None:
    """Raises ValueError for a factor whose step is not defined, or not in its dtype."""
    check_trainable(path, leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize < 2:
        raise ValueError(
            f"{path} is a LoRA factor of dtype {leaf.dtype}; LoRA-Pro trains bfloat16, float16, "
            "float32 and float64: cast it"
        )
    if 0 in leaf.shape:
        raise ValueError(f"{path} is a LoRA factor of shape {tuple(leaf.shape)}: an axis is empty")


def check_leaves(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """`check_trainable` for every leaf."""
    for path, leaf in zip(paths, leaves, strict=True):
        check_trainable(path, leaf)


def _axes(
    path: str,
    name: str,
    ndim: int,
    rank: int | None,
    batch: tuple[int, ...],
    summed: tuple[int, ...] = (),
) -> Axes:
    """The declared axes of one leaf, non-negative and complete."""

    def normal(axis: int) -> int:
        if not -ndim <= axis < ndim:
            raise ValueError(f"{path}: axis {axis} was declared for {name}, which has {ndim} axes")
        return axis % ndim

    batches, sums = (tuple(normal(axis) for axis in axes) for axes in (batch, summed))
    taken = batches + sums
    free = [axis for axis in range(ndim) if axis not in taken]
    if len(set(taken)) < len(taken) or not free:
        declared = f"batch axes {batch}" + (f" and summed axes {summed}" if summed else "")
        raise ValueError(f"{path}: {declared} of {name} ({ndim} axes) leave no rank axis")
    default = free[-1] if name == "a" else free[0]
    chosen = default if rank is None else normal(rank)
    if chosen in taken:
        other = "batch" if chosen in batches else "summed"
        raise ValueError(f"{path}: axis {rank} of {name} was declared both rank and {other}")
    return Axes(batches, chosen, tuple(axis for axis in free if axis != chosen), sums)


def _declared(path: str, a: Any, b: Any, layout: Layout) -> LoRADimensionNumbers:
    for pattern, dims in layout.dims.items():
        if re.fullmatch(pattern, path):
            return dims
    inferred = layout.infer(path, len(a.shape), len(b.shape))
    if inferred is not None:
        return inferred
    raise ValueError(
        f"{path} is ambiguous: a {tuple(a.shape)} and b {tuple(b.shape)} may be stacked layers, "
        "heads or experts, or one matrix with several axes. Declare it, for layers on axis 0: "
        f'layout=<yours, or lp.layouts.FLAX>.declare({{r"{re.escape(path)}": '
        "lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))}), for one matrix: "
        "lp.LoRADimensionNumbers()"
    )


def _make_pair(path: str, index: Mapping[str, int], leaves: Sequence[Any], layout: Layout) -> Pair:
    a, b = leaves[index["a"]], leaves[index["b"]]
    dims = _declared(path, a, b, layout)
    a_axes = _axes(path, "a", len(a.shape), dims.a_rank, dims.a_batch)
    b_axes = _axes(path, "b", len(b.shape), dims.b_rank, dims.b_batch, dims.b_sum)
    batch_a = [a.shape[axis] for axis in a_axes.batch]
    batch_b = [b.shape[axis] for axis in b_axes.batch]
    rank = a.shape[a_axes.rank]
    if rank != b.shape[b_axes.rank] or batch_a != batch_b:
        raise ValueError(
            f"{path}: a {tuple(a.shape)} has rank {rank} and batch {batch_a}, b {tuple(b.shape)} "
            f"has rank {b.shape[b_axes.rank]} and batch {batch_b}; they must agree. If the axes "
            "lie otherwise, declare them: layout=<yours, or lp.layouts.FLAX>.declare({...})"
        )
    return Pair(path, index["a"], index["b"], a_axes, b_axes, rank)


def _by_name(paths: Sequence[str], layout: Layout) -> dict[str, dict[str, int]]:
    """{pair: {"a": leaf index, "b": leaf index}}, complete or an error."""
    found: dict[str, dict[str, int]] = {}
    for i, path in enumerate(paths):
        if role := layout.role(path):
            factors = found.setdefault(role[1], {})
            if role[0] in factors:
                raise ValueError(
                    f"{paths[factors[role[0]]]} and {path} are both the {role[0]} of one pair; "
                    "pass a layout= whose group `pair` tells them apart"
                )
            factors[role[0]] = i
    for name, factors in found.items():
        if len(factors) == 1:
            (role, i), other = *factors.items(), "b" if "a" in factors else "a"
            where, leaf = name.rstrip(_SEPARATORS) or "the root", paths[i].rsplit("/", 1)[-1]
            raise ValueError(
                f"{where} has {leaf} ({role}) but no matching {other}; train and freeze both "
                "together, or pass layout=..."
            )
    return found


def find_pairs(
    paths: Sequence[str], leaves: Sequence[Any], layout: Layout | None, *, require_pairs: bool
) -> tuple[Pair, ...]:
    """The pairs of a flattened tree, sorted by path.

    Raises:
      ValueError: a factor without its partner, shapes that do not agree, axes that cannot be
        told from the shapes, a leaf that cannot be trained, a declaration that matches no pair,
        or no pair at all although the tree has leaves and `require_pairs` is set.
    """
    layout = FLAX if layout is None else layout
    found = _by_name(paths, layout)
    names = {name: name.rstrip(_SEPARATORS) or "lora" for name in found}
    if len(set(names.values())) < len(names):
        raise ValueError(f"two pairs share one path among {sorted(names)}; rename one of them")
    pairs = [_make_pair(names[name], index, leaves, layout) for name, index in found.items()]
    for pair in pairs:
        _check_factor(paths[pair.a], leaves[pair.a])
        _check_factor(paths[pair.b], leaves[pair.b])
    if require_pairs and leaves:
        if not pairs:
            raise ValueError(
                f"none of {len(leaves)} leaves is a LoRA factor (such as {paths[0]}): no path "
                f"matches {layout.a!r} or {layout.b!r}. Pass layout=..., or require_pairs=False"
            )
        for pattern in layout.dims:
            if not any(re.fullmatch(pattern, pair.path) for pair in pairs):
                raise no_match_error("layout.dims", pattern, [pair.path for pair in pairs])
    return tuple(sorted(pairs))


def _a_order(axes: Axes) -> tuple[int, ...]:
    return (*axes.batch, *axes.summed, *axes.others, axes.rank)


def _b_order(axes: Axes) -> tuple[int, ...]:
    return (*axes.batch, *axes.summed, axes.rank, *axes.others)


def read(pair: Pair, leaves: Sequence[Array], *, gradients: bool = False) -> tuple[Array, Array]:
    """A pair of factors or of steps, or of `gradients`, as a (*batch, *m, r) and b (*batch, r, *n).

    Along a summed axis factors and steps add up; every slice has the gradient of the sum.
    """
    a = _whole_rank(leaves[pair.a], pair.a_axes).transpose(_a_order(pair.a_axes))
    b = _whole_rank(leaves[pair.b], pair.b_axes).transpose(_b_order(pair.b_axes))
    first, last = len(pair.b_axes.batch), len(pair.b_axes.batch) + len(pair.b_axes.summed)
    if first < last:
        b = (jnp.mean if gradients else jnp.sum)(b, axis=range(first, last))
    # one batch for both: where the factors' batch axes are sharded differently, as that of a
    return a, placed(b, joined(spec_of(a)[:first], spec_of(b)[first:]))


def _whole_rank(x: Array, axes: Axes) -> Array:
    """`x`, gathered along its rank axis: (r, r) matrices are on every device."""
    return placed(x, [None if i == axes.rank else entry for i, entry in enumerate(spec_of(x))])


def write(pair: Pair, a: Array, b: Array, leaves: list[Any]) -> None:
    """Puts canonical factors or steps back, in the axes and dtype of the leaves that stand there.

    Along a summed axis each slice gets an equal share: of all ways to change the sum the one of
    least norm.
    """
    first, slices = len(pair.b_axes.batch), [leaves[pair.b].shape[i] for i in pair.b_axes.summed]
    if slices:
        share = jnp.expand_dims(b / math.prod(slices), range(first, first + len(slices)))
        b = jnp.broadcast_to(share, [*b.shape[:first], *slices, *b.shape[first:]])
    for x, i, order in ((a, pair.a, _a_order(pair.a_axes)), (b, pair.b, _b_order(pair.b_axes))):
        back = [order.index(axis) for axis in range(len(order))]
        x = jnp.transpose(x, back).astype(leaves[i].dtype)
        leaves[i] = placed(x, spec_of(leaves[i]))


def kernel_spec(pair: Pair, a_spec: Sequence[Any], b_spec: Sequence[Any]) -> tuple[Any, ...]:
    """How (*batch, *m, *n) is sharded where the leaves are sharded so; (pairs, ...) if no batch.

    A mesh axis that shards rows and columns shards the rows.
    """
    batch = [a_spec[i] for i in pair.a_axes.batch] or [None]
    rows = [a_spec[i] for i in pair.a_axes.others]
    return joined(batch, rows, [b_spec[i] for i in pair.b_axes.others])


def factor_specs(
    pair: Pair, a_spec: Sequence[Any], b_spec: Sequence[Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """How (*batch, *m, r) and (*batch, r, *n) are sharded where the leaves are sharded so."""
    batch = [a_spec[i] for i in pair.a_axes.batch] or [None]
    rows = [a_spec[i] for i in pair.a_axes.others]
    return joined(batch, rows, [None]), joined(
        batch, [None], [b_spec[i] for i in pair.b_axes.others]
    )


def factor_indices(pairs: Iterable[Pair]) -> frozenset[int]:
    """Indices of all leaves that belong to a pair."""
    return frozenset(index for pair in pairs for index in (pair.a, pair.b))
