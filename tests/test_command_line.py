"""Odd command lines: one line that says what came, what was expected and what to do; status 2."""

import io
import re
import sys
import typing

import jax
import numpy as np
import pytest
from test_finetune import tiny

from experiments import checks
from experiments.data import glue
from experiments.exits import reported
from experiments.finetune import checkpoint, config, grid, run
from experiments.finetune import command as finetune
from experiments.generate import command as generate
from experiments.pod import command as pod
from experiments.report import page
from experiments.sweep import command as sweep


@pytest.fixture(autouse=True)
def _nothing_is_built(monkeypatch):
    """What is told at the door is told before any data are read."""

    def build(*args):
        raise AssertionError("the command line was let in")

    monkeypatch.setattr(run, "load_data", build)
    monkeypatch.setattr(sweep, "load_data", build)


def error_of(capsys, main, argv) -> str:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert not shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ")
    return line


FLAGS = ["--model", "tiny", "--methods", "lora"]


@pytest.mark.parametrize("main", [finetune.main, sweep.main])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "9223372036854775808"], "choose a number from 0 to 4294967295"),
        (["--seeds", "0,4294967296"], "--seeds 4294967296 is out of range"),
        (["--lr", "1e-50"], "--learning-rates 1e-50 is out of range: float32 rounds it to 0"),
        (["--lr", "1e-40"], "float32 rounds it to 0"),  # below the least normal number
        (["--lr", "1e50"], "float32 rounds it to inf"),
        (["--head-learning-rate", "1e-50"], "--head-learning-rate 1e-50"),
        (["--b1", "0.9999999999"], "--b1 0.9999999999 is out of range: float32 rounds it to 1"),
        (["--b2", "0.9999999999"], "float32 rounds it to 1; choose a number from 0 to 0.9999999"),
        (["--eps", "1e-320"], "float32 rounds it to 0"),
        (["--clip-norm", "1e-45"], "float32 rounds it to 0"),
        (["--wd", "1e-50"], "float32 rounds it to 0"),
        (["--alpha", "1e-30"], "choose a number from 1e-09 to 1000000000"),
        (["--epochs", "1000000000000000"], "choose a number from 1 to 2147483647"),
        (["--bs", "1000000000000"], "--batch-size 1000000000000 is out of range"),
        (
            ["--lr", "0.0001,0.00010000001"],
            "names 0.0001 twice, and two runs",
        ),
        (["--config", "t5"], "unknown configuration 't5'; did you mean 't5_glue'?"),
        (["--smoke", "--task", "colla"], "unknown task 'colla'; did you mean 'cola'?"),
        (["--smoke", "--model", "minilmm"], "unknown model 'minilmm'; did you mean 'minilm' or"),
        (["--smoke", "--model", "t5x"], "unknown model 't5x'; did you mean 't5'"),
        (["--smoke", "--weights", "t5-base"], "--weights t5-base is for --model llama or t5"),
    ],
)
def test_a_bad_name_or_number_is_refused_at_the_door(capsys, tmp_path, main, flags, message):
    assert message in error_of(capsys, main, [*FLAGS, *flags, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed", "--coordinator", "node0"], "is not HOST:PORT"),
        (["--profile-steps", "0,1"], "--profile-steps 0 is out of range"),
    ],
)
def test_the_flags_of_single_runs_are_checked_too(capsys, tmp_path, flags, message):
    argv = [*FLAGS, *flags, "--out", str(tmp_path)]
    assert message in error_of(capsys, finetune.main, argv)


@pytest.mark.parametrize("kind", [config.Command, sweep.Command, pod.Settings, generate.Settings])
def test_every_number_has_a_range(kind):
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if re.search(r"\b(int|float)\b", str(hint)) and "Literal" not in str(hint):
            assert list(checks.ranges(hint)), name


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1.2e-38, 0.5, 1 - 1e-9, 1 - 1e-7, 1, 3e38, -1e-9])
def test_a_share_is_what_float32_keeps_between_0_and_1(value):
    (share,) = checks.ranges(checks.Share)
    allowed = np.finfo(np.float32).tiny <= np.float32(value) < 1
    try:
        share.check("--b1", value)
    except ValueError:
        assert not allowed
    else:
        assert allowed


def test_a_file_in_the_place_of_a_folder_is_named(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for main in (finetune.main, sweep.main):
        for out in (file, file / "below"):
            assert f"({file} is a file)" in error_of(capsys, main, [*FLAGS, "--out", str(out)])
    assert "null byte" in error_of(capsys, finetune.main, [*FLAGS, "--out", "a\0b"])
    results = ["--results", str(file / "pod.jsonl")]
    assert f"({file} is a file)" in error_of(capsys, pod.main, results)
    assert "is a folder" in error_of(capsys, pod.main, ["--results", str(tmp_path)])


@pytest.mark.parametrize("main", [finetune.main, sweep.main])
def test_the_folder_of_another_run_is_told_before_the_first_is_trained(capsys, tmp_path, main):
    argv = tiny(tmp_path, methods="full,lora")
    other = grid.runs(grid.read([*argv, "--rank", "4"], ""))[1]
    checkpoint.claim(tmp_path / other.folder_name, other)
    assert "rank: 4 there, 8 asked for" in error_of(capsys, main, argv)


def test_a_sweep_takes_the_defaults_of_a_configuration():
    argv = ["--config", "minilm_sst2", "--at-once", "3"]
    swept, alone = grid.read(argv, "", sweep.Command), grid.read(argv[:2], "")
    assert swept.at_once == 3
    assert grid.runs(swept) == grid.runs(alone)


def test_a_short_name_and_a_misspelt_one(capsys):
    command = grid.read(["--lr", "1e-3", "--bs", "4", "--wd", "0.1"], "")
    named = ["--learning-rates", "1e-3", "--batch-size", "4", "--weight-decay", "0.1"]
    assert command == grid.read(named, "")
    with pytest.raises(SystemExit, match="2"):
        grid.read(["--learningrates", "1e-3"], "")
    assert "--learning-rates" in capsys.readouterr().err.split("Perhaps you meant")[1]


def test_the_help_has_groups_and_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        grid.read(["--help"], "")
    shown = capsys.readouterr().out
    groups = re.findall(r"^\W*(\w+) options\b", shown, re.MULTILINE)
    assert groups == [
        "run", "model", "data", "answers", "search", "adapter", "optimizer", "record", "device"
    ]  # fmt: skip
    for name in typing.get_type_hints(config.Command):
        assert f"--{name.replace('_', '-')}" in shown


def test_a_terminal_that_lacks_a_character_fails_no_command(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", sys.stdout)

    @reported
    def main(argv) -> int:
        finetune.terminal().print("0.81±0.01 [/a] :+1: \udcff", soft_wrap=True)
        print("error: ±", file=sys.stderr)
        return 0

    assert main() == 0
    sys.stdout.flush()
    assert written.getvalue() == b"0.81?0.01 [/a] :+1: ?\nerror: ?\n"


def test_too_little_memory_is_told_and_our_own_faults_are_raised(capsys):
    def failing(error):
        @reported
        def main(argv) -> int:
            raise error

        return main

    for error in (MemoryError("x"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x\nmore")):
        assert "smaller --batch-size" in error_of(capsys, failing(error), None)
    with pytest.raises(RuntimeError, match="ours"):
        failing(RuntimeError("ours"))()


def test_a_download_that_fails_is_one_line(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    def builder(*args, **kwargs):
        raise LookupError("Dataset glue not found.\nAvailable datasets:\n" + "- x\n" * 250)

    monkeypatch.setattr(tfds, "builder", builder)
    with pytest.raises(OSError, match="glue not found.*pass --data-dir") as caught:
        glue.load(glue.TASKS[0])
    assert len(str(caught.value).splitlines()) == 1
    assert str(tfds.core.constants.DATA_DIR) in str(caught.value)


@pytest.mark.parametrize(
    "line", [b"\xff\n", b"{\n", b'{"kind": "finetune"}\n', b'{"kind": "finetune", "config": {}}\n']
)
def test_a_damaged_line_of_results_is_named(capsys, tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line)
    assert f"{tmp_path}/a.jsonl:1" in error_of(capsys, page.main, ["--results", str(tmp_path)])
