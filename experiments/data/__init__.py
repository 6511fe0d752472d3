"""The tasks an experiment can name: load(task) -> train and validation examples."""

import difflib
import pathlib

from experiments.data import glue, pydoc
from experiments.data.batching import Encoded, encode, eval_batches, train_batches
from experiments.data.task import Example, Splits, Task

__all__ = [
    "TASKS",
    "Encoded",
    "Example",
    "Splits",
    "Task",
    "encode",
    "eval_batches",
    "get",
    "load",
    "train_batches",
]

TASKS: dict[str, Task] = {task.name: task for task in (pydoc.TASK, *glue.TASKS)}


def get(task: str) -> Task:
    """The description of the named task.

    Raises:
        ValueError: there is no task of that name.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown task {task!r}; {hint}there are {', '.join(sorted(TASKS))}")
    return TASKS[task]


def load(task: str, *, data_dir: str | pathlib.Path | None = None, seed: int = 0) -> Splits:
    """The train and validation splits of the named task.

    Args:
        task: a key of TASKS.
        data_dir: where TFDS keeps prepared data; by default TFDS's own folder, filled by a download
            if need be. pydoc reads nothing from it.
        seed: draws pydoc's sentences; GLUE's splits are fixed.

    Raises:
        ValueError: the task is unknown.
        FileNotFoundError: `data_dir` does not hold the task.
        OSError: the data could not be downloaded.
    """
    found = get(task)
    return pydoc.load(seed) if task == pydoc.TASK.name else glue.load(found, data_dir)
