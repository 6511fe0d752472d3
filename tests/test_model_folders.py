"""Damaged and foreign model folders: an error that names the file, and nothing read outside it."""

import json
import re
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from experiments.models import t5, t5_files, weights

SIZES = {"vocab_size": 104, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)]  # and 100 sentinels
NAME = "encoder.block.0.layer.0.SelfAttention.q.weight"
CONFIG, INDEX, WEIGHTS = weights.CONFIG, weights.INDEX, weights.WEIGHTS


@pytest.fixture(scope="module")
def tensors():
    model = t5.T5(t5.T5Config(num_decoder_layers=1, **SIZES), rngs=nnx.Rngs(0))
    return weights.named(nnx.state(model, nnx.Param), t5_files.tensor_name)


@pytest.fixture
def folder(tmp_path, tensors):
    made = tmp_path / "model"
    made.mkdir()
    (made / CONFIG).write_text(json.dumps(SIZES))
    (made / "tokenizer.json").write_text(t5_files.unigram(PIECES, 2).to_str())
    safetensors.numpy.save_file(tensors, made / WEIGHTS)
    return made


def config(**changes) -> bytes:
    return json.dumps(SIZES | changes).encode()


def raw(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


def shards(weight_map) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


COPY = "encoder.embed_tokens.weight"  # is read before names are compared
TWICE = ", ".join(
    f'"a": {{"dtype": "F32", "shape": [1], "data_offsets": [{i}, {i + 4}]}}' for i in (0, 4)
)
FLOAT8 = '{"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}'
BAD = {  # what is wrong -> (the file, its content, what the message says besides the file's name)
    "config empty": (CONFIG, b"", "the file is damaged"),
    "config cut": (CONFIG, config()[:-9], "the file is damaged"),
    "config latin1": (CONFIG, b'{"a": "\xe4"}', "the file is damaged"),
    "config nested": (CONFIG, b"[" * 100_000, "the file is damaged"),
    "config null": (CONFIG, b"null", ", no object"),
    "config list": (CONFIG, b"[]", ", no object"),
    "a size missing": (CONFIG, config(d_model=None), "d_model missing"),
    "a size of 0": (CONFIG, config(num_heads=0), "num_heads is 0; expected int from 1"),
    "a size of -1": (CONFIG, config(num_layers=-1), "num_layers is -1"),
    "a size of 10^15": (CONFIG, config(vocab_size=10**15), "expected int from 1 to 1000000000"),
    "10^6 layers": (CONFIG, config(num_layers=10**6), "expected int from 1 to 1000"),
    "a size in words": (CONFIG, config(d_ff="x"), "d_ff is 'x'"),
    "a size that is true": (CONFIG, config(d_ff=True), "d_ff is True"),
    "a fraction": (CONFIG, config(d_ff=8.5), "d_ff is 8.5"),
    "a rate that is NaN": (CONFIG, config(layer_norm_epsilon=float("nan")), "is nan"),
    "a rate of 2": (CONFIG, config(dropout_rate=2), "dropout_rate is 2"),
    "activation list": (CONFIG, config(feed_forward_proj=["relu"]), "feed_forward_proj is"),
    "tied in words": (CONFIG, config(tie_word_embeddings="no"), "expected bool"),
    "token too high": (CONFIG, config(eos_token_id=104), "token 104 is not below vocab_size"),
    "distance too near": (CONFIG, config(relative_attention_max_distance=8), "twice the distance"),
    "index empty": (INDEX, b"", "the file is damaged"),
    "index binary": (INDEX, b"\xff\xfe", "the file is damaged"),
    "index list": (INDEX, b"[]", ", no object"),
    "no weight_map": (INDEX, b"{}", "weight_map names 'None'"),
    "weight_map list": (INDEX, shards(["a.safetensors"]), "weight_map names"),
    "shard a list": (INDEX, shards({NAME: ["x"]}), "weight_map names"),
    "shard a number": (INDEX, shards({NAME: 3}), "weight_map names '3'"),
    "shard above": (INDEX, shards({NAME: "../x.safetensors"}), "in the same folder"),
    "shard absolute": (INDEX, shards({NAME: "/tmp/x.safetensors"}), "in the same folder"),
    "shard below": (INDEX, shards({NAME: "a/x.safetensors"}), "in the same folder"),
    "shard's name too long": (INDEX, shards({NAME: "a" * 300 + ".safetensors"}), "weight_map"),
    "shard with NUL": (INDEX, shards({NAME: "a\0.safetensors"}), "weight_map"),
    "weights empty": (WEIGHTS, b"", "0 bytes"),
    "weights of text": (WEIGHTS, b"<html>not found</html>", "damaged or cut short"),
    "header a list": (WEIGHTS, raw("[]"), "damaged or cut short"),
    "float8": (
        WEIGHTS, raw(f'{{"{COPY}": {FLOAT8}}}', b"0"),
        "dtype that NumPy lacks",
    ),
    "a name twice": (WEIGHTS, raw(f"{{{TWICE}}}", bytes(8)), "damaged or cut short"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_what_was_expected(folder, case):
    name, content, message = BAD[case]
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*{weights.REMEDY}$") as caught:
        t5_files.load(folder)
    assert str(folder / name) in str(caught.value)


def test_sizes_of_10_9_do_not_fit_the_tensors(folder):
    (folder / CONFIG).write_bytes(config(vocab_size=10**9, d_model=10**9))
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: .* has shape .*config.json asks for"):
        t5_files.load(folder)


def test_a_shard_outside_the_folder_is_not_opened(folder, tensors):
    """The shards would make a whole model, if the path were followed."""
    (folder / WEIGHTS).rename(folder.parent / "x.safetensors")
    for path in ("../x.safetensors", str(folder.parent / "x.safetensors")):
        (folder / INDEX).write_bytes(shards(dict.fromkeys(tensors, path)))
        with pytest.raises(ValueError, match="in the same folder"):
            t5_files.load(folder)


def test_a_tensor_in_two_shards_is_told(folder, tensors):
    first, second = "a.safetensors", "b.safetensors"
    safetensors.numpy.save_file(tensors, folder / first)
    safetensors.numpy.save_file({NAME: tensors[NAME] + 1}, folder / second)
    (folder / INDEX).write_bytes(shards(dict.fromkeys(tensors, first) | {NAME: second}))
    with pytest.raises(ValueError, match=f"b.safetensors: {NAME} is in another shard too"):
        t5_files.load(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.uint16])
def test_floats_are_read_and_integers_refused(folder, tensors, dtype):
    safetensors.numpy.save_file({k: v.astype(dtype) for k, v in tensors.items()}, folder / WEIGHTS)
    if np.issubdtype(dtype, np.integer):
        with pytest.raises(ValueError, match=rf"{WEIGHTS}: .* is of u?int.*floating-point"):
            t5_files.load(folder)
        return
    found = weights.named(nnx.state(t5_files.load(folder), nnx.Param), t5_files.tensor_name)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.astype(dtype).astype(np.float32))


def test_a_decoders_embedding_alone_is_the_embedding(folder, tensors):
    moved = {k.replace("shared", "decoder.embed_tokens"): v for k, v in tensors.items()}
    safetensors.numpy.save_file(moved, folder / WEIGHTS)
    found = t5_files.load(folder).shared.embedding[...]
    np.testing.assert_array_equal(found, tensors["shared.weight"])


CHARSMAP = '{"type": "Precompiled", "precompiled_charsmap": "AAAA"}'  # the library panics on it


def vocabulary(end: int, size: int) -> str:
    pieces = [[f"a{i}", -1.0] for i in range(size)]
    pieces[end] = ["</s>", 0.0]
    return json.dumps({"model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged or no tokenizer"),
        ("{}", "damaged or no tokenizer"),
        ("null", "damaged or no tokenizer"),
        (vocabulary(1, 9)[:-7], "damaged or no tokenizer"),
        (vocabulary(1, 9).replace("{", f'{{"normalizer": {CHARSMAP}, ', 1), "no tokenizer"),
        (vocabulary(1, 105), "tokens up to 104.*expects .* all below 104"),
        (vocabulary(5, 9), "'</s>' as token 5.*expects it as 1"),
    ],
)
def test_a_tokenizer_that_is_damaged_or_another_models_is_told(folder, content, message):
    assert t5_files.tokenizer(folder).encode("a").ids == [3, 1]
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer.json .*{message}.*{weights.REMEDY}"):
        t5_files.tokenizer(folder)


def test_a_cut_sentencepiece_model_is_told(folder):
    sentencepiece = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = sentencepiece.ModelProto()
    for piece, score in PIECES:
        proto.pieces.add(piece=piece, score=score)
    proto.trainer_spec.model_type, proto.trainer_spec.unk_id = proto.trainer_spec.UNIGRAM, 2
    proto.normalizer_spec.name = "nmt_nfkc"
    whole = proto.SerializeToString()
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(whole)
    assert t5_files.tokenizer(folder).encode("a").ids == [3, 1]
    for content in (b"junk", *(whole[:end] for end in range(len(whole)))):
        (folder / "spiece.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"spiece.model is no T5's tokenizer"):
            t5_files.tokenizer(folder)
