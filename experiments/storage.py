"""Files on a disk or in a bucket: whole or absent, found by pattern; a folder held by one.

A path is a `pathlib.Path`, or for "gs://..." an `epath.Path`, which has the same methods and which
TFDS and Orbax take; it needs gcsfs. A file on a disk is written under another name and renamed; an
object in a bucket is one put. On a disk the system locks a folder, and lets go when the process
ends. A bucket has no locks: give a folder in it to one command at a time.
"""

import atexit
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath
from etils.epath import backend

Path = pathlib.Path | epath.Path

SCHEME = "gs"  # epath has others, whose stores nobody has tried
LOCK = ".lock"
PARTIAL = ".partial"  # ends the name of a file that is being written
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def check_folder(folder: Path, flag: str) -> None:
    """A ValueError if there can be no such folder, for one as if a file has its name."""
    try:
        for path in () if is_bucket(folder) else (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path} is a file")
    except (ValueError, OSError) as error:  # a name too long, a folder that may not be read
        raise ValueError(f"{flag} {folder} cannot be a folder ({error}); name another") from error


@contextlib.contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turns a failed write into an OSError that says what, where and what to do.

    A bucket's clients have many types of errors. Orbax reports a full disk as a ValueError with the
    operating system's words at the end.
    """
    try:
        yield
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if not (isinstance(error, OSError) or code or is_bucket(path)):
            raise
        number = int(code[1]) if code else getattr(error, "errno", None)
        why = os.strerror(number) if number else f"{type(error).__name__}: {error}"
        remedy = "Make room" if number in _FULL else "Mend that"
        if number in (errno.EEXIST, errno.ENOTDIR):
            why, remedy = "a file has the name of a folder", "Remove that file"
        raise OSError(
            number or errno.EIO,
            f"could not write {what} ({why}); what was there before is intact. {remedy}, or choose "
            "another --out, and give the same command again: it goes on there",
            str(path),
        ) from error


def write_atomic(path: Path, data: bytes, what: str) -> None:
    """Replaces `path` by `data`: a reader, a crash or a full disk never sees a part of it."""
    with explained(what, path):
        if is_bucket(path):
            path.write_bytes(data)
            return
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def new_folder(path: pathlib.Path, what: str) -> Iterator[pathlib.Path]:
    """Yields an empty folder that is renamed to `path` when the block is through, else removed."""
    with explained(what, path):
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        temporary.mkdir(parents=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            remove_tree(temporary)


def write_json(path: Path, value: Any, what: str) -> None:
    """Writes one line of JSON atomically; NaN and infinity are refused, JSON has none."""
    write_atomic(path, (json.dumps(value, allow_nan=False) + "\n").encode(), what)


def read_json(
    path: Path, fields: tuple[str, ...], what: str, remedy: str | None = None
) -> dict[str, Any]:
    """The JSON object in a file; a ValueError that names the file if it has not these fields."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__}, no object")
        if missing := [name for name in fields if name not in found]:
            raise ValueError(f"no {', '.join(missing)} in it")
    except (ValueError, RecursionError, IsADirectoryError) as error:
        remedy = remedy or f"Delete {path.parent} to make the run again, or choose another --out"
        raise ValueError(
            f"{path} is not {what} ({error}): the file is damaged, or another program's. {remedy}"
        ) from error
    return found


def found(folder: Path, pattern: str) -> list[Path]:
    """What matches a pattern without "**" in the folder now, sorted; nothing if it is not there."""
    if is_bucket(folder):
        _forget_listings(folder)
    return sorted(folder.glob(pattern))


def local(folder: Path) -> pathlib.Path:
    """The folder on a disk: of one in a bucket, a copy of its files that lasts as long as we do."""
    if not is_bucket(folder):
        return folder
    copy = pathlib.Path(tempfile.mkdtemp(prefix="bucket-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for path in found(folder, "*"):
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def remove_tree(folder: Path) -> None:
    """Removes a folder and all in it, as far as it is there and can be removed."""
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    _forget_listings(folder)
    with contextlib.suppress(OSError):
        folder.rmtree(missing_ok=True)


def _forget_listings(folder: epath.Path) -> None:
    """gcsfs keeps listings, and other clients of this process write too."""
    try:
        backend.fsspec_backend.fs(folder).invalidate_cache()
    except ImportError as error:  # fsspec names the package
        raise ValueError(f"{folder} cannot be reached: {error}") from error


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a folder of a disk for this process.

    Raises:
        ValueError: another process holds it, unless `wait`.
        OSError: the lock could not be written.
    """
    if is_bucket(folder):
        yield
        return
    with contextlib.ExitStack() as held:
        with explained("the lock of the folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(folder / LOCK, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file = None
        if file is None:
            raise ValueError(
                f"{folder} is in use by another process; wait for it, or choose another --out"
            )
        yield
