"""A frozen base in 4 or 8 bits (QLoRA): the kernels of a decoder's layers as blocks with scales.

    K[i, j] = scale[i // tile, j] value(number[i, j]);  y = x (K + s a b) + bias

A block's numbers are integers, or for nf4 the indices of 16 values; a block is `tile` inputs of one
output, which share a scale: absmax / 127.5 (int8), absmax / 7.5 (int4) or absmax (nf4). The numbers
are an array (in, out), the scales (in / tile, out), both with a leading axis L where the layers are
scanned. The embedding, the head, norms and biases stay as they are.

A layer stays an nnx.Linear, so that it can be adapted: `kernel[...]` is the blocks, with the dense
kernel's shape and dtype, and the layer's `dot_general` dequantises them when its inputs are there,
and again in the backward pass. No dense kernel is kept from one to the other. On a CPU that holds
of scanned layers only: its compiler computes those of all listed layers once, before the first.

Dettmers et al., arXiv:2305.14314: QLoRA, and nf4 in its appendix E; its second quantisation, of the
scales, is left out.
"""

import functools
import math
import typing
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from experiments.checks import divides, one_of
from experiments.models.llama import Llama

__all__ = ["Kind", "QuantizedKernel", "check_trainable", "dequantize", "kind_of", "quantize"]

Kind = Literal["nf4", "int4", "int8"]
TILE = 32  # a float32 scale adds one bit to each number of a tile; QLoRA's 64 adds half a bit


# QLoRA, appendix E: the quantiles of a normal distribution that nf4's indices stand for.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class QuantizedKernel(nnx.Variable[qwix.QArray]):
    """Blocks and scales in place of a kernel; not an nnx.Param: nothing trains or saves it."""


def _promoted(args: tuple, *, dtype: Any = None) -> tuple:
    """As in a dense layer, whose kernel has the dtype of the scales."""
    inputs, kernel, bias = args
    if not isinstance(kernel, qwix.QArray):  # x, a and b of an adapter
        return promote_dtype(args, dtype=dtype)
    inputs, _, bias = promote_dtype((inputs, kernel.scale, bias), dtype=dtype)
    return inputs, kernel, bias


def _dense(blocks: qwix.QArray) -> jax.Array:
    """What `qwix.dequantize` gives; its gather of nf4's values is slow on a TPU, a sum is fused."""
    numbers, scale = blocks.qvalue, blocks.scale
    if blocks.qtype == "nf4":
        numbers = numbers.astype(jnp.uint8)
        values = (jnp.asarray(value, scale.dtype) for value in NF4)
        numbers = sum(jnp.where(numbers == i, value, 0) for i, value in enumerate(values))
    *lead, tiles, outputs = scale.shape
    tiled = numbers.astype(scale.dtype).reshape(*lead, tiles, -1, outputs)
    return (tiled * scale[..., None, :]).reshape(blocks.shape)


def _product(inputs: jax.Array, blocks: qwix.QArray, dimensions: Any, **options) -> jax.Array:
    """`jax.lax.dot_general` with the dequantised kernel, which the backward pass computes anew."""

    @jax.checkpoint
    def product(inputs, blocks):
        kernel = _dense(blocks).astype(inputs.dtype)
        return jax.lax.dot_general(inputs, kernel, dimensions, **options)

    return product(inputs, blocks)


_DENSE = {"promote_dtype": promote_dtype, "dot_general": jax.lax.dot_general}
_QUANTIZED = {"promote_dtype": _promoted, "dot_general": _product}


def quantize(model: Llama, kind: Kind, tile: int = TILE) -> None:
    """Quantises the kernels of all layers in place, before adapters are added.

    Args:
      model: without adapters.
      kind: nf4 for weights that are normally distributed, int4 or int8.
      tile: inputs that share a scale; of every layer, the number of inputs is a multiple.

    Raises:
      ValueError: there is no such kind, a layer's inputs are not a multiple of `tile`, or the model
        has adapters or is quantised already. It is then unchanged.
    """
    linears = dict(_linears(model))
    for path, linear in linears.items():
        if isinstance(linear.kernel, QuantizedKernel):
            raise ValueError(f"{path} is quantised already ({kind_of(model)}); dequantize it first")
        if type(linear) is not nnx.Linear:
            raise ValueError(
                f"{path} has an adapter already; quantise the model before adapting it"
            )
        _check_fits(path, linear.kernel.shape, kind, tile)
    for linear in linears.values():
        _set(linear, kernel=quantized_kernel(linear.kernel, kind, tile), **_QUANTIZED)


def _check_fits(path: str, shape: tuple[int, ...], kind: str, tile: int) -> None:
    """Raises a ValueError for an unknown kind, or for a kernel that `tile` does not divide."""
    one_of("quantisation", kind, typing.get_args(Kind))
    if tile < 1:
        raise ValueError(f"tile is {tile}; expected how many inputs share a scale, at least 1")
    divides("tile", tile, f"the inputs of {path}", shape[-2])


def quantized_kernel(kernel: nnx.Variable, kind: Kind, tile: int = TILE) -> QuantizedKernel:
    """Of a dense kernel (in, out) or (L, in, out); the scales have its dtype."""
    return QuantizedKernel(_blocks(kernel[...], kind, tile))


@functools.partial(jax.jit, static_argnums=(1, 2))  # nf4 would hold 16 differences of each number
def _blocks(kernel: jax.Array, kind: Kind, tile: int) -> qwix.QArray:
    inputs = kernel.ndim - 2
    rest = [axis for axis in range(kernel.ndim) if axis != inputs]
    return qwix.quantize(kernel, kind, channelwise_axes=rest, tiled_axes={inputs: tile})


def dequantize(model: Llama) -> None:
    """Makes the kernels of a quantised model dense again in place, with adapters or without.

    What was rounded stays rounded. `lorapro_jax.nnx.merge_lora` and `llama_files.save` need this.

    Raises:
      ValueError: the model is not quantised.
    """
    if kind_of(model) is None:
        raise ValueError("the model is not quantised; its kernels are dense")
    for _, linear in _linears(model):
        _set(linear, kernel=nnx.Param(jax.jit(_dense)(linear.kernel[...])), **_DENSE)


def kind_of(model: Llama) -> Kind | None:
    """What the model's layers are held as; None if they are dense."""
    _, linear = next(_linears(model))
    return linear.kernel[...].qtype if isinstance(linear.kernel, QuantizedKernel) else None


def check_trainable(kind: Kind | None, method: str, adapted: bool) -> None:
    """Raises a ValueError if `method` trains the kernels, not adapters, and they are quantised."""
    if kind is not None and not adapted:
        raise ValueError(
            f"{method} trains the kernels, which --quantize {kind} holds as integers; choose a "
            "method with adapters (lora, lorapro-full), or leave --quantize out"
        )


def nbytes(tree: Any) -> int:
    """Of all arrays on a device, which holds two 4-bit integers in a byte, NumPy one."""
    return sum(_nbytes(leaf) for leaf in jax.tree.leaves(tree))


def _nbytes(leaf: Any) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jnp.integer):
        return math.ceil(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) / 8)
    return leaf.size * leaf.dtype.itemsize


def _set(linear: nnx.Linear, **attributes) -> None:
    for name, value in attributes.items():
        setattr(linear, name, value)


def _linears(model: Llama) -> Iterator[tuple[str, nnx.Linear]]:
    """(path, module) of every linear of the layers."""
    for path, module in nnx.iter_modules(model.layers):
        if isinstance(module, nnx.Linear):
            yield "/".join(map(str, ("layers", *path))), module
