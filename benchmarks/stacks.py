"""BERT's layers in a row, in NNX and in Linen, as functions of weights and of factors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import lorapro_jax as lp
from benchmarks import t5
from experiments.models.bert import BertConfig, BertLayer, attend, gelu

TARGETS = r"layers(/|_)\d+(/|_)(attention/)?(query|key|value|out|up|down)"


class Stack(NamedTuple):
    """The layers on x (B, T, D); `bias` (B or 1, 1, T or 1, T) is added to the scores."""

    weights: Any
    factors: Any
    plain: Callable[..., jax.Array]  # of (weights, x, bias)
    adapted: Callable[..., jax.Array]  # of (factors, weights, x, bias)


class LinenLayers(nn.Module):
    """What `BertLayer` computes, in Linen."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, bias_B1TS: jax.Array) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        c, (batch, length, width) = self.config, x_BTD.shape
        for i in range(c.num_hidden_layers):

            def dense(name: str, x: jax.Array, size: int = width, i: int = i) -> jax.Array:
                return nn.Dense(size, name=f"layers_{i}_{name}")(x)

            q, k, v = (
                dense(name, x_BTD).reshape(batch, length, c.num_attention_heads, -1)
                for name in ("query", "key", "value")
            )
            attended_BTD = attend(q, k, v, bias_B1TS).reshape(x_BTD.shape)
            x_BTD = nn.LayerNorm(use_fast_variance=False)(x_BTD + dense("out", attended_BTD))
            hidden_BTF = gelu(dense("up", x_BTD, c.intermediate_size))
            x_BTD = nn.LayerNorm(use_fast_variance=False)(x_BTD + dense("down", hidden_BTF))
        return x_BTD


class NNXLayers(nnx.Module):
    """The layers of experiments.models."""

    def __init__(self, config: BertConfig):
        rngs, layers = nnx.Rngs(1), range(config.num_hidden_layers)
        self.layers = nnx.List(BertLayer(config, rngs=rngs) for _ in layers)

    def __call__(self, x_BTD: jax.Array, bias_B1TS: jax.Array) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        x_PD = x_BTD.reshape(-1, x_BTD.shape[-1])
        for layer in self.layers:
            x_PD = layer(x_PD, bias_B1TS)
        return x_PD.reshape(x_BTD.shape)


def linen(config: BertConfig, rank: int) -> Stack:
    """With the factors beside the weights."""
    layers = LinenLayers(config)
    x_BTD, bias_B1TS = jnp.zeros((1, 1, config.hidden_size)), jnp.zeros((1, 1, 1, 1))
    weights = layers.init(jax.random.key(1), x_BTD, bias_B1TS)["params"]
    factors = lp.linen.init_lora(jax.random.key(2), weights, rank, targets=TARGETS)

    def plain(weights, *inputs):
        return layers.apply({"params": weights}, *inputs)

    def adapted(factors, weights, *inputs):
        variables = {"params": weights}
        return lp.linen.apply_with_lora(layers, variables, factors, *inputs, scale=t5.SCALE)

    return Stack(weights, factors, plain, adapted)


def in_nnx(config: BertConfig, rank: int) -> Stack:
    """With the factors in the model, whose other parameters are those without them."""
    layers = NNXLayers(config)
    graph, weights = nnx.split(layers)
    lp.nnx.add_lora(layers, rank, t5.SCALE * rank, targets=TARGETS, rngs=nnx.Rngs(2))
    with_factors, factors, _ = nnx.split(layers, nnx.LoRAParam, ...)

    def plain(weights, *inputs):
        return nnx.merge(graph, weights)(*inputs)

    def adapted(factors, weights, *inputs):
        return nnx.merge(with_factors, factors, weights)(*inputs)

    return Stack(weights, factors, plain, adapted)


FRAMEWORKS = {"nnx": in_nnx, "linen": linen}
