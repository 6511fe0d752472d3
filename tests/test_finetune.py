"""The command from end to end on the tiny model: results, resumption after SIGKILL, bad input."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.extend
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

from experiments import models
from experiments.data.batching import BUCKETS
from experiments.finetune import command as finetune
from experiments.finetune import config, grid, methods, prepare, programs
from experiments.finetune.config import RATES, Command, RunConfig
from experiments.finetune.methods import METHODS
from experiments.finetune.run import thinned
from experiments.models import t5_files, t5_tiny
from experiments.models import tiny as tiny_model
from experiments.report.paper import OURS

ROOT = pathlib.Path(__file__).parents[1]
# One bucket, so one compilation a run; 16 tokens are few, but these tests are not about accuracy.
TINY = ["--model", "tiny", "--max-length", "16", "--batch-size", "8", "--eval-examples", "20"]


def tiny(out, **flags) -> list[str]:
    given = {"methods": "full", "train_examples": 64, "epochs": 1} | flags
    names = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items())
    return [*TINY, "--out", str(out), *(word for pair in names for word in pair)]


def run_config(**changes) -> RunConfig:
    given = {"model": "tiny", "task": "pydoc", "method": "lora", "learning_rate": 1e-3}
    given |= {"seed": 0, "epochs": 1}
    sizes = {"max_length": 16, "batch_size": 8, "train_examples": 64, "eval_examples": 20}
    return RunConfig(**given | sizes | changes)


@contextlib.contextmanager
def two_pairs() -> Iterator[pytest.MonkeyPatch]:
    """The tiny model has one layer and two adapters, which is less to compile."""
    one_layer = dataclasses.replace(tiny_model.CONFIG, num_hidden_layers=1)
    adapted = r"encoder/layers/0/(attention/query|up)"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiny_model, "CONFIG", one_layer)
        patched.setitem(models.MODELS, "tiny", models.get("tiny")._replace(adapted=adapted))
        yield patched


@pytest.fixture(autouse=True, scope="module")
def _small():
    with two_pairs():
        yield


@pytest.fixture(scope="module")
def all_methods(tmp_path_factory):
    """The results of every method, two epochs each."""
    out = tmp_path_factory.mktemp("all")
    flags = {"methods": ",".join(METHODS), "epochs": 2, "learning_rates": "1e-2"}
    assert finetune.main(tiny(out, **flags)) == 0
    lines = (out / "results.jsonl").read_text().splitlines()
    return out, {record["config"]["method"]: record for record in map(json.loads, lines)}


def test_every_method_leaves_a_complete_record(all_methods):
    out, records = all_methods
    assert set(records) == set(METHODS)
    for record in records.values():
        assert record["steps"] == 16
        assert [point["step"] for point in record["evaluations"]] == [8, 16]
        assert set(record["final"]) == {"accuracy", "f1", "matthews", "loss"}
        assert {"train", "compile", "evaluate", "checkpoint"} <= set(record["seconds"])
        assert record["step_memory_bytes"] > record["trainable_bytes"] > 0
        assert {"commit", "versions", "time"} <= set(record["provenance"])
        assert len(record["losses"]) == 16
    assert (out / "pydoc-tiny-loss.png").read_bytes().startswith(b"\x89PNG")


def test_optimizer_state_has_the_size_that_each_method_promises(all_methods):
    _, records = all_methods
    counters = 64  # step counts
    for method in ("full", "lora", "lorapro-adamw"):
        extra = records[method]["optimizer_state_bytes"] - 2 * records[method]["trainable_bytes"]
        assert 0 <= extra <= counters, method
    kernels, pairs = 32 * 32 + 32 * 64, 2
    head = 2 * 32 + 2
    extra = records["lorapro-full"]["optimizer_state_bytes"] - 2 * 4 * (kernels + head)
    assert 0 <= extra <= counters + 16 * pairs  # a few numbers of a pair beside its moments


def test_the_lora_methods_train_adapters_and_head_only(all_methods):
    out, records = all_methods
    for method, record in records.items():
        name = f"pydoc-tiny-{method}-lr0.01-seed0"
        trained = safetensors.numpy.load_file(out / name / "final.safetensors")
        last = {path.rsplit("/", 1)[-1] for path in trained if not path.startswith("head/")}
        assert (last == {"lora_a", "lora_b"}) == METHODS[method].adapted
        assert {"head/kernel", "head/bias"} <= set(trained)
        assert sum(x.size for x in trained.values()) == record["trainable_parameters"]


def test_a_complete_run_does_nothing(all_methods, capsys, monkeypatch):
    out, _ = all_methods
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.name != ".lock"}
    monkeypatch.setattr("experiments.finetune.run.train", None)
    monkeypatch.setattr("experiments.finetune.run.load_data", None)
    flags = {"methods": ",".join(METHODS), "epochs": 2, "learning_rates": "1e-2"}
    assert finetune.main(tiny(out, **flags)) == 0
    assert capsys.readouterr().out.count("complete, nothing to do") == len(METHODS)
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.name != ".lock"}


def test_the_folder_of_another_configuration_is_refused(all_methods, capsys):
    out, _ = all_methods
    flags = {"methods": "lora", "epochs": 2, "learning_rates": "1e-2", "rank": 4}
    assert finetune.main(tiny(out, **flags)) == 2
    error = capsys.readouterr().err
    assert "rank: 8 there, 4 asked for" in error
    assert "Traceback" not in error


@contextlib.contextmanager
def _started(out, method) -> Iterator[subprocess.Popen]:
    flags = tiny(out, methods=method, train_examples=160, checkpoint_every=1)
    environment = os.environ | {
        "JAX_ENABLE_X64": "0",
        "JAX_PLATFORMS": "cpu",
        # Of this folder alone: two folders that agree have compiled their programs each.
        "JAX_COMPILATION_CACHE_DIR": str(out.with_name(f"{out.name}-programs")),
    }
    command = [sys.executable, "-m", "experiments.finetune", *flags]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process,
    ):
        yield process
        status = process.wait()
        log.seek(0)
        assert status in (0, -signal.SIGKILL), log.read()


def _kill_when(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_parameters(tmp_path):
    method = "lorapro-full"
    name = f"pydoc-tiny-{method}-lr{RATES[method]}-seed0"
    broken, whole = tmp_path / "broken" / name, tmp_path / "whole" / name

    def newest() -> int:
        steps = (broken / "checkpoints").glob("[0-9]*")
        return max((int(p.name) for p in steps if p.name.isdigit()), default=0)

    def saving_after(step: int):
        return lambda: newest() >= step and any((broken / "checkpoints").glob("*tmp*"))

    with _started(whole.parent, method):
        # While it starts; while a checkpoint is written.
        for moment in ((broken / "config.json").exists, saving_after(8)):
            with _started(broken.parent, method) as process:
                _kill_when(process, moment)
        assert 8 <= newest() < 20
        assert not (broken / "result.json").exists()
        with _started(broken.parent, method):
            pass  # it goes on to its end
    final = "final.safetensors"
    assert (broken / final).read_bytes() == (whole / final).read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (broken, whole)]
    for key in ("losses", "evaluations", "steps"):
        assert results[0][key] == results[1][key]
    lines = (broken.parent / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [results[0]]


def test_a_full_disk_stops_the_run_and_it_goes_on_afterwards(tmp_path, capsys, monkeypatch):
    flags = tiny(tmp_path, train_examples=16)
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        assert finetune.main(flags) == 2
    error = capsys.readouterr().err
    assert "could not write the checkpoint of step 2 (No space left on device)" in error
    assert "Make room" in error
    assert "Traceback" not in error
    folder = tmp_path / "pydoc-tiny-full-lr0.0001-seed0"
    assert not (folder / "result.json").exists()
    assert finetune.main(flags) == 0
    assert (folder / "result.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_for_good(tmp_path, capsys, monkeypatch):
    flags = tiny(tmp_path, learning_rates="1e-3,1e38", checkpoint_every=1, train_examples=32)
    assert finetune.main(flags) == 1
    shown = capsys.readouterr()
    assert re.search(r"loss is (nan|inf) at step 3 of 4; try lower --learning-rates", shown.err)
    assert "1/1 diverged" in shown.out
    folder = tmp_path / "pydoc-tiny-full-lr1e+38-seed0"
    result = json.loads((folder / "result.json").read_text())
    assert result["diverged"] == 3
    assert result["final"] is None
    assert len(result["losses"]) == result["steps"] == 2
    assert not (folder / "final.safetensors").exists()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    # It is not made again, and still fails.
    monkeypatch.setattr("experiments.finetune.run.train", None)
    assert finetune.main(flags) == 1
    again = capsys.readouterr()
    assert again.err == shown.err
    assert "diverged, nothing to do" in again.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"methods": "lorapro"}, "unknown method 'lorapro'; did you mean 'lorapro-"),
        ({"methods": "full,full"}, "--methods full,full names full twice"),
        ({"model": "minilmm"}, "unknown model 'minilmm'; did you mean 'minilm'"),
        ({"task": "mrcp"}, "unknown task 'mrcp'; did you mean 'mrpc'"),
        (
            {"learning_rates": "0"},
            "--learning-rates 0.0 is out of range; choose a number",
        ),
        ({"learning_rates": "1e-4,-1"}, "--learning-rates -1.0 is"),
        ({"learning_rates": "nan"}, "--learning-rates nan is out of range;"),
        ({"learning_rates": "inf"}, "--learning-rates inf is out of range;"),
        ({"head_learning_rate": "nan"}, "--head-learning-rate"),
        ({"rank": "0"}, "--rank 0 is out of range; choose a number from 1 to"),
        ({"epochs": "0"}, "--epochs"),
        ({"warmup_ratio": "1"}, "--warmup-ratio"),
        ({"clip_norm": "nan"}, "--clip-norm"),
        ({"dropout": "1"}, "--dropout"),
        ({"checkpoint_every": "-1"}, "--checkpoint-every"),
        ({"train_examples": "1000000"}, "1000000 examples asked for, the split has"),
    ],
)
def test_bad_values_are_named_with_what_to_do(tmp_path, capsys, flags, message):
    assert finetune.main(tiny(tmp_path, **flags)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--method", "full"], "--methods"), (["--seeds", "one"], "invalid literal")],
)
def test_unknown_flags_and_unreadable_values_are_usage_errors(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        finetune.main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_command_stands_for_the_grid_of_its_lists():
    command = Command(methods=("lora", "full"), learning_rates=(1e-4, 1e-3), seeds=(0, 1))
    found = grid.runs(command)
    assert len({run.folder_name for run in found}) == len(found) == 8
    assert {run.epochs for run in found} == {grid.EPOCHS["pydoc"]}
    assert set(config.RATES) == set(METHODS)
    own = grid.runs(dataclasses.replace(command, learning_rates=None, seeds=(0,)))
    assert [(run.method, run.learning_rate) for run in own] == [("lora", 3e-3), ("full", 1e-4)]
    (run,) = grid.runs(dataclasses.replace(command, task="mrpc", methods=("lora",),
                                             learning_rates=(1e-4,), seeds=(0,)))  # fmt: skip
    assert run.epochs == grid.PAPER_EPOCHS
    assert (run.scale, dataclasses.replace(run, rslora=True).scale) == (2.0, 16 / 8**0.5)


def test_the_rate_warms_up_and_falls_to_zero_along_a_cosine():
    rate = methods.schedule(run_config(warmup_ratio=0.03), 1e-3, 200)
    got = np.array([rate(step) for step in range(201)])
    warm = 6
    expected = [
        1e-3 * step / warm
        if step < warm
        else 1e-3 * (1 + np.cos(np.pi * (step - warm) / (200 - warm))) / 2
        for step in range(201)
    ]
    np.testing.assert_allclose(got, expected, atol=1e-9)
    assert np.isfinite(methods.schedule(run_config(), 1e-3, 1)(0))  # a run of one step


def _products(jaxpr) -> set[tuple]:
    """(shape, length of the contraction) of all matrix products in a jaxpr and those inside it."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
            found.add((equation.outvars[0].aval.shape, *lengths))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= _products(inner)
    return found


@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_gradient_of_a_frozen_weight_is_computed(method):
    run = run_config(method=method)
    setup, params = prepare.build(run, prepare.load_data(run, None))
    batch = setup.batches[0]

    def loss(params):
        key = setup.varied.key
        return programs.loss_fn(params, setup.programs.graph, setup.frozen, batch, 0, key)

    rows = batch["tokens"].size
    # A weight's gradient xᵀ g has the weight's shape and sums over the rows of the batch.
    gradients = {((32, 32), rows), ((32, 64), rows), ((64, 32), rows)}
    computed = {
        (shape if shape in ((32, 32), (32, 64), (64, 32)) else shape[::-1], *lengths)
        for shape, *lengths in _products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    }
    assert gradients & computed == (gradients if method == "full" else set())


def test_clipping_comes_before_the_method():
    run = run_config(method="full", clip_norm=0.5)
    params = {"w": np.zeros(2, np.float32)}
    grads = {"w": np.array([3.0, 4.0], np.float32)}
    state = methods.optimizer(run, 10).init(params)
    _, state = methods.optimizer(run, 10).update(grads, state, params)
    (mu,) = [x.mu for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
             if hasattr(x, "mu")]  # fmt: skip
    np.testing.assert_allclose(mu["w"], (1 - run.b1) * 0.5 * grads["w"] / 5, rtol=1e-6)
    assert optax.tree.norm(mu) <= (1 - run.b1) * run.clip_norm * (1 + 1e-6)


def _losses(run: RunConfig, numbers: list[int]) -> list[float]:
    setup, params = prepare.build(run, prepare.load_data(run, None))
    rest = (params, setup.programs.graph, setup.frozen, setup.batches[0])
    loss = jax.jit(lambda number: programs.loss_fn(*rest, number, setup.varied.key))
    return [float(loss(number)) for number in numbers]


def test_dropout_is_drawn_from_seed_and_step():
    first, second, again = _losses(run_config(dropout=0.5), [0, 1, 0])
    assert first == again != second
    assert _losses(run_config(dropout=0.5), [1]) == [second]
    without = _losses(run_config(), [0, 1])
    assert without[0] == without[1] != first


def test_a_curve_is_thinned_by_means():
    losses = np.random.default_rng(0).normal(size=950).tolist()
    points = np.array(thinned(losses, 200))
    assert len(points) == 200
    assert points[-1, 0] == 950
    lengths = np.diff(np.concatenate([[0], points[:, 0]]))
    assert np.sum(lengths * points[:, 1]) == pytest.approx(np.sum(losses))
    assert thinned([1.0, 2.0], 200) == [[1, 1.0], [2, 2.0]]


def test_a_length_is_compiled_for_only_where_it_saves_more_padding():
    short = np.full(100_000, 10)
    assert prepare.lengths(run_config(max_length=128), short)[0] == 16
    few = np.array([10] * 64 + [60] * 64)
    assert prepare.lengths(run_config(max_length=128), few) == (64, 128)
    assert prepare.lengths(run_config(max_length=40), np.arange(200))[-1] == 40
    many = np.tile(np.arange(1, 129), 10_000)
    assert prepare.lengths(run_config(max_length=128), many) == BUCKETS[:6]


def test_subsets_are_seeded_and_nested_in_the_split():
    assert prepare.subset(10, 0, 0) == list(range(10))
    assert prepare.subset(100, 20, 1) == prepare.subset(100, 20, 1) != prepare.subset(100, 20, 2)
    assert set(prepare.subset(100, 20, 1)) <= set(range(100))


@pytest.mark.slow
def test_a_t5_is_fine_tuned_end_to_end(tmp_path):
    """Without adapters: `test_smoke_goes_the_whole_way_without_a_file`."""
    flags = {"methods": "lorapro-adamw", "learning_rates": "1e-2", "model": "t5-tiny"}
    assert finetune.main(tiny(tmp_path, **flags, diagnose_every=4)) == 0
    (record,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert record["losses"][-1][1] < record["losses"][0][1] / 2  # of a vocabulary of hundreds
    assert set(record["final"]) == {"accuracy", "f1", "matthews", "loss"}
    assert len(record["diagnostics"]) == 2
    folder = tmp_path / "pydoc-t5-tiny-lorapro-adamw-lr0.01-seed0"
    trained = safetensors.numpy.load_file(folder / "final.safetensors")
    assert {path.rsplit("/", 1)[-1] for path in trained} == {"lora_a", "lora_b"}
    assert len(trained) == 2 * (2 * 6 + 2 * 10)  # of the encoder's and the decoder's linears


@pytest.mark.slow
def test_weights_of_a_t5_are_read_from_their_folder(tmp_path):
    model, folder = t5_tiny.load(None, rngs=nnx.Rngs(3)), tmp_path / "weights"
    t5_files.save(model, folder, t5_tiny.tokenizer())
    flags = {"methods": "lora", "learning_rates": "1e-2", "train_examples": 16}
    argv = [
        *tiny(tmp_path / "out", **flags),
        "--model",
        "t5",
        "--weights",
        str(folder),
    ]
    assert finetune.main(argv) == 0
    (record,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    frozen = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    assert record["frozen_bytes"] == frozen


def test_weights_are_refused_where_they_mean_nothing(tmp_path, capsys):
    assert finetune.main([*tiny(tmp_path), "--weights", "t5-small"]) == 2
    assert (
        "--weights t5-small is for --model llama or t5; tiny has its own" in capsys.readouterr().err
    )
    assert finetune.main([*tiny(tmp_path), "--model", "t5", "--weights", str(tmp_path)]) == 2
    assert "does not exist; in the folder there is" in capsys.readouterr().err


def test_the_papers_set_up_is_the_t5_configs():
    """PAPER.md, "Set-up of that table"."""
    command = grid.read(["--config", "t5_glue", "--task", "mrpc"], "finetune")
    run = grid.runs(command)[0]
    assert (run.model, run.task, run.epochs, command.seeds) == ("t5", "mrpc", 1, (0, 1, 2))
    assert (run.batch_size, run.max_length, run.warmup_ratio) == (32, 128, 0.03)
    assert (run.rank, run.alpha, run.scale, run.dropout) == (8, 16, 2.0, 0.0)
    assert (run.b1, run.b2, run.eps, run.weight_decay, run.clip_norm) == (0.9, 0.999, 1e-8, 0, 1)
    assert {one.learning_rate for one in grid.runs(command)} == {1e-4}
    assert {one.method for one in grid.runs(command)} == set(OURS.values())
    assert (run.dtype, run.train_examples, run.eval_examples) == ("float32", 0, 0)


def test_a_flag_overrides_its_configs_default():
    command = grid.read(["--rank", "4", "--config", "t5_glue", "--seeds", "5"], "finetune")
    assert (command.rank, command.seeds, command.batch_size) == (4, (5,), 32)
    assert grid.read([], "finetune") == Command()


def test_smoke_goes_the_whole_way_without_a_file(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    flags = ["--config", "t5_glue", "--smoke", "--methods", "full"]
    assert finetune.main([*flags, "--out", str(tmp_path)]) == 0
    (record,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (record["config"]["model"], record["config"]["task"]) == ("t5-tiny", "pydoc")
    assert record["steps"] == 8
    assert (tmp_path / "pydoc-t5-tiny-loss.png").exists()
