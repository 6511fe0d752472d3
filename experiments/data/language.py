"""What a language task is: conversations whose answers are learnt, and a score of what is said."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import numpy as np


class Message(TypedDict):
    """What one side says."""

    role: str  # "system", "user" or "assistant"
    content: str


class Exchange(NamedTuple):
    """A conversation of which the assistant's words are learnt: one row of a language task."""

    messages: tuple[Message, ...]  # in turn; the last is the assistant's
    references: tuple[str, ...]  # right answers to the last prompt; some prompts have several
    id: int  # position in its split


@dataclasses.dataclass(frozen=True)
class LanguageTask:
    """A task whose answers are texts."""

    name: str  # as on the command line
    max_new_tokens: int  # that an answer may take when it is generated
    # (answers, the references of each) -> metrics
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]


def question(prompt: str, answer: str, references: Sequence[str], id: int) -> Exchange:
    """The exchange of one prompt and one answer."""
    messages = Message(role="user", content=prompt), Message(role="assistant", content=answer)
    return Exchange(messages, tuple(references), id)


def held_out(groups: Sequence[str], wanted: int, rng: np.random.Generator) -> set[int]:
    """Rows to validate on: whole groups in random order, as far as they fit into `wanted` rows.

    If none fits, one of the smallest. `groups` names the group of every row.
    """
    rows_of: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    members = list(rows_of.values())
    drawn = [members[i] for i in rng.permutation(len(members))]
    rows: set[int] = set()
    for group in drawn:
        if len(rows) + len(group) <= wanted:
            rows.update(group)
    return rows or set(min(drawn, key=len))
