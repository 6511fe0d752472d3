"""pydoc without leakage, GLUE against official counts, batches that depend on the step alone."""

import collections
import functools
import pathlib
import re
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from experiments import data
from experiments.data import batching, glue, pydoc
from experiments.models import tiny

TFDS = pathlib.Path(__file__).parents[2] / "shared" / "tfds"

# The official split sizes.
OFFICIAL = {"cola": (8551, 1043), "mrpc": (3668, 408), "sst2": (67349, 872)}

needs_glue = pytest.mark.skipif(
    not (TFDS / "glue").is_dir(), reason=f"no prepared GLUE data in {TFDS}"
)


@pytest.fixture(scope="module")
def splits():
    return data.load("pydoc")


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
            assert pydoc.MIN_UNITS <= len(pydoc.units_of(text)) <= pydoc.MAX_WORDS


def test_lengths_give_no_label_away(splits):
    for split in splits:
        lengths = np.array([len(e.texts[0].split()) for e in split])
        labels = np.array([e.label for e in split], bool)
        assert abs(lengths[labels].mean() - lengths[~labels].mean()) < 1.5


@hypothesis.given(seed=st.integers(0, 2**32 - 1), row=st.integers(0, 10**6))
@hypothesis.settings(max_examples=200, deadline=None)
def test_disturbing_moves_words_and_nothing_else(seed, row):
    sentences = prose()
    before = sentences[row % len(sentences)]
    after = pydoc.disturb(before, np.random.default_rng(seed))
    stops = [re.search(r"[,;:.!?]*$", unit)[0] for unit in pydoc.units_of(before)]
    assert after != before
    assert words(after) == words(before)
    assert [re.search(r"[,;:.!?]*$", unit)[0] for unit in pydoc.units_of(after)] == stops
    assert after.split()[0].rstrip(",;:") == before.split()[0].rstrip(",;:")
    assert after[-1] == before[-1]


@needs_glue
@pytest.mark.parametrize("task", OFFICIAL)
def test_glue_has_the_official_counts_and_labels(task):
    splits = data.load(task, data_dir=TFDS)
    assert tuple(map(len, splits)) == OFFICIAL[task]
    assert set(e.label for e in splits.validation) == {0, 1}
    example = splits.train[-1]
    assert example.id == OFFICIAL[task][0] - 1
    assert len(example.texts) == len(data.TASKS[task].fields)
    assert all(isinstance(text, str) and text for text in example.texts)
    with pytest.raises(IndexError):
        splits.train[OFFICIAL[task][0]]


@needs_glue
def test_iterating_a_glue_split_equals_indexing_it():
    validation = data.load("mrpc", data_dir=TFDS).validation
    assert list(validation) == [validation[i] for i in range(len(validation))]


@needs_glue
def test_a_data_dir_without_the_task_names_the_folder_and_what_is_there():
    with pytest.raises(
        FileNotFoundError, match=r"no rte in .*glue/rte/<version>.*cola, mrpc, sst2"
    ):
        data.load("rte", data_dir=TFDS)


def test_an_empty_data_dir_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GLUE task is there"):
        data.load("cola", data_dir=tmp_path)


@needs_glue
def test_other_labels_than_the_tasks_are_refused():
    wrong = data.Task("cola", ("sentence",), ("acceptable", "unacceptable"), "matthews")
    with pytest.raises(ValueError, match=r"has the labels \('unacceptable', 'acceptable'\)"):
        glue.load(wrong, TFDS)


def test_without_a_network_the_error_says_data_dir(monkeypatch):
    import tensorflow_datasets as tfds

    def offline(*args, **kwargs):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(tfds, "builder", offline)
    with pytest.raises(OSError, match=r"could not be downloaded \(name resolution.*--data-dir"):
        data.load("cola")


def test_importing_the_package_does_not_import_tfds():
    import subprocess

    code = "import sys, experiments.data; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_task_is_told_the_near_miss():
    with pytest.raises(ValueError, match=r"unknown task 'sst-2'; did you mean 'sst2'"):
        data.load("sst-2")


def test_a_label_out_of_range_names_task_and_example():
    with pytest.raises(ValueError, match=r"cola, example 7: label -1 is not in 0\.\.1"):
        data.TASKS["cola"].example(("A sentence.",), -1, 7)


@pytest.mark.parametrize(("label", "num_labels"), [(2, 2), (-1, 2), (-1, None)])
def test_encode_refuses_a_label_out_of_range(label, num_labels):
    examples = [data.Example(("one",), 0, 0), data.Example(("two",), label, 1)]
    with pytest.raises(ValueError, match=f"example 1: label {label} is not in"):
        data.encode(examples, tiny.tokenizer(), 16, num_labels=num_labels)


def test_encode_refuses_an_empty_split():
    with pytest.raises(ValueError, match="no examples to encode"):
        data.encode([], tiny.tokenizer(), 16)


def test_encode_truncates_pairs_and_leaves_the_tokenizer_alone():
    tokenizer = tiny.tokenizer()
    examples = [data.Example(("the " * 40, "a b c"), 1, 5), data.Example(("x", "y"), 0, 6)]
    encoded = data.encode(examples, tokenizer, 16, num_labels=2)
    assert encoded.lengths.tolist() == [16, 5]
    assert encoded.segments[-5:].tolist() == [0, 0, 0, 1, 1]
    assert encoded.ids.tolist() == [5, 6]
    assert tokenizer.truncation is None
    assert len(tokenizer.encode("the " * 40).ids) == 42


def fake(lengths, seed=0):
    """Rows whose tokens tell row and position, so that a mixed-up batch shows."""
    lengths = np.array(lengths)
    tokens = np.concatenate([1 + 1000 * i + np.arange(n) for i, n in enumerate(lengths)])
    ids = np.random.default_rng(seed).permutation(len(lengths)).astype(np.int32)
    return batching.Encoded(
        tokens.astype(np.int32), (tokens % 2).astype(np.int32), lengths, ids % 3, ids, 0
    )


def check_batch(encoded, batch):
    """Every row of the batch is the encoded row of its id, or weighs nothing."""
    row_of = {int(i): row for row, i in enumerate(encoded.ids)}
    for r, example_id in enumerate(batch["ids"].tolist()):
        mask = batch["mask"][r]
        assert (batch["weights"][r] == 1.0) == (example_id >= 0)
        if example_id < 0:
            assert not mask.any()
            continue
        row = row_of[example_id]
        length = encoded.lengths[row]
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        expected = 1 + 1000 * row + np.arange(length)
        np.testing.assert_array_equal(batch["tokens"][r, mask], expected)
        np.testing.assert_array_equal(batch["segments"][r, mask], expected % 2)
        assert (batch["tokens"][r, ~mask] == encoded.pad_id).all()
        assert batch["labels"][r] == encoded.labels[row]


BUCKETS = (4, 9, 20)
lengths_st = st.lists(st.integers(1, 20), min_size=1, max_size=90)


@hypothesis.given(lengths_st, st.integers(1, 7), st.integers(0, 99), st.integers(1, 3))
@hypothesis.settings(max_examples=60, deadline=None)
def test_every_row_comes_once_an_epoch_in_its_smallest_bucket(lengths, size, seed, epochs):
    encoded = fake(lengths)
    batches = data.train_batches(encoded, size, seed=seed, epochs=epochs, buckets=BUCKETS)
    per_epoch = -(-len(lengths) // size)
    assert len(batches) == per_epoch * epochs
    for epoch in range(epochs):
        seen = []
        for i in range(per_epoch):
            batch = batches[epoch * per_epoch + i]
            check_batch(encoded, batch)
            longest = batch["mask"].sum(axis=1).max()
            assert batch["tokens"].shape == (size, min(b for b in BUCKETS if b >= longest))
            seen += batch["ids"][batch["weights"] > 0].tolist()
        assert sorted(seen) == list(range(len(lengths)))


@hypothesis.given(lengths_st, st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_processes_shares_make_up_the_global_batch(lengths, share, processes, seed):
    encoded, size = fake(lengths), share * processes
    whole = data.train_batches(encoded, size, seed=seed, epochs=1, buckets=BUCKETS)
    parts = [
        data.train_batches(encoded, size, seed=seed, epochs=1, buckets=BUCKETS,
                           process_index=p, process_count=processes)
        for p in range(processes)
    ]  # fmt: skip
    for step in range(len(whole)):
        for key, value in whole[step].items():
            np.testing.assert_array_equal(
                value, np.concatenate([part[step][key] for part in parts])
            )


@pytest.fixture
def encoded():
    return fake(np.random.default_rng(0).integers(1, 21, 333))


def same(first, second):
    return all(np.array_equal(first[key], second[key]) for key in first)


def test_evaluation_sees_every_row_once_sorted_by_length(encoded):
    batches = data.eval_batches(encoded, 32, buckets=BUCKETS)
    ids = np.concatenate([b["ids"][b["weights"] > 0] for b in batches])
    assert sorted(ids.tolist()) == list(range(333))
    lengths = [batches[i]["tokens"].shape[1] for i in range(len(batches))]
    assert lengths == sorted(lengths)


def test_dtypes_and_shapes_are_the_promised_ones(encoded):
    batch = data.train_batches(encoded, 32, seed=0, epochs=1, buckets=BUCKETS)[0]
    assert {key: value.dtype.name for key, value in batch.items()} == {
        "tokens": "int32", "segments": "int32", "mask": "bool",
        "labels": "int32", "weights": "float32", "ids": "int32",
    }  # fmt: skip
    assert batch["mask"].shape == batch["segments"].shape == batch["tokens"].shape
    assert batch["labels"].shape == batch["weights"].shape == batch["ids"].shape == (32,)


def test_the_seed_alone_decides_the_batches(encoded):
    first, again, other = (
        data.train_batches(encoded, 32, seed=seed, epochs=2, buckets=BUCKETS) for seed in (3, 3, 4)
    )
    steps = range(len(first))
    assert all(same(first[i], again[i]) for i in reversed(steps))
    assert not all(np.array_equal(first[i]["ids"], other[i]["ids"]) for i in steps)
    half = len(first) // 2
    assert not all(np.array_equal(first[i]["ids"], first[half + i]["ids"]) for i in range(half))


@pytest.mark.parametrize("stop", [0, 1, 10, 11, 21, 22])
def test_a_saved_iterator_goes_on_with_the_same_batches(encoded, stop):
    batches = data.train_batches(encoded, 32, seed=5, epochs=2, buckets=BUCKETS)
    assert len(batches) == 22
    running = iter(batches.to_iter_dataset())
    for _ in range(stop):
        next(running)
    state = running.get_state()
    rest = list(running)
    resumed = iter(
        data.train_batches(encoded, 32, seed=5, epochs=2, buckets=BUCKETS).to_iter_dataset()
    )
    resumed.set_state(state)
    again = list(resumed)
    assert len(rest) == len(again) == 22 - stop
    assert all(same(a, b) for a, b in zip(rest, again, strict=True))
    assert all(same(a, batches[stop + i]) for i, a in enumerate(rest))


def test_grouping_by_length_saves_more_than_half_of_the_padding():
    lengths = np.random.default_rng(0).integers(1, 129, 4096)
    batches = data.train_batches(fake(lengths), 32, seed=0, epochs=1)
    computed = sum(batches[i]["tokens"].size for i in range(len(batches)))
    assert computed - lengths.sum() < 0.5 * (4096 * 128 - lengths.sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"process_count": 3}, "batch_size 32 cannot be shared by 3 processes"),
        ({"process_count": 2, "process_index": 2}, r"process_index 2 is not in 0\.\.1"),
        ({"buckets": (9, 4, 20)}, "must be ascending"),
        ({"buckets": (4, 9)}, r"a row has 20 tokens, the longest bucket holds 9; encode with"),
    ],
)
def test_impossible_batches_are_refused(encoded, options, message):
    arguments = {"batch_size": 32, "seed": 0, "epochs": 1, "buckets": BUCKETS, **options}
    with pytest.raises(ValueError, match=message):
        data.train_batches(encoded, arguments.pop("batch_size"), **arguments)
