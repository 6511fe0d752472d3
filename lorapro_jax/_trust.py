"""A trust region for the step of one pair, in the weight it changes.

A step (-t da, -t db) of the factors changes the weight s a b by

    -t s (da b + a db) + t² s da db,    of norm at most t N₁ + t² N₂.

The first is what was asked for. The second is what the factors do besides: right after b = 0 it is
as large as the first, and where a singular value of a factor is small it is larger. The bound is on
both: t N₁ + t² N₂ <= radius · s · max(tr P, tr Q) / r. The right side is the weight that the larger
factor would make with a partner of its size, so that it is of the weight's units and the same for
every width, rank and learning rate. A pair whose b is zero may grow, and one that has grown may
move in proportion.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorapro_jax._batch import Problem
from lorapro_jax._solve import gram_left, gram_right


def allowed(
    p: Problem,
    da: Float[Array, "*m r"],
    db: Float[Array, "r *n"],
    rate: Float[Array, ""],
    radius: float | Array,
) -> Float[Array, ""]:
    """The largest t <= rate for which the step of one pair stays within the bound."""
    r = da.shape[-1]
    left = gram_left(jnp.concatenate([da, p.a], axis=-1), jnp.concatenate([da, p.a], axis=-1))
    right = gram_right(jnp.concatenate([p.b, db]), jnp.concatenate([p.b, db]))
    # [da a] [b; db] is the first order, da db the second
    first = jnp.sqrt(jnp.maximum(jnp.sum(left * right), 0))
    second = jnp.sqrt(jnp.maximum(jnp.sum(left[:r, :r] * right[r:, r:]), 0))
    size = jnp.maximum(jnp.trace(left[r:, r:]), jnp.trace(right[:r, :r])) / r
    bound = radius * size
    # the positive root of second t² + first t = bound, in the form without cancellation
    tiny = jnp.finfo(da.dtype).tiny
    root = jnp.sqrt(first * first + 4 * second * bound)
    return jnp.minimum(rate, 2 * bound / (first + root + tiny)).astype(da.dtype)
