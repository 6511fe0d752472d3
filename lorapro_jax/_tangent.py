"""Steps of the weight that a pair can take: tangent vectors of K0 + s a b, and operations on them.

    frames          A = a S_a (m, r) and B = S_b b (r, n), orthonormal but for the damping λ:
                    (P + λ)⁻¹ = S_a S_aᵀ, (Q + λ)⁻¹ = S_bᵀ S_b, with P = aᵀa, Q = b bᵀ
    tangent vector  T = X B + A C B + A Y, its three parts orthogonal: Aᵀ X = 0, Y Bᵀ = 0
    of a matrix G   H_a = G Bᵀ and H_b = Aᵀ G give C = Aᵀ G Bᵀ, X = H_a - A C, Y = H_b - C B;
                    then T = P_a G + G P_b - P_a G P_b, the paper's g~, nearest to G
    factors         s (da b + a db) = T for da = (X + A C_a) S_b / s, db = S_a (Y + C_b B) / s,
                    whatever the split C = C_a + C_b; the partner of the larger factor takes C

Everything costs O((m + n) r²), and no (m, n) array is formed but by `dense` and `seen_of`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorapro_jax._sharding import contract, dot, gram_left, gram_right
from lorapro_jax._small import inverse_cholesky, sylvester


class Factors(NamedTuple):
    """One pair, or a batch of them: a (*batch, *m, r), b (*batch, r, *n), s (*batch,)."""

    a: Array
    b: Array
    s: Array


class Frames(NamedTuple):
    """The bases of one pair."""

    A: Float[Array, "*m r"]
    B: Float[Array, "r *n"]
    S_a: Float[Array, "r r"]
    S_b: Float[Array, "r r"]
    s: Float[Array, ""]
    b_moves_first: Float[Array, ""]  # 1 where a is the larger factor, else 0


class Tangent(NamedTuple):
    """T = X B + A C B + A Y, relative to a pair's frames."""

    X: Float[Array, "*m r"]
    C: Float[Array, "r r"]
    Y: Float[Array, "r *n"]


def ridge(P: Float[Array, "r r"], Q: Float[Array, "r r"], damping: Any) -> Float[Array, ""]:
    """λ = max(damping / r, 8 eps) · max(tr P, tr Q); a Gram's rounding errors are some eps tr P.

    Two factors of zeros have no size of their own: λ is that of a trace of 1.
    """
    trace, info = jnp.maximum(jnp.trace(P), jnp.trace(Q)), jnp.finfo(P.dtype)
    relative = jnp.maximum(jnp.asarray(damping, P.dtype) / len(P), 8 * info.eps)
    return relative * jnp.where(trace > 0, trace, 1)


def frames(p: Factors, damping: Any) -> Frames:
    """The frames of one pair, damped relative to the larger Gram's mean eigenvalue."""
    a, b, s = p
    P, Q = gram_left(a, a), gram_right(b, b)
    floor, eye = ridge(P, Q, damping), jnp.eye(len(P), dtype=P.dtype)
    S_a = inverse_cholesky(P + floor * eye, floor).T
    S_b = inverse_cholesky(Q + floor * eye, floor)
    b_moves_first = (jnp.trace(P) >= jnp.trace(Q)).astype(P.dtype)
    return Frames(dot(a, S_a), dot(S_b, b), S_a, S_b, s, b_moves_first)


def tangent(f: Frames, h_a: Float[Array, "*m r"], h_b: Float[Array, "r *n"]) -> Tangent:
    """The T nearest to G, known by its projections h_a = s G bᵀ and h_b = s aᵀ G."""
    return of_projections(f, dot(h_a, f.S_b.T / f.s), dot(f.S_a.T / f.s, h_b))


def of_projections(f: Frames, H_a: Float[Array, "*m r"], H_b: Float[Array, "r *n"]) -> Tangent:
    """The T nearest to G, known by G Bᵀ and Aᵀ G."""
    C = gram_right(H_b, f.B)
    return Tangent(H_a - dot(f.A, C), C, H_b - dot(C, f.B))


def to_factors(f: Frames, T: Tangent) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """(da, db) with s (da b + a db) = T."""
    C_b = T.C * f.b_moves_first
    da = dot(T.X + dot(f.A, T.C - C_b), f.S_b / f.s)
    return da, dot(f.S_a / f.s, T.Y + dot(C_b, f.B))


def squared_norm(f: Frames, T: Tangent) -> Float[Array, ""]:
    """||T||² as a sum of squares; up to 11% less where the damping acts."""
    in_b = T.X + dot(f.A, T.C)
    return jnp.sum(in_b * in_b) + jnp.sum(T.Y * T.Y)


def times(T: Tangent, factor: Array) -> Tangent:
    """T times a number."""
    return Tangent(*(part * factor for part in T))


def mean_squares(f: Frames, T: Tangent) -> tuple[Float[Array, "*m"], Float[Array, "*n"]]:
    """Means of T² over each row's and each column's entries, as sums of squares.

    Row i is (X + A C)_i B + A_i Y: two orthogonal terms, so that nothing cancels.
    """
    m, n = T.X.size // len(T.C), T.Y.size // len(T.C)
    in_b, in_a = T.X + dot(f.A, T.C), T.Y + dot(T.C, f.B)
    along_a = jnp.sum(dot(f.A, gram_right(T.Y, T.Y)) * f.A, axis=-1)
    along_b = jnp.sum(dot(gram_left(T.X, T.X), f.B) * f.B, axis=0)
    row = jnp.sum(in_b * in_b, axis=-1) + jnp.maximum(along_a, 0)
    col = jnp.sum(in_a * in_a, axis=0) + jnp.maximum(along_b, 0)
    return row / n, col / m


def rescaled(f: Frames, T: Tangent, left: Float[Array, "*m"], right: Float[Array, "*n"]) -> Tangent:
    """The tangent vector nearest to D_l T D_r, of the diagonals `left` and `right`."""
    B_right, A_left = f.B * right[None], f.A * left[..., None]
    Y_right, X_left = T.Y * right[None], T.X * left[..., None]
    row = gram_right(B_right, f.B)
    C_row = dot(T.C, row) + gram_right(Y_right, f.B)
    H_a = dot(X_left, row) + dot(A_left, C_row)
    column = gram_left(f.A, A_left)
    C_column = dot(column, T.C) + gram_left(f.A, X_left)
    return of_projections(f, H_a, dot(C_column, B_right) + dot(column, Y_right))


def dense(f: Frames, T: Tangent, like: Array) -> Float[Array, "..."]:
    """T as an (*m, *n) array, sharded as `like` is."""
    L = jnp.concatenate([T.X + dot(f.A, T.C), f.A], axis=-1)
    return contract(L, jnp.concatenate([f.B, T.Y]), [L.ndim - 1], [0], like=like)


def nearest(f: Frames, U: Float[Array, "..."]) -> Tangent:
    """The tangent vector nearest to an (*m, *n) array."""
    m, n = f.A.ndim - 1, f.B.ndim - 1
    rows, cols = list(range(m)), list(range(m, m + n))
    H_a = contract(U, f.B, cols, list(range(1, n + 1)), like=f.A)
    return of_projections(f, H_a, contract(f.A, U, rows, rows, like=f.B))


def least_norm(
    p: Factors, da: Float[Array, "*m r"], db: Float[Array, "r *n"], damping: Any
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """The (da, db) of least norm among those with the same da b + a db.

    They are (da + a Z, db - Z b), and Z solves P Z + Z Q = db bᵀ - aᵀ da.
    """
    a, b, _ = p
    P, Q = gram_left(a, a), gram_right(b, b)
    damped = ridge(P, Q, damping) / 2 * jnp.eye(len(P), dtype=P.dtype)
    Z = sylvester(P + damped, Q + damped, gram_right(db, b) - gram_left(a, da))
    return da + dot(a, Z), db - dot(Z, b)
