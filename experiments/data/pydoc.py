"""pydoc: an acceptability task from the prose in every CPython; no download, no file of ours.

Each sentence of pydoc_data.topics is used once: as it stands (label 1, acceptable) or with two
neighbouring spans of words swapped (label 0). The first word stays, and punctuation stays in its
slot, so capitals, commas and the set of words give nothing away; only the order of the words does.
Some swaps leave good English behind, so no model reaches 100 %.

The same seed gives the same task for the same version of CPython; the prose, and with it the number
of examples, differs a little between versions.
"""

import re
from collections.abc import Iterator

import numpy as np
from scipy.sparse import csgraph

from experiments.data.task import Example, Splits, Task

TASK = Task("pydoc", ("sentence",), ("unacceptable", "acceptable"), "accuracy")

MIN_UNITS, MAX_WORDS = 5, 45
MAX_SPAN = 3  # words in a span; longer ones make the break easier to see
VALIDATION_SHARE = 1 / 6
NEAR_DUPLICATE = 0.6  # Jaccard index of two sentences' words from which they share a split

# A word; "code in quotes" and (parentheses) move as one: cutting them open would show the swap.
UNIT = re.compile(r'(?:"[^"]*"|“[^”]*”|\([^()]*\)|\S)+')
_RULE = re.compile(r"[=*\-^~#+|]{3,}$| \| ")
_MARKER = re.compile(r"\s*([*•-]|\d+\.|\[\d+\]) +")
_EMPHASIS = re.compile(r"(?<![\w*\"'])\*([^*\s\"][^*]*?)\*(?![\w*])")
_STRONG = re.compile(r"(?<![\w\"'])\*\*([A-Za-z][^*]*)\*\*")
_VERSION_NOTE = re.compile(
    r"^(New|Changed|Deprecated)[\w ,]* in version [\d.]+: *|^[\w’ ]+ (note|detail): *"
)
_SENTENCE_END = re.compile(
    r"(?<=[.!?:])(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<!cf\.)\s+(?=[\"(“]?[A-Z_])"
)
_OPENING = re.compile(r'[A-Z][a-z]*(’s)?[ ,]|"[^"]+" [a-z]')


def load(seed: int = 0) -> Splits[Example]:
    """The task drawn with `seed`: which sentences are disturbed, how, and which validate."""
    rng = np.random.Generator(np.random.PCG64([seed, *b"pydoc"]))
    sentences = prose()
    held_out = _validation_rows(clusters(sentences), rng)
    rows = rng.permutation(len(sentences))
    train, validation = ([sentences[i] for i in rows if (i in held_out) == v] for v in (0, 1))
    return Splits(_label(train, rng), _label(validation, rng))


def prose() -> list[str]:
    """Every usable sentence of pydoc_data.topics, the first of those made of the same words.

    Numbers, code and order do not tell two sentences apart here: one would give away the other.
    """
    from pydoc_data.topics import topics  # half a megabyte of text, read only where it is wanted

    kept: dict[tuple[str, ...], str] = {}
    for name in sorted(topics):
        for paragraph in _paragraphs(topics[name]):
            for sentence in _SENTENCE_END.split(_VERSION_NOTE.sub("", paragraph)):
                if _is_prose(sentence):
                    kept.setdefault(tuple(sorted(content_words(sentence))), sentence)
    return list(kept.values())


def content_words(sentence: str) -> list[str]:
    """The lower-cased words outside quotes: numbers, code and punctuation do not count."""
    return re.findall(r"[a-z]{2,}", re.sub(r'"[^"]*"', " ", sentence).lower())


def clusters(sentences: list[str]) -> np.ndarray:
    """A number per sentence, equal for those linked by a chain of near duplicates."""
    sets = [set(content_words(sentence)) for sentence in sentences]
    index = {word: i for i, word in enumerate(sorted(set().union(*sets)))}
    has = np.zeros((len(sets), len(index)), np.float32)
    for row, words in enumerate(sets):
        has[row, [index[word] for word in words]] = 1
    common, sizes = has @ has.T, has.sum(axis=1)
    linked = common >= NEAR_DUPLICATE * (sizes[:, None] + sizes[None, :] - common)
    return csgraph.connected_components(linked, directed=False)[1]


def disturb(sentence: str, rng: np.random.Generator) -> str:
    """The sentence with two neighbouring spans of one to MAX_SPAN words swapped."""
    units = [re.fullmatch(r"(.*?)([,;:.!?]*)", unit).groups() for unit in UNIT.findall(sentence)]
    words = [word for word, _ in units]
    swaps = [
        (start, middle, end)
        for start in range(1, len(words))
        for middle in range(start + 1, min(start + MAX_SPAN, len(words)) + 1)
        for end in range(middle + 1, min(middle + MAX_SPAN, len(words)) + 1)
        if words[start:middle] + words[middle:end] != words[middle:end] + words[start:middle]
    ]
    start, middle, end = swaps[rng.integers(len(swaps))]
    words[start:end] = words[middle:end] + words[start:middle]
    return " ".join(word + stop for word, (_, stop) in zip(words, units, strict=True))


def _paragraphs(text: str) -> Iterator[str]:
    """The text's blocks, each on one line; headings, grammar, doctests and tables left out."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.split("\n") if line.strip()]
        if ">>>" in block or "::=" in block or any(_RULE.search(line) for line in lines):
            continue
        for run in _runs(lines):
            joined = re.sub(r"(?<=\w-) ", "", re.sub(r"\s+", " ", " ".join(run)).strip())
            yield _EMPHASIS.sub(r"\1", _STRONG.sub(r"\1", joined))


def _runs(lines: list[str]) -> Iterator[list[str]]:
    """Consecutive lines of one indentation: a list's items and a term's definition come apart."""
    run: list[str] = []
    for line in lines:
        item = _MARKER.match(line)
        text = " " * item.end() + line[item.end() :] if item else line
        if run and (item or _indent(text) != _indent(run[-1])):
            yield run
            run = []
        run.append(text)
    yield run


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_prose(sentence: str) -> bool:
    """A whole sentence of English: opens and closes as one, and is mostly words."""
    units = UNIT.findall(sentence)
    plain = sum(bool(re.fullmatch(r"[A-Za-z’'-]+[,;:.!?]?", unit)) for unit in units)
    return (
        bool(_OPENING.match(sentence))
        and sentence[-1] in ".:!?"
        and not re.search(r"[|\\=]{2}|https?:", sentence)
        and sentence.count('"') % 2 == 0
        and sentence.count("(") == sentence.count(")")
        and len(units) >= MIN_UNITS
        and len(sentence.split()) <= MAX_WORDS
        and plain >= 0.6 * len(units)
    )


def _validation_rows(cluster: np.ndarray, rng: np.random.Generator) -> set[int]:
    """Whole clusters, in random order, until they hold VALIDATION_SHARE of the sentences."""
    wanted = int(len(cluster) * VALIDATION_SHARE)
    rows: set[int] = set()
    for label in rng.permutation(np.unique(cluster)):
        members = np.flatnonzero(cluster == label)
        if len(rows) + len(members) <= wanted:
            rows.update(members.tolist())
    return rows


def _label(sentences: list[str], rng: np.random.Generator) -> tuple[Example, ...]:
    """Half of the sentences, chosen at random, disturbed."""
    intact = rng.permutation(len(sentences)) < (len(sentences) + 1) // 2
    return tuple(
        TASK.example((text if keep else disturb(text, rng),), int(keep), i)
        for i, (text, keep) in enumerate(zip(sentences, intact.tolist(), strict=True))
    )
