"""Run folders: files whole or absent, checkpoints that come back bit for bit, a full disk."""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from experiments import storage
from experiments.finetune import checkpoint
from experiments.finetune.checkpoint import Checkpoints
from experiments.finetune.config import RunConfig

RUN = RunConfig(method="lora", learning_rate=1e-4, seed=0, epochs=1)


@contextlib.contextmanager
def file_size_limit(size: int):
    """The system refuses to let a file grow beyond `size`, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def arrays(seed: int):
    params = {"a": jax.random.normal(jax.random.key(seed), (300, 400), jnp.float32)}
    return params, optax.adamw(1e-3).init(params)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), got, expected)


def test_the_last_checkpoint_comes_back_bit_for_bit(tmp_path):
    saved = Checkpoints(tmp_path)
    assert saved.restore(arrays(0)) is None
    progress = {"losses": [0.1 + 0.2, 1 / 3], "data": {"next_index": 2}}
    for step in (1, 2, 3):
        saved.save(step, arrays(step), progress | {"step": step})
    saved.close()
    again = Checkpoints(tmp_path)
    got, found = again.restore(arrays(0))
    again.close()
    assert_same(got, arrays(3))
    assert found == progress | {"step": 3}
    kept = sorted(path.name for path in again.path.iterdir())
    assert kept == ["2", "3"]


def test_a_checkpoint_cut_short_by_a_kill_is_removed(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(1, arrays(1), {})
    saved.close()
    (saved.path / "2.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path)
    got, _ = again.restore(arrays(0))
    again.close()
    assert_same(got, arrays(1))
    assert [path.name for path in again.path.iterdir()] == ["1"]


def flipped(data: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


DAMAGES = {
    "gone": None,
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "flipped": flipped,
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    saved = Checkpoints(tmp_path_factory.mktemp("two"))
    for step in (1, 2):
        saved.save(step, arrays(step), {"step": step})
    saved.close()
    return saved.path.parent


SHIFTS = [pytest.param(n, marks=[pytest.mark.slow] if n else []) for n in range(len(DAMAGES))]


@pytest.mark.parametrize("shift", SHIFTS)
def test_no_damage_to_a_file_changes_what_comes_back(two_checkpoints, tmp_path, capsys, shift):
    """The last checkpoint whole, or the one before, bit for bit; and then the file is named."""
    last = two_checkpoints / checkpoint.CHECKPOINTS / "2"
    files = [path.relative_to(two_checkpoints) for path in last.rglob("*") if path.is_file()]
    assert len(files) > 8
    for number, name in enumerate(sorted(files)):
        folder = tmp_path / str(number)
        shutil.copytree(two_checkpoints, folder)
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        change = list(DAMAGES.values())[(number + shift) % len(DAMAGES)]
        if change is not None:
            if data in (b"", change(data) if data else b""):
                continue
            (folder / name).write_bytes(change(data))
        again = Checkpoints(folder)
        got, progress = again.restore(arrays(0))
        again.close()
        step = progress["step"]
        assert_same(got, arrays(step))
        told = capsys.readouterr().err
        assert (step == 1) == bool(told)
        if step == 1:
            kept = [path.name for path in again.path.iterdir()]
            assert (str(folder / name) in told, kept) == (True, ["1"])
        else:
            assert name.name in checkpoint._UNLISTED


def test_a_run_whose_checkpoints_are_all_damaged_begins_anew_and_saves_again(tmp_path, capsys):
    saved = Checkpoints(tmp_path)
    for step in (1, 2):
        saved.save(step, arrays(step), {})
    saved.close()
    (saved.path / "7").mkdir()
    for step in ("1", "2"):
        (saved.path / step / checkpoint.MANIFEST).write_bytes(b"null")
    again = Checkpoints(tmp_path)
    assert again.restore(arrays(0)) is None
    assert capsys.readouterr().err.count(checkpoint.MANIFEST) == 3
    again.save(1, arrays(4), {})
    again.close()
    last = Checkpoints(tmp_path)
    assert_same(last.restore(arrays(0))[0], arrays(4))
    last.close()


BROKEN = {"empty": b"", "cut": b'{"kind": "fine', "null": b"null", "list": b"[]", "object": b"{}",
          "binary": b"\xff\xfe\x00"}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_run_folders_damaged_file_is_named(tmp_path, content):
    (tmp_path / checkpoint.CONFIG).write_bytes(content)
    (tmp_path / checkpoint.RESULT).write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json is not a .*Delete {tmp_path}"):
        checkpoint.claim(tmp_path, RUN)
    with pytest.raises(ValueError, match=f"result.json is not a .*Delete {tmp_path}"):
        checkpoint.read_result(tmp_path)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / f"result.json.0123{storage.PARTIAL}").write_bytes(b"{")
    checkpoint.claim(tmp_path, RUN)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.CONFIG]


def _save_on_a_full_disk(folder: pathlib.Path, limit: int) -> None:
    def save(saved: Checkpoints, step: int) -> None:
        saved.save(step, arrays(step), {})
        saved.wait()

    saved = Checkpoints(folder)
    save(saved, 1)
    with file_size_limit(limit), pytest.raises(OSError, match="checkpoint of step 2") as caught:
        save(saved, 2)
    assert str(saved.path) in str(caught.value)
    assert "Make room" in str(caught.value)
    assert [path.name for path in saved.path.iterdir()] == ["1"]
    saved.close()
    again = Checkpoints(folder)  # there is room again
    assert_same(again.restore(arrays(0))[0], arrays(1))
    save(again, 2)
    assert_same(again.restore(arrays(0))[0], arrays(2))
    again.close()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    # In a process of its own: a limit on file sizes is the whole process's, and a failed write
    # leaves threads and coroutines of Orbax behind, which complain whenever they are collected.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        for limit in (10, 100_000):  # in the first file, in the arrays
            folder = tmp_path / str(limit)
            pool.submit(_save_on_a_full_disk, folder, limit).result(timeout=120)


def test_a_full_disk_leaves_the_file_before(tmp_path):
    path = tmp_path / "results.jsonl"
    storage.write_atomic(path, b"before\n", "the results")
    with (
        file_size_limit(100),
        pytest.raises(OSError, match="could not write the results") as caught,
    ):
        storage.write_atomic(path, b"x" * 1000, "the results")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"before\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_json_lacks_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(tmp_path / "x.json", {"loss": float("nan")}, "x")
    assert not list(tmp_path.iterdir())


def test_another_configuration_is_refused_by_field(tmp_path):
    checkpoint.claim(tmp_path, RUN)
    checkpoint.claim(tmp_path, RUN)
    other = dataclasses.replace(RUN, batch_size=64, rslora=True)
    with pytest.raises(ValueError, match="another configuration") as caught:
        checkpoint.claim(tmp_path, other)
    text = str(caught.value)
    assert "batch_size: 32 there, 64 asked for" in text
    assert "rslora: False there, True asked for" in text
    assert "rank" not in text
    assert "--out" in text


def test_a_run_is_complete_only_once_its_result_is_written(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(1, arrays(1), {})
    saved.close()
    parameters = {"a": np.arange(600, dtype=np.float32)}
    result = {"config": {}, "final": {"accuracy": 0.5}, "text": "x" * 10_000}
    with file_size_limit(5_000), pytest.raises(OSError, match="the run's result"):
        checkpoint.finish(tmp_path, parameters, result)
    assert checkpoint.read_result(tmp_path) is None
    assert saved.path.exists()
    checkpoint.finish(tmp_path, parameters, result)
    assert checkpoint.read_result(tmp_path) == result
    assert not saved.path.exists()
    loaded = safetensors.numpy.load_file(tmp_path / checkpoint.FINAL)
    np.testing.assert_array_equal(loaded["a"], parameters["a"])


def test_collecting_twice_writes_every_line_once(tmp_path, capsys):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        result = {"config": {}, "final": None, "run": name}
        storage.write_json(tmp_path / name / checkpoint.RESULT, result, "a result")
    for name, text in (("unfinished", None), ("damaged", b"\xff"), ("foreign", b"{}")):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / checkpoint.RESULT).write_bytes(text)
    for _ in range(2):
        path = checkpoint.collect(tmp_path)
    told = capsys.readouterr().err
    assert all(
        f"{tmp_path / name / checkpoint.RESULT} is not a result" in told
        for name in ("damaged", "foreign")
    )
    assert [json.loads(line)["run"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_errors_that_are_no_failed_writes_pass_unchanged(tmp_path):
    with (
        pytest.raises(ValueError, match=r"^something else$"),
        storage.explained("a file", tmp_path),
    ):
        raise ValueError("something else")
