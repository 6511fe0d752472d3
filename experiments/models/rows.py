"""Keeps a batch's rows apart on a mesh, so that it is the weights that travel.

Where weights are cut along the axis that a product sums over, XLA may as well gather the rows of
the batch and leave the weights. With few weights and many rows that is the costlier way.
"""

import jax
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp")  # of a mesh: those that share the rows of a batch


def rows_stay(x: jax.Array) -> jax.Array:
    """`x` (rows, ...), whose rows are cut over these axes of the mesh in use, if there is one."""
    axes = tuple(name for name in jax.sharding.get_abstract_mesh().axis_names if name in AXES)
    if not axes:
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *rest))
