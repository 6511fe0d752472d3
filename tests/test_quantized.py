"""A base in 4 or 8 bits: what is rounded, that the model is otherwise the dense one, its memory."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_llama import ALL_BIASES, EXACT, PLAIN, TOKENS, arrays, logits, made
from test_llama_files import SIZES, folder_of, write_gguf

from experiments.models import llama, llama_files, llama_gguf, quantized
from experiments.pod import slice as tpu_slice
from lorapro_jax import nnx as lora

TILE = 8
kinds = pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
LAYERS = [{}, {"remat": True}, {"scanned": True}, {"scanned": True, "remat": True}]
# QLoRA, arXiv:2305.14314, appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
NF4 += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
NF4 += [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def quantised(config, kind="nf4", **options):
    """A random model, quantised, with random adapters."""
    model = made(config, rank=0, **options)
    quantized.quantize(model, kind, TILE)
    adapted = made(config, **options)
    llama.adapt(model, 4, 8.0, rngs=nnx.Rngs(1))
    nnx.update(model, nnx.state(adapted, nnx.LoRAParam))
    return model


def densified(model):
    """A dense Llama, never quantised, with the numbers of the dequantised one."""
    options = {"scanned": model.scanned, "remat": model.remat, "dtype": model.dtype}
    copy = nnx.clone(model)
    quantized.dequantize(copy)
    return nnx.merge(nnx.graphdef(made(model.config, **options)), nnx.state(copy))


# Numbers


def kernels(model):
    state = nnx.to_flat_state(nnx.state(model.layers, nnx.PathContains("kernel")))
    return {path: np.asarray(variable[...]) for path, variable in state}


@kinds
@pytest.mark.parametrize("scanned", [False, True])
def test_every_kernel_is_rounded_to_the_nearest_number_of_its_tile(kind, scanned):
    model = made(PLAIN, rank=0, scanned=scanned)
    before = kernels(model)
    quantized.quantize(model, kind, TILE)
    assert quantized.kind_of(model) == kind
    quantized.dequantize(model)
    assert quantized.kind_of(model) is None
    after = kernels(model)
    assert before.keys() == after.keys()
    for path, exact in before.items():
        assert after[path].dtype == exact.dtype
        exact, found = (
            x.reshape(*x.shape[:-2], -1, TILE, x.shape[-1]) for x in (exact, after[path])
        )
        absmax = np.abs(exact).max(-2, keepdims=True)
        if kind == "nf4":
            steps = exact / absmax
            nearest = np.array(NF4)[np.abs(steps[..., None] - np.array(NF4)).argmin(-1)]
            np.testing.assert_allclose(found / absmax, nearest, atol=1e-6)
            continue
        half = {"int4": 7.5, "int8": 127.5}[kind]
        numbers = found / absmax * half
        np.testing.assert_allclose(numbers, np.rint(numbers), atol=1e-4)
        assert -half - 0.5 <= np.rint(numbers).min() <= np.rint(numbers).max() <= half - 0.5
        assert np.all(np.abs(found - exact) <= absmax / half / 2 * (1 + 1e-5))


@kinds
def test_a_tile_of_zeros_stays_zero(kind):
    kernel = quantized.quantized_kernel(nnx.Param(jnp.zeros((TILE, 3))), kind, TILE)
    assert not np.any(quantized._dense(kernel[...]))


# The model


@nnx.jit
def measured(model):
    """((a number of all logits, logits), its gradients of the adapters)."""
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    def number(factors):
        found = nnx.merge(graph, factors, rest)(jnp.asarray(TOKENS))
        return jnp.sum(jnp.sin(found)), found

    return jax.value_and_grad(number, has_aux=True)(factors)


@functools.cache
def truth(kind):
    return measured(densified(quantised(ALL_BIASES, kind)))


@pytest.mark.parametrize(("kind", "options"), [*(("nf4", x) for x in LAYERS), ("int8", LAYERS[2])])
def test_logits_and_gradients_are_those_of_the_dequantised_kernels(kind, options):
    (_, expected_logits), expected = truth(kind)
    (_, found_logits), found = measured(quantised(ALL_BIASES, kind, **options))
    np.testing.assert_allclose(found_logits, expected_logits, **EXACT)
    found = arrays(found if options.get("scanned") else llama_files.stacked(found))
    bounds = {"rtol": 1e-4, "atol": 10 * EXACT["atol"]}
    compare = functools.partial(np.testing.assert_allclose, **bounds)
    jax.tree.map(compare, found, arrays(llama_files.stacked(expected)))
    assert max(np.abs(x).max() for x in jax.tree.leaves(found)) > 1e-2


@pytest.mark.float32
def test_bfloat16_activations_see_the_kernel_rounded_once():
    model = quantised(PLAIN, "int8", dtype=jnp.float32)
    model.layers[0].q.dtype = jnp.bfloat16
    layer = model.layers[0].q
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.bfloat16)
    copy = nnx.clone(model)
    quantized.dequantize(copy)
    assert layer(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer(x), copy.layers[0].q(x))


@pytest.mark.parametrize("scanned", [False, True])
def test_kernels_are_no_parameters_and_come_back_from_pure_arrays(scanned):
    model = quantised(PLAIN, scanned=scanned)
    params = [path for path, _ in nnx.to_flat_state(nnx.state(model.layers, nnx.Param))]
    assert not [path for path in params if path[-1] == "kernel"]
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    again = nnx.merge(graph, nnx.as_pure(factors), nnx.as_pure(rest))
    tokens = jnp.asarray(TOKENS)
    np.testing.assert_array_equal(logits(again, tokens), logits(model, tokens))


def test_a_dequantised_model_is_merged_and_written(tmp_path):
    model = quantised(SIZES, "int8", scanned=True)
    expected = logits(model, jnp.asarray(TOKENS))
    with pytest.raises(ValueError, match="held as int8, .*dequantize it, then merge_lora it"):
        llama_files.save(model, tmp_path)
    quantized.dequantize(model)
    with pytest.raises(ValueError, match="not quantised"):
        quantized.dequantize(model)
    lora.merge_lora(model)
    llama_files.save(model, tmp_path)
    found = logits(llama_files.load(tmp_path), jnp.asarray(TOKENS))
    np.testing.assert_allclose(found, expected, atol=1e-3)


# Files


@kinds
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_a_model_is_quantised_as_it_is_read(tmp_path, source, kind, scanned):
    if source == "folder":
        load, file = llama_files.load, folder_of(tmp_path, SIZES)
    else:
        load, file = llama_gguf.load, write_gguf(tmp_path / "m.gguf", "llama", SIZES)
    found = load(file, scanned=scanned, quantized=kind, tile=TILE)
    expected = load(file, scanned=scanned)
    quantized.quantize(expected, kind, TILE)
    graphs, states = zip(*(nnx.split(x) for x in (found, expected)), strict=True)
    assert graphs[0] == graphs[1]
    jax.tree.map(np.testing.assert_array_equal, *states)
    with pytest.raises(ValueError, match="tile 12 does not divide the inputs of layers/"):
        load(file, scanned=scanned, quantized=kind, tile=12)


def test_one_tensor_at_a_time_is_dense(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", "llama", SIZES)
    events = []
    read, keep = llama_gguf.dequantised, llama_files.quantized_kernel
    monkeypatch.setattr(
        llama_gguf, "dequantised", lambda f, name: events.append("read") or read(f, name)
    )
    monkeypatch.setattr(
        llama_files, "quantized_kernel", lambda *args: events.append("keep") or keep(*args)
    )
    llama_gguf.load(file, quantized="int8", tile=TILE)
    assert events.count("keep") == 7 * SIZES.num_hidden_layers
    kept = [i for i, event in enumerate(events) if event == "keep"]
    assert all(events[i - 1] == "read" for i in kept)


# Memory

DEEP = dataclasses.replace(
    PLAIN, num_hidden_layers=8, hidden_size=128, intermediate_size=512, num_attention_heads=8,
    num_key_value_heads=8, head_dim=16,
)  # fmt: skip
ONE_LAYER = 4 * (4 * 128 * 128 + 3 * 128 * 512)  # bytes of its kernels, dense


def test_two_numbers_of_four_bits_are_a_byte():
    tree = {"a": jnp.zeros((3, 5), jnp.int4), "b": jnp.zeros(3, jnp.uint4), "c": jnp.zeros(2)}
    tree |= {"d": jnp.zeros(3, bool), "e": jax.random.key(0), "f": jnp.zeros(3, jnp.int8)}
    assert quantized.nbytes(tree) == 8 + 2 + 2 * jnp.zeros(2).dtype.itemsize + 3 + 8 + 3


def adapted(kind, depth=DEEP.num_hidden_layers, **options):
    """(graph, factors, what is frozen) of the deep model, without its arrays."""
    config = dataclasses.replace(DEEP, num_hidden_layers=depth)

    def build():
        model = llama.Llama(config, **options, rngs=nnx.Rngs(0))
        if kind is not None:
            quantized.quantize(model, kind)
        llama.adapt(model, 2, rngs=nnx.Rngs(1))
        return model

    return nnx.split(nnx.eval_shape(build), nnx.LoRAParam, ...)


def loss_of(graph, rest):
    tokens = jnp.zeros((1, 8), jnp.int32)
    return lambda factors: llama.next_token_loss(nnx.merge(graph, factors, rest), tokens)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_no_dense_kernel_is_kept_for_the_backward_pass(kind, scanned):
    """As JAX hands the arrays on, before a compiler; dense kernels are seen to be found."""
    graph, factors, rest = adapted(kind, depth=2, scanned=scanned)
    kept = jax.eval_shape(lambda f, r: jax.vjp(loss_of(graph, r), f)[1], factors, rest)
    shapes = {(128, 128), (128, 512), (512, 128)}
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    dense = [x for x in floats if x.shape[-2:] in shapes]
    assert len(dense) >= 7 if kind is None else not dense


def memory(kind, device=None, **options):
    """(bytes of what is frozen, of a compiled step's arguments, of its temporaries)."""
    graph, factors, rest = adapted(kind, **options)
    step = lambda factors, rest: jax.value_and_grad(loss_of(graph, rest))(factors)  # noqa: E731
    if device is not None:
        where = jax.sharding.SingleDeviceSharding(device)
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
        factors, rest = jax.tree.map(place, (factors, rest))
    found = jax.jit(step).lower(factors, rest).compile().memory_analysis()
    return quantized.nbytes(rest), found.argument_size_in_bytes, found.temp_size_in_bytes


def saved_by(bits):
    """Bytes, with a float32 scale for every tile."""
    return DEEP.num_hidden_layers * ONE_LAYER * (1 - (bits + 32 / quantized.TILE) / 32)


def test_a_compiled_step_has_the_blocks_and_no_more_than_one_dense_layer():
    (dense, given_dense, temporary_dense), (frozen, given, temporary) = (
        memory(kind, scanned=True) for kind in (None, "int8")
    )
    assert dense - frozen == given_dense - given == saved_by(8)
    assert temporary - temporary_dense <= ONE_LAYER


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("options", LAYERS)
def test_so_it_is_on_a_tpu(kind, options):
    _, _, temporary = memory(kind, tpu_slice.devices("v5e:2x2")[0], **options)
    assert temporary <= ONE_LAYER


# Errors


@pytest.mark.parametrize(
    ("kind", "tile", "message"),
    [
        ("nf5", TILE, "unknown quantisation 'nf5'; did you mean 'nf4'.* nf4, int4, int8"),
        ("nf4", 12, "tile 12 does not divide the inputs of layers/0/.*, 32; choose one"),
        ("nf4", 0, "tile is 0; expected .* at least 1"),
    ],
)
def test_what_cannot_be_quantised_is_told_and_unchanged(kind, tile, message):
    model = llama.Llama(PLAIN, rngs=nnx.Rngs(0))
    before = nnx.graphdef(model)
    with pytest.raises(ValueError, match=message):
        quantized.quantize(model, kind, tile)
    assert nnx.graphdef(model) == before


def test_a_model_is_quantised_once_and_before_it_is_adapted():
    model = llama.Llama(PLAIN, rngs=nnx.Rngs(0))
    quantized.quantize(model, "int4", TILE)
    with pytest.raises(ValueError, match=r"layers/0/.* is quantised already \(int4\); dequantize"):
        quantized.quantize(model, "nf4", TILE)
    adapted = made(PLAIN)
    with pytest.raises(ValueError, match=r"layers/0/.* has an adapter already; quantise .* before"):
        quantized.quantize(adapted, "nf4", TILE)


def test_a_method_that_trains_the_kernels_is_refused():
    quantized.check_trainable(None, "full", adapted=False)
    quantized.check_trainable("nf4", "lora", adapted=True)
    with pytest.raises(ValueError, match="full trains the kernels, which --quantize nf4 holds as"):
        quantized.check_trainable("nf4", "full", adapted=False)
