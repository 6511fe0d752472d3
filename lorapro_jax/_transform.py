"""LoRA-Pro as optax transformations: the projection alone, and Adam on the equivalent gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lorapro_jax import _solve
from lorapro_jax._batch import (
    Adam,
    Scale,
    aligned,
    first_steps,
    groups,
    places,
    problem,
    scale_of,
    write_steps,
)
from lorapro_jax._checks import check_between, check_one_of, check_scale
from lorapro_jax._closed_form import ClosedForm
from lorapro_jax._efficient import efficient_rule
from lorapro_jax._factored import factored_rule
from lorapro_jax._full import full_rule
from lorapro_jax._layouts import Layout, check_leaves, find_pairs, flatten
from lorapro_jax._pairwise import Rule, Taken, pairwise

# Modes, and how much each damps the closed form. Without damping da is like 1 / b in the first
# steps, which efficient mode's Adam would remember for a thousand.
_DAMPING = {"full": 1e-6, "factored": 1e-6, "efficient": 1.0}
MODES = tuple(_DAMPING)


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
      x: which of the minimisers: "sylvester" (minimum norm), "zero", "symmetric" (the only one that
        commutes with a -> a R, b -> R⁻¹ b) or "sequential" (what both factors can do is left to the
        partner of the larger one).
      damping: relative to the mean eigenvalue of the larger Gram; "gram" raises it to the
        precision's epsilon.
      solver: "gram" is fast, with an error of κ² eps in g~ (κ the factors' condition number) or
        eps / damping; "qr" has κ eps or eps / sqrt(damping), at two to three times the time.
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
    form = ClosedForm(x, damping, solver)
    form.check()

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
        found = groups(pairs, values)
        at = places(found, leaves)
        for group in found.values():
            p = problem(group, values, leaves, scale_of(group, scale))
            _, taken = first_steps(p, group, form)
            write_steps(taken, group, at, new)
        return jax.tree.unflatten(treedef, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def _wide_zeros(x: Any) -> Array:
    """Zeros in float32 or better of an array or a jax.ShapeDtypeStruct."""
    return jnp.zeros_like(x, dtype=jnp.promote_types(x.dtype, jnp.float32))


def _adam(adam: Adam) -> optax.GradientTransformation:
    """optax's Adam with moments in float32 or better, whatever the dtype of the gradients.

    A bf16 second moment never decays: 0.999 v rounds back to v.
    """
    inner = optax.scale_by_adam(b1=adam.b1, b2=adam.b2, eps=adam.eps, mu_dtype=adam.mu_dtype)

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
    mode: str = "factored",
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    x: str = "sylvester",
    damping: float | Array | None = None,
    solver: str = "gram",
    mu_dtype: Any = None,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adam on the equivalent gradient g~ = s (da b + a db) of each pair.

    "full" is the paper's: moments m, v of g~ itself, the direction U = m^ / (sqrt(v^) + eps), and
    the closed form once more on the gradients (s U bᵀ, s aᵀ U) that U would have caused. It
    behaves like full fine-tuning and holds two (m, n) arrays a pair. "factored" does the same with
    the row and column means of g~² in the place of v, and m as a tangent vector that is carried
    from one step's factors to the next one's: (m + n)(2r + 1) numbers a pair, and no (m, n) array.
    It is the default because it trained as full mode did wherever we compared them (README).
    "efficient" applies Adam to the projected factors and holds what plain LoRA with Adam holds.
    Leaves in no pair get Adam.

    Args:
      scale: as in `lorapro`.
      mode: "factored", "full" or "efficient".
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      x: as in `lorapro`; the last projection of full and factored mode uses it too.
      damping: as in `lorapro`. None: 1e-6, in efficient mode 1; there a large one makes it LoRA
        under Adam, a small one lets Adam remember the steps right after b = 0, which are huge.
      solver: as in `lorapro`.
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
      Wang et al., LoRA-Pro, arXiv:2407.18242: Algorithm 2 (full), version 2 (efficient). Factored
      mode is ours; its second moment is that of Shazeer and Stern, Adafactor, arXiv:1804.04235.
    """
    adam = Adam(b1, b2, eps, mu_dtype)
    rule = _rule(mode, adam, scale, _form(mode, x, damping, solver), keeps_factors=True)
    find = functools.partial(find_pairs, layout=layout, require_pairs=require_pairs)
    return pairwise(rule, _adam(adam), find, scale)


def _form(mode: str, x: str, damping: float | Array | None, solver: str) -> ClosedForm:
    """The closed form of a mode, its arguments checked."""
    check_one_of("mode", mode, MODES)
    form = ClosedForm(x, _DAMPING[mode] if damping is None else damping, solver)
    form.check()
    return form


def _rule(mode: str, adam: Adam, scale: Scale, form: ClosedForm, *, keeps_factors: bool) -> Rule:
    """The rule of a mode, its other arguments checked."""
    check_scale(scale)
    check_between("b1", adam.b1, 0.0, 1.0)
    check_between("b2", adam.b2, 0.0, 1.0)
    check_between("eps", adam.eps, 0.0, float("inf"))
    if mode == "full":
        return full_rule(adam, form)
    if mode == "efficient":
        return efficient_rule(adam, form)
    return factored_rule(adam, form, keeps_factors=keeps_factors)


def lorapro_adamw(
    learning_rate: optax.ScalarOrSchedule,
    scale: Scale,
    *,
    mode: str = "factored",
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
    x: str | None = None,
    damping: float | Array | None = None,
    solver: str = "gram",
    mu_dtype: Any = None,
    radius: float | Array | None = 0.05,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pro's AdamW: `scale_by_lorapro_adam`, the learning rate, and decay of the product.

    Weight decay is decoupled and acts on what was learnt, s a b, by 1 - lr wd a step: each factor
    is multiplied by sqrt(1 - lr wd). The base weights are frozen and do not decay. Leaves in no
    pair decay as in `optax.adamw`.

    Knowing the rate, full and factored mode take a better step than the two factors' own: one
    factor moves, the other is fitted to its new value, so that the weight changes as it was meant
    to, and the change is bounded. Factored mode then needs no old factors: (m + n)(r + 1) numbers
    a pair. A rule that changes the updates afterwards would break this; put it before.

    Args:
      learning_rate: a number or an optax schedule. In full and factored mode rates are full
        fine-tuning's.
      scale: as in `lorapro`.
      mode: "factored", "full" or "efficient", as in `scale_by_lorapro_adam`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: wd above.
      x: as in `lorapro`. None: "sequential" in full and factored mode, where it makes the step the
        one above (no other choice does), and "sylvester" in efficient mode.
      damping: as in `scale_by_lorapro_adam`.
      solver: as in `lorapro`.
      mu_dtype: dtype of the first moment.
      radius: bound on a step's change of the pair's weight, ||s d(a b)|| in the Frobenius norm, in
        units of s max(tr aᵀa, tr b bᵀ) / r; None: no bound. Not in efficient mode, where Adam
        bounds the factors' steps.
      layout: as in `lorapro`.
      require_pairs: as in `lorapro`.

    Returns:
      A GradientTransformationExtraArgs whose updates are to be added to the parameters.

    Raises:
      ValueError: a negative learning rate, decay or radius, and whatever `scale_by_lorapro_adam`
        raises.

    Example:
      >>> import jax.numpy as jnp, lorapro_jax as lp, optax
      >>> params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
      >>> tx = lp.lorapro_adamw(optax.cosine_decay_schedule(1e-4, 100), scale=2.0, mode="efficient")
      >>> state = tx.init(params)

    References:
      Wang et al., LoRA-Pro, arXiv:2407.18242; the first release's code for the decay.
    """
    if radius is not None:
        check_between("radius", radius, 0.0, float("inf"))
    if not callable(learning_rate):
        check_between("learning_rate", learning_rate, 0.0, float("inf"))
    check_between("weight_decay", weight_decay, 0.0, float("inf"))
    adam = Adam(b1, b2, eps, mu_dtype)
    projects = mode != "efficient"  # Adam comes last there: its steps are no projections
    x = x or ("sequential" if projects else "sylvester")
    form = _form(mode, x, damping, solver)
    rule = _rule(mode, adam, scale, form, keeps_factors=False)
    rest = optax.chain(
        _adam(adam),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    find = functools.partial(find_pairs, layout=layout, require_pairs=require_pairs)
    ridge = form.damping if projects and form.x == "sequential" else None
    taken = Taken(learning_rate, weight_decay, radius if projects else None, ridge)
    return pairwise(rule, rest, find, scale, taken)
