"""What a task is: its text fields, its labels and its headline metric; and one example of it."""

import dataclasses
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

Row = TypeVar("Row")  # an Example, or a language task's Exchange


class Example(NamedTuple):
    """One row of a split."""

    texts: tuple[str, ...]  # one sentence, or the two of a pair
    label: int  # index into the task's labels
    id: int  # position in its split, so that a prediction can be traced back


class Splits(NamedTuple, Generic[Row]):
    """The two splits of a task, both random access."""

    train: Sequence[Row]
    validation: Sequence[Row]


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task on one or two texts."""

    name: str  # as on the command line
    fields: tuple[str, ...]  # names of the text fields, one or two
    labels: tuple[str, ...]  # their names; a label is an index into them
    metric: str  # the headline: "accuracy", "matthews" or "f1"

    def example(self, texts: tuple[str, ...], label: int, id: int) -> Example:
        """An example whose label is checked to be one of the task's."""
        if not 0 <= label < len(self.labels):
            raise ValueError(
                f"{self.name}, example {id}: label {label} is not in 0..{len(self.labels) - 1}; "
                "GLUE marks the rows of its test split with -1: use labelled splits"
            )
        return Example(texts, label, id)
