"""What a run measures, as it goes: metrics.jsonl in its folder, and TensorBoard's events.

    {"kind": "train", "step": 7, "loss": 0.61, "gradient_norm": 1.2, "learning_rate": 9.7e-05}
    {"kind": "validation", "step": 75, "accuracy": 0.81, "f1": 0.8, "matthews": 0.6, "loss": 0.42}
    {"kind": "diagnosis", "step": 50, "lora_cosine": 0.7, "lorapro_cosine": 0.9, "step_cosine": 0.8}

The gradient's norm is that before clipping. A log is made anew from the history at every start,
since what an earlier process measured after its last checkpoint is measured again.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments import storage
from experiments.finetune.train import History
from experiments.storage import explained

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


@contextlib.contextmanager
def opened(
    folder: storage.Path, rates: np.ndarray, *, tensorboard: bool
) -> Iterator[Callable[[History], None]]:
    """Yields what is to be called with the history whenever there is news in it.

    Args:
        folder: of the run.
        rates: the learning rate of every step.
        tensorboard: whether to write events too.

    Raises:
        OSError: the log cannot be written.
    """
    path, written = folder / METRICS, dict.fromkeys(("train", "validation", "diagnosis"), 0)
    with contextlib.ExitStack() as held:
        with explained("the run's log", path):
            write = held.enter_context(storage.growing(path))
            writer = held.enter_context(_events(folder / TENSORBOARD)) if tensorboard else None

        def observe(history: History) -> None:
            with explained("the run's log", path):
                for kind, line in _news(history, rates, written):
                    write(json.dumps({"kind": kind} | line) + "\n")
                    if writer is not None:
                        _add(writer, kind, **line)

        yield observe


@contextlib.contextmanager
def _events(folder: storage.Path) -> Iterator[Any]:
    import tensorboardX  # here, since it imports PyTorch wherever that is installed

    shutil.rmtree(folder, ignore_errors=True)
    writer = tensorboardX.SummaryWriter(str(folder))
    try:
        yield writer
    finally:
        writer.close()


def _news(
    history: History, rates: np.ndarray, written: dict[str, int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, line) of all that `written` does not count yet, and counts it."""
    start, end = written["train"], len(history.losses)
    for i in range(start, end):
        yield (
            "train",
            {
                "step": i + 1,
                "loss": history.losses[i],
                "gradient_norm": history.gradient_norms[i],
                "learning_rate": float(rates[i]),
            },
        )
    written["train"] = end
    kinds: dict[str, Sequence[dict]] = {
        "validation": history.evaluations,
        "diagnosis": history.diagnostics,
    }
    for kind, lines in kinds.items():
        yield from ((kind, line) for line in lines[written[kind] :])
        written[kind] = len(lines)


def _add(writer: Any, kind: str, step: int, **figures: float) -> None:
    for name, value in figures.items():
        writer.add_scalar(f"{kind}/{name}", value, step)
