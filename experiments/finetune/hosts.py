"""Processes that make a run together: who they are, what one does for all, and how they end.

Every process runs the same program. What must happen once (locks, files, the terminal) happens in
process 0, whose answer or error the others take over, so that all of them go on or stop together.
When one dies, jaxlib ends the others: at once if it was process 0, else after --timeout seconds. It
aborts them from a C++ thread, so a child process says what happened and what to do.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.finetune.config import Command

T = TypeVar("T")
_BLOCK = 4096  # bytes; what is sent is padded to a multiple, since every length is compiled for

# Reads one message a line until the other end closes, then prints the last, unless it is empty.
_WITNESS = """
import sys
last = ""
for last in sys.stdin:
    pass
sys.stderr.write(last.strip() and last)
"""
_witness: subprocess.Popen | None = None


def connect(command: Command) -> None:
    """Joins the other processes, if the command is one of several, and agrees with them on it."""
    if not command.distributed:
        return
    jax.distributed.initialize(
        command.coordinator,
        command.num_processes,
        command.process_id,
        heartbeat_timeout_seconds=command.timeout,
        shutdown_timeout_seconds=command.timeout,
    )
    _call_witness()
    same = repr(dataclasses.replace(command, process_id=None, data_dir=None)).encode()
    sums = multihost_utils.process_allgather(np.array([zlib.crc32(same)], np.uint32))
    if len(set(sums.ravel().tolist())) > 1:
        raise ValueError(
            "the processes of this run were given different options; give all of them the same "
            "command line, but for --process-id and --data-dir"
        )


def is_first() -> bool:
    """Whether this is the process that writes files and to the terminal."""
    return jax.process_index() == 0


def once(make: Callable[[], T]) -> T:
    """What `make` returns, a JSON value, or raises in process 0, in every process."""
    if jax.process_count() == 1:
        return make()
    told = b""
    if is_first():
        try:
            told = json.dumps({"answer": make()}).encode()
        except Exception as error:
            _broadcast(json.dumps({"error": _described(error)}).encode())
            raise
    told = json.loads(_broadcast(told))
    if "error" in told:
        kind, args = told["error"]
        raise {"ValueError": ValueError, "OSError": OSError}.get(kind, RuntimeError)(*args)
    return told["answer"]


def _described(error: Exception) -> tuple[str, list]:
    """A type and arguments that JSON can hold; those that a command turns into its exit status."""
    if isinstance(error, OSError):
        return "OSError", [error.errno, error.strerror, error.filename]
    kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
    return kind, [str(error)]


def _broadcast(data: bytes) -> bytes:
    """Process 0's `data`, in every process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(-(-size // _BLOCK) * _BLOCK, np.uint8)
    if is_first():
        padded[:size] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes()


def _call_witness() -> None:
    """Starts the child that reports the end of this process, unless it is a regular one."""
    global _witness
    _witness = subprocess.Popen(
        [sys.executable, "-S", "-c", _WITNESS],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C must not end it first
    )
    atexit.register(_leave)
    can_go_on_from("its last checkpoint")


def can_go_on_from(what: str) -> None:
    """What to say where a run goes on, should this process end before it is complete."""
    if _witness is None or _witness.stdin is None:
        return
    me = f"process {jax.process_index()} of {jax.process_count()}"
    with contextlib.suppress(OSError):  # the witness was ended; the run need not be
        _witness.stdin.write(
            f"error: {me} ended before the run was complete: it was killed, or another process "
            "died or was not heard of in time (see above, and what the others wrote). Start all "
            f"{jax.process_count()} processes again with the same options: the run goes on from "
            f"{what}\n"
        )
        _witness.stdin.flush()


def _leave() -> None:
    """The regular end: once every process has come to it, there is nothing to report."""
    jax.distributed.shutdown()
    if _witness is not None:
        _witness.communicate("\n")


def abandon() -> None:
    """Ends a process whose peers are gone, without waiting for them as a regular end does."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
