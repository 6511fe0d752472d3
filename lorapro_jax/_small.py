"""Matrices of (r, r) by elimination and products only: no LAPACK, the same on every backend."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lorapro_jax._sharding import dot

_COARSE, _FINE = (3.4445, -4.775, 2.0315), (1.875, -1.25, 0.375)  # Muon's quintic; Newton-Schulz's
_ELIMINATED = 8  # rows; above, halves and products cost less than more unrolled steps


def inverse_cholesky(P: Float[Array, "r r"], floor: Float[Array, ""]) -> Float[Array, "r r"]:
    """The lower triangular J = L⁻¹ of P = L Lᵀ, so that P⁻¹ = Jᵀ J.

    `floor` is a positive lower bound of P's eigenvalues. Every pivot is an eigenvalue bound of a
    Schur complement, so none is below it; one that rounding pushed lower is raised to it.
    """
    r = len(P)
    if r <= _ELIMINATED:
        return _eliminate(P, floor)
    k = r // 2
    top = inverse_cholesky(P[:k, :k], floor)
    mixed = dot(P[k:, :k], top.T)
    bottom = inverse_cholesky(P[k:, k:] - dot(mixed, mixed.T), floor)
    left = -dot(dot(bottom, mixed), top)
    return jnp.block([[top, jnp.zeros((k, r - k), P.dtype)], [left, bottom]])


def _eliminate(P: Float[Array, "r r"], floor: Float[Array, ""]) -> Float[Array, "r r"]:
    """The same by Gaussian elimination on [P; I], written out: L' D and L'⁻ᵀ of P = L' D L'ᵀ."""
    r, eye = len(P), jnp.eye(len(P), dtype=P.dtype)
    right, rest = jnp.triu(jnp.ones_like(P), 1), jnp.concatenate([P, eye])
    for k in range(r - 1):
        column = rest[:, k]  # its first r are row k too: what is left of P is symmetric
        factors = right[k] * column[:r] / jnp.maximum(column[k], floor)
        rest = rest - column[:, None] * factors[None]
    pivots = jnp.sum(eye * rest[:r], axis=0)  # a gather would be a custom call on a TPU
    return rest[r:].T * lax.rsqrt(jnp.maximum(pivots, floor))[:, None]


def orthogonal(M: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The polar factor U Vᵀ of M = U Σ Vᵀ with ||M|| <= 1, by products (Jordan et al. 2024, Muon).

    Singular values from 1e-3 to 1 become 1 to 6e-4, smaller ones grow up to 6,000 times, and zeros
    stay.
    """
    for a, b, c in (_COARSE,) * 6 + (_FINE,) * 2:
        S = dot(M, M.T)
        M = a * M + dot(b * S + c * dot(S, S), M)
    return M


def sylvester(
    P: Float[Array, "r r"], Q: Float[Array, "r r"], R: Float[Array, "r r"], floor: Float[Array, ""]
) -> Float[Array, "r r"]:
    """The Z of P Z + Z Q = R, for symmetric P and Q with eigenvalues of at least `floor`.

    With U = (P + t)⁻¹ (P - t) and V alike from Q, it is Z = U Z V + W: the sum of all Uᵏ W Vᵏ, of
    which every turn takes twice as many terms (Smith 1968).
    """
    eye, eps = jnp.eye(len(P), dtype=P.dtype), float(jnp.finfo(P.dtype).eps)
    t = jnp.sqrt(floor * jnp.maximum(jnp.trace(P), jnp.trace(Q)))
    J, K = inverse_cholesky(P + t * eye, t), inverse_cholesky(Q + t * eye, t)
    P_inverse, Q_inverse = dot(J.T, J), dot(K.T, K)
    U, V = eye - 2 * t * P_inverse, eye - 2 * t * Q_inverse
    W = 2 * t * dot(dot(P_inverse, R), Q_inverse)

    def double(_, state):
        Z, U, V = state
        return Z + dot(dot(U, Z), V), dot(U, U), dot(V, V)

    # The slowest term decays by 1 - 4 sqrt(floor / trace), and floor / trace is some eps at least.
    turns = round(-math.log2(eps) / 2) + 4
    return lax.fori_loop(0, turns, double, (W, U, V))[0]
