"""The sharding of every leaf of an optimizer state: its parameter's, or its pair's kernel's."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lorapro_jax._groups import Group, groups
from lorapro_jax._layouts import Layout, factor_specs, find_pairs, flatten, kernel_spec
from lorapro_jax._paths import path_str
from lorapro_jax._sharding import padded

Kernels = Callable[[str], PartitionSpec | None]
Placed = tuple[tuple[int, ...], tuple[Any, ...]]  # shape and spec


def state_shardings(
    tx: optax.GradientTransformation | optax.MultiSteps,
    params: Any,
    *,
    kernels: Kernels | None = None,
    layout: Layout | None = None,
) -> Any:
    """The sharding of each leaf of `tx.init(params)`, for jit's out_shardings and for Orbax.

    A leaf that belongs to a parameter (its path ends with the parameter's, shapes agree) is sharded
    as that is; what a group of pairs holds as its factors, and full mode's dense moments as the
    kernel that the pair adapts. Everything else (counts, hyperparameters) is replicated. Works for
    any optax transformation.

    Args:
      tx: the transformation, with whatever it is chained or masked with.
      params: arrays or ShapeDtypeStructs whose `sharding` is a NamedSharding, all on one mesh.
      kernels: from a pair's path to the PartitionSpec of its kernel, as (*batch, *m, *n), or None
        for the default: rows sharded as a's, columns as b's, the rows first where both want one
        mesh axis. To be given where factors are replicated and kernels are not.
      layout: how pairs are named and laid out; `lp.layouts.FLAX` by default.

    Returns:
      A tree of the structure of `tx.init(params)` with a NamedSharding at every leaf.

    Raises:
      ValueError: a parameter without a NamedSharding, or on another mesh than the others; a spec
        from `kernels` with more entries than its kernel has axes; whatever `lp.labels` raises.

    Example:
      >>> import jax, jax.numpy as jnp, lorapro_jax as lp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> a, b = (NamedSharding(mesh, spec) for spec in (P("fsdp", None), P()))
      >>> params = {"q": {"lora_a": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=a),
      ...                 "lora_b": jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=b)}}
      >>> state = lp.state_shardings(lp.lorapro_adamw(1e-4, 2.0), params)
      >>> tuple(optax.tree.get(state, "mu_a")["q"].spec)
      (None, 'fsdp', None)
    """
    paths, leaves, _ = flatten(params)
    mesh = _mesh(paths, leaves)
    pairs = find_pairs(paths, leaves, layout, require_pairs=False)
    known: dict[str, Placed] = {
        path: (leaf.shape, leaf.sharding.spec) for path, leaf in zip(paths, leaves, strict=True)
    }
    for name, group in groups(pairs, leaves).items():
        known |= {f"{field}/{name}": of for field, of in _fields(group, leaves, kernels).items()}

    def sharding(path, leaf) -> NamedSharding:
        keys = path_str(path).split("/")
        ends = ("/".join(keys[i:]) for i in range(len(keys)))
        specs = (known[end][1] for end in ends if end in known and known[end][0] == leaf.shape)
        return NamedSharding(mesh, PartitionSpec(*next(specs, ())))

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(tx.init, params))


def _mesh(paths: Sequence[str], leaves: Sequence[Any]) -> Any:
    """The one mesh of all parameters."""
    mesh = None
    for path, leaf in zip(paths, leaves, strict=True):
        own = getattr(leaf, "sharding", None)
        if not isinstance(own, NamedSharding) or mesh not in (None, own.mesh):
            raise ValueError(
                f"{path} has sharding {own}; every parameter needs a NamedSharding on one mesh "
                f"({mesh}): jax.device_put(params, shardings), or ShapeDtypeStruct(sharding=...)"
            )
        mesh = own.mesh
    if mesh is None:
        raise ValueError("params has no leaves, so there is no mesh to shard the state over")
    return mesh


def _fields(group: Group, leaves: Sequence[Any], kernels: Kernels | None) -> dict[str, Placed]:
    """{field: (shape, spec)} of what a group's state has, in any mode."""
    pair, (batch, m, n) = group.pairs[0], (group.batch, group.m, group.n)
    specs = tuple(padded(leaves[i].sharding.spec, leaves[i].ndim) for i in (pair.a, pair.b))
    kernel = _kernel(group, kernel_spec(pair, *specs), kernels)
    a_spec, b_spec = factor_specs(pair, *specs)
    a, b = zip(group.shapes, (a_spec, b_spec), strict=True)
    k = len(batch)
    return {
        "mu_a": a,
        "mu_b": b,
        "row": ((*batch, *m), a_spec[:-1]),
        "col": ((*batch, *n), (*b_spec[:k], *b_spec[k + 1 :])),
        "mu": ((*batch, *m, *n), kernel),
        "rms": ((*batch, *m, *n), kernel),
        "size": (batch, kernel[:k]),
        "recent": (batch, a_spec[:k]),
        "bounded": (batch, a_spec[:k]),
    }


def _kernel(group: Group, default: tuple[Any, ...], kernels: Kernels | None) -> tuple[Any, ...]:
    """How a group's moments, (*batch, *m, *n), are sharded."""
    given = [kernels(pair.path) if kernels else None for pair in group.pairs]
    chosen = given[0]
    if given.count(None) == len(given):
        return default
    axes = len(group.m) + len(group.n) + (0 if group.stacked else len(group.batch))
    if chosen is None or any(spec != chosen for spec in given) or len(chosen) > axes:
        raise ValueError(
            f"kernels gives {given} for {', '.join(pair.path for pair in group.pairs)}, whose "
            f"moments are one array; they need one spec, of {axes} axes at most"
        )
    return padded((None, *chosen) if group.stacked else chosen, len(default))
