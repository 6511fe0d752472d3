"""Exchanges as token rows: what is read is segment 0, what is learnt, the answers, segment 1.

A chat model's own template writes the text; an answer is what it adds to the text that ends where
the assistant begins. Without a template the messages stand one a line, and the model's end token
closes an answer.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from experiments.data.language import Exchange, Message
from experiments.models import chat
from experiments.models.llama_decode import text_of


class Dialect(NamedTuple):
    """How a model reads and writes."""

    tokenizer: tokenizers.Tokenizer
    template: str | None  # of its chats
    ends: tuple[int, ...]  # tokens that end a text
    context: int  # positions of a row at most

    def text(self, tokens: np.ndarray) -> str:
        """What decoded tokens say, up to the first end."""
        return text_of(tokens, self.tokenizer, self.ends)


class Row(NamedTuple):
    """An exchange in tokens."""

    tokens: list[int]
    segments: list[int]  # 1: learnt
    prompt: int  # tokens before the last answer


def pieces(messages: Sequence[Message], template: str | None) -> list[str]:
    """What is read and what is learnt, in turn: [context, answer, context, answer, ...].

    Raises:
        ValueError: the template refuses the messages, or its text does not go on where it stopped.
    """
    found, done, written = [], "", ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, done = (_text(messages[:n], template, answer=n == i) for n in (i, i + 1))
        if not (before.startswith(written) and done.startswith(before) and done != before):
            raise ValueError(
                f"the chat template writes message {i + 1} of {len(messages)} in more than one "
                "place, or not at all: what is to be learnt cannot be told; choose --plain"
            )
        # The end marker is learnt, the line break after it is not.
        answer = done[len(before) :].rstrip("\n") if template else done[len(before) :]
        found += [before[len(written) :], answer]
        written = before + answer
    return found


def _text(messages: Sequence[Message], template: str | None, answer: bool) -> str:
    if template is not None:
        return chat.rendered(template, messages, answer=answer)
    lines = [message["content"] for message in messages]
    return "\n".join(lines) + ("\n" if answer else "")


def tokenised(exchanges: Iterable[Exchange], dialect: Dialect) -> list[Row]:
    """The exchanges' rows, however long."""
    parts = [pieces(exchange.messages, dialect.template) for exchange in exchanges]
    texts = [text for found in parts for text in found]
    encoded = iter(dialect.tokenizer.encode_batch(texts, add_special_tokens=False))
    plain = dialect.template is None
    first = dialect.tokenizer.encode("").ids if plain else []
    rows = []
    for found in parts:
        tokens, segments, prompt = list(first), [0] * len(first), 0
        for place in range(len(found)):
            learnt = place % 2
            ids = next(encoded).ids + (list(dialect.ends[:1]) if plain and learnt else [])
            prompt = len(tokens) if learnt else prompt
            tokens += ids
            segments += [learnt] * len(ids)
        rows.append(Row(tokens, segments, prompt))
    return rows
