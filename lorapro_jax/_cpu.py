"""What XLA's CPU backend does better if it does not know it: branches that are always taken.

They are for programs on a single CPU. Where JAX's default backend is not where a program runs, they
are missed, or not needed: no more.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array

from lorapro_jax._sharding import possible_shards


def for_one_cpu(x: Any) -> bool:
    """Whether `x` is of a program that is compiled for a single CPU."""
    cpu = jax.default_backend() == "cpu"
    return cpu and isinstance(x, Tracer) and possible_shards(x) == 1


def once_there(x: Array) -> Array | None:
    """True, once there is `x`, an array of floats; None if the program is not for one CPU."""
    if not for_one_cpu(x):
        return None
    first = x[(0,) * x.ndim]
    return (first >= 0) | (first < 0) | jnp.isnan(first)


def after(before: Array | None, make: Callable[[], Any]) -> Any:
    """`make()`, but not before there is the array that `before` is `once_there` of, if any.

    XLA takes all groups of pairs of an update at once. The arrays between the factors and the step
    of some groups nearly fit a cache; those of all do not, and are so many that the C library has
    them mapped anew, page by page, in every step. A branch is the one wait that XLA keeps.
    """
    if before is None:
        return make()
    nothing = functools.partial(jax.tree.map, jnp.zeros_like, jax.eval_shape(make))
    return lax.cond(before, make, nothing)


def stack(arrays: Sequence[Array]) -> Array:
    """`jnp.stack` of arrays with one axis or more, as one operation and not one for each too."""
    return jnp.reshape(jnp.concatenate(arrays), (len(arrays), *arrays[0].shape))


def places(count: int, x: Array) -> Sequence[Array] | None:
    """0, 1 and so on, of which XLA does not know which is which; `x` is any array of floats.

    A slice at a place that XLA knows is a kernel of its own for every place, and those were half of
    what an update of many pairs takes to compile. Slices at unknown places are one kernel. None if
    the program is not for one CPU.
    """
    there = once_there(x)
    if there is None:
        return None
    numbers = [jnp.uint32(i) for i in range(count)]
    return lax.cond(there, lambda: numbers, lambda: [jnp.zeros_like(i) for i in numbers])
