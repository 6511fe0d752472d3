"""Contractions that say how their result is sharded, and the sharding of a kernel from its factors.

With explicit mesh axes a sharding is part of an array's type, and a product over a sharded axis
must state its own: the Gram of a row-sharded factor is replicated, after an all-reduce of (r, r).
With automatic axes nothing is stated and XLA decides.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jaxtyping import Array, Float

# TPUs and Ampere GPUs would run float32 products at bf16 or tf32, whose error the
# inverse Grams amplify by the square of the condition number.
_PRECISION = lax.Precision.HIGHEST


def contract(
    x: Array,
    y: Array,
    x_axes: Sequence[int],
    y_axes: Sequence[int],
    like: Array | None = None,
) -> Array:
    """`jnp.tensordot` in full precision, sharded like `like` or as the axes that are left."""
    axes = (list(x_axes), list(y_axes))
    specs = (
        [e for i, e in enumerate(spec_of(z)) if i not in of] for z, of in ((x, x_axes), (y, y_axes))
    )
    out = explicit(x, joined(*specs)) if like is None else explicit(like, spec_of(like))
    return jnp.tensordot(x, y, axes, precision=_PRECISION, out_sharding=out)


def dot(x: Array, y: Array) -> Array:
    """x y, summed over the last axis of `x` and the first of `y`."""
    return contract(x, y, [x.ndim - 1], [0])


def gram_left(x: Float[Array, "*m r"], y: Float[Array, "*m k"]) -> Float[Array, "r k"]:
    """xᵀ y, summed over every axis but the last."""
    axes = list(range(x.ndim - 1))
    return contract(x, y, axes, axes)


def gram_right(x: Float[Array, "r *n"], y: Float[Array, "k *n"]) -> Float[Array, "r k"]:
    """x yᵀ, summed over every axis but the first."""
    axes = list(range(1, x.ndim))
    return contract(x, y, axes, axes)


def spec_of(x: Any) -> tuple[Any, ...]:
    """The mesh axes that each axis of an array is explicitly sharded over, or None."""
    return padded(jax.typeof(x).sharding.spec, x.ndim)


def padded(spec: Iterable[Any], ndim: int) -> tuple[Any, ...]:
    """An entry for each of `ndim` axes: those that a PartitionSpec leaves out are None."""
    entries = tuple(spec)
    return entries + (None,) * (ndim - len(entries))


def explicit(x: Any, spec: Sequence[Any]) -> NamedSharding | None:
    """`spec` on the explicit mesh of `x`; None where there is none."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or not mesh.explicit_axes:
        return None
    return NamedSharding(mesh, PartitionSpec(*spec))


def placed(x: Array, spec: Sequence[Any]) -> Array:
    """`x`, explicitly sharded so."""
    return x if tuple(spec) == spec_of(x) else reshard(x, explicit(x, spec))


def joined(*specs: Iterable[Any]) -> tuple[Any, ...]:
    """Specs one after the other. A mesh axis shards one axis only: the first keeps it."""
    used: set[str] = set()
    result = []
    for entry in (entry for spec in specs for entry in spec):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        kept = tuple(name for name in names if name not in used)
        used.update(kept)
        result.append(kept[0] if len(kept) == 1 else kept or None)
    return tuple(result)
