"""The tasks an experiment can name, and their train and validation examples."""

import functools
import os
from collections.abc import Sequence

from experiments.checks import one_of
from experiments.data import docstrings, e2e, glue, gsm8k, jsonl, pydoc
from experiments.data.language import LanguageTask
from experiments.data.task import Splits, Task

TASKS: dict[str, Task] = {task.name: task for task in (pydoc.TASK, *glue.TASKS)}
LANGUAGE: dict[str, LanguageTask] = {
    task.name: task for task in (docstrings.TASK, e2e.TASK, gsm8k.TASK, jsonl.TASK)
}


def task_named(name: str) -> Task | LanguageTask:
    """The named task; a ValueError with the near misses if there is none of that name."""
    known = TASKS | LANGUAGE
    return known[one_of("task", name, known)]


OWN_DATA = jsonl.TASK.name

# For runs of one process that differ in other things: parsing the library takes seconds.
_docstrings = functools.lru_cache(maxsize=1)(docstrings.load)


def load_task(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    files: Sequence[str | None] = (),
    seed: int = 0,
) -> Splits:
    """The splits of the named task: of examples, or of a language task's exchanges.

    Args:
        name: of the task.
        data_dir: GLUE's, e2e's or gsm8k's folder. Without it, GLUE lies in TFDS's own folder, and
            is downloaded if it is not there.
        files: data's own: the one to train on, and the one to validate on or None.
        seed: draws pydoc and docstrings, and the rows of data that validate.
    """
    task = task_named(name)
    if task in (pydoc.TASK, docstrings.TASK):
        return pydoc.load(seed) if task is pydoc.TASK else _docstrings(seed)
    if task is jsonl.TASK:
        if not files:
            raise ValueError("the task data is a file of yours: name it with --data FILE")
        return jsonl.load(*files, seed=seed)
    if task in (e2e.TASK, gsm8k.TASK):
        return (e2e if task is e2e.TASK else gsm8k).load(data_dir)
    return glue.load(task, data_dir)
