"""Which Hugging Face modules a pair stands for, and which slices of a and b belong to each.

Slices are of the canonical factors, a (*batch, *m, r) and b (*batch, r, *n). A batch entry is a
module; a Split divides one axis of one factor further; a Join makes one module of several entries.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.linalg import block_diag

from lorapro_jax._layouts import Pair
from lorapro_jax._paths import check_matches


@dataclasses.dataclass(frozen=True)
class Split:
    """Several Hugging Face modules that one pair adapts, side by side along an axis: fused q, k, v.

    Args:
      names: the modules' name templates, in the order in which they lie along the axis.
      axis: of the stored leaf; may be negative. A batch axis gives each module one entry.
      factor: whose axis. "b" divides the outputs, all modules share a; "a" divides the inputs.
      sizes: how much of the axis each module takes; None for equal parts.

    Example:
      One b (r, 2, heads, width) for key and value:
      >>> from lorapro_jax import peft
      >>> kv = peft.Split((r"layers.\\1.self_attn.k_proj", r"layers.\\1.self_attn.v_proj"), axis=1)
    """

    names: tuple[str, ...]
    axis: int
    factor: Literal["a", "b"] = "b"
    sizes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Join:
    """One Hugging Face module that N batch entries of a pair adapt: one pair of rank N r.

    Args:
      name: the module's name template, or a `Split`.
      factor: whose entries are blocks on a diagonal. "b": each head has outputs of its own and all
        see the same inputs, as in a query. "a": inputs of its own, and the outputs add up.

    Example:
      openpi's a (heads, in, r), b (heads, r, width) of one query projection:
      >>> from lorapro_jax import peft
      >>> query = peft.Join("model.layers.0.self_attn.q_proj")
    """

    name: str | Split
    factor: Literal["a", "b"] = "b"


Target = str | Split | Join


class Share(NamedTuple):
    """One module's part of a pair; more than one slice only where entries are joined."""

    module: str
    slices: list[tuple[tuple, tuple]]  # indices that leave a (*m, r) and b (r, *n)
    diagonal: Literal["a", "b"]  # the factor whose slices are joined on a diagonal


def take(share: Share, a: np.ndarray, b: np.ndarray) -> tuple[Any, Any]:
    """The module's A (r, in) and B (out, r) out of a pair's canonical factors."""
    many_a = [a[i].reshape(-1, a.shape[-1]) for i, _ in share.slices]
    many_b = [b[j].reshape(b[j].shape[0], -1) for _, j in share.slices]
    if share.diagonal == "a":
        return block_diag(*many_a).T, np.concatenate(many_b).T
    return np.concatenate(many_a, axis=1).T, block_diag(*many_b).T


def plan(pairs: Sequence[Pair], leaves: Sequence, modules: Mapping) -> dict[str, list[Share]]:
    """{pair's path: its shares}; raises ValueError for a module that is named twice."""
    check_matches("modules", modules, [pair.path for pair in pairs])
    planned = {pair.path: _shares(pair, leaves, modules) for pair in pairs}
    owners: dict[str, str] = {}
    for path, shares in planned.items():
        for share in shares:
            if share.module in owners:
                raise ValueError(
                    f"modules names {share.module} twice, for {owners[share.module]} and {path}; "
                    "keep them apart by groups, \\1, and batch indices, {0}, or pass a Join"
                )
            owners[share.module] = path
    return planned


def _shares(pair: Pair, leaves: Sequence[Any], modules: Mapping[str, Target]) -> list[Share]:
    matches = [match for pattern in modules if (match := re.fullmatch(pattern, pair.path))]
    hits = [match.re.pattern for match in matches]
    if len(hits) != 1:
        problem = f"is matched by {hits}; make them disjoint" if hits else "is matched by none"
        raise ValueError(f"modules must name the module of every pair: {pair.path} {problem}")
    join, target = None, modules[hits[0]]
    if isinstance(target, Join):
        join, target = target, target.name
    shares: dict[str | int, Share] = {}
    for index in np.ndindex(*(leaves[pair.a].shape[axis] for axis in pair.a_axes.batch)):
        for template, a, b in _parts(pair, leaves, target, index):
            module = _name(template, matches[0], index)
            key = module if join else len(shares)  # only joined entries may have one name
            share = shares.setdefault(key, Share(module, [], join.factor if join else "b"))
            share.slices.append(((*index, *a), (*index, *b)))
    return list(shares.values())


def _name(template: str, match: re.Match, index: tuple[int, ...]) -> str:
    try:
        name = match.expand(template).format(*index)
    except (re.error, IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"modules: the name {template!r} cannot be filled in for {match.string} ({error}); "
            f"its regex has {match.re.groups} groups (\\1, ...), the pair {len(index)} batch axes"
        ) from error
    if not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", name):
        raise ValueError(f"modules: {match.string} becomes {name!r}, which is no module's name")
    return name


def _parts(pair: Pair, leaves: Sequence, split: str | Split, index: tuple) -> list[tuple]:
    """(template, slices of a, slices of b) of each module at one index of the batch axes."""
    if isinstance(split, str):
        return [(split, (), ())]
    axes, leaf = (pair.a_axes, pair.a) if split.factor == "a" else (pair.b_axes, pair.b)
    shape, count = leaves[leaf].shape, len(split.names)
    axis = split.axis + len(shape) if split.axis < 0 else split.axis
    where, divisible = f"{pair.path}: axis {split.axis} of {split.factor}", axes.batch + axes.others
    if axis not in divisible:
        raise ValueError(f"{where} cannot be split; these axes can: {sorted(divisible)}")
    equal = (1 if axis in axes.batch else shape[axis] // max(count, 1),) * count
    sizes = equal if split.sizes is None or axis in axes.batch else split.sizes
    if len(sizes) != count or sum(sizes) != shape[axis] or min(sizes) < 1:
        parts = "equal parts" if split.sizes is None else f"sizes={split.sizes}"
        raise ValueError(
            f"{where} has size {shape[axis]}, which {parts} cannot divide among {count} modules; "
            "pass Split(..., sizes=(...))"
        )
    if axis in axes.batch:  # both factors have it, and every entry is a whole pair
        return [(split.names[index[axes.batch.index(axis)]], (), ())]
    # The others follow the batch's indices in a, those and the rank in b.
    before = (slice(None),) * (axes.others.index(axis) + (split.factor == "b"))
    ends = itertools.accumulate(sizes)
    parts = [(*before, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    pairs = [(part, ()) if split.factor == "a" else ((), part) for part in parts]
    return [(name, *slices) for name, slices in zip(split.names, pairs, strict=True)]
