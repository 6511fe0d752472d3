"""Accuracy, F1, Matthews and mean loss from logits, in numpy float64.

With C the confusion matrix, n its sum, t its row sums (truth) and p its column sums (prediction):

    accuracy = tr C / n,    F1_k = 2 C_kk / (t_k + p_k),
    Matthews = (n tr C - t·p) / sqrt((n² - p·p) (n² - t·t))       (Gorodkin's R_K for any K)

F1 is that of class 1 when there are two classes and the mean over classes when there are more.
Where a denominator is 0 (one class only) the score is 0.
"""

from collections.abc import Callable, Iterable

import numpy as np
from scipy import special

Batch = dict[str, np.ndarray]


def _ratio(numerator, denominator) -> np.ndarray:
    """The quotient, 0 where the denominator is 0."""
    denominator = np.asarray(denominator, np.float64)
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1.0), 0.0)


def f1(counts: np.ndarray) -> float:
    """F1 of class 1 of two, or the mean F1 of more."""
    scores = _ratio(2 * np.diag(counts), counts.sum(axis=0) + counts.sum(axis=1))
    return float(scores[1] if len(scores) == 2 else scores.mean())


def matthews(counts: np.ndarray) -> float:
    """Matthews' correlation of truth and prediction; 0 if either is constant."""
    n, truth, predicted = counts.sum(), counts.sum(axis=1), counts.sum(axis=0)
    covariance = n * np.trace(counts) - truth @ predicted
    variances = (n**2 - truth @ truth) * (n**2 - predicted @ predicted)
    return float(_ratio(covariance, np.sqrt(variances)))


def metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy, f1, matthews and loss of `logits` (N, C) against `labels` (N,)."""
    logits, classes = np.asarray(logits, np.float64), logits.shape[-1]
    flat = np.bincount(labels * classes + logits.argmax(axis=-1), minlength=classes**2)
    counts = flat.reshape(classes, classes).astype(np.float64)
    log_likelihoods = special.log_softmax(logits, axis=-1)[np.arange(len(labels)), labels]
    return {
        "accuracy": float(np.trace(counts) / counts.sum()),
        "f1": f1(counts),
        "matthews": matthews(counts),
        "loss": float(-np.mean(log_likelihoods)),
    }


def predict(
    logits_fn: Callable[[Batch], object],
    batches: Iterable[Batch],
    gather: Callable[..., np.ndarray] = np.asarray,
) -> tuple[np.ndarray, np.ndarray]:
    """All logits (N, C) and labels (N,), without the rows that pad a batch."""
    # Every batch is dispatched before the first result is fetched: the device does not wait.
    pending = [(logits_fn(batch), batch) for batch in batches]
    logits, labels = [], []
    for found, batch in pending:
        real = gather(batch["weights"]) > 0
        logits.append(gather(found).astype(np.float64)[real])
        labels.append(gather(batch["labels"])[real])
    return np.concatenate(logits), np.concatenate(labels)
