"""Files on a disk or in a bucket: each whole or absent, found by pattern, a folder held by one.

A path is a `pathlib.Path`, or for "gs://..." an `epath.Path`, which has the same methods and which
TFDS and Orbax take; it needs gcsfs. What a disk and a bucket do differently is here:

           disk                                    bucket
replace    temporary file, fsync, rename           one put: an object is there whole or not at all
hold       flock, which the system lets go of      an object made only where there is none, then
           when the process ends, however          renewed; one no longer renewed is taken over
grow       line by line                            put whole again, now and then
room       asked of the system                     there is always some

A bucket has no locks, and fsspec no compare-and-swap. Who finds a holder that has stopped renewing
writes its own name and looks again: of several that do so the last one stays, and what is left is a
window between looking and writing. A process that was stopped for longer than a lease, and woken,
holds nothing and does not know it.
"""

import atexit
import contextlib
import errno
import fcntl
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from etils.epath import backend

Path = pathlib.Path | epath.Path

SCHEME = "gs"  # epath has others, whose stores nobody has tried
LOCK = ".lock"
LEASE = 60.0  # seconds without a renewal after which a holder counts as dead
RENEWAL = 10.0  # seconds between renewals: several may fail before the lease is over
SETTLING = 2.0  # seconds between taking over a lease and looking whether another did too
GROWTH = 30.0  # seconds between puts of an object that grows
_PARTIAL = ".partial"


def at(path: str | os.PathLike) -> Path:
    """The path that a string names; a ValueError for a scheme other than gs."""
    text = os.fspath(path)
    scheme, colon, _ = text.partition("://")
    if not colon:
        return pathlib.Path(text)
    if scheme != SCHEME:
        raise ValueError(f"{text} is not {SCHEME}://BUCKET/... and not the path of a folder")
    return epath.Path(text)


def is_bucket(path: Path) -> bool:
    """Whether the path lies in a bucket."""
    return not isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
    """The path from the root of the disk; in a bucket it is that already."""
    return path if is_bucket(path) else path.absolute()


def replace(path: Path, data: bytes) -> None:
    """Makes `path` be `data`: a reader, a crash or a full disk never sees a part of it.

    Raises:
        OSError: it could not be written; what was there before is intact.
    """
    if is_bucket(path):
        with _as_os_error(path):
            _fs(path).pipe_file(str(path), data)
        return
    temporary = path.with_name(path.name + _PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes, what: str) -> None:
    """Replaces `path` by `data`: a reader, a crash or a full disk never sees a part of it."""
    with explained(what, path):
        replace(path, data)


def write_json(path: Path, value: Any, what: str) -> None:
    """Writes one line of JSON atomically; NaN and infinity are refused, JSON has none."""
    write_atomic(path, (json.dumps(value, allow_nan=False) + "\n").encode(), what)


@contextlib.contextmanager
def growing(path: Path) -> Iterator[Callable[[str], None]]:
    """Yields write(text), which adds to a file made anew; on a disk it is there at once.

    An object does not grow: it is put again, with all that is in it, now and then and at the end.
    """
    if not is_bucket(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", buffering=1) as file:  # a line at a time
            yield file.write
        return
    texts, last = [], time.monotonic()

    def write(text: str) -> None:
        nonlocal last
        texts.append(text)
        if time.monotonic() - last > GROWTH:
            last = time.monotonic()
            replace(path, "".join(texts).encode())

    yield write
    replace(path, "".join(texts).encode())


def found(folder: Path, pattern: str) -> list[Path]:
    """What matches a pattern without "**" in the folder now, sorted; nothing if it is not there."""
    if is_bucket(folder):
        _fs(folder).invalidate_cache()  # it keeps listings, and others write too
    return sorted(folder.glob(pattern))


def local(folder: Path) -> pathlib.Path:
    """The folder on a disk: of one in a bucket, a copy of its files that lasts as long as we do."""
    if not is_bucket(folder):
        return folder
    copy = pathlib.Path(tempfile.mkdtemp(prefix="bucket-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    with _as_os_error(folder):
        for path in found(folder, "*"):
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def remove_tree(folder: Path) -> None:
    """Removes a folder and all in it, as far as it is there and can be removed."""
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    _fs(folder).invalidate_cache()
    with contextlib.suppress(OSError), _as_os_error(folder):
        folder.rmtree(missing_ok=True)


def free_bytes(folder: Path) -> float:
    """How much more the folder can take."""
    return math.inf if is_bucket(folder) else shutil.disk_usage(folder).free


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds `folder` for this process.

    Raises:
        ValueError: another process holds it, unless `wait`. In a bucket it takes a renewal's time
            to see that it does, and a lease's time to see that it ended without letting go.
        OSError: the lock could not be written.
    """
    hold = _leased if is_bucket(folder) else _flocked
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold(folder, wait))
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is in use by another process{_named(error)}; wait for it, or choose "
                "another --out"
            ) from error
        yield


def _named(error: BlockingIOError) -> str:
    return f" ({error.filename})" if error.filename else ""


@contextlib.contextmanager
def _flocked(folder: pathlib.Path, wait: bool) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextlib.contextmanager
def _leased(folder: epath.Path, wait: bool) -> Iterator[None]:
    lease, ended = _Lease(folder / LOCK), threading.Event()
    lease.take(wait)
    renewing = threading.Thread(target=lease.renew_until, args=(ended,), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        lease.let_go()


class _Lease:
    """One process's claim to an object: a line with its host, its id, a random word and a count.

    No clocks are compared: a holder is dead if its line stands unchanged for a lease's time.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self.owner = f"{socket.gethostname()} process {os.getpid()} {secrets.token_hex(8)}"
        self.count = 0

    @property
    def line(self) -> bytes:
        return f"{self.owner} {self.count}\n".encode()

    def take(self, wait: bool) -> None:
        """Returns once the lease is this process's; a BlockingIOError if another renews it."""
        seen, since = None, time.monotonic()
        while not self._created():
            there = self.read()
            if there is None:  # let go of in between
                continue
            if there.startswith(self.owner.encode()):  # made by a request whose answer was lost
                return
            if there != seen:
                if seen is not None and not wait:
                    raise BlockingIOError(errno.EAGAIN, "held", _host(there))
                seen, since = there, time.monotonic()
            elif time.monotonic() - since > LEASE:
                replace(self.path, self.line)
                time.sleep(SETTLING)
                if self.is_own():
                    return
            time.sleep(RENEWAL / 4)

    def renew_until(self, ended: threading.Event) -> None:
        """Writes the next count from time to time, as long as the lease is this process's."""
        while not ended.wait(RENEWAL):
            with contextlib.suppress(OSError):  # the next one may succeed
                if not self.is_own():
                    return
                self.count += 1
                replace(self.path, self.line)

    def let_go(self) -> None:
        """Removes the object, if it is this process's."""
        with contextlib.suppress(OSError), _as_os_error(self.path):
            if self.is_own():
                self.path.unlink(missing_ok=True)

    def is_own(self) -> bool:
        return (self.read() or b"").startswith(self.owner.encode())

    def read(self) -> bytes | None:
        try:
            with _as_os_error(self.path):
                return _fs(self.path).cat_file(str(self.path))
        except FileNotFoundError:
            return None

    def _created(self) -> bool:
        try:
            with _as_os_error(self.path):
                _fs(self.path).pipe_file(str(self.path), self.line, mode="create")
        except FileExistsError:
            return False
        return True


def _host(line: bytes) -> str:
    """Who holds a lease, as far as a person wants to know."""
    return " ".join(line.decode(errors="replace").split()[:-2])


def _fs(path: epath.Path):
    """The file system through which `path` is reached, the one whose listings it sees."""
    try:
        return backend.fsspec_backend.fs(path)
    except ImportError as error:  # fsspec names the package
        raise ValueError(f"{path} cannot be reached: {error}") from error


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """A bucket's errors, of many types, as what a disk's are."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(path)) from error


@contextlib.contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turns a failed write into an OSError that says what, where and what to do.

    Orbax reports most of them as ValueErrors with the operating system's words at the end.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if isinstance(error, ValueError) and code is None:
            raise
        number = int(code[1]) if code else (getattr(error, "errno", None) or errno.EIO)
        why = getattr(error, "strerror", None) or os.strerror(number)
        raise OSError(
            number,
            f"could not write {what} ({why}); what was there before is intact. "
            "Make room, or choose another --out, and give the same command again: it goes on there",
            str(path),
        ) from error
