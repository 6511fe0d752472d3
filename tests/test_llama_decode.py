"""Greedy and beam search beside a search in plain Python, which runs every text without a cache.

Beside transformers': test_llama_interop.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_llama import LLAMA3, logits, made

from experiments.models.llama_decode import Decoding, decode, padded
from experiments.models.llama_rows import Rows, without_repeats

ENDS = 3, 11
CONFIG = dataclasses.replace(LLAMA3, vocab_size=24, num_hidden_layers=1, eos_token_ids=ENDS)
LENGTHS, SEEDS = (3, 7, 1, 5), (0, 1, 2)
STEPS = 9


@functools.partial(jax.jit, static_argnames=("graph", "decoding"))
def decoded(graph, params, frozen, tokens, mask, decoding):
    return decode(nnx.merge(graph, params, frozen), tokens, mask, decoding)


@functools.cache
def model(seed, scanned=False):
    return made(CONFIG, seed=seed, scanned=scanned)


@functools.cache
def prompts(seed):
    rng = np.random.default_rng(seed)
    return [tuple(map(int, rng.integers(0, 24, length))) for length in LENGTHS]


# The truth: one row, texts as tuples.


@functools.cache
def log_probabilities(seed, text):
    """Of every token after the text; what pads it lies behind and changes nothing."""
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(text)] = text
    found = np.asarray(logits(model(seed), jnp.asarray(tokens))[0, len(text) - 1], np.float64)
    return found - np.log(np.exp(found - found.max()).sum()) - found.max()


def repeats(text, n):
    """The tokens with which n tokens of the text would follow each other again."""
    there = {text[i : i + n] for i in range(len(text) - n + 1)}
    return {token for token in range(24) if n and (*text, token)[-n:] in there}


def continuations(seed, text, n):
    """(log-probability, token), best first."""
    barred, logs = repeats(text, n), log_probabilities(seed, text)
    return sorted(((logs[t], t) for t in range(24) if t not in barred), reverse=True)


def greedy(seed, prompt, n):
    new = ()
    while len(new) < STEPS and not set(new) & set(ENDS):
        new += (continuations(seed, prompt + new, n)[0][1],)
    return new


def beam(seed, prompt, beams, penalty, n):
    running, finished = [(0.0, ())], []
    for length in range(1, STEPS + 1):
        candidates = [
            (total + log, (*new, token))
            for total, new in running
            for log, token in continuations(seed, prompt + new, n)
        ]
        candidates = sorted(candidates, reverse=True)[: 3 * beams]
        ended = {new for _, new in candidates if new[-1] in ENDS or length == STEPS}
        finished += [
            (total / length**penalty, new) for total, new in candidates[:beams] if new in ended
        ]
        finished = sorted(finished, reverse=True)[:beams]
        running = [x for x in candidates if x[1] not in ended][:beams]
        best = max((total / length**penalty for total, _ in running), default=-np.inf)
        if len(finished) == beams and best <= finished[-1][0]:
            break
    return finished[0][1]


def expected(seed, prompt, decoding):
    if decoding.beams == 1:
        return greedy(seed, prompt, decoding.no_repeat_ngram)
    return beam(seed, prompt, decoding.beams, decoding.length_penalty, decoding.no_repeat_ngram)


CASES = [  # beams, length_penalty, no_repeat_ngram, scanned
    (1, 1.0, 2, False),
    (3, 0.8, 0, False),
    (3, 1.5, 2, True),
    (4, 1.0, 0, False),
    (4, 0.8, 2, True),
]


@pytest.mark.parametrize(("beams", "penalty", "n", "scanned"), CASES)
def test_the_search_is_the_one_in_plain_python(beams, penalty, n, scanned):
    decoding, lengths = Decoding(STEPS, beams, penalty, n), set()
    for seed in SEEDS:
        split = nnx.split(model(seed, scanned), nnx.LoRAParam, ...)
        tokens, mask = map(jnp.asarray, padded(prompts(seed), 8))
        found = decoded(*split, tokens, mask, decoding)
        assert found.shape == (len(LENGTHS), STEPS)
        assert found.dtype == jnp.int32
        for row, prompt in zip(np.asarray(found), prompts(seed), strict=True):
            new = expected(seed, prompt, decoding)
            np.testing.assert_array_equal(row, new + new[-1:] * (STEPS - len(new)))
            lengths.add(len(new))
    assert min(lengths) < STEPS == max(lengths)  # some rows end, some do not


def test_the_cases_differ():
    """No option is without effect on these prompts."""
    found = {
        case: [expected(s, p, Decoding(STEPS, *case)) for s in SEEDS for p in prompts(s)]
        for case in {case[:3] for case in CASES}
    }
    assert len(set(map(tuple, found.values()))) == len(found)


@pytest.mark.slow  # to compile operation by operation
def test_decoding_outside_jit():
    prompt = prompts(0)[1]
    found = decode(model(0), *map(jnp.asarray, padded([prompt], 8)), Decoding(2))
    np.testing.assert_array_equal(found[0], greedy(0, prompt, 0)[:2])


barred_scores = jax.jit(without_repeats, static_argnames="n")


@pytest.mark.parametrize("n", [0, 1, 2, 3, 9])
def test_no_ngram_comes_again(n):
    """Texts of few tokens, up to 3 of which pad them; columns from `column` on are not read."""
    rng = np.random.default_rng(n)
    tokens, scores = rng.integers(0, 3, (20, 8)), rng.normal(size=(20, 24))
    padding = rng.integers(0, 4, 20)
    tokens[np.arange(8)[None] < padding[:, None]] = -1
    for column in (4, 7):
        found = barred_scores(jnp.asarray(scores), Rows(jnp.asarray(tokens), column, None), n)
        for row, start, before, after in zip(tokens, padding, scores, found, strict=True):
            barred = repeats(tuple(map(int, row[start:column])), n)
            wanted = [-np.inf if t in barred else x for t, x in enumerate(before)]
            np.testing.assert_array_equal(after, np.asarray(wanted, after.dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"beams": 0}, "beams is 0; expected at least 1"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1; expected at least 0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan; expected a finite"),
    ],
)
def test_numbers_that_say_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**{"max_new_tokens": 1} | options)


def test_what_does_not_fit_the_model_is_refused():
    tokens, mask = jnp.zeros((1, 60), jnp.int32), jnp.ones((1, 60), bool)
    for beams in (1, 4):
        with pytest.raises(ValueError, match="65 positions; .* context.* has 64: shorten"):
            decode(model(0), tokens, mask, Decoding(5, beams))
    with pytest.raises(ValueError, match="9 beams and 2 end tokens need 27 .*has 24 tokens"):
        decode(model(0), tokens, mask, Decoding(1, 9))
    with pytest.raises(ValueError, match=r"prompts have \[1, 0\] tokens"):
        padded([[1], []])
