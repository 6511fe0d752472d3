"""The training loop's promises: accumulation, remat, an end on demand, logs, the trace of a NaN."""

import contextlib
import functools
import json
import math
import pathlib
import re
import signal
import struct
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto import event_pb2
from test_finetune import run_config, tiny, two_pairs

from experiments.finetune import command as finetune
from experiments.finetune import (
    config,
    devices,
    grid,
    hosts,
    preemption,
    prepare,
    programs,
    progress,
    train,
)

BOTH_MODELS = pytest.mark.parametrize(
    "model", ["tiny", pytest.param("t5-tiny", marks=pytest.mark.slow)]
)
NAME = "pydoc-tiny-lorapro-factored-lr0.01-seed0"
FLAGS = {"methods": "lorapro-factored", "learning_rates": "1e-2", "checkpoint_every": 0}


def built(**changes):
    """(setup, parameters whose factors are all random, arguments of a loss at step 5)."""
    run, rng = run_config(train_examples=61, **changes), np.random.default_rng(1)
    setup, params = prepare.build(run, prepare.load_data(run, None))
    params = jax.tree.map(
        lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32), params
    )
    return setup, params, (*_fixed(setup), np.int32(5), setup.varied.key)


def _fixed(setup) -> tuple:
    # The last of 61 examples' batches has three padded rows; T5's answers differ in length.
    return setup.programs.graph, setup.frozen, setup.batches[-1]


def _value_and_grad(params, args):
    return jax.jit(lambda p: jax.value_and_grad(programs.loss_fn)(p, *args))(params)


@functools.cache
def plain(model: str) -> tuple:
    """(parameters, arguments, loss and gradient) as they are without this module's options."""
    _, params, args = built(model=model)
    return params, args, _value_and_grad(params, args)


def assert_close(found, expected, tolerance: float) -> None:
    """Leaf by leaf, relative to the leaf's largest number."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(np.abs(y).max()))


@BOTH_MODELS
def test_a_batch_in_parts_has_the_gradient_of_the_whole(model):
    params, args, expected = plain(model)
    found = jax.jit(lambda p: programs.accumulated(4, p, *args))(params)
    assert_close(found, expected, 1e-5)


def _kept_bytes(params, args) -> int:
    """What the forward pass keeps for the backward pass."""

    def backward(params):
        return jax.vjp(lambda p: programs.loss_fn(p, *args), params)[1]

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(backward, params)))


@BOTH_MODELS
def test_rematerialised_layers_keep_less_and_have_the_same_gradient(model):
    params, args, expected = plain(model)
    setup, _, less = built(model=model, remat=True)
    frozen = sum(x.nbytes for x in jax.tree.leaves(setup.frozen))  # kept either way
    assert _kept_bytes(params, less) - frozen < (_kept_bytes(params, args) - frozen) / 2
    assert_close(_value_and_grad(params, less), expected, 1e-5)


def test_a_rematerialised_layer_has_the_same_dropout_the_second_time():
    found = []
    for remat in (False, True):
        _, params, args = built(model="tiny", dropout=0.5, remat=remat)
        found.append(_value_and_grad(params, args))
    assert_close(found[1], found[0], 1e-5)
    assert abs(found[0][0] - plain("tiny")[2][0]) > 1e-3


@pytest.fixture(autouse=True, scope="module")
def _small():
    with two_pairs():
        yield


@contextlib.contextmanager
def told_at(monkeypatch, step: int, number: int = signal.SIGTERM):
    """The process receives a signal once `step` losses are known."""
    shown, received = progress.shown, []

    @contextlib.contextmanager
    def shown_and_told(*args):
        with shown(*args) as observe:

            def observe_and_tell(history):
                observe(history)
                if len(history.losses) == step and not received:
                    received.append(step)
                    signal.raise_signal(number)

            yield observe_and_tell

    with monkeypatch.context() as patched:
        patched.setattr("experiments.finetune.run.shown", shown_and_told)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert finetune.main(tiny(out, **FLAGS)) == 0
    return out / NAME


def test_a_run_told_to_end_saves_and_goes_on_as_if_nothing_were(
    whole, tmp_path, capsys, monkeypatch
):
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT):
        with told_at(monkeypatch, 1 if number == signal.SIGTERM else 4, number):
            assert finetune.main(tiny(tmp_path, **FLAGS)) == preemption.STATUS == 143
        stopped = re.search(r"stopped after step (\d) of 8", capsys.readouterr().err)
        assert stopped
        checkpoints = tmp_path / NAME / "checkpoints"
        assert max(path.name for path in checkpoints.iterdir()) == stopped[1]
        assert not (tmp_path / NAME / "result.json").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    # One bit of the second checkpoint is lost on the disk: the first one serves.
    file = max((checkpoints / stopped[1] / "arrays").rglob("d/*"), key=lambda x: x.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert finetune.main(tiny(tmp_path, **FLAGS)) == 0
    assert f"{file} is damaged" in capsys.readouterr().err
    for name in ("final.safetensors", "metrics.jsonl"):
        assert (tmp_path / NAME / name).read_bytes() == (whole / name).read_bytes()


def _events(folder: pathlib.Path) -> dict[tuple[str, int], float]:
    """The scalars of TensorBoard's files: records of a length, its checksum, an event, its own."""
    found = {}
    for path in folder.glob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found


def test_what_is_measured_is_logged_and_changes_nothing(whole, tmp_path):
    flags = tiny(tmp_path, **FLAGS, evaluate_every=3, diagnose_every=4, profile_steps="2,3")
    assert finetune.main([*flags, "--tensorboard"]) == 0
    folder = tmp_path / NAME
    assert (folder / "final.safetensors").read_bytes() == (whole / "final.safetensors").read_bytes()
    result = json.loads((folder / "result.json").read_text())
    assert [point["step"] for point in result["evaluations"]] == [3, 6, 8]
    assert [point["step"] for point in result["diagnostics"]] == [4, 8]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [[line["step"], line["loss"]] for line in steps] == result["losses"]
    # One step of warm-up, which has the rate 0, then half a cosine over seven.
    rates = [0.0, *(1e-2 * (1 + math.cos(math.pi * i / 7)) / 2 for i in range(7))]
    np.testing.assert_allclose([line["learning_rate"] for line in steps], rates, rtol=1e-5)
    for point in result["diagnostics"]:
        assert point["lora_cosine"] <= point["lorapro_cosine"] <= 1.0 + 1e-5
        assert -1.0 <= point["step_cosine"] <= 1.0 + 1e-5
    for kind, points in (("validation", "evaluations"), ("diagnosis", "diagnostics")):
        found = [line for line in lines if line["kind"] == kind]
        assert found == [{"kind": kind} | point for point in result[points]]
    events = _events(folder / "tensorboard")
    assert len(events) == sum(len(line) - 2 for line in lines)  # all but kind and step
    assert events["train/loss", 8] == np.float32(result["losses"][-1][1])
    assert events["validation/accuracy", 8] == np.float32(result["final"]["accuracy"])
    assert list(folder.glob("profile/**/*.xplane.pb"))


def test_the_logged_norm_is_that_of_the_gradient_before_clipping(whole):
    run = run_config(method="lorapro-factored", learning_rate=1e-2)
    setup, params = prepare.build(run, prepare.load_data(run, None))
    args = setup.programs.graph, setup.frozen, setup.batches[0], np.int32(0), setup.varied.key
    grads = jax.jit(lambda p: jax.grad(programs.loss_fn)(p, *args))(params)
    expected = math.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert first["gradient_norm"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_a_run_that_diverged_leaves_the_step_to_be_made_again(tmp_path, capsys, checkpoint_every):
    flags = {"learning_rates": "1e38", "train_examples": 32, "checkpoint_every": checkpoint_every}
    assert finetune.main(tiny(tmp_path, **flags)) == 1
    folder = tmp_path / "pydoc-tiny-full-lr1e+38-seed0"
    result = json.loads((folder / "result.json").read_text())
    assert (result["diverged"], result["checkpoint"]) == (3, "checkpoints/2")
    assert str(folder / "checkpoints/2") in capsys.readouterr().err
    run = run_config(method="full", learning_rate=1e38, train_examples=32)
    setup, params = prepare.build(run, prepare.load_data(run, None))
    batch = setup.batches[2]
    assert result["batch_ids"] == batch["ids"].tolist()
    saved = ocp.StandardCheckpointer().restore(folder / "checkpoints/2/arrays")[0]
    leaves = jax.tree.leaves(saved)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    args = setup.programs.graph, setup.frozen, batch, np.int32(2), setup.varied.key
    assert not np.isfinite(programs.loss_fn(params, *args))


def test_a_gradient_that_is_not_finite_stops_the_run_at_its_own_step():
    setup = types.SimpleNamespace(programs=None, batches=range(4))
    loop = train._Loop(setup, train.History(), lambda history: None)
    loop.pending += [programs.Metrics(0.5, 1.0), programs.Metrics(0.5, np.nan)]
    with pytest.raises(train.DivergedError, match="norm of the gradient is nan at step 2 of 4"):
        loop.read(0)
    assert loop.history.losses == [0.5]


def test_jaxs_variables_ask_for_a_distributed_run_and_flags_go_first(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    command = grid.read(["--process-id", "3"], "finetune")
    assert command.distributed
    assert (command.coordinator, command.num_processes, command.process_id) == ("host:1", 4, 3)


def test_one_device_needs_no_mesh():
    alone = devices.devices_of(config.Command())
    batch = {"tokens": np.zeros((2, 3), np.int32)}
    assert alone.mesh is None
    assert alone.count == 1
    assert alone.shard(batch) is batch
    assert alone.replicate(batch) is batch
    assert hosts.once(lambda: 7) == 7


def test_every_process_has_the_answer_or_the_error_of_the_first(monkeypatch):
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_broadcast", lambda data: sent.append(data or sent[0]) or sent[0])

    def full():
        raise OSError(28, "No space left", "/runs/x")

    def of(first: bool, make):
        monkeypatch.setattr(hosts, "is_first", lambda: first)
        return hosts.once(make)

    answer = {"final": {"loss": 1 / 3}, "losses": [[1, 0.1 + 0.2]]}
    assert of(True, lambda: answer) == of(False, lambda: pytest.fail("called")) == answer
    sent.clear()
    for first in (True, False):
        with pytest.raises(OSError, match="No space left") as caught:
            of(first, full)
        assert (caught.value.errno, caught.value.filename) == (28, "/runs/x")
    assert json.loads(sent[0]) == {"error": ["OSError", [28, "No space left", "/runs/x"]]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"accumulate": "3"}, "--accumulate 3 does not divide --batch-size, 8"),
        ({"accumulate": "0"}, "--accumulate 0 is out of range"),
        ({"fsdp": "2"}, "--fsdp 2 does not divide the 1 devices of this run"),
        ({"devices": "0"}, "--devices 0 is out of range"),
        ({"devices": "1000"}, "set JAX_NUM_CPU_DEVICES=1000"),
        ({"coordinator": "localhost:1"}, "need --distributed"),
        ({"timeout": "0"}, "--timeout"),
        ({"keep": "0"}, "--keep 0 is out of range"),
        ({"evaluate_every": "-1"}, "--evaluate-every"),
        ({"profile_steps": "5"}, "--profile-steps 5 is not FIRST,LAST"),
        ({"profile_steps": "5,2"}, "such as 10,20"),
    ],
)
def test_bad_values_are_named_with_what_to_do(tmp_path, capsys, flags, message):
    assert finetune.main(tiny(tmp_path, **flags)) == 2
    assert message in capsys.readouterr().err
