"""What XLA's CPU backend does better if it does not know it: branches that are always taken.

They are for programs on a single CPU. Where JAX's default backend is not where a program runs, they
are missed, or not needed: no more.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array

from lorapro_jax._sharding import possible_shards

Places = dict[int, list[Array]]


def for_one_cpu(x: Any) -> bool:
    """Whether `x` is of a program that is compiled for a single CPU."""
    cpu = jax.default_backend() == "cpu"
    return cpu and isinstance(x, Tracer) and possible_shards(x) == 1


def once_there(x: Any) -> Array | None:
    """True, once there is `x`, an array of floats; None if it is not of a program for one CPU."""
    if not for_one_cpu(x):
        return None
    first = x[(0,) * x.ndim]
    return (first >= 0) | (first < 0) | jnp.isnan(first)


def after(before: Array | None, *leaves: list[Array]) -> Sequence[list[Array]]:
    """The leaves of a group, of which the first pair is not there before the `once_there` is.

    What stacks the group's pairs waits for the first. XLA takes all groups of an update at once.
    The arrays between the factors and the step of some groups nearly fit a cache; those of all do
    not, and are so many that the C library has them mapped anew, page by page, in every step. A
    branch is the one wait that XLA keeps; with all pairs in it, it takes longer to compile.
    """
    if before is None:
        return leaves
    first = [these[:2] for these in leaves]
    first = lax.cond(before, lambda: first, lambda: jax.tree.map(jnp.zeros_like, first))
    return [[*pair, *these[2:]] for pair, these in zip(first, leaves, strict=True)]


def stack(arrays: Sequence[Array]) -> Array:
    """`jnp.stack` of arrays with one axis or more, as one operation and not one for each too."""
    return jnp.reshape(jnp.concatenate(arrays), (len(arrays), *arrays[0].shape))


def places(longest: dict[int, int], x: Any) -> Places | None:
    """Where arrays of so many rows begin that lie one after another, of which XLA does not know.

    `longest` is how many arrays there are by the number of their rows; `x` is any array of floats.
    A slice at a place that XLA knows is a kernel of its own for every place, and those were half of
    what an update of many pairs takes to compile. Slices at unknown places are one kernel. None if
    the program is not for one CPU.
    """
    there = once_there(x)
    if there is None:
        return None
    starts = {rows: [np.uint32(i * rows) for i in range(count)] for rows, count in longest.items()}
    return lax.cond(there, lambda: starts, lambda: jax.tree.map(np.zeros_like, starts))


def unstack(x: Array, at: Places) -> list[Array]:
    """The parts of a stacked array, by `places`.

    As rows of a matrix: a slice of one index along a leading axis, and without that axis, takes a
    quarter longer to compile.
    """
    count, *own = x.shape
    rows, *rest = own or (1,)
    flat, zeros = jnp.reshape(x, (count * rows, *rest)), [np.uint32(0) for _ in rest]
    part = functools.partial(lax.dynamic_slice, flat, slice_sizes=(rows, *rest))
    parts = [part([start, *zeros]) for start in at[rows][:count]]
    return parts if own else [jnp.reshape(one, ()) for one in parts]
