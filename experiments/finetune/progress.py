"""What a run shows while it trains: rich's live bar on a terminal, about ten lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.finetune.train import History


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
