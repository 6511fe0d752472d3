"""Checks at the door. A traced value is never looked at: it may be any number."""

import math
from typing import Any

from jax.core import Tracer


def check_positive(name: str, value: Any, what: str = "") -> None:
    """Raises ValueError unless `value` is positive and finite; `what` explains what it is."""
    if isinstance(value, Tracer):
        return
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, not {value}{what}")


def check_scale(scale: Any, name: str = "scale") -> None:
    """`check_positive` for the s of K0 + s a b; a callable is checked where it is called."""
    if not callable(scale):
        what = ": it is the s of K0 + s a b in the forward pass, alpha / rank or alpha / sqrt(rank)"
        check_positive(name, scale, what)


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless low <= value < high; NaN fails."""
    if not isinstance(value, Tracer) and not low <= float(value) < high:
        raise ValueError(f"{name} must be in [{low}, {high}), not {float(value)}")


def check_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_rank(rank: Any) -> None:
    """Raises ValueError unless `rank` is a positive int."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; pass an int of at least 1")
