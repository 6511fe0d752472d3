"""Files on a disk and in a bucket, by the same claims; a disk's lock; the real clients."""

import concurrent.futures
import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import fsspec.implementations.memory
import pytest
from etils.epath import backend
from test_training import NAME

from experiments import storage
from experiments.data import glue
from experiments.data.tasks import task_named
from experiments.finetune import command as finetune
from tests import fake_gcs

ROOT = pathlib.Path(__file__).parents[1]
TFDS = ROOT.parent / "shared" / "tfds"


class Memory(fsspec.implementations.memory.MemoryFileSystem):
    """fsspec's file system in memory, in the place of a bucket's."""

    cachable = False

    def __init__(self):
        super().__init__()
        self.store, self.pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def glob(self, path, **options):
        return [name.lstrip("/") for name in super().glob(path, **options)]


@pytest.fixture
def memory(monkeypatch):
    made = Memory()
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: made)
    return made


@pytest.fixture(params=["disk", "bucket"])
def folder(request, memory, tmp_path):
    return tmp_path / "run" if request.param == "disk" else storage.at("gs://bucket/run")


# Files


def test_a_file_is_replaced_whole(folder):
    for data_of_it in (b"first\n", b"2"):
        storage.write_atomic(folder / "deep" / "x.json", data_of_it, "it")
        assert (folder / "deep" / "x.json").read_bytes() == data_of_it
    assert [path.name for path in (folder / "deep").iterdir()] == ["x.json"]


def test_what_matches_is_found_in_order(folder):
    assert storage.found(folder, "*/result.json") == []
    for name in ("b", "a", "c"):
        storage.write_atomic(folder / name / "result.json", b"{}", "it")
    storage.write_atomic(folder / "d" / "other.json", b"{}", "it")
    expected = [folder / name / "result.json" for name in ("a", "b", "c")]
    assert storage.found(folder, "*/result.json") == expected
    assert str(expected[0]).endswith("run/a/result.json")


def test_a_tree_is_removed_and_one_that_is_not_there_is_no_error(folder):
    storage.write_atomic(folder / "checkpoints" / "1" / "x", b"x", "it")
    storage.write_atomic(folder / "result.json", b"{}", "it")
    for _ in range(2):
        storage.remove_tree(folder / "checkpoints")
        assert not (folder / "checkpoints").exists()
    assert (folder / "result.json").exists()


def test_a_folder_comes_to_the_disk(folder):
    storage.write_atomic(folder / "x", b"x", "it")
    there = storage.local(folder)
    assert isinstance(there, pathlib.Path)
    assert (there / "x").read_bytes() == b"x"


def test_a_path_names_a_disk_or_a_bucket(tmp_path):
    assert storage.at(str(tmp_path)) == tmp_path
    assert not storage.is_bucket(storage.at("runs/x"))
    bucket = storage.at("gs://bucket/run") / "x"
    assert storage.is_bucket(bucket)
    assert storage.at(bucket) == bucket
    with pytest.raises(ValueError, match="gs://"):
        storage.at("ftp://host/run")


def test_a_bucket_that_refuses_is_an_os_error_and_leaves_the_file_before(memory, monkeypatch):
    path = storage.at("gs://bucket/run/x.json")
    storage.write_atomic(path, b"before", "it")

    def refuse(*_, **__):
        raise RuntimeError("quota exceeded")

    with monkeypatch.context() as patched:
        patched.setattr(memory, "open", refuse)
        with pytest.raises(OSError, match="quota exceeded") as caught:
            storage.write_atomic(path, b"after", "it")
    assert caught.value.filename == "gs://bucket/run/x.json"
    assert path.read_bytes() == b"before"


# Locks


def test_a_folder_on_a_disk_serves_one_at_a_time(tmp_path):
    with (
        storage.locked(tmp_path),
        pytest.raises(ValueError, match="another process.* choose another --out"),
        storage.locked(tmp_path),
    ):
        pass
    with storage.locked(tmp_path):
        pass


def test_an_error_in_the_block_lets_go_and_passes(tmp_path):
    with pytest.raises(BlockingIOError, match="^mine$"), storage.locked(tmp_path):
        raise BlockingIOError("mine")
    with storage.locked(tmp_path):
        pass


def test_who_waits_gets_the_folder_next(tmp_path):
    order = []

    def second():
        with storage.locked(tmp_path, wait=True):
            order.append("second")

    with storage.locked(tmp_path):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.1)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def test_who_writes_a_file_at_once_with_others_is_not_disturbed(tmp_path):
    """Two commands that share --out draw its plots at the same time."""
    sizes = range(1, 9)

    def write(size):
        for _ in range(20):
            storage.write_atomic(tmp_path / "loss.png", bytes(1000 * size), "the plot")

    with concurrent.futures.ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(write, sizes))  # raises what any of them raised
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert (tmp_path / "loss.png").stat().st_size in {1000 * size for size in sizes}


# GLUE and the real clients


@pytest.mark.skipif(not (TFDS / "glue").is_dir(), reason=f"no prepared GLUE data in {TFDS}")
def test_glue_in_a_bucket_is_glue_on_a_disk(memory):
    for path in sorted((TFDS / "glue" / "mrpc").glob("*/*")):
        there = storage.at("gs://bucket/tfds") / str(path.relative_to(TFDS))
        storage.write_atomic(there, path.read_bytes(), "it")
    task = task_named("mrpc")
    here, there = glue.load(task, TFDS), glue.load(task, "gs://bucket/tfds")
    assert list(here.validation) == list(there.validation)
    with pytest.raises(FileNotFoundError, match="no cola in gs://bucket/tfds") as caught:
        glue.load(task_named("cola"), "gs://bucket/tfds")
    assert "prepared there: mrpc" in str(caught.value)


CLIENTS = """
import jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
from experiments import storage

out = storage.at("gs://bucket/run")
for name in "ba":
    storage.write_atomic(out / name / "result.json", name.encode(), "it")
read = [path.read_text() for path in storage.found(out, "*/result.json")]
assert read == ["a", "b"], read

arrays = {"a": jnp.arange(600.0).reshape(20, 30)}
for step in (1, 2):
    manager = ocp.CheckpointManager(
        out / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False),
    )
    manager.save(step, args=ocp.args.StandardSave(arrays))
    manager.close()
manager = ocp.CheckpointManager(out / "checkpoints")
assert manager.all_steps() == [2], manager.all_steps()
found = manager.restore(2, args=ocp.args.StandardRestore(arrays))
np.testing.assert_array_equal(found["a"], arrays["a"])
manager.close()
storage.remove_tree(out / "checkpoints")
"""


@contextlib.contextmanager
def _bucket_after(program: str) -> Iterator[fake_gcs.Bucket]:
    """A bucket once a process of its own has run `program` on it."""
    with fake_gcs.serving() as (bucket, environment):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240,
            env=os.environ | environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "tests"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        yield bucket


@pytest.mark.slow
def test_gcsfs_and_orbax_do_the_same_over_http():
    with _bucket_after(CLIENTS) as bucket:
        assert sorted(bucket.objects) == ["run/a/result.json", "run/b/result.json"]
        assert any("checkpoints" in path for _, path in bucket.requests)


STOPPED = """
import pytest
from experiments.finetune import command as finetune, preemption
from experiments import storage
from test_finetune import tiny
from test_training import FLAGS, told_at

flags = tiny("gs://bucket/runs", **FLAGS)
with pytest.MonkeyPatch.context() as patched, told_at(patched, 3):
    assert finetune.main(flags) == preemption.STATUS
stopped = list(storage.found(storage.at("gs://bucket/runs"), "*/checkpoints/*/commit_success.txt"))
assert len(stopped) == 1, stopped
assert finetune.main(flags) == 0
assert finetune.main(tiny(storage.at("WHOLE"), **FLAGS)) == 0
"""


@pytest.mark.slow
def test_a_run_in_a_bucket_ends_as_one_on_a_disk_though_it_was_stopped(tmp_path):
    with _bucket_after(STOPPED.replace("WHOLE", str(tmp_path))) as bucket:
        run = f"runs/{NAME}"
        files = {
            "config.json", "final.safetensors", "lora_config.json", "metrics.jsonl", "result.json"
        }  # fmt: skip
        shared = {"runs/pydoc-tiny-loss.png", "runs/results.jsonl"}
        assert set(bucket.objects) == {f"{run}/{name}" for name in files} | shared
        for name in ("final.safetensors", "metrics.jsonl", "config.json"):
            assert bucket.objects[f"{run}/{name}"][0] == (tmp_path / NAME / name).read_bytes()


def test_what_writes_to_a_disk_only_is_refused_for_a_bucket(capsys):
    for flags in (["--tensorboard"], ["--profile-steps", "1,2"]):
        assert finetune.main(["--smoke", "--out", "gs://bucket/runs", *flags]) == 2
        assert "write to a disk, not to gs://bucket/runs" in capsys.readouterr().err
