"""Llama, Qwen2, Qwen3 and SmolLM2 beside transformers' PyTorch, which reads the same files.

Random models of every family, and SmolLM2 from its GGUF, which transformers dequantises and whose
rows it turns back by code of its own. Measured in float32 on a CPU (transformers 5.24, torch 2.13):
logits of random models within 1.2e-5 (of 6), gradients within 1.5e-6 (of 0.6); of SmolLM2 within
1.1e-4 (of 39) and 7.5e-5 (of 4.6).
"""

import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_llama_vocabulary import sentences

from experiments.models import llama, llama_decode, llama_files, smollm2

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {  # a family -> (model_type, what its config has besides the sizes)
    "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("llama", {"rope_parameters": STRETCHED, "rms_norm_eps": 1e-5, "head_dim": 16}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5}}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_theta": 1e6}}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3 with biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
}
RANK, SCALE, STEPS = 4, 2.0, 12
LINEARS = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """(transformers' model, the same as `llama_files.load` reads it, scanned)."""
    kind, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    return theirs, llama_files.load(tmp_path, scanned=True)


def batch(vocabulary, lengths=(5, 17, 11), seed=0):
    rng = np.random.default_rng(seed)
    return llama_decode.padded([rng.integers(1, vocabulary, n) for n in lengths], 1)


def positions_of(mask):
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def their_logits(model, tokens, mask):
    given = (torch.tensor(x).long() for x in (tokens, mask, positions_of(mask)))
    names = "input_ids", "attention_mask", "position_ids"
    return model(**dict(zip(names, given, strict=True))).logits


@nnx.jit
def our_logits(model, tokens, mask):
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return model(tokens, positions, mask.astype(jnp.int32))


def apart(ours, theirs):
    found = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    print(f"apart {found:.1e} of {np.abs(np.asarray(theirs)).max():.1e}")
    return found


def test_logits(pair):
    theirs, ours = pair
    tokens, mask = batch(SIZES["vocab_size"])
    with torch.no_grad():
        expected = their_logits(theirs, tokens, mask).numpy()
    assert (
        apart(our_logits(ours, jnp.asarray(tokens), jnp.asarray(mask))[mask], expected[mask]) < 1e-4
    )


def test_adapters_gradients(pair):
    tokens, _ = batch(SIZES["vocab_size"], (17, 17))
    assert gradients_apart(*pair, tokens) < 1e-4


def gradients_apart(theirs, ours, tokens):
    """The largest difference of all adapters' gradients; the losses must agree."""
    llama.adapt(ours, RANK, SCALE * RANK, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(3)
    fill = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype)  # noqa: E731
    factors = jax.tree.map(fill, nnx.state(ours, nnx.LoRAParam))
    nnx.update(ours, factors)
    given = hooked(theirs, nnx.to_pure_dict(factors)["layers"])
    assert len(given) == 2 * 7 * ours.config.num_hidden_layers
    expected = theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss
    expected.backward()
    loss, found = value_and_gradients(ours, jnp.asarray(tokens))
    assert abs(float(loss) - float(expected)) < 1e-5 * float(expected)
    found = nnx.to_pure_dict(found)["layers"]
    largest = max(x.grad.abs().max() for x in given.values())
    worst = max(
        np.abs(found[name][factor][layer] - x.grad.numpy()).max()
        for (layer, name, factor), x in given.items()
    )
    print(f"gradients apart {worst:.1e} of {largest:.1e}")
    return worst


@nnx.jit
def value_and_gradients(model, tokens):
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    return nnx.value_and_grad(llama.next_token_loss, argnums=wrt)(model, tokens)


def hooked(model, factors):
    """Adds s (x a) b to the output of every linear of every layer; the factors, as leaves."""
    given = {}
    for name, module in model.named_modules():
        if (last := name.split(".")[-1]) not in LINEARS:
            continue
        layer, linear = int(name.split(".")[2]), LINEARS[last]
        a, b = (
            torch.tensor(np.asarray(factors[linear][x][layer]), requires_grad=True)
            for x in ("lora_a", "lora_b")
        )
        given |= {(layer, linear, "lora_a"): a, (layer, linear, "lora_b"): b}
        module.register_forward_hook(lambda _, x, y, a=a, b=b: y + SCALE * (x[0] @ a) @ b)
    return given


def test_greedy_decoding_token_for_token(pair):
    theirs, ours = pair
    tokens, mask = batch(SIZES["vocab_size"])
    np.testing.assert_array_equal(decoded(ours, tokens, mask), generated(theirs, tokens, mask))


@pytest.mark.parametrize("pair", ["llama3", "smollm2", "qwen3"], indirect=True)
def test_beam_search_token_for_token(pair):
    """Where the ban changes texts; without ends, and with ends that come early and late."""
    theirs, ours = pair
    tokens, mask = batch(SIZES["vocab_size"], (5, 17, 11, 3, 14, 8, 17, 6))
    options = {"num_beams": 4, "length_penalty": 0.8, "early_stopping": False}
    plain = generated(theirs, tokens, mask, 32, **options)
    options["no_repeat_ngram_size"] = 4
    endless = generated(theirs, tokens, mask, 32, **options)
    assert (plain != endless).any()
    ends = int(endless[1, 24]), int(endless[3, 16])
    expected = generated(theirs, tokens, mask, 32, **options, eos_token_id=list(ends))
    search = functools.partial(decoded, beams=4, length_penalty=0.8, no_repeat_ngram=4)
    np.testing.assert_array_equal(search(ours, tokens, mask, 32), endless)
    ours.config = dataclasses.replace(ours.config, eos_token_ids=ends)
    found = [up_to_end(row, ends) for row in search(ours, tokens, mask, 32)]
    assert len({len(row) for row in found}) >= 4
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(row, up_to_end(other, ends))


def up_to_end(row, ends):
    """What follows, transformers pads with its first end, and we with the row's."""
    places = np.flatnonzero(np.isin(row, ends))
    return row[: places[0] + 1] if places.size else row


def generated(model, tokens, mask, steps=STEPS, **options):
    given = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    options = {"num_beams": 1, "do_sample": False, "max_new_tokens": steps} | options
    return model.generate(**given, **options)[:, tokens.shape[1] :].numpy()


def decoded(model, tokens, mask, steps=STEPS, **options):
    decode = nnx.jit(llama_decode.decode, static_argnames="decoding")
    decoding = llama_decode.Decoding(steps, **options)
    return np.asarray(decode(model, jnp.asarray(tokens), jnp.asarray(mask), decoding))


def test_transformers_reads_what_save_writes(pair, tmp_path):
    theirs, ours = pair
    llama_files.save(ours, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    tokens, mask = batch(SIZES["vocab_size"])
    with torch.no_grad():
        expected, found = (their_logits(x, tokens, mask)[mask] for x in (theirs, again))
    assert apart(found, expected) == 0


# SmolLM2 itself


@pytest.fixture(scope="module")
def smollm():
    """(transformers' reading of the GGUF file, ours, its tokenizer)."""
    try:
        found = smollm2.opened()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        found.file.parent, gguf_file=found.file.name, dtype=torch.float32
    )
    return model.eval(), smollm2.load(found, scanned=True), smollm2.tokenizer(found)


QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write a haiku on autumn."]


def asked(tokenizer):
    chats = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS]
    return llama_decode.padded([tokenizer.encode(chat).ids for chat in chats])


def test_smollm2s_logits(smollm):
    """Some are near 40: float32 ends at 1e-4."""
    theirs, ours, tokenizer = smollm
    tokens, mask = asked(tokenizer)
    with torch.no_grad():
        expected = their_logits(theirs, tokens, mask).numpy()
    found = our_logits(ours, jnp.asarray(tokens), jnp.asarray(mask))
    assert apart(found[mask], expected[mask]) < 1e-5 * np.abs(expected[mask]).max()


def test_smollm2s_answers_token_for_token(smollm):
    theirs, ours, tokenizer = smollm
    tokens, mask = asked(tokenizer)
    expected, found = generated(theirs, tokens, mask, 32), decoded(ours, tokens, mask, 32)
    for row, other in zip(found, expected, strict=True):
        end = np.flatnonzero(row == 2)
        length = end[0] + 1 if end.size else 32
        np.testing.assert_array_equal(row[:length], other[:length])
    assert tokenizer.decode(found[0]) == "The capital of France is Paris."


def test_smollm2s_tokenizer_is_transformers_wherever_no_digit_follows_a_space(smollm):
    """transformers cuts by GPT-2's pattern alone; the file's "smollm" cuts digits off first."""
    found = smollm2.opened()
    theirs = transformers.AutoTokenizer.from_pretrained(
        found.file.parent, gguf_file=found.file.name
    )
    texts = [text for text in sentences(1200) if not re.search(r"\s\d", text)][:1000]
    assert len(texts) == 1000
    for text in texts:
        assert smollm[2].encode(text).ids == theirs(text).input_ids, text


def test_smollm2s_adapters_gradients(smollm):  # the last one: it changes both models
    """Gradients of 1e-2 to 1e1: float32 ends at 1e-4."""
    theirs, ours, tokenizer = smollm
    text = " ".join(sentences(12))
    tokens = np.array([tokenizer.encode(text).ids[:64]])
    assert gradients_apart(theirs, ours, tokens) < 1e-4
