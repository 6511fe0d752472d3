"""Devices that share every batch, in one process or in several: data parallelism.

Parameters, optimizer state and losses are replicated, batches are cut along the mesh's one axis,
"data". XLA adds the all-reduce of the gradients where a sum crosses the cut. With one device there
is no mesh and nothing here does anything.

Every process runs the same program. What must happen once (locks, files, the terminal) happens in
process 0, whose answer or error the others take over, so that all of them go on or stop together.
When one dies, jaxlib ends the others: at once if it was process 0, else after --timeout seconds. It
aborts them from a C++ thread, so a child process says what happened and what to do.
"""

import atexit
import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.config import Command

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


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that share every batch; `mesh` is None for one."""

    mesh: Mesh | None = None

    @property
    def count(self) -> int:
        """How many they are, over all processes."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of an array of which every device has the whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def replicate(self, tree: Any) -> Any:
        """The same values on every device; every process has them already."""
        return tree if self.mesh is None else jax.device_put(tree, self.replicated)

    def shard(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The global batch, of which this process has `batch`."""
        if self.mesh is None:
            return batch
        rows = NamedSharding(self.mesh, PartitionSpec("data"))
        return {k: jax.make_array_from_process_local_data(rows, x) for k, x in batch.items()}

    def gather(self, x: Any) -> np.ndarray:
        """All of an array whose rows are cut, in every process."""
        return np.asarray(
            x if self.mesh is None else multihost_utils.process_allgather(x, tiled=True)
        )


ONE = Devices()


def connect(command: Command) -> None:
    """Joins the other processes, if the command is one of several, and agrees with them on it.

    Raises:
        ValueError: the processes were not given the same command, or it lacks an address.
    """
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


def devices(command: Command) -> Devices:
    """The devices that the command asks for: the same number of every process."""
    wanted, there = command.devices, jax.local_device_count()
    if wanted is None:
        wanted = there if command.distributed else 1
    if wanted > there:
        raise ValueError(
            f"--devices {wanted}, but this process has {there} of {jax.default_backend()}; ask for "
            f"fewer, or set JAX_NUM_CPU_DEVICES={wanted} to divide a CPU"
        )
    if command.distributed and wanted < there:
        raise ValueError(
            f"--devices {wanted}, but this process has {there}; a distributed run takes all: leave "
            "--devices out, or hide devices from the process"
        )
    # In the order of their processes, for a process's share of the rows is that of its rank.
    chosen = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    count = wanted * jax.process_count()
    if command.batch_size % count:
        raise ValueError(
            f"--batch-size {command.batch_size} cannot be shared by {count} devices; make it a "
            "multiple of them"
        )
    return Devices(Mesh(np.array(chosen[:count]), ("data",)) if count > 1 else None)


def is_first() -> bool:
    """Whether this is the process that writes files and to the terminal."""
    return jax.process_index() == 0


def once(make: Callable[[], T]) -> T:
    """What `make` returns or raises in process 0, in every process; it is called there only."""
    if jax.process_count() == 1:
        return make()
    answer, error = None, None
    if is_first():
        try:
            answer = make()
        except Exception as raised:
            error = raised
    answer, error = pickle.loads(_broadcast(pickle.dumps((answer, error))))
    if error is not None:
        raise error
    return answer


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
