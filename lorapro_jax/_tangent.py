"""Steps of the weight that a pair can take: tangent vectors of K0 + s a b, and operations on them.

    frames          A = a S_a (m, r) and B = S_b b (r, n), orthonormal but for the damping λ:
                    (P + λ)⁻¹ = S_a S_aᵀ, (Q + λ)⁻¹ = S_bᵀ S_b, with P = aᵀa, Q = b bᵀ
    of a matrix G   H_a = G Bᵀ, H_b = Aᵀ G, C = Aᵀ G Bᵀ; X = H_a - A C, Y = H_b - C B
    tangent vector  T = H_a B + A H_b - A C B = P_a G + G P_b - P_a G P_b, the paper's g~, nearest
                    to G. So T = X B + A C B + A Y = H_a B + A Y = X B + A H_b, orthogonal sums
    factors         s (da b + a db) = T for (da, db) = (X S_b, S_a H_b) / s or (H_a S_b, S_a Y) / s;
                    the partner of the larger factor takes the shared part, A C B

Everything costs O((m + n) r²), and no (m, n) array is formed but by `dense` and `nearest`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lorapro_jax._moments import positive
from lorapro_jax._sharding import contract, dot, gram_left, gram_right
from lorapro_jax._small import inverse_cholesky, orthogonal, sylvester


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
    b_moves_first: Bool[Array, ""]  # where a is the larger factor


class Tangent(NamedTuple):
    """T = H_a B + A H_b - A C B, relative to a pair's frames."""

    H_a: Float[Array, "*m r"]
    H_b: Float[Array, "r *n"]
    C: Float[Array, "r r"]


def ridge(P: Float[Array, "r r"], Q: Float[Array, "r r"], damping: Any) -> Float[Array, ""]:
    """λ = max(damping / r, 8 eps) · max(tr P, tr Q); a Gram's rounding errors are some eps tr P.

    Two factors of zeros have no size of their own: λ is that of a trace of 1.
    """
    trace, info = jnp.maximum(jnp.trace(P), jnp.trace(Q)), jnp.finfo(P.dtype)
    relative = jnp.maximum(jnp.asarray(damping, P.dtype) / len(P), 8 * info.eps)
    return relative * positive(trace)


def frames(p: Factors, damping: Any) -> Frames:
    """The frames of one pair, damped relative to the larger Gram's mean eigenvalue."""
    a, b, s = p
    P, Q = gram_left(a, a), gram_right(b, b)
    floor, eye = ridge(P, Q, damping), jnp.eye(len(P), dtype=P.dtype)
    both = jnp.stack([P + floor * eye, Q + floor * eye])  # one elimination for two matrices
    J_a, S_b = jax.vmap(inverse_cholesky, (0, None))(both, floor)
    b_moves_first = jnp.trace(P) >= jnp.trace(Q)
    return Frames(dot(a, J_a.T), dot(S_b, b), J_a.T, S_b, s, b_moves_first)


def tangent(f: Frames, h_a: Float[Array, "*m r"], h_b: Float[Array, "r *n"]) -> Tangent:
    """The T nearest to G, known by its projections h_a = s G bᵀ and h_b = s aᵀ G."""
    return of_projections(f, dot(h_a, f.S_b.T / f.s), dot(f.S_a.T / f.s, h_b))


def of_projections(f: Frames, H_a: Float[Array, "*m r"], H_b: Float[Array, "r *n"]) -> Tangent:
    """The T nearest to G, known by G Bᵀ and Aᵀ G."""
    return Tangent(H_a, H_b, gram_right(H_b, f.B))


def beyond_a(f: Frames, T: Tangent) -> Float[Array, "*m r"]:
    """X, the part of H_a that is orthogonal to A."""
    return T.H_a - dot(f.A, T.C)


def beyond_b(f: Frames, T: Tangent) -> Float[Array, "r *n"]:
    """Y, the part of H_b that is orthogonal to B."""
    return T.H_b - dot(T.C, f.B)


def to_factors(f: Frames, T: Tangent) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """(da, db) with s (da b + a db) = T."""
    C_a = jnp.where(f.b_moves_first, T.C, 0)
    da = beyond_a(f, T._replace(C=C_a))
    db = beyond_b(f, T._replace(C=T.C - C_a))
    return dot(da, f.S_b / f.s), dot(f.S_a / f.s, db)


def root_mean_square(T: Tangent) -> Float[Array, ""]:
    """Of the entries of the T nearest to a G: sqrt(<G, T> / (m n)), an upper bound if damped.

    <G, T> is at least the largest of the three terms, so that the difference is accurate.
    """
    H_a, H_b, C = (jnp.sum(part * part) for part in T)
    m, n = (H.size // len(T.C) for H in (T.H_a, T.H_b))
    return jnp.sqrt((H_a + H_b - C) / (m * n))


def times(T: Tangent, factor: Array) -> Tangent:
    """T times a number."""
    return Tangent(*(part * factor for part in T))


def clipped(T: Tangent, threshold: Any) -> Tangent:
    """T with a root mean square of `threshold` at most."""
    if threshold is None:
        return T
    return times(T, jnp.minimum(1, threshold / positive(root_mean_square(T))))


def mean_squares(f: Frames, T: Tangent) -> tuple[Float[Array, "*m"], Float[Array, "*n"]]:
    """Means of T² over each row's and each column's entries.

    Row i is (H_a)_i B + A_i Y, two orthogonal terms: a sum of squares, in which nothing cancels.
    """
    m, n = (H.size // len(T.C) for H in (T.H_a, T.H_b))
    X, Y = beyond_a(f, T), beyond_b(f, T)
    along_a = jnp.sum(dot(f.A, gram_right(Y, Y)) * f.A, axis=-1)
    along_b = jnp.sum(dot(gram_left(X, X), f.B) * f.B, axis=0)
    row = jnp.sum(T.H_a * T.H_a, axis=-1) + jnp.maximum(along_a, 0)
    col = jnp.sum(T.H_b * T.H_b, axis=0) + jnp.maximum(along_b, 0)
    return row / n, col / m


def rescaled(f: Frames, T: Tangent, left: Float[Array, "*m"], right: Float[Array, "*n"]) -> Tangent:
    """The tangent vector nearest to D_l T D_r, of the diagonals `left` and `right`."""
    left, right = left[..., None], right[None]
    A, B, Y = f.A * left, f.B * right, beyond_b(f, T) * right
    AH, AA, BB, YB = gram_left(A, T.H_a), gram_left(A, f.A), gram_right(B, f.B), gram_right(Y, f.B)
    H_a = left * (dot(T.H_a, BB) + dot(f.A, YB))
    return Tangent(H_a, dot(AH, B) + dot(AA, Y), dot(AH, BB) + dot(AA, YB))


def polar(f: Frames, T: Tangent, damping: Any) -> Tangent:
    """The tangent vector nearest to msign(T), U Vᵀ of T = U Σ Vᵀ, which has to be one itself.

    T = X B + A C B + A Y, with X and Y orthogonal to A and B. With X = Â R and Y = L B̂, Â and B̂
    orthonormal, it is [A Â] M [B; B̂] of M = [[C, L], [R, 0]], and its msign [A Â] msign(M) [B; B̂],
    whose part Â · B̂ is no step of the factors, and left out. Directions of X and Y that are below
    sqrt(damping) ||T|| stay small, and so do rounding errors of the rest.
    """
    X, Y, C, r = beyond_a(f, T), beyond_b(f, T), T.C, len(T.C)
    XX, YY = gram_left(X, X), gram_right(Y, Y)
    square = positive(jnp.trace(XX) + jnp.trace(YY) + jnp.sum(C * C))
    info = jnp.finfo(square.dtype)
    floor = jnp.maximum(jnp.asarray(damping, square.dtype), 8 * info.eps) * square
    damped = floor * jnp.eye(r, dtype=square.dtype)
    both = jnp.stack([XX + damped, YY + damped])
    J_x, J_y = jax.vmap(inverse_cholesky, (0, None))(both, floor)
    core = jnp.block([[C, dot(YY, J_y.T)], [dot(J_x, XX), jnp.zeros_like(XX)]])
    W = orthogonal(core / jnp.sqrt(square))
    H_a = dot(f.A, W[:r, :r]) + dot(X, dot(J_x.T, W[r:, :r]))
    H_b = dot(W[:r, :r], f.B) + dot(dot(W[:r, r:], J_y), Y)
    return Tangent(H_a, H_b, W[:r, :r])


def dense(f: Frames, T: Tangent, like: Array) -> Float[Array, "..."]:
    """T as an (*m, *n) array, sharded as `like` is."""
    L, R = jnp.concatenate([T.H_a, f.A], axis=-1), jnp.concatenate([f.B, beyond_b(f, T)])
    return contract(L, R, [L.ndim - 1], [0], like=like)


def nearest(f: Frames, U: Float[Array, "..."]) -> Tangent:
    """The tangent vector nearest to an (*m, *n) array."""
    m, n = f.A.ndim - 1, f.B.ndim - 1
    rows, cols = list(range(m)), list(range(m, m + n))
    H_a = contract(U, f.B, cols, list(range(1, n + 1)), like=f.A)
    return of_projections(f, H_a, contract(f.A, U, rows, rows, like=f.B))


def least_norm(
    p: Factors,
    da: Float[Array, "*m r"],
    db: Float[Array, "r *n"],
    R: Float[Array, "r r"],
    damping: Any,
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """The (da, db) of least norm among those with the same da b + a db; R is db bᵀ - aᵀ da.

    They are (da + a Z, db - Z b) with aᵀ (da + a Z) = (db - Z b) bᵀ, so P Z + Z Q = R.
    """
    P, Q = gram_left(p.a, p.a), gram_right(p.b, p.b)
    floor = ridge(P, Q, damping) / 2
    damped = floor * jnp.eye(len(P), dtype=P.dtype)
    Z = sylvester(P + damped, Q + damped, R, floor)
    return da + dot(p.a, Z), db - dot(Z, p.b)
