"""Language models in the training loop: what is learnt, its loss, answers before and after."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from scipy import special

from experiments.data.language import Exchange, question
from experiments.finetune import command as finetune
from experiments.finetune import config, grid, language, prepare
from experiments.finetune.methods import METHODS
from experiments.models import decoders, exchanges, llama_files
from experiments.models.language import CHUNK, LanguageModel
from experiments.models.llama import Llama
from experiments.report import samples
from experiments.sweep import command as sweep

ROOT = pathlib.Path(__file__).parents[1]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DIALECT = decoders.tiny.dialect(None)
TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3 + 3?"},
    {"role": "assistant", "content": "6"},
)


def said(tokens) -> str:
    return DIALECT.tokenizer.decode(list(tokens), skip_special_tokens=False)


def row(messages, template=None) -> exchanges.Row:
    exchange = Exchange(tuple(messages), ("",), 0)
    return exchanges.tokenised([exchange], DIALECT._replace(template=template))[0]


def learnt(found: exchanges.Row) -> str:
    return said(t for t, segment in zip(found.tokens, found.segments, strict=True) if segment)


def test_the_answers_and_their_end_are_learnt_and_nothing_else():
    found = row(TALK, CHAT)
    assert learnt(found) == "4<end>6<end>"
    text = "<system>Be brief.<end>\n<user>2 + 2?<end>\n<assistant>4<end>\n<user>3 + 3?<end>\n"
    assert said(found.tokens) == text + "<assistant>6<end>"
    assert said(found.tokens[: found.prompt]) == text + "<assistant>"


def test_without_a_template_messages_are_lines_and_the_end_token_closes_an_answer():
    found = row(TALK)
    assert learnt(found) == f"4{decoders.END}6{decoders.END}"
    assert said(found.tokens[: found.prompt]) == f"Be brief.\n2 + 2?\n4{decoders.END}\n3 + 3?\n"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",  # not a prefix
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",  # none of it
    ],
)
def test_a_template_that_hides_the_answers_is_refused(template):
    with pytest.raises(ValueError, match="what is to be learnt cannot be told"):
        row(TALK, template)


def test_rows_that_are_too_long_are_left_out_and_counted():
    rows = [question("a" * n, "b", ["b"], n) for n in (1, 30, 3)]
    found = language.encode_exchanges(rows, DIALECT, 10)
    assert found.ids.tolist() == [1, 3]
    assert found.lengths.tolist() == [4, 6]  # with the line break and the end
    with pytest.raises(ValueError, match="all 3 examples have more than --max-length 3 tokens"):
        language.encode_exchanges(rows, DIALECT, 3)


def test_prompts_are_different_and_leave_room():
    rows = [question(text, "b", ["b", "c"], 0) for text in ("one", "one", "much too long", "two")]
    found = language.prompts_of(rows, DIALECT, 2, 8)
    assert [prompt.text for prompt in found] == ["one", "two"]
    assert found[0].references == ("b", "c")
    about = language.LanguageTask("x", 4, lambda *_: {}), language.Decoding(4)
    questions = language.questions_of(found, DIALECT, *about, 4, 1, 2)
    assert [batch["tokens"].shape for batch in questions.batches] == [(2, 32)]
    assert said(questions.batches[0]["tokens"][0][-4:]) == "two\n"  # the last fills the batch up


@pytest.mark.parametrize("length", [5, CHUNK + 5])
def test_the_loss_is_the_cross_entropy_of_the_learnt_tokens(length):
    model = LanguageModel(Llama(decoders.TINY_CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 257, (3, length)).astype(np.int32)
    mask = np.arange(length) < np.array([[length], [4], [2]])
    segments = (rng.random((3, length)) < 0.5).astype(np.int32)
    logits = np.asarray(nnx.jit(model.llama)(tokens), np.float64)
    logs = special.log_softmax(logits, axis=-1)
    sums, counts = np.zeros(3), np.zeros(3)
    for r in range(3):
        for t in range(1, length):
            if mask[r, t] and segments[r, t]:
                sums[r] -= logs[r, t - 1, tokens[r, t]]
                counts[r] += 1
    found = np.asarray(nnx.jit(model)(tokens, mask, segments))
    np.testing.assert_allclose(found, np.stack([sums, counts], axis=1), rtol=2e-5, atol=1e-5)
    model.label_smoothing = 0.25
    losses, weights = map(np.asarray, nnx.jit(LanguageModel.losses)(model, tokens, mask, segments))
    smoothed = np.full((257, 257), 0.25 / 257) + 0.75 * np.eye(257)
    expected = -np.sum(smoothed[np.roll(tokens, -1, axis=1)] * logs, axis=-1)
    np.testing.assert_allclose(losses * weights, expected * weights, rtol=2e-5, atol=1e-5)
    scores = language.loss_scores(found, np.zeros(3))
    assert scores["loss"] == pytest.approx(sums.sum() / counts.sum(), rel=2e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]))


TINY_FLAGS = "--model llama-tiny --max-length 160 --batch-size 4 --epochs 2 --eval-examples 40"
ANSWERS = "--train-examples 80 --answers 3 --max-new-tokens 4"
FAST = "lora,lorapro-factored"


def flags(out, *others) -> list[str]:
    return [*TINY_FLAGS.split(), *ANSWERS.split(), "--out", str(out), *others]


def results(out) -> dict[str, dict]:
    lines = (out / "results.jsonl").read_text().splitlines()
    return {result["config"]["method"]: result for result in map(json.loads, lines)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two methods, at a rate at which both learn."""
    out = tmp_path_factory.mktemp("language")
    assert finetune.main(flags(out, "--methods", FAST, "--learning-rates", "1e-2")) == 0
    return out


def test_methods_learn_from_the_same_start(trained):
    _check_learning(trained)


@pytest.mark.slow
def test_every_method_learns(trained):
    given = ["--methods", ",".join(METHODS), "--learning-rates", "1e-2"]
    assert finetune.main(flags(trained, *given)) == 0
    assert set(results(trained)) == set(METHODS)
    _check_learning(trained)


def _check_learning(out):
    found = results(out)
    before = {result["evaluations"][0]["loss"] for result in found.values()}
    assert max(before) - min(before) < 1e-5
    for name, result in found.items():
        first, *_, last = result["evaluations"]
        assert first["step"] == 0, name
        assert last["loss"] < first["loss"] - 0.05, name
        assert last["perplexity"] == pytest.approx(np.exp(last["loss"]))
        assert result["metric"] == "loss"
        assert result["left_out"] > 0
        assert result["optimizer_state_bytes"] > 0


def test_the_same_prompts_are_answered_before_and_after(trained):
    found = results(trained)
    written = {name: result["samples"] for name, result in found.items()}
    for name in ("prompt", "before"):
        lora, factored = ([x[name] for x in written[method]] for method in FAST.split(","))
        assert lora == factored
    assert len(written["lora"]) == 3
    assert any(x["before"] != x["after"] for x in written["lora"])
    page = (trained / "samples.md").read_text()
    assert all(x["prompt"] in page and x["after"] in page for x in written["lora"])


def test_runs_with_other_prompts_are_shown_apart(trained):
    more = list(results(trained).values())
    fewer = more[0] | {"samples": more[0]["samples"][:1]}
    assert [len(alike) for alike in samples.chosen([*more, fewer])] == [2, 1]
    assert samples.markdown([*more, fewer]).count("### Prompt 1\n") == 2


def test_a_run_that_was_cut_goes_on_to_the_same_end(trained, tmp_path):
    name = next(trained.glob("*-lorapro-factored-*")).name
    given = flags(tmp_path, "--methods", "lorapro-factored", "--learning-rates", "1e-2")
    stopped = json.loads((trained / name / "result.json").read_text())["steps"] - 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("experiments.finetune.command.noticed", lambda: _stops_at(stopped))
        assert finetune.main(given) != 0
    assert finetune.main(given) == 0
    left, right = ((out / name / "final.safetensors").read_bytes() for out in (trained, tmp_path))
    assert left == right
    assert (
        results(tmp_path)["lorapro-factored"]["samples"]
        == (results(trained)["lorapro-factored"]["samples"])
    )


class _stops_at:  # noqa: N801
    def __init__(self, step):
        self.step = step

    def __enter__(self):
        return lambda step: step == self.step

    def __exit__(self, *_):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["1", "2"])
def test_two_devices_learn_and_write_what_one_does(trained, tmp_path, fsdp):
    given = ["--methods", "lorapro-factored", "--learning-rates", "1e-2"]
    argv = flags(tmp_path, *given, "--devices", "2", "--fsdp", fsdp)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-m", "experiments.finetune", *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (results(out)["lorapro-factored"] for out in (trained, tmp_path))
    assert two["devices"] == 2
    assert two["final"]["loss"] == pytest.approx(one["final"]["loss"], abs=1e-3)
    before = [[sample["before"] for sample in result["samples"]] for result in (one, two)]
    assert before[0] == before[1]


@pytest.mark.slow
def test_runs_of_a_sweep_have_the_losses_they_have_alone(trained, tmp_path):
    given = flags(tmp_path, "--methods", "lora", "--learning-rates", "1e-3,1e-2")
    assert sweep.main(given) == 0
    lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    loss = {line["config"]["learning_rate"]: line["final"]["loss"] for line in lines}
    assert loss[1e-2] == pytest.approx(results(trained)["lora"]["final"]["loss"], abs=1e-4)
    assert loss[1e-3] > loss[1e-2]


def test_a_file_of_ones_own_is_learnt_and_belongs_to_the_run(capsys, tmp_path):
    file = tmp_path / "my.jsonl"
    lines = [json.dumps({"prompt": f"Say {n}.", "completion": "yes" * 3}) for n in range(40)]
    file.write_text("\n".join(lines))
    given = [*flags(tmp_path / "out", "--data", str(file), "--methods", "lora"), "--bs", "4"]
    given[given.index("--train-examples") + 1] = "0"
    given[given.index("--eval-examples") + 1] = "0"
    assert finetune.main(given) == 0
    (result,) = results(tmp_path / "out").values()
    assert result["config"]["task"] == "data"
    assert result["train_examples"] == 36
    assert result["final"]["loss"] < result["evaluations"][0]["loss"]
    file.write_text("\n".join([*lines, lines[0]]))
    assert finetune.main(given) == 2
    assert "data_sha256" in capsys.readouterr().err
    file.write_text("\n".join([*lines, "{}"]))
    shutil.rmtree(tmp_path / "out")
    assert finetune.main(given) == 2
    assert f"{file}:41" in capsys.readouterr().err


def test_a_quantised_base_is_learnt_on_in_a_fraction_of_its_bytes(trained, tmp_path):
    given = ["--methods", "lora", "--learning-rates", "1e-2", "--quantize", "nf4"]
    assert finetune.main(flags(tmp_path, *given, "--export", "merged")) == 0
    (result,) = results(tmp_path).values()
    dense = results(trained)["lora"]
    assert result["final"]["loss"] < result["evaluations"][0]["loss"] - 0.05
    assert result["final"]["loss"] == pytest.approx(dense["final"]["loss"], abs=0.3)
    kernels = 3 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)  # of three layers
    saved = dense["frozen_bytes"] - result["frozen_bytes"]
    assert saved == kernels * 4 - kernels // 2 - kernels // decoders.TINY_TILE * 4
    (folder,) = tmp_path.glob("*/merged")
    assert llama_files.load(folder).layers[0].q.kernel.shape == (32, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods", "full", "--quantize", "nf4"], "which --quantize nf4 holds as integers"),
        (["--model", "tiny", "--quantize", "int8"], "tiny is none"),
        (["--task", "sst2"], "--task sst2 is not for --model llama-tiny, whose tasks are docstr"),
        (["--model", "tiny", "--task", "e2e"], "--task e2e is not for --model tiny"),
        (["--model", "tiny", "--data", "x.jsonl"], "--data x.jsonl is for a language model"),
        (["--task", "e2e", "--data", "x.jsonl"], "leave --task out"),
        (["--validation-data", "x.jsonl"], "goes with --data; add it"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--model", "llama"], "--model llama needs --weights"),
        (["--weights", "x"], "llama-tiny has its own"),
        (["--beams", "0"], "--beams 0 is out of range"),
        (["--max-length", "5000"], "more than the model's context, 1024 positions"),
        (["--max-length", "8"], "examples have more than --max-length 8 tokens"),
        (["--targets", "nothing"], "targets"),
        (["--model", "tiny", "--label-smoothing", "0.1"], "tiny is none"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(capsys, tmp_path, given, message):
    assert finetune.main([*flags(tmp_path), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_base_that_is_read_once_serves_every_run(monkeypatch):
    made = Llama(decoders.TINY_CONFIG, scanned=True, rngs=nnx.Rngs(0))
    monkeypatch.setattr(decoders, "_read", lambda *_, **__: nnx.split(made))
    monkeypatch.setattr(decoders, "tiny", decoders.smollm2._replace(dialect=lambda _: DIALECT))
    first, second = (decoders._load(None, rngs=nnx.Rngs(0)) for _ in range(2))
    assert first.layers.q.kernel is not second.layers.q.kernel
    first.layers.q.kernel[...] = first.layers.q.kernel[...] + 1
    assert not np.array_equal(first.layers.q.kernel[...], second.layers.q.kernel[...])


def test_smoke_of_a_language_model_is_tiny():
    command = grid.shrunk(dataclasses.replace(config.Command(), model="smollm2", smoke=True))
    run = grid.runs(command)[0]
    assert (run.model, run.task) == ("llama-tiny", "docstrings")
    assert prepare.load_data(run, None).prompts
