"""What a flag's value may be: each check raises a ValueError that names the flag and its range."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np

TINY, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Range:
    """From `least` to `most`: of whole numbers, or of what float32 makes of a number."""

    least: float
    most: float = 2**31 - 1

    def check(self, flag: str, value: float) -> None:
        """Raises a ValueError for a number outside; NaN is outside, and so is 1e-50, which is 0."""
        held = value
        if isinstance(value, float):
            with np.errstate(over="ignore"):
                held = float(np.float32(value))
            held = 0.0 if abs(held) < TINY else held  # XLA takes smaller ones for 0
        if self.least <= held <= self.most and bool(held) == bool(value):
            return
        rounded = held != value and held in (0, 1, math.inf)
        why = f": float32 rounds it to {held:g}" if rounded else ""
        bounds = f"{self.least:.10g} to {self.most:.10g}"  # ten digits hold every uint32
        raise ValueError(f"{flag} {value} is out of range{why}; choose a number from {bounds}")


Count = Annotated[int, Range(1)]
Positive = Annotated[float, Range(TINY, LARGEST)]
NotNegative = Annotated[float, Range(0.0, LARGEST)]
Share = Annotated[float, Range(0.0, float(np.nextafter(np.float32(1), np.float32(0))))]


def in_range(options: Any) -> None:
    """Checks every field of a dataclass whose type names a Range, and every number of a list."""
    for name, hint in typing.get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        for bounds in ranges(hint) if value is not None else ():
            for number in value if isinstance(value, tuple) else (value,):
                bounds.check(f"--{name.replace('_', '-')}", number)


def ranges(hint: Any) -> Iterator[Range]:
    """Those in a type, however deep."""
    if isinstance(hint, Range):
        yield hint
    for part in typing.get_args(hint):
        yield from ranges(part)


def different(flag: str, values: Sequence, written: Callable[[Any], str] = str) -> None:
    """No two values that are written alike in the names of run folders."""
    texts = [written(value) for value in values]
    for text in texts:
        if texts.count(text) > 1:
            raise ValueError(
                f"{flag} {','.join(map(str, values))} names {text} twice, and two runs cannot "
                "share a folder; leave one out"
            )


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
