"""The metrics against formulas that share nothing with them: loops, Pearson, a direct softmax."""

import numpy as np
import pytest

from experiments.finetune import evaluate


def _case(seed: int, classes: int, n: int = 57):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, classes)) * 2, rng.integers(classes, size=n)


def _f1_by_counting(labels, predicted, k) -> float:
    pairs = list(zip(labels, predicted, strict=True))
    hits = sum(y == k and z == k for y, z in pairs)
    found = sum(z == k for _, z in pairs)
    real = sum(y == k for y, _ in pairs)
    precision, recall = hits / found, hits / real
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("seed", range(5))
def test_binary_metrics_match_definitions(seed):
    logits, labels = _case(seed, 2)
    predicted = [int(row[1] > row[0]) for row in logits]
    got = evaluate.metrics(logits, labels)
    assert got["accuracy"] == pytest.approx(
        np.mean([y == z for y, z in zip(labels, predicted, strict=True)])
    )
    assert got["f1"] == pytest.approx(_f1_by_counting(labels, predicted, 1), abs=1e-12)
    # For two classes Matthews is Pearson's correlation of the 0/1 vectors.
    assert got["matthews"] == pytest.approx(np.corrcoef(labels, predicted)[0, 1], abs=1e-12)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = -np.mean([np.log(p[y]) for p, y in zip(probabilities, labels, strict=True)])
    assert got["loss"] == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_three_classes_use_macro_f1_and_multiclass_matthews(seed):
    logits, labels = _case(seed, 3)
    predicted = logits.argmax(axis=1)
    got = evaluate.metrics(logits, labels)
    macro = np.mean([_f1_by_counting(labels, predicted, k) for k in range(3)])
    assert got["f1"] == pytest.approx(macro, abs=1e-12)
    # R_K as the correlation of centred one-hot matrices.
    truth, guess = np.eye(3)[labels], np.eye(3)[predicted]
    truth, guess = truth - truth.mean(axis=0), guess - guess.mean(axis=0)
    expected = (truth * guess).sum() / np.sqrt((truth**2).sum() * (guess**2).sum())
    assert got["matthews"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("constant", [0, 1])
def test_predicting_one_class_scores_zero_not_nan(constant):
    logits = np.zeros((10, 2))
    logits[:, constant] = 5.0
    got = evaluate.metrics(logits, np.array([0, 1] * 5))
    assert got["matthews"] == 0.0
    assert got["f1"] == (0.0 if constant == 0 else pytest.approx(2 / 3))
    one_class = evaluate.metrics(logits, np.full(10, 0))
    assert one_class["matthews"] == 0.0
    assert np.isfinite(list(one_class.values())).all()


def test_extreme_logits_keep_the_loss_finite():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]])
    assert evaluate.metrics(logits, np.array([0, 0]))["loss"] == pytest.approx(1e4)


def test_padding_rows_do_not_count():
    logits, labels = _case(0, 2, n=7)
    padded = np.concatenate([logits, 9 * np.ones((1, 2))]).reshape(2, 4, 2)
    batches = [
        {"labels": labels[:4], "weights": np.ones(4), "index": 0},
        {"labels": np.append(labels[4:], 1), "weights": np.array([1.0, 1, 1, 0]), "index": 1},
    ]
    got_logits, got_labels = evaluate.predict(lambda batch: padded[batch["index"]], batches)
    np.testing.assert_array_equal(got_logits, logits)
    np.testing.assert_array_equal(got_labels, labels)
