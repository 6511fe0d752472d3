"""Full mode: Adam's moments of the equivalent gradient, two (m, n) arrays a pair (Algorithm 2).

A group of pairs has its moments in one array, one behind the other, and a loop takes them in turn:
what is dense beside them exists for one pair at a time. A pair with batch axes is looped over the
first of them (scanned layers), unless the type of its factors says that this axis is sharded.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from lorapro_jax import _solve
from lorapro_jax._batch import Adam, Group, Problem, first_steps, over_batch, steps
from lorapro_jax._closed_form import ClosedForm
from lorapro_jax._layouts import kernel_spec
from lorapro_jax._pairwise import Rule
from lorapro_jax._sharding import explicit, spec_of


class FullState(NamedTuple):
    """State of full mode. The moments are those of g~, by groups of pairs of one kind and shape.

    A group is named by the path of its first pair and holds up to 8, in the order of their paths,
    which differ in their numbers only. A pair with batch axes is a group of its own and has these
    axes in front.
    """

    count: Int[Array, ""]  # steps taken
    mu: Any  # {group: (pairs or *batch, *m, *n)}, float32 or mu_dtype
    nu: Any  # the same in float32 or better
    rest: Any  # plain Adam's state for the leaves in no pair


def full_rule(adam: Adam, form: ClosedForm) -> Rule:
    """The rule of full mode."""

    def init(group: Group, leaves: Sequence[Any]) -> tuple[Array, Array]:
        moment = functools.partial(_zero_moment, group, leaves)
        return moment(adam.mu_dtype), moment(None)

    def update(p: Problem, group: Group, moments: tuple, count: Array):
        known, (da, db) = first_steps(p, group, form)
        mu, nu, h_a, h_b = _adam(p, group, (da, db), moments, count, adam)
        return steps(p._replace(h_a=h_a, h_b=h_b), group, known, form), (mu, nu)

    return Rule(FullState, init, update)


def _zero_moment(group: Group, leaves: Sequence[Any], dtype: Any) -> Array:
    """Zeros of the group's kernels in `dtype` or float32 and better, sharded as they would be."""
    shape = *group.batch, *group.m, *group.n
    pair = group.pairs[0]
    a, b = leaves[pair.a], leaves[pair.b]
    sharding = explicit(a, kernel_spec(pair, spec_of(a), spec_of(b)))
    return jnp.zeros(shape, group.dtype if dtype is None else dtype, out_sharding=sharding)


def _adam(
    p: Problem,
    group: Group,
    taken: tuple[Array, Array],
    moments: tuple[Any, ...],
    count: Array,
    adam: Adam,
) -> tuple[Array, Array, Array, Array]:
    """A group's new moments, and the factor gradients that Adam's direction would cause."""
    b1, b2, eps, _ = adam
    correction_1, correction_2 = (jnp.asarray(1 - decay**count, p.a.dtype) for decay in (b1, b2))
    project, equivalent = (
        over_batch(f, group) for f in (_solve.project, _solve.equivalent_gradient)
    )

    def some(at, put, carry):
        # XLA's CPU backend updates a moment where it lies, in one pass, if it is read at the very
        # index where it is written, with no reshape between, and read back for the direction.
        # Otherwise it copies the whole group's for every pair.
        mu, nu, da, db = carry
        a, b, s = at(p.a), at(p.b), at(p.s)
        g = equivalent(a, b, at(da), at(db), s, at(mu))
        mu = put(mu, _average(g, at(mu), b1))
        nu = put(nu, _average(g * g, at(nu), b2))
        m = at(mu).astype(g.dtype) / correction_1
        U = m / (jnp.sqrt(at(nu) / correction_2) + eps)
        h_a, h_b = project(a, b, U, s)
        return mu, nu, put(da, h_a), put(db, h_b)

    def one(i, carry):
        at = functools.partial(lax.dynamic_slice_in_dim, start_index=i, slice_size=1)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i, axis=0)
        return some(at, put, carry)

    # A pair's (da, db) are not needed once its g~ is formed: h_a and h_b take their place.
    carry = *moments, *taken
    if spec_of(p.a)[0] is not None:  # each device has its own part of the batch
        return some(lambda x: x, lambda old, new: new, carry)
    return lax.fori_loop(0, group.batch[0], one, carry)


def _average(g: Array, moment: Array, decay: float | Array) -> Array:
    return (decay * moment + (1 - decay) * g).astype(moment.dtype)
