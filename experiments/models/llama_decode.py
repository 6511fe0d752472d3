"""The texts that a Llama writes after prompts, by greedy or beam search."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from experiments.models.llama import Cache, Llama
from experiments.models.llama_beam import beam
from experiments.models.llama_rows import Rows, filled, full, start, without_repeats

MULTIPLE = 32  # prompts are padded to one of its multiples: few shapes, few programs


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How texts are written.

    Raises:
      ValueError: a number is too small, or the penalty is not finite.
    """

    max_new_tokens: int
    beams: int = 1  # 1 is greedy search
    length_penalty: float = 1.0  # of the scores of `llama_beam`, which greedy search does not have
    no_repeat_ngram: int = 0  # n, if no n tokens of prompt and text may follow each other twice

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("beams", 1), ("no_repeat_ngram", 0)):
            if (found := getattr(self, name)) < least:
                raise ValueError(f"{name} is {found}; expected at least {least}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty is {self.length_penalty}; expected a finite number")


def decode(model: Llama, tokens_BT: jax.Array, mask_BT: jax.Array, decoding: Decoding) -> jax.Array:
    """The tokens after each prompt, (B, max_new_tokens), int32.

    A text ends with one of the config's end tokens, which is then repeated.

    Args:
      model: adapters included if it has any.
      tokens_BT: the prompts, padded at their start.
      mask_BT: which of it are tokens; at least the last column.
      decoding: static under `jax.jit`.

    Raises:
      ValueError: prompt and new tokens are more than the model's context, or the beams'
        candidates more than its vocabulary.
    """
    given = model, tokens_BT, mask_BT, decoding.max_new_tokens
    if decoding.beams == 1:
        return greedy(*given, no_repeat_ngram=decoding.no_repeat_ngram)
    return beam(
        *given,
        beams=decoding.beams,
        length_penalty=decoding.length_penalty,
        no_repeat_ngram=decoding.no_repeat_ngram,
    )


class _Loop(NamedTuple):
    rows: Rows
    ended: jax.Array  # (B,), rows that have had an end


def greedy(
    model: Llama, tokens_BT: jax.Array, mask_BT: jax.Array, steps: int, *, no_repeat_ngram: int = 0
) -> jax.Array:
    """The most likely token at each step, (B, steps), int32; arguments as of `decode`."""
    ends = jnp.array(model.config.eos_token_ids, jnp.int32)

    def step(loop: _Loop, logits_BV: jax.Array, cache: Cache) -> _Loop:
        tokens_BS, column, _ = loop.rows
        likeliest_B = jnp.argmax(without_repeats(logits_BV, loop.rows, no_repeat_ngram), axis=-1)
        next_B = jnp.where(loop.ended, tokens_BS[:, -1], likeliest_B)
        rows = Rows(filled(tokens_BS, column, next_B), column + 1, cache)
        return _Loop(rows, loop.ended | jnp.isin(next_B, ends))

    logits_BV, rows, run_on = start(model, tokens_BT, mask_BT, steps)
    loop = step(_Loop(rows, jnp.zeros(len(tokens_BT), bool)), logits_BV, rows.cache)
    goes_on = lambda loop: ~jnp.all(loop.ended) & ~full(loop.rows)  # noqa: E731
    loop = jax.lax.while_loop(goes_on, lambda loop: step(loop, *run_on(loop.rows)), loop)
    return loop.rows.tokens[:, tokens_BT.shape[1] :]


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


_decode = nnx.jit(decode, static_argnames="decoding")


def complete(
    model: Llama, tokenizer: tokenizers.Tokenizer, prompts: Sequence[str], decoding: Decoding
) -> list[str]:
    """What the model writes after each prompt, up to its end or the last new token.

    Raises:
      ValueError: a prompt is empty, or longer than the context leaves room for.
    """
    rows = [encoded.ids for encoded in tokenizer.encode_batch(list(prompts))]
    room = model.config.max_position_embeddings - decoding.max_new_tokens
    tokens_BT, mask_BT = map(jnp.asarray, padded(rows, most=room))
    decoded_BT = np.asarray(_decode(model, tokens_BT, mask_BT, decoding))
    return [text_of(row, tokenizer, model.config.eos_token_ids) for row in decoded_BT]


def text_of(tokens: np.ndarray, tokenizer: tokenizers.Tokenizer, ends: Sequence[int]) -> str:
    """What decoded tokens say, up to the first of the end tokens."""
    ended = np.flatnonzero(np.isin(tokens, ends))
    return tokenizer.decode(tokens[: ended[0]] if ended.size else tokens)
