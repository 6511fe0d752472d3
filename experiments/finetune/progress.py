"""What a run shows while it trains: a live bar on a terminal, about ten lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import rich.console
import rich.progress

from experiments.finetune import train


@contextlib.contextmanager
def shown(
    console: rich.console.Console, title: str, steps: int, batch_size: int
) -> Iterator[Callable[[train.History], None]]:
    """A live bar on a terminal, ten lines elsewhere; yields what `train.train` calls."""
    if not console.is_terminal:
        yield _lines(console, title, steps, batch_size)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.completed}/{task.total} loss {task.fields[loss]}"),
        rich.progress.TextColumn("{task.fields[rate]} examples/s, left"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=steps, loss="-", rate="-")

        def observe(history: train.History) -> None:
            if not history.losses:
                return
            loss, rate = _now(history, batch_size)
            done = len(history.losses)
            bar.update(task, completed=done, loss=f"{loss:.4f}", rate=f"{rate:.0f}")

        yield observe


def _lines(console, title: str, steps: int, batch_size: int) -> Callable[[train.History], None]:
    every, shown = max(steps // 10, 1), -1

    def observe(history: train.History) -> None:
        nonlocal shown
        done = len(history.losses)
        if done and done != shown and (done % every == 0 or done == steps):
            shown = done
            loss, rate = _now(history, batch_size)
            left = history.seconds["train"] / done * (steps - done)
            console.print(
                f"{title}: step {done}/{steps}, loss {loss:.4f}, {rate:.0f} examples/s, "
                f"{left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    return observe


def _now(history: train.History, batch_size: int) -> tuple[float, float]:
    """The mean of the last ten losses, and examples per second of training."""
    done, seconds = len(history.losses), history.seconds.get("train", 0.0)
    rate = done * batch_size / seconds if seconds else 0.0
    return float(np.mean(history.losses[-10:])), rate
