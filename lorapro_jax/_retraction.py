"""From a step of the factors to a step of their product, as it was meant.

Factors that move by (da, db) change the product by da b + a db + da db. The last term is nobody's
intent, and right after b = 0 it is as large as the others. So the partner of the larger factor
moves first, and the larger one is fitted to where its partner then is (here a is the larger one):

    b' = b + db,   a' = a + da (b b'ᵀ + λ) (b' b'ᵀ + λ)⁻¹

the least-squares fit of a' b' to a b + da b + a db: half a sweep of alternating least squares.
Along directions in which b' has next to nothing (λ, the frames' damping) it is a's own step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lorapro_jax._checks import check_between
from lorapro_jax._groups import Group, Scale, factor_zeros, over_batch
from lorapro_jax._layouts import Layout
from lorapro_jax._moments import mean_root, positive
from lorapro_jax._pairwise import Rule, Step, pairwise
from lorapro_jax._sharding import dot, gram_left, gram_right
from lorapro_jax._small import inverse_cholesky
from lorapro_jax._tangent import Factors, ridge

_GROWTH, _DECAY = 1.2, 0.5  # of a step's size over the recent ones'; of their running mean


class RetractState(NamedTuple):
    """State of `retract`, {group: array}."""

    recent: Any  # (*batch,) running root mean square of the steps' sizes
    bounded: Any  # (*batch,) in how many steps the bound acted


def retract(
    scale: Scale,
    *,
    radius: float | Array | None = 0.05,
    damping: float | Array = 1e-6,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The last of a chain: makes each pair's product move by da b + a db, as the chain meant.

    Added to the factors as they are, (da, db) would move the product by da db too. So one factor
    takes its step, and the other the step that fits the first one's new value. A step may be larger
    than the recent ones by a fifth; what is above is cut, unless it is small beside the factors.
    Adam's first directions are large, and at a high rate training does not recover from them.

    Args:
      scale, damping, layout, require_pairs: as in `lorapro`.
      radius: what a step may always have, in units of s max(tr aᵀa, tr b bᵀ) / r; 0.05 of it is
        what LoRA's own steps have at its best rates. None: no bound.

    Returns:
      A GradientTransformationExtraArgs; leaves in no pair pass through. `lp.diagnose` tells from
      its state how often the bound acted.

    Raises:
      ValueError: a negative radius, and whatever `lorapro` raises.

    Example:
      >>> import lorapro_jax as lp, optax
      >>> tx = optax.chain(lp.lorapro(2.0), optax.sgd(0.1), lp.retract(2.0))

    References:
      Absil and Oseledets, Low-rank retractions: a survey and new results, 2015.
    """
    common: Any = {"layout": layout, "require_pairs": require_pairs, "gradients": False}
    return pairwise(retraction_rule(radius, damping), scale=scale, **common)


def retraction_rule(radius: Any, damping: Any) -> Rule:
    """The rule of `retract`."""
    check_between("damping", damping, 0.0, float("inf"))
    if radius is not None:
        check_between("radius", radius, 0.0, float("inf"))

    def init(group: Group, leaves: Sequence[Any]) -> tuple[Array, ...]:
        a, _ = factor_zeros(group, leaves)
        each = jnp.sum(a, axis=range(len(group.batch), a.ndim))
        return each, each.astype(jnp.int32)

    def one(p: Factors, step: Step, state: tuple[Array, ...]):
        recent, bounded = state
        P, Q = gram_left(p.a, p.a), gram_right(p.b, p.b)
        da, db = gram_left(step[0], step[0]), gram_right(step[1], step[1])
        # s sqrt(||da b||² + ||a db||²), the norm of s (da b + a db) where its terms are orthogonal.
        # Of the sum itself it would be a difference, and a rounding error where that is small.
        size = p.s * jnp.sqrt(jnp.maximum(jnp.sum(da * Q) + jnp.sum(P * db), 0))
        factor = jnp.ones((), P.dtype)
        if radius is not None:
            mean = jnp.maximum(jnp.trace(P), jnp.trace(Q)) / len(P)
            bound = jnp.maximum(_GROWTH * recent, radius * p.s * mean)
            factor = bound / positive(jnp.maximum(size, bound))
        recent = mean_root(factor * size, recent, _DECAY)
        bounded = bounded + (factor < 1).astype(bounded.dtype)
        step = factor * step[0], factor * step[1]
        da, db = (jnp.where(factor > 0, factor**2 * x, 0) for x in (da, db))  # also where infinite
        return fitted(p, P, Q, step, (da, db), damping), (recent, bounded)

    def update(p: Factors, step: Any, state: Any, count: Array):
        del count
        return over_batch(one, p.s.ndim)(p, step, state)

    return Rule(update, RetractState, init)


def fitted(p: Factors, P: Array, Q: Array, step: Step, grams: Step, damping: Any) -> Step:
    """The step that moves the product by da b + a db, up to the fit; `grams` are da's and db's."""
    da, db = step
    b_first = jnp.trace(P) >= jnp.trace(Q)
    old = jnp.where(b_first, Q, P)  # of the factor that moves first
    mixed = jnp.where(b_first, gram_right(p.b, db), gram_left(p.a, da))
    new = old + mixed + mixed.T + jnp.where(b_first, grams[1], grams[0])
    floor = jnp.maximum(ridge(P, Q, damping), ridge(new, new, damping))
    eye = jnp.eye(len(P), dtype=P.dtype)
    J = inverse_cholesky(new + floor * eye, floor)
    fit = dot(old + mixed + floor * eye, dot(J.T, J))
    return dot(da, jnp.where(b_first, fit, eye)), dot(jnp.where(b_first, eye, fit.T), db)
