"""A step of one pair that changes its weight as was asked, within a trust region.

Factors that both move by -t (da, db) change the weight s a b by

    -t s (da b + a db) + t² s da db.

The second term is nobody's wish. Right after b = 0 it is as large as the first, whatever the rate,
and larger along a factor's small singular values. So one factor moves first, and the other one as
fits its partner's new value (b first, da ⊥ a):

    b' = b - t db,   a' = a - t da (b b'ᵀ + λ)(b' b'ᵀ + λ)⁻¹

which is the least-squares fit of a' to the step that was asked for, and where b' has next to
nothing (λ, the closed form's damping) a's own step. The pair's weight moves by no more than
t s ||da b + a db||. This is half a sweep of alternating least squares, a retraction onto the
matrices of rank r; an SVD of the sum would rotate the factors.

The bound is on that norm: t ||da b + a db|| <= radius · max(tr P, tr Q) / r. The right side is the
weight, by s, that the larger factor would make with a partner of its size: the same for every
width, rank and learning rate. A pair whose b is zero may grow, one that has grown may move in
proportion.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorapro_jax._batch import Problem
from lorapro_jax._lapack import eigh
from lorapro_jax._solve import dot, gram_left, gram_right, grams


def step(
    p: Problem,
    da: Float[Array, "*m r"],
    db: Float[Array, "r *n"],
    rate: Float[Array, ""],
    radius: float | Array | None,
    damping: float | Array | None,
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """What is to be added to (a, b) for the direction (da, db) of one pair.

    With a relative `damping` the second factor is fitted to the first one's new value, which is
    meant for directions of x="sequential". With None both take their own step.
    """
    P, Q = grams(p.a, p.b)  # XLA has formed them for the closed form
    left = _Grams(P, gram_left(p.a, da), gram_left(da, da))
    right = _Grams(Q, gram_right(p.b, db), gram_right(db, db))
    size = jnp.maximum(jnp.trace(P), jnp.trace(Q)) / len(P)
    t = rate if radius is None else _allowed(left, right, rate, radius * size)
    if damping is not None:
        b_first, info = jnp.trace(P) >= jnp.trace(Q), jnp.finfo(P.dtype)
        ridge = jnp.maximum(damping, info.eps) * size + info.tiny
        first = _Grams(*(jnp.where(b_first, x, y) for x, y in zip(right, left, strict=True)))
        fit, eye = _fit(first, t, ridge.astype(P.dtype)), jnp.eye(len(P), dtype=P.dtype)
        # (b b'ᵀ)(b' b'ᵀ)⁻¹ on the right of da, (a'ᵀa')⁻¹ a'ᵀa on the left of db, and -t in both: a
        # product is an array of its own, and no pair's slice of it computes anything
        on_da, on_db = jnp.where(b_first, fit, eye), jnp.where(b_first, eye, fit.T)
        return dot(da, -t * on_da), dot(-t * on_db, db)
    return -t * da, -t * db


class _Grams(NamedTuple):
    """Of a factor and its step: aᵀa, aᵀda, daᵀda, or b bᵀ, b dbᵀ, db dbᵀ."""

    factor: Float[Array, "r r"]
    mixed: Float[Array, "r r"]
    step: Float[Array, "r r"]


def _allowed(left: _Grams, right: _Grams, rate: Array, bound: Array) -> Array:
    """The largest t <= rate within the bound."""
    parts = left.step * right.factor + 2 * left.mixed * right.mixed.T + left.factor * right.step
    norm = jnp.sqrt(jnp.maximum(jnp.sum(parts), 0))
    return jnp.minimum(rate, bound / (norm + jnp.finfo(norm.dtype).tiny))


def _fit(first: _Grams, t: Float[Array, ""], ridge: Float[Array, ""]) -> Float[Array, "r r"]:
    """(b b'ᵀ + λ)(b' b'ᵀ + λ)⁻¹ of b' = b - t db and the ridge λ."""
    old = first.factor - t * first.mixed
    new = old - t * (first.mixed.T - t * first.step)
    ((values, vectors),) = eigh((new + new.T) / 2)
    inverse = dot(vectors / (jnp.maximum(values, 0) + ridge)[None, :], vectors.T)
    return dot(old + ridge * jnp.eye(len(old), dtype=old.dtype), inverse)
