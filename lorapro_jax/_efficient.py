"""Efficient mode: Adam on the projected factors, with the state of plain LoRA under Adam.

The moments of a group of pairs lie in one array, so that a program has one Adam a group and not two
a pair: half of the time that optax's takes to compile.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from lorapro_jax._batch import Adam, Group, Problem, average, factor_zeros, first_steps
from lorapro_jax._closed_form import ClosedForm
from lorapro_jax._pairwise import Rule, each


class EfficientState(NamedTuple):
    """State of efficient mode: the moments of (da, db), by groups of pairs as in `FullState`."""

    count: Int[Array, ""]  # steps taken
    mu_a: Any  # {group: (pairs or *batch, *m, r)}, float32 or mu_dtype
    mu_b: Any  # {group: (pairs or *batch, r, *n)}
    nu_a: Any  # as mu_a, in float32 or better
    nu_b: Any
    rest: Any  # plain Adam's state for the leaves in no pair


def efficient_rule(adam: Adam, form: ClosedForm) -> Rule:
    """The rule of efficient mode."""

    def init(group: Group, leaves: Sequence[Any]) -> tuple[Array, ...]:
        return *factor_zeros(group, leaves, adam.mu_dtype), *factor_zeros(group, leaves)

    def one(p: Problem, group: Group, moments: tuple, count: Array):
        mu, nu = moments[:2], moments[2:]
        _, taken = first_steps(p, group, form)
        moved = [direction(g, m, v, count, adam) for g, m, v in zip(taken, mu, nu, strict=True)]
        (da, mu_a, nu_a), (db, mu_b, nu_b) = moved
        return (da, db), lambda a, b: (mu_a, mu_b, nu_a, nu_b)

    return Rule(EfficientState, init, each(one))


def direction(
    g: Array, mu: Array, nu: Array, count: Array, adam: Adam
) -> tuple[Array, Array, Array]:
    """Adam's direction and its new moments."""
    b1, b2, eps, _ = adam
    mu, nu = average(g, mu, b1), average(g * g, nu, b2)
    one, two = (1 - jnp.asarray(decay, g.dtype) ** count for decay in (b1, b2))
    return (mu.astype(g.dtype) / one) / (jnp.sqrt(nu / two) + eps), mu, nu
