"""LoRA-Pro's Muon with one thing changed at a time.

muon-beta-0.9      momentum of 0.9 for 0.95
muon-plain         without Nesterov's look ahead
muon-unretracted   without `lp.retract`
muon-dense         the library's own, by an SVD of dense arrays; the next are written so too
muon-longer-side   the size with max(m, n) for (m + n) / 2
muon-one-size      the same size for all pairs
muon-sandwich      LoRA-Muon's step
muon-carried       the momentum is a tangent vector, carried over to the new factors
muon-scaled        rows and columns scaled before the polar factor
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorapro_jax as lp
from experiments.choices.pairs import Rule, Step, basis, by_pairs, factors, known, msign, tangent
from experiments.choices.pairs import inverse_root as root
from experiments.finetune.config import RunConfig
from experiments.finetune.methods import Method, layout_of

BETA, RMS, B2, FLOOR = 0.95, 0.2, 0.999, 0.1


def _mean(old: jax.Array, new: jax.Array) -> jax.Array:
    return BETA * old + (1 - BETA) * new


def _length(m: int, n: int) -> float:
    return RMS * ((m + n) / 2) ** 0.5


def _averaging(direction: Callable[..., Step], s: float) -> Rule:
    """The momentum as a plain average of (h_a, h_b), with Nesterov's look ahead."""

    def update(a, b, h_a, h_b, mu: Step) -> tuple[Step, Step]:
        mu = _mean(mu[0], h_a), _mean(mu[1], h_b)
        return direction(a, b, _mean(mu[0], h_a), _mean(mu[1], h_b), s), mu

    return Rule(lambda a, b: (jnp.zeros_like(a), jnp.zeros_like(b)), update)


def _dense(length: Callable[[int, int], float] = _length) -> Callable[..., Step]:
    def direction(a, b, h_a, h_b, s: float) -> Step:
        f = basis(a, b)
        T = known(f, h_a, h_b, s)
        return factors(f, length(*T.shape) * msign(T), s)

    return direction


def _sandwich(a, b, h_a, h_b, s: float) -> Step:
    """LoRA-Muon (arXiv:2606.12921): each factor's own polar factor, between its partner's roots."""
    P, Q = root(a.T @ a), root(b @ b.T)
    half = _length(len(a), b.shape[1]) / (2 * s)
    return half * msign(h_a @ Q) @ Q, half * P @ msign(P @ h_b)


def _carried(s: float) -> Rule:
    """The momentum is an (m, n) tangent vector, projected anew at every step's factors."""

    def update(a, b, h_a, h_b, mu: jax.Array) -> tuple[Step, jax.Array]:
        f = basis(a, b)
        now = known(f, h_a, h_b, s)
        mu = _mean(tangent(f, mu), now)
        return factors(f, _length(*mu.shape) * msign(_mean(mu, now)), s), mu

    return Rule(lambda a, b: jnp.zeros_like(a @ b), update)


def _scaled(s: float) -> Rule:
    """Rows and columns divided by Adafactor's root mean squares before the polar factor."""

    def update(a, b, h_a, h_b, state: tuple) -> tuple[Step, tuple]:
        *mu, row, col = state
        f = basis(a, b)
        now = known(f, h_a, h_b, s) ** 2
        row, col = (
            B2 * old + (1 - B2) * jnp.mean(now, axis=axis)
            for old, axis in ((row, 1), (col, 0))
        )  # fmt: skip
        left, right = ((x / positive(jnp.mean(x)) + FLOOR) ** -0.5 for x in (row, col))
        mu = _mean(mu[0], h_a), _mean(mu[1], h_b)
        T = known(f, _mean(mu[0], h_a), _mean(mu[1], h_b), s) * left[:, None] * right[None]
        return factors(f, _length(*T.shape) * msign(tangent(f, T)), s), (*mu, row, col)

    def positive(x: jax.Array) -> jax.Array:
        return jnp.maximum(x, jnp.finfo(x.dtype).tiny)

    def init(a, b) -> tuple:
        zeros = jnp.zeros_like
        return zeros(a), zeros(b), zeros(a[:, 0]), zeros(b[0])

    return Rule(init, update)


DENSE: dict[str, Callable[[float], Rule]] = {
    "dense": functools.partial(_averaging, _dense()),
    "longer-side": functools.partial(_averaging, _dense(lambda m, n: RMS * max(m, n) ** 0.5)),
    "one-size": functools.partial(_averaging, _dense(lambda m, n: RMS * 576**0.5)),
    "sandwich": functools.partial(_averaging, _sandwich),
    "carried": _carried,
    "scaled": _scaled,
}
ARGUMENTS: dict[str, dict[str, Any]] = {"beta-0.9": {"beta": 0.9}, "plain": {"nesterov": False}}
UNRETRACTED = "unretracted"


def _method(run: RunConfig, rate: optax.Schedule, name: str) -> optax.GradientTransformation:
    layout, adam = layout_of(run), optax.scale_by_adam(run.b1, run.b2, run.eps)
    if name in DENSE:
        direction = by_pairs(DENSE[name](run.scale), adam)
    else:
        own = ARGUMENTS.get(name, {})
        direction = lp.scale_by_lorapro_muon(run.scale, layout=layout, **own)
    chain = [direction, optax.scale_by_learning_rate(rate)]
    if name != UNRETRACTED:
        chain.append(lp.retract(run.scale, layout=layout))
    return optax.chain(*chain)


VARIANTS = {
    f"muon-{name}": Method(True, functools.partial(_method, name=name))
    for name in (*DENSE, *ARGUMENTS, UNRETRACTED)
}
