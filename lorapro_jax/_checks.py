"""Checks at the door. A traced value is never looked at: it may be any number."""

from typing import Any

import numpy as np
from jax.core import Tracer


def number(value: Any) -> float | None:
    """The value as Python's float; None if it is traced. No operation on it may be staged."""
    return None if isinstance(value, Tracer) else float(np.asarray(value))


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless low <= value < high in float32; NaN fails. Schedules pass."""
    if callable(value) or (x := number(value)) is None:
        return
    if not low <= np.float32(x) < high:
        raise ValueError(f"{name} must be in [{low}, {high}), not {x}")


def check_positive(name: str, value: Any, what: str = "") -> None:
    """Raises ValueError unless `value` is positive and finite; `what` explains what it is."""
    x = number(value)
    if x is not None and not 0 < x < float("inf"):
        raise ValueError(f"{name} must be positive and finite, not {x}{what}")


def check_scale(scale: Any, name: str = "scale") -> None:
    """Raises ValueError for an impossible s of K0 + s a b; a callable is checked where called."""
    if callable(scale):
        return
    what = ": it is the s of K0 + s a b in the forward pass, alpha / rank or alpha / sqrt(rank)"
    check_positive(name, scale, what)
    check_between(f"{name} (float32 has to hold it and its inverse)", scale, 1e-9, 1e9)


def check_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_rank(rank: Any) -> None:
    """Raises ValueError unless `rank` is a positive int."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; pass an int of at least 1")
