"""Files of JSON lines: the object of every line, its texts checked, errors that name the line."""

import json
import os
from collections.abc import Iterator
from typing import Any

from experiments import storage


def objects(path: storage.Path, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object of every line, and FILE:LINE for an error about it.

    Blank lines may end the file, and a byte order mark may begin it.

    Raises:
        ValueError: the file is empty or not UTF-8, or a line is not an object; it says what is
            `expected`.
    """
    lines = _text(path, expected).split("\n")  # splitlines would cut a string at U+2028
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty; expected {expected}")
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            raise ValueError(f"{where}: a blank line; remove it (the last lines may be blank)")
        yield where, _object(where, line, expected)


def text(where: str, name: str, value: Any, expected: str) -> str:
    """The value, if it is a string with something in it; else a ValueError."""
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {name} is a JSON {type(value).__name__}, not a string; expected {expected}"
        )
    if not value.strip():
        raise ValueError(f"{where}: {name} is empty; expected {expected}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} has a lone surrogate, {value[error.start]!a}, which no tokenizer "
            "takes; write the character whole or leave it out"
        ) from error
    return value


def files(
    name: str, wanted: tuple[str, ...], data_dir: str | os.PathLike | None, remedy: str
) -> list[storage.Path]:
    """A data set's files, of data_dir/nlg/<name>, data_dir/<name> or data_dir itself."""
    if data_dir is None:
        raise FileNotFoundError(f"{name} needs --data-dir, a folder with {name}/. {remedy}")
    root = storage.at(data_dir).expanduser()
    places = (root / "nlg" / name, root / name, root)
    for place in places:
        found = [place / file for file in wanted]
        if all(path.exists() for path in found):
            return found
    raise FileNotFoundError(
        f"no {name} in {root}: looked for {' and '.join(wanted)} in {', '.join(map(str, places))}. "
        f"{remedy}"
    )


def _text(path: storage.Path, expected: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{number}: not UTF-8 ({error.reason}); save it as UTF-8. Expected {expected}"
        ) from error


def _object(where: str, line: str, expected: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", error)
        column = f" in column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{where}: not JSON ({why}{column}); expected {expected}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{where}: a JSON {type(found).__name__}, not an object; expected {expected}"
        )
    return found
