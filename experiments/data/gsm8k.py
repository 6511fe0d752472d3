"""GSM8K: school mathematics in words; the answer ends in "#### " and a number (Cobbe et al. 2021).

There are a train and a test split only. Validation here is the test split, on which others report:
a rate chosen by it is chosen on the test.
"""

import os

from experiments.data import lines, scores
from experiments.data.language import Exchange, LanguageTask, question
from experiments.data.task import Splits

TASK = LanguageTask("gsm8k", 400, scores.exact_match)

_EXPECTED = '{"question": "What is 2 + 2?", "answer": "2 + 2 = 4\\n#### 4"}'
_REMEDY = (
    f"Put train.jsonl and test.jsonl there, on every line {_EXPECTED}; both are at "
    "https://github.com/openai/grade-school-math"
)


def load(data_dir: str | os.PathLike | None) -> Splits[Exchange]:
    """The train split, and the test split as validation."""
    names = ("train.jsonl", "test.jsonl")
    return Splits(*map(_rows, lines.files(TASK.name, names, data_dir, _REMEDY)))


def _rows(path) -> tuple[Exchange, ...]:
    rows = []
    for where, found in lines.objects(path, _EXPECTED):
        prompt, answer = (
            lines.text(where, name, found.get(name), _EXPECTED) for name in ("question", "answer")
        )
        if "#### " not in answer or scores.number(answer) is None:
            raise ValueError(f'{where}: the answer has no "#### " and number; expected {_EXPECTED}')
        rows.append(question(prompt, answer, [answer], len(rows)))
    return tuple(rows)
