"""What a run measures, as it goes: on the terminal, in metrics.jsonl and as TensorBoard's events.

    {"kind": "train", "step": 7, "loss": 0.61, "gradient_norm": 1.2, "learning_rate": 9.7e-05}
    {"kind": "validation", "step": 75, "accuracy": 0.81, "f1": 0.8, "matthews": 0.6, "loss": 0.42}
    {"kind": "diagnosis", "step": 50, "lora_cosine": 0.7, "lorapro_cosine": 0.9, "step_cosine": 0.8}

The gradient's norm is that before clipping. The file is written whole from the history, every few
seconds and at the end: what an earlier process measured after its last checkpoint is not in it. A
terminal shows rich's live bar; anything else gets about ten lines.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import storage
from experiments.finetune.train import History

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
EVERY = 10.0  # seconds between writes; a bucket takes one a second of an object
_ORDER = ("diagnosis", "train", "validation")  # at one step


def lines(history: History, rates: np.ndarray) -> list[dict[str, Any]]:
    """All that was measured, in the order in which it was; `rates` are those of every step."""
    steps = [
        {"kind": "train", "step": i + 1, "loss": loss, "gradient_norm": norm,
         "learning_rate": float(rates[i])}
        for i, (loss, norm) in enumerate(zip(history.losses, history.gradient_norms, strict=True))
    ]  # fmt: skip
    others = [{"kind": "validation"} | line for line in history.evaluations]
    others += [{"kind": "diagnosis"} | line for line in history.diagnostics]
    return sorted(steps + others, key=lambda line: (line["step"], _ORDER.index(line["kind"])))


@contextlib.contextmanager
def logged(
    folder: storage.Path, rates: np.ndarray, *, tensorboard: bool
) -> Iterator[Callable[[History], None]]:
    """Yields what is to be called with the history whenever there is news in it."""
    latest, sent, due = History(), 0, 0.0  # sent: lines that TensorBoard has

    def write() -> None:
        nonlocal sent, due
        found = lines(latest, rates)
        text = "".join(json.dumps(line) + "\n" for line in found)
        storage.write_atomic(folder / METRICS, text.encode(), "the run's log")
        for line in found[sent:] if events else ():
            for name in line.keys() - {"kind", "step"}:
                events.add_scalar(f"{line['kind']}/{name}", line[name], line["step"])
        sent, due = len(found), time.monotonic() + EVERY

    def observe(history: History) -> None:
        nonlocal latest
        latest = history
        if time.monotonic() >= due:
            write()

    with contextlib.ExitStack() as held:
        events = None
        if tensorboard:
            import tensorboardX  # here, since it imports PyTorch wherever that is installed

            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
            events = tensorboardX.SummaryWriter(str(folder / TENSORBOARD))
            held.callback(events.close)
        try:
            yield observe
        finally:  # also of a run that diverged or was told to end
            write()


@contextlib.contextmanager
def shown(
    console: Console, title: str, steps: int, batch_size: int
) -> Iterator[Callable[[History], None]]:
    """Yields what is to be called with the history whenever there is news in it."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[news]}, left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task, told = bar.add_task(title, total=steps, news=""), 0

        def observe(history: History) -> None:
            nonlocal told
            done, seconds = len(history.losses), history.seconds.get("train", 0.0)
            if done == told or not seconds:
                return
            rate, loss = done * batch_size / seconds, np.mean(history.losses[-10:])
            news = f"loss {loss:.4f}, {rate:.0f} examples/s"
            bar.update(task, completed=done, news=news)
            tenth = done // max(steps // 10, 1) > told // max(steps // 10, 1) or done == steps
            if tenth and not console.is_terminal:
                left = seconds / done * (steps - done)
                console.print(
                    f"{title}: step {done}/{steps}, {news}, {left:.0f} s left",
                    highlight=False,
                    soft_wrap=True,
                )
            told = done

        yield observe
