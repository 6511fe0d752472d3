"""Which Hugging Face modules a pair stands for, and which slices of a and b belong to each.

Slices are of the canonical factors, a (*batch, *m, r) and b (*batch, r, *n): a batch entry is a
module of its own; a Split divides one axis of one factor further, the other factor shared; a Join
makes one module of several entries.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lorapro_jax import _layouts
from lorapro_jax._layouts import Pair
from lorapro_jax._paths import no_match_error


@dataclasses.dataclass(frozen=True)
class Split:
    """Several Hugging Face modules that one pair adapts at once, side by side along one axis.

    A fused query, key and value share a: each module gets all of a and its part of b.

    Args:
      names: the modules' name templates, in the order in which they lie along the axis.
      axis: the axis of the leaf, as it is stored, that is divided; may be negative. A batch axis
        gives each module an entry of its own, as where gate and up are stacked on one axis.
      factor: whose axis. "b" divides the outputs, the usual case; "a" divides the inputs, as for
        experts that share b.
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
    """One Hugging Face module that several batch entries of a pair adapt side by side.

    N pairs of rank r, one for each head, are one pair of rank N r: one factor's blocks stand in a
    row, the other's on a diagonal. Entries whose names come out the same are joined, in order.

    Args:
      name: the module's name template, or a `Split`.
      factor: whose entries are put on the diagonal. "b": each head has outputs of its own and all
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
    slices: tuple[tuple[tuple, tuple], ...]  # indices that leave a (*m, r) and b (r, *n)
    diagonal: str  # the factor, "a" or "b", whose slices are joined on a diagonal


def take(share: Share, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The module's A (r, in) and B (out, r) out of a pair's canonical factors."""
    pairs = [
        (a[i].reshape(-1, a.shape[-1]), b[j].reshape(b[j].shape[0], -1)) for i, j in share.slices
    ]
    if len(pairs) == 1:
        return pairs[0][0].T, pairs[0][1].T
    many_a, many_b = zip(*pairs, strict=True)
    if share.diagonal == "a":
        return _diagonal(many_a).T, np.concatenate(many_b).T
    return np.concatenate(many_a, axis=1).T, _diagonal(many_b).T


def _diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    joined = np.zeros((rows, columns), blocks[0].dtype)
    row = column = 0
    for block in blocks:
        joined[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return joined


def give(share: Share, A: np.ndarray, B: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (m, r) and (r, n) of each slice, which `take` would make A and B of.

    Raises:
      ValueError: joined entries were trained as one pair, whose blocks off the diagonal count.
    """
    count = len(share.slices)
    a, b = np.split(A.T, count, axis=1), np.split(B.T, count, axis=0)
    inner, axis = (a, 0) if share.diagonal == "a" else (b, 1)
    blocks = [np.split(x, count, axis=axis) for x in inner]
    own = [row[i] for i, row in enumerate(blocks)]
    if any(np.any(x) for i, row in enumerate(blocks) for j, x in enumerate(row) if i != j):
        raise ValueError(
            f"{share.module} was not made of {count} separate pairs: its lora_"
            f"{share.diagonal.upper()} is not block-diagonal. Load it without `like`"
        )
    return list(zip(own, b, strict=True) if share.diagonal == "a" else zip(a, own, strict=True))


def canonical_shapes(pair: Pair, leaves: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes that `_layouts.read` would return, for arrays and ShapeDtypeStructs alike."""
    two = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in (pair.a, pair.b)]
    a, b = jax.eval_shape(lambda *factors: _layouts.read(pair._replace(a=0, b=1), factors), *two)
    return a.shape, b.shape


def plan(
    pairs: Sequence[Pair], leaves: Sequence[Any], modules: Mapping[str, Target]
) -> dict[str, list[Share]]:
    """{pair's path: its shares}.

    Raises:
      ValueError: a pair that no pattern matches or that two match, a pattern that matches no
        pair, a template that cannot be filled in, a split that does not fit its axis, or one
        module that is named twice.
    """
    for pattern in modules:
        if not any(re.fullmatch(pattern, pair.path) for pair in pairs):
            raise no_match_error("modules", pattern, [pair.path for pair in pairs])
    planned = {pair.path: _shares(pair, leaves, modules) for pair in pairs}
    owners: dict[str, str] = {}
    for path, shares in planned.items():
        for share in shares:
            if share.module in owners:
                raise ValueError(
                    f"modules names {share.module} twice, for {owners[share.module]} and {path}; "
                    "keep apart what differs: groups of the regex as \\1, the indices of the batch "
                    "axes (stacked layers) as {0}, {1}. Heads that have a pair each take a Join"
                )
            owners[share.module] = path
    return planned


def _shares(pair: Pair, leaves: Sequence[Any], modules: Mapping[str, Target]) -> list[Share]:
    match, target = _match(pair.path, modules)
    join = target if isinstance(target, Join) else None
    target = target.name if isinstance(target, Join) else target
    sizes = [leaves[pair.a].shape[axis] for axis in pair.a_axes.batch]
    named: list[tuple[str, tuple[tuple, tuple]]] = []
    for index in itertools.product(*map(range, sizes)):
        whole = not isinstance(target, Split)
        parts = [(target, (), ())] if whole else _parts(pair, leaves, target, index)
        for template, a, b in parts:
            named.append((_name(template, match, index), ((*index, *a), (*index, *b))))
    if join is None:
        return [Share(name, (slices,), "b") for name, slices in named]
    groups: dict[str, list[tuple[tuple, tuple]]] = {}
    for name, slices in named:
        groups.setdefault(name, []).append(slices)
    return [Share(name, tuple(slices), join.factor) for name, slices in groups.items()]


def _match(path: str, modules: Mapping[str, Target]) -> tuple[re.Match, Target]:
    matches = [(re.fullmatch(pattern, path), target) for pattern, target in modules.items()]
    found = [(match, target) for match, target in matches if match]
    if len(found) != 1:
        hits = [match.re.pattern for match, _ in found]
        problem = f"is matched by {hits}; make them disjoint" if hits else "is matched by none"
        raise ValueError(
            f"modules must name the Hugging Face module of every pair: {path} {problem} (whole "
            "path, re.fullmatch)"
        )
    return found[0]


def _name(template: str, match: re.Match, index: tuple[int, ...]) -> str:
    try:
        name = match.expand(template).format(*index)
    except (re.error, IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"modules: the name {template!r} cannot be filled in for {match.string} ({error}); "
            f"its regex has {match.re.groups} groups (\\1, ...) and the pair {len(index)} batch "
            "axes ({0}, ...)"
        ) from error
    if not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", name):
        raise ValueError(f"modules: {match.string} becomes {name!r}, which is no module's name")
    return name


def _parts(
    pair: Pair, leaves: Sequence[Any], split: Split, index: tuple[int, ...]
) -> list[tuple[str, tuple, tuple]]:
    """(template, slices of a, slices of b) of each module at one index of the batch axes."""
    axes, leaf = {"a": (pair.a_axes, pair.a), "b": (pair.b_axes, pair.b)}[split.factor]
    shape = leaves[leaf].shape
    axis = split.axis + len(shape) if split.axis < 0 else split.axis
    if axis not in (*axes.batch, *axes.others):
        raise ValueError(
            f"{pair.path}: axis {split.axis} of {split.factor} cannot be split; of its "
            f"{len(shape)} axes these can: {sorted((*axes.batch, *axes.others))}"
        )
    if axis in axes.batch:  # both factors have it, and every entry is a whole pair
        _sizes(pair.path, dataclasses.replace(split, sizes=(1,) * len(split.names)), shape[axis])
        return [(split.names[index[axes.batch.index(axis)]], (), ())]
    # The others follow the batch's indices in a, those and the rank in b.
    before = (slice(None),) * (axes.others.index(axis) + (split.factor == "b"))
    parts, start = [], 0
    for name, size in zip(split.names, _sizes(pair.path, split, shape[axis]), strict=True):
        part = (*before, slice(start, start + size))
        parts.append((name, part, ()) if split.factor == "a" else (name, (), part))
        start += size
    return parts


def _sizes(path: str, split: Split, size: int) -> tuple[int, ...]:
    count = len(split.names)
    sizes = split.sizes
    if sizes is None and count and size % count == 0:
        sizes = (size // count,) * count
    if sizes is None or len(sizes) != count or sum(sizes) != size or min(sizes) < 1:
        raise ValueError(
            f"{path}: axis {split.axis} of {split.factor} has size {size}, which "
            f"{'equal parts' if split.sizes is None else f'sizes={split.sizes}'} cannot divide "
            f"among {count} modules; pass Split(..., sizes=(...))"
        )
    return sizes
