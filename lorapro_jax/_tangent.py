"""A tangent vector T of the pairs of rank r, by its coefficients.

The closed form's g~ = s (da b + a db) has da = h_a H_a + a C_a and db = H_b h_b + C_b b. So it is

    T = s [x | A] W [B; y]      x = h_a, A = a S_a, B = S_b b, y = h_b

for any S_a and S_b, with a W of (2 r, 2 r). A solver chooses them so that W is as small as the
digits need: see `_solve.weights`. A step (da, db) itself is the T with x = da, y = db, S and W 1.
Neither T nor (da, db) has to be formed to know T's squares or projections: contractions of the
factors to (r, r), products of (2 r, 2 r), and factors times (r, r).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorapro_jax._solve import dot, gram_left, gram_right

Small = tuple[Float[Array, "*batch r r"], Float[Array, "*batch r r"]]  # of a's side, of b's


class Tangent(NamedTuple):
    """T of one pair, but for s."""

    x: Float[Array, "*m r"]
    a: Float[Array, "*m r"]
    b: Float[Array, "r *n"]
    y: Float[Array, "r *n"]
    W: Float[Array, "k k"] | None = None  # k = 2 r; None: 1
    S: Small | None = None  # S_a and S_b; None: 1, which an orthonormal a and b may have


class Seen(NamedTuple):
    """The projections of an (m, n) array X, as of a gradient."""

    h_a: Float[Array, "*m r"]  # s X bᵀ
    h_b: Float[Array, "r *n"]  # s aᵀ X
    core: Float[Array, "r r"]  # aᵀ h_a, which is h_b bᵀ


def of_step(
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    da: Float[Array, "*m r"],
    db: Float[Array, "r *n"],
) -> Tangent:
    """s (da b + a db)."""
    return Tangent(da, a, b, db)


def mean_squares(T: Tangent, s: Float[Array, ""]) -> tuple[Float[Array, "*m"], Float[Array, "*n"]]:
    """Means of T² over its rows' and its columns' entries, in O((m + n) r²).

    With the Grams G of the factors on the other side they are quadratic forms in the rows of
    [x | A], by W G Wᵀ, and in the columns of [B; y], by Wᵀ G W.
    """
    x, a, b, y, W, S = T
    r = len(b)
    m, n = x.size // r, y.size // r
    xA, AA, yB, BB = gram_left(x, a), gram_left(a, a), gram_right(y, b), gram_right(b, b)
    if S is not None:
        xA, AA = dot(xA, S[0]), dot(S[0].T, dot(AA, S[0]))
        yB, BB = dot(yB, S[1].T), dot(dot(S[1], BB), S[1].T)
    N = jnp.block([[gram_left(x, x), xA], [xA.T, AA]])
    K = jnp.block([[BB, yB.T], [yB, gram_right(y, y)]])
    if W is not None:
        K, N = dot(dot(W, K), W.T), dot(W.T, dot(N, W))
    (K_x, K_xA, K_A), (N_B, N_By, N_y) = ((G[:r, :r], 2 * G[r:, :r], G[r:, r:]) for G in (K, N))
    if S is not None:
        K_xA, K_A = dot(S[0], K_xA), dot(S[0], dot(K_A, S[0].T))
        N_By, N_B = dot(N_By, S[1]), dot(S[1].T, dot(N_B, S[1]))
    of_rows = x * (dot(x, K_x) + dot(a, K_xA)) + a * dot(a, K_A)
    of_cols = y * (dot(N_y, y) + dot(N_By, b)) + b * dot(N_B, b)
    row = jnp.sum(of_rows, axis=-1) * (s * s / n).astype(x.dtype)
    col = jnp.sum(of_cols, axis=0) * (s * s / m).astype(x.dtype)
    return jnp.maximum(row, 0), jnp.maximum(col, 0)  # sums of squares, but for rounding


def seen(
    T: Tangent,
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    s: Float[Array, ""],
    scales: tuple[Float[Array, "*m"], Float[Array, "*n"]] | None = None,
) -> Seen:
    """What (a, b) sees of X = T, or of X = D_l T D_r.

    `scales` are the diagonals of D_l and D_r. (a, b) need not be where T is tangent.
    """
    r, s = len(b), s.astype(b.dtype)
    if scales is not None:
        a, b = a * scales[0][..., None], b * scales[1][None]
    of_a, of_b = gram_left(a, T.a), gram_right(T.b, b)
    if T.S is not None:
        of_a, of_b = dot(of_a, T.S[0]), dot(T.S[1], of_b)
    # s on both sides and once more at the end: XLA compiles what only joins or adds for every group
    left = s * jnp.concatenate([gram_left(a, T.x), of_a], axis=1)
    right = s * jnp.concatenate([of_b, gram_right(T.y, b)], axis=0)
    L, R = (left, right) if T.W is None else (dot(left, T.W), dot(T.W, right))
    core, L_b, R_a = dot(left, R), L[:, :r], R[r:]
    if T.S is not None:
        L_b, R_a = dot(L_b, T.S[1]), dot(T.S[0], R_a)
    h_a, h_b = dot(T.x, R[:r]) + dot(T.a, R_a), dot(L_b, T.b) + dot(L[:, r:], T.y)
    h_a, h_b = s * h_a, s * h_b
    if scales is not None:
        h_a, h_b = h_a * scales[0][..., None], h_b * scales[1][None]
    return Seen(h_a, h_b, core)
