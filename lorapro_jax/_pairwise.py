"""A rule for pairs as an optax transformation: find the pairs, stack them, apply it, write back."""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lorapro_jax import _groups
from lorapro_jax._checks import check_scale
from lorapro_jax._groups import Group, Scale, join, scale_of, split, stack, write_steps
from lorapro_jax._layouts import Layout, check_leaves, factor_indices, find_pairs, flatten
from lorapro_jax._tangent import Factors

Step = tuple[Array, Array]  # (h_a, h_b) or (da, db)
_JOINED = 150  # pairs, about: XLA compiles a longer stack in more than proportional time


class Rule(NamedTuple):
    """What is done to each group; a chain of rules is applied to arrays that are stacked once."""

    # (factors, step, fields of the state, number of this step from 1) -> (step, new fields)
    update: Callable[[Factors, Step, tuple[Array, ...], Array], tuple[Step, tuple[Array, ...]]]
    state: Any = None  # NamedTuple type whose fields are {group: array}; None: stateless
    init: Callable[[Group, Sequence[Any]], tuple[Array, ...]] = lambda group, leaves: ()
    joins: bool = True  # whether groups of one shape are taken at once: fewer kernels, and a copy


class PairsState(NamedTuple):
    """State of a chain of rules on pairs."""

    count: Int[Array, ""]  # steps taken
    rules: tuple[Any, ...]  # that of each rule that has one


def pairwise(
    *rules: Rule,
    scale: Scale,
    layout: Layout | None,
    require_pairs: bool,
    gradients: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The rules one after the other on every pair; leaves in no pair pass through.

    `gradients` tells whether the first rule's updates are gradients or steps.
    """
    check_scale(scale)
    held = [rule for rule in rules if rule.state]

    @jax.jit  # traced once for all groups of one shape, and compiled where the caller is not
    def apply(p: Factors, step: Step, fields: Sequence[tuple], count: Array):
        new, left = [], iter(fields)
        for rule in rules:
            step, made = rule.update(p, step, next(left) if rule.state else (), count)
            new += [made] if rule.state else []
        return step, new

    def find(paths: list[str], leaves: list[Any]) -> dict[str, Group]:
        check_leaves(paths, leaves)
        pairs = find_pairs(paths, leaves, layout, require_pairs=require_pairs)
        return _groups.groups(pairs, leaves)

    def states(found: dict[str, Group], leaves: Sequence[Any]) -> tuple[Any, ...]:
        made = {name: [rule.init(group, leaves) for rule in held] for name, group in found.items()}
        return _states(held, made)

    def init(params):
        paths, leaves, _ = flatten(params)
        if require_pairs:
            check_not_empty(params, leaves)
        found = find(paths, leaves)
        if not held:
            return optax.EmptyState()
        count = jnp.zeros((), jnp.int32)
        if is_placeholder(params):  # a leaf stands for any subtree
            empty = (rule.state(*(count for _ in rule.state._fields)) for rule in held)
            return PairsState(count, tuple(empty))
        return PairsState(count, states(found, leaves))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        paths, leaves, treedef = flatten(updates)
        values = aligned(paths, leaves, params)
        found, new, made = find(paths, values), list(leaves), {}
        count = jnp.zeros((), jnp.int32)
        if held:
            needed = jax.eval_shape(lambda: states(found, values))
            _check_state(PairsState(count, needed), state)
            count = jnp.asarray(optax.safe_increment(state.count))
        for names in _alike(found, values, joins=all(rule.joins for rule in rules)):
            group = _groups.joined([found[name] for name in names])
            (a, b), step = stack(group, values, leaves, gradients=gradients)
            p = Factors(a, b, scale_of(group, scale, a))
            fields = [
                tuple(join([field[name] for name in names]) for field in of_rule)
                for of_rule in (state.rules if held else ())
            ]
            step, fields = apply(p, step, fields, count)
            write_steps(group, step, new)
            made |= zip(names, split(fields, [found[name].batch[0] for name in names]), strict=True)
        fresh = PairsState(count, _states(held, made)) if held else state
        return jax.tree.unflatten(treedef, new), fresh

    return optax.GradientTransformationExtraArgs(init, update)


def _states(rules: Sequence[Rule], made: dict[str, list[tuple[Array, ...]]]) -> tuple[Any, ...]:
    """{group: [fields of each rule]} as one state for each rule, of {group: array} fields."""
    return tuple(
        rule.state(
            *({g: of[k][i] for g, of in made.items()} for i in range(len(rule.state._fields)))
        )
        for k, rule in enumerate(rules)
    )


def _alike(found: dict[str, Group], leaves: Sequence[Array], *, joins: bool) -> list[list[str]]:
    """The names of the groups, those of one shape together unless joining could move shards."""
    alike: dict[Any, list[str]] = {}
    pairs: collections.Counter = collections.Counter()
    for name, group in found.items():
        kind = (group.stacked, group.shapes[0][1:], group.shapes[1][1:], group.dtype)
        one_device = jax.typeof(leaves[group.pairs[0].a]).sharding.mesh.size <= 1
        pairs[kind] += len(group.pairs)
        key = (*kind, pairs[kind] // _JOINED) if joins and one_device else name
        alike.setdefault(key, []).append(name)
    return list(alike.values())


def _check_state(needed: PairsState, state: Any) -> None:
    """Raises ValueError where the state is not of these rules or not of these pairs."""
    advice = "make it anew with init(params), or restore the one saved with these parameters"
    kinds, held = (
        [type(x).__name__ for x in getattr(of, "rules", ())] or [type(of).__name__]
        for of in (needed, state)
    )
    if kinds != held:
        raise ValueError(
            f"the state is of {', '.join(held)}, and this transformation needs {', '.join(kinds)}: "
            f"it was made in another mode or by another optimizer; {advice}"
        )
    for ours, theirs in zip(needed.rules, state.rules, strict=True):
        for field, there in zip(ours._fields, theirs, strict=True):
            here = getattr(ours, field)
            for name in sorted(here.keys() | there.keys()):
                shapes = [tuple(x[name].shape) if name in x else "nothing" for x in (there, here)]
                if shapes[0] != shapes[1]:
                    raise ValueError(
                        f"{type(ours).__name__}.{field} does not fit the parameters: the state has "
                        f"{shapes[0]} for {name!r}, the pairs need {shapes[1]}. Ranks or layers "
                        f"have changed; {advice}"
                    )


def is_placeholder(params: Any) -> bool:
    """Whether `init` is called by optax.tree.map_params, which passes a node of its own."""
    return type(params).__name__ == "_ParamsPlaceholder"


def check_not_empty(params: Any, leaves: Sequence[Any]) -> None:
    """Raises ValueError for a tree without parameters, which would silently train nothing."""
    if not leaves and not is_placeholder(params):
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
        check_leaves(paths, leaves)
        if require_pairs:
            check_not_empty(params, leaves)
        inside = factor_indices(find_pairs(paths, leaves, layout, require_pairs=require_pairs))
        named = ["pairs" if i in inside else "others" for i in range(len(leaves))]
        return jax.tree.unflatten(treedef, named)

    def lenient(*args, **kwargs):  # optax's Adam raises a float to an integer power
        with jax.numpy_dtype_promotion("standard"):
            return optax.with_extra_args_support(of_others).update(*args, **kwargs)

    others = optax.GradientTransformationExtraArgs(of_others.init, lenient)
    parts = optax.partition({"pairs": of_pairs, "others": others}, label)

    def update(updates, state, params=None, **extra_args):
        paths, leaves, treedef = flatten(updates)
        params = jax.tree.unflatten(treedef, aligned(paths, leaves, params))
        return parts.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(parts.init, update)


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
