"""How close each pair's step is to the full gradient's projection, from the factors alone.

Any step of the full weight is J(da, db) = s (da b + a db) = s L R with L = [da a] (m, 2r) and
R = [b; db] (2r, n). Two such steps have <L R, L' R'> = sum((Lᵀ L') ∘ (R R'ᵀ)), so that every
figure here costs O((m + n) r²): neither G nor any (m, n) array is formed.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from lorapro_jax import _solve
from lorapro_jax._batch import (
    Problem,
    Scale,
    aligned,
    first_steps,
    groups,
    over_batch,
    places,
    problem,
    scale_of,
    stacked,
    unstacked,
)
from lorapro_jax._closed_form import ClosedForm
from lorapro_jax._layouts import Layout, find_pairs, flatten


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


def diagnose(
    params: Any,
    grads: Any,
    scale: Scale,
    *,
    updates: Any = None,
    damping: float | Array = 1e-6,
    layout: Layout | None = None,
) -> dict[str, PairDiagnostics]:
    """How close the step of every pair is to full fine-tuning's, and what LoRA's would have been.

    Args:
      params: the parameters, factors and whatever else.
      grads: gradients at `params`, as autodiff gives them (before clipping or after: every figure
        but the norms is scale-free).
      scale: as in `lp.lorapro`.
      updates: what an optimizer is about to add to `params`. Its descent direction -updates is
        judged; by default LoRA-Pro's own step is, at the given damping.
      damping: as in `lp.lorapro`, for the default step. The target is not damped.
      layout: as in `lp.lorapro`.

    Returns:
      {path of the pair: PairDiagnostics}, a pytree: jit it with the step or call it by itself.

    Raises:
      ValueError: as `lp.lorapro`.

    Example:
      >>> import jax, jax.numpy as jnp, lorapro_jax as lp
      >>> a, b, G = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(
      ...     [(6, 2), (2, 4), (6, 4)]))
      >>> params = {"q": {"lora_a": a, "lora_b": b}}
      >>> grads = {"q": {"lora_a": 2.0 * G @ b.T, "lora_b": 2.0 * a.T @ G}}
      >>> bool(lp.diagnose(params, grads, scale=2.0)["q"].cosine > 0.9999)
      True

    References:
      Wang et al., LoRA-Pro, arXiv:2407.18242, section 2 (the equivalent gradient).
    """
    paths, leaves, _ = flatten(grads)
    pairs = find_pairs(paths, leaves, layout, require_pairs=True)
    values = aligned(paths, leaves, params)
    new = None if updates is None else aligned(paths, leaves, updates)
    found, alike = {}, groups(pairs, values)
    at = places(alike, leaves, figures=True)
    for group in alike.values():
        p = problem(group, values, leaves, scale_of(group, scale))
        _, target = first_steps(p, group, ClosedForm("sylvester", 0.0, "gram"))
        if new is None:
            _, taken = first_steps(p, group, ClosedForm("sylvester", damping, "gram"))
        else:
            taken = tuple(-_solve.widen(x) for x in stacked(group, new))
        figures = unstacked(over_batch(_figures, group)(p, taken, target), group, at)
        found |= zip((pair.path for pair in group.pairs), figures, strict=True)
    return {pair.path: found[pair.path] for pair in pairs}


def _inner(L: Array, R: Array, L2: Array, R2: Array) -> Array:
    return jnp.sum(_solve.gram_left(L, L2) * _solve.gram_right(R, R2))


def _compare(p: Problem, step, target) -> tuple[Array, Array, Array, Array]:
    """Cosine, relative distance and both norms of J(step) and J(target)."""
    x, y = (_solve.tangent(p.a, p.b, *z) for z in (step, target))
    difference = _solve.tangent(p.a, p.b, step[0] - target[0], step[1] - target[1])
    tiny = jnp.finfo(p.a.dtype).tiny
    norm_x, norm_y, norm_d = (
        jnp.abs(p.s) * jnp.sqrt(jnp.maximum(_inner(*z, *z), 0)) for z in (x, y, difference)
    )
    cosine = p.s * p.s * _inner(*x, *y) / jnp.maximum(norm_x * norm_y, tiny)
    return cosine, norm_d / jnp.maximum(norm_y, tiny), norm_x, norm_y


@sequential_vmap  # a batched svd can hang on a CPU as a batched eigh can: see _lapack
def _condition(factor: Array) -> Array:
    """From the factor's own singular values: those of its Gram would be squared."""
    r = factor.shape[-1]
    values = jnp.linalg.svd(factor.reshape(-1, r), compute_uv=False)
    return jnp.where(values[-1] > 0, values[0] / values[-1], jnp.inf)  # also where 0 / 0


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x * x))


def _figures(p: Problem, step, target) -> PairDiagnostics:
    cosine, distance, norm_step, norm_target = _compare(p, step, target)
    lora_cosine, lora_distance, _, _ = _compare(p, (p.h_a, p.h_b), target)
    return PairDiagnostics(
        cosine,
        distance,
        lora_cosine,
        lora_distance,
        _condition(p.a),
        _condition(jnp.moveaxis(p.b, 0, -1)),
        _norm(step[0]),
        _norm(step[1]),
        norm_step,
        norm_target,
    )
