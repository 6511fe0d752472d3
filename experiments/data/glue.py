"""GLUE through TFDS's random-access data sources: array_record files, read without TensorFlow."""

import os
from collections.abc import Sequence

from experiments import storage
from experiments.data.task import Example, Splits, Task
from experiments.exits import first_line

_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

# Label names in TFDS's order, which `load` checks against the prepared data.
TASKS = (
    Task("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews"),
    Task("sst2", ("sentence",), ("negative", "positive"), "accuracy"),
    Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), "f1"),
    Task("rte", _PAIR, _ENTAILMENT, "accuracy"),
    Task("qnli", ("question", "sentence"), _ENTAILMENT, "accuracy"),
    Task("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy"),
)
VALIDATION = {"mnli": "validation_matched"}  # as in the paper's table


class GlueSplit(Sequence):
    """One split, decoded row by row as it is asked for; every label is checked."""

    def __init__(self, task: Task, source):  # a TFDS data source of one of its splits
        self.task, self._source = task, source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]  # negative indices; IndexError beyond the end
        row = self._source[index]
        texts = tuple(row[field].decode() for field in self.task.fields)
        return self.task.example(texts, int(row["label"]), index)


def load(task: Task, data_dir: str | os.PathLike | None = None) -> Splits[Example]:
    """The train and validation splits (MNLI: matched); the labels must be the task's."""
    builder = _downloaded(task) if data_dir is None else _prepared(task, storage.at(data_dir))
    labels = tuple(builder.info.features["label"].names)
    if labels != task.labels:
        raise ValueError(
            f"glue/{task.name} has the labels {labels}, expected {task.labels}; "
            "prepare it again with a current tensorflow-datasets"
        )
    names = ("train", VALIDATION.get(task.name, "validation"))
    return Splits(*(GlueSplit(task, builder.as_data_source(split=name)) for name in names))


def _prepared(task: Task, data_dir: storage.Path):
    """The builder of a task that lies under data_dir/glue/<task>/<version>.

    From a bucket its few files come whole: read row by row, each row would be a request.
    """
    data_dir = data_dir.expanduser()
    folder = data_dir / "glue" / task.name
    versions = storage.found(folder, "*/dataset_info.json")
    if not versions:
        others = storage.found(data_dir, "glue/*/*/dataset_info.json")
        there = sorted(path.parent.parent.name for path in others)
        raise FileNotFoundError(
            f"no {task.name} in {data_dir}: expected {folder}/<version>/dataset_info.json; "
            f"{'prepared there: ' + ', '.join(there) if there else 'no GLUE task is there'}. "
            f"Prepare it on a connected machine (leave --data-dir out) or name TFDS's own folder"
        )
    import tensorflow_datasets as tfds  # seconds to import: only where GLUE is asked for

    return tfds.builder_from_directory(storage.local(versions[-1].parent))


def _downloaded(task: Task):
    """The builder in TFDS's default folder, after preparing it if that was not done before."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(f"glue/{task.name}", file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # TFDS wraps network errors in many types of its own
        raise OSError(
            f"glue/{task.name} is not in {tfds.core.constants.DATA_DIR} and could not be "
            f"downloaded ({first_line(error)}); without a network, pass --data-dir with prepared "
            "data, or use --task pydoc"
        ) from error
    return builder
