"""Factored mode: full mode's behaviour with LoRA-sized state, and no (m, n) array.

The moments are those of the equivalent gradient g~ = s (da b + a db):

    second   row means R and column means C of g~², as in Adafactor: v^ = R Cᵀ / mean(R)
    first    T = s (n_a b + a n_b), a tangent vector of the pairs of rank r

Full fine-tuning's step is U = T / sqrt(v^) = D_l T D_r, with diagonals D. The step taken is the
tangent vector nearest to U, which is full mode's with a v^ of rank 1.

When the factors move, T is projected onto the tangent space at the new ones. Every solve needs to
know T by (s T bᵀ, s aᵀ T) only, as it knows a gradient. So T is carried over in that form and
averaged with the gradients.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lorapro_jax._batch import Adam, Group, Problem, average, factor_zeros, over_batch
from lorapro_jax._closed_form import ClosedForm
from lorapro_jax._pairwise import Rule, each
from lorapro_jax._tangent import Tangent, mean_squares, of_step, seen


class FactoredState(NamedTuple):
    """State of factored mode, by groups of pairs as in `FullState`; float32 or better.

    `lorapro_adamw` knows the step that is taken and carries the momentum over at the end of it: it
    is (s T bᵀ, s aᵀ T) at the factors as they are now, and `a` and `b` are None. Otherwise it is
    (n_a, n_b) at the factors of the last step, which `a` and `b` are.
    """

    count: Int[Array, ""]  # steps taken
    mu_a: Any  # {group: (pairs or *batch, *m, r)}, the momentum's share of a
    mu_b: Any  # {group: (pairs or *batch, r, *n)}, and of b
    row: Any  # {group: (pairs or *batch, *m)}, row means of g~²
    col: Any  # {group: (pairs or *batch, *n)}, column means
    a: Any  # {group: (pairs or *batch, *m, r)}, or None
    b: Any  # {group: (pairs or *batch, r, *n)}, or None
    rest: Any  # plain Adam's state for the leaves in no pair


class Fields(NamedTuple):
    """What `FactoredState` has of one pair or group."""

    mu_a: Array
    mu_b: Array
    row: Array
    col: Array
    a: Array | None
    b: Array | None


def factored_rule(adam: Adam, form: ClosedForm, *, keeps_factors: bool) -> Rule:
    """The rule of factored mode; `keeps_factors` if it is not told the step that is taken."""

    def init(group: Group, leaves: Sequence[Any]) -> Fields:
        a, b = factor_zeros(group, leaves)  # the first momentum is zero wherever it is from
        row, col = jnp.sum(a, axis=-1), jnp.sum(b, axis=len(group.batch))
        mu = factor_zeros(group, leaves, adam.mu_dtype)
        return Fields(*mu, row, col, *((a, b) if keeps_factors else (None, None)))

    def one(p: Problem, group: Group, fields: tuple, count: Array):
        old = Fields(*fields)
        step = functools.partial(_step, adam=adam, form=form)
        direction, row, col, T = over_batch(step, group, (0, 0, None))(p, old, count)

        def new(a: Array, b: Array) -> Fields:
            if keeps_factors:
                return Fields(*stored((T.x, T.y)), row, col, p.a, p.b)
            mu = over_batch(seen, group)(T, a, b, p.s)[:2]
            return Fields(*stored(mu), row, col, None, None)

        return direction, new

    def stored(mu: tuple[Array, Array]) -> tuple[Array, Array]:
        dtype = adam.mu_dtype or mu[0].dtype
        return mu[0].astype(dtype), mu[1].astype(dtype)

    return Rule(FactoredState, init, each(one), in_turn=True)


def _step(
    p: Problem, old: Fields, count: Int[Array, ""], adam: Adam, form: ClosedForm
) -> tuple[tuple[Array, Array], Array, Array, Tangent]:
    """The direction of one pair, the new means, and T; by (n_a, n_b) where these are kept."""
    b1, b2, eps, _ = adam
    a, b, h_a, h_b, s = p
    known = form.decompose(a, b)
    row, col = mean_squares(form.tangent(known, *p), s)
    row, col = average(row, old.row, b2), average(col, old.col, b2)
    mu = old.mu_a.astype(a.dtype), old.mu_b.astype(a.dtype)
    if old.a is not None and old.b is not None:
        mu = seen(of_step(old.a, old.b, *mu), a, b, s)[:2]
    mu = average(h_a, mu[0], b1), average(h_b, mu[1], b1)
    if old.a is None:
        T = form.tangent(known, a, b, *mu, s)
    else:
        T = of_step(a, b, *form.step(known, a, b, *mu, s))
    left, right = _scales(row, col, 1 - jnp.asarray(b2, row.dtype) ** count, eps)
    left = left / (1 - jnp.asarray(b1, row.dtype) ** count)
    h_a, h_b, core = seen(T, a, b, s, (left, right))
    direction = form.step(known, a, b, h_a, h_b, s, core)
    return direction, row, col, T


def _scales(
    row: Float[Array, "*m"], col: Float[Array, "*n"], correction: Array, eps: Any
) -> tuple[Float[Array, "*m"], Float[Array, "*n"]]:
    """D_l and D_r with D_l D_rᵀ = 1 / sqrt(v^); eps² is added to both means of g~²."""
    floor = jnp.asarray(eps, row.dtype) ** 2 + jnp.finfo(row.dtype).tiny
    row, col = row / correction + floor, col / correction + floor
    return jnp.sqrt(jnp.mean(row) / row), lax.rsqrt(col)
