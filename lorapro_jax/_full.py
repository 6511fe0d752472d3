"""Full mode: Adam's moments of the equivalent gradient, two (m, n) arrays a pair (Algorithm 2)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lorapro_jax import _solve
from lorapro_jax._batch import Problem, Scale, aligned, chunks, problems, spectra, steps
from lorapro_jax._layouts import Pair, check_leaves, factor_indices, flatten, write


class FullState(NamedTuple):
    """State of full mode. The moments are those of g~, keyed by the pair's path."""

    count: Int[Array, ""]  # steps taken
    mu: Any  # {path: (*m, *n), batch axis first if there is one}, float32 or mu_dtype
    nu: Any  # the same in float32 or better
    rest: Any  # plain Adam's state for the leaves in no pair


def full_mode(
    projection: optax.GradientTransformationExtraArgs,
    adam: optax.GradientTransformation,
    find: Callable[[list[str], list[Any]], tuple[Pair, ...]],
    scale: Scale,
    betas: tuple[Any, Any, Any],
    mu_dtype: Any,
    x: str,
    damping: float | Array,
) -> optax.GradientTransformationExtraArgs:
    """Algorithm 2: `find` tells the pairs, `adam` takes the other leaves."""
    b1, b2, eps = betas

    def pairs_of(tree):
        paths, leaves, treedef = flatten(tree)
        return paths, leaves, treedef, find(paths, leaves)

    def in_no_pair(tree):
        _, leaves, treedef, pairs = pairs_of(tree)
        inside = factor_indices(pairs)
        return jax.tree.unflatten(treedef, [i not in inside for i in range(len(leaves))])

    rest = optax.masked(adam, in_no_pair)

    def init(params):
        projection.init(params)
        _, leaves, _, pairs = pairs_of(params)
        count = jnp.zeros((), jnp.int32)
        if not leaves:  # optax.tree.map_params' placeholder: here a leaf stands for any subtree
            return FullState(count, count, count, rest.init(params))
        mu = {pair.path: _zero_moment(pair, leaves, mu_dtype) for pair in pairs}
        nu = {pair.path: _zero_moment(pair, leaves, None) for pair in pairs}
        return FullState(count, mu, nu, rest.init(params))

    def adam_direction(p: Problem, da, db, mu, nu, count):
        """One pair's new moments, and the factor gradients that Adam's direction would cause."""
        g = jax.vmap(_solve.equivalent_gradient, (0, 0, 0, 0, None))(p.a, p.b, da, db, p.s)
        mu = _average(g, mu, b1)
        nu = _average(g * g, nu, b2)
        correction_1, correction_2 = (jnp.asarray(1 - b**count, g.dtype) for b in (b1, b2))
        U = (mu.astype(g.dtype) / correction_1) / (jnp.sqrt(nu / correction_2) + eps)
        return mu, nu, *jax.vmap(_solve.project, (0, 0, 0, None))(p.a, p.b, U, p.s)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        paths, leaves, treedef, pairs = pairs_of(updates)
        if not leaves:  # a part of optax.partition that got nothing
            return updates, state
        check_leaves(paths, leaves)
        ps = problems(pairs, aligned(paths, leaves, params), leaves, scale)
        others, rest_state = rest.update(updates, state.rest)
        new = jax.tree.leaves(others)
        count = jnp.asarray(optax.safe_increment(state.count))
        mu, nu, done = {}, {}, ()
        for chunk in chunks(ps):
            members = [ps[i] for i in chunk]
            spec = spectra(members, damping)
            for k, (da, db) in enumerate(steps(members, spec, x)):
                path, p = pairs[chunk[k]].path, members[k]
                p = p._replace(s=_after(p.s, done)) if done else p
                moments = (_batched(state.mu[path], p), _batched(state.nu[path], p))
                m, v, h_a, h_b = adam_direction(p, da, db, *moments, count)
                mu[path], nu[path] = (y.reshape(state.mu[path].shape) for y in (m, v))
                members[k], done = p._replace(h_a=h_a, h_b=h_b), (h_a, h_b)
            for i, (da, db) in zip(chunk, steps(members, spec, x), strict=True):
                write(pairs[i], da, db, new)
        return jax.tree.unflatten(treedef, new), FullState(count, mu, nu, rest_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _after(x: Array, done: tuple[Array, ...]) -> Array:
    """`x`, at the time when all of `done` are computed.

    One pair after the other keeps a pair's (m, n) intermediates in the cache and frees them before
    the next pair's: on 2 CPU cores half the time and a fifteenth of the temporary memory. The CPU
    compiler drops optimization barriers before it schedules, so there the dependency is a zero that
    it does not fold: a sign bit, shifted out. Integers, so that one pair's NaN stays its own.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.optimization_barrier((x, done))[0]
    token = functools.reduce(jnp.add, (y[(0,) * y.ndim] for y in done))
    bits = jnp.finfo(token.dtype).bits
    pattern = jax.lax.bitcast_convert_type(token, f"uint{bits}")
    one = jnp.ones((), pattern.dtype)
    sign = jax.lax.shift_right_logical(pattern, (bits - 1) * one)
    return x + jax.lax.shift_right_logical(sign, one).astype(x.dtype)


def _average(g: Array, moment: Array, decay: float | Array) -> Array:
    return (decay * moment + (1 - decay) * g).astype(moment.dtype)


def _zero_moment(pair: Pair, leaves: list[Any], dtype: Any) -> Array:
    """Zeros of the pair's kernel, (*batch, *m, *n), in `dtype` or float32 and better."""
    a, b = leaves[pair.a], leaves[pair.b]
    batch = [a.shape[i] for i in pair.a_axes.batch]
    m, n = [a.shape[i] for i in pair.a_axes.others], [b.shape[i] for i in pair.b_axes.others]
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return jnp.zeros((*batch, *m, *n), wide if dtype is None else dtype)


def _batched(moment: Array, p: Problem) -> Array:
    """A moment with exactly one batch axis in front, as `p` has."""
    return moment.reshape(p.a.shape[:-1] + p.b.shape[2:])
