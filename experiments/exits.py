"""How a command ends: an error that its user can mend is one line on stderr and exit status 2."""

import functools
import io
import sys
from collections.abc import Callable

_LESS = (
    "choose a smaller --batch-size, --max-length or --rank, more parts of a step (--accumulate), "
    "or in a sweep fewer runs together (--at-once)"
)
# What a RuntimeError or a MemoryError says, and what to do about it; others are our own faults.
REMEDIES = {
    "MemoryError": _LESS,
    "RESOURCE_EXHAUSTED": _LESS,
    "Unable to initialize backend": "set JAX_PLATFORMS to what this machine has, such as cpu",
}


def reported(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """`main`, whose errors are told without a traceback."""

    @functools.wraps(main)
    def ended(argv: list[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal without "±" shows "?"
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            told = str(error)
        except (RuntimeError, MemoryError) as error:
            told = first_line(error)
            remedies = [remedy for sign, remedy in REMEDIES.items() if sign in told]
            if not remedies:
                raise
            told += f"; {remedies[0]}"
        print(f"error: {told}", file=sys.stderr)
        return 2

    return ended


def first_line(error: Exception) -> str:
    """Its type and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
