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
    at_once = max(1, 100_000 // (operations * rank**3))
    if x.size <= at_once * rank**2:
        return f(x)
    batch = spec_of(x)[:-2]
    flat = jnp.reshape(x, (-1, rank, rank), out_sharding=explicit(x, [None] * 3))

    def restored(y: Array) -> Array:
        own = y.shape[1:]
        spec = explicit(x, (*batch, *[None] * len(own)))
        return jnp.reshape(y, (*x.shape[:-2], *own), out_sharding=spec)

    return tuple(restored(y) for y in lax.map(f, flat, batch_size=at_once))


def _one_batch(f: Callable, on_cpu: Callable, operations: int, results: int) -> Callable:
    """`f` of a batch under any number of vmaps: a batch of batches is one batch."""

    @custom_vmap
    def call(x):
        cpu = functools.partial(_pieces, on_cpu, operations)
        return lax.platform_dependent(x, cpu=cpu, default=f)

    @call.def_vmap
    def _(size: int, in_batched: list[bool], x: Array) -> tuple[Any, Any]:
        del size, in_batched  # x is the only argument, and batched on its first axis
        return call(x), (True,) * results

    return call


def _syevd(x: Array) -> tuple[Array, Array]:
    return tuple(jnp.linalg.eigh(x, symmetrize_input=False))


def _gesvd(x: Array) -> tuple[Array, Array, Array]:
    """Not gesdd, the default: OpenBLAS's threads make it 100 times slower on a few busy cores."""
    W, values, Zt = lax.linalg.svd(x, full_matrices=False, algorithm=lax.linalg.SvdAlgorithm.QR)
    return W, values, Zt


_eigh = _one_batch(_syevd, _syevd, 10, 2)
_svd = _one_batch(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)), _gesvd, 50, 3)


def eigh(x: Float[Array, "*k r r"]) -> tuple[Float[Array, "*k r"], Float[Array, "*k r r"]]:
    """Eigenvalues, ascending, and eigenvectors in columns, of symmetric matrices."""
    return _eigh(x)


def svd(
    x: Float[Array, "*k r r"],
) -> tuple[Float[Array, "*k r r"], Float[Array, "*k r"], Float[Array, "*k r r"]]:
    """W, σ descending and Zᵀ of x = W diag(σ) Zᵀ, square."""
    return _svd(x)
