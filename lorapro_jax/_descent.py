"""A direction for pairs as a whole optimizer: the learning rate, the retraction, and decay."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lorapro_jax._checks import check_between
from lorapro_jax._groups import Scale
from lorapro_jax._layouts import Layout
from lorapro_jax._pairwise import Rule, Step, in_pairs, pairwise
from lorapro_jax._retraction import retraction_rule
from lorapro_jax._tangent import Factors


def descent(
    direction: Rule,
    others: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    scale: Scale,
    *,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
    radius: Any,
    damping: Any,
    layout: Layout | None,
    require_pairs: bool,
) -> optax.GradientTransformationExtraArgs:
    """The chain that `lorapro_adamw` and `lorapro_muon` are; `others` for leaves in no pair."""
    check_between("learning_rate", learning_rate, 0.0, jnp.inf)
    check_between("weight_decay", weight_decay, 0.0, jnp.inf)
    common: Any = {"layout": layout, "require_pairs": require_pairs}
    rules = direction, rate_rule(learning_rate), retraction_rule(radius, damping)
    pairs = pairwise(*rules, scale=scale, **common)

    def decay(share: float) -> optax.GradientTransformation:
        return optax.add_decayed_weights(
            lambda n: -share * scheduled(learning_rate, n) * scheduled(weight_decay, n), mask
        )

    return optax.chain(
        in_pairs(pairs, others, **common), in_pairs(decay(0.5), decay(1.0), **common)
    )


def rate_rule(learning_rate: optax.ScalarOrSchedule) -> Rule:
    """`optax.scale_by_learning_rate` for stacked pairs."""

    def update(p: Factors, step: Step, state: tuple, count: Array):
        rate = jnp.asarray(scheduled(learning_rate, count - 1), p.a.dtype)
        return (-rate * step[0], -rate * step[1]), state

    return Rule(update)


def scheduled(value: Any, count: Any) -> Any:
    """A number, or that of a schedule."""
    return value(count) if callable(value) else value
