"""The closed form from orthonormal frames: float32 error κ eps, where that of Grams is κ² eps.

With a = Â diag(σ) Uᵀ and bᵀ = B̂ diag(τ) Vᵀ, and λ as in `_solve`, the same (da, db) are

    da = [(h_a V - Â (F_a ∘ Âᵀ h_a V)) / (τ² + λ)] Vᵀ / s²      F_a = σ_i² / (σ_i² + τ_j² + λ)
    db = U [(Uᵀ h_b - (F_b ∘ Uᵀ h_b B̂) B̂ᵀ) / (σ² + λ)] / s²     F_b = τ_j² / (σ_i² + τ_j² + λ)

F is how much of what both factors can reach is left to the other one. Autodiff's h_a V has the
rounding error eps ||h_a|| in every column, a small one too, and column j ends up over τ_j: error
κ eps of g~, which float32 gradients do not allow to beat. To stay there, nothing may divide by τ²
before it is multiplied by something of size τ, so: σ and τ are singular values of the factors, not
roots of eigenvalues, h_a V is divided before it meets Vᵀ (the matrix V diag(1 / (τ² + λ)) Vᵀ would
mix the columns' errors), and each factor's part of the core Âᵀ G B̂ comes from its own gradient,
not from the other's.

The frames come from matrix products: rotating a factor into the eigenvectors of its Gram and
scaling its columns to one, twice (SVQB of Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002). So
sharded axes stay as they are. Householder's QR is no more accurate here and takes as long on a
CPU, but wants whole columns, one pair at a time.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorapro_jax._lapack import eigh, svd
from lorapro_jax._solve import dot, gram_left, gram_right, grams, shares

# The first leaves a condition number of about 2 sqrt(eps) κ, whose square, times eps, is how far
# the second leaves the frame from orthonormal: (2 κ eps)², below the unavoidable κ eps.
_ROTATIONS = 2
# In eps of the largest: of a rank-deficient factor the singular values that should be zero come
# out as up to 5, at ranks 4 to 128: 4 from `_orthonormal`'s floor under what it divides by.
_NOISE = 8


class Frames(NamedTuple):
    """Thin singular value decompositions of both factors, shared by every solve at one point."""

    A: Float[Array, "*m r"]  # Â: left singular vectors of a
    sigma: Float[Array, "r"]  # singular values of a, descending; 0 where left out
    U: Float[Array, "r r"]  # right singular vectors, in columns; 0 where left out
    B: Float[Array, "r *n"]  # B̂ᵀ: right singular vectors of b
    tau: Float[Array, "r"]  # singular values of b
    V: Float[Array, "r r"]  # left singular vectors of b, in columns
    damping: Float[Array, ""]  # λ, absolute, in the units of σ²


def frames(a: Float[Array, "*m r"], b: Float[Array, "r *n"], damping: Float[Array, ""]) -> Frames:
    """Both decompositions, and λ = damping · max(||a||², ||b||²) / r.

    Singular values are known to a few eps of the largest. Where sqrt(σ² + λ) is no larger, the
    direction is a rounding error, and is left out as a pseudo-inverse would. So `damping` may be
    zero and is never raised; with λ above the cut squared nothing is left out.
    """
    A, B, small = _orthonormal(a, b)
    W, values, Zt = svd(small)
    size = jnp.max(jnp.sum(values * values, axis=-1))
    absolute = (damping * size / a.shape[-1]).astype(a.dtype)
    cut = _NOISE * jnp.finfo(a.dtype).eps * values[:, :1]
    known = values * values + absolute > cut * cut
    sigma, tau = jnp.where(known, values, 0)
    U, V = jnp.where(known[:, None, :], jnp.swapaxes(Zt, -1, -2), 0)
    return Frames(dot(A, W[0]), sigma, U, dot(W[1].T, B), tau, V, absolute)


def _orthonormal(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """A, B and two (r, r) matrices S with a = A S_0 and b = S_1ᵀ B.

    A and B are orthonormal but for directions that a or b has no more of than rounding leaves.
    """
    info = jnp.finfo(a.dtype)
    small = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), (2, *[a.shape[-1]] * 2))
    for _ in range(_ROTATIONS):
        ((values, vectors),) = eigh(jnp.stack(grams(a, b)))
        # An eigenvalue is known to a few eps of the largest. `tiny` is for a factor of zeros.
        size = jnp.sqrt(jnp.maximum(values, 4 * info.eps * values[:, -1:]) + info.tiny)
        scaled = vectors / size[:, None, :]
        a, b = dot(a, scaled[0]), dot(scaled[1].T, b)
        undone = size[:, :, None] * jnp.swapaxes(vectors, -1, -2)
        small = jnp.stack([dot(x, y) for x, y in zip(undone, small, strict=True)])
    return a, b, small


def _inverse(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def _inverses(f: Frames) -> tuple[Array, Array]:
    """1 / (σ² + λ) and 1 / (τ² + λ); 0 where a direction is left out."""
    return _inverse(f.sigma * f.sigma + f.damping), _inverse(f.tau * f.tau + f.damping)


def _left_to_the_other(x: str, f: Frames) -> tuple[Array, Array]:
    """F_a and F_b for each choice of x."""
    p, q = f.sigma * f.sigma, f.tau * f.tau
    F_a, F_b = shares(x, p, q, f.damping, _inverse)
    return p[:, None] * F_a, q[None, :] * F_b


def step(
    f: Frames,
    h_a: Float[Array, "*m r"],
    h_b: Float[Array, "r *n"],
    s: Float[Array, ""],
    x: str = "sylvester",
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """(da, db) from the frames of the factors and the projections h_a = s G bᵀ, h_b = s aᵀ G."""
    P_inv, Q_inv = _inverses(f)
    F_a, F_b = _left_to_the_other(x, f)
    s2 = (s * s).astype(h_a.dtype)
    own_a, own_b = dot(h_a, f.V), dot(f.U.T, h_b)
    da = own_a - dot(f.A, F_a * gram_left(f.A, own_a))
    db = own_b - dot(F_b * gram_right(own_b, f.B), f.B)
    # over τ² + λ before Vᵀ, and over σ² + λ before U: see above
    return dot(da, (f.V * (Q_inv / s2)[None, :]).T), dot(f.U * (P_inv / s2)[None, :], db)


def weights(
    f: Frames,
    h_a: Float[Array, "*m r"],
    h_b: Float[Array, "r *n"],
    s: Float[Array, ""],
    x: str = "sylvester",
) -> Float[Array, "k k"]:
    """W of g~ = s [h_a | Â] W [B̂ᵀ; h_b]: see `_tangent`."""
    P_inv, Q_inv = _inverses(f)
    F_a, F_b = _left_to_the_other(x, f)
    core_a, core_b = dot(gram_left(f.A, h_a), f.V), dot(f.U.T, gram_right(h_b, f.B))
    s2 = (s * s).astype(h_a.dtype)
    of_a, of_b = (f.tau * Q_inv / s2)[None, :], (f.sigma * P_inv / s2)[:, None]
    core = F_a * core_a * of_a + F_b * core_b * of_b
    return jnp.block([[f.V * of_a, jnp.zeros_like(core)], [-core, of_b * f.U.T]])


def solve(
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    h_a: Float[Array, "*m r"],
    h_b: Float[Array, "r *n"],
    s: Float[Array, ""],
    damping: Float[Array, ""],
    x: str = "sylvester",
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """`_solve.solve` by this route."""
    return step(frames(a, b, damping), h_a, h_b, s, x)
