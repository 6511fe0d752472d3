"""Exponential averages of first and second moments, for gradients of any size that float32 holds.

Second moments are kept as their roots: squares of 1e30 and of 1e-30 have no place in float32.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def positive(size: Array) -> Array:
    """`size`, or 1 where it is 0: what is divided by it is 0 then, too."""
    return jnp.where(size > 0, size, 1)


def largest(*arrays: Array) -> Float[Array, ""]:
    """The largest entry's size, or 1 if all are 0: what is divided by it can be squared."""
    return positive(functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x)) for x in arrays)))


def mean(new: Array, old: Array, decay: Any) -> Array:
    """One step of an exponential average, in the new value's dtype."""
    return decay * old.astype(new.dtype) + (1 - decay) * new


def mean_root(new: Array, old: Array, decay: Any) -> Array:
    """One step of an exponential average of squares, of which `old` and `new` are the roots."""
    return jnp.hypot((1 - decay) ** 0.5 * new, decay**0.5 * old)


def correction(decay: Any, count: Int[Array, ""], dtype: Any) -> Float[Array, ""]:
    """1 - decay^count, by which an average that started from 0 is too small."""
    known = isinstance(decay, int | float) and decay > 0  # then in double precision
    log = math.log(decay) if known else jnp.log(jnp.asarray(decay, dtype))
    return -jnp.expm1(count.astype(dtype) * log)
