"""A run folder that a SIGKILL at any moment leaves whole: each file is there or not, never half.

    config.json        the run's configuration, written first: the folder belongs to it alone
    lora_config.json   what the adapters are, of a run that has some
    checkpoints/<step> Orbax: trainable parameters and optimizer state; JSON: position in the data,
                       losses, evaluations and seconds so far; the SHA-256 of all these files. Of a
                       run that diverged the last is of the step before
    metrics.jsonl      a line per step, evaluation and diagnosis; tensorboard/ and profile/ if
                       asked for
    final.safetensors  the trained parameters; none of a run that diverged
    result.json        the result, written last: a folder that has it is complete
    peft/ and merged/  of a complete run, if asked for (`experiments.finetune.export`)

The frozen base is not saved: the model's package and the seed give it back. Nor is a random key:
every step derives its own from (seed, step). So a run ends with the same parameters from whichever
checkpoint it goes on: one whose files are not those that were written is removed, and the one
before serves. All of it may lie in a bucket (`experiments.storage`).
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
import safetensors.numpy

from experiments import storage
from experiments.finetune import hosts
from experiments.finetune.config import RunConfig
from experiments.storage import explained, write_atomic, write_json

CONFIG, RESULT = "config.json", "result.json"
FINAL, CHECKPOINTS = "final.safetensors", "checkpoints"
MANIFEST = "sha256.json"
# Orbax writes these two after the manifest: the first holds the time of that, the second nothing.
_UNLISTED = {"_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST}
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a step's folder until it is whole
_TRIES = 20  # to remove a folder that is still written to, a tenth of a second apart


def claim(folder: storage.Path, run: RunConfig) -> None:
    """Makes `folder` the run's; a ValueError if it belongs to another configuration."""
    for left in storage.found(folder, f"*{storage.PARTIAL}"):
        if left.is_dir():
            storage.remove_tree(left)
        else:
            left.unlink(missing_ok=True)
    if not belongs(folder, run):
        write_json(folder / CONFIG, dataclasses.asdict(run), "the run's configuration")


def belongs(folder: storage.Path, run: RunConfig) -> bool:
    """Whether `folder` is the run's already; a ValueError if it is another configuration's."""
    wanted, path = dataclasses.asdict(run), folder / CONFIG
    if not path.exists():
        return False
    found = storage.read_json(path, ("method",), "a run's configuration")
    differing = [
        f"{name}: {found.get(name, 'absent')!r} there, {wanted.get(name, 'absent')!r} asked for"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a run of another configuration ({'; '.join(differing)}). Give the "
            "same options to go on with it, choose another --out, or delete the folder"
        )
    return True


class Checkpoints:
    """The checkpoints of one run folder, of which the last `keep` are kept.

    Orbax writes them while training goes on: `save` returns when it has its own copy.
    """

    def __init__(self, folder: storage.Path, keep: int = 2):
        self.path = (folder if storage.is_bucket(folder) else folder.absolute()) / CHECKPOINTS
        self._pending: int | None = None  # the step whose checkpoint may still be on its way
        self._failed = False  # to write: the manager would raise the same again when closed
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        with explained("the folder of the checkpoints", self.path):
            hosts.once(self._remove_unfinished)
            self._manager = ocp.CheckpointManager(self.path, options=options)

    def _remove_unfinished(self) -> None:
        # After a failed write, other threads of Orbax may still be writing into the folder.
        for _ in range(_TRIES):
            left = storage.found(self.path, f"*{_TEMPORARY}*")
            for folder in left:
                storage.remove_tree(folder)
            if not left:
                return
            time.sleep(0.1)

    def _write_manifest(self) -> None:
        """Is called by Orbax in one process, between the last file and the commit."""
        pattern = f"{self._pending}{'' if storage.is_bucket(self.path) else _TEMPORARY + '*'}"
        (folder,) = storage.found(self.path, pattern)
        files = _digests(folder)
        manifest = {"files": files, "of_files": _digest(json.dumps(files).encode())}
        write_json(folder / MANIFEST, manifest, "the checksums of the checkpoint")

    def _check_room(self, arrays: Any) -> None:
        """Finds a full disk before Orbax does, whose threads would each print their own error."""
        needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
        if not storage.is_bucket(self.path) and shutil.disk_usage(self.path).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def save(self, step: int, arrays: Any, progress: dict) -> None:
        """Begins to save `arrays` (a pytree) and `progress` (JSON) after `step` steps.

        An OSError if this checkpoint, or the one before, cannot be written.
        """
        self.wait()
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(progress)
        )
        with self._writing(step):
            hosts.once(lambda: self._check_room(arrays))
            self._pending = step
            self._manager.save(step, args=items)

    def wait(self) -> None:
        """Returns when the last checkpoint is written; an OSError if that failed."""
        if self._pending is None:
            return
        step = self._pending
        with self._writing(step):
            self._manager.wait_until_finished()
        self._pending = None
        hosts.can_go_on_from(f"step {step} or later of {self.path.parent}")

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            with explained(f"the checkpoint of step {step}", self.path), _quiet_orbax():
                yield
        except OSError:
            self._pending, self._failed = None, True
            if hosts.is_first():
                self._remove_unfinished()
            raise

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        """(arrays, progress) of the last whole checkpoint, shaped like `like`; None without one."""
        hosts.once(self._remove_damaged)
        self._manager.reload()  # it has its own list of the steps
        if (step := self._manager.latest_step()) is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        hosts.can_go_on_from(f"step {step} or later of {self.path.parent}")
        return restored.arrays, restored.progress

    def _remove_damaged(self) -> None:
        """Removes checkpoints from the last on, until one is whole."""
        folders = [path for path in storage.found(self.path, "*") if path.name.isdigit()]
        for folder in sorted(folders, key=lambda path: int(path.name), reverse=True):
            if (file := damaged(folder)) is None:
                break
            print(
                f"{file} is damaged or not there: the checkpoint of step {folder.name} is removed, "
                "and the run goes on from the one before, or from its beginning",
                file=sys.stderr,
            )
            storage.remove_tree(folder)

    def close(self) -> None:
        """Waits for the last checkpoint, and lets go of the folder."""
        try:
            self.wait()
        finally:
            told = contextlib.suppress(Exception) if self._failed else contextlib.nullcontext()
            with told:
                self._manager.close()


def _digests(folder: storage.Path) -> dict[str, str]:
    """{path in the folder: SHA-256} of every file, but those that come after the manifest."""
    return {
        str(path.relative_to(folder)): _digest(path.read_bytes())
        for path in sorted(_files(folder))
        if path.name not in _UNLISTED
    }


def _files(folder: storage.Path) -> Iterator[storage.Path]:
    for path in folder.iterdir():  # a bucket knows no rglob
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def damaged(folder: storage.Path) -> storage.Path | None:
    """A file of a checkpoint that is not what was written, or is not there; None: all are."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        written = manifest["files"]
        whole = manifest["of_files"] == _digest(json.dumps(written).encode())
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        whole = False
    if not whole:
        return folder / MANIFEST
    there = _digests(folder)
    return next((folder / name for name, sha in written.items() if there.get(name) != sha), None)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax logs a failed write with a traceback per thread; the error raised says it all."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_result(folder: storage.Path) -> dict | None:
    """The result of a complete run; None if it is not complete."""
    path = folder / RESULT
    return storage.read_json(path, ("config", "final"), "a result") if path.exists() else None


def finish(folder: storage.Path, parameters: dict[str, Any] | None, result: dict) -> None:
    """Writes the parameters, then the result, then removes the checkpoints, no longer needed.

    A run that diverged has no parameters, and keeps its checkpoints.
    """
    if parameters is not None:
        data = safetensors.numpy.save(parameters)
        write_atomic(folder / FINAL, data, "the trained parameters")
    write_json(folder / RESULT, result, "the run's result")
    if parameters is not None:
        storage.remove_tree(folder / CHECKPOINTS)


def collect(out: storage.Path) -> storage.Path:
    """Makes <out>/results.jsonl anew: one line per complete run, in the order of their folders."""
    path = out / "results.jsonl"
    with storage.locked(out, wait=True):  # another command may share --out
        lines = []
        for file in storage.found(out, f"*/{RESULT}"):
            try:
                lines.append(json.dumps(read_result(file.parent)) + "\n")
            except ValueError as error:
                print(f"left out of {path}: {error}", file=sys.stderr)
        write_atomic(path, "".join(lines).encode(), "the results")
    return path
