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


def state_shardings(
    tx: optax.GradientTransformation | optax.MultiSteps,
    params: Any,
    *,
    kernels: Kernels | None = None,
    layout: Layout | None = None,
) -> Any:
    """The sharding of each leaf of `tx.init(params)`, for jit's out_shardings and for Orbax.

    A leaf that belongs to a parameter (its path ends with the parameter's, shapes agree) is sharded
    as that is, the pairs' moments as their factors or, if dense, their kernels; the rest is not.

    Args:
      tx: any optax transformation, with whatever it is chained or masked with.
      params: arrays or ShapeDtypeStructs whose `sharding` is a NamedSharding, all on one mesh.
      kernels: from a pair's path to its kernel's PartitionSpec, (*batch, *m, *n), where kernels are
        sharded and factors are not. None, the default: rows as a's, then columns as b's.
      layout: as in `lp.lorapro`.

    Returns:
      A tree of the structure of `tx.init(params)` with a NamedSharding at every leaf.

    Raises:
      ValueError: a parameter without a NamedSharding, or on another mesh than the others; a spec
        from `kernels` with more entries than its kernel has axes; whatever `lp.labels` raises.

    Example:
      >>> import jax, jax.numpy as jnp, lorapro_jax as lp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"q": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 4))}}
      >>> params = jax.device_put(params, NamedSharding(mesh, P("fsdp", None)))
      >>> state = lp.state_shardings(lp.lorapro_adamw(1e-4, 2.0), params)
      >>> tuple(optax.tree.get(state, "mu_a")["q"].spec)
      (None, 'fsdp', None)
    """
    paths, leaves, _ = flatten(params)
    mesh = _mesh(paths, leaves)
    pairs = find_pairs(paths, leaves, layout, require_pairs=False)
    # {(end of a path in the state, shape): spec}
    specs = {(path, x.shape): x.sharding.spec for path, x in zip(paths, leaves, strict=True)}
    for name, group in groups(pairs, leaves).items():
        for field, shape, spec in _fields(group, leaves, kernels):
            specs[f"{field}/{name}", shape] = spec

    def sharding(path, leaf) -> NamedSharding:
        keys = path_str(path).split("/")
        ends = (("/".join(keys[i:]), leaf.shape) for i in range(len(keys)))
        spec = next((specs[end] for end in ends if end in specs), ())
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(tx.init, params))


def _mesh(paths: Sequence[str], leaves: Sequence[Any]) -> Any:
    """The one mesh of all parameters."""
    if not leaves:
        raise ValueError("params has no leaves, so there is no mesh to shard the state over")
    for path, leaf in zip(paths, leaves, strict=True):
        found = getattr(leaf, "sharding", None)
        if not isinstance(found, NamedSharding) or found.mesh != leaves[0].sharding.mesh:
            raise ValueError(
                f"{path} has sharding {found}; every parameter needs a NamedSharding on one mesh: "
                "jax.device_put(params, shardings), or ShapeDtypeStruct(sharding=...)"
            )
    return leaves[0].sharding.mesh


def _fields(group: Group, leaves: Sequence[Any], kernels: Kernels | None) -> list[tuple]:
    """(field, shape, spec) of what a group's state has, in any mode."""
    pair, batch, k = group.pairs[0], group.batch, len(group.batch)
    specs = [padded(leaves[i].sharding.spec, leaves[i].ndim) for i in (pair.a, pair.b)]
    (a_shape, b_shape), (a, b) = group.shapes, factor_specs(pair, *specs)
    dense, kernel = (*batch, *group.m, *group.n), _kernel(group, kernel_spec(pair, *specs), kernels)
    return [
        ("mu_a", a_shape, a), ("mu_b", b_shape, b), ("row", a_shape[:-1], a[:-1]),
        ("col", (*b_shape[:k], *b_shape[k + 1 :]), (*b[:k], *b[k + 1 :])),
        ("mu", dense, kernel), ("rms", dense, kernel), ("size", batch, kernel[:k]),
        ("recent", batch, a[:k]), ("bounded", batch, a[:k]),
    ]  # fmt: skip


def _kernel(group: Group, default: tuple[Any, ...], kernels: Kernels | None) -> tuple[Any, ...]:
    """How a group's moments, (*batch, *m, *n), are sharded."""
    given = {kernels(pair.path) for pair in group.pairs} if kernels else {None}
    chosen, axes = next(iter(given)), len(default) - group.stacked
    if given == {None}:
        return default
    if chosen is None or len(given) > 1 or len(chosen) > axes:
        raise ValueError(
            f"kernels gives {given} for {', '.join(pair.path for pair in group.pairs)}, whose "
            f"moments are one array; they need one spec, of {axes} axes at most"
        )
    return padded((None, *chosen) if group.stacked else chosen, len(default))
