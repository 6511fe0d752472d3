"""A rule for one pair as an optax transformation, without regard to speed: for comparisons only.

A pair is two siblings `lora_a`, (*batch, m, r), and `lora_b`, (*batch, r, n). LAPACK and arrays of
(m, n) are welcome here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

Step = tuple[jax.Array, jax.Array]


class Rule(NamedTuple):
    """init(a, b) -> state; update(a, b, h_a, h_b, state) -> (ascent direction, state)."""

    init: Callable[[jax.Array, jax.Array], Any]
    update: Callable[..., tuple[Step, Any]]


def by_pairs(rule: Rule, others: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule for every pair of a tree, `others` for the leaves in none."""

    def found(tree: Any) -> dict[str, Step]:
        leaves = {
            keystr(path, simple=True, separator="/"): x
            for path, x in jax.tree.leaves_with_path(tree)
        }
        ends = {name.removesuffix("lora_a") for name in leaves if name.endswith("lora_a")}
        return {end: (leaves[f"{end}lora_a"], leaves[f"{end}lora_b"]) for end in sorted(ends)}

    def over_batch(fun: Callable, axes: int) -> Callable:
        for _ in range(axes):
            fun = jax.vmap(fun)
        return fun

    def init(params: Any) -> tuple:
        pairs = found(params)
        states = {name: over_batch(rule.init, a.ndim - 2)(a, b) for name, (a, b) in pairs.items()}
        return states, others.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple:
        states, rest = state
        directions, rest = others.update(updates, rest, params)
        steps, gradients = {}, found(updates)
        for name, (a, b) in found(params).items():
            args = a, b, *gradients[name], states[name]
            (da, db), made = over_batch(rule.update, a.ndim - 2)(*args)
            states = states | {name: made}
            steps |= {f"{name}lora_a": da, f"{name}lora_b": db}

        def of(path: Any, x: jax.Array) -> jax.Array:
            return steps.get(keystr(path, simple=True, separator="/"), x)

        return jax.tree_util.tree_map_with_path(of, directions), (states, rest)

    return optax.GradientTransformation(init, update)


class Basis(NamedTuple):
    """Orthonormal A (m, r) and B (r, n), and the S_a, S_b that make them: A = a S_a, B = S_b b."""

    A: jax.Array
    B: jax.Array
    S_a: jax.Array
    S_b: jax.Array


def basis(a: jax.Array, b: jax.Array) -> Basis:
    """Of a pair; what a and b turn to zero is zero in it."""
    S_a, S_b = inverse_root(a.T @ a), inverse_root(b @ b.T)
    return Basis(a @ S_a, S_b @ b, S_a, S_b)


def inverse_root(P: jax.Array) -> jax.Array:
    """P^(-1/2) on P's range, which ends at a millionth of its largest eigenvalue."""
    values, vectors = jnp.linalg.eigh(P)
    kept = values > 1e-6 * jnp.maximum(values[-1], jnp.finfo(P.dtype).tiny)
    return (vectors * jnp.where(kept, jnp.where(kept, values, 1) ** -0.5, 0)[None]) @ vectors.T


def msign(M: jax.Array) -> jax.Array:
    """U Vᵀ of M = U Σ Vᵀ, over the singular values above a thousandth of M's norm."""
    U, sigma, V = jnp.linalg.svd(M, full_matrices=False)
    kept = sigma > 1e-3 * jnp.maximum(jnp.linalg.norm(sigma), jnp.finfo(M.dtype).tiny)
    return (U * kept[None]) @ V


def tangent(f: Basis, T: jax.Array) -> jax.Array:
    """The tangent vector nearest to an (m, n) array."""
    rest = T - (T @ f.B.T) @ f.B
    return T - rest + f.A @ (f.A.T @ rest)


def known(f: Basis, h_a: jax.Array, h_b: jax.Array, s: float) -> jax.Array:
    """The tangent vector nearest to G, of h_a = s G bᵀ and h_b = s aᵀ G."""
    H_a, H_b = h_a @ f.S_b.T / s, f.S_a.T @ h_b / s
    return H_a @ f.B + f.A @ (H_b - (H_b @ f.B.T) @ f.B)


def factors(f: Basis, U: jax.Array, s: float) -> Step:
    """(da, db) with s (da b + a db) = U; b takes what both reach."""
    H_b = f.A.T @ U
    X = (U - f.A @ H_b) @ f.B.T
    return X @ f.S_b / s, f.S_a @ H_b / s
