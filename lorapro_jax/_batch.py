"""Pairs of one shape as one batch, so that a program grows with the shapes and not with the layers.

A batch holds the pairs of one kind: layers of a scan, heads, and separate layers whose paths differ
in their numbers only. Those are sharded alike, which pairs of one shape need not be: stacking a
column-parallel and a row-parallel factor would move one of them between devices.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lorapro_jax import _solve
from lorapro_jax._checks import check_scale
from lorapro_jax._layouts import Pair, flatten, read, read_gradients
from lorapro_jax._solve import Spectrum

# Pairs of a group. XLA compiles one kernel for each place in a batch that an update is taken from,
# and shares it between batches of one size. On 2 CPU cores 4 to 24 run within 10 % of one another;
# the Grams of 8 pairs of rank 8 go through one LAPACK call.
_PAIRS_PER_GROUP = 8

Scale = float | Array | Callable[[str], float]


class Problem(NamedTuple):
    """The factors and factor gradients of a batch of pairs, widened."""

    a: Array  # (batch, *m, r)
    b: Array  # (batch, r, *n)
    h_a: Array
    h_b: Array
    s: Array  # (batch,)


class Group(NamedTuple):
    """Pairs that are solved as one batch, one behind the other."""

    pairs: tuple[Pair, ...]
    sizes: tuple[int, ...]  # entries of each pair: 1, or the product of its batch axes
    m: tuple[int, ...]
    n: tuple[int, ...]
    dtype: Any  # the factors', float32 or better


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
    """Pairs of one kind, shape and dtype, by the path of the first of up to 8."""
    alike: dict[Any, list[Pair]] = {}
    for pair in pairs:
        kind = re.sub(r"\d+", "*", pair.path)
        alike.setdefault((kind, pair.rank, *_kernel(pair, params)), []).append(pair)
    cut = _PAIRS_PER_GROUP
    result = {}
    for (*_, m, n, dtype), members in alike.items():
        for k in range(0, len(members), cut):
            chosen = tuple(members[k : k + cut])
            sizes = tuple(
                math.prod(params[pair.a].shape[i] for i in pair.a_axes.batch) for pair in chosen
            )
            result[chosen[0].path] = Group(chosen, sizes, m, n, dtype)
    return result


def _kernel(pair: Pair, params: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...], Any]:
    a, b = params[pair.a], params[pair.b]
    m = tuple(a.shape[i] for i in pair.a_axes.others)
    n = tuple(b.shape[i] for i in pair.b_axes.others)
    return m, n, jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)


def problem(
    group: Group, params: Sequence[Array], gradients: Sequence[Array], scale: Scale
) -> Problem:
    """The pairs of a group of two flattened trees, in float32 or better."""
    scales = []
    for pair, size in zip(group.pairs, group.sizes, strict=True):
        s = scale(pair.path) if callable(scale) else scale
        check_scale(s, f"{pair.path}: scale")
        scales.append(jnp.broadcast_to(jnp.asarray(s), size))
    slopes = stacked(group, gradients, read_gradients)
    wide = [_solve.widen(x) for x in (*stacked(group, params), *slopes)]
    dtype = jnp.result_type(*wide)
    return Problem(*(x.astype(dtype) for x in (*wide, _stack(scales))))


def stacked(group: Group, leaves: Sequence[Array], reader: Callable = read) -> list[Array]:
    """The group's factors or steps (or gradients, with that reader), one behind the other."""
    columns = zip(*(reader(pair, leaves) for pair in group.pairs), strict=True)
    return [_stack(column) for column in columns]


def _stack(columns: Sequence[Array]) -> Array:
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns)


def unstacked(tree: Any, group: Group) -> list[Any]:
    """One tree for each pair of the group, cut from the arrays' first axis."""
    stops = list(itertools.accumulate(group.sizes))[:-1]
    leaves, treedef = jax.tree.flatten(tree)
    columns = zip(*(jnp.split(leaf, stops) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(treedef, column) for column in columns]


def first_steps(
    p: Problem, damping: Array | float, x: str = "sylvester"
) -> tuple[Spectrum, tuple[Array, Array]]:
    """The spectra of a batch and its (da, db)."""
    P, Q = jax.vmap(_solve.grams)(p.a, p.b)
    spec = jax.vmap(_solve.spectrum, (0, 0, None))(P, Q, jnp.asarray(damping, P.dtype))
    return spec, steps(p, spec, x)


def steps(p: Problem, spec: Spectrum, x: str) -> tuple[Array, Array]:
    """(da, db) of a batch whose spectra are known."""
    core = jax.vmap(_solve.shared_core)(p.b, p.h_b)
    found = jax.vmap(functools.partial(_solve.coefficients, x=x))(spec, core, p.s)
    return jax.vmap(_solve.combine)(p.a, p.b, p.h_a, p.h_b, found)
