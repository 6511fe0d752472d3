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
    damping: float | Array | None,
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """What is to be added to (a, b) for the direction (da, db) of one pair.

    With a relative `damping` the second factor is fitted to the first one's new value, which is
    meant for directions of x="sequential". With None both take their own step.
    """
    r = da.shape[-1]
    left = gram_left(*[jnp.concatenate([p.a, da], axis=-1)] * 2)
    right = gram_right(*[jnp.concatenate([p.b, db])] * 2)
    traces = jnp.trace(left[:r, :r]), jnp.trace(right[:r, :r])
    size = jnp.maximum(*traces) / r
    t = rate if radius is None else _allowed(left, right, rate, radius * size)
    if damping is not None:
        b_first, info = traces[0] >= traces[1], jnp.finfo(left.dtype)
        ridge = jnp.maximum(damping, info.eps) * size + info.tiny
        fit = _fit(jnp.where(b_first, right, left), t, ridge.astype(left.dtype))
        eye = jnp.eye(r, dtype=fit.dtype)
        # (b b'ᵀ)(b' b'ᵀ)⁻¹ on the right of da, (a'ᵀa')⁻¹ a'ᵀa on the left of db
        da = dot(da, jnp.where(b_first, fit, eye))
        db = dot(jnp.where(b_first, eye, fit.T), db)
    return -t * da, -t * db


def _allowed(left: Array, right: Array, rate: Array, bound: Array) -> Array:
    """The largest t <= rate within the bound, from the Grams of [a da] and [b; db]."""
    r = left.shape[0] // 2
    crossed = jnp.roll(right, (r, r), axis=(0, 1))  # a meets db, and b meets da
    norm = jnp.sqrt(jnp.maximum(jnp.sum(left * crossed), 0))
    return jnp.minimum(rate, bound / (norm + jnp.finfo(norm.dtype).tiny))


def _fit(
    gram: Float[Array, "k k"], t: Float[Array, ""], ridge: Float[Array, ""]
) -> Float[Array, "r r"]:
    """(b b'ᵀ + λ)(b' b'ᵀ + λ)⁻¹ of b' = b - t db and the ridge λ, from the Gram of [b; db]."""
    r = gram.shape[0] // 2
    old = gram[:r, :r] - t * gram[:r, r:]
    new = old - t * (gram[r:, :r] - t * gram[r:, r:])
    values, vectors = eigh((new + new.T)[None] / 2)
    inverse = dot(vectors[0] / (jnp.maximum(values[0], 0) + ridge)[None, :], vectors[0].T)
    return dot(old + ridge * jnp.eye(r, dtype=old.dtype), inverse)
