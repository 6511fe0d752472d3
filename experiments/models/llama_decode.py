"""Greedy decoding of a Llama, one token a step, with the keys and values of the past kept.

Rows of different lengths are padded at their start; the cache has one slot a column, and a
position is counted in its own row. The loop ends when every row has ended.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from experiments.models.llama import Cache, Llama

MULTIPLE = 32  # prompts are padded to one of its multiples: few shapes, few programs


class _Loop(NamedTuple):
    step: jax.Array  # (), that is decoded next
    token: jax.Array  # (B, 1), the last one
    position: jax.Array  # (B, 1), its
    ended: jax.Array  # (B,), rows that have had an end
    cache: Cache
    decoded: jax.Array  # (B, steps)


def greedy(model: Llama, tokens_BT: jax.Array, mask_BT: jax.Array, steps: int) -> jax.Array:
    """The most likely token at each step, (B, steps), int32.

    A row ends with one of the config's end tokens, which is then repeated.

    Args:
      model: adapters included if it has any.
      tokens_BT: the prompts.
      mask_BT: which of it are tokens; at least the last column.
      steps: at most; at least 1.

    Raises:
      ValueError: steps is below 1, or prompt and steps are more than the model's context.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; decode at least 1 token")
    batch, length = tokens_BT.shape
    graph, state = nnx.split(model)  # merged again where it runs: in the loop, and before it
    ends = jnp.array(model.config.eos_token_ids, jnp.int32)

    def advanced(tokens_BT, positions_BT, segments_BT, cache) -> tuple[jax.Array, Cache]:
        model = nnx.merge(graph, state)
        hidden_BTD, cache = model.hidden(tokens_BT, positions_BT, segments_BT, cache)
        likeliest_B1 = jnp.argmax(model.logits(hidden_BTD[:, -1:]), axis=-1).astype(jnp.int32)
        return likeliest_B1, cache

    def goes_on(loop: _Loop) -> jax.Array:
        return (loop.step < steps) & ~jnp.all(loop.ended)

    def step(loop: _Loop) -> _Loop:
        return after(
            loop, *advanced(loop.token, loop.position, jnp.ones_like(loop.token), loop.cache)
        )

    def after(loop: _Loop, next_B1, cache: Cache) -> _Loop:
        next_B1 = jnp.where(loop.ended[:, None], loop.token, next_B1)
        # The columns behind are overwritten by later steps; after the last one the end repeats.
        written = jnp.arange(steps)[None, :] >= loop.step
        decoded_BT = jnp.where(written, next_B1, loop.decoded)
        ended_B = loop.ended | jnp.isin(next_B1[:, 0], ends)
        return _Loop(loop.step + 1, next_B1, loop.position + 1, ended_B, cache, decoded_BT)

    segments_BT = mask_BT.astype(jnp.int32)
    positions_BT = jnp.maximum(jnp.cumsum(segments_BT, axis=1) - 1, 0)
    start = _Loop(
        step=jnp.int32(0),
        token=tokens_BT[:, -1:].astype(jnp.int32),
        position=positions_BT[:, -1:],
        ended=jnp.zeros(batch, bool),
        cache=model.empty_cache(batch, length + steps),
        decoded=jnp.zeros((batch, steps), jnp.int32),
    )
    first = advanced(tokens_BT, positions_BT, segments_BT, start.cache)
    return jax.lax.while_loop(goes_on, step, after(start, *first)).decoded


def padded(
    rows: Sequence[Sequence[int]], multiple: int = MULTIPLE, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) of rows, (B, T), padded at their start up to a multiple, if `most` allows it.

    Raises:
      ValueError: a row is empty.
    """
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"prompts have {lengths} tokens; each needs at least 1")
    length = -(-max(lengths) // multiple) * multiple
    if most is not None:
        length = max(max(lengths), min(length, most))
    mask_BT = np.arange(length)[None, :] >= length - np.array(lengths)[:, None]
    tokens_BT = np.zeros((len(rows), length), np.int32)
    tokens_BT[mask_BT] = np.concatenate([np.asarray(row) for row in rows])
    return tokens_BT, mask_BT


@functools.partial(nnx.jit, static_argnames="steps")
def _greedy(model, tokens_BT, mask_BT, steps):
    return greedy(model, tokens_BT, mask_BT, steps)


def complete(
    model: Llama, tokenizer: tokenizers.Tokenizer, prompts: Sequence[str], steps: int
) -> list[str]:
    """What the model writes after each prompt, up to its end or `steps` tokens.

    Raises:
      ValueError: a prompt is empty, or longer than the context leaves room for.
    """
    rows = [encoded.ids for encoded in tokenizer.encode_batch(list(prompts))]
    tokens_BT, mask_BT = padded(rows, most=model.config.max_position_embeddings - steps)
    decoded_BT = np.asarray(_greedy(model, jnp.asarray(tokens_BT), jnp.asarray(mask_BT), steps))
    texts = []
    for row in decoded_BT:
        ended = np.flatnonzero(np.isin(row, model.config.eos_token_ids))
        texts.append(tokenizer.decode(row[: ended[0]] if ended.size else row))
    return texts
