"""LoRA-Pro without moments: the projection of the gradient (Theorem 2.1), and its split."""

from typing import Any

import optax
from jaxtyping import Array

from lorapro_jax._checks import check_between
from lorapro_jax._groups import Scale, over_batch
from lorapro_jax._layouts import Layout
from lorapro_jax._pairwise import Rule, pairwise
from lorapro_jax._sharding import dot, gram_left, gram_right
from lorapro_jax._tangent import Factors, frames, least_norm, tangent


def stateless(one: Any) -> Rule:
    """The rule of (factors, da, db) -> (da, db) of one pair."""

    def update(p, step, state, count):
        del count
        return over_batch(one, p.s.ndim)(p, *step), state

    return Rule(update)


def lorapro(
    scale: Scale,
    *,
    damping: float | Array = 1e-6,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Turns the gradients of each pair's factors into the step closest to full fine-tuning's.

    For K = K0 + s a b the factor gradients (s G bᵀ, s aᵀ G) become the (da, db) of least norm that
    minimise ||s (da b + a db) - G||. Stateless: chained with `optax.sgd` it is the paper's
    Algorithm 1, with `optax.adamw` its efficient form. Leaves in no pair pass through.

    Put it where it sees gradients: after clipping by global norm, which keeps the two projections
    of one G consistent, and before any rule that rescales entries. One LoRA-Pro direction a chain:
    `lorapro_adamw` and `scale_by_lorapro_adam` contain the projection.

    Args:
      scale: s of the forward pass (alpha / rank, or alpha / sqrt(rank) for rsLoRA), or a callable
        from the pair's path to s.
      damping: λ of the Grams' inverses, in units of the mean eigenvalue of the larger Gram.
      layout: how pairs are named and laid out; `lp.layouts.FLAX` by default.
      require_pairs: whether a tree without a pair is an error.

    Returns:
      A GradientTransformationExtraArgs with an empty state.

    Raises:
      ValueError: an invalid scale or damping; at init and update whatever `lp.labels` raises for a
        tree whose pairs are incomplete, inconsistent or ambiguous; `params` missing.

    Example:
      >>> import jax.numpy as jnp, lorapro_jax as lp, optax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), lp.lorapro(scale=2.0), optax.sgd(0.1))
      >>> params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
      >>> grads = {"q": {"lora_a": jnp.zeros((6, 2)), "lora_b": jnp.ones((2, 4))}}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates["q"]["lora_b"].shape
      (2, 4)

    References:
      Wang et al., LoRA-Pro, arXiv:2407.18242: Theorem 2.1, Algorithm 1.
    """
    check_between("damping", damping, 0.0, float("inf"))

    def one(p: Factors, h_a: Array, h_b: Array) -> tuple[Array, Array]:
        f = frames(p, damping)
        T = tangent(f, h_a, h_b)
        M = dot(dot(f.S_a / f.s, T.C), f.S_b)  # a M b = A C B / s; here db takes all of it
        da, db = dot(T.H_a, f.S_b / f.s), dot(f.S_a / f.s, T.H_b)
        return least_norm(p, da - dot(p.a, M), db, dot(M, gram_right(p.b, p.b)), damping)

    return pairwise(stateless(one), scale=scale, layout=layout, require_pairs=require_pairs)


def minimum_norm(
    *,
    damping: float | Array = 1e-6,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Splits each pair's step between its factors so that the factors' steps have least norm.

    Of all (da + a Z, db - Z b), which change the product alike, the one of least norm: the X of
    Theorem 2.1 by the paper's Sylvester equation. After `scale_by_lorapro_adam(mode="full")` it
    makes the paper's Algorithm 2. Stateless; leaves in no pair pass through.

    Args:
      damping, layout, require_pairs: as in `lorapro`.

    Returns:
      A GradientTransformationExtraArgs with an empty state.

    Raises:
      ValueError: as `lorapro`.

    Example:
      >>> import lorapro_jax as lp, optax
      >>> algorithm_2 = optax.chain(
      ...     lp.scale_by_lorapro_adam(2.0, mode="full"), lp.minimum_norm(), optax.scale(-1e-4)
      ... )

    References:
      Wang et al., LoRA-Pro, arXiv:2407.18242: Theorem 2.1, Algorithm 2.
    """
    check_between("damping", damping, 0.0, float("inf"))

    def one(p: Factors, da: Array, db: Array) -> tuple[Array, Array]:
        return least_norm(p, da, db, gram_right(db, p.b) - gram_left(p.a, da), damping)

    rule, common = stateless(one), {"layout": layout, "require_pairs": require_pairs}
    return pairwise(rule, scale=1.0, gradients=False, **common)
