"""A step of one pair that changes its weight as was asked, within a trust region.

Factors that both move by -t (da, db) change the weight s a b by

    -t s (da b + a db) + t² s da db.

The second term is nobody's wish. Right after b = 0 it is as large as the first, whatever the rate,
and larger along a factor's small singular values. So one factor moves first, and the other one as
fits its partner's new value (b first, da ⊥ a):

    b' = b - t db,   a' = a - t da (b b'ᵀ)(b' b'ᵀ)⁻¹

which is the least-squares fit of a' to the step that was asked for: nothing is left over, and the
pair's weight moves by at most t s ||da b + a db||. This is half a sweep of alternating least
squares, a retraction onto the matrices of rank r; an SVD of the sum would rotate the factors.

The bound is on that norm: t ||da b + a db|| <= radius · max(tr P, tr Q) / r. The right side is the
weight, by s, that the larger factor would make with a partner of its size: the same for every
width, rank and learning rate. A pair whose b is zero may grow, one that has grown may move in
proportion.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorapro_jax._batch import Problem
from lorapro_jax._lapack import eigh
from lorapro_jax._solve import dot, gram_left, gram_right


def step(
    p: Problem,
    da: Float[Array, "*m r"],
    db: Float[Array, "r *n"],
    rate: Float[Array, ""],
    radius: float | Array | None,
    *,
    retracts: bool,
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """What is to be added to (a, b) for the direction (da, db) of one pair.

    `retracts` is for directions of x="sequential", where the factor that moves second moves
    orthogonally to the larger one.
    """
    r = da.shape[-1]
    left = gram_left(*[jnp.concatenate([p.a, da], axis=-1)] * 2)
    right = gram_right(*[jnp.concatenate([p.b, db])] * 2)
    t = rate if radius is None else _allowed(left, right, rate, radius)
    if retracts:
        b_first = jnp.trace(left[:r, :r]) >= jnp.trace(right[:r, :r])
        fit = _fit(jnp.where(b_first, right, left), t)
        eye = jnp.eye(r, dtype=fit.dtype)
        # (b b'ᵀ)(b' b'ᵀ)⁻¹ on the right of da, (a'ᵀa')⁻¹ a'ᵀa on the left of db
        da = dot(da, jnp.where(b_first, fit, eye))
        db = dot(jnp.where(b_first, eye, fit.T), db)
    return -t * da, -t * db


def _allowed(left: Array, right: Array, rate: Array, radius: float | Array) -> Array:
    """The largest t <= rate within the bound, from the Grams of [a da] and [b; db]."""
    r = left.shape[0] // 2
    crossed = jnp.roll(right, (r, r), axis=(0, 1))  # a meets db, and b meets da
    norm = jnp.sqrt(jnp.maximum(jnp.sum(left * crossed), 0))
    size = jnp.maximum(jnp.trace(left[:r, :r]), jnp.trace(right[:r, :r])) / r
    return jnp.minimum(rate, radius * size / (norm + jnp.finfo(norm.dtype).tiny))


def _fit(gram: Float[Array, "k k"], t: Float[Array, ""]) -> Float[Array, "r r"]:
    """(b b'ᵀ)(b' b'ᵀ)⁻¹ of b' = b - t db, from the Gram of [b; db]."""
    r = gram.shape[0] // 2
    old = gram[:r, :r] - t * gram[:r, r:]
    new = old - t * (gram[r:, :r] - t * gram[r:, r:])
    values, vectors = eigh((new + new.T)[None] / 2)
    # of a Gram's small eigenvalues only eps of the largest is known
    floor = jnp.finfo(gram.dtype).eps * jnp.sum(values[0]) + jnp.finfo(gram.dtype).tiny
    inverse = dot(vectors[0] / (jnp.maximum(values[0], 0) + floor)[None, :], vectors[0].T)
    return dot(old, inverse)
