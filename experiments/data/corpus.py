"""Text to pretrain a small T5 on: training splits of GLUE and pydoc's prose, no validation text.

A text is one example's sentences, or one sentence of pydoc. Texts that repeat a sentence of a
validation split of these tasks are left out, pydoc's included. Some texts are held out to measure
the pretraining itself; SST-2's are phrases of each other, so a text that shares a run of five words
with one held out is left out of both.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from experiments.data import glue, pydoc

GLUE = ("cola", "mrpc", "sst2")
HELD_OUT = 500  # texts
RUN = 5  # words that a text must not share, in a row, with one held out
LONG = 8  # words from which a text can be held out, or counts if it stands within another


class Corpus(NamedTuple):
    """Texts, all different."""

    train: list[str]
    held_out: list[str]
    sources: dict[str, int]  # texts of each source, before any is held out

    @property
    def digest(self) -> str:
        """SHA-256 of all texts in their order: two runs on one digest read the same."""
        texts = "\n".join([*self.train, "", *self.held_out])
        return hashlib.sha256(texts.encode()).hexdigest()


def load(data_dir: str | pathlib.Path | None, *, seed: int = 0) -> Corpus:
    """The corpus; without `data_dir`, of pydoc's prose alone.

    Args:
        data_dir: where TFDS keeps cola, mrpc and sst2.
        seed: draws what is held out, and pydoc's validation sentences, which are left out.

    Raises:
        FileNotFoundError: `data_dir` lacks a task.
    """
    sources = {} if data_dir is None else _glue(data_dir)
    sources["pydoc"] = pydoc.training_prose(seed)
    texts = list(dict.fromkeys(text for found in sources.values() for text in found))
    train, held_out = split(texts, HELD_OUT, np.random.Generator(np.random.PCG64([seed, *b"held"])))
    return Corpus(train, held_out, {name: len(found) for name, found in sources.items()})


def _glue(data_dir: str | pathlib.Path) -> dict[str, list[str]]:
    """{task: texts of its training split}, without what any of the tasks validates."""
    tasks = [task for task in glue.TASKS if task.name in GLUE]
    splits = {task.name: glue.load(task, data_dir) for task in tasks}
    validated = Validated(
        sentence
        for found in splits.values()
        for example in found.validation
        for sentence in example.texts
    )
    return {
        name: list(
            dict.fromkeys(
                " ".join(example.texts)
                for example in found.train
                if not any(map(validated.repeated_by, example.texts))
            )
        )
        for name, found in splits.items()
    }


class Validated:
    """Sentences that must not be trained on."""

    def __init__(self, sentences: Iterable[str]):
        self.sentences = set(map(plain, sentences))
        self.by_opening: dict[tuple, list[str]] = {}
        for sentence in self.sentences:
            if len(sentence.split()) >= LONG:
                self.by_opening.setdefault(next(runs(sentence)), []).append(sentence)

    def repeated_by(self, text: str) -> bool:
        """Whether the text is one of the sentences, or holds a long one of them."""
        text = plain(text)
        return text in self.sentences or any(
            sentence in text for run in runs(text) for sentence in self.by_opening.get(run, ())
        )


def plain(text: str) -> str:
    """The text as two copies of it are compared: case and spaces do not count."""
    return " ".join(text.lower().split())


def split(texts: list[str], count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """(texts to train on, at most `count` held out that share no run of words with them)."""
    long = [i for i, text in enumerate(texts) if len(text.split()) >= LONG]
    # Of a small corpus, a tenth at most.
    drawn = rng.permutation(long)[: min(count, len(texts) // 10)]
    held_out = [texts[i] for i in sorted(drawn.tolist())]
    taken = {run for text in held_out for run in runs(text)}
    return [text for text in texts if taken.isdisjoint(runs(text))], held_out


def runs(text: str) -> Iterator[tuple[str, ...]]:
    """All RUN words in a row."""
    words = plain(text).split()
    return zip(*(words[i:] for i in range(RUN)), strict=False)
