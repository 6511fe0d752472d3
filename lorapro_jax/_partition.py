"""Which parameters train: labels for every leaf, a frozen base, and the tree split in two."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from lorapro_jax._layouts import Layout, factor_indices, find_pairs, flatten
from lorapro_jax._paths import check_matches

LORA, FROZEN = "lora", "frozen"


def labels(
    params: Any,
    *,
    extra: Iterable[str] = (),
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> Any:
    """A label for every leaf: "lora", one of the patterns in `extra`, or "frozen".

    Args:
      params: a pytree: Linen dicts (plain, FrozenDict, boxed), an nnx.State, or any other.
      extra: regexes of whole paths of further leaves, such as r"head/.*". Factors stay "lora".
      layout: how pairs are named; `lp.layouts.FLAX` by default.
      require_pairs: whether a tree with leaves but without a pair is an error.

    Returns:
      A tree of the structure of `params` with a string at every leaf, for `optax.partition`.

    Raises:
      ValueError: no pair, or an incomplete or ambiguous one; a pattern for no leaf; two for one.

    Example:
      >>> import jax.numpy as jnp, lorapro_jax as lp
      >>> x = jnp.ones((2, 2))
      >>> params = {"q": {"kernel": x, "lora_a": x, "lora_b": x}, "head": {"bias": x}}
      >>> lp.labels(params, extra=[r"head/.*"])
      {'head': {'bias': 'head/.*'}, 'q': {'kernel': 'frozen', 'lora_a': 'lora', 'lora_b': 'lora'}}
    """
    paths, leaves, treedef = flatten(params)
    inside = factor_indices(find_pairs(paths, leaves, layout, require_pairs=require_pairs))
    patterns, named = tuple(extra), [LORA] * len(paths)
    others = {i: path for i, path in enumerate(paths) if i not in inside}
    check_matches("extra", patterns if leaves else (), others.values())
    for i, path in others.items():
        hits = [pattern for pattern in patterns if re.fullmatch(pattern, path)]
        if len(hits) > 1:
            raise ValueError(f"{path} is matched by {hits}; make the patterns of `extra` disjoint")
        named[i] = hits[0] if hits else FROZEN
    return jax.tree.unflatten(treedef, named)


def freeze_base(
    tx: optax.GradientTransformation,
    *,
    extra: Mapping[str, optax.GradientTransformation] | None = None,
    layout: Layout | None = None,
    require_pairs: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """`tx` for the LoRA factors, `extra` for further leaves, zero updates for the rest.

    A frozen leaf has no optimizer state. To save its backward pass too, differentiate only what
    trains: `lora, base = lp.split(params)`, or `nnx.DiffState(0, nnx.LoRAParam)`.

    Args:
      tx: the transformation of the factors.
      extra: {regex of whole paths: transformation}, such as {r"head/.*": optax.adamw(1e-3)}.
      layout, require_pairs: as in `lp.labels`. Give `tx` the same layout.

    Returns:
      An `optax.partition`.

    Raises:
      ValueError: at init and update, whatever `lp.labels` raises.

    Example:
      >>> import lorapro_jax as lp, optax
      >>> tx = lp.freeze_base(lp.lorapro_adamw(1e-4, 2.0), extra={r"head/.*": optax.adamw(1e-3)})
    """
    extra = dict(extra or {})
    if reserved := {LORA, FROZEN} & extra.keys():
        raise ValueError(f"extra may not use {sorted(reserved)} as a pattern: the label is taken")
    return optax.partition(
        {LORA: tx, FROZEN: optax.set_to_zero(), **extra},
        lambda params: labels(params, extra=extra, layout=layout, require_pairs=require_pairs),
    )


def split(params: Any, *, layout: Layout | None = None) -> tuple[Any, Any]:
    """(lora, base): `params` twice, with None for the leaves that are in the other one.

    None is no leaf: `jax.grad` with respect to `lora` leaves the base alone, even one of integers,
    and an optimizer initialised on `lora` holds no state for it.

    Args:
      params, layout: as in `lp.labels`.

    Returns:
      Two trees; `lp.merge(lora, base)` is `params` again.

    Raises:
      ValueError: whatever `lp.labels` raises.

    Example:
      >>> import jax.numpy as jnp, lorapro_jax as lp
      >>> x = jnp.ones((2, 2))
      >>> lora, base = lp.split({"kernel": x, "lora_a": x, "lora_b": x})
      >>> lora["kernel"] is None, base["lora_a"] is None
      (True, True)
    """
    named = labels(params, layout=layout)
    lora = jax.tree.map(lambda name, leaf: leaf if name == LORA else None, named, params)
    base = jax.tree.map(lambda name, leaf: None if name == LORA else leaf, named, params)
    return lora, base


def merge(lora: Any, base: Any) -> Any:
    """The tree that `lp.split` took apart.

    Args:
      lora, base: two trees alike, with None in one where the other has a leaf, or in both.

    Returns:
      One tree with every leaf.

    Raises:
      ValueError: the structures differ, or a leaf is in both trees.

    Example:
      >>> import lorapro_jax as lp
      >>> lp.merge({"w": None, "lora_a": 1.0}, {"w": 2.0, "lora_a": None})
      {'lora_a': 1.0, 'w': 2.0}
    """
    paths, ours, treedef = flatten(lora, lambda x: x is None)
    _, theirs, other = flatten(base, lambda x: x is None)
    if treedef != other:
        raise ValueError(f"lora and base are not two halves of one tree: {treedef}; {other}")
    for path, x, y in zip(paths, ours, theirs, strict=True):
        if x is not None and y is not None:
            raise ValueError(f"{path} is in both lora and base; a leaf belongs to one of them")
    merged = [y if x is None else x for x, y in zip(ours, theirs, strict=True)]
    return jax.tree.unflatten(treedef, merged)
