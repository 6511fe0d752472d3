"""Full mode: Adam's moments of the equivalent gradient, two (m, n) arrays a pair (Algorithm 2).

A group of pairs has its moments in one array, one behind the other, and a loop takes them in turn,
a block of rows of one pair at a time: g~ and the direction U exist for one block. A pair with batch
axes is looped over the first of them (scanned layers), unless the type of its factors says that
this axis is sharded.

On one NVIDIA GPU a kernel does all of this in one pass: `_full_cuda`.

Only one device's rows are cut into blocks. A slice of a sharded axis would be gathered, and with
automatic axes nobody can tell before XLA does whether the rows are sharded: where they could be,
by the mesh that the factors' type names, a block is a whole pair.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from lorapro_jax import _solve
from lorapro_jax._batch import Adam, Group, Problem, average, first_steps, over_batch, steps
from lorapro_jax._closed_form import ClosedForm
from lorapro_jax._layouts import kernel_spec
from lorapro_jax._pairwise import Rule
from lorapro_jax._sharding import explicit, possible_shards, spec_of

# Bytes of one (rows, n) array of a block. On 2 CPU cores with 1 MiB of L2 each and 32 MiB of L3,
# 4 MiB is fastest at 4096 x 4096, r = 8 (0.25 MiB: 1.6 times its time, 16 MiB: 1.3 times).
# Other jobs ran beside that measurement.
_CPU_BLOCK = 4 << 20
# Elsewhere every block costs kernel launches and nothing of it stays in a cache: only a bound on
# the temporary memory. No other size was tried.
_BLOCK = 256 << 20
# Rows of a block, in ranks, at least: each block reads b and db and adds to h_b, 3 r rows of n.
_ROWS_PER_RANK = 2


# Groups of one shape whose blocks a CPU takes at once. XLA gives all loops the same temporary
# memory: they run one after the other. What is independent within one runs on several cores.
_TOGETHER = 2


class FullState(NamedTuple):
    """State of full mode. The moments are those of g~, by groups of pairs of one kind and shape.

    A group is named by the path of its first pair and holds up to 128, in the order of their paths,
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

    def update(problems: Sequence[Problem], group: Group, moments: Sequence[tuple], count: Array):
        firsts = [first_steps(p, group, form) for p in problems]
        taken = [step for _, step in firsts]
        done = _adam(problems, group, taken, moments, count, adam)
        made = []
        for p, (known, _), (mu, nu, h_a, h_b) in zip(problems, firsts, done, strict=True):
            step = steps(p._replace(h_a=h_a, h_b=h_b), group, known, form)
            made.append((step, lambda a, b, moments=(mu, nu): moments))
        return made

    return Rule(FullState, init, update, together=_TOGETHER, in_turn=True)


def _zero_moment(group: Group, leaves: Sequence[Any], dtype: Any) -> Array:
    """Zeros of the group's kernels in `dtype` or float32 and better, sharded as they would be."""
    shape = *group.batch, *group.m, *group.n
    pair = group.pairs[0]
    a, b = leaves[pair.a], leaves[pair.b]
    sharding = explicit(a, kernel_spec(pair, spec_of(a), spec_of(b)))
    return jnp.zeros(shape, group.dtype if dtype is None else dtype, out_sharding=sharding)


def _adam(
    problems: Sequence[Problem],
    group: Group,
    taken: Sequence[tuple[Array, Array]],
    moments: Sequence[tuple[Array, Array]],
    count: Array,
    adam: Adam,
) -> list[tuple[Array, Array, Array, Array]]:
    """Groups' new moments, and the factor gradients that Adam's direction would cause."""
    here, elsewhere = (_blocks(problems[0], group, size) for size in (_CPU_BLOCK, _BLOCK))
    cpu, default = (
        functools.partial(_by_blocks, problems, group, adam, blocks) for blocks in (here, elsewhere)
    )
    ways: dict[str, Callable] = {} if here == elsewhere else {"cpu": cpu}
    if (kernel := _cuda_kernel(problems, group, adam)) is not None:
        ways["cuda"] = kernel
    if not ways:
        return default(taken, moments, count)
    return lax.platform_dependent(taken, moments, count, **ways, default=default)


def _cuda_kernel(problems: Sequence[Problem], group: Group, adam: Adam) -> Callable | None:
    """`_adam` as one GPU kernel a group; None without a GPU, or if a group is not one for it."""
    if jax.default_backend() != "gpu":
        return None
    from lorapro_jax import _full_cuda  # imports Pallas, which nobody else needs

    if not _full_cuda.supported():
        return None
    kernels = [f for p in problems if (f := _full_cuda.adam_of(p, group, adam)) is not None]
    if len(kernels) < len(problems):
        return None

    def each(taken, moments, count):
        return [f(*of, count) for f, *of in zip(kernels, taken, moments, strict=True)]

    return each


class Blocks(NamedTuple):
    """Blocks of as many rows each; the last ends with the rows, if it overlaps another or not."""

    size: int  # rows of a pair
    rows: int  # of a block
    count: int


def _blocks(p: Problem, group: Group, size: int) -> Blocks:
    """A pair's rows in blocks of about `size` bytes."""
    rows = group.m[0]
    if math.gcd(rows, possible_shards(p.a)) > 1:
        return Blocks(rows, rows, 1)
    row = math.prod(group.m[1:]) * math.prod(group.n) * group.dtype.itemsize
    wanted = max(size // max(row, 1), _ROWS_PER_RANK * p.a.shape[-1], 1)
    count = max(-(-rows // wanted), 1)
    return Blocks(rows, -(-rows // count), count)


def _by_blocks(
    problems: Sequence[Problem],
    group: Group,
    adam: Adam,
    blocks: Blocks,
    taken: Sequence[tuple[Array, Array]],
    moments: Sequence[tuple[Array, Array]],
    count: Array,
) -> list[tuple[Array, Array, Array, Array]]:
    """`_adam`, a block of rows of one pair of each group at a time."""
    ones = [
        functools.partial(_one_block, p, group, adam, db, count)
        for p, (_, db) in zip(problems, taken, strict=True)
    ]
    # A block's rows of da are not needed once its g~ is formed: those of h_a take their place. All
    # blocks need db, so that h_b, a sum over the blocks, gets an array of its own.
    carries = [
        (*held, da, jnp.zeros_like(db)) for held, (da, db) in zip(moments, taken, strict=True)
    ]
    together = spec_of(problems[0].a)[0] is not None  # each device has its own part of the batch

    def all_of(place, carries):
        return [one(place, carry) for one, carry in zip(ones, carries, strict=True)]

    if together and blocks.count == 1:
        return all_of(Place(None), carries)
    number = jnp.uint32((1 if together else group.batch[0]) * blocks.count)

    def step(i, carries):
        i = jnp.asarray(i, jnp.uint32)
        return all_of(_place(i, group, blocks, together=together), carries)

    return lax.fori_loop(jnp.uint32(0), number, step, carries)


def _place(i: Array, group: Group, blocks: Blocks, *, together: bool) -> "Place":
    """Where step i of the loop is.

    All indices are unsigned: signed ones could be negative, for XLA, and corrected at every use.
    """
    if blocks.count == 1:
        return Place(i)
    number = jnp.uint32(blocks.count)
    pair, k = (None, i) if together else (lax.div(i, number), lax.rem(i, number))
    start, last = k * jnp.uint32(blocks.rows), jnp.uint32(blocks.size - blocks.rows)
    axis = len(group.batch)
    if blocks.rows * blocks.count == blocks.size:
        return Place(pair, axis, start, blocks.rows)
    return Place(pair, axis, lax.min(start, last), blocks.rows, start - lax.min(start, last))


class Place(NamedTuple):
    """Where a block lies."""

    pair: Any  # index in the group; None: all of them
    axis: int = 0  # of the rows
    start: Any = 0
    rows: int | None = None  # None: all of them
    twice: Any = None  # so many of them belong to the block before

    def read(self, x: Array, *, whole: bool = False) -> Array:
        """The block of an array with rows, or what a pair has in one that has none."""
        starts, sizes = self._starts(x, whole), list(x.shape)
        if self.pair is not None:
            sizes[0] = 1
        if not (whole or self.rows is None):
            sizes[self.axis] = self.rows
        return lax.dynamic_slice(x, starts, sizes)

    def write(self, x: Array, new: Array, *, whole: bool = False) -> Array:
        """`x` with `new` where `read` reads."""
        return lax.dynamic_update_slice(x, new, self._starts(x, whole))

    def fresh(self, new: Array, old: Array) -> Array:
        """`new`, but `old` in the rows that belong to the block before."""
        if self.twice is None:
            return new
        row = lax.broadcasted_iota(jnp.uint32, new.shape, self.axis)
        return jnp.where(row < self.twice, old, new)

    def _starts(self, x: Array, whole: bool) -> list[Any]:
        starts: list[Any] = [jnp.uint32(0)] * x.ndim
        if self.pair is not None:
            starts[0] = self.pair
        if not (whole or self.rows is None):
            starts[self.axis] = self.start
        return starts


def _one_block(
    p: Problem,
    group: Group,
    adam: Adam,
    db: Array,
    count: Array,
    place: Place,
    carry: tuple[Array, Array, Array, Array],
) -> tuple[Array, Array, Array, Array]:
    """(mu, nu, da or h_a, h_b) with one block done."""
    b1, b2, eps, _ = adam
    correction_1, correction_2 = (jnp.asarray(1 - decay**count, p.a.dtype) for decay in (b1, b2))
    project, equivalent = (
        over_batch(f, group) for f in (_solve.project, _solve.equivalent_gradient)
    )
    at, put, fresh = place.read, place.write, place.fresh
    pairs = functools.partial(place.read, whole=True)
    # XLA's CPU backend updates a moment where it lies, in one pass, if it is read at the very
    # index where it is written, with no reshape between, and read back for the direction.
    # Otherwise it copies the whole group's for every block.
    mu, nu, da, h_b = carry
    a, b, s = at(p.a), pairs(p.b), pairs(p.s)
    g = equivalent(a, b, at(da), pairs(db), s, at(mu))
    mu = put(mu, fresh(average(g, at(mu), b1), at(mu)))
    nu = put(nu, fresh(average(g * g, at(nu), b2), at(nu)))
    m = at(mu).astype(g.dtype) / correction_1
    U = m / (jnp.sqrt(at(nu) / correction_2) + eps)
    h_a, more = project(a, b, fresh(U, jnp.zeros_like(U)), s)
    return mu, nu, put(da, fresh(h_a, at(da))), put(h_b, pairs(h_b) + more, whole=True)
