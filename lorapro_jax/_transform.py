"""LoRA-Pro as optax transformations: the projection alone, and Adam on the equivalent gradient."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lorapro_jax import _solve
from lorapro_jax._batch import SOLVERS, Scale, aligned, first_steps, groups, problem, unstacked
from lorapro_jax._checks import check_between, check_one_of, check_scale
from lorapro_jax._full import full_mode
from lorapro_jax._layouts import Layout, check_leaves, factor_indices, find_pairs, flatten, write

MODES = ("full", "efficient")


def lorapro(
    scale: Scale,
    *,
    x: str = "sylvester",
    damping: float | Array = 1e-6,
    solver: str = "gram",
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Turns the gradients of each pair's factors into the step closest to full fine-tuning's.

    For K = K0 + s a b the factor gradients (s G bᵀ, s aᵀ G) become the minimum-norm (da, db) that
    minimises ||s (da b + a db) - G||, with Tikhonov damping. Stateless; chained with `optax.sgd`
    it is the paper's Algorithm 1, with `optax.adamw` its efficient form. Leaves in no pair pass
    through untouched.

    Put it where it sees gradients: after clipping by global norm, which keeps the two projections
    of one G consistent, and before any rule that rescales entries.

    Args:
      scale: s of the forward pass (alpha / rank, or alpha / sqrt(rank) for rsLoRA), or a callable
        from the pair's path to s.
      x: which of the minimisers: "sylvester" (minimum norm), "zero" or "symmetric" (the only one
        that commutes with a -> a R, b -> R⁻¹ b).
      damping: relative to the mean eigenvalue of the larger Gram; "gram" raises it to the
        precision's epsilon.
      solver: "gram" is fast, with an error of κ² eps in g~ (κ the factors' condition number) or
        eps / damping; "qr" has κ eps or eps / sqrt(damping), at twice the time.
      layout: how pairs are named and laid out; `lp.layouts.FLAX` by default.
      require_pairs: whether a tree with leaves but without a pair is an error.

    Returns:
      A GradientTransformationExtraArgs with an empty state.

    Raises:
      ValueError: an invalid scale, x or damping; at init and update whatever `lp.labels` raises
        for a tree whose pairs are incomplete, inconsistent or ambiguous; `params` missing.

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
    check_scale(scale)
    check_one_of("x", x, _solve.CHOICES)
    check_one_of("solver", solver, SOLVERS)
    check_between("damping", damping, 0.0, float("inf"))

    def init(params):
        paths, leaves, _ = flatten(params)
        check_leaves(paths, leaves)
        find_pairs(paths, leaves, layout, require_pairs=require_pairs)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        paths, leaves, treedef = flatten(updates)
        check_leaves(paths, leaves)
        pairs = find_pairs(paths, leaves, layout, require_pairs=require_pairs)
        new = list(leaves)
        values = aligned(paths, leaves, params)
        for group in groups(pairs, values).values():
            _, taken = first_steps(problem(group, values, leaves, scale), group, damping, x, solver)
            for pair, (da, db) in zip(group.pairs, unstacked(taken, group), strict=True):
                write(pair, da, db, new)
        return jax.tree.unflatten(treedef, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def _wide_zeros(x: Any) -> Array:
    """Zeros in float32 or better of an array or a jax.ShapeDtypeStruct."""
    return jnp.zeros_like(x, dtype=jnp.promote_types(x.dtype, jnp.float32))


def _adam(b1, b2, eps, mu_dtype) -> optax.GradientTransformation:
    """optax's Adam with moments in float32 or better, whatever the dtype of the gradients.

    A bf16 second moment never decays: 0.999 v rounds back to v.
    """
    inner = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)

    def init(params):
        return inner.init(jax.tree.map(_wide_zeros, params))

    def update(updates, state, params=None):
        del params
        wide, state = inner.update(jax.tree.map(_solve.widen, updates), state)
        return jax.tree.map(lambda w, u: w.astype(u.dtype), wide, updates), state

    return optax.GradientTransformation(init, update)


def scale_by_lorapro_adam(
    scale: Scale,
    *,
    mode: str = "full",
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    x: str = "sylvester",
    damping: float | Array = 1e-6,
    mu_dtype: Any = None,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adam on the equivalent gradient g~ = s (da b + a db) of each pair.

    "full" is the paper's: moments m, v of g~ itself, the direction U = m^ / (sqrt(v^) + eps), and
    the closed form once more on the gradients (s U bᵀ, s aᵀ U) that U would have caused. It
    behaves like full fine-tuning and holds two (m, n) arrays a pair. "efficient" applies Adam to
    the projected factors and holds what plain LoRA with Adam holds. Leaves in no pair get Adam.

    Args:
      scale: as in `lorapro`.
      mode: "full" or "efficient".
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      x: as in `lorapro`; full mode's last projection uses it too.
      damping: as in `lorapro`.
      mu_dtype: dtype of the first moment; the second is always float32 or better.
      layout: as in `lorapro`.
      require_pairs: as in `lorapro`.

    Returns:
      A GradientTransformationExtraArgs. Its updates are ascent directions, as all of optax's
      `scale_by_*`; chain it with `optax.scale_by_learning_rate`.

    Raises:
      ValueError: an unknown mode, betas outside [0, 1), and whatever `lorapro` raises.

    Example:
      >>> import jax, jax.numpy as jnp, lorapro_jax as lp
      >>> params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
      >>> state = lp.scale_by_lorapro_adam(2.0, mode="full").init(params)
      >>> state.nu["q"].shape
      (1, 6, 4)

    References:
      Wang et al., LoRA-Pro, arXiv:2407.18242: Algorithm 2 (full), version 2 (efficient).
    """
    check_one_of("mode", mode, MODES)
    check_between("b1", b1, 0.0, 1.0)
    check_between("b2", b2, 0.0, 1.0)
    check_between("eps", eps, 0.0, float("inf"))
    projection = lorapro(scale, x=x, damping=damping, layout=layout, require_pairs=require_pairs)
    adam = _adam(b1, b2, eps, mu_dtype)
    if mode == "efficient":
        return optax.chain(projection, adam)
    find = functools.partial(find_pairs, layout=layout, require_pairs=require_pairs)
    return full_mode(projection, adam, find, scale, (b1, b2, eps), mu_dtype, x, damping)


class DecayState(NamedTuple):
    """State of `_decay_product`."""

    count: Int[Array, ""]  # steps taken, for a scheduled learning rate


def _decay_product(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float | Array, layout: Layout | None
) -> optax.GradientTransformationExtraArgs:
    """Decoupled decay of K - K0 by 1 - lr wd: each factor by its root, other leaves as in AdamW."""

    def init(params):
        del params
        return DecayState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        paths, leaves, treedef = flatten(updates)
        values = aligned(paths, leaves, params)
        inside = factor_indices(find_pairs(paths, leaves, layout, require_pairs=False))
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        product = jnp.minimum(jnp.asarray(rate * weight_decay), 1.0)
        # sqrt(1 - lr wd) - 1, which float32 would lose to cancellation at lr wd = 1e-6
        root = jnp.expm1(jnp.log1p(-product) / 2)
        new = [
            u + (jnp.where(i in inside, root, -product) * value).astype(u.dtype)
            for i, (u, value) in enumerate(zip(leaves, values, strict=True))
        ]
        return jax.tree.unflatten(treedef, new), DecayState(
            jnp.asarray(optax.safe_increment(state.count))
        )

    return optax.GradientTransformationExtraArgs(init, update)


def lorapro_adamw(
    learning_rate: optax.ScalarOrSchedule,
    scale: Scale,
    *,
    mode: str = "full",
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
    x: str = "sylvester",
    damping: float | Array = 1e-6,
    mu_dtype: Any = None,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pro's AdamW: `scale_by_lorapro_adam`, the learning rate, and decay of the product.

    Weight decay is decoupled and acts on what was learnt, s a b, by 1 - lr wd a step: each factor
    is multiplied by sqrt(1 - lr wd). The base weights are frozen and do not decay. Leaves in no
    pair decay as in `optax.adamw`.

    Args:
      learning_rate: a number or an optax schedule. In full mode rates are full fine-tuning's.
      scale: as in `lorapro`.
      mode: "full" or "efficient", as in `scale_by_lorapro_adam`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: wd above.
      x: as in `lorapro`.
      damping: as in `lorapro`.
      mu_dtype: dtype of the first moment.
      layout: as in `lorapro`.
      require_pairs: as in `lorapro`.

    Returns:
      A GradientTransformationExtraArgs whose updates are to be added to the parameters.

    Raises:
      ValueError: a negative learning rate or decay, and whatever `scale_by_lorapro_adam` raises.

    Example:
      >>> import jax.numpy as jnp, lorapro_jax as lp, optax
      >>> params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
      >>> tx = lp.lorapro_adamw(optax.cosine_decay_schedule(1e-4, 100), scale=2.0, mode="efficient")
      >>> state = tx.init(params)

    References:
      Wang et al., LoRA-Pro, arXiv:2407.18242; the first release's code for the decay.
    """
    if not callable(learning_rate):
        check_between("learning_rate", learning_rate, 0.0, float("inf"))
    check_between("weight_decay", weight_decay, 0.0, float("inf"))
    return optax.chain(
        scale_by_lorapro_adam(
            scale,
            mode=mode,
            b1=b1,
            b2=b2,
            eps=eps,
            x=x,
            damping=damping,
            mu_dtype=mu_dtype,
            layout=layout,
            require_pairs=require_pairs,
        ),
        optax.scale_by_learning_rate(learning_rate),
        _decay_product(learning_rate, weight_decay, layout),
    )
