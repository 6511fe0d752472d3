"""E2E: a restaurant's facts, and a sentence or two that tell them (Novikova et al. 2017).

The facts are written as in LoRA's experiments: "name : Blue Spice | Type : pub | area : riverside".
A row is one of the facts' several descriptions; all of them are its references.
"""

import os
import re

from experiments.data import lines, scores
from experiments.data.language import Exchange, LanguageTask, question
from experiments.data.task import Splits

TASK = LanguageTask("e2e", 96, scores.bleu)

INSTRUCTION = "Describe the restaurant in a sentence or two."
_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_FACT = re.compile(r"([^\[\],]+)\[([^\[\]]*)\](?:, *|$)")
_EXPECTED = '{"mr": "name[Blue Spice], eatType[pub]", "refs": ["Blue Spice is a pub."]}'
_REMEDY = (
    f"Write train.jsonl and validation.jsonl there, on every line {_EXPECTED}; the data is at "
    "https://github.com/tuetschek/e2e-dataset"
)


def load(data_dir: str | os.PathLike | None) -> Splits[Exchange]:
    """The train and validation splits, one row for every description."""
    names = ("train.jsonl", "validation.jsonl")
    return Splits(*map(_rows, lines.files(TASK.name, names, data_dir, _REMEDY)))


def linearised(facts: str) -> str:
    """The facts with names as in LoRA's data, or "" if they are not written name[value], ..."""
    if _FACT.sub("", facts):
        return ""
    pairs = ((name.strip(), value.strip()) for name, value in _FACT.findall(facts))
    return " | ".join(f"{_NAMES.get(name, name)} : {value}" for name, value in pairs)


def _rows(path) -> tuple[Exchange, ...]:
    rows: list[Exchange] = []
    for where, found in lines.objects(path, _EXPECTED):
        facts = linearised(lines.text(where, "mr", found.get("mr"), _EXPECTED))
        references = found.get("refs")
        if not facts or not isinstance(references, list) or not references:
            raise ValueError(f"{where}: no facts or no list of refs; expected {_EXPECTED}")
        # Some descriptions have spaces at an end, or two in a row, that nobody meant to teach.
        references = [
            " ".join(lines.text(where, "one of refs", reference, _EXPECTED).split())
            for reference in references
        ]
        prompt = f"{INSTRUCTION}\n\n{facts}"
        rows += [
            question(prompt, reference, references, len(rows) + i)
            for i, reference in enumerate(references)
        ]
    return tuple(rows)
