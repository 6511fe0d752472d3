"""The low-rank term of a linear layer: y = x K + s (x a) b, x (*rows, m), a (m, r), b (r, n)."""

import math
import zlib

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def low_rank(
    x: Float[Array, "*rows m"], a: Float[Array, "m r"], b: Float[Array, "r n"], precision=None
) -> Float[Array, "*rows n"]:
    """(x a) b, over rows in one axis: what a matrix product is fastest at."""
    # merging axes that are sharded explicitly is an error
    explicit = jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
    rows = x if explicit else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = jnp.matmul(jnp.matmul(rows, a, precision=precision), b, precision=precision)
    return y.reshape(*x.shape[:-1], b.shape[1])


def inputs_last(x: Array, axis: tuple[int, ...]) -> Array:
    """The contracted axes of `x`, in ascending order as flax orders them, made the last one."""
    x = jnp.moveaxis(x, sorted(i % x.ndim for i in axis), range(-len(axis), 0))
    kept = x.shape[: x.ndim - len(axis)]
    return x.reshape(*kept, math.prod(x.shape[len(kept) :]))


def fold(kernel: Array, a: Array, b: Array, scale) -> Array:
    """K + s a b in the kernel's shape and dtype, computed in float32 or better."""
    wide = jnp.promote_types(jnp.result_type(kernel, a, b), jnp.float32)
    product = jnp.matmul(a.astype(wide), b.astype(wide), precision=lax.Precision.HIGHEST)
    return (kernel.astype(wide) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)


def init_pair(
    key: Array, path: str, shape: tuple[int, int], rank: int, dtype=None, kernel_dtype=jnp.float32
) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
    """a uniform in ±1/sqrt(m) (kaiming-uniform with a = sqrt 5), b zero.

    The path is part of the key, so that one adapter's start does not depend on the others. Without
    a dtype the kernel's is taken, but at least float32: bf16 loses small steps.
    """
    m, n = shape
    dtype = jnp.promote_types(kernel_dtype, jnp.float32) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"the factors' dtype is {dtype}; they are trained: pass a floating dtype")
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    bound = 1 / math.sqrt(m)
    a = jax.random.uniform(key, (m, rank), dtype, -bound, bound)
    return a, jnp.zeros((rank, n), dtype)
