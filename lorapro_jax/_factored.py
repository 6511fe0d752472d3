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
from jaxtyping import Array, Float, Int

from lorapro_jax import _solve
from lorapro_jax._batch import Adam, Group, Problem, average, factor_zeros, over_batch
from lorapro_jax._closed_form import ClosedForm
from lorapro_jax._pairwise import Rule
from lorapro_jax._solve import dot, gram_left, gram_right


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
    """The rule of factored mode; `keeps_factors` if nobody is going to call its `carry`."""

    def init(group: Group, leaves: Sequence[Any]) -> Fields:
        a, b = factor_zeros(group, leaves)  # the first momentum is zero wherever it is from
        row, col = jnp.sum(a, axis=-1), jnp.sum(b, axis=len(group.batch))
        mu = factor_zeros(group, leaves, adam.mu_dtype)
        return Fields(*mu, row, col, *((a, b) if keeps_factors else (None, None)))

    def update(p: Problem, group: Group, fields: tuple, count: Array):
        step = functools.partial(_step, adam=adam, form=form)
        return over_batch(step, group, (0, 0, None))(p, Fields(*fields), count)

    def carry(p: Problem, group: Group, fields: tuple, a: Array, b: Array) -> Fields:
        old = Fields(*fields)
        mu_a, mu_b = over_batch(carried, group)(old.mu_a, old.mu_b, p.a, p.b, a, b, p.s)
        return old._replace(mu_a=_stored(mu_a, adam), mu_b=_stored(mu_b, adam))

    return Rule(FactoredState, init, update, None if keeps_factors else carry, in_turn=True)


def _step(
    p: Problem, old: Fields, count: Int[Array, ""], adam: Adam, form: ClosedForm
) -> tuple[tuple[Array, Array], Fields]:
    """The direction of one pair and its new moments."""
    b1, b2, eps, _ = adam
    a, b, h_a, h_b, s = p
    solve = functools.partial(form.step, form.decompose(a, b), a, b, s=s)
    row, col = _solve.mean_squares(a, b, *solve(h_a, h_b), s)
    row, col = average(row, old.row, b2), average(col, old.col, b2)
    mu = old.mu_a.astype(a.dtype), old.mu_b.astype(a.dtype)
    if old.a is not None and old.b is not None:
        mu = carried(*mu, old.a, old.b, a, b, s)
    mu = average(h_a, mu[0], b1), average(h_b, mu[1], b1)
    n_a, n_b = solve(*mu)
    left, right = _scales(row, col, 1 - jnp.asarray(b2, row.dtype) ** count, eps)
    left = left / (1 - jnp.asarray(b1, row.dtype) ** count)
    L, R = _solve.tangent(a, b, n_a, n_b)
    direction = solve(*seen(L * left[..., None], R * right[None], a, b, s))
    if old.a is None:  # float32 until `carry` has had them
        return direction, Fields(n_a, n_b, row, col, None, None)
    return direction, Fields(_stored(n_a, adam), _stored(n_b, adam), row, col, a, b)


def _stored(mu: Array, adam: Adam) -> Array:
    return mu if adam.mu_dtype is None else mu.astype(adam.mu_dtype)


def carried(
    n_a: Float[Array, "*m r"],
    n_b: Float[Array, "r *n"],
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    a_new: Float[Array, "*m r"],
    b_new: Float[Array, "r *n"],
    s: Float[Array, ""],
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """(s T b_newᵀ, s a_newᵀ T) of T = s (n_a b + a n_b)."""
    return seen(*_solve.tangent(a, b, n_a, n_b), a_new, b_new, s)


def seen(
    L: Float[Array, "*m k"],
    R: Float[Array, "k *n"],
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    s: Float[Array, ""],
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """The projections (s X bᵀ, s aᵀ X) of X = s L R, as of a gradient."""
    s2 = s * s
    return dot(L, gram_right(R, b) * s2), dot(gram_left(a, L) * s2, R)


def _scales(
    row: Float[Array, "*m"], col: Float[Array, "*n"], correction: Array, eps: Any
) -> tuple[Float[Array, "*m"], Float[Array, "*n"]]:
    """D_l and D_r with D_l D_rᵀ = 1 / sqrt(v^); eps² is added to both means of g~²."""
    floor = jnp.asarray(eps, row.dtype) ** 2 + jnp.finfo(row.dtype).tiny
    row, col = row / correction + floor, col / correction + floor
    return (jnp.mean(row) / row) ** 0.5, col**-0.5
