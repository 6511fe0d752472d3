"""A rule for pairs as an optax transformation: find the pairs, stack them, apply it, write back."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lorapro_jax._checks import check_scale
from lorapro_jax._groups import (
    Group,
    Scale,
    groups,
    join,
    joined,
    one_device,
    scale_of,
    stack,
    write_steps,
)
from lorapro_jax._layouts import (
    Layout,
    check_leaves,
    factor_indices,
    find_pairs,
    flatten,
)
from lorapro_jax._tangent import Factors

# (group, factors, (da, db), the group's state, number of this step from 1) -> ((da, db), new state)
Update = Callable[[Group, Factors, tuple[Array, Array], Any, Array], tuple[Any, Any]]


class Rule(NamedTuple):
    """What is done to each group. A rule without state has `state` None."""

    update: Update
    state: Any = None  # NamedTuple type: count, then fields that are {group: array}
    init: Callable[[Group, Sequence[Any]], tuple[Any, ...]] = lambda group, leaves: ()
    gradients: bool = True  # whether the updates are gradients; otherwise steps
    joins: bool = True  # whether groups of one shape are taken at once: fewer kernels, and a copy


def pairwise(
    rule: Rule, scale: Scale, layout: Layout | None, *, require_pairs: bool
) -> optax.GradientTransformationExtraArgs:
    """The rule on every pair; leaves in no pair pass through."""
    check_scale(scale)
    fields = rule.state._fields[1:] if rule.state else ()
    # compiled once for all groups of one shape, and eagerly too
    apply = jax.jit(rule.update, static_argnums=0)

    def find(paths: list[str], leaves: list[Any]) -> dict[str, Group]:
        check_leaves(paths, leaves)
        return groups(find_pairs(paths, leaves, layout, require_pairs=require_pairs), leaves)

    def init(params):
        paths, leaves, _ = flatten(params)
        if require_pairs:
            check_not_empty(params, leaves)
        found = find(paths, leaves)
        if not rule.state:
            return optax.EmptyState()
        count = jnp.zeros((), jnp.int32)
        if not leaves:  # optax.tree.map_params' placeholder: a leaf stands for any subtree
            return rule.state(count, *(count for _ in fields))
        return _state(rule, count, {name: rule.init(g, leaves) for name, g in found.items()})

    def update(updates, state, params=None, **extra_args):
        del extra_args
        paths, leaves, treedef = flatten(updates)
        values = aligned(paths, leaves, params)
        found, new, states = find(paths, values), list(leaves), {}
        count = jnp.zeros((), jnp.int32)
        if rule.state:
            _check_state(rule, state, found, values)
            count = jnp.asarray(optax.safe_increment(state.count))
        for names in _alike(rule, found, values):
            group = joined([found[name] for name in names])
            a, b = stack(group, values)
            p = Factors(a, b, scale_of(group, scale, a))
            steps = stack(group, leaves, gradients=rule.gradients)
            held = ([getattr(state, field)[name] for name in names] for field in fields)
            step, made = apply(_nameless(group), p, steps, tuple(map(join, held)), count)
            write_steps(group, step, new)
            ends = list(itertools.accumulate(found[name].batch[0] for name in names))
            for name, start, end in zip(names, [0, *ends], ends, strict=False):
                states[name] = tuple(x[start:end] if len(names) > 1 else x for x in made)
        fresh = _state(rule, count, states) if rule.state else state
        return jax.tree.unflatten(treedef, new), fresh

    return optax.GradientTransformationExtraArgs(init, update)


def _alike(rule: Rule, found: dict[str, Group], leaves: Sequence[Array]) -> list[list[str]]:
    """The names of the groups, those of one shape together unless joining could move shards."""
    alike: dict[Any, list[str]] = {}
    for name, group in found.items():
        joins = rule.joins and one_device(leaves[group.pairs[0].a])
        kind = (group.stacked, group.shapes[0][1:], group.shapes[1][1:], group.dtype)
        alike.setdefault(kind if joins else name, []).append(name)
    return list(alike.values())


def _nameless(group: Group) -> Group:
    """The group without what differs between groups of one shape."""
    return group._replace(pairs=(group.pairs[0]._replace(path="", a=0, b=1),))


def _state(rule: Rule, count: Array, by_group: dict[str, tuple[Any, ...]]) -> Any:
    """{group: fields} as one {group: array} for each field."""
    fields = range(len(rule.state._fields) - 1)
    return rule.state(count, *({name: of[i] for name, of in by_group.items()} for i in fields))


def _check_state(rule: Rule, state: Any, found: dict[str, Group], leaves: Sequence[Any]) -> None:
    """Raises ValueError where the state is not of this rule or not of these pairs."""
    kind, advice = rule.state.__name__, "make it anew with init(params), or restore the one saved"
    if getattr(state, "_fields", None) != rule.state._fields:
        raise ValueError(
            f"the state is a {type(state).__name__}, and this transformation needs a {kind}: it "
            f"was made in another mode or by another optimizer; {advice}"
        )
    for i, field in enumerate(rule.state._fields[1:]):
        held = {name: tuple(x.shape) for name, x in getattr(state, field).items()}
        made = jax.eval_shape(
            lambda i=i: {name: rule.init(group, leaves)[i] for name, group in found.items()}
        )
        needed = {name: tuple(x.shape) for name, x in made.items()}
        for name in sorted(held.keys() | needed.keys()):
            if held.get(name) != needed.get(name):
                raise ValueError(
                    f"{kind}.{field} does not fit the parameters: the state has "
                    f"{held.get(name, 'nothing')} for {name!r}, the pairs need "
                    f"{needed.get(name, 'nothing')}. Ranks or layers have changed; {advice}"
                )


def check_not_empty(params: Any, leaves: Sequence[Any]) -> None:
    """Raises ValueError for a tree without parameters, which would silently train nothing."""
    # optax.tree.map_params calls init with a placeholder of its own, which has no leaves
    if not leaves and not type(params).__module__.startswith("optax."):
        raise ValueError(
            "there are no parameters to train: the tree is empty. Was the model adapted "
            "(lp.nnx.add_lora before nnx.Optimizer, lp.linen.init_lora)? If the tree may be empty, "
            "pass require_pairs=False"
        )


def in_pairs(
    of_pairs: optax.GradientTransformation,
    of_others: optax.GradientTransformation,
    layout: Layout | None,
    *,
    require_pairs: bool,
) -> optax.GradientTransformationExtraArgs:
    """One rule for the factors, and another for the leaves in no pair."""

    def label(params):
        paths, leaves, treedef = flatten(params)
        if require_pairs:
            check_not_empty(params, leaves)
        pairs = find_pairs(paths, leaves, layout, require_pairs=require_pairs)
        inside = factor_indices(pairs)
        named = ["pairs" if i in inside else "others" for i in range(len(leaves))]
        return jax.tree.unflatten(treedef, named)

    split = optax.partition({"pairs": of_pairs, "others": of_others}, label)

    def update(updates, state, params=None, **extra_args):
        paths, leaves, treedef = flatten(updates)
        params = jax.tree.unflatten(treedef, aligned(paths, leaves, params))
        return split.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(split.init, update)


def aligned(paths: list[str], leaves: list[Any], params: Any) -> list[Any]:
    """The parameters of `paths`, by path: nnx passes another container than it got at init."""
    if params is None:
        raise ValueError(
            "LoRA-Pro needs the current factors: call update(updates, state, params) with params"
        )
    param_paths, param_leaves, _ = flatten(params)
    by_path = dict(zip(param_paths, param_leaves, strict=True))
    if len(by_path) < len(param_paths):
        twice = sorted({path for path in param_paths if param_paths.count(path) > 1})
        raise ValueError(f"two leaves of params share one path: {', '.join(twice)}; rename one")
    for path, leaf in zip(paths, leaves, strict=True):
        if path not in by_path or by_path[path].shape != leaf.shape:
            found = tuple(by_path[path].shape) if path in by_path else "no parameter"
            raise ValueError(
                f"{path}: the update has shape {tuple(leaf.shape)}, params have {found}; pass the "
                "params that the gradients were taken at"
            )
    return [by_path[path] for path in paths]
