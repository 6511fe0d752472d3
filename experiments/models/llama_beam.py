"""Beam search over a Llama, as transformers' `generate(num_beams=K, early_stopping=False)` does it.

    score = (sum of the new tokens' log-probabilities) / length ** length_penalty

The length counts the new tokens, the end among them. At every step, in every row of the batch,

- the C = K max(2, 1 + number of end tokens) best continuations of all beams are the candidates;
- the K best candidates that do not end go on as beams;
- those of the first K candidates that end join the finished texts, of which the K best stay; at
  the last step all candidates end;
- the row is closed for good once K texts are finished and the worst of them has at least the score
  that the best beam would have if it ended now. With a positive penalty this is a guess: a longer
  text might still do better.

Two things differ from transformers: padding is in no n-gram, and behind its end a text repeats the
end, not the padding token.

Axes: B rows, K beams, R = B K, C candidates, T columns of the prompt, S of all, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.models.llama import Cache, Llama
from experiments.models.llama_rows import Rows, filled, full, start, taken, without_repeats


class _Loop(NamedTuple):
    rows: Rows  # R, the beams
    sums: jax.Array  # (B, K), of the beams' log-probabilities, best first; -inf: not there
    finished: jax.Array  # (B, K, S), texts that have ended
    scores: jax.Array  # (B, K), theirs, best first; -inf: not there
    open: jax.Array  # (B,), whether texts may still finish


def beam(
    model: Llama,
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    steps: int,
    *,
    beams: int,
    length_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
) -> jax.Array:
    """The finished text with the best score, (B, steps), int32; its end is repeated.

    One beam is not greedy search: where the best candidate ends, the second one goes on.

    Args:
      model: adapters included if it has any.
      tokens_BT: the prompts.
      mask_BT: which of it are tokens; at least the last column.
      steps: at most; at least 1.
      beams: K.
      length_penalty: above 0 it favours long texts, below 0 short ones.
      no_repeat_ngram: n, if no n tokens of prompt and text may follow each other twice; else 0.

    Raises:
      ValueError: prompt and steps are more than the model's context, or the candidates more than
        its vocabulary.
    """
    batch, prompt = tokens_BT.shape
    ends = jnp.array(model.config.eos_token_ids, jnp.int32)
    vocabulary, candidates = model.config.vocab_size, beams * max(2, 1 + len(ends))
    if candidates > vocabulary:
        raise ValueError(
            f"{beams} beams and {len(ends)} end tokens need {candidates} candidates; the "
            f"vocabulary has {vocabulary} tokens: take fewer beams"
        )

    def step(loop: _Loop, logits_RV: jax.Array, cache: Cache) -> _Loop:
        logs_RV = without_repeats(jax.nn.log_softmax(logits_RV), loop.rows, no_repeat_ngram)
        sums_BKV = loop.sums[:, :, None] + logs_RV.reshape(batch, beams, vocabulary)
        sums_BC, found_BC = jax.lax.top_k(sums_BKV.reshape(batch, -1), candidates)
        from_BC = beams * jnp.arange(batch)[:, None] + found_BC // vocabulary
        next_BC, column = found_BC % vocabulary, loop.rows.column
        tokens_RS = filled(loop.rows.tokens[from_BC.ravel()], column, next_BC.ravel())
        tokens_BCS = tokens_RS.reshape(batch, candidates, -1)
        rows = Rows(tokens_RS, column + 1, cache)
        ended_BC = jnp.isin(next_BC, ends) | full(rows)
        penalty = (column + 1 - prompt).astype(sums_BC.dtype) ** length_penalty

        sums_BK, on_BK = jax.lax.top_k(jnp.where(ended_BC, -jnp.inf, sums_BC), beams)
        from_R = jnp.take_along_axis(from_BC, on_BK, axis=1).ravel()
        rows = rows._replace(
            tokens=_along(tokens_BCS, on_BK).reshape(batch * beams, -1),
            cache=taken(cache, from_R, model.scanned),
        )

        joins_BC = ended_BC & (jnp.arange(candidates) < beams)[None] & loop.open[:, None]
        joining_BC = jnp.where(joins_BC, sums_BC / penalty, -jnp.inf)
        scores_BK, kept_BK = jax.lax.top_k(
            jnp.concatenate([loop.scores, joining_BC], axis=1), beams
        )
        finished_BKS = _along(jnp.concatenate([loop.finished, tokens_BCS], axis=1), kept_BK)
        open_B = loop.open & (sums_BK[:, 0] / penalty > scores_BK[:, -1])
        return _Loop(rows, sums_BK, finished_BKS, scores_BK, open_B)

    logits_BV, prompts, run_on = start(model, tokens_BT, mask_BT, steps)
    from_R = jnp.repeat(jnp.arange(batch), beams)  # a prompt is read once, not once a beam
    rows = Rows(prompts.tokens[from_R], prompts.column, taken(prompts.cache, from_R, model.scanned))
    absent_BK = jnp.full((batch, beams), -jnp.inf, logits_BV.dtype)
    alone_BK = absent_BK.at[:, 0].set(0)  # the first candidates all come from one beam
    finished_BKS = rows.tokens.reshape(batch, beams, -1)
    loop = _Loop(rows, alone_BK, finished_BKS, absent_BK, jnp.ones(batch, bool))
    loop = step(loop, logits_BV[from_R], rows.cache)
    goes_on = lambda loop: jnp.any(loop.open) & ~full(loop.rows)  # noqa: E731
    loop = jax.lax.while_loop(goes_on, lambda loop: step(loop, *run_on(loop.rows)), loop)
    return loop.finished[:, 0, prompt:]


def _along(x_BCS: jax.Array, index_BK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BCS, index_BK[:, :, None], axis=1)
