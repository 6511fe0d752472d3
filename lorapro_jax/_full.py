"""Full mode: Adam's moments of the equivalent gradient, two (m, n) arrays a pair (Algorithm 2).

A group of pairs has its moments in one array, one behind the other, and a loop takes them in turn:
what is dense beside them exists for one pair at a time. A pair with batch axes is looped over the
first of them (scanned layers), unless the type of its factors says that this axis is sharded.
"""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from lorapro_jax import _solve
from lorapro_jax._batch import Adam, Group, Problem, first_steps, over_batch, steps
from lorapro_jax._closed_form import ClosedForm
from lorapro_jax._layouts import kernel_spec
from lorapro_jax._pairwise import Rule
from lorapro_jax._sharding import explicit, possible_shards, spec_of


_BLOCK_BYTES = int(os.environ.get("BB", 1 << 20))
_MIN_ROWS = int(os.environ.get("MR", 1))


class FullState(NamedTuple):
    """State of full mode. The moments are those of g~, by groups of pairs of one kind and shape.

    A group is named by the path of its first pair and holds up to 8, in the order of their paths,
    which differ in their numbers only. A pair with batch axes is a group of its own and has these
    axes in front.
    """

    count: Int[Array, ""]  # steps taken
    mu: Any  # {group: (pairs or *batch, *m, *n)}, float32 or mu_dtype
    nu: Any  # the same in float32 or better
    rest: Any  # plain Adam's state for the leaves in no pair


def full_rule(adam: Adam, form: ClosedForm) -> Rule:
    """The rule of full mode."""

    def init(group: Group, leaves: Sequence[Any]) -> tuple[Array, Array]:
        moment = functools.partial(_zero_moment, group, leaves)
        return moment(adam.mu_dtype), moment(None)

    def update(p: Problem, group: Group, moments: tuple, count: Array):
        known, (da, db) = first_steps(p, group, form)
        mu, nu, h_a, h_b = _adam(p, group, (da, db), moments, count, adam)
        return steps(p._replace(h_a=h_a, h_b=h_b), group, known, form), (mu, nu)

    return Rule(FullState, init, update)


def _zero_moment(group: Group, leaves: Sequence[Any], dtype: Any) -> Array:
    """Zeros of the group's kernels in `dtype` or float32 and better, sharded as they would be."""
    shape = *group.batch, *group.m, *group.n
    pair = group.pairs[0]
    a, b = leaves[pair.a], leaves[pair.b]
    sharding = explicit(a, kernel_spec(pair, spec_of(a), spec_of(b)))
    return jnp.zeros(shape, group.dtype if dtype is None else dtype, out_sharding=sharding)


def _adam(
    p: Problem,
    group: Group,
    taken: tuple[Array, Array],
    moments: tuple[Any, ...],
    count: Array,
    adam: Adam,
) -> tuple[Array, Array, Array, Array]:
    """A group's new moments, and the factor gradients that Adam's direction would cause."""
    rows = len(group.batch)  # the axis that is cut into blocks
    parts = math.gcd(group.m[0], possible_shards(p.a))
    da, db = taken
    a, da, mu, nu = (_parted(x, rows, parts) for x in (p.a, da, *moments))
    one = functools.partial(_one_block, p._replace(a=a), group, db, count, adam)
    # A block's rows of da are not needed once its g~ is formed: those of h_a take their place.
    carry = mu, nu, da, jnp.zeros_like(db)
    pairs = group.batch[0] if spec_of(p.a)[0] is None else None  # None: each device has its own
    for start, size, blocks in _blocks(group, parts):
        def step(i, carry, start=start, size=size, blocks=blocks):
            pair = None if pairs is None else i // blocks
            return one(Place(pair, rows + 1, start + i % blocks * size, size), carry)
        carry = lax.fori_loop(0, (pairs or 1) * blocks, step, carry)
    mu, nu, h_a, h_b = carry
    mu, nu, h_a = (_whole(x, y, rows) for x, y in ((mu, moments[0]), (nu, moments[1]), (h_a, p.a)))
    return mu, nu, h_a, h_b


class Place(NamedTuple):
    """Where a block lies: in which pair of a group (None: in all), and in which rows."""

    pair: Any
    axis: int
    start: Any
    size: int

    def index(self, x: Array, *, cut: bool):
        starts, sizes = [jnp.zeros((), jnp.int32)] * x.ndim, list(x.shape)
        if self.pair is not None:
            starts[0], sizes[0] = self.pair, 1
        if cut:
            starts[self.axis], sizes[self.axis] = self.start, self.size
        return starts, sizes

    def read(self, x: Array, *, cut: bool = False) -> Array:
        return lax.dynamic_slice(x, *self.index(x, cut=cut))

    def write(self, x: Array, new: Array, *, cut: bool = False) -> Array:
        return lax.dynamic_update_slice(x, new, self.index(x, cut=cut)[0])


def _one_block(p, group, db, count, adam, place, carry):
    b1, b2, eps, _ = adam
    correction_1, correction_2 = (jnp.asarray(1 - decay**count, p.a.dtype) for decay in (b1, b2))
    project, equivalent = (
        over_batch(f, group) for f in (_solve.project, _solve.equivalent_gradient)
    )
    rows = functools.partial(place.read, cut=True)
    put = functools.partial(place.write, cut=True)
    # XLA's CPU backend updates a moment where it lies, in one pass, if it is read at the very
    # index where it is written, with no reshape between, and read back for the direction.
    # Otherwise it copies the whole group's for every pair.
    mu, nu, da, h_b = carry
    a, b, s = rows(p.a), place.read(p.b), place.read(p.s)
    g = equivalent(a, b, rows(da), place.read(db), s, rows(mu))
    mu = put(mu, _average(g, rows(mu), b1))
    nu = put(nu, _average(g * g, rows(nu), b2))
    m = rows(mu).astype(g.dtype) / correction_1
    U = m / (jnp.sqrt(rows(nu) / correction_2) + eps)
    more_a, more_b = project(a, b, U, s)
    return mu, nu, put(da, more_a), place.write(h_b, place.read(h_b) + more_b)


def _blocks(group: Group, parts: int) -> list[tuple[int, int, int]]:
    size = group.m[0] // parts
    row = parts * math.prod(group.m[1:]) * math.prod(group.n) * group.dtype.itemsize
    wanted = max(1, min(size, max(_BLOCK_BYTES // row, _MIN_ROWS)))
    if wanted == size:
        return [(0, size, 1)]
    divisors = [k for k in range(wanted, wanted // 2, -1) if size % k == 0]
    block = divisors[0] if divisors else wanted
    blocks, rest = divmod(size, block)
    return [(0, block, blocks)] + ([(blocks * block, rest, 1)] if rest else [])


def _parted(x: Array, axis: int, parts: int) -> Array:
    spec = list(spec_of(x))
    shape = *x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :]
    spec.insert(axis + 1, None)
    return lax.reshape(x, shape, out_sharding=explicit(x, spec))


def _whole(x: Array, like: Array, axis: int) -> Array:
    return lax.reshape(x, like.shape, out_sharding=explicit(like, spec_of(like)))


def _average(g: Array, moment: Array, decay: float | Array) -> Array:
    return (decay * moment + (1 - decay) * g).astype(moment.dtype)
