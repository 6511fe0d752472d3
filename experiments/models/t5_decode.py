"""Greedy decoding of a T5, one token a step, with the keys and values of the past kept.

A step costs one position of the decoder instead of all that came before. The loop ends when every
row has ended.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.models.t5 import T5, KeysValues


class _Loop(NamedTuple):
    index: jax.Array  # of the position that is decoded next
    token: jax.Array  # (B, 1), the last one
    ended: jax.Array  # (B,), rows that have had their end-of-sequence token
    past: list[KeysValues]  # of every layer, with room for all positions
    decoded: jax.Array  # (B, T), padding from `index` on


def greedy(model: T5, tokens_BS: jax.Array, mask_BS: jax.Array, max_new_tokens: int) -> jax.Array:
    """The most likely token at each step, (B, max_new_tokens), int32.

    A row ends with its end-of-sequence token; padding follows.

    Args:
      model: the T5, adapters included if it has any.
      tokens_BS: the encoder's input.
      mask_BS: which of it are tokens.
      max_new_tokens: steps at most; at least 1.

    Raises:
      ValueError: max_new_tokens is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; pass at least 1")
    config, batch = model.config, tokens_BS.shape[0]
    memory = model.decoder.memory(model.encode(tokens_BS, mask_BS))
    room = batch, max_new_tokens, config.num_heads, config.d_kv
    past = [KeysValues(*(jnp.zeros(room, x.dtype) for x in read)) for read in memory]

    def goes_on(loop: _Loop) -> jax.Array:
        return (loop.index < max_new_tokens) & ~jnp.all(loop.ended)

    def step(loop: _Loop) -> _Loop:
        hidden_B1D, past = model.decoder(
            model.shared(loop.token), mask_BS, memory, past=loop.past, index=loop.index
        )
        likeliest_B = jnp.argmax(model.logits(hidden_B1D)[:, 0], axis=-1).astype(jnp.int32)
        next_B = jnp.where(loop.ended, config.pad_token_id, likeliest_B)
        decoded_BT = loop.decoded.at[:, loop.index].set(next_B)
        ended_B = loop.ended | (next_B == config.eos_token_id)
        return _Loop(loop.index + 1, next_B[:, None], ended_B, past, decoded_BT)

    start = _Loop(
        index=jnp.int32(0),
        token=jnp.full((batch, 1), config.decoder_start_token_id, jnp.int32),
        ended=jnp.zeros(batch, bool),
        past=past,
        decoded=jnp.full((batch, max_new_tokens), config.pad_token_id, jnp.int32),
    )
    return jax.lax.while_loop(goes_on, step, start).decoded
