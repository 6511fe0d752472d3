"""Files on a disk and in a bucket, by the same claims; a bucket's lock; the real clients."""

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

from experiments import data, storage
from experiments.data import glue
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
    for name, seconds in (("LEASE", 0.5), ("RENEWAL", 0.08), ("SETTLING", 0.1)):
        monkeypatch.setattr(storage, name, seconds)
    return made


@pytest.fixture(params=["disk", "bucket"])
def folder(request, memory, tmp_path):
    return tmp_path / "run" if request.param == "disk" else storage.at("gs://bucket/run")


# Files


def test_a_file_is_replaced_whole(folder):
    for data_of_it in (b"first\n", b"2"):
        storage.replace(folder / "deep" / "x.json", data_of_it)
        assert (folder / "deep" / "x.json").read_bytes() == data_of_it
    assert [path.name for path in (folder / "deep").iterdir()] == ["x.json"]


def test_what_matches_is_found_in_order(folder):
    assert storage.found(folder, "*/result.json") == []
    for name in ("b", "a", "c"):
        storage.replace(folder / name / "result.json", b"{}")
    storage.replace(folder / "d" / "other.json", b"{}")
    expected = [folder / name / "result.json" for name in ("a", "b", "c")]
    assert storage.found(folder, "*/result.json") == expected
    assert str(expected[0]).endswith("run/a/result.json")


def test_a_file_that_grows_is_whole_at_the_end(folder):
    storage.replace(folder / "log", b"of an earlier start\n")
    with storage.growing(folder / "log") as write:
        for line in ("a\n", "b\n"):
            write(line)
    assert (folder / "log").read_text() == "a\nb\n"


def test_a_file_that_grows_can_be_read_meanwhile(folder, monkeypatch):
    monkeypatch.setattr(storage, "GROWTH", 0.0)
    with storage.growing(folder / "log") as write:
        write("a\n")
        assert (folder / "log").read_text() == "a\n"


def test_a_tree_is_removed_and_one_that_is_not_there_is_no_error(folder):
    storage.replace(folder / "checkpoints" / "1" / "x", b"x")
    storage.replace(folder / "result.json", b"{}")
    for _ in range(2):
        storage.remove_tree(folder / "checkpoints")
        assert not (folder / "checkpoints").exists()
    assert (folder / "result.json").exists()


def test_a_folder_comes_to_the_disk(folder):
    storage.replace(folder / "x", b"x")
    there = storage.local(folder)
    assert isinstance(there, pathlib.Path)
    assert (there / "x").read_bytes() == b"x"


def test_a_path_names_a_disk_or_a_bucket(tmp_path, monkeypatch):
    assert storage.at(str(tmp_path)) == tmp_path
    assert not storage.is_bucket(storage.at("runs/x"))
    monkeypatch.chdir(tmp_path)
    assert storage.absolute(storage.at("x")) == tmp_path / "x"
    bucket = storage.at("gs://bucket/run") / "x"
    assert storage.is_bucket(bucket)
    assert str(storage.absolute(bucket)) == "gs://bucket/run/x"
    assert storage.at(bucket) == bucket
    with pytest.raises(ValueError, match="gs://"):
        storage.at("ftp://host/run")


def test_a_bucket_that_refuses_is_an_os_error_and_leaves_the_file_before(memory, monkeypatch):
    path = storage.at("gs://bucket/run/x.json")
    storage.replace(path, b"before")

    def refuse(*_, **__):
        raise RuntimeError("quota exceeded")

    monkeypatch.setattr(memory, "pipe_file", refuse)
    with pytest.raises(OSError, match="quota exceeded") as caught:
        storage.replace(path, b"after")
    assert caught.value.filename == "gs://bucket/run/x.json"
    assert path.read_bytes() == b"before"


# Locks


def test_a_folder_serves_one_at_a_time(folder):
    with storage.locked(folder):
        with pytest.raises(ValueError, match="another process"), storage.locked(folder):
            pass
        with pytest.raises(ValueError, match="choose another --out"), storage.locked(folder):
            pass
    with storage.locked(folder):
        pass


def test_an_error_in_the_block_lets_go_and_passes(folder):
    with pytest.raises(BlockingIOError, match="^mine$"), storage.locked(folder):
        raise BlockingIOError("mine")
    with storage.locked(folder):
        pass


def test_who_waits_gets_the_folder_next(folder):
    order = []

    def second():
        with storage.locked(folder, wait=True):
            order.append("second")

    with storage.locked(folder):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(2 * storage.LEASE)  # longer than a lease: it is renewed
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def test_a_holder_that_died_is_taken_over_after_a_lease(memory):
    folder = storage.at("gs://bucket/run")
    storage.replace(folder / storage.LOCK, b"elsewhere process 7 0123 42\n")
    start = time.monotonic()
    with storage.locked(folder):
        assert time.monotonic() - start > storage.LEASE
        with pytest.raises(ValueError, match="another process"), storage.locked(folder):
            pass
    assert not (folder / storage.LOCK).exists()


def test_who_holds_a_bucket_is_named(memory):
    folder = storage.at("gs://bucket/run")
    with (
        storage.locked(folder),
        pytest.raises(ValueError, match=rf"\(\S+ process {os.getpid()}\)"),
        storage.locked(folder),
    ):
        pass


def test_a_holder_that_was_taken_over_leaves_the_lock_alone(memory):
    folder = storage.at("gs://bucket/run")
    with storage.locked(folder):
        storage.replace(folder / storage.LOCK, b"elsewhere process 7 0123 0\n")
        time.sleep(3 * storage.RENEWAL)
    assert (folder / storage.LOCK).read_bytes() == b"elsewhere process 7 0123 0\n"


def test_a_lock_whose_answer_was_lost_is_ones_own(memory, monkeypatch):
    put = memory.pipe_file

    def lost(path, value, mode="overwrite"):
        put(path, value, mode=mode)
        if mode == "create":
            raise FileExistsError(path)  # what the repeated request is told

    monkeypatch.setattr(memory, "pipe_file", lost)
    with storage.locked(storage.at("gs://bucket/run")):
        pass


def contenders(folder, count):
    """How many of several at once get the folder."""
    got, start, done = [], threading.Barrier(count), threading.Barrier(count)

    def contend():
        start.wait()
        with contextlib.suppress(ValueError), contextlib.ExitStack() as held:
            try:
                held.enter_context(storage.locked(folder))
                got.append(1)
            finally:
                done.wait()  # nobody lets go before all have tried

    threads = [threading.Thread(target=contend) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(got)


def test_of_several_that_find_a_dead_holder_one_takes_over(memory):
    folder = storage.at("gs://bucket/run")
    storage.replace(folder / storage.LOCK, b"elsewhere process 7 0123 42\n")
    assert contenders(folder, 5) == 1


# GLUE and the real clients


@pytest.mark.skipif(not (TFDS / "glue").is_dir(), reason=f"no prepared GLUE data in {TFDS}")
def test_glue_in_a_bucket_is_glue_on_a_disk(memory):
    for path in sorted((TFDS / "glue" / "mrpc").glob("*/*")):
        there = storage.at("gs://bucket/tfds") / str(path.relative_to(TFDS))
        storage.replace(there, path.read_bytes())
    task = data.get("mrpc")
    here, there = glue.load(task, TFDS), glue.load(task, "gs://bucket/tfds")
    assert list(here.validation) == list(there.validation)
    with pytest.raises(FileNotFoundError, match="no cola in gs://bucket/tfds") as caught:
        glue.load(data.get("cola"), "gs://bucket/tfds")
    assert "prepared there: mrpc" in str(caught.value)


CLIENTS = """
import jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
from experiments import storage
from tests.test_storage import contenders

storage.LEASE, storage.RENEWAL, storage.SETTLING = 2.0, 0.3, 0.3
out = storage.at("gs://bucket/run")
assert contenders(out, 4) == 1
with storage.locked(out):
    for name in "ba":
        storage.replace(out / name / "result.json", name.encode())
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

storage.LEASE, storage.RENEWAL = 2.0, 0.3
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
        files = {"config.json", "final.safetensors", "metrics.jsonl", "result.json"}
        images = {"runs/loss.png", "runs/metric.png", "runs/results.jsonl"}
        assert set(bucket.objects) == {f"{run}/{name}" for name in files} | images
        for name in ("final.safetensors", "metrics.jsonl", "config.json"):
            assert bucket.objects[f"{run}/{name}"][0] == (tmp_path / NAME / name).read_bytes()


def test_what_writes_to_a_disk_only_is_refused_for_a_bucket(capsys):
    for flags in (["--tensorboard"], ["--profile-steps", "1,2"]):
        assert finetune.main(["--smoke", "--out", "gs://bucket/runs", *flags]) == 2
        assert "write to a disk, not to gs://bucket/runs" in capsys.readouterr().err
