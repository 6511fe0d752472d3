"""Pairs of one shape as one batch, so that a program grows with the shapes and not with the layers.

A batch is one pair with batch axes (layers of a scan, heads, experts), or separate pairs of one
kind, whose paths differ in their numbers only. Those are sharded alike, which pairs of one shape
need not be: stacking a column-parallel and a row-parallel factor would move one of them between
devices.
"""

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lorapro_jax import _cpu, _solve
from lorapro_jax._checks import check_scale
from lorapro_jax._closed_form import ClosedForm
from lorapro_jax._layouts import Pair, factor_specs, flatten, read, read_gradients, write
from lorapro_jax._orthogonal import Frames
from lorapro_jax._sharding import explicit, placed, spec_of
from lorapro_jax._solve import Spectrum

# Pairs of a group, at most: an update is compiled group by group, and an accelerator starts every
# kernel once a group. On 2 CPU cores 1,000 pairs of factored mode compile in 1.15 times the time in
# groups of up to 250, for LLVM takes longer than in proportion over the one copy that stacks a
# group, and in 1.6 times with 96 or 64, which make groups of two sizes. Its step of 144 pairs of
# one kind is a tenth slower in one group than in three, the other modes' is not; few models have
# more than 80 of a kind.
_PAIRS_PER_GROUP = 128

Scale = float | Array | Callable[[str], float]


class Problem(NamedTuple):
    """The factors and factor gradients of a batch of pairs, widened."""

    a: Array  # (*batch, *m, r)
    b: Array  # (*batch, r, *n)
    h_a: Array
    h_b: Array
    s: Array  # (*batch,)


class Adam(NamedTuple):
    """The numbers of Adam."""

    b1: Any
    b2: Any
    eps: Any
    mu_dtype: Any = None  # of the first moment; None: float32 or better


def average(new: Array, old: Array, decay: Any) -> Array:
    """One step of a moment's exponential average, in the moment's dtype."""
    return (decay * old + (1 - decay) * new).astype(old.dtype)


class Group(NamedTuple):
    """Pairs that are solved as one batch: one with batch axes of its own, or several without."""

    pairs: tuple[Pair, ...]
    batch: tuple[int, ...]  # sizes of the leading axes: (pairs,) where they are stacked
    m: tuple[int, ...]
    n: tuple[int, ...]
    dtype: Any  # the factors', float32 or better

    @property
    def stacked(self) -> bool:
        """Whether the leading axis was made by stacking pairs."""
        return not self.pairs[0].a_axes.batch

    @property
    def leaves(self) -> list[int]:
        """Where the factors stand in the flattened tree: a and b of each pair."""
        return [at for pair in self.pairs for at in (pair.a, pair.b)]


def aligned(paths: list[str], leaves: list[Any], params: Any) -> list[Any]:
    """The parameters of `paths`, by path: nnx passes another container than it got at init."""
    if params is None:
        raise ValueError(
            "LoRA-Pro needs the current factors: call update(updates, state, params) with params"
        )
    param_paths, param_leaves, _ = flatten(params)
    by_path = dict(zip(param_paths, param_leaves, strict=True))
    for path, leaf in zip(paths, leaves, strict=True):
        if path not in by_path or by_path[path].shape != leaf.shape:
            found = tuple(by_path[path].shape) if path in by_path else "no parameter"
            raise ValueError(
                f"{path}: the update has shape {tuple(leaf.shape)}, params have {found}; pass the "
                "params that the gradients were taken at"
            )
    return [by_path[path] for path in paths]


def groups(pairs: Sequence[Pair], params: Sequence[Any]) -> dict[str, Group]:
    """Pairs of one kind, shape and dtype, by the path of each group's first."""
    alike: dict[Any, list[Pair]] = {}
    for pair in pairs:
        kind = pair.path if pair.a_axes.batch else re.sub(r"\d+", "*", pair.path)
        alike.setdefault((kind, pair.rank, *_kernel(pair, params)), []).append(pair)
    result = {}
    for (*_, batch, m, n, dtype), members in alike.items():
        count = -(-len(members) // _PAIRS_PER_GROUP)
        size = -(-len(members) // count)  # of one size where it divides: compiled once
        for k in range(0, len(members), size):
            chosen = tuple(members[k : k + size])
            result[chosen[0].path] = Group(chosen, batch or (len(chosen),), m, n, dtype)
    return result


def _kernel(pair: Pair, params: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes of the batch axes, of m and of n, and the dtype."""
    a, b = params[pair.a], params[pair.b]
    batch = tuple(a.shape[i] for i in pair.a_axes.batch)
    m = tuple(a.shape[i] for i in pair.a_axes.others)
    n = tuple(b.shape[i] for i in pair.b_axes.others)
    return batch, m, n, jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)


def own(group: Group, *trees: Sequence[Any]) -> tuple[Group, list[list[Any]]]:
    """The group with its pairs numbered among its own leaves, and those of each flattened tree.

    Groups of pairs that lie alike are equal then: what is traced for one serves the others.
    """
    numbered = enumerate(group.pairs)
    pairs = tuple(pair._replace(path="", a=2 * i, b=2 * i + 1) for i, pair in numbered)
    return group._replace(pairs=pairs), [[tree[at] for at in group.leaves] for tree in trees]


def scale_of(group: Group, scale: Scale) -> Array:
    """The s of each pair, (pairs,), or () where it is one for all."""
    if not callable(scale):
        check_scale(scale)
        return jnp.asarray(scale)
    numbers = [scale(pair.path) for pair in group.pairs]
    for pair, s in zip(group.pairs, numbers, strict=True):
        check_scale(s, f"{pair.path}: scale")
    return jnp.asarray(numbers if group.stacked else numbers[0])


def problem(group: Group, params: Sequence[Array], gradients: Sequence[Array], s: Array) -> Problem:
    """The pairs of a group of two flattened trees, in float32 or better; s is its `scale_of`."""
    slopes = stacked(group, gradients, read_gradients)
    wide = [_solve.widen(x) for x in (*stacked(group, params), *slopes)]
    dtype = jnp.result_type(*wide)
    sharding = explicit(wide[0], spec_of(wide[0])[: len(group.batch)])
    s = jnp.broadcast_to(s, group.batch, out_sharding=sharding)
    return Problem(*(x.astype(dtype) for x in (*wide, s)))


def stacked(group: Group, leaves: Sequence[Array], reader: Callable = read) -> list[Array]:
    """The group's factors or steps (or gradients, with that reader) as two arrays."""
    columns = zip(*(reader(pair, leaves) for pair in group.pairs), strict=True)
    if not group.stacked:
        return [column[0] for column in columns]
    if _cpu.for_one_cpu(leaves[0]):
        return [_cpu.stack(column) for column in columns]
    return [jnp.stack([placed(x, spec_of(column[0])) for x in column]) for column in columns]


def factor_zeros(group: Group, leaves: Sequence[Any], dtype: Any = None) -> tuple[Array, Array]:
    """Zeros of a group's (*batch, *m, r) and (*batch, r, *n), sharded as the factors are.

    In `dtype`, or float32 and better. The leaves may be jax.ShapeDtypeStructs.
    """
    pair = group.pairs[0]
    a, b = leaves[pair.a], leaves[pair.b]
    specs = factor_specs(pair, spec_of(a), spec_of(b))
    shapes = (*group.batch, *group.m, pair.rank), (*group.batch, pair.rank, *group.n)
    dtype = group.dtype if dtype is None else dtype
    zero_a, zero_b = (
        jnp.zeros(shape, dtype, out_sharding=explicit(a, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    )
    return zero_a, zero_b


def places(
    by_name: dict[str, Group], leaves: Sequence[Array], *, figures: bool = False
) -> _cpu.Places | None:
    """`_cpu.places` in all groups' steps, by flattened gradients, or in figures of their pairs."""
    longest: dict[int, int] = {}
    for group in by_name.values():
        for rows in (1,) if figures else (group.m[0], group.pairs[0].rank):
            longest[rows] = max(longest.get(rows, 0), len(group.pairs))
    return _cpu.places(longest, a_factor(by_name, leaves))


def a_factor(by_name: dict[str, Group], leaves: Sequence[Array]) -> Array | None:
    """One factor's leaf: of floats, and not empty, as any other leaf may be. None if no pairs."""
    return next((leaves[group.pairs[0].a] for group in by_name.values()), None)


def unstacked(tree: Any, group: Group, at: _cpu.Places | None) -> list[Any]:
    """One tree for each pair of the group; `at` are the `places` of such trees."""
    if not group.stacked:
        return [tree]
    if at is None:
        return [jax.tree.map(operator.itemgetter(i), tree) for i in range(len(group.pairs))]
    leaves, treedef = jax.tree.flatten(tree)
    parts = zip(*(_cpu.unstack(x, at) for x in leaves), strict=True)
    return [jax.tree.unflatten(treedef, part) for part in parts]


def write_steps(
    step: tuple[Array, Array], group: Group, at: _cpu.Places | None, leaves: list[Any]
) -> None:
    """Puts the (da, db) of a group in the place of its pairs' leaves, in their axes and dtype."""
    for pair, (da, db) in zip(group.pairs, unstacked(step, group, at), strict=True):
        write(pair, da, db, leaves)


def over_batch(f: Callable, group: Group, in_axes: Any = 0) -> Callable:
    """`f` of one pair, for all of a group."""
    for _ in group.batch:
        f = jax.vmap(f, in_axes)
    return f


def first_steps(
    p: Problem, group: Group, form: ClosedForm
) -> tuple[Spectrum | Frames, tuple[Array, Array]]:
    """What the solves of a group share, and its (da, db)."""
    known = over_batch(form.decompose, group)(p.a, p.b)
    return known, steps(p, group, known, form)


def steps(
    p: Problem, group: Group, known: Spectrum | Frames, form: ClosedForm
) -> tuple[Array, Array]:
    """(da, db) of a group."""
    return over_batch(form.step, group)(known, *p)
