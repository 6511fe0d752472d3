"""Several devices and processes against one; a process killed; disagreeing options.

Two processes and one add the eight devices' gradients in different orders (gloo's, and that of
XLA's threads), so their gradients differ in the last digits. Adam turns a gradient that is all
rounding into a step of full size; with an epsilon no smaller than the rate it cannot: d step /
d gradient <= rate / eps = 1, and plain LoRA's parameters agree to float32 rounding. LoRA-Pro
divides by the Gram of a factor that starts at zero, so rounding moves its factors more, along
directions that hardly change their product: there the losses and scores agree to float32 rounding.
Runs of the same number of processes agree bit for bit.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_finetune import tiny

from experiments.finetune import command as finetune
from experiments.finetune import preemption

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
STEPS, RATE = 6, 1e-3
FLAGS = (
    "--model tiny --max-length 16 --batch-size 16 --eval-examples 20 --train-examples 92 "
    f"--epochs 1 --learning-rates {RATE} --eps {RATE}"
).split()
BOTH = ("--methods", "lora,lorapro-full", "--checkpoint-every", "0")
ONE = ("--methods", "lorapro-full", "--checkpoint-every", "1")
LORA, LORAPRO = (f"pydoc-tiny-{method}-lr{RATE}-seed0" for method in ("lora", "lorapro-full"))
TIMEOUT = 10  # after which a silent process counts as dead
BOUND = 4 * TIMEOUT  # within which the others have ended, on a machine that is busy with others
LIMIT = 240  # of a whole run, likewise


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, so that only the first run of a kind waits for the compiler."""
    return tmp_path_factory.mktemp("cache")


@contextlib.contextmanager
def started(out, cache, devices: int, *flags: str) -> Iterator[subprocess.Popen]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "0",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "experiments.finetune", *FLAGS, "--out", str(out), *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def pair(out, cache, flags: tuple[str, ...], *second: str) -> Iterator[list[subprocess.Popen]]:
    """The two processes; `second` are further flags of the second."""
    shared = [*flags, "--distributed", "--coordinator", f"127.0.0.1:{free_port()}"]
    shared += ["--num-processes", "2", "--timeout", str(TIMEOUT), "--process-id"]
    with (
        started(out, cache, 4, *shared, "0") as zero,
        started(out, cache, 4, *shared, "1", *second) as one,
    ):
        yield [zero, one]


def ended(processes, limit: float = LIMIT) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of every process, all of which end within `limit` seconds."""
    deadline = time.monotonic() + limit
    written = [p.communicate(timeout=deadline - time.monotonic()) for p in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, written, strict=True)]


def succeeded(processes) -> list[str]:
    """What every process wrote to stdout; none of them failed."""
    found = ended(processes)
    for status, _, error in found:
        assert status == 0, error
    return [out for _, out, _ in found]


def newest(out) -> int:
    steps = (out / LORAPRO / "checkpoints").glob("[0-9]*")
    return max((int(p.name) for p in steps if p.name.isdigit()), default=0)


def result(out, name: str) -> dict:
    return json.loads((out / name / "result.json").read_text())


def final(out, name: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(out / name / "final.safetensors")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    """The folder and the output of two processes that nothing disturbed."""
    out = tmp_path_factory.mktemp("two")
    with pair(out, cache, BOTH) as processes:
        return out, succeeded(processes)


def test_two_processes_train_what_one_does(unbroken, tmp_path, cache):
    two, _ = unbroken
    with started(tmp_path, cache, 8, *BOTH, "--devices", "8") as one:
        succeeded([one])
    got, expected = final(two, LORA), final(tmp_path, LORA)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # Each step rounds a parameter of up to 2 in its last digit and inherits the gradient's.
        np.testing.assert_allclose(got[name], value, rtol=0, atol=2e-6, err_msg=name)
    for name in (LORA, LORAPRO):
        results = [result(out, name) for out in (two, tmp_path)]
        assert [(r["devices"], r["steps"]) for r in results] == [(8, STEPS)] * 2
        for key in ("losses", "evaluations"):
            flat, wanted = (jax.tree.leaves(r[key]) for r in results)
            np.testing.assert_allclose(flat, wanted, rtol=1e-5, err_msg=f"{name}: {key}")


def test_only_the_first_process_writes_to_the_terminal(unbroken):
    _, (first, second) = unbroken
    assert f"step {STEPS}/{STEPS}" in first
    assert "wrote" in first
    assert not [line for line in second.splitlines() if "peer ranks" not in line]


def test_a_death_ends_the_others_and_a_restart_resumes_exactly(unbroken, tmp_path, cache):
    for victim, step in ((1, 1), (0, 3)):
        with pair(tmp_path, cache, ONE) as processes:
            deadline = time.monotonic() + LIMIT
            while newest(tmp_path) < step:
                assert all(p.poll() is None for p in processes), "a run ended before it was killed"
                assert time.monotonic() < deadline, "the moment to kill never came"
                time.sleep(0.01)
            processes[victim].send_signal(signal.SIGKILL)
            found = ended(processes, BOUND)
        status, _, error = found[1 - victim]
        assert status not in (0, None)
        last = error.strip().splitlines()[-1]
        assert f"error: process {1 - victim} of 2 ended before the run was complete" in last
        assert "Start all 2 processes again with the same options" in last
        assert str(tmp_path / LORAPRO) in last
        assert step <= newest(tmp_path) < STEPS
        assert not (tmp_path / LORAPRO / "result.json").exists()
    with pair(tmp_path, cache, ONE) as processes:
        succeeded(processes)
    whole, _ = unbroken
    files = [out / LORAPRO / "final.safetensors" for out in (tmp_path, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    for key in ("losses", "evaluations"):
        assert result(tmp_path, LORAPRO)[key] == result(whole, LORAPRO)[key]


def test_a_sigterm_to_one_process_ends_all_after_the_same_step(tmp_path, cache):
    flags = ("--methods", "lorapro-full", "--checkpoint-every", "1", "--epochs", "100")
    with pair(tmp_path, cache, flags) as processes:
        deadline = time.monotonic() + LIMIT
        while newest(tmp_path) < 1:
            assert all(p.poll() is None for p in processes), "a run ended before it was told to"
            assert time.monotonic() < deadline, "the moment to tell it never came"
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
        found = ended(processes)
    assert [status for status, _, _ in found] == [preemption.STATUS] * 2, found
    steps = {re.search(r"stopped after step (\d+) of 600", error)[1] for _, _, error in found}
    assert steps == {str(newest(tmp_path))}
    assert not any("ended before the run was complete" in error for _, _, error in found)


def test_processes_with_different_options_all_stop(tmp_path, cache):
    with pair(tmp_path, cache, ONE, "--seeds", "1") as processes:
        found = ended(processes)
    for status, _, error in found:
        assert status == 2, error
        assert "the processes of this run were given different options" in error
        assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


SHARDED = """
import json, sys
import jax
from experiments.finetune import devices, grid, command as finetune, prepare
devices.SMALLEST = 1
argv = json.loads(sys.argv[1])
assert finetune.main(argv) == 0
command = grid.read(argv, "")
run = grid.runs(command)[-1]
setup, params = prepare.build(run, prepare.load_data(run, None), devices.devices_of(command))
params = setup.devices.place(params)
trees = {"params": params, "frozen": setup.frozen, "state": setup.programs.init(params)}
print(json.dumps({
    name: [sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)),
           sum(x.nbytes for x in jax.tree.leaves(tree))]
    for name, tree in trees.items()
}))
"""


def test_devices_that_share_the_parameters_train_what_one_does(tmp_path):
    # An epsilon no smaller than the rate, so that rounding stays rounding.
    methods = ("full", "lorapro-full")
    flags = {"methods": ",".join(methods), "learning_rates": "1e-3", "eps": "1e-3"}
    flags |= {"train_examples": 32, "checkpoint_every": 0}
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_ENABLE_X64": "0"}
    argv = tiny(tmp_path / "four", **flags, devices=4, fsdp=2)
    command = [sys.executable, "-c", SHARDED, json.dumps(argv)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, (mine, all_of_it) in json.loads(done.stdout.splitlines()[-1]).items():
        assert mine < 0.6 * all_of_it, name  # biases and norms are whole on each
    assert finetune.main(tiny(tmp_path / "one", **flags)) == 0
    for method in methods:
        folders = [tmp_path / n / f"pydoc-tiny-{method}-lr0.001-seed0" for n in ("four", "one")]
        results = [json.loads((folder / "result.json").read_text()) for folder in folders]
        for key in ("losses", "evaluations"):
            found, wanted = (jax.tree.leaves(result[key]) for result in results)
            np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=f"{method}: {key}")
    # LoRA-Pro's factors move along directions that change no product.
    folders = [tmp_path / n / "pydoc-tiny-full-lr0.001-seed0" for n in ("four", "one")]
    parts, whole = (safetensors.numpy.load_file(f / "final.safetensors") for f in folders)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=0, atol=2e-6, err_msg=name)
