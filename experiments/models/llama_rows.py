"""Rows of text that a Llama writes on, a column a step, with the keys and values of the past kept.

Rows of different lengths are padded at their start; the cache has one slot a column, and a
position is counted in its own row.

Axes: R rows, T columns of the prompt, S = T + steps columns, W windows of n columns, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.llama import Cache, Llama

_PADDING = -1  # no token has it, so no n-gram of a text has it


class Rows(NamedTuple):
    """What is written so far."""

    tokens: jax.Array  # (R, S), int32; -1 is padding; from `column` on, the last token again
    column: jax.Array  # (), int32, that is written next
    cache: Cache  # of the columns before the last written one; right after `start`, of all


def start(
    model: Llama, tokens_RT: jax.Array, mask_RT: jax.Array, steps: int
) -> tuple[jax.Array, Rows, Callable[[Rows], tuple[jax.Array, Cache]]]:
    """(logits after the prompt, it with room for the steps, `run_on`).

    `run_on` maps rows to the logits after their last written column and the cache with it. It makes
    the model anew, so that it runs in a loop.
    """
    graph, state = nnx.split(model)

    def run(*args) -> tuple[jax.Array, Cache]:
        model = nnx.merge(graph, state)
        hidden_RTD, cache = model.hidden(*args)
        return model.logits(hidden_RTD[:, -1:])[:, 0], cache

    def run_on(rows: Rows) -> tuple[jax.Array, Cache]:
        last_R1 = rows.tokens[:, -1:]
        padding_R1 = jnp.sum(rows.tokens == _PADDING, axis=1, keepdims=True, dtype=jnp.int32)
        return run(last_R1, rows.column - 1 - padding_R1, jnp.ones_like(last_R1), rows.cache)

    count, length = tokens_RT.shape
    segments_RT = mask_RT.astype(jnp.int32)
    positions_RT = jnp.maximum(jnp.cumsum(segments_RT, axis=1) - 1, 0)
    cache = model.empty_cache(count, length + steps)
    logits_RV, cache = run(tokens_RT, positions_RT, segments_RT, cache)
    tokens_RT = jnp.where(mask_RT, tokens_RT, _PADDING).astype(jnp.int32)
    tokens_RS = jnp.pad(tokens_RT, ((0, 0), (0, steps)), mode="edge")
    return logits_RV, Rows(tokens_RS, jnp.int32(length), cache), run_on


def full(rows: Rows) -> jax.Array:
    """Whether the last column is written."""
    return rows.column == rows.tokens.shape[-1]


def filled(tokens_RS: jax.Array, column: jax.Array, value_R: jax.Array) -> jax.Array:
    """The tokens with the value from the column on."""
    columns_1S = jnp.arange(tokens_RS.shape[1])[None]
    return jnp.where(columns_1S < column, tokens_RS, value_R[:, None].astype(tokens_RS.dtype))


def taken(cache: Cache, index_R: jax.Array, scanned: bool) -> Cache:
    """The cache of these rows of it; a row may come several times."""
    take = lambda x: jnp.take(x, index_R, axis=int(scanned), mode="clip")  # noqa: E731
    return Cache(jax.tree.map(take, cache.layers), cache.segments[index_R], cache.index)


def without_repeats(scores_RV: jax.Array, rows: Rows, n: int) -> jax.Array:
    """The scores, -inf for each token that would make n tokens of a row follow each other again."""
    windows = rows.tokens.shape[1] - n + 1
    if n == 0 or windows < 1:
        return scores_RV
    ends_RW = rows.tokens[:, n - 1 :]
    again_RW = (ends_RW != _PADDING) & (jnp.arange(windows) + n <= rows.column)[None]
    for i in range(n - 1):  # does the window begin with the n - 1 latest tokens?
        latest_R = jnp.take(rows.tokens, rows.column - n + 1 + i, axis=1, mode="clip")
        again_RW &= rows.tokens[:, i : i + windows] == latest_R[:, None]
    banned_RW = jnp.where(again_RW, ends_RW, scores_RV.shape[1])  # beyond the last: dropped
    return scores_RV.at[jnp.arange(len(scores_RV))[:, None], banned_RW].set(-jnp.inf, mode="drop")
