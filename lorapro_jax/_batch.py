"""Every pair of a tree at once: the (r, r) work of all pairs of one rank as a few batches.

What is large stays pair by pair: a Gram or a thin product touches each number of a factor once,
needs nothing from other pairs, and keeps whatever sharding the factor has. What is small is
stacked. Stacking the factors themselves was measured first: it copies them twice, and XLA
compiles one kernel for each slice that takes an update out of the stack again.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lorapro_jax import _solve
from lorapro_jax._checks import check_scale
from lorapro_jax._layouts import Pair, flatten, read
from lorapro_jax._solve import Spectrum

# Pairs per batch. XLA compiles one kernel per slice of a batch and shares it between batches
# of one size, so that compile time stops growing at this many pairs; an accelerator's batched
# eigendecomposition is saturated by then (two matrices a pair, times the layers of a scan).
_PAIRS_PER_BATCH = 32


class Problem(NamedTuple):
    """One pair's factors and factor gradients, (batch, *m, r) and (batch, r, *n), widened."""

    a: Array
    b: Array
    h_a: Array
    h_b: Array
    s: Array


Scale = float | Array | Callable[[str], float]


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


def problems(
    pairs: Sequence[Pair], params: Sequence[Array], gradients: Sequence[Array], scale: Scale
) -> list[Problem]:
    """The pairs of two flattened trees in canonical form, in float32 or better."""
    result = []
    for pair in pairs:
        s = scale(pair.path) if callable(scale) else scale
        check_scale(s, f"{pair.path}: scale")
        a, b, h_a, h_b = map(_solve.widen, (*read(pair, params), *read(pair, gradients)))
        dtype = jnp.result_type(a, b, h_a, h_b)
        a, b, h_a, h_b = (x.astype(dtype) for x in (a, b, h_a, h_b))
        result.append(Problem(a, b, h_a, h_b, jnp.asarray(s, dtype)))
    return result


def chunks(problems: Sequence[Problem]) -> list[list[int]]:
    """Indices of problems whose (r, r) work runs as one batch: same rank, dtype and batch size."""
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(problems):
        alike.setdefault((p.a.shape[-1], p.a.dtype, p.a.shape[0]), []).append(i)
    size = _PAIRS_PER_BATCH
    return [group[k : k + size] for group in alike.values() for k in range(0, len(group), size)]


def _stack(columns: Sequence[Array]) -> Array:
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns)


def _unstack(tree: Any, sizes: Sequence[int]) -> list[Any]:
    starts = itertools.accumulate(sizes, initial=0)
    return [
        jax.tree.map(
            functools.partial(jax.lax.slice_in_dim, start_index=i, limit_index=i + n), tree
        )
        for i, n in zip(starts, sizes, strict=False)
    ]


def spectra(problems: Sequence[Problem], damping: Array | float) -> Spectrum:
    """The spectra of one chunk, stacked."""
    P, Q = zip(*(jax.vmap(_solve.grams)(p.a, p.b) for p in problems), strict=True)
    damping = jnp.asarray(damping, P[0].dtype)
    return jax.vmap(_solve.spectrum, (0, 0, None))(_stack(P), _stack(Q), damping)


def steps(problems: Sequence[Problem], spec: Spectrum, x: str) -> list[tuple[Array, Array]]:
    """(da, db) of every problem of one chunk."""
    cores = [jax.vmap(_solve.shared_core)(p.a, p.b, p.h_a, p.h_b) for p in problems]
    sizes = [core.shape[0] for core in cores]
    s = _stack([jnp.broadcast_to(p.s, n) for p, n in zip(problems, sizes, strict=True)])
    solve = functools.partial(_solve.coefficients, x=x)
    stacked = jax.vmap(solve)(spec, _stack(cores), s)
    return [
        jax.vmap(_solve.combine)(p.a, p.b, p.h_a, p.h_b, c)
        for p, c in zip(problems, _unstack(stacked, sizes), strict=True)
    ]


def all_steps(
    problems: Sequence[Problem], damping: Array | float, x: str = "sylvester"
) -> list[tuple[Array, Array]]:
    """(da, db) of every problem, in their order."""
    found: dict[int, tuple[Array, Array]] = {}
    for chunk in chunks(problems):
        members = [problems[i] for i in chunk]
        found.update(zip(chunk, steps(members, spectra(members, damping), x), strict=True))
    return [found[i] for i in range(len(problems))]
