"""After training: PEFT files, merged models and answers, of one tiny run on a folder's weights."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from test_finetune import run_config, tiny

import lorapro_jax as lp
from experiments.finetune import checkpoint, export, trained
from experiments.finetune import command as finetune
from experiments.finetune.prepare import model_of
from experiments.generate import command as generate
from experiments.generate.writers import opened
from experiments.models import decoders, llama_files, t5_files, t5_tiny
from experiments.models.llama import Llama
from experiments.models.llama_decode import Decoding

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RANK, ALPHA, TARGETS = 3, 4.5, "q|v|down"
ADAPTED = "mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 9)))


def base_folder(folder, seed=0, **sizes):
    config = dataclasses.replace(decoders.TINY_CONFIG, **{"num_hidden_layers": 2} | sizes)
    model = Llama(config, rngs=nnx.Rngs(seed))
    llama_files.save(model, folder, decoders.tiny.dialect(None).tokenizer, TEMPLATE)
    return folder


def argv(base, folder, *flags):
    sizes = "--max-length 64 --batch-size 4 --epochs 4 --answers 0 --methods lora --lr 3e-2"
    adapter = f"--rank {RANK} --alpha {ALPHA} --targets {TARGETS}"
    data, out = str(folder / "data.jsonl"), str(folder / "out")
    given = ["--model", "llama", "--weights", str(base), "--data", data, "--validation-data", data]
    return [*given, *sizes.split(), *adapter.split(), "--out", out, *flags]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(the base's folder, a run's folder with merged/ and peft/)."""
    folder = tmp_path_factory.mktemp("export")
    base = base_folder(folder / "base")
    lines = [json.dumps({"prompt": f"say {c}", "completion": 9 * c}) for c in "abcdefgh"]
    (folder / "data.jsonl").write_text("\n".join(lines))
    assert finetune.main(argv(base, folder, "--export", "merged")) == 0
    (run,) = (folder / "out").glob("*/")
    with pytest.MonkeyPatch.context() as patched:  # complete, it is exported without training
        patched.setattr("experiments.finetune.run.train_run", None)
        assert finetune.main(argv(base, folder, "--export", "peft")) == 0
    return base, run


@nnx.jit
def logits(model):
    return model(TOKENS)


def forward(folder):
    return np.asarray(logits(llama_files.load(folder)))


def by_hand(base, run):
    """The base with s a b of lora_config.json and final.safetensors added in float64."""
    about = json.loads((run / "lora_config.json").read_text())
    factors = safetensors.numpy.load_file(run / "final.safetensors")
    model = llama_files.load(base)
    for name in TARGETS.split("|"):
        a, b = (factors[f"llama/layers/{name}/lora_{x}"].astype(np.float64) for x in "ab")
        for i, layer in enumerate(model.layers):
            kernel = np.asarray(getattr(layer, name).kernel[...], np.float64)
            getattr(layer, name).kernel[...] = jnp.asarray(
                kernel + about["scale"] * a[i] @ b[i], jnp.float32
            )
    return model


def test_lora_config_says_what_the_adapters_are(tuned):
    base, run = tuned
    about = json.loads((run / "lora_config.json").read_text())
    assert about == {
        "rank": RANK, "alpha": ALPHA, "rslora": False, "scale": 1.5, "targets": TARGETS,
        "layout": {
            "weight": "kernel + scale lora_a @ lora_b", "kernel": "layers in out",
            "LINEAR/lora_a": "layers in rank", "LINEAR/lora_b": "layers rank out",
        },
        "model": "llama", "weights": str(base), "method": "lora",
    }  # fmt: skip
    assert "export" not in json.loads((run / "config.json").read_text())


def test_lora_config_is_there_before_the_first_step(tmp_path, monkeypatch):
    def stop(run, session, folder, title):
        written = json.loads((folder / "lora_config.json").read_text())
        assert (written["targets"], written["layout"]["kernel"]) == ("all", "in out")
        raise ValueError("stopped")

    monkeypatch.setattr("experiments.finetune.run.train_run", stop)
    assert finetune.main(tiny(tmp_path, methods="lora", targets="all")) == 2
    assert finetune.main(tiny(tmp_path, methods="full")) == 2
    assert len(list(tmp_path.glob("*/lora_config.json"))) == 1


def test_the_merged_model_computes_base_and_product_summed_in_float64(tuned):
    base, run = tuned
    merged, plain = forward(run / "merged"), forward(base)
    expected = np.asarray(logits(by_hand(base, run)))
    np.testing.assert_allclose(merged, expected, atol=1e-4)
    assert np.abs(merged - plain).max() > 0.1
    names = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {path.name for path in (run / "merged").iterdir()} == names
    assert (run / "merged/chat_template.jinja").read_text() == TEMPLATE


def test_peft_s_files_have_hugging_face_s_names_and_orientation(tuned):
    base, run = tuned
    about = json.loads((run / "peft/adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["use_rslora"]) == (RANK, ALPHA, False)
    assert about["rank_pattern"] == about["alpha_pattern"] == {}
    assert (about["task_type"], about["base_model_name_or_path"]) == ("CAUSAL_LM", str(base))
    modules = [f"model.layers.{i}.{name}" for i in range(2) for name in ADAPTED]
    assert about["target_modules"] == modules
    tensors = safetensors.numpy.load_file(run / "peft/adapter_model.safetensors")
    assert len(tensors) == 2 * len(modules)
    found = safetensors.numpy.load_file(run / "final.safetensors")
    for i in range(2):
        name = f"base_model.model.model.layers.{i}.mlp.down_proj"
        for x in "ab":
            theirs = tensors[f"{name}.lora_{x.upper()}.weight"]
            np.testing.assert_array_equal(theirs.T, found[f"llama/layers/down/lora_{x}"][i])


def test_run_peft_and_merged_write_the_same_answer(tuned, capsys):
    base, run = tuned
    said = {}
    for folder in (run, run / "peft", run / "merged", base):
        flags = ["--prompt", "say b", "--max-new-tokens", "12"]
        assert generate.main(["--adapter", str(folder), *flags]) == 0
        said[folder] = capsys.readouterr().out
    assert said[run] == said[run / "peft"] == said[run / "merged"] != said[base]


def test_prompts_are_asked_in_order_and_printed_above_their_answers(
    tuned, tmp_path, capsys, monkeypatch
):
    def answers(writer, rows, decoding):
        assert decoding == Decoding(7, beams=2)
        return map(writer.dialect.tokenizer.decode, rows)

    monkeypatch.setattr(generate, "answers", answers)
    (file := tmp_path / "prompts.txt").write_text("say b\nsay c\n")
    flags = ["--model", str(tuned[0]), "--max-new-tokens", "7", "--beams", "2"]
    flags += ["--prompt", "say a", "--prompts-file", str(file)]
    assert generate.main([*flags, "--plain"]) == 0
    said = [f"> say {c}\nsay {c}\n\n\n" for c in "abc"]
    assert capsys.readouterr().out == "".join(said)
    assert generate.main(flags) == 0
    assert "> say a\n[user]say a\n[assistant]\n\n" in capsys.readouterr().out


def test_an_adapter_of_several_ranks_and_scales_is_stacked(tuned, tmp_path):
    base, _ = tuned
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    lora = {
        "q": {"lora_a": draw(32, 2), "lora_b": draw(2, 32)},
        "up": {"lora_a": draw(32, 5), "lora_b": draw(5, 48)},
    }
    modules = {"q": "model.layers.1.self_attn.q_proj", "up": "model.layers.0.mlp.up_proj"}
    scales = {"q": 0.3, "up": 2.0}
    lp.peft.save(tmp_path, lora, scales.__getitem__, modules=modules)
    model = llama_files.load(base)
    for name, layer in (("q", 1), ("up", 0)):
        kernel = getattr(model.layers[layer], name).kernel
        kernel[...] += scales[name] * lora[name]["lora_a"] @ lora[name]["lora_b"]
    found = logits(opened(tmp_path, str(base)).model)
    np.testing.assert_allclose(found, logits(model), atol=1e-4)
    with pytest.raises(ValueError, match="does not say which model it was trained on"):
        opened(tmp_path, None)
    other = base_folder(tmp_path / "wide", intermediate_size=64)
    with pytest.raises(
        ValueError, match="goes from 32 to 48 features, in this model from 32 to 64"
    ):
        opened(tmp_path, str(other))
    other = base_folder(tmp_path / "flat", num_hidden_layers=1)
    with pytest.raises(ValueError, match="is no linear of this model's 1 layers"):
        opened(tmp_path, str(other))


def complete(folder, run):
    """Makes the folder that of a complete run, with random parameters; returns them."""
    rng = np.random.default_rng(1)
    _, params, _ = model_of(run)
    leaves = zip(trained.names_of(params), jax.tree.leaves(params), strict=True)
    arrays = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in leaves}
    checkpoint.claim(folder, run)
    safetensors.numpy.save_file(arrays, folder / "final.safetensors")
    return arrays


def test_full_fine_tuning_is_merged_already(tmp_path):
    run = run_config(model="llama-tiny", task="docstrings", method="full")
    arrays = complete(tmp_path, run)
    saved = llama_files.load(export.export(run, tmp_path, "merged"), scanned=True)
    state = nnx.as_pure(nnx.state(saved, nnx.Param))
    for name, x in zip(trained.names_of(state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, arrays[f"llama/{name}"])


def test_a_t5_is_exported_too(tmp_path):
    run = run_config(model="t5-tiny", task="pydoc", method="lora", rslora=True)
    arrays = complete(tmp_path, run)
    merged = t5_files.load(export.export(run, tmp_path, "merged"))
    tensors = safetensors.numpy.load_file(
        export.export(run, tmp_path, "peft") / "adapter_model.safetensors"
    )
    assert len(tensors) == len(arrays)
    key = "base_model.model.decoder.block.1.layer.1.EncDecAttention.v.lora_A.weight"
    a, b = (arrays[f"t5/decoder/layers/1/cross_attention/v/lora_{x}"] for x in "ab")
    np.testing.assert_array_equal(tensors[key].T, a)
    before = model_of(run)
    kernel = nnx.merge(*before).t5.decoder.layers[1].cross_attention.v.kernel[...]
    after = merged.decoder.layers[1].cross_attention.v.kernel[...]
    np.testing.assert_allclose(after, kernel + run.scale * a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ("org/name@0123", ("org/name", "0123")),
        ("{folder}", ("{folder}", None)),
        ("{folder}/../{name}", ("{folder}", None)),
    ],
)
def test_peft_is_told_where_the_base_is(tmp_path, weights, told):
    fill = {"folder": str(tmp_path), "name": tmp_path.name}
    run = run_config(model="llama", weights=weights.format(**fill), task="docstrings")
    assert export.base_of(run) == tuple(x and x.format(**fill) for x in told)


def test_nothing_is_left_of_an_export_that_failed(tmp_path, monkeypatch):
    run = run_config(model="llama-tiny", task="docstrings", method="lora")
    complete(tmp_path, run)
    before = sorted(tmp_path.iterdir())

    def fail(model, run, folder):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setitem(export._WRITERS, "peft", fail)
    with pytest.raises(OSError, match="could not write the peft files of the run"):
        export.export(run, tmp_path, "peft")
    assert sorted(tmp_path.iterdir()) == before
    (left := tmp_path / "peft.0123.partial").mkdir()  # by a SIGKILL
    (left / "half").write_text("")
    checkpoint.claim(tmp_path, run)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"methods": "lora", "export": "merged"},
            "has no place for the fresh head of --model tiny",
        ),
        (
            {"methods": "lora,full", "model": "llama-tiny", "export": "peft"},
            "writes adapters, and method full has none; leave it out",
        ),
        (
            {"methods": "lora", "model": "llama-tiny", "export": "peft", "out": "gs://b/o"},
            "--export peft writes to a disk, not to gs://b/o",
        ),
    ],
)
def test_what_cannot_be_exported_is_told_before_training(tmp_path, capsys, flags, message):
    assert finetune.main(tiny(flags.pop("out", tmp_path), **flags)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_answer_are_told_apart(tuned, tmp_path, capsys):
    _, run = tuned

    def error(folder, *flags):
        given = flags or ("--prompt", "say a")
        assert generate.main(["--adapter", str(folder), *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--adapter /nowhere is no folder" in error("/nowhere")
    (empty := tmp_path / "empty").mkdir()
    assert "config.json does not exist; in the folder there is nothing" in error(empty)
    checkpoint.claim(tmp_path / "encoder", run_config())
    assert "is a run of tiny, which writes no texts" in error(tmp_path / "encoder")
    checkpoint.claim(tmp_path / "begun", run_config(model="llama-tiny", task="docstrings"))
    assert "the run is not complete" in error(tmp_path / "begun")
    damaged = shutil.copytree(run, tmp_path / "damaged")
    os.truncate(damaged / "final.safetensors", 1000)
    assert "final.safetensors (1000 bytes) is damaged" in error(damaged)
    safetensors.numpy.save_file({"x": np.zeros(2)}, damaged / "final.safetensors")
    assert "are not those of the run" in error(damaged)
    (damaged / "config.json").write_text('{"method": "lora", "colour": 1}')
    assert "no configuration of this version's runs" in error(damaged)
    (damaged / "config.json").write_text("{")
    assert "is not the configuration of a run or a model" in error(damaged)
    (damaged / "peft/adapter_config.json").write_text("{")
    assert "adapter_config.json is not an adapter's configuration" in error(damaged / "peft")
    assert "leave --model out" in error(run, "--model", "x", "--prompt", "say a")


def test_prompts_that_cannot_be_answered_are_named(tuned, tmp_path, capsys):
    base, _ = tuned
    (file := tmp_path / "prompts.txt").write_text("say a\n\n")

    def error(*flags):
        assert generate.main(["--model", str(base), *flags]) == 2
        return capsys.readouterr().err

    assert "there is no prompt; give" in error()
    assert "--prompt is empty" in error("--prompt", " ")
    assert "prompts.txt, line 2 is empty" in error("--prompts-file", str(file))
    file.write_bytes(b"say \xff")
    assert "prompts.txt is no text in UTF-8" in error("--prompts-file", str(file))
    assert "No such file" in error("--prompts-file", str(tmp_path / "none"))
    asked = ["--prompt", "a", "--max-new-tokens"]
    assert "prompt 1 has 20 tokens; with --max-new-tokens 1020" in error(*asked, "1020")
    assert "prompt 1 has 2 tokens" in error(*asked, "1023", "--plain")
    assert "--max-new-tokens 0 is out of range" in error(*asked, "0")


# ---------------------------------------------------------------- read by transformers and PEFT


@pytest.fixture
def hf():
    """(torch, transformers, peft), all offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return tuple(
        pytest.importorskip(name, reason=f"{name} is not installed")
        for name in ("torch", "transformers", "peft")
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_and_peft_compute_the_same_logits(tuned, hf):
    torch, transformers, peft = hf
    _, run = tuned
    ours = forward(run / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained
    models = {
        "merged": whole(run / "merged", dtype=torch.float32),
        "peft": peft.AutoPeftModelForCausalLM.from_pretrained(run / "peft", dtype=torch.float32),
    }
    for name, model in models.items():
        with torch.no_grad():
            theirs = model.eval()(torch.tensor(np.array(TOKENS))).logits.numpy()
        np.testing.assert_allclose(theirs, ours, atol=1e-4, err_msg=name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "merged")
    text = "def f(x):\n    return 'é' + x  # <|end|>"
    assert tokenizer.encode(text) == llama_files.tokenizer(run / "merged").encode(text).ids
    chat = [{"role": "user", "content": "say b"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "[user]say b<|end|>\n[assistant]"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_and_peft_compute_the_same_logits_of_a_t5(tmp_path, hf):
    torch, transformers, peft = hf
    base = t5_tiny.load(None, rngs=nnx.Rngs(3))
    t5_files.save(base, tmp_path / "base", t5_tiny.tokenizer())
    run = run_config(model="t5", task="pydoc", weights=str(tmp_path / "base"))
    (folder := tmp_path / "run").mkdir()
    complete(folder, run)
    paths = [export.export(run, folder, kind) for kind in ("merged", "peft")]
    models = (
        transformers.AutoModelForSeq2SeqLM.from_pretrained(paths[0], dtype=torch.float32),
        peft.AutoPeftModelForSeq2SeqLM.from_pretrained(paths[1], dtype=torch.float32),
    )
    tokens = torch.tensor(np.random.default_rng(4).integers(3, 99, (2, 7)))
    with torch.no_grad():
        merged, adapted = (x.eval()(tokens, decoder_input_ids=tokens).logits for x in models)
    np.testing.assert_allclose(merged, adapted, atol=1e-4 * float(abs(merged).max()))
