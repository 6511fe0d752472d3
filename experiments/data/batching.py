"""Token batches in a few static lengths, addressed by step: batch i is a function of (seed, i).

Epoch: shuffle all rows; sort by length inside windows of several batches; cut into batches; shuffle
the batches. Rows of a batch are then about equally long, T is the smallest bucket that holds them,
and jit compiles once per bucket. Every row comes once an epoch; a short last batch is filled up
with rows of weight 0.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import grain
import numpy as np
import tokenizers

from experiments.data.task import Example

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
WINDOW = 16  # batches that are sorted by length together; more pad less and mix less
_CHUNK = 4096  # texts tokenised at a time, which bounds the memory their Encodings take


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised examples, N rows of different lengths laid end to end."""

    tokens: np.ndarray  # of all rows, int32
    segments: np.ndarray  # 0 in the first text, 1 in the second or in what is learnt, int32
    lengths: np.ndarray  # tokens of each row, int64 (N,)
    labels: np.ndarray  # int32 (N,)
    ids: np.ndarray  # of the examples, int32 (N,)
    pad_id: int  # the token that fills up a row

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where each row begins in tokens and segments."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]])


def encode(
    examples: Iterable[Example], tokenizer: tokenizers.Tokenizer, max_length: int
) -> Encoded:
    """Tokenises every example, cutting the longer text first where a row exceeds `max_length`."""
    pad_ids = map(tokenizer.token_to_id, ("[PAD]", "<pad>"))
    pad_id = next((number for number in pad_ids if number is not None), None)
    if pad_id is None:
        raise ValueError("the tokenizer has no [PAD] or <pad> token; add one to its file")
    cutting = copy.deepcopy(tokenizer)
    cutting.enable_truncation(max_length)
    tokens, segments, labels, ids = [], [], [], []
    remaining = iter(examples)
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        rows = cutting.encode_batch([e.texts if len(e.texts) > 1 else e.texts[0] for e in chunk])
        tokens += [np.array(row.ids, np.int32) for row in rows]
        segments += [np.array(row.type_ids, np.int32) for row in rows]
        labels += [example.label for example in chunk]
        ids += [example.id for example in chunk]
    return joined(tokens, segments, labels, ids, pad_id)


def joined(
    tokens: Sequence[np.ndarray],
    segments: Sequence[np.ndarray],
    labels: Sequence[int],
    ids: Sequence[int],
    pad_id: int,
) -> Encoded:
    """The rows laid end to end."""
    if not tokens:
        raise ValueError("there are no examples to encode; is the split empty?")
    return Encoded(
        np.concatenate(tokens, dtype=np.int32),
        np.concatenate(segments, dtype=np.int32),
        np.array([len(row) for row in tokens]),
        np.array(labels, np.int32),
        np.array(ids, np.int32),
        pad_id,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """A random-access source of batches: one step of one process at a time.

    A batch is "tokens", "segments" int32 (B, T), "mask" bool (B, T), "labels" int32 (B,), "weights"
    float32 (B,), 0 for a row that is no example, and "ids" int32 (B,), there -1.
    """

    encoded: Encoded
    batch_size: int  # rows of a batch over all processes
    seed: int | None  # draws the order of every epoch; None keeps the rows sorted by length
    epochs: int  # how often every row comes
    buckets: tuple[int, ...] = BUCKETS  # the lengths a batch may have, ascending
    process_index: int = 0  # which share of every batch's rows is this process's
    process_count: int = 1  # shares a batch is cut into, a divisor of its size

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.encoded) // self.batch_size)

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(range(len(self))[step], self.per_epoch)
        rows = _epoch_order(self, epoch)[index]
        longest = self.encoded.lengths[rows].max()
        length = next(bucket for bucket in self.buckets if bucket >= longest)
        share = self.batch_size // self.process_count
        mine = rows[share * self.process_index : share * (self.process_index + 1)]
        return _batch(self.encoded, mine, share, length)


@functools.lru_cache(maxsize=4)
def _epoch_order(batches: Batches, epoch: int) -> list[np.ndarray]:
    """The rows of every batch of one epoch; kept, since neighbouring steps ask for it again."""
    lengths, size = batches.encoded.lengths, batches.batch_size
    cuts = range(size, len(lengths), size)
    if batches.seed is None:
        return np.split(np.argsort(lengths, kind="stable"), cuts)
    rng = np.random.Generator(np.random.PCG64([batches.seed, epoch]))
    rows = rng.permutation(len(lengths))
    windows = np.split(rows, range(size * WINDOW, len(rows), size * WINDOW))
    rows = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in windows])
    cut = np.split(rows, cuts)
    return [cut[i] for i in rng.permutation(len(cut))]


def _batch(encoded: Encoded, rows: np.ndarray, size: int, length: int) -> dict[str, np.ndarray]:
    """The rows as arrays (size, length); rows beyond them are masked and weigh 0."""
    rest, columns = (0, size - len(rows)), np.arange(length)
    starts, lengths = (np.pad(x[rows], rest)[:, None] for x in (encoded.starts, encoded.lengths))
    mask = columns < lengths
    source = (starts + columns)[mask]
    tokens = np.full(mask.shape, encoded.pad_id, np.int32)
    segments = np.zeros(mask.shape, np.int32)
    tokens[mask], segments[mask] = encoded.tokens[source], encoded.segments[source]
    return {
        "tokens": tokens,
        "segments": segments,
        "mask": mask,
        "labels": np.pad(encoded.labels[rows], rest),
        "weights": np.pad(np.ones(len(rows), np.float32), rest),
        "ids": np.pad(encoded.ids[rows], rest, constant_values=-1),
    }


def batches_of(
    encoded: Encoded, batch_size: int, *, seed: int | None, epochs: int, **share
) -> grain.MapDataset:
    """`Batches`: `ds[step]` is the batch of that step, `len(ds)` the number of steps.

    `iter(ds.to_iter_dataset())` gives an iterator whose state can be saved and set again.
    """
    return grain.MapDataset.source(Batches(encoded, batch_size, seed, epochs, **share))
