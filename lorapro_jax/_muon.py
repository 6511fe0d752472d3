"""Muon's step of the full weight, as far as a pair can take it.

With m an average of the factors' gradients and T its tangent vector, Muon's direction is msign(T),
U Vᵀ of T = U Σ Vᵀ: as large in every direction that T has. A step of the factors reaches the
tangent vector nearest to it. It is found on a core of (2r, 2r), by products only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lorapro_jax._checks import check_between, check_positive
from lorapro_jax._descent import descent
from lorapro_jax._groups import Group, Scale, factor_zeros, over_batch
from lorapro_jax._layouts import Layout
from lorapro_jax._moments import largest, mean
from lorapro_jax._pairwise import Rule, Step, in_pairs, pairwise
from lorapro_jax._tangent import (
    Factors,
    clipped,
    frames,
    polar,
    rescaled,
    tangent,
    times,
    to_factors,
)


class MuonState(NamedTuple):
    """State of Muon mode, {group: array}; in the factors' dtype, float32 or better, or mu_dtype."""

    mu_a: Any  # (*batch, *m, r) averages of h_a
    mu_b: Any  # (*batch, r, *n) averages of h_b


def muon_rule(beta: Any, nesterov: bool, rms: Any, damping: Any, mu_dtype: Any) -> Rule:
    """The rule of Muon mode, its numbers checked."""
    check_between("beta", beta, 0.0, 1.0)
    check_positive("rms", rms)
    check_between("damping", damping, 0.0, jnp.inf)

    def init(group: Group, leaves: Sequence[Any]) -> tuple[Array, ...]:
        return factor_zeros(group, leaves, mu_dtype)

    def one(p: Factors, h: Step, state: tuple[Array, ...]):
        f, dtype = frames(p, damping), p.a.dtype
        mu = mean(h[0], state[0], beta), mean(h[1], state[1], beta)
        ahead = (mean(h[0], mu[0], beta), mean(h[1], mu[1], beta)) if nesterov else mu
        size = largest(*ahead)
        m, n = (x.size // len(f.S_a) for x in (p.a, p.b))
        length = jnp.asarray(rms, dtype) * ((m + n) / 2) ** 0.5
        T = tangent(f, ahead[0] / size, ahead[1] / size)
        # Averages of h_a and h_b are no projections of one matrix; those of T are.
        T = rescaled(f, T, jnp.ones_like(p.a[..., 0]), jnp.ones_like(p.b[0]))
        stored = mu[0].astype(state[0].dtype), mu[1].astype(state[1].dtype)
        # On frames that damping leaves short of orthonormal its norm could be above msign's.
        U = clipped(polar(f, T, damping), (min(m, n, 2 * len(f.S_a)) / (m * n)) ** 0.5)
        return to_factors(f, times(U, length)), stored

    def update(p: Factors, h: Step, state: tuple[Array, ...], count: Array):
        del count
        return over_batch(one, p.s.ndim)(p, h, state)

    return Rule(update, MuonState, init)


def scale_by_lorapro_muon(
    scale: Scale,
    *,
    beta: float | Array = 0.95,
    nesterov: bool = True,
    rms: float | Array = 0.2,
    adam_b1: float | Array = 0.9,
    adam_b2: float | Array = 0.999,
    adam_eps: float | Array = 1e-8,
    damping: float | Array = 1e-6,
    mu_dtype: Any = None,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Muon on the equivalent gradient of each pair: what full fine-tuning's Muon would do.

    The momentum is an average of the factors' gradients, (m + n) r numbers a pair: half of LoRA
    under Adam. Of its tangent vector T comes the polar factor msign(T), and of that the (da, db)
    whose product is nearest. Singular values of T below a thousandth of its norm, the root of
    `damping`, stay small; zeros stay. Leaves in no pair get `optax.scale_by_adam`.

    Args:
      scale, damping, layout, require_pairs: as in `lorapro`.
      beta: decay of the momentum.
      nesterov: whether the direction is of the momentum that a second look at the gradient makes.
      rms: the direction's singular values are rms · sqrt((m + n) / 2). With the default, that of
        Adam's directions, learning rates are those of AdamW.
      adam_b1, adam_b2, adam_eps: of the leaves in no pair.
      mu_dtype: dtype of the momentum.

    Returns:
      A GradientTransformationExtraArgs of ascent directions: chain it with
      `optax.scale_by_learning_rate`, and end the chain with `retract`.

    Raises:
      ValueError: beta outside [0, 1) in float32, rms of 0, a state of another mode or of other
        pairs, and whatever `lorapro` raises.

    Example:
      >>> import jax.numpy as jnp, lorapro_jax as lp, optax
      >>> params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
      >>> tx = optax.chain(lp.scale_by_lorapro_muon(2.0), optax.scale(-1e-3), lp.retract(2.0))
      >>> optax.tree.get(tx.init(params), "mu_a")["q"].shape
      (1, 6, 2)

    References:
      Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024; Liu et al.,
      arXiv:2502.16982 (rms). Riemannion, arXiv:2507.12142, takes the polar factor in the tangent
      space of fixed-rank matrices; LoRA-Muon, arXiv:2606.12921, that of each factor's gradient;
      AdaPreLoRA, arXiv:2605.08734, scales rows and columns instead.
    """
    common: Any = {"layout": layout, "require_pairs": require_pairs}
    pairs = pairwise(muon_rule(beta, nesterov, rms, damping, mu_dtype), scale=scale, **common)
    others = optax.scale_by_adam(adam_b1, adam_b2, adam_eps, mu_dtype=mu_dtype)
    return in_pairs(pairs, others, **common)


def lorapro_muon(
    learning_rate: optax.ScalarOrSchedule,
    scale: Scale,
    *,
    beta: float | Array = 0.95,
    nesterov: bool = True,
    rms: float | Array = 0.2,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    radius: float | Array | None = 0.05,
    adam_b1: float | Array = 0.9,
    adam_b2: float | Array = 0.999,
    adam_eps: float | Array = 1e-8,
    damping: float | Array = 1e-6,
    mu_dtype: Any = None,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pro's Muon: the direction, the learning rate, the retraction, and decay.

        optax.chain(scale_by_lorapro_muon(...), scale_by_learning_rate(rate), retract(...), decay)

    Whatever stands before or after it acts as on `optax.contrib.muon`. Leaves in no pair get
    `optax.adamw`, with the same rate and decay.

    Args:
      learning_rate: a number or an optax schedule; full fine-tuning's rates are a good start.
      scale: as in `lorapro`.
      beta, nesterov, rms, adam_b1, adam_b2, adam_eps, mu_dtype: as in `scale_by_lorapro_muon`.
      weight_decay, mask: as in `lorapro_adamw`.
      radius: as in `retract`.
      damping, layout, require_pairs: as in `lorapro`.

    Returns:
      A GradientTransformationExtraArgs whose updates are to be added to the parameters.

    Raises:
      ValueError: a negative rate or decay, and whatever `scale_by_lorapro_muon` raises.

    Example:
      >>> import jax.numpy as jnp, lorapro_jax as lp
      >>> params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
      >>> tx = lp.lorapro_muon(1e-3, scale=2.0)
      >>> state = tx.init(params)

    References:
      As of `scale_by_lorapro_muon`.
    """
    return descent(
        muon_rule(beta, nesterov, rms, damping, mu_dtype),
        optax.adam(learning_rate, adam_b1, adam_b2, adam_eps, mu_dtype=mu_dtype),
        learning_rate,
        scale,
        weight_decay=weight_decay,
        mask=mask,
        radius=radius,
        damping=damping,
        layout=layout,
        require_pairs=require_pairs,
    )
