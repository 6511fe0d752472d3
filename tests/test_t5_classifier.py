"""Prompts word for word, and the likelihoods of answers against their definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.data.prompts import PROMPTS
from experiments.data.task import Example
from experiments.data.tasks import TASKS, task_named
from experiments.models import t5, t5_files
from experiments.models.t5_classifier import T5Classifier, answers_of, branchings

CONFIG = t5.T5Config(
    vocab_size=20, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_decoder_layers=2, num_heads=4,
    initializer_factor=2.0,
)  # fmt: skip
ANSWERS = {
    "differ at once": [(5, 6, 1), (7, 1)],
    "share a beginning": [(5, 6, 1), (5, 7, 1), (5, 6, 8, 1)],
    "three, two of which share": [(5, 6, 1), (9, 1), (5, 8, 8, 1)],
}


@pytest.fixture(scope="module")
def model():
    return t5.T5(CONFIG, rngs=nnx.Rngs(0))


@nnx.jit
def call(model, *batch):
    return model(*batch)


def inputs():
    rng = np.random.default_rng(0)
    mask = np.arange(9)[None] < np.array([9, 4, 6])[:, None]
    return jnp.asarray(np.where(mask, rng.integers(2, 20, (3, 9)), 0)), jnp.asarray(mask)


def next_logits(model, prefix):
    """Of the token after `prefix`, by a whole forward pass, float64 numpy."""
    tokens, mask = inputs()
    decoder = jnp.tile(jnp.asarray([[CONFIG.decoder_start_token_id, *prefix]]), (len(tokens), 1))
    return np.asarray(call(model, tokens, mask, decoder)[:, -1], np.float64)


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_a_likelihood_is_the_product_of_the_choices_on_the_way(model, answers):
    expected = np.zeros((3, len(answers)))
    for c, answer in enumerate(answers):
        for t, token in enumerate(answer):
            rivals = sorted({other[t] for other in answers if other[:t] == answer[:t]})
            if len(rivals) > 1:
                logits = next_logits(model, answer[:t])
                expected[:, c] += logits[:, token] - np.log(np.exp(logits[:, rivals]).sum(axis=1))
    found = call(T5Classifier(model, answers), *inputs())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)


def test_words_that_differ_at_once_are_judged_by_their_first_tokens(model):
    """The paper's evaluation."""
    answers = [(5, 6, 1), (7, 1), (9, 9, 1)]
    first = next_logits(model, ())[:, [5, 7, 9]]
    found = call(T5Classifier(model, answers), *inputs())
    np.testing.assert_array_equal(np.argmax(found, axis=1), np.argmax(first, axis=1))


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_the_loss_is_that_of_the_answers_text(model, answers):
    labels = [1, 0, 1]
    losses_of = nnx.jit(lambda model, labels: model.losses(*inputs(), None, labels))
    losses, weights = losses_of(T5Classifier(model, answers), jnp.asarray(labels))
    for row, label in enumerate(labels):
        answer = answers[label]
        for t, token in enumerate(answer):
            logits = next_logits(model, answer[:t])[row]
            expected = np.log(np.exp(logits).sum()) - logits[token]
            np.testing.assert_allclose(losses[row, t], expected, atol=1e-4)
        assert weights[row].tolist() == [1] * len(answer) + [0] * (weights.shape[1] - len(answer))


def test_what_fills_up_an_answer_has_no_gradient(model):
    answers = ANSWERS["differ at once"]

    def loss(model, labels):
        losses, weights = T5Classifier(model, answers).losses(*inputs(), None, labels)
        return jnp.sum(losses * weights)

    grads = nnx.jit(nnx.grad(loss))(model, jnp.asarray([1, 1, 1]))  # (7, 1), filled up
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    table = np.abs(grads["decoder"]["position"]["embedding"][...]).sum(axis=1)
    np.testing.assert_array_equal(table[2:], 0)  # no position two behind or more was seen


@pytest.mark.parametrize("answers", [[(5, 1), (5, 1)], [(5,), (5, 6)]])
def test_answers_that_cannot_be_told_apart_are_refused(model, answers):
    with pytest.raises(ValueError, match="do not differ, or one is another's beginning"):
        T5Classifier(model, answers)


def test_every_answer_is_the_only_one_with_its_choices():
    for answers in ANSWERS.values():
        choices = list(zip(*(place.choice for place in branchings(answers)), strict=True))
        assert len(set(choices)) == len(answers)
        for one, other in itertools.combinations(choices, 2):
            assert any(x != y and -1 not in (x, y) for x, y in zip(one, other, strict=True))


# Word for word as in PAPER.md.
EXPECTED = {
    "sst2": ("classify the sentiment of the text: A\nresult: ", ["negative", "positive"]),
    "cola": (
        "classify the grammaticality of the text: A\nresult: ", ["unacceptable", "acceptable"],
    ),
    "mrpc": (
        "classify the semantic similarity of the text: A\nB\nresult: ", ["different", "equivalent"],
    ),
    "mnli": (
        "classify the semantic similarity of the text: A\nB\nresult: ",
        ["entailment", "neutral", "contradiction"],
    ),
    "qnli": (
        "classify the semantic similarity of the question and the sentence: A\nB\nresult: ",
        ["entailment", "not_entailment"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", EXPECTED)
def test_the_prompts_are_the_papers(task):
    spec, (text, words) = task_named(task), EXPECTED[task]
    texts = ("A", "B")[: len(spec.fields)]
    example = PROMPTS[task].example(spec, Example(texts, 1, 7))
    assert example == Example((text,), 1, 7)
    assert list(PROMPTS[task].words) == words


def test_every_task_has_a_prompt_and_braces_in_a_text_stay():
    assert PROMPTS.keys() == TASKS.keys()
    for name, task in TASKS.items():
        assert len(PROMPTS[name].words) == len(task.labels)
        texts = ("{0} {sentence} {}", "{x}")[: len(task.fields)]
        (text,) = PROMPTS[name].example(task, Example(texts, 0, 0)).texts
        assert all(part in text for part in texts)


def test_words_become_tokens_and_unknown_ones_are_refused():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁un", -1.0), ("▁yes", -1.0)]
    pieces += [("known", -1.0)]
    tokenizer = t5_files.unigram(pieces, 2)
    assert answers_of(["yes", "unknown"], tokenizer) == [(4, 1), (3, 5, 1)]
    with pytest.raises(ValueError, match="the tokenizer does not know 'no'"):
        answers_of(["yes", "no"], tokenizer)
