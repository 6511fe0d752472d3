"""The closed form by either route: Grams (`_solve`) or orthonormal frames (`_orthogonal`)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorapro_jax import _orthogonal, _solve
from lorapro_jax._checks import check_between, check_one_of
from lorapro_jax._orthogonal import Frames
from lorapro_jax._solve import Spectrum
from lorapro_jax._tangent import Tangent

SOLVERS = ("gram", "qr")


class ClosedForm(NamedTuple):
    """Which of the minimisers, how much damped, and by which route."""

    x: str  # one of _solve.CHOICES
    damping: Any  # relative
    solver: str  # one of SOLVERS

    def check(self) -> None:
        """Raises ValueError for a field out of its range."""
        check_one_of("x", self.x, _solve.CHOICES)
        check_between("damping", self.damping, 0.0, float("inf"))
        check_one_of("solver", self.solver, SOLVERS)

    def decompose(self, a: Float[Array, "*m r"], b: Float[Array, "r *n"]) -> Spectrum | Frames:
        """What all solves at one point share."""
        damping = jnp.asarray(self.damping, a.dtype)
        if self.solver == "qr":
            return _orthogonal.frames(a, b, damping)
        return _solve.spectrum(*_solve.grams(a, b), damping)

    def step(
        self,
        known: Spectrum | Frames,
        a: Float[Array, "*m r"],
        b: Float[Array, "r *n"],
        h_a: Float[Array, "*m r"],
        h_b: Float[Array, "r *n"],
        s: Float[Array, ""],
        core: Float[Array, "r r"] | None = None,
    ) -> tuple[Float[Array, "*m r"], Float[Array, "r *n"]]:
        """(da, db) from the projections h_a = s G bᵀ and h_b = s aᵀ G; `core` is aᵀ h_a."""
        if isinstance(known, Frames):
            return _orthogonal.step(known, h_a, h_b, s, self.x)
        M = _solve.shared_core(b, h_b) if core is None else core
        return _solve.combine(a, b, h_a, h_b, s, _solve.coefficients(known, M, self.x))

    def tangent(
        self,
        known: Spectrum | Frames,
        a: Float[Array, "*m r"],
        b: Float[Array, "r *n"],
        h_a: Float[Array, "*m r"],
        h_b: Float[Array, "r *n"],
        s: Float[Array, ""],
    ) -> Tangent:
        """g~ = s (da b + a db) of `step`, without the step."""
        if isinstance(known, Frames):
            W = _orthogonal.weights(known, h_a, h_b, s, self.x)
            return Tangent(h_a, known.A, known.B, h_b, W)
        W, S = _solve.weights(known, _solve.shared_core(b, h_b), s, self.x)
        return Tangent(h_a, a, b, h_b, W, S)
