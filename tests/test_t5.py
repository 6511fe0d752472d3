"""T5 against transformers' PyTorch T5 in float64, and what must hold for any weights."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import lorapro_jax as lp
from experiments.models import t5, t5_files, weights
from lorapro_jax import nnx as lora

_SCRIPT = pathlib.Path(__file__).parent / "reference" / "t5.py"
_SPEC = importlib.util.spec_from_file_location("t5_reference", _SCRIPT)
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)
FOUND = np.load(_SCRIPT.with_suffix(".npz"))


def write(folder, case, name_of=t5_files.tensor_name):
    """A checkpoint of a case as Hugging Face would lay it out, of the reference's weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", **case}))
    config = t5.T5Config.from_json(folder / "config.json")
    tied = case["tie_word_embeddings"]
    made = nnx.eval_shape(lambda: t5.T5(config, tied=tied, rngs=nnx.Rngs(0)))
    tensors = {}
    for path, leaf in nnx.to_flat_state(nnx.state(made)):
        shape = leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape
        tensors[name_of(path)] = reference.weight(name_of(path), shape, case)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return tensors


def adapted(model, dtype=jnp.float32):
    """`model` with the reference's adapters on every linear."""
    rank, alpha = reference.RANK, reference.SCALE * reference.RANK
    lora.add_lora(model, rank, alpha, targets=t5.ADAPTED, dtype=dtype, rngs=nnx.Rngs(0))
    for path, module in nnx.iter_modules(model):
        if isinstance(module, lora.LoRALinear):
            name = linear_name(path)
            a, b = reference.adapter(name, module.in_features, module.out_features)
            module.lora_a[...] = jnp.asarray(a, dtype)
            module.lora_b[...] = jnp.asarray(b, dtype)
    return model


def linear_name(path):
    return t5_files.tensor_name((*path, "kernel")).removesuffix(".weight")


def batch(case, **sizes):
    return tuple(map(jnp.asarray, reference.batch(case["vocab_size"], **sizes)))


@nnx.jit
def outputs(model, tokens, mask, targets, target_mask):
    """(encoded, logits, loss, the adapters' gradients)."""
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors):
        model = nnx.merge(graph, factors, rest)
        logits = model(tokens, mask, model.shifted(targets))
        return t5.token_loss(logits, targets, target_mask), logits

    (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(factors)
    return model.encode(tokens, mask), logits, value, grads


def compare(found, expected, mask, atol):
    encoded, logits, loss, grads = found
    np.testing.assert_allclose(
        np.asarray(encoded)[mask], expected["encoded"][mask], atol=atol, rtol=atol
    )
    np.testing.assert_allclose(logits, expected["logits"], atol=atol, rtol=atol)
    np.testing.assert_allclose(loss, expected["loss"], atol=atol)
    seen = 0
    for (*path, leaf), grad in nnx.to_flat_state(grads):
        name = f"grad/{linear_name(path)}/{leaf.removeprefix('lora_')}"
        np.testing.assert_allclose(grad[...], expected[name], atol=atol, rtol=atol, err_msg=name)
        seen += 1
    assert seen == sum(name.startswith("grad/") for name in expected)


CASES = [
    pytest.param(case, marks=() if case.startswith("v1") else pytest.mark.slow)
    for case in reference.CASES
]


@pytest.mark.parametrize("case", CASES)
def test_states_logits_loss_and_gradients_are_pytorchs(tmp_path, case):
    settings = reference.CASES[case]
    write(tmp_path, settings)
    inputs = batch(settings)
    prefix = f"{case}/"
    expected = {k.removeprefix(prefix): FOUND[k] for k in FOUND if k.startswith(prefix)}
    found = outputs(adapted(t5_files.load(tmp_path)), *inputs)
    compare(found, expected, np.asarray(inputs[1]), atol=1e-4)


@pytest.mark.parametrize("name", [k for k in FOUND if k.startswith("buckets/")])
def test_the_buckets_are_pytorchs(name):
    buckets, far = map(int, name.split("/")[1:])
    config = t5.T5Config(
        relative_attention_num_buckets=buckets, relative_attention_max_distance=far
    )
    distances = np.clip(np.arange(-300, 301), -far, far) + far
    for causal, expected in zip((False, True), FOUND[name], strict=True):
        found = t5.buckets_by_distance(config, causal=causal)[distances]
        np.testing.assert_array_equal(found, expected)


CASE = reference.CASES["v1.1"]
NAMES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)]  # a tokenizer's pieces


@pytest.fixture(scope="module")
def small(tmp_path_factory):  # read by the tests, never changed
    folder = tmp_path_factory.mktemp("t5")
    write(folder, CASE)
    return t5_files.load(folder)


@nnx.jit
def logits(model, tokens, mask, inputs):
    return model(tokens, mask, inputs)


def test_padding_and_what_stands_under_the_mask_change_nothing(small):
    tokens, mask, inputs, _ = batch(CASE)
    expected = logits(small, tokens, mask, inputs)
    wider = [jnp.pad(x, ((0, 0), (0, 7))) for x in (tokens, mask)]
    np.testing.assert_allclose(logits(small, *wider, inputs), expected, atol=1e-4)
    other = jnp.where(mask, tokens, 17)
    np.testing.assert_array_equal(logits(small, other, mask, inputs), expected)


def test_the_decoder_sees_no_later_token(small):
    tokens, mask, inputs, _ = batch(CASE)
    later = inputs.at[:, 8:].set(5)
    found, other = (logits(small, tokens, mask, x) for x in (inputs, later))
    np.testing.assert_array_equal(found[:, :8], other[:, :8])
    assert not np.allclose(found[:, 8:], other[:, 8:])


def test_a_row_without_tokens_is_finite(small):
    tokens, mask, inputs, _ = batch(CASE)
    assert np.isfinite(logits(small, tokens, mask.at[1].set(False), inputs)).all()


def test_dropout_acts_only_where_rngs_are_given(small):
    graph, state = nnx.split(small)
    model = nnx.merge(graph, state)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Dropout):
            module.rate = 0.3
    inputs = batch(CASE)[:3]
    np.testing.assert_array_equal(logits(model, *inputs), logits(small, *inputs))
    call = nnx.jit(lambda model, *inputs, rngs: model(*inputs, rngs=rngs))
    one, two = (call(model, *inputs, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 2))
    assert not np.allclose(one, two)


def test_bfloat16_activations_with_float32_factors_stay_close(small, tmp_path):
    write(tmp_path, CASE)
    half = adapted(t5_files.load(tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    tokens, mask, targets, target_mask = batch(CASE)
    encoded, scores, loss, grads = outputs(half, tokens, mask, targets, target_mask)
    assert (encoded.dtype, scores.dtype, loss.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    expected = FOUND["v1.1/logits"]
    assert np.linalg.norm(scores - expected) < 0.05 * np.linalg.norm(expected)


def test_the_loss_is_over_unmasked_tokens_alone():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 7)), jnp.float32)
    targets = jnp.asarray([[1, 2, 0], [4, 0, 0]])
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    picked = [scores[0, 0], scores[0, 1], scores[1, 0]]
    expected = np.mean(
        [np.log(np.exp(x).sum()) - x[t] for x, t in zip(picked, (1, 2, 4), strict=True)]
    )
    np.testing.assert_allclose(t5.token_loss(scores, targets, mask), expected, rtol=1e-5)
    assert t5.token_loss(scores, targets, jnp.zeros_like(mask)) == 0


def test_t5_base_has_192_pairs_and_3244032_parameters_in_them():
    def made():
        model = t5.T5(t5.T5Config(), rngs=nnx.Rngs(0))
        lora.add_lora(model, targets=t5.ADAPTED, rngs=nnx.Rngs(0))
        return model

    model = nnx.eval_shape(made)
    factors = nnx.state(model, nnx.LoRAParam)
    assert sum(x.size for x in jax.tree.leaves(factors)) == 3_244_032
    assert len(jax.tree.leaves(factors)) == 2 * 192
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == 222_903_552 + 3_244_032
    labels = nnx.to_flat_state(lp.labels(nnx.state(model)))
    assert sum(label == "lora" for _, label in labels) == 2 * 192


# Files.
@pytest.fixture
def saved(tmp_path):
    return tmp_path, write(tmp_path, CASE)


def keep(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


def test_shards_are_one_model(saved, small):
    folder, tensors = saved
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shard_of = {}
    for i, part in enumerate((names[:20], names[20:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
        shard_of |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    assert_equal(t5_files.load(folder), small)
    index.write_text(json.dumps({"weight_map": shard_of | {"gone.weight": file}}))
    with pytest.raises(ValueError, match=r"the shards lack 1 tensors \(gone.weight\)"):
        t5_files.load(folder)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors does not exist"):
        t5_files.load(folder)


def test_copies_of_the_embedding_are_one_embedding(saved, small):
    folder, tensors = saved
    copies = {
        f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")
    }
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    keep(folder, {**tensors, **copies, unused: np.zeros((10, 4), np.float32)})
    assert_equal(t5_files.load(folder), small)
    alone = {k: v for k, v in tensors.items() if k != "shared.weight"}
    keep(folder, {**alone, **copies})
    assert_equal(t5_files.load(folder), small)
    keep(folder, {**tensors, "decoder.embed_tokens.weight": tensors["shared.weight"] + 1})
    with pytest.raises(ValueError, match=r"decoder.embed_tokens.weight is not shared.weight"):
        t5_files.load(folder)


def test_a_head_that_repeats_the_embedding_is_tied(tmp_path):
    tensors = write(tmp_path, reference.CASES["v1.0"])
    expected = t5_files.load(tmp_path)
    keep(tmp_path, {**tensors, "lm_head.weight": tensors["shared.weight"]})
    assert_equal(t5_files.load(tmp_path), expected)
    assert expected.tied
    assert not t5_files.load(write_and_name(tmp_path / "v1.1", CASE)).tied


def write_and_name(folder, case):
    write(folder, case)
    return folder


def test_a_written_model_is_read_back(small, tmp_path):
    made = t5_files.unigram(NAMES, 2)
    t5_files.save(small, tmp_path, made)
    again = t5_files.load(tmp_path)
    assert_equal(again, small)
    assert again.config == small.config
    written = weights.read_tokenizer(tmp_path / "tokenizer.json")
    assert written.encode("a a").tokens == ["▁a", "▁a", "</s>"]


def test_adapters_are_not_lost_by_saving(saved):
    folder, _ = saved
    model = adapted(t5_files.load(folder))
    made = t5_files.unigram(NAMES, 2)
    with pytest.raises(ValueError, match="the model has adapters.*merge_lora"):
        t5_files.save(model, folder / "out", made)
    assert not (folder / "out").exists()
    expected = logits(model, *batch(CASE)[:3])
    lora.merge_lora(model)
    t5_files.save(model, folder / "out", made)
    found = logits(t5_files.load(folder / "out"), *batch(CASE)[:3])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_named(saved):
    folder, tensors = saved
    name = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    keep(folder, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ValueError, match=rf"1 tensors missing \({name}\); a T5 of the sizes"):
        t5_files.load(folder)
    keep(folder, {**tensors, "decoder.block.9.x": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match=r"1 tensors unexpected \(decoder.block.9.x\)"):
        t5_files.load(folder)
    keep(folder, {**tensors, name: tensors[name].T.copy()})
    with pytest.raises(ValueError, match=rf"{name} has shape \(24, 28\), config.json asks for"):
        t5_files.load(folder)


def test_a_damaged_file_is_told(saved):
    folder, _ = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors .*damaged or cut short.*again"):
        t5_files.load(folder)


def test_other_architectures_are_refused(saved):
    folder, _ = saved
    file = folder / "config.json"
    for change, message in (
        ({"model_type": "bert"}, "model_type is 'bert', expected 't5'"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj is 'gelu'; this T5 computes relu"),
        ({"relative_attention_num_buckets": 2}, "at least 4 are needed"),
    ):
        file.write_text(json.dumps({"model_type": "t5", **CASE, **change}))
        with pytest.raises(ValueError, match=message):
            t5_files.load(folder)
    file.write_text(json.dumps({"model_type": "t5", "d_model": 4}))
    with pytest.raises(ValueError, match="vocab_size, d_kv, d_ff, num_layers, num_heads missing"):
        t5_files.load(folder)


def test_the_decoder_is_as_deep_as_the_encoder_where_nothing_is_said(saved):
    folder, _ = saved
    case = {k: v for k, v in CASE.items() if k != "num_decoder_layers"}
    (folder / "config.json").write_text(json.dumps(case))
    assert t5.T5Config.from_json(folder / "config.json").num_decoder_layers == CASE["num_layers"]


def test_an_empty_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist; .*there is nothing"):
        t5_files.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"spiece.model does not exist"):
        t5_files.tokenizer(tmp_path)


def test_a_name_is_asked_of_the_hub_and_its_failure_explained(monkeypatch, saved):
    import huggingface_hub

    folder, _ = saved
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, set(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    commit = "0123456789" * 4
    assert weights.folder_of(f"google/t5-v1_1-base@{commit}") == folder
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("google/t5-v1_1-base", commit)
    assert {"config.json", "*.safetensors", "spiece.model", "tokenizer.json"} <= patterns

    def offline(name, revision, allow_patterns):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"did not give 't5-base@.*no route.*copy config"):
        t5_files.load(f"t5-base@{commit}")
    for unpinned in ("google/t5-v1_1-base", "google/t5-v1_1-base@main"):
        with pytest.raises(FileNotFoundError, match=r"NAME@COMMIT.*t5-v1_1-base/commits/main"):
            t5_files.load(unpinned)


TEXTS = (
    "classify the grammaticality of the text: He are here.\nresult: ",
    "  Two  spaces,\ttabs\nand a line ", "naïve café ﬁne ①", "",
)  # fmt: skip


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spiece")
    lines = [
        f"{word} {text}".strip() for text in TEXTS for word in ["the", "text", "of", "a", "result"]
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_prefix=str(folder / "spiece"), vocab_size=60,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(CASE | {"vocab_size": 200}))
    return folder


def test_a_sentencepiece_model_gives_sentencepieces_tokens(spiece):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    ours = t5_files.tokenizer(spiece)
    for text in TEXTS:
        encoded = ours.encode(text).ids
        assert encoded == [*theirs.encode(text), theirs.eos_id()]
        assert ours.decode(encoded) == theirs.decode(theirs.encode(text)).strip()
    size = theirs.get_piece_size()
    assert ours.token_to_id("<extra_id_99>") == size
    assert ours.token_to_id("<extra_id_0>") == size + 99
    assert ours.encode("a <extra_id_0> b").ids.count(size + 99) == 1


def test_a_model_of_another_kind_is_refused(spiece, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((spiece / "spiece.model").read_bytes())
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"no T5's tokenizer \(BPE, .* expected UNIGRAM"):
        t5_files.tokenizer(tmp_path)


def test_names_and_tensors_go_back_and_forth(saved, small):
    _, tensors = saved
    found = weights.named(nnx.state(small, nnx.Param), t5_files.tensor_name)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
