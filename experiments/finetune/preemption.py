"""SIGTERM and Ctrl-C, told to the training loop instead of ending the process where it stands.

One process only takes note of the first signal; the loop asks after every step. A second Ctrl-C
ends it at once. Of several processes, JAX's coordinator takes note of a SIGTERM to any of them and
names a step that none has passed, after which all are told to end.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

STATUS = 128 + signal.SIGTERM  # of a process that ended because it was told to


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[int], bool]]:
    """told(step): whether the run is to end after `step`; with several processes, all agree."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []

    def note(number: int, frame) -> None:
        del frame
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with contextlib.ExitStack() as afterwards:
        for number in (signal.SIGTERM, signal.SIGINT):
            afterwards.callback(signal.signal, number, signal.signal(number, note))
        yield lambda step: bool(received)
