"""The LoRA-Pro closed form for one pair: K = K0 + s a b, a (m, r), b (r, n).

Autodiff gives h_a = s G bᵀ and h_b = s aᵀ G, two projections of the full gradient G. The
factor updates whose product J(da, db) = s (da b + a db) is closest to G are, with P = aᵀa,
Q = b bᵀ, M = aᵀ h_a = h_b bᵀ and a damping λ,

    Y  = U [(Uᵀ M V)_ij / (p_i + q_j + λ)] Vᵀ      from P = U diag(p) Uᵀ, Q = V diag(q) Vᵀ
    da = (h_a - a Y) (Q + λ)⁻¹ / s²
    db = (P + λ)⁻¹ (h_b - Y b) / s²

which is exactly (JᵀJ + s² λ I)⁻¹ (h_a, h_b): no inverse of a near-singular matrix, no case
for b = 0. λ → 0 gives Theorem 2.1 of arXiv:2407.18242 with the Sylvester X, the minimum-norm
minimiser J⁺G.

The work is in three steps: `grams` and `shared_core` contract the factors to (r, r),
`coefficients` does all that is cubic in r, `combine` multiplies the factors by (r, r) matrices.
m and n may each be several axes: they are contracted whole, nothing is reshaped, so that a
sharded axis stays as it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorapro_jax._lapack import eigh
from lorapro_jax._sharding import contract

CHOICES = ("sylvester", "zero", "symmetric", "sequential")  # of x: which minimiser


class Spectrum(NamedTuple):
    """The eigendecompositions of one pair's Grams, shared by every solve at the same point."""

    p: Float[Array, "*batch r"]  # eigenvalues of P = aᵀa, ascending, >= 0
    U: Float[Array, "*batch r r"]  # its eigenvectors, in columns
    q: Float[Array, "*batch r"]  # eigenvalues of Q = b bᵀ
    V: Float[Array, "*batch r r"]
    damping: Float[Array, "*batch"]  # λ, absolute, in the units of P and Q


class Coefficients(NamedTuple):
    """The small matrices of the update: s² da = h_a H_a + a C_a, s² db = H_b h_b + C_b b."""

    H_a: Float[Array, "*batch r r"]
    C_a: Float[Array, "*batch r r"]
    H_b: Float[Array, "*batch r r"]
    C_b: Float[Array, "*batch r r"]


def widen(x: Array) -> Array:
    """`x` in float32 or better: bf16 and f16 have no eigh, and no digits to spare."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def dot(x: Array, y: Array) -> Array:
    return contract(x, y, [x.ndim - 1], [0])


def gram_left(x: Float[Array, "*m r"], y: Float[Array, "*m k"]) -> Float[Array, "r k"]:
    """xᵀ y, contracted over every axis but the last."""
    axes = list(range(x.ndim - 1))
    return contract(x, y, axes, axes)


def gram_right(x: Float[Array, "r *n"], y: Float[Array, "k *n"]) -> Float[Array, "r k"]:
    """x yᵀ, contracted over every axis but the first."""
    axes = list(range(1, x.ndim))
    return contract(x, y, axes, axes)


def grams(
    a: Float[Array, "*m r"], b: Float[Array, "r *n"]
) -> tuple[Float[Array, "r r"], Float[Array, "r r"]]:
    """P = aᵀa and Q = b bᵀ."""
    return gram_left(a, a), gram_right(b, b)


def shared_core(b: Float[Array, "r *n"], h_b: Float[Array, "r *n"]) -> Float[Array, "r r"]:
    """M = h_b bᵀ, which is aᵀ h_a too: the part of the gradient that both factors see.

    Taken from b, whose rows lie in one piece: 2 CPU cores need half the time that aᵀ h_a takes.
    """
    return gram_right(h_b, b)


def spectrum(P: Float[Array, "r r"], Q: Float[Array, "r r"], damping: Float[Array, ""]) -> Spectrum:
    """Eigendecompositions of P and Q, and λ = damping · max(tr P, tr Q) / r.

    λ is relative, and positive as long as one of the factors is not zero. A damping under the
    working precision is raised to it: below that, the eigenvalues of a rank-deficient Gram are
    rounding errors, and dividing by them would return noise.
    """
    (p, U), (q, V) = eigh(P, Q)
    p, q = jnp.maximum(p, 0), jnp.maximum(q, 0)  # a Gram has no negative eigenvalue; rounding does
    info = jnp.finfo(P.dtype)
    mean = jnp.maximum(jnp.sum(p), jnp.sum(q)) / P.shape[0]
    # `tiny` only counts where both factors are zero: 0 / tiny = 0, the right update.
    absolute = jnp.maximum(damping, info.eps) * mean + info.tiny
    return Spectrum(p, U, q, V, absolute.astype(P.dtype))


def shares(
    x: str,
    p: Float[Array, "r"],
    q: Float[Array, "r"],
    damping: Float[Array, ""],
    over: Callable[[Array], Array] = jnp.reciprocal,
) -> tuple[Float[Array, "r r"], Float[Array, "r r"]]:
    """What Uᵀ M V is multiplied by to have Uᵀ Y V, the Y of da and that of db; `over` is 1 / y.

    `x` chooses among the minimisers, which all have the same product: "sylvester" the
    minimum-norm one, "zero" the paper's X = 0, which leaves the core to b, "symmetric" half of the
    core on each side, "sequential" all of it to the partner of the larger factor.
    """
    if x == "sylvester":
        F = over(p[:, None] + q[None, :] + damping)
        return F, F
    none = jnp.zeros((len(p), len(q)), p.dtype)
    in_a, in_b = none + over(p + damping)[:, None], none + over(q + damping)[None, :]
    if x == "zero":
        return in_a, none
    if x == "symmetric":
        return in_a / 2, in_b / 2
    if x == "sequential":
        first = jnp.sum(p) >= jnp.sum(q)
        return jnp.where(first, in_a, 0), jnp.where(first, 0, in_b)
    raise ValueError(f"x must be one of {', '.join(CHOICES)}, not {x!r}")


def _rotated(spec: Spectrum, M: Array, x: str) -> tuple[Array, Array]:
    """Uᵀ Y V for the Y of da and for that of db."""
    F_a, F_b = shares(x, spec.p, spec.q, spec.damping)
    core = dot(dot(spec.U.T, M), spec.V)
    return core * F_a, core * F_b


def coefficients(spec: Spectrum, M: Float[Array, "r r"], x: str = "sylvester") -> Coefficients:
    """The (r, r) matrices that turn (h_a, h_b) into (da, db); `x` as in `shares`."""
    p, q = (spec.p + spec.damping)[:, None], (spec.q + spec.damping)[None, :]
    Y_a, Y_b = _rotated(spec, M, x)
    return Coefficients(
        dot(spec.V / q, spec.V.T),
        dot(dot(spec.U, -Y_a / q), spec.V.T),
        dot(spec.U / p.T, spec.U.T),
        dot(dot(spec.U, -Y_b / p), spec.V.T),
    )


def combine(
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    h_a: Float[Array, "*m r"],
    h_b: Float[Array, "r *n"],
    s: Float[Array, ""],
    c: Coefficients,
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """(da, db) = (h_a H_a + a C_a, H_b h_b + C_b b) / s².

    XLA takes the division into the sum. It compiles a sum alone anew for every group of pairs.
    """
    over = (1 / (s * s)).astype(a.dtype)
    return (dot(h_a, c.H_a) + dot(a, c.C_a)) * over, (dot(c.H_b, h_b) + dot(c.C_b, b)) * over


def weights(
    spec: Spectrum, M: Float[Array, "r r"], s: Float[Array, ""], x: str = "sylvester"
) -> tuple[Float[Array, "k k"], tuple[Float[Array, "r r"], Float[Array, "r r"]]]:
    """W and (S_a, S_b) of g~ = s [h_a | a S_a] W [S_b b; h_b]; a S_a and S_b b are of size one.

    W is of size κ. With a and b in their place it would be of size κ², as the coefficients are, and
    g~², which takes it twice, would have an error of κ⁴ eps.
    """
    p, q = jnp.sqrt(spec.p + spec.damping)[:, None], jnp.sqrt(spec.q + spec.damping)[None, :]
    Y_a, Y_b = _rotated(spec, M, x)
    S_a, S_b = spec.U / p.T, (spec.V / q).T
    core = p * Y_a / q + q * Y_b / p
    s2 = (s * s).astype(M.dtype)
    return jnp.block([[S_b.T, jnp.zeros_like(core)], [-core, S_a.T]]) / s2, (S_a, S_b)


def solve(
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    h_a: Float[Array, "*m r"],
    h_b: Float[Array, "r *n"],
    s: Float[Array, ""],
    damping: Float[Array, ""],
    x: str = "sylvester",
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """(da, db) for one pair, from the projections h_a = s G bᵀ and h_b = s aᵀ G."""
    spec = spectrum(*grams(a, b), damping)
    return combine(a, b, h_a, h_b, s, coefficients(spec, shared_core(b, h_b), x))


def tangent(
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    da: Float[Array, "*m r"],
    db: Float[Array, "r *n"],
) -> tuple[Float[Array, "*m k"], Float[Array, "k *n"]]:
    """L and R of rank k = 2 r with da b + a db = L R."""
    return jnp.concatenate([da, a], axis=-1), jnp.concatenate([b, db], axis=0)


def equivalent_gradient(
    a: Float[Array, "*m r"],
    b: Float[Array, "r *n"],
    da: Float[Array, "*m r"],
    db: Float[Array, "r *n"],
    s: Float[Array, ""],
    like: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """g~ = J(da, db) = s (da b + a db), the step of the full weight that (da, db) stands for.

    Sharded as `like` is, if given.
    """
    L, R = tangent(a, b, da, db)
    return contract(L * s.astype(a.dtype), R, [a.ndim - 1], [0], like=like)


def project(
    a: Float[Array, "*m r"], b: Float[Array, "r *n"], U: Float[Array, "..."], s: Float[Array, ""]
) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
    """The factor gradients (s U bᵀ, s aᵀ U) that a full-weight direction U would have caused."""
    m, n = a.ndim - 1, b.ndim - 1
    rows, cols = list(range(m)), list(range(m, m + n))
    h_a = contract(U, b * s.astype(b.dtype), cols, list(range(1, n + 1)), like=a)
    h_b = contract(a * s.astype(a.dtype), U, rows, rows, like=b)
    return h_a, h_b
