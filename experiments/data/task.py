"""What a task is: its text fields, its labels and its headline metric; and one example of it."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Example(NamedTuple):
    """One row of a split."""

    texts: tuple[str, ...]  # one sentence, or the two of a pair
    label: int  # index into the task's labels
    id: int  # position in its split, so that a prediction can be traced back


class Splits(NamedTuple):
    """The two splits of a task, both random access."""

    train: Sequence[Example]
    validation: Sequence[Example]


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task on one or two texts.

    Attributes:
        name: as on the command line.
        fields: names of the text fields, one or two.
        labels: names of the labels; a label is an index into them.
        metric: the headline: "accuracy", "matthews" or "f1".
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str

    def example(self, texts: tuple[str, ...], label: int, id: int) -> Example:
        """An example whose label is checked to be one of the task's.

        Raises:
            ValueError: the label is out of range.
        """
        check_label(label, len(self.labels), f"{self.name}, example {id}")
        return Example(texts, int(label), int(id))


def check_label(label: int, num_labels: int, where: str) -> None:
    """Raises a ValueError unless 0 <= label < num_labels."""
    if not 0 <= label < num_labels:
        raise ValueError(
            f"{where}: label {label} is not in 0..{num_labels - 1}; GLUE marks the rows of its "
            "test split with -1: use labelled splits, and check the number of labels"
        )
