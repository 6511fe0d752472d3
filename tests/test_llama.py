"""The decoder against numpy; its layers listed or scanned; packed rows; the cache.

What it reads: test_llama_files. What it writes: test_llama_decode. Beside transformers:
test_llama_interop.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import llama, llama_files
from experiments.models.llama_config import TINY, LlamaConfig, RopeScaling

SCALING = RopeScaling(8.0, 1.0, 4.0, 32)  # of frequencies that turn 1, 0.16, 0.1 and 0.05 times
PLAIN = dataclasses.replace(TINY, num_hidden_layers=2)
LLAMA3 = dataclasses.replace(PLAIN, rope_theta=20.0, rope_scaling=SCALING)
QWEN2 = dataclasses.replace(PLAIN, attention_bias=True, tie_word_embeddings=True)
QWEN3 = dataclasses.replace(PLAIN, head_norms=True, head_dim=6)
ALL_BIASES = dataclasses.replace(PLAIN, attention_bias=True, output_bias=True, mlp_bias=True)
CONFIGS = {"llama": PLAIN, "llama3": LLAMA3, "qwen2": QWEN2, "qwen3": QWEN3, "biases": ALL_BIASES}
families = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 11))
DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
EXACT = {"atol": 1e-10 if jnp.float64 == DTYPE else 3e-5}


def made(config, rank=4, dtype=None, seed=0, **options):
    """A model all of whose parameters are random, the adapters', norms' and biases' too."""
    options |= dict.fromkeys(("dtype", "param_dtype"), dtype or DTYPE)

    def build():
        model = llama.Llama(config, rngs=nnx.Rngs(0), **options | {"scanned": False})
        if rank:
            llama.adapt(model, rank, 2.0 * rank, rngs=nnx.Rngs(1))
        return model

    graph, shapes = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)
    if not options.get("scanned"):
        return nnx.merge(graph, params)

    def scanned():
        model = llama.Llama(config, rngs=nnx.Rngs(0), **options)
        if rank:
            llama.adapt(model, rank, 2.0 * rank, rngs=nnx.Rngs(1))
        return model

    return nnx.merge(nnx.graphdef(nnx.eval_shape(scanned)), llama_files.stacked(params))


@nnx.jit
def logits(model, *args):
    return model(*args)


@nnx.jit
def adapters_gradients(model, tokens):
    """Of the loss, with the parameters as arguments of a pure function."""
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    loss = lambda factors: llama.next_token_loss(nnx.merge(graph, factors, rest), tokens)  # noqa: E731
    return jax.value_and_grad(loss)(factors)


# The truth: one row in float64 numpy, loops for heads and positions.


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def turned(config, x):
    """Pairs (i, i + H/2) as complex numbers; Llama 3's slow ones slower, by cases."""
    half = config.head_dim // 2
    speeds = config.rope_theta ** (-2 * np.arange(half) / config.head_dim)
    if (s := config.rope_scaling) is not None:
        for i, wave in enumerate(2 * np.pi / speeds):
            turns = s.original_max_position_embeddings / wave
            if turns < s.low_freq_factor:
                speeds[i] /= s.factor
            elif turns < s.high_freq_factor:
                share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                speeds[i] = (1 - share) * speeds[i] / s.factor + share * speeds[i]
    y = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(len(x))[:, None] * speeds)
    return np.concatenate([y.real, y.imag], -1)


def block(c, p, x):
    def linear(name, y):
        q = p[name]
        return y @ (q["kernel"] + 2.0 * q["lora_a"] @ q["lora_b"]) + q.get("bias", 0.0)

    def head(name, y, i):
        y = y[:, i * c.head_dim : (i + 1) * c.head_dim]
        return turned(c, norm(y, p[f"{name}_norm"]["scale"]) if c.head_norms else y)

    y = norm(x, p["attention_norm"]["scale"])
    q, k, v = linear("q", y), linear("k", y), linear("v", y)
    heads = np.zeros_like(q)
    for i in range(c.num_attention_heads):
        j = i // (c.num_attention_heads // c.num_key_value_heads)
        own, theirs = (slice(n * c.head_dim, (n + 1) * c.head_dim) for n in (i, j))
        for t in range(len(x)):
            scores = head("k", k, j)[: t + 1] @ head("q", q, i)[t] / np.sqrt(c.head_dim)
            shares = np.exp(scores - scores.max())
            heads[t, own] = shares / shares.sum() @ v[: t + 1, theirs]
    x = x + linear("o", heads)
    y = norm(x, p["mlp_norm"]["scale"])
    gate = linear("gate", y)
    return x + linear("down", gate / (1 + np.exp(-gate)) * linear("up", y))


def arrays(module):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param)))


@families
def test_the_model_is_numpys(config, x64):
    model = made(config)
    p = arrays(model)
    head = p["embedding"]["embedding"].T if config.tie_word_embeddings else p["head"]["kernel"]
    for row, found in zip(TOKENS, logits(model, jnp.asarray(TOKENS)), strict=True):
        x = p["embedding"]["embedding"][row]
        for i in range(config.num_hidden_layers):
            x = block(config, p["layers"][i], x)
        np.testing.assert_allclose(found, norm(x, p["norm"]["scale"]) @ head, atol=1e-10)


@families
def test_scanned_layers_and_recomputed_ones_are_the_listed_ones(config):
    tokens = jnp.asarray(TOKENS)
    loss, gradients = adapters_gradients(made(config), tokens)
    expected = arrays(llama_files.stacked(gradients))
    recomputed = [{"remat": True}, {"scanned": True}] if config is PLAIN else []
    for options in (*recomputed, {"scanned": True, "remat": True}):
        again, found = adapters_gradients(made(config, **options), tokens)
        np.testing.assert_allclose(again, loss, rtol=1e-5)
        found = arrays(found if options.get("scanned") else llama_files.stacked(found))
        jax.tree.map(functools.partial(np.testing.assert_allclose, **EXACT), found, expected)


def test_scanned_parameters_go_back_to_layers():
    params = nnx.state(made(TINY), nnx.Param)
    again = llama_files.listed(llama_files.stacked(params))
    jax.tree.map(np.testing.assert_array_equal, arrays(again), arrays(params))


@pytest.mark.parametrize("scanned", [False, True])
def test_texts_that_share_a_row_do_not_see_each_other(scanned):
    model = made(LLAMA3, scanned=scanned)
    one, two, pad = TOKENS[0, :4], TOKENS[1, :5], np.zeros(2, int)
    packed = np.concatenate([one, two, pad])
    positions, segments = [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0], [1] * 4 + [2] * 5 + [0] * 2
    found = logits(model, *(jnp.asarray(x)[None] for x in (packed, positions, segments)))
    for text, start in ((one, 0), (two, 4)):
        alone = logits(model, jnp.asarray(text)[None])
        np.testing.assert_allclose(found[:, start : start + len(text)], alone, **EXACT)


@families
@pytest.mark.parametrize("scanned", [False, True])
def test_the_cache_changes_nothing(config, scanned):
    """Rows of 6 and 9 tokens, padded at their start to 9; in parts of 7, 1 and 1."""
    model = made(config, scanned=scanned)
    mask = jnp.arange(9)[None, :] >= jnp.array([3, 0])[:, None]
    tokens = jnp.where(mask, TOKENS[:, :9], 0)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache, parts, step = model.empty_cache(2, 12), [], nnx.jit(lambda m, *args: m.hidden(*args))
    for i, j in ((0, 7), (7, 8), (8, 9)):
        given = (x[:, i:j] for x in (tokens, positions, mask.astype(jnp.int32)))
        hidden, cache = step(model, *given, cache)
        parts.append(model.logits(hidden))
    found = jnp.concatenate(parts, axis=1)
    for row, length in enumerate((6, 9)):
        alone = logits(model, tokens[row : row + 1, 9 - length :])[0]
        np.testing.assert_allclose(found[row, 9 - length :], alone, **EXACT)


def likeliest(model, row):
    """The next token, without a cache; what pads the row lies behind and changes nothing."""
    tokens = np.zeros((1, TINY.max_position_embeddings), np.int32)
    tokens[0, : len(row)] = row
    return int(jnp.argmax(logits(model, jnp.asarray(tokens))[0, len(row) - 1]))


@pytest.mark.float32
@pytest.mark.parametrize("scanned", [False, True])
def test_bfloat16_activations_over_float32_weights(scanned):
    model = made(QWEN3, dtype=jnp.float32, scanned=scanned)
    exact = logits(model, jnp.asarray(TOKENS))
    graph = nnx.graphdef(made(QWEN3, dtype=jnp.float32, scanned=scanned))
    low = low_precision(QWEN3, nnx.state(model), scanned)
    found = logits(low, jnp.asarray(TOKENS))
    assert found.dtype == exact.dtype == jnp.float32
    assert graph != nnx.graphdef(low)
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def low_precision(config, params, scanned):
    def build():
        model = llama.Llama(config, dtype=jnp.bfloat16, scanned=scanned, rngs=nnx.Rngs(0))
        llama.adapt(model, 4, 8.0, rngs=nnx.Rngs(1))
        return model

    return nnx.merge(nnx.graphdef(nnx.eval_shape(build)), params)


@pytest.mark.parametrize("scanned", [False, True])
def test_every_step_drops_other_inputs_of_the_adapters(scanned):
    model = llama.Llama(TINY, scanned=scanned, remat=True, rngs=nnx.Rngs(0))
    llama.adapt(model, 4, 8.0, dropout=0.5, rngs=nnx.Rngs(1))
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        variable[...] = jnp.ones_like(variable[...])
    tokens = jnp.asarray(TOKENS)
    one, two = logits(model, tokens), logits(model, tokens)
    assert not np.allclose(one, two)
    model.eval()
    np.testing.assert_array_equal(logits(model, tokens), logits(model, tokens))


@pytest.mark.parametrize("scanned", [False, True])
def test_every_linear_of_a_layer_has_an_adapter_and_nothing_else(scanned):
    model = nnx.eval_shape(lambda: made_plain(scanned))
    paths = {p[:-1] for p, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    kernels = {p[:-1] for p, _ in nnx.to_flat_state(nnx.state(model)) if p[-1] == "kernel"}
    assert paths == kernels - {("head",)}
    assert len(paths) == 7 * (1 if scanned else TINY.num_hidden_layers)


def made_plain(scanned):
    model = llama.Llama(TINY, scanned=scanned, rngs=nnx.Rngs(0))
    llama.adapt(model, 4, 8.0, rngs=nnx.Rngs(1))
    return model


def test_layers_drawn_together_differ():
    layers = arrays(llama.Llama(TINY, scanned=True, rngs=nnx.Rngs(0)))["layers"]
    assert not np.allclose(layers["q"]["kernel"][0], layers["q"]["kernel"][1])


TIED = {"tie_word_embeddings": True}
PUBLISHED = {  # parameters of models from their published sizes
    "Llama-3.1-8B": (LlamaConfig(), 8_030_261_248),
    "Llama-2-7b": (
        LlamaConfig(32_000, 4096, 11_008, num_key_value_heads=32),
        6_738_415_616,
    ),
    "Qwen2-0.5B": (
        LlamaConfig(
            151_936, 896, 4864, 24, 14, 2, 64, attention_bias=True, tie_word_embeddings=True
        ),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        LlamaConfig(151_936, 1024, 3072, 28, 16, 8, 128, **TIED, head_norms=True),
        596_049_920,
    ),
    "SmolLM2-135M": (
        LlamaConfig(49_152, 576, 1536, 30, 9, 3, 64, **TIED),
        134_515_008,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_number_of_parameters(name):
    config, published = PUBLISHED[name]
    model = nnx.eval_shape(lambda: llama.Llama(config, scanned=True, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == published


def test_positions_over_the_context_are_refused():
    model = llama.Llama(TINY, rngs=nnx.Rngs(0))
    long = jnp.zeros((1, 65), jnp.int32)
    for call in (lambda: model(long), lambda: model.empty_cache(1, 65)):
        with pytest.raises(ValueError, match="65 positions; .* context.* has 64: shorten"):
            call()


def test_a_cache_without_room_is_refused():
    model = llama.Llama(TINY, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="5 positions; the cache has 4"):
        model.hidden(jnp.zeros((1, 5), jnp.int32), cache=model.empty_cache(1, 4))
