"""What no update can be faster than: a copy, one pass over two moments, and Adam on the weights.

Each is jitted with donated buffers, as the updates are, and called without arguments.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

Shapes = Sequence[tuple[int, int]]
COPIED = 2**26  # floats: 256 MiB, far beyond the caches


def repeated(step: Callable, carry: list) -> Callable[[], None]:
    """A call that takes `step` from where the last call left `carry`, in its place."""
    step = jax.jit(step, donate_argnums=tuple(range(len(carry))))

    def call() -> None:
        carry[:] = step(*carry)
        jax.block_until_ready(carry)

    return call


def copy() -> tuple[Callable[[], None], int]:
    """x + 1 in place, and the bytes that it reads and writes."""
    x = jnp.zeros(COPIED, jnp.float32)
    return repeated(lambda x: (x + 1,), [x]), 2 * x.nbytes


def dense_floor(shapes: Shapes, b1: float = 0.9, b2: float = 0.999) -> tuple[Callable, int]:
    """One pass over two (m, n) moments a pair, and the moments' bytes.

    mu <- b1 mu + (1 - b1) g, nu <- b2 nu + (1 - b2) g² with a g = u vᵀ that is formed on the way:
    what full mode must do, without the products that make its g~ and project its direction.
    """
    sides = [(jnp.full((m, 1), 0.1), jnp.full((1, n), 0.1)) for m, n in shapes]

    def step(mus, nus):
        gs = [u * v for u, v in sides]
        return (
            [b1 * mu + (1 - b1) * g for mu, g in zip(mus, gs, strict=True)],
            [b2 * nu + (1 - b2) * g * g for nu, g in zip(nus, gs, strict=True)],
        )

    moments = [[jnp.zeros(shape, jnp.float32) for shape in shapes] for _ in range(2)]
    held = sum(x.nbytes for x in jax.tree.leaves(moments))
    return repeated(step, moments), held


def dense_adam(shapes: Shapes) -> tuple[Callable, int]:
    """optax.adam on the (m, n) weights themselves, and its moments' bytes."""
    weights = [jnp.zeros(shape, jnp.float32) for shape in shapes]
    slopes = [jnp.full(shape, 0.1, jnp.float32) for shape in shapes]
    tx = optax.adam(1e-4)
    state = tx.init(weights)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, state, slopes):
        updates, state = tx.update(slopes, state, weights)
        return optax.apply_updates(weights, updates), state

    carry = [weights, state]

    def call() -> None:
        carry[:] = step(*carry, slopes)
        jax.block_until_ready(carry)

    return call, sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
