"""Adam on the equivalent gradient g~ = s (da b + a db) of each pair.

    full        m and v are averages of g~ and g~², two (m, n) arrays (the paper's Algorithm 2)
    factored    v_ij = R_i C_j / mean(R), from averages of row and column means of g~² (Adafactor);
                m is the tangent vector of the averages of (h_a, h_b): no (m, n) array

The direction is the tangent vector nearest to U = m^ / (sqrt(v^) + eps), where sqrt(v^) is at least
`floor` times its mean: to v^ floor² of its mean is added, to R and C floor of theirs.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array

from lorapro_jax import _tangent
from lorapro_jax._checks import check_between, check_one_of, check_positive
from lorapro_jax._descent import descent
from lorapro_jax._groups import Group, Scale, factor_zeros, over_batch
from lorapro_jax._layouts import Layout, kernel_spec
from lorapro_jax._moments import correction, largest, mean, mean_root, positive
from lorapro_jax._pairwise import Rule, Step, in_pairs, pairwise
from lorapro_jax._sharding import explicit, spec_of
from lorapro_jax._tangent import (
    Factors,
    Frames,
    Tangent,
    clipped,
    frames,
    tangent,
    times,
    to_factors,
)


class Numbers(NamedTuple):
    """The arguments of `scale_by_lorapro_adam`."""

    b1: Any
    b2: Any
    eps: Any
    floor: Any
    clip: Any
    damping: Any
    mu_dtype: Any


class FactoredState(NamedTuple):
    """State of factored mode, {group: array}; in the factors' dtype, float32 or better."""

    mu_a: Any  # (*batch, *m, r) averages of h_a, in mu_dtype if given
    mu_b: Any  # (*batch, r, *n) averages of h_b
    row: Any  # (*batch, *m) root mean squares of g~ over each row
    col: Any  # (*batch, *n) and over each column


class FullState(NamedTuple):
    """State of full mode, {group: array}; in the factors' dtype, float32 or better."""

    mu: Any  # (*batch, *m, *n) averages of g~, in mu_dtype if given
    rms: Any  # (*batch, *m, *n) roots of the averages of g~²
    size: Any  # (*batch,) root mean squares of g~ over its entries and steps


def factored_rule(numbers: Numbers) -> Rule:
    """The rule of factored mode."""
    b1, b2, eps, floor, clip, damping, mu_dtype = numbers

    def init(group: Group, leaves: Sequence[Any]) -> tuple[Array, ...]:
        a, b = factor_zeros(group, leaves)
        row, col = jnp.sum(a, axis=-1), jnp.sum(b, axis=len(group.batch))
        return *factor_zeros(group, leaves, mu_dtype), row, col

    def one(p: Factors, h: Step, state: tuple[Array, ...], count: Array):
        mu_a, mu_b, row, col = state
        f, dtype = frames(p, damping), p.a.dtype
        mu = mean(h[0], mu_a, b1), mean(h[1], mu_b, b1)
        size = largest(*h, *mu)
        g = tangent(f, h[0] / size, h[1] / size)
        now_row, now_col = (size * jnp.sqrt(x) for x in _tangent.mean_squares(f, g))
        row, col = mean_root(now_row, row, b2), mean_root(now_col, col, b2)
        top = positive(jnp.max(row))
        all_g = top * jnp.sqrt(jnp.mean((row / top) ** 2))  # root mean square of all entries
        left, right = (lax.rsqrt((x / positive(all_g)) ** 2 + floor) for x in (row, col))
        U = _tangent.rescaled(f, tangent(f, mu[0] / size, mu[1] / size), left, right)
        all_g = all_g / jnp.sqrt(correction(b2, count, dtype))
        U = times(U, size / correction(b1, count, dtype) / positive(all_g + eps))
        stored = mu[0].astype(mu_a.dtype), mu[1].astype(mu_b.dtype), row, col
        return to_factors(f, clipped(U, clip)), stored

    def update(p: Factors, h: Step, state: tuple[Array, ...], count: Array):
        return over_batch(one, p.s.ndim, (0, 0, 0, None))(p, h, state, count)

    return Rule(update, FactoredState, init)


def full_rule(numbers: Numbers) -> Rule:
    """The rule of full mode."""
    b1, b2, eps, floor, clip, damping, mu_dtype = numbers

    def init(group: Group, leaves: Sequence[Any]) -> tuple[Array, ...]:
        pair, k = group.pairs[0], len(group.batch)
        a, b = leaves[pair.a], leaves[pair.b]
        spec = kernel_spec(pair, spec_of(a), spec_of(b))

        def zeros(axes: int, dtype: Any = None) -> Array:
            shape = (*group.batch, *group.m, *group.n)[:axes]
            return jnp.zeros(shape, dtype or group.dtype, out_sharding=explicit(a, spec[:axes]))

        every = len(spec)
        return zeros(every, mu_dtype), zeros(every), zeros(k)

    def gradient(p: Factors, h: Step, size: Array) -> tuple[Frames, Tangent, Array]:
        f = frames(p, damping)
        now = largest(*h)
        g = tangent(f, h[0] / now, h[1] / now)
        return f, times(g, now), mean_root(now * _tangent.root_mean_square(g), size, b2)

    def moments(f: Frames, g: Tangent, mu: Array, rms: Array, size: Array) -> tuple[Array, Array]:
        G, over = _tangent.dense(f, g, mu), 1 / positive(size)
        rms = jnp.sqrt(mean((G * over) ** 2, (rms * over) ** 2, b2)) * positive(size)
        return mean(G, mu, b1).astype(mu.dtype), rms

    def direction(f: Frames, mu: Array, rms: Array, size: Array, count: Array) -> Step:
        over, dtype = 1 / positive(size), rms.dtype
        root = jnp.sqrt(correction(b2, count, dtype))
        m = mu.astype(dtype) * (root / correction(b1, count, dtype) * over)
        U = m / positive(jnp.sqrt((rms * over) ** 2 + floor**2) + eps * root * over)
        return to_factors(f, clipped(_tangent.nearest(f, U), clip))

    def update(p: Factors, h: Step, state: tuple[Array, ...], count: Array):
        (mu, rms, size), batch, axes = state, p.s.ndim, (0, 0, 0, 0, None)
        f, g, size = over_batch(gradient, batch)(p, h, size)
        if spec_of(mu)[0] is not None:  # every device has pairs of its own
            mu, rms = over_batch(moments, batch)(f, g, mu, rms, size)
            return over_batch(direction, batch, axes)(f, mu, rms, size, count), (mu, rms, size)
        # One pair at a time: g~ and U are (m, n) too, and need not exist for all.

        def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            def at(tree: Any) -> Any:
                return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i, 1), tree)

            def put(xs: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
                pairs = zip(xs, new, strict=True)
                return tuple(lax.dynamic_update_slice_in_dim(x, y, i, 0) for x, y in pairs)

            held, step = carry[:2], carry[2:]
            held = put(held, over_batch(moments, batch)(*at((f, g, *held, size))))
            # read back: XLA then updates the moments in place
            new = over_batch(direction, batch, axes)(*at((f, *held, size)), count)
            return *held, *put(step, new)

        # Under shard_map a loop starts from arrays that vary over the axes that its results do.
        zero = jnp.zeros_like(jnp.max(size))
        start = (mu, rms, jnp.zeros_like(p.a), jnp.zeros_like(p.b))
        carry = tuple(x + zero.astype(x.dtype) for x in start)
        mu, rms, *step = lax.fori_loop(jnp.uint32(0), jnp.uint32(len(mu)), body, carry)
        return tuple(step), (mu, rms, size)

    return Rule(update, FullState, init, joins=False)


def scale_by_lorapro_adam(
    scale: Scale,
    *,
    mode: Literal["factored", "full"] = "factored",
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    floor: float | Array = 0.1,
    clipping_threshold: float | Array | None = 1.0,
    damping: float | Array = 1e-6,
    mu_dtype: Any = None,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adam on the equivalent gradient g~ of each pair: what full fine-tuning's Adam would do.

    Moments m, v of g~; U = m^ / (sqrt(v^) + eps); and the (da, db) whose product is nearest to U.
    "full" holds m and v, two (m, n) arrays a pair. "factored" holds (m + n)(r + 1) numbers a pair,
    half of LoRA under Adam: v by its row and column means, m by averages of the factors'
    gradients. Leaves in no pair get `optax.scale_by_adam`.

    Args:
      scale, damping, layout, require_pairs: as in `lorapro`.
      mode: "factored" or "full".
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      floor: least sqrt(v^), in units of its mean over the pair. Entries far below the others stay
        small: those of inputs that never occur are rounding errors. 0 is the paper's Adam.
      clipping_threshold: bound of the direction's root mean square, as in `optax.adafactor`: a step
        at a rate moves the (m, n) weight by at most threshold · rate · sqrt(m n). None: no bound.
      mu_dtype: dtype of the first moment; the second is float32 or better.

    Returns:
      A GradientTransformationExtraArgs of ascent directions: chain it with
      `optax.scale_by_learning_rate`, and end the chain with `retract`.

    Raises:
      ValueError: an unknown mode, betas outside [0, 1) in float32, a state of another mode or of
        other pairs, and whatever `lorapro` raises.

    Example:
      >>> import jax.numpy as jnp, lorapro_jax as lp, optax
      >>> params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
      >>> tx = optax.chain(lp.scale_by_lorapro_adam(2.0), optax.scale(-1e-3), lp.retract(2.0))
      >>> optax.tree.get(tx.init(params), "mu_a")["q"].shape
      (1, 6, 2)

    References:
      Wang et al., LoRA-Pro, arXiv:2407.18242, Algorithm 2 (full). Factored mode is ours; v is that
      of Shazeer and Stern, Adafactor, arXiv:1804.04235, as are the bound and, by another name, the
      floor; AdaPreLoRA, arXiv:2605.08734, uses the same means as a metric.
    """
    numbers = Numbers(b1, b2, eps, floor, clipping_threshold, damping, mu_dtype)
    common: Any = {"layout": layout, "require_pairs": require_pairs}
    pairs = pairwise(direction_rule(mode, numbers), scale=scale, **common)
    return in_pairs(pairs, optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype), **common)


def direction_rule(mode: str, numbers: Numbers) -> Rule:
    """The rule of a mode, its numbers checked."""
    check_one_of("mode", mode, ("factored", "full"))
    ranges = {"b1": 1.0, "b2": 1.0, "eps": jnp.inf, "floor": jnp.inf, "damping": jnp.inf}
    for name, high in ranges.items():
        check_between(name, getattr(numbers, name), 0.0, high)
    if numbers.clip is not None:
        check_positive("clipping_threshold", numbers.clip)
    return factored_rule(numbers) if mode == "factored" else full_rule(numbers)


def lorapro_adamw(
    learning_rate: optax.ScalarOrSchedule,
    scale: Scale,
    *,
    mode: Literal["factored", "full"] = "factored",
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    radius: float | Array | None = 0.05,
    floor: float | Array = 0.1,
    clipping_threshold: float | Array | None = 1.0,
    damping: float | Array = 1e-6,
    mu_dtype: Any = None,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pro's AdamW: the direction, the learning rate, the retraction, and decay.

        optax.chain(scale_by_lorapro_adam(...), scale_by_learning_rate(rate), retract(...), decay)

    Whatever stands before or after it acts as on `optax.adamw`. Weight decay is decoupled and acts
    on what was learnt, s a b: each factor decays by half of it. Leaves in no pair get
    `optax.adamw`.

    Args:
      learning_rate: a number or an optax schedule; full fine-tuning's rates are a good start.
      scale: as in `lorapro`.
      mode, b1, b2, eps, floor, clipping_threshold, mu_dtype: as in `scale_by_lorapro_adam`.
      weight_decay: a number or a schedule, as in `optax.adamw`.
      mask: which leaves decay, as in `optax.adamw`: a tree of booleans or a function of the params.
      radius: as in `retract`.
      damping, layout, require_pairs: as in `lorapro`.

    Returns:
      A GradientTransformationExtraArgs whose updates are to be added to the parameters.

    Raises:
      ValueError: a negative rate or decay, and whatever `scale_by_lorapro_adam` raises.

    Example:
      >>> import jax.numpy as jnp, lorapro_jax as lp, optax
      >>> params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
      >>> tx = lp.lorapro_adamw(optax.cosine_decay_schedule(3e-4, 100), scale=2.0)
      >>> state = tx.init(params)

    References:
      Wang et al., LoRA-Pro, arXiv:2407.18242; Loshchilov and Hutter, arXiv:1711.05101 (AdamW).
    """
    numbers = Numbers(b1, b2, eps, floor, clipping_threshold, damping, mu_dtype)
    return descent(
        direction_rule(mode, numbers),
        optax.adam(learning_rate, b1, b2, eps, mu_dtype=mu_dtype),
        learning_rate,
        scale,
        weight_decay=weight_decay,
        mask=mask,
        radius=radius,
        damping=damping,
        layout=layout,
        require_pairs=require_pairs,
    )
