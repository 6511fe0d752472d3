"""The adapted linear, y = x (K + a b): x (..., m), K (m, n), a (m, r), b (r, n) with s inside b.

Two forms of the same map. `low_rank` is the term (x a) b beside an untouched x K. `merged` is one
dense product with W = K + a b, which costs m n r for any number of rows and saves the passes over
(rows, n) that adding a second product takes. Its derivative is written down rather than traced:

    dy = dx W + x dK + (x da) b + (x a) db

so that transposition gives dx = g Wᵀ, da = xᵀ (g bᵀ), db = (x a)ᵀ g, without the dense gradient
of W and without a second (rows, m) term in dx. A custom JVP, not a VJP, keeps forward mode, vmap
and second derivatives. Differentiating holds W, an array of the kernel's size per linear.

On 2 CPU cores both details below were measured to matter: rows in one axis (XLA's CPU backend runs
(B, T, m) x (m, r) far off its matrix product), and da made as (r, m) and then transposed, for
XLA turns a transposed product into the other order, which is 5x slower when r is thin.
"""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_SymbolicZero = jax.custom_derivatives.SymbolicZero


def _sharded_explicitly(x: Array) -> bool:
    return jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _rows(x: Array) -> Array:
    """x (..., m) as (rows, m), except where an explicit sharding forbids to merge axes."""
    if _sharded_explicitly(x):
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _thin(x: Array, a: Array, precision) -> Array:
    """x a for a thin a, whose gradient the CPU then computes in its fast order."""
    if jax.default_backend() != "cpu":
        return jnp.matmul(x, a, precision=precision)
    # The barrier's transpose is a barrier: it stands between the product (r, m) and its transpose.
    at = lax.optimization_barrier(a.T)
    return lax.dot_general(x, at, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)


def low_rank(
    x: Float[Array, "*rows m"], a: Float[Array, "m r"], b: Float[Array, "r n"], precision=None
) -> Float[Array, "*rows n"]:
    """(x a) b, over rows in one axis."""
    y = jnp.matmul(_thin(_rows(x), a, precision), b, precision=precision)
    return y.reshape(*x.shape[:-1], b.shape[1])


@jax.custom_jvp
def _merged(x, kernel, a, b):
    return jnp.matmul(x, kernel + jnp.matmul(a, b))


@functools.partial(_merged.defjvp, symbolic_zeros=True)
def _merged_jvp(primals, tangents):
    x, kernel, a, b = primals
    dx, dkernel, da, db = tangents
    terms = []
    if not isinstance(dx, _SymbolicZero):
        terms.append(_merged(dx, kernel, a, b))
    # A frozen kernel's tangent is a symbolic zero: its dense gradient never exists.
    if not isinstance(dkernel, _SymbolicZero):
        terms.append(jnp.matmul(x, dkernel))
    if not isinstance(da, _SymbolicZero):
        terms.append(low_rank(x, da, b))
    if not isinstance(db, _SymbolicZero):
        terms.append(low_rank(x, a, db))
    y = _merged(x, kernel, a, b)
    return y, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)


def merged(
    x: Float[Array, "*rows m"],
    kernel: Float[Array, "m n"],
    a: Float[Array, "m r"],
    b: Float[Array, "r n"],
) -> Float[Array, "*rows n"]:
    """x (K + a b) as one dense product over rows in one axis."""
    return _merged(_rows(x), kernel, a, b).reshape(*x.shape[:-1], kernel.shape[1])


def merge_pays(x: Float[Array, "*rows m"]) -> bool:
    """Whether `merged` is the cheaper form for these rows, and as accurate.

    Merging passes over (m, n), not merging over (rows, n). Only the CPU's products keep all
    digits of float32: at bf16 or tf32, K + a b would round a small a b away.
    """
    return (
        jax.default_backend() == "cpu"
        and jnp.finfo(x.dtype).bits >= 32
        and math.prod(x.shape[:-1]) >= x.shape[-1]
        and not _sharded_explicitly(x)
    )


def inputs_last(x: Array, axis: tuple[int, ...]) -> Array:
    """The contracted axes of `x`, in ascending order as flax orders them, made the last one."""
    axes = sorted(i % x.ndim for i in axis)
    if axes == [x.ndim - 1]:
        return x
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    kept = x.shape[: x.ndim - len(axes)]
    return x.reshape(*kept, math.prod(x.shape[len(kept) :]))


def adapted(
    x: Array, kernel: Array, bias: Array | None, a: Array, b: Array, axis: tuple[int, ...]
) -> Array:
    """The whole adapted layer in its merged form; `kernel` and `bias` as flax shapes them."""
    features = kernel.shape[len(axis) :]
    rows = inputs_last(x, axis)
    flat = kernel.reshape(a.shape[0], b.shape[1])
    y = merged(rows, flat, a.astype(x.dtype), b.astype(x.dtype))
    y = y.reshape(*rows.shape[:-1], *features)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def fold(kernel: Array, a: Array, b: Array, scale) -> Array:
    """K + s a b in the kernel's shape and dtype, computed in float32 or better."""
    wide = jnp.promote_types(jnp.result_type(kernel, a, b), jnp.float32)
    product = jnp.matmul(a.astype(wide), b.astype(wide), precision=lax.Precision.HIGHEST)
    return (kernel.astype(wide) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)


def init_pair(
    key: Array, path: str, shape: tuple[int, int], rank: int, dtype
) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
    """a uniform in ±1/sqrt(m) (kaiming-uniform with a = sqrt 5), b zero.

    The path is part of the key, so that one adapter's start does not depend on the others.
    """
    m, n = shape
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    bound = 1 / math.sqrt(m)
    a = jax.random.uniform(key, (m, rank), dtype, -bound, bound)
    return a, jnp.zeros((rank, n), dtype)


def factor_dtype(dtype, kernel_dtype):
    """The dtype asked for, else the kernel's, but at least float32: bf16 loses small steps."""
    found = jnp.promote_types(kernel_dtype, jnp.float32) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"the factors' dtype is {found}; they are trained: pass a floating dtype")
    return found
