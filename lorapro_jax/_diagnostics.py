"""How close each pair's step is to the full gradient's projection, from the factors alone.

Any step of the full weight is J(da, db) = s (da b + a db) = s L R with L = [da a] (m, 2r) and
R = [b; db] (2r, n). Two such steps have <L R, L' R'> = sum((Lᵀ L') ∘ (R R'ᵀ)), so that every
figure here costs O((m + n) r²): neither G nor any (m, n) array is formed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from lorapro_jax._checks import check_between, check_scale
from lorapro_jax._groups import Scale, groups, over_batch, scale_of, stack, unstack
from lorapro_jax._layouts import Layout, find_pairs, flatten
from lorapro_jax._pairwise import PairsState, aligned
from lorapro_jax._retraction import RetractState
from lorapro_jax._sharding import gram_left, gram_right
from lorapro_jax._tangent import Factors, frames, tangent, to_factors

Step = tuple[Array, Array]  # (da, db)


class PairDiagnostics(NamedTuple):
    """One pair's figures: scalars, or arrays over the pair's batch axes.

    The target is g~ = P_a G + G P_b - P_a G P_b, the part of the full gradient that any update of
    the factors can reach. All norms are Frobenius norms.
    """

    cosine: Float[Array, "*batch"]  # of the step J(da, db) and the target; 1 is full fine-tuning
    relative_distance: Float[Array, "*batch"]  # ||J(da, db) - g~|| / ||g~||
    lora_cosine: Float[Array, "*batch"]  # the same for LoRA's own step J(h_a, h_b)
    lora_relative_distance: Float[Array, "*batch"]
    condition_a: Float[Array, "*batch"]  # largest over smallest singular value; inf if deficient
    condition_b: Float[Array, "*batch"]
    norm_a: Float[Array, "*batch"]  # ||da||
    norm_b: Float[Array, "*batch"]  # ||db||
    norm_step: Float[Array, "*batch"]  # ||J(da, db)||
    norm_target: Float[Array, "*batch"]  # ||g~||
    bounded: Float[Array, "*batch"]  # share of the steps so far in which `retract`'s bound acted


def diagnose(
    params: Any,
    grads: Any,
    scale: Scale,
    *,
    updates: Any = None,
    state: Any = None,
    damping: float | Array = 1e-6,
    layout: Layout | None = None,
) -> dict[str, PairDiagnostics]:
    """How close the step of every pair is to full fine-tuning's, and what LoRA's would have been.

    Args:
      params: the parameters, factors and whatever else.
      grads: their gradients, clipped or not: every figure but the norms is scale-free.
      scale: as in `lp.lorapro`.
      updates: an optimizer's, of which -updates is judged; by default LoRA-Pro's own step is.
      state: the optimizer's state, for `bounded`, which is NaN without it.
      damping, layout: as in `lp.lorapro`. Only the default step is damped, not the target.

    Returns:
      {path of the pair: PairDiagnostics}, under jit too.

    Raises:
      ValueError: as `lp.lorapro`.

    Example:
      >>> import jax, jax.numpy as jnp, lorapro_jax as lp
      >>> params = {"lora_a": jnp.ones((6, 1)), "lora_b": jnp.ones((1, 4))}
      >>> grads = {"lora_a": 8 * jnp.ones((6, 1)), "lora_b": 12 * jnp.ones((1, 4))}  # G is ones
      >>> bool(lp.diagnose(params, grads, scale=2.0)["lora"].cosine > 0.9999)
      True

    References:
      Wang et al., LoRA-Pro, arXiv:2407.18242, section 2 (the equivalent gradient).
    """
    check_scale(scale)
    check_between("damping", damping, 0.0, float("inf"))
    paths, leaves, _ = flatten(grads)
    pairs = find_pairs(paths, leaves, layout, require_pairs=True)
    values = aligned(paths, leaves, params)
    new = None if updates is None else aligned(paths, leaves, updates)
    found, bounded = {}, _bounded(state)
    for name, group in groups(pairs, values).items():
        (a, b), h = stack(group, values, leaves, gradients=True)
        p = Factors(a, b, scale_of(group, scale, a))
        step = None if new is None else tuple(-x for x in stack(group, new)[0])
        share = bounded.get(name, jnp.full(group.batch, jnp.nan, group.dtype))
        figures = over_batch(functools.partial(_figures, damping), p.s.ndim)(p, h, step, share)
        found |= zip(group.pairs, unstack(group, figures), strict=True)
    return {pair.path: found[pair] for pair in pairs}


def _bounded(state: Any) -> dict[str, Array]:
    """{group: share of the steps in which the bound acted}."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PairsState))
    rules = ((x, rule) for x in nodes if isinstance(x, PairsState) for rule in x.rules)
    return {
        name: acted / jnp.maximum(node.count, 1)
        for node, rule in rules
        if isinstance(rule, RetractState)
        for name, acted in rule.bounded.items()
    }


def _figures(damping, p: Factors, h: Step, step: Step | None, bounded: Array) -> PairDiagnostics:
    """The figures of one pair; of the projected gradient where no step is given."""

    def projected(damping: Any) -> Step:
        f = frames(p, damping)
        return to_factors(f, tangent(f, *h))

    target, step = projected(0.0), projected(damping) if step is None else step
    compared = (*_compare(p, step, target), *_compare(p, h, target))
    conditions = _condition(p.a), _condition(jnp.moveaxis(p.b, 0, -1))
    norm_a, norm_b = (jnp.sqrt(jnp.sum(x**2)) for x in step)
    norms = norm_a, norm_b, _norm(p, step), _norm(p, target)
    return PairDiagnostics(*compared, *conditions, *norms, bounded)


def _compare(p: Factors, step: Step, target: Step) -> tuple[Array, Array]:
    """Cosine and relative distance of J(step) and J(target)."""
    size, tiny = _norm(p, target), jnp.finfo(p.a.dtype).tiny
    cosine = _inner(p, step, target) / jnp.maximum(_norm(p, step) * size, tiny)
    difference = step[0] - target[0], step[1] - target[1]
    return cosine, _norm(p, difference) / jnp.maximum(size, tiny)


def _norm(p: Factors, step: Step) -> Array:
    """||J(step)||."""
    return jnp.sqrt(jnp.maximum(_inner(p, step, step), 0))


def _inner(p: Factors, x: Step, y: Step) -> Array:
    """<J(x), J(y)>, from the Grams of the factors and their steps."""
    L, L2 = (jnp.concatenate([da, p.a], axis=-1) * p.s for da, _ in (x, y))
    R, R2 = (jnp.concatenate([p.b, db]) for _, db in (x, y))
    return jnp.sum(gram_left(L, L2) * gram_right(R, R2))


@sequential_vmap  # jaxlib's batched LAPACK calls can hang on a CPU when two run at once
def _condition(factor: Array) -> Array:
    """From the factor's own singular values: those of its Gram would be squared."""
    r = factor.shape[-1]
    values = jnp.linalg.svd(factor.reshape(-1, r), compute_uv=False)
    return jnp.where(values[-1] > 0, values[0] / values[-1], jnp.inf)  # also where 0 / 0
