"""The tasks an experiment can name, and their train and validation examples."""

import os

from experiments.checks import one_of
from experiments.data import glue, pydoc
from experiments.data.task import Splits, Task

TASKS: dict[str, Task] = {task.name: task for task in (pydoc.TASK, *glue.TASKS)}


def task_named(name: str) -> Task:
    """The named task; a ValueError with the near misses if there is none of that name."""
    return TASKS[one_of("task", name, TASKS)]


def load_task(name: str, *, data_dir: str | os.PathLike | None = None, seed: int = 0) -> Splits:
    """The splits of the named task: pydoc's drawn by `seed`, GLUE's from `data_dir`.

    Without `data_dir`, GLUE lies in TFDS's own folder, and is downloaded if it is not there.
    """
    task = task_named(name)
    return pydoc.load(seed) if task is pydoc.TASK else glue.load(task, data_dir)
