"""Eigenvalues and singular values of batches of small matrices, in a way that cannot hang on a CPU.

There jaxlib (0.10) splits a large batch into tasks for XLA's thread pool and waits for them on a
thread of that pool. Two such calls at once, for pairs of two shapes, wait for each other for ever
on a machine of two cores. Batches too small to be split do not, and run no slower. QR and Cholesky
decompositions are split too, and were seen to hang.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from lorapro_jax._sharding import explicit, spec_of


def _pieces(f: Callable, operations: int, x: Float[Array, "*k r r"]) -> tuple[Array, ...]:
    """`f` of a batch, so many matrices at a time that jaxlib does not split them.

    jaxlib (lapack_kernels.cc) splits from 200,000 operations on; `operations` r³ is a matrix's.
    """
    rank = x.shape[-1]
    most = max(1, 100_000 // (operations * rank**3))
    count = x.size // rank**2
    if count <= most:
        return f(x)
    even = max(size for size in range(1, most + 1) if count % size == 0)
    at_once = even if 4 * even >= most else most  # a rest is a call of its own, to be compiled
    batch = spec_of(x)[:-2]
    flat = jnp.reshape(x, (-1, rank, rank), out_sharding=explicit(x, [None] * 3))

    def restored(y: Array) -> Array:
        own = y.shape[1:]
        spec = explicit(x, (*batch, *[None] * len(own)))
        return jnp.reshape(y, (*x.shape[:-2], *own), out_sharding=spec)

    return tuple(restored(y) for y in lax.map(f, flat, batch_size=at_once))


def _one_batch(f: Callable, on_cpu: Callable, operations: int, results: int) -> Callable:
    """`f` of each of several batches under any number of vmaps: a batch of batches is one batch."""

    @custom_vmap
    def call(*xs):
        def each(*xs):
            return tuple(_pieces(on_cpu, operations, x) for x in xs)

        return lax.platform_dependent(*xs, cpu=each, default=functools.partial(_stacked, f))

    @call.def_vmap
    def _(size: int, in_batched: list[bool], *xs: Array) -> tuple[Any, Any]:
        batched = [
            x if its else jnp.broadcast_to(x, (size, *x.shape))
            for x, its in zip(xs, in_batched, strict=True)
        ]
        return call(*batched), ((True,) * results,) * len(xs)

    return call


def _stacked(f: Callable, *xs: Array) -> tuple[tuple[Array, ...], ...]:
    """`f` of each, in one call: a GPU's solver takes as long for few matrices as for many."""
    parts = f(jnp.stack(xs))
    return tuple(tuple(part[i] for part in parts) for i in range(len(xs)))


def _syevd(x: Array) -> tuple[Array, Array]:
    return tuple(jnp.linalg.eigh(x, symmetrize_input=False))


def _gesvd(x: Array) -> tuple[Array, Array, Array]:
    """Not gesdd, the default: OpenBLAS's threads make it 100 times slower on a few busy cores."""
    W, values, Zt = lax.linalg.svd(x, full_matrices=False, algorithm=lax.linalg.SvdAlgorithm.QR)
    return W, values, Zt


_eigh = _one_batch(_syevd, _syevd, 10, 2)
_svd = _one_batch(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)), _gesvd, 50, 3)


def eigh(
    *xs: Float[Array, "*k r r"],
) -> tuple[tuple[Float[Array, "*k r"], Float[Array, "*k r r"]], ...]:
    """Eigenvalues, ascending, and eigenvectors in columns, of each batch of symmetric matrices.

    On a CPU each batch is a call of its own: what takes their results is compiled once for all.
    """
    return _eigh(*xs)


def svd(
    x: Float[Array, "*k r r"],
) -> tuple[Float[Array, "*k r r"], Float[Array, "*k r"], Float[Array, "*k r r"]]:
    """W, σ descending and Zᵀ of x = W diag(σ) Zᵀ, square."""
    return _svd(x)[0]
