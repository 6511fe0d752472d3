"""Scores of answers against references: corpus BLEU, chrF, and the share of right numbers.

    BLEU = 100 BP exp(mean of log p_n, n = 1..4),    p_n the precision of n-grams over all answers
    chrF = 100 (1 + β²) P R / (β² P + R), β = 2,     P, R means over characters' 1- to 6-grams

Both are sacrebleu's and run from 0 to 100, as they are reported; an exact match is a share, like an
accuracy. An n-gram of an answer is right if any of the answer's references has it.
"""

import itertools
import re
from collections.abc import Sequence
from decimal import Decimal

# A minus after a digit, a letter or a closing bracket subtracts. A Decimal has no exponent of any
# length.
_NUMBER = r"(?:(?<![\w).])-)?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU with all references of every answer; a prompt may have more than another."""
    _check(answers, references)
    import sacrebleu  # only where there are answers

    # `force` keeps it from warning that the answers look like tokens with spaces between.
    found = sacrebleu.corpus_bleu(list(answers), _by_position(references), force=True)
    return {"bleu": found.score}


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus chrF; of several references, each answer's nearest counts."""
    _check(answers, references)
    import sacrebleu

    return {"chrf": sacrebleu.corpus_chrf(list(answers), _by_position(references)).score}


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of answers whose number is that of one of their references."""
    _check(answers, references)
    right = [
        number(answer) is not None and number(answer) in map(number, known)
        for answer, known in zip(answers, references, strict=True)
    ]
    return {"exact_match": sum(right) / len(right)}


def number(answer: str) -> Decimal | None:
    """The number after the first "#### ", or the last number if none is marked, or None."""
    plain = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", answer.replace("$", ""))
    marked = _MARKED.search(plain)
    numbers = [marked[1]] if marked else _ANY.findall(plain)
    return Decimal(numbers[-1]) if numbers else None


def _by_position(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The first references of all answers, then the second...: None where an answer has fewer."""
    return [list(column) for column in itertools.zip_longest(*references)]


def _check(answers: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not answers or len(answers) != len(references) or not all(references):
        raise ValueError(
            f"{len(answers)} answers and {len(references)} lists of references, "
            f"{sum(not known for known in references)} of them empty; expected at least one answer "
            "and at least one reference for each"
        )
