"""What a flag's value may be: each check raises a ValueError that names the flag and its range."""

import difflib
import math
from collections.abc import Iterable


def positive(flag: str, value: float) -> None:
    """Finite and greater than 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"{flag} must be a finite number greater than 0, such as 1e-4, not {value}"
        )


def at_least(flag: str, value: float, least: int) -> None:
    """Finite and no less than `least`."""
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{flag} must be a finite number of at least {least}, not {value}")


def below_one(flag: str, value: float) -> None:
    """From 0 on, less than 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{flag} must be at least 0 and less than 1, not {value}")


def different(flag: str, values: tuple) -> None:
    """No value twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{flag} {','.join(map(str, values))} names a value twice; once will do")


def divides(flag: str, value: int, of: str, whole: int) -> None:
    """A divisor of `whole`, which is `of`."""
    if whole % value:
        raise ValueError(f"{flag} {value} does not divide {of}, {whole}; choose one that does")


def one_of(what: str, name: str, known: Iterable[str]) -> str:
    """`name`, if it is one of `known`; else a ValueError with the near misses and the list."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown {what} {name!r}; {hint}there are {', '.join(known)}")
