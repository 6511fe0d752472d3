"""Batches: every row once an epoch in its smallest bucket, the same for the same seed and step."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from experiments.data import batching
from experiments.data.batching import batches_of


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
    batches = batches_of(encoded, size, seed=seed, epochs=epochs, buckets=BUCKETS)
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
    whole = batches_of(encoded, size, seed=seed, epochs=1, buckets=BUCKETS)
    parts = [
        batches_of(encoded, size, seed=seed, epochs=1, buckets=BUCKETS,
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
    batches = batches_of(encoded, 32, seed=None, epochs=1, buckets=BUCKETS)
    ids = np.concatenate([b["ids"][b["weights"] > 0] for b in batches])
    assert sorted(ids.tolist()) == list(range(333))
    lengths = [batches[i]["tokens"].shape[1] for i in range(len(batches))]
    assert lengths == sorted(lengths)


def test_dtypes_and_shapes_are_the_promised_ones(encoded):
    batch = batches_of(encoded, 32, seed=0, epochs=1, buckets=BUCKETS)[0]
    assert {key: value.dtype.name for key, value in batch.items()} == {
        "tokens": "int32", "segments": "int32", "mask": "bool",
        "labels": "int32", "weights": "float32", "ids": "int32",
    }  # fmt: skip
    assert batch["mask"].shape == batch["segments"].shape == batch["tokens"].shape
    assert batch["labels"].shape == batch["weights"].shape == batch["ids"].shape == (32,)


def test_the_seed_alone_decides_the_batches(encoded):
    first, again, other = (
        batches_of(encoded, 32, seed=seed, epochs=2, buckets=BUCKETS) for seed in (3, 3, 4)
    )
    steps = range(len(first))
    assert all(same(first[i], again[i]) for i in reversed(steps))
    assert not all(np.array_equal(first[i]["ids"], other[i]["ids"]) for i in steps)
    half = len(first) // 2
    assert not all(np.array_equal(first[i]["ids"], first[half + i]["ids"]) for i in range(half))


@pytest.mark.parametrize("stop", [0, 1, 10, 11, 21, 22])
def test_a_saved_iterator_goes_on_with_the_same_batches(encoded, stop):
    batches = batches_of(encoded, 32, seed=5, epochs=2, buckets=BUCKETS)
    assert len(batches) == 22
    running = iter(batches.to_iter_dataset())
    for _ in range(stop):
        next(running)
    state = running.get_state()
    rest = list(running)
    resumed = iter(batches_of(encoded, 32, seed=5, epochs=2, buckets=BUCKETS).to_iter_dataset())
    resumed.set_state(state)
    again = list(resumed)
    assert len(rest) == len(again) == 22 - stop
    assert all(same(a, b) for a, b in zip(rest, again, strict=True))
    assert all(same(a, batches[stop + i]) for i, a in enumerate(rest))


def test_grouping_by_length_saves_more_than_half_of_the_padding():
    lengths = np.random.default_rng(0).integers(1, 129, 4096)
    batches = batches_of(fake(lengths), 32, seed=0, epochs=1)
    computed = sum(batches[i]["tokens"].size for i in range(len(batches)))
    assert computed - lengths.sum() < 0.5 * (4096 * 128 - lengths.sum())
