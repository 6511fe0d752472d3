"""pydoc without leakage, GLUE against the official counts, what encode accepts and refuses."""

import collections
import functools
import pathlib
import re
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from experiments.data import glue, pydoc
from experiments.data.batching import encode
from experiments.data.task import Example, Task
from experiments.data.tasks import TASKS, load_task
from experiments.models import tiny

TFDS = pathlib.Path(__file__).parents[2] / "shared" / "tfds"

# The official split sizes.
OFFICIAL = {"cola": (8551, 1043), "mrpc": (3668, 408), "sst2": (67349, 872)}

needs_glue = pytest.mark.skipif(
    not (TFDS / "glue").is_dir(), reason=f"no prepared GLUE data in {TFDS}"
)


@pytest.fixture(scope="module")
def splits():
    return load_task("pydoc")


@functools.cache
def prose():
    return pydoc.prose()


def words(text):
    return collections.Counter(re.findall(r"\w+|[^\w\s]", text))


def test_pydoc_is_a_few_thousand_balanced_examples(splits):
    assert len(splits.train) > 1500
    assert len(splits.validation) > 300
    for split in splits:
        assert sum(e.label for e in split) == (len(split) + 1) // 2
        assert [e.id for e in split] == list(range(len(split)))


def test_pydoc_uses_every_sentence_once_and_in_one_form(splits):
    """A bag of words finds a sentence again in either form, so no bag may come twice."""
    bags = [frozenset(words(e.texts[0]).items()) for split in splits for e in split]
    sentences = prose()
    assert len(bags) == len(sentences)
    assert collections.Counter(bags) == collections.Counter(
        frozenset(words(s).items()) for s in sentences
    )
    assert len(set(bags)) == len(bags)


def test_pydoc_intact_sentences_are_the_prose_and_disturbed_ones_are_not(splits):
    known = set(prose())
    for split in splits:
        assert all((e.texts[0] in known) == bool(e.label) for e in split)


def test_pydoc_near_duplicates_share_a_split(splits):
    bags = [[set(pydoc.content_words(e.texts[0])) for e in split] for split in splits]
    for held_out in bags[1]:
        nearest = max(bags[0], key=lambda seen: len(seen & held_out) / len(seen | held_out))
        assert len(nearest & held_out) / len(nearest | held_out) < pydoc.NEAR_DUPLICATE


def test_pydoc_is_deterministic_and_follows_its_seed(splits):
    assert pydoc.load(0) == splits
    assert pydoc.load(1) != splits


def test_pydoc_sentences_are_prose(splits):
    for split in splits:
        for example in split:
            (text,) = example.texts
            assert ">>>" not in text
            assert "::=" not in text
            assert "\n" not in text
            assert text[-1] in ".:!?"
            assert pydoc.MIN_UNITS <= len(pydoc.UNIT.findall(text)) <= pydoc.MAX_WORDS


def test_lengths_give_no_label_away(splits):
    for split in splits:
        lengths = np.array([len(e.texts[0].split()) for e in split])
        labels = np.array([e.label for e in split], bool)
        # Labels are drawn without regard to length; how far the means part depends on the prose,
        # which differs between versions of CPython: three standard errors.
        groups = lengths[labels], lengths[~labels]
        error = np.sqrt(sum(group.var(ddof=1) / len(group) for group in groups))
        assert abs(groups[0].mean() - groups[1].mean()) < 3 * error


def at_the_stops(text, units):
    """Whether a text is the units' words in some order, with the units' stops in theirs.

    The text's own units may be others: words that come together can close a parenthesis.
    """
    parts = [re.fullmatch(r"(.*?)([,;:.!?]*)", unit).groups() for unit in units]
    left = sorted((word for word, _ in parts), key=len, reverse=True)
    rest = f"{text} "
    for _, stop in parts:
        word = next((word for word in left if rest.startswith(f"{word}{stop} ")), None)
        if word is None:
            return False
        left.remove(word)
        rest = rest.removeprefix(f"{word}{stop} ")
    return not rest


@hypothesis.given(seed=st.integers(0, 2**32 - 1), row=st.integers(0, 10**6))
@hypothesis.example(seed=39, row=1267)  # ("-", "+", "abs()" and "~") in CPython 3.11
@hypothesis.settings(max_examples=200, deadline=None)
def test_disturbing_moves_words_and_nothing_else(seed, row):
    sentences = prose()
    before = sentences[row % len(sentences)]
    after = pydoc.disturb(before, np.random.default_rng(seed))
    assert after != before
    assert words(after) == words(before)
    assert at_the_stops(after, pydoc.UNIT.findall(before))
    assert after.split()[0].rstrip(",;:") == before.split()[0].rstrip(",;:")
    assert after[-1] == before[-1]


@needs_glue
@pytest.mark.parametrize("task", OFFICIAL)
def test_glue_has_the_official_counts_and_labels(task):
    splits = load_task(task, data_dir=TFDS)
    assert tuple(map(len, splits)) == OFFICIAL[task]
    assert set(e.label for e in splits.validation) == {0, 1}
    example = splits.train[-1]
    assert example.id == OFFICIAL[task][0] - 1
    assert len(example.texts) == len(TASKS[task].fields)
    assert all(isinstance(text, str) and text for text in example.texts)
    with pytest.raises(IndexError):
        splits.train[OFFICIAL[task][0]]


@needs_glue
def test_a_data_dir_without_the_task_names_the_folder_and_what_is_there():
    with pytest.raises(
        FileNotFoundError, match=r"no rte in .*glue/rte/<version>.*cola, mrpc, sst2"
    ):
        load_task("rte", data_dir=TFDS)


def test_an_empty_data_dir_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GLUE task is there"):
        load_task("cola", data_dir=tmp_path)


@needs_glue
def test_other_labels_than_the_tasks_are_refused():
    wrong = Task("cola", ("sentence",), ("acceptable", "unacceptable"), "matthews")
    with pytest.raises(ValueError, match=r"has the labels \('unacceptable', 'acceptable'\)"):
        glue.load(wrong, TFDS)


def test_without_a_network_the_error_says_data_dir(monkeypatch):
    import tensorflow_datasets as tfds

    def offline(*args, **kwargs):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(tfds, "builder", offline)
    with pytest.raises(OSError, match=r"could not be downloaded \(ConnectionError: .*--data-dir"):
        load_task("cola")


def test_importing_the_package_does_not_import_tfds():
    import subprocess

    code = "import sys, experiments.data; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_task_is_told_the_near_miss():
    with pytest.raises(ValueError, match=r"unknown task 'sst-2'; did you mean 'sst2'"):
        load_task("sst-2")


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range_names_task_and_example(label):
    with pytest.raises(ValueError, match=rf"cola, example 7: label {label} is not in 0\.\.1"):
        TASKS["cola"].example(("A sentence.",), label, 7)


def test_encode_refuses_an_empty_split():
    with pytest.raises(ValueError, match="no examples to encode"):
        encode([], tiny.tokenizer(), 16)


def test_encode_truncates_pairs_and_leaves_the_tokenizer_alone():
    tokenizer = tiny.tokenizer()
    examples = [Example(("the " * 40, "a b c"), 1, 5), Example(("x", "y"), 0, 6)]
    encoded = encode(examples, tokenizer, 16)
    assert encoded.lengths.tolist() == [16, 5]
    assert encoded.segments[-5:].tolist() == [0, 0, 0, 1, 1]
    assert encoded.ids.tolist() == [5, 6]
    assert tokenizer.truncation is None
    assert len(tokenizer.encode("the " * 40).ids) == 42
