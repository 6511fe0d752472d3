"""Span corruption, the task T5 is pretrained on: spans are hidden, the targets are what they hid.

    row      Thank you for inviting me to your party last week
    inputs   Thank you <0> me to your party <1> </s>
    targets  <0> for inviting <1> last week <2> </s>

Of n tokens, round(0.15 n) are noise, in round(noise / 3) spans (Raffel et al., section 3.1.4 and
appendix). Noise and rest are each cut into that many parts, all ways of cutting equally likely, and
the parts alternate, the rest first: a row ends with a span. Each span's place is taken by the next
sentinel (`<extra_id_0>` is the vocabulary's last token, `<extra_id_1>` the one before); one more
closes the targets. All rows of n tokens give inputs of one length and targets of one length, so
nothing is padded.

Rows are the texts of an epoch, shuffled, laid end to end and cut, as T5 packs them. Batch i is a
function of (seed, i).
"""

import dataclasses
import functools
from collections.abc import Iterable

import grain
import numpy as np
import tokenizers

ENDLESS = 2**31 - 1  # batches: who reads them decides when to stop
_CHUNK = 4096  # texts tokenised at a time, which bounds the memory their Encodings take


@dataclasses.dataclass(frozen=True)
class Spans:
    """How rows of one length are corrupted; the defaults are T5's.

    Attributes:
        length: tokens of a row.
        sentinel: the first sentinel's id; those of the next ones are one less each.
        end: the id that ends inputs and targets.
        sentinels: how many there are.
        density: share of the tokens that are noise.
        mean_span: tokens of a span, on average.
    """

    length: int
    sentinel: int
    end: int
    sentinels: int
    density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self):
        if self.length < 2:
            raise ValueError(f"a row of {self.length} tokens has no span to hide; use 2 or more")
        if self.count >= self.sentinels:
            raise ValueError(
                f"a row of {self.length} tokens has {self.count} spans, which with the last one "
                f"need {self.count + 1} sentinels; there are {self.sentinels}: use shorter rows"
            )

    @property
    def noise(self) -> int:
        """Tokens of a row that are noise."""
        return min(max(round(self.length * self.density), 1), self.length - 1)

    @property
    def count(self) -> int:
        """Spans of a row."""
        return min(max(round(self.noise / self.mean_span), 1), self.length - self.noise)

    def is_text(self, ids):
        """Which of `ids` (any array of tokens) are neither sentinels nor the end."""
        return (ids <= self.sentinel - self.sentinels) & (ids != self.end)

    def mask(self, rng: np.random.Generator) -> np.ndarray:
        """Which tokens of a row are noise, bool (length,)."""
        parts = np.empty(2 * self.count, np.int64)
        parts[0::2] = composition(self.length - self.noise, self.count, rng)
        parts[1::2] = composition(self.noise, self.count, rng)
        return np.repeat(np.arange(2 * self.count) % 2 == 1, parts)

    def corrupt(self, row: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of a row (length,) whose tokens under `mask` are noise."""
        begins = mask & ~np.concatenate([[False], mask[:-1]])
        marks = self.sentinel - np.arange(self.count + 1, dtype=row.dtype)
        marked = row.copy()
        marked[begins] = marks[:-1]
        inputs = np.append(marked[~mask | begins], row.dtype.type(self.end))
        hidden = np.insert(row[mask], np.flatnonzero(begins[mask]), marks[:-1])
        return inputs, np.append(hidden, np.array([marks[-1], self.end], row.dtype))


def composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` positive integers of the sum `total`; every such sequence is equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Tokenised texts, N of different lengths laid end to end, without `</s>`.

    Attributes:
        tokens: of all texts, int32.
        lengths: tokens of each text, int64 (N,).
    """

    tokens: np.ndarray
    lengths: np.ndarray

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """All tokens, the texts in another order."""
        starts = np.cumsum(self.lengths) - self.lengths
        order = rng.permutation(len(self.lengths))
        lengths = self.lengths[order]
        within = np.arange(len(self.tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self.tokens[np.repeat(starts[order], lengths) + within]


def encode(texts: Iterable[str], tokenizer: tokenizers.Tokenizer) -> Texts:
    """The tokens of the texts, without the token that ends each."""
    texts, rows = list(texts), []
    for start in range(0, len(texts), _CHUNK):
        found = tokenizer.encode_batch(texts[start : start + _CHUNK], add_special_tokens=False)
        rows += [np.array(row.ids, np.int32) for row in found]
    return Texts(np.concatenate(rows), np.array([len(row) for row in rows]))


@dataclasses.dataclass(frozen=True, eq=False)
class SpanBatches:
    """A random-access source of batches of corrupted rows, epoch after epoch without end.

    Attributes:
        texts: of one epoch.
        spans: how their rows are corrupted.
        batch_size: rows of a batch.
        seed: draws the order of every epoch and the spans of every batch.
    """

    texts: Texts
    spans: Spans
    batch_size: int
    seed: int

    def __post_init__(self):
        if self.per_epoch < 1:
            raise ValueError(
                f"{len(self.texts.tokens)} tokens do not fill one batch of {self.batch_size} rows "
                f"of {self.spans.length}; use a smaller batch, shorter rows or more text"
            )

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch; tokens that do not fill one are left out, others each epoch."""
        return len(self.texts.tokens) // (self.batch_size * self.spans.length)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(step, self.per_epoch)
        rows = _epoch_rows(self, epoch)[index * self.batch_size :][: self.batch_size]
        rng = np.random.Generator(np.random.PCG64([self.seed, *b"spans", step]))
        pairs = [self.spans.corrupt(row, self.spans.mask(rng)) for row in rows]
        inputs, targets = map(np.stack, zip(*pairs, strict=True))
        return {"inputs": inputs, "targets": targets}


@functools.lru_cache(maxsize=4)
def _epoch_rows(batches: SpanBatches, epoch: int) -> np.ndarray:
    """The rows of one epoch; kept, since neighbouring steps ask for them again."""
    rng = np.random.Generator(np.random.PCG64([batches.seed, *b"order", epoch]))
    length = batches.spans.length
    tokens = batches.texts.shuffled(rng)
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def span_batches(texts: Texts, spans: Spans, batch_size: int, *, seed: int) -> grain.MapDataset:
    """All batches of a run: `ds[step]` is that of a step, and there is one for every step.

    `iter(ds.to_iter_dataset())` gives an iterator whose state can be saved and set again.

    Returns:
        Batches of "inputs" int32 (B, S) and "targets" int32 (B, T), all of them tokens.

    Raises:
        ValueError: the texts do not fill one batch.
    """
    return grain.MapDataset.source(SpanBatches(texts, spans, batch_size, seed))
