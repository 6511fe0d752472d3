"""Pairs alike as one batch, so that a program grows with the kinds of pairs, not with the layers.

A group is one pair with batch axes (layers of a scan, heads, experts), or all separate pairs whose
paths differ in their numbers only and whose shapes and dtypes agree. Those are sharded alike. Pairs
of equal shape need not be: stacking a column-parallel and a row-parallel factor would move one of
them between devices.
"""

import itertools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lorapro_jax._layouts import Pair, factor_specs, read, write
from lorapro_jax._paths import scale_at
from lorapro_jax._sharding import explicit, placed, spec_of

Scale = float | Array | Callable[[str], float]


class Group(NamedTuple):
    """Pairs that are one batch: their own batch axes, the first of them joined for all pairs."""

    pairs: tuple[Pair, ...]
    batch: tuple[int, ...]  # (pairs,), or the pairs' own, the first of all pairs together
    m: tuple[int, ...]
    n: tuple[int, ...]
    dtype: Any  # the factors', float32 or better

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a (*batch, *m, r) and of b (*batch, r, *n)."""
        r = self.pairs[0].rank
        return (*self.batch, *self.m, r), (*self.batch, r, *self.n)

    @property
    def stacked(self) -> bool:
        """Whether the pairs have no batch axes of their own."""
        return not self.pairs[0].a_axes.batch


def groups(pairs: Sequence[Pair], params: Sequence[Any]) -> dict[str, Group]:
    """All groups, named by the pattern of their paths: `encoder/layers/*/query`.

    Where one pattern covers several shapes, the name goes on with the shape.
    """
    alike: dict[Any, list[Pair]] = {}
    for pair in pairs:
        pattern = pair.path if pair.a_axes.batch else re.sub(r"\d+", "*", pair.path)
        alike.setdefault((pattern, pair.rank, *_kernel(pair, params)), []).append(pair)
    patterns = [pattern for pattern, *_ in alike]
    found = {}
    for (pattern, rank, batch, m, n, dtype), members in alike.items():
        shape = "x".join(map(str, (*m, rank, *n)))
        name = pattern if patterns.count(pattern) == 1 else f"{pattern} {shape} {dtype}"
        found[name] = Group(tuple(members), batch or (len(members),), m, n, dtype)
    return found


def _kernel(pair: Pair, params: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes of the batch axes, of m and of n, and the dtype."""
    a, b = params[pair.a], params[pair.b]
    batch = tuple(a.shape[i] for i in pair.a_axes.batch)
    m = tuple(a.shape[i] for i in pair.a_axes.others)
    n = tuple(b.shape[i] for i in pair.b_axes.others)
    dtypes = (jnp.dtype(dtype) for dtype in (a.dtype, b.dtype, jnp.float32))
    return batch, m, n, max(dtypes, key=lambda dtype: dtype.itemsize)


def joined(groups: Sequence[Group]) -> Group:
    """Groups of one kind as one."""
    first, pairs = groups[0], tuple(pair for group in groups for pair in group.pairs)
    return first._replace(pairs=pairs, batch=(sum(g.batch[0] for g in groups), *first.batch[1:]))


def stack(group: Group, *trees: Sequence[Array], gradients: bool = False) -> list[Any]:
    """(a, b) of the group for each flattened tree, in the group's dtype.

    All trees hold factors or steps, but for the last if that has `gradients`. What belongs to one
    pair is put side by side first: a copy for each pair, not one for each tree.
    """
    read_as = [gradients and tree is trees[-1] for tree in trees]
    both = []
    for side in (0, 1):
        rows = []
        for pair in group.pairs:
            row = [read(pair, t, gradients=g)[side] for t, g in zip(trees, read_as, strict=True)]
            row = [placed(x, spec_of(row[0])).astype(group.dtype) for x in row]
            rows.append([x[None] for x in row] if group.stacked else row)
        if len(rows) == 1:
            both.append(rows[0])
            continue
        joined = join([jnp.stack(row, axis=1) for row in rows])
        both.append([joined[:, i] for i in range(len(trees))])
    return list(zip(*both, strict=True))


def join(arrays: Sequence[Array]) -> Array:
    """Arrays along their first axis, sharded as the first of them."""
    if len(arrays) == 1:
        return arrays[0]
    return jnp.concatenate([placed(x, spec_of(arrays[0])) for x in arrays])


def split(tree: Any, sizes: Sequence[int]) -> list[Any]:
    """One tree for each of the sizes that `join` joined."""
    ends = itertools.accumulate(sizes)
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    each = [jax.tree.map(operator.itemgetter(part), tree) for part in parts]
    return each if len(each) > 1 else [tree]


def unstack(group: Group, tree: Any) -> list[Any]:
    """One tree for each pair of the group."""
    parts = split(tree, [group.batch[0] // len(group.pairs)] * len(group.pairs))
    return [jax.tree.map(lambda x: x[0], part) for part in parts] if group.stacked else parts


def write_steps(group: Group, step: tuple[Array, Array], leaves: list[Any]) -> None:
    """Puts the (da, db) of a group in the place of its pairs' leaves, in their axes and dtype."""
    for pair, (da, db) in zip(group.pairs, unstack(group, step), strict=True):
        write(pair, da, db, leaves)


def scale_of(group: Group, scale: Scale, like: Array) -> Array:
    """The s of each pair, (*batch,), sharded as the batch axes of `like` are."""
    numbers: Any = scale
    if callable(scale):
        numbers = jnp.asarray([scale_at(scale, pair.path) for pair in group.pairs])
        numbers = jnp.repeat(numbers, group.batch[0] // len(group.pairs))
        numbers = numbers.reshape(-1, *(1 for _ in group.batch[1:]))
    s = jnp.asarray(numbers, group.dtype)
    sharding = explicit(like, spec_of(like)[: len(group.batch)])
    return jnp.broadcast_to(s, group.batch, out_sharding=sharding)


def factor_zeros(group: Group, leaves: Sequence[Any], dtype: Any = None) -> tuple[Array, Array]:
    """Zeros of a group's (*batch, *m, r) and (*batch, r, *n), sharded as the factors are.

    In `dtype`, or the group's. The leaves may be jax.ShapeDtypeStructs.
    """
    pair = group.pairs[0]
    a, b = leaves[pair.a], leaves[pair.b]
    specs = factor_specs(pair, spec_of(a), spec_of(b))
    zero_a, zero_b = (
        jnp.zeros(shape, dtype or group.dtype, out_sharding=explicit(a, spec))
        for shape, spec in zip(group.shapes, specs, strict=True)
    )
    return zero_a, zero_b


def over_batch(f: Callable, axes: int, in_axes: Any = 0) -> Callable:
    """`f` of one pair, for a batch of so many axes."""
    for _ in range(axes):
        f = jax.vmap(f, in_axes)
    return f
