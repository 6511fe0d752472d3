"""A rule for pairs as an optax transformation: what the modes of Adam on g~ have in common.

The pairs are found, put into groups of one kind and shape, and widened; the rule turns a group's
gradients and state into steps; leaves in no pair get plain Adam. A rule's state is a NamedTuple
whose fields are dicts of arrays by group, between the count of steps and the rest's state.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array

from lorapro_jax import _trust
from lorapro_jax._batch import (
    Group,
    Problem,
    Scale,
    a_factor,
    aligned,
    groups,
    over_batch,
    own,
    places,
    problem,
    scale_of,
    write_steps,
)
from lorapro_jax._cpu import Places, after, for_one_cpu, once_there
from lorapro_jax._layouts import Pair, check_leaves, factor_indices, flatten

# Pairs that a CPU has under way, where it takes groups in turn. Cores share groups rather than the
# small products of one: on 2 of them T5-base's groups of 12 pairs take factored mode 7% less time
# by eights than by twos. By sixteens it is 9% more: the arrays do not stay in the cache.
_PAIRS_AT_ONCE = 96

Find = Callable[[list[str], list[Any]], tuple[Pair, ...]]


# ((da, db), (new a, new b) -> new fields) of a group. Where the step is not known, a direction
# stands in its place.
Made = tuple[tuple[Array, Array], Callable[[Array, Array], tuple[Any, ...]]]


class Rule(NamedTuple):
    """One mode: its state by group, and a step."""

    state: Any  # NamedTuple type: count, then fields by group, then rest
    init: Callable[[Group, Sequence[Any]], tuple[Any, ...]]  # a group's fields, from all leaves
    update: Callable[[Sequence[Problem], Group, Sequence[tuple[Any, ...]], Array], list[Made]]
    # of groups of one shape; the last argument is the number of this step, from 1
    in_turn: bool = False  # whether a CPU should take few groups at once: see `after`
    together: int = 1  # groups of one shape that a CPU should take in one call of `update`


def each(one: Callable[[Problem, Group, tuple[Any, ...], Array], Made]) -> Callable:
    """`Rule.update` from that of one group."""

    def update(problems, group, fields, count):
        return [one(p, group, its, count) for p, its in zip(problems, fields, strict=True)]

    return update


class Taken(NamedTuple):
    """How a direction becomes the step that is added to the factors."""

    learning_rate: optax.ScalarOrSchedule
    weight_decay: float | Array
    radius: float | Array | None  # of the trust region
    damping: float | Array | None  # of the fit of one factor to the other; None: both as they are


def pairwise(
    rule: Rule,
    adam: optax.GradientTransformation,
    find: Find,
    scale: Scale,
    taken: Taken | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The rule on all pairs that `find` tells, and `adam` on the other leaves.

    The result is the step with its sign, or the direction where nothing is said on how it is taken.
    """
    fields = rule.state._fields[1:-1]

    def rest_of(pairs, treedef):
        inside = factor_indices(pairs)
        in_no_pair = [i not in inside for i in range(treedef.num_leaves)]
        return optax.masked(adam, jax.tree.unflatten(treedef, in_no_pair))

    def init(params):
        paths, leaves, treedef = flatten(params)
        check_leaves(paths, leaves)
        count = jnp.zeros((), jnp.int32)
        pairs = find(paths, leaves)
        rest = rest_of(pairs, treedef).init(params)
        if not leaves:  # optax.tree.map_params' placeholder: here a leaf stands for any subtree
            return rule.state(count, *(count for _ in fields), rest)
        found = groups(pairs, leaves).items()
        made = {name: rule.init(group, leaves) for name, group in found}
        return rule.state(count, *by_field(made, len(fields)), rest)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        paths, leaves, treedef = flatten(updates)
        if not leaves:  # a part of optax.partition that got nothing
            return updates, state
        check_leaves(paths, leaves)
        values = aligned(paths, leaves, params)
        pairs = find(paths, leaves)
        params = jax.tree.unflatten(treedef, values)
        others, rest = rest_of(pairs, treedef).update(updates, state.rest, params)
        new = jax.tree.leaves(others)
        count = jnp.asarray(optax.safe_increment(state.count))
        found = groups(pairs, values)
        old = {name: tuple(getattr(state, field)[name] for field in fields) for name in found}
        steps, made = _of_all(rule, taken, scale, found, values, leaves, old, count)
        for i, step in steps.items():
            new[i] = step
        fresh = rule.state(count, *by_field(made, len(fields)), rest)
        return jax.tree.unflatten(treedef, new), fresh

    return optax.GradientTransformationExtraArgs(init, update)


class _Given(NamedTuple):
    """What the step of a group is made from; the leaves are the group's own."""

    values: list[Array]
    gradients: list[Array]
    s: Array
    fields: tuple[Any, ...]


def _of_all(
    rule: Rule,
    taken: Taken | None,
    scale: Scale,
    found: dict[str, Group],
    values: Sequence[Array],
    gradients: Sequence[Array],
    old: dict[str, tuple[Any, ...]],
    count: Array,
) -> tuple[dict[int, Array], dict[str, tuple[Any, ...]]]:
    """The steps of all groups, by leaf, and their new fields, by group."""
    some = functools.partial(_alike, rule, taken)
    if any(isinstance(x, Tracer) for x in gradients):
        # Traced once for all groups of one shape. Eagerly it would be compiled at every call.
        some = jax.jit(some, static_argnums=0)
    at, factor = places(found, gradients), a_factor(found, gradients)
    waits = rule.in_turn and sum(map(_pairs, found.values())) > _PAIRS_AT_ONCE
    # The first group waits for nothing, but as all others: one trace serves them.
    before = once_there(factor) if waits else None
    under_way: deque[tuple[int, Array | None]] = deque()
    steps, made = {}, {}
    for names in _alike_names(found, rule.together if for_one_cpu(factor) else 1):
        pairs = sum(_pairs(found[name]) for name in names)
        while under_way and pairs + sum(n for n, _ in under_way) > _PAIRS_AT_ONCE:
            _, before = under_way.popleft()
        chosen = [own(found[name], values, gradients) for name in names]
        given = [
            _Given(own_values, own_gradients, scale_of(found[name], scale), old[name])
            for name, (_, (own_values, own_gradients)) in zip(names, chosen, strict=True)
        ]
        alike = tuple(group for group, _ in chosen)
        results, there = some(alike, given, count, at, before)
        if waits:
            under_way.append((pairs, there))
        for name, (of_group, made[name]) in zip(names, results, strict=True):
            steps |= zip(found[name].leaves, of_group, strict=True)
    return steps, made


def _pairs(group: Group) -> int:
    return math.prod(group.batch)


def _alike_names(found: dict[str, Group], count: int) -> list[list[str]]:
    """The names of groups of one shape, up to `count` at a time."""
    alike: dict[Any, list[str]] = {}
    for name, group in found.items():
        alike.setdefault((group.pairs[0].rank, *group[1:]), []).append(name)
    return [names[i : i + count] for names in alike.values() for i in range(0, len(names), count)]


def _alike(
    rule: Rule,
    taken: Taken | None,
    alike: tuple[Group, ...],
    given: list[_Given],
    count: Array,
    at: Places | None,
    before: Array | None,
) -> tuple[list[tuple[list[Array], tuple[Any, ...]]], Array | None]:
    """The steps of groups of one shape, by leaves, and their new fields; and once it is there."""
    problems = [
        problem(group, *after(before, its.values, its.gradients), s=its.s)
        for group, its in zip(alike, given, strict=True)
    ]
    made = rule.update(problems, alike[0], [its.fields for its in given], count)
    results = []
    for group, its, p, (step, new) in zip(alike, given, problems, made, strict=True):
        if taken is not None:
            step = _take(p, group, step, count - 1, taken)
        steps = list(its.gradients)
        write_steps(step, group, at, steps)
        results.append((steps, new(p.a + step[0], p.b + step[1])))
    return results, once_there(step[0])


def by_field(by_group: dict[str, tuple[Any, ...]], count: int) -> list[dict[str, Any]]:
    """{group: fields} turned into one {group: array} for each field."""
    return [{name: values[i] for name, values in by_group.items()} for i in range(count)]


def _take(
    p: Problem, group: Group, step: tuple[Array, Array], count: Array, taken: Taken
) -> tuple[Array, Array]:
    """What is added to the factors of a group: the step down the direction, and the decay."""
    rate = taken.learning_rate(count) if callable(taken.learning_rate) else taken.learning_rate
    rate = jnp.asarray(rate, p.a.dtype)
    decays = not (isinstance(taken.weight_decay, int | float) and taken.weight_decay == 0)

    def one(p: Problem, da: Array, db: Array) -> tuple[Array, Array]:
        if taken.radius is None and taken.damping is None:
            da, db = -rate * da, -rate * db
        else:
            da, db = _trust.step(p, da, db, rate, taken.radius, taken.damping)
        if not decays:
            return da, db
        # sqrt(1 - lr wd) - 1, which float32 would lose to cancellation at lr wd = 1e-6
        root = jnp.expm1(jnp.log1p(-jnp.minimum(rate * taken.weight_decay, 1.0)) / 2)
        return da + root * p.a, db + root * p.b

    return over_batch(one, group)(p, *step)
