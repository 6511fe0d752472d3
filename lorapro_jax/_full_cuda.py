"""Full mode's pass over the moments of a group of pairs as one kernel for an NVIDIA GPU.

XLA writes g~ and the direction U to memory and reads them back, which is more than the moments
themselves. Here a program of the kernel has a block of columns of one pair and goes down a stretch
of its rows, a tile at a time: it forms the tile's g~ from the factors, reads, updates and writes
the two moments, and projects the tile's U. So nothing of the moments' size is moved but they, once.

    g~   = s (da b + a db)          h_a = s U bᵀ, one part per block of columns
    m, v = Adam's averages          h_b = s aᵀ U, one part per stretch of rows
    U    = m^ / (sqrt(v^) + eps)    the parts are added up afterwards: the same sum at every call

Products are of three products of tf32 numbers each, which is float32's accuracy but for two bits.

The kernel is written in Pallas for its Triton backend, which JAX 0.11 deprecates; without it, and
for groups that it does not take, full mode is XLA's as on other devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from lorapro_jax._batch import Adam, Group, Problem
from lorapro_jax._sharding import possible_shards

_LEAST = 16  # columns of a factor that the matrix units take
_CHUNK = 64  # columns of a factor in one product: more would not fit the registers
# Up to a rank: rows of a tile, the first that divides m; warps; stages of the pipeline of loads. As
# measured on an H100 at 8,192 x 28,672: at r = 8 two warps on 32 rows take 1.45 ms, four on 64 rows
# 1.68, for a thread has registers enough and many programs share a multiprocessor. At rank 128
# XLA's form takes 0.93 of the kernel's time.
_BY_RANK = {
    8: ((32, 16), 2, 3),
    16: ((32, 16), 2, 2),
    32: ((64, 32, 16), 4, 1),
    64: ((32, 16), 4, 1),
}
_MOST = 2**31 - 1  # elements of an array: Pallas counts them in 32 bits


class Tiling(NamedTuple):
    """How the work on (m, n) arrays is cut. m is a multiple of `stretch`, n of `columns`."""

    rows: int  # of a tile
    columns: int  # of a tile
    stretch: int  # rows of a program, a multiple of `rows`
    warps: int  # of a program
    stages: int  # of the pipeline of loads


class Numbers(NamedTuple):
    """The scalars of a step, each taken before it is rounded to float32."""

    b1: Any
    b2: Any
    new_1: Any  # 1 - b1
    new_2: Any
    correction_1: Any  # 1 - b1**count
    correction_2: Any
    eps: Any


def adam_of(p: Problem, group: Group, adam: Adam, **options: Any) -> Callable | None:
    """`_full._adam` of this group by the kernel; None for a group that it does not take.

    Those are sharded ones, or ones that may be, for a kernel sees one device; those in float64;
    and those whose m and n are not multiples of a tile. `options` go to `one_pass`.
    """
    pairs, m, n = (math.prod(x) for x in (group.batch, group.m, group.n))
    cut = tiling(pairs, m, n, p.a.shape[-1])
    if cut is None or possible_shards(p.a) > 1 or p.a.dtype != jnp.float32:
        return None

    def step(taken: tuple[Array, Array], moments: tuple[Array, Array], count: Array) -> tuple:
        a, da = (jnp.reshape(x, (pairs, m, -1)) for x in (p.a, taken[0]))
        b, db = (jnp.reshape(x, (pairs, -1, n)) for x in (p.b, taken[1]))
        mu, nu = (jnp.reshape(x, (pairs, m, n)) for x in moments)
        s = jnp.reshape(p.s, (pairs,))
        b1, b2, eps, _ = adam
        numbers = Numbers(b1, b2, 1 - b1, 1 - b2, 1 - b1**count, 1 - b2**count, eps)
        made = one_pass(a, b, da, db, s, mu, nu, numbers, cut, **options)
        return tuple(
            jnp.reshape(x, like.shape) for x, like in zip(made, (*moments, *taken), strict=True)
        )

    return step


def supported() -> bool:
    """Whether JAX's default device is an NVIDIA GPU with tf32, an Ampere or newer one."""
    device = jax.devices()[0]
    version = getattr(device, "compute_capability", "0")  # "9.0"; "gfx942" and such on AMD's
    return version[:1].isdigit() and float(version) >= 8


def tiling(pairs: int, m: int, n: int, rank: int) -> Tiling | None:
    """How to cut kernels of this shape; None if no tile divides them, or they are too large."""
    form = next((form for most, form in _BY_RANK.items() if rank <= most), None)
    if form is None or pairs * m * n > _MOST:
        return None
    heights, warps, stages = form
    rows, columns = _dividing(m, heights), _dividing(n, (64, 32))
    if rows is None or columns is None:
        return None
    return Tiling(rows, columns, _stretch(m, rows), warps, stages)


def _dividing(size: int, choices: tuple[int, ...]) -> int | None:
    return next((choice for choice in choices if size % choice == 0), None)


def _stretch(m: int, rows: int, most: int = 512) -> int:
    """The largest part of m up to `most` that is a multiple of `rows`."""
    tiles = m // rows
    return rows * max(k for k in range(1, most // rows + 1) if tiles % k == 0)


def one_pass(
    a: Float[Array, "pairs m r"],
    b: Float[Array, "pairs r n"],
    da: Float[Array, "pairs m r"],
    db: Float[Array, "pairs r n"],
    s: Float[Array, "pairs"],
    mu: Float[Array, "pairs m n"],
    nu: Float[Array, "pairs m n"],
    numbers: Numbers,
    cut: Tiling,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """(mu, nu, h_a, h_b) after a step; mu and nu are updated where they lie if they are donated.

    All but mu are float32. `interpret` runs the kernel's program without a GPU.
    """
    rank, scale, root = a.shape[2], s[:, None, None], numbers.correction_2**0.5
    # What a tile would multiply all of its entries by, its factors are multiplied by before.
    scalars = _float32(numbers.b1, numbers.b2, numbers.new_2 / numbers.new_1**2, numbers.eps * root)
    scalars = jnp.broadcast_to(scalars, (len(s), *scalars.shape))
    of_g, of_U = _float32(numbers.new_1, root / numbers.correction_1)
    left = _padded(jnp.concatenate([da, a], axis=2) * (scale * of_g), 2)
    right = _padded(jnp.concatenate([b, db], axis=1), 1)
    a, b = _padded(a * (scale * of_U), 2), _padded(b * (scale * of_U), 1)
    kernel = _batchable(functools.partial(_launch, rank=rank, cut=cut, interpret=interpret))
    return kernel(scalars, left, a, right, b, mu, nu)


def _float32(*numbers: Any) -> Float[Array, "k"]:
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in numbers])


def _batchable(kernel: Callable) -> Callable:
    """`kernel` under vmap: a batch of groups is one larger group, if that can be counted."""

    @custom_vmap
    def call(*arrays: Array) -> tuple[Array, ...]:
        return kernel(*arrays)

    @call.def_vmap
    def _(size: int, batched: list[bool], *arrays: Array) -> tuple[Any, Any]:
        arrays = tuple(
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(arrays, batched, strict=True)
        )
        if arrays[-1].size > _MOST:
            return lax.map(lambda own: call(*own), arrays), (True,) * 4
        made = call(*(jnp.reshape(x, (-1, *x.shape[2:])) for x in arrays))
        return tuple(jnp.reshape(x, (size, -1, *x.shape[1:])) for x in made), (True,) * 4

    return call


def _launch(
    scalars: Array,
    left: Array,
    a: Array,
    right: Array,
    b: Array,
    mu: Array,
    nu: Array,
    *,
    rank: int,
    cut: Tiling,
    interpret: bool,
) -> tuple[Array, Array, Array, Array]:
    """(mu, nu, h_a, h_b), from factors that are padded and multiplied by s."""
    (pairs, m, n), width = nu.shape, a.shape[2]
    parts = m // cut.stretch, n // cut.columns
    tall = functools.partial(pl.BlockSpec, index_map=lambda p, i, j: (p, i, 0))
    wide = functools.partial(pl.BlockSpec, index_map=lambda p, i, j: (p, 0, j))
    moment = pl.BlockSpec((None, cut.stretch, cut.columns), lambda p, i, j: (p, i, j))
    mu, nu, h_a, h_b = pl.pallas_call(
        functools.partial(_program, rank=rank, cut=cut, interpret=interpret),
        grid=(pairs, *parts),
        in_specs=[
            pl.BlockSpec((None, scalars.shape[1]), lambda p, i, j: (p, 0)),
            *(tall((None, cut.stretch, x.shape[2])) for x in (left, a)),
            *(wide((None, x.shape[1], cut.columns)) for x in (right, b)),
            moment,
            moment,
        ],
        out_specs=[
            moment,
            moment,
            pl.BlockSpec((None, None, cut.stretch, width), lambda p, i, j: (j, p, i, 0)),
            pl.BlockSpec((None, None, width, cut.columns), lambda p, i, j: (i, p, 0, j)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(mu.shape, mu.dtype),
            jax.ShapeDtypeStruct(nu.shape, nu.dtype),
            jax.ShapeDtypeStruct((parts[1], pairs, m, width), jnp.float32),
            jax.ShapeDtypeStruct((parts[0], pairs, width, n), jnp.float32),
        ],
        input_output_aliases={5: 0, 6: 1},
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
    )(scalars, left, a, right, b, mu, nu)
    return mu, nu, jnp.sum(h_a[..., :rank], axis=0), jnp.sum(h_b[:, :, :rank], axis=0)


def _approximate(name: str, x: Array) -> Array:
    """`name`, a function of the GPU, to two units in the last place."""
    (y,) = triton.elementwise_inline_asm(
        f"{name}.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return y


def _padded(x: Array, axis: int) -> Array:
    """`x` with zeros up to the next power of two, at least `_LEAST`."""
    size = x.shape[axis]
    more = max(_LEAST, 1 << (size - 1).bit_length()) - size
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def _program(numbers, left, a, right, b, mu_in, nu_in, mu, nu, h_a, h_b, *, rank, cut, interpret):
    """One block of columns of one stretch of rows; the arguments are references to blocks."""
    b1, b2, new, eps = (numbers[i] for i in range(4))
    depth, width = left.shape[1], a.shape[1]
    parts = [pl.ds(k, min(_CHUNK, depth)) for k in range(0, depth, _CHUNK)]
    # What does not change from tile to tile is read once, if there is not too much of it.
    once = [x[...] for x in (right, b)] if len(parts) == 1 else None
    # The zeros that pad h_a need not be written: nobody reads them.
    kept = lax.broadcasted_iota(jnp.int32, (cut.rows, width), 1) < rank
    dot = functools.partial(_product, interpret=interpret)
    sqrt, rcp = (functools.partial(_approximate, name) for name in ("sqrt", "rcp"))
    if interpret:
        sqrt, rcp = lax.sqrt, lambda x: 1 / x

    def tile(i: Array, total: Array) -> Array:
        rows = pl.ds(i * cut.rows, cut.rows)
        rights, b_own = ([once[0]], once[1]) if once else ([right[k, :] for k in parts], b[...])
        g = sum(dot(left[rows, k], x, 1, 0) for k, x in zip(parts, rights, strict=True))
        m = (b1 * mu_in[rows, :].astype(jnp.float32) + g).astype(mu.dtype)
        v = b2 * nu_in[rows, :] + new * (g * g)
        mu[rows, :] = m
        nu[rows, :] = v
        U = m.astype(jnp.float32) * rcp(sqrt(v) + eps)
        # U comes second in both products: its entries are handed round once, for either.
        triton.store(h_a.at[rows, :], dot(b_own, U, 1, 1).T, mask=kept)
        return total + dot(a[rows, :], U, 0, 0)

    zeros = jnp.zeros((width, cut.columns), jnp.float32)
    h_b[...] = lax.fori_loop(0, cut.stretch // cut.rows, tile, zeros)


def _split(x: Array) -> tuple[Array, Array]:
    """`x` as the sum of the nearest number of tf32's 10 bits, and of what is left."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    near = lax.bitcast_convert_type((bits + (1 << 12)) & -(1 << 13), jnp.float32)
    return near, x - near


def _product(x: Array, y: Array, x_axis: int, y_axis: int, *, interpret: bool) -> Array:
    """Their product in float32, of tf32's: all but that of what is left of both."""
    precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32

    def dot(x: Array, y: Array) -> Array:
        dimensions = (((x_axis,), (y_axis,)), ((), ()))
        return lax.dot_general(
            x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
        )

    (x, x_left), (y, y_left) = _split(x), _split(y)
    return dot(x, y_left) + dot(x_left, y) + dot(x, y)
