"""data: a file of one's own, a conversation a line: prompt and completion, or chat messages."""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import storage
from experiments.data import lines, scores
from experiments.data.language import Exchange, LanguageTask, Message, held_out
from experiments.data.task import Splits

TASK = LanguageTask("data", 256, scores.chrf)

ROLES = ("system", "user", "assistant")
VALIDATION_SHARE, MAX_VALIDATION = 0.1, 500  # of the rows; more only make an evaluation longer
_EXPECTED = (
    '{"prompt": TEXT, "completion": TEXT} or {"messages": [{"role": "user", "content": TEXT}, ..., '
    '{"role": "assistant", "content": TEXT}]}'
)


def load(
    train_file: str | os.PathLike, validation_file: str | os.PathLike | None = None, seed: int = 0
) -> Splits[Exchange]:
    """The conversations of the files.

    Without a validation file a tenth of the rows, at most 500, is drawn by `seed` and held out.
    Rows with the same prompt stay together: else one would give away the other.
    """
    rows = conversations(train_file)
    if validation_file is not None:
        return Splits(_split(rows), _split(conversations(validation_file)))
    prompts = [json.dumps(messages[:-1]) for messages in rows]
    if len(set(prompts)) < 2:
        raise ValueError(
            f"{train_file} has {len(rows)} row{'s' * (len(rows) > 1)} with one prompt, so none can "
            "be held out for validation; add rows with other prompts, or name a validation file"
        )
    rng = np.random.Generator(np.random.PCG64([seed, *b"data"]))
    wanted = min(MAX_VALIDATION, max(1, int(len(rows) * VALIDATION_SHARE)))
    validation = held_out(prompts, wanted, rng)
    parts = ([rows[i] for i in range(len(rows)) if (i in validation) == v] for v in (False, True))
    return Splits(*map(_split, parts))


def conversations(file: str | os.PathLike) -> list[tuple[Message, ...]]:
    """The messages of every line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is in neither form; it names the file and the line.
    """
    path = storage.at(file).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; expected one with, on every line, {_EXPECTED}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file in it, with {_EXPECTED} on every line")
    return [_messages(where, found) for where, found in lines.objects(path, _EXPECTED)]


def _split(rows: Sequence[tuple[Message, ...]]) -> tuple[Exchange, ...]:
    return tuple(
        Exchange(messages, (messages[-1]["content"],), i) for i, messages in enumerate(rows)
    )


def _messages(where: str, found: dict[str, Any]) -> tuple[Message, ...]:
    """The messages of a line in either form; other fields beside them are the user's own."""
    match [name for name in ("prompt", "completion", "messages") if name in found]:
        case ["prompt", "completion"]:
            return (
                _message(where, "user", "prompt", found),
                _message(where, "assistant", "completion", found),
            )
        case ["messages"] if isinstance(found["messages"], list):
            return _chat(where, found["messages"])
        case ["messages"]:
            why = f"messages is a JSON {type(found['messages']).__name__}, not a list"
        case []:
            why = f"no prompt and no messages among its fields ({', '.join(found) or 'none':.60})"
        case names:
            why = f"{' and '.join(names)} {'together' if len(names) > 1 else 'alone'}"
    raise ValueError(f"{where}: {why}; expected {_EXPECTED}")


def _chat(where: str, found: list) -> tuple[Message, ...]:
    for number, message in enumerate(found, 1):
        # What is not learnt from, such as a weight or a tool call, would change the meaning.
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(
                f'{where}: message {number} is {json.dumps(message):.60}; expected {{"role": ROLE, '
                '"content": TEXT} and nothing else'
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"{where}: message {number} has the role {message['role']!r:.40}; there are "
                f"{', '.join(ROLES)}"
            )
    roles = [message["role"] for message in found]
    if "system" in roles[1:] or "user" not in roles or roles[-1] != "assistant":
        raise ValueError(
            f"{where}: the roles are {', '.join(roles) or 'none':.60}; expected a system message "
            "or none, then the user's and the assistant's, the assistant's last"
        )
    return tuple(
        _message(f"{where}, message {number}", message["role"], "content", message)
        for number, message in enumerate(found, 1)
    )


def _message(where: str, role: str, field: str, found: dict[str, Any]) -> Message:
    return Message(role=role, content=lines.text(where, field, found[field], _EXPECTED))
