"""A tangent vector T of the pairs of rank r, by its coefficients.

The closed form's g~ = s (da b + a db) has da = h_a H_a + a C_a and db = H_b h_b + C_b b. So it is

    T = s [x | A] W [B; y]      x = h_a, A = a, B = b, y = h_b,     W = [ H_a         0  ]
                                                                        [ C_a + C_b  H_b ]

and a step (da, db) itself is the T with x = da, y = db, W = 1. Neither T nor (da, db) has to be
formed to know T's squares or projections: contractions of the factors to (r, r), products of
(2 r, 2 r), and factors times (r, r).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorapro_jax._solve import dot, gram_left, gram_right


class Tangent(NamedTuple):
    """T of one pair, but for s."""

    x: Float[Array, "*m r"]
    A: Float[Array, "*m r"]  # spans what a spans
    W: Float[Array, "k k"] | None  # k = 2 r; None: 1
    B: Float[Array, "r *n"]  # spans what b spans
    y: Float[Array, "r *n"]


def of_step(
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    da: Float[Array, "*m r"],
    db: Float[Array, "r *n"],
) -> Tangent:
    """s (da b + a db)."""
    return Tangent(da, a, None, b, db)


def mean_squares(T: Tangent, s: Float[Array, ""]) -> tuple[Float[Array, "*m"], Float[Array, "*n"]]:
    """Means of T² over its rows' and its columns' entries, in O((m + n) r²).

    With the Grams G of the factors on the other side they are quadratic forms in the rows of
    [x | A], by W G Wᵀ, and in the columns of [B; y], by Wᵀ G W.
    """
    x, A, W, B, y = T
    r = len(B)
    m, n = x.size // r, y.size // r
    xA, yB = gram_left(x, A), gram_right(y, B)
    left = jnp.block([[gram_left(x, x), xA], [xA.T, gram_left(A, A)]])
    right = jnp.block([[gram_right(B, B), yB.T], [yB, gram_right(y, y)]])
    K, N = right, left
    if W is not None:
        K, N = dot(dot(W, right), W.T), dot(W.T, dot(left, W))
    of_rows = x * (dot(x, K[:r, :r]) + dot(A, 2 * K[r:, :r])) + A * dot(A, K[r:, r:])
    of_cols = y * (dot(N[r:, r:], y) + dot(2 * N[r:, :r], B)) + B * dot(N[:r, :r], B)
    row = jnp.sum(of_rows, axis=-1) * (s * s / n).astype(x.dtype)
    col = jnp.sum(of_cols, axis=0) * (s * s / m).astype(x.dtype)
    return jnp.maximum(row, 0), jnp.maximum(col, 0)  # sums of squares, but for rounding


def seen(
    T: Tangent,
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    s: Float[Array, ""],
    scales: tuple[Float[Array, "*m"], Float[Array, "*n"]] | None = None,
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """The projections (s X bᵀ, s aᵀ X), as of a gradient, of X = T, or of X = D_l T D_r.

    `scales` are the diagonals of D_l and D_r. (a, b) need not be where T is tangent.
    """
    x, A, W, B, y = T
    r, s2 = len(B), (s * s).astype(x.dtype)
    if scales is not None:
        a, b = a * scales[0][..., None], b * scales[1][None]
    R = jnp.concatenate([gram_right(B, b), gram_right(y, b)], axis=0) * s2
    L = jnp.concatenate([gram_left(a, x), gram_left(a, A)], axis=1) * s2
    if W is not None:
        R, L = dot(W, R), dot(L, W)
    h_a, h_b = dot(x, R[:r]) + dot(A, R[r:]), dot(L[:, :r], B) + dot(L[:, r:], y)
    if scales is None:
        return h_a, h_b
    return h_a * scales[0][..., None], h_b * scales[1][None]
