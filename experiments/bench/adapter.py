"""The adapters' own path: a MiniLM-shaped training step under LoRA against full fine-tuning.

    python -m experiments.bench.adapter [--rounds 15]

Six BERT layers, 384 wide, on 32 x 64 positions with random weights, rank 8 on all 36 linears; one
jitted value_and_grad a variant. The Linen encoder runs on (B, T, D), the NNX one (that of
experiments.models) on (B T, D), so each has its own full fine-tuning and its own floor: a backward
pass that reaches the bottom of the stack without any weight's gradient.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import tyro
from flax import linen as nn
from flax import nnx

from experiments.bench import timing
from experiments.models.bert import BertConfig, BertLayer, attend, gelu
from lorapro_jax import linen as lora_linen
from lorapro_jax import nnx as lora_nnx

CONFIG = BertConfig(
    vocab_size=8,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
)
LINEARS = r"layers_\d+/(query|key|value|out|up|down)"
NNX_LINEARS = r"layers/\d+/(attention/(query|key|value|out)|up|down)"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the issue's."""

    rounds: int = 15
    batch: int = 32
    length: int = 64
    rank: int = 8
    scale: float = 2.0
    results: pathlib.Path = pathlib.Path("experiments/results/bench_adapter.jsonl")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One jitted step; `step(trainable, frozen)` returns (loss, gradients of trainable)."""

    framework: str
    name: str
    step: Callable
    trainable: object
    frozen: object


class Layer(nn.Module):
    """A post-LN BERT block on x (B, T, D)."""

    @nn.compact
    def __call__(self, x_BTD):
        """(B, T, D) to (B, T, D)."""
        width, heads = CONFIG.hidden_size, CONFIG.num_attention_heads

        def project(name):
            y_BTD = nn.Dense(width, name=name)(x_BTD)
            return y_BTD.reshape(*x_BTD.shape[:2], heads, width // heads)

        bias_B11S = jnp.zeros((x_BTD.shape[0], 1, 1, x_BTD.shape[1]), jnp.float32)
        attended = attend(project("query"), project("key"), project("value"), bias_B11S)
        x_BTD = x_BTD + nn.Dense(width, name="out")(attended.reshape(x_BTD.shape))
        x_BTD = nn.LayerNorm(use_fast_variance=False)(x_BTD)
        hidden_BTF = gelu(nn.Dense(CONFIG.intermediate_size, name="up")(x_BTD))
        x_BTD = x_BTD + nn.Dense(width, name="down")(hidden_BTF)
        return nn.LayerNorm(use_fast_variance=False)(x_BTD)


class LinenStack(nn.Module):
    """The blocks in a row."""

    @nn.compact
    def __call__(self, x_BTD):
        """(B, T, D) to (B, T, D)."""
        for i in range(CONFIG.num_hidden_layers):
            x_BTD = Layer(name=f"layers_{i}")(x_BTD)
        return x_BTD


class NNXStack(nnx.Module):
    """The blocks of experiments.models in a row, on x (P, D)."""

    def __init__(self, rngs: nnx.Rngs):
        layers = range(CONFIG.num_hidden_layers)
        self.layers = nnx.List(BertLayer(CONFIG, rngs=rngs) for _ in layers)

    def __call__(self, x_PD, bias_B11S):
        """(P, D) to (P, D)."""
        for layer in self.layers:
            x_PD = layer(x_PD, bias_B11S)
        return x_PD


def _loss(y):
    return jnp.mean(jnp.square(y - 0.1))


def _grown(lora):
    """Factors with b off zero, as they are after the first step."""
    return jax.tree.map(lambda leaf: leaf + jnp.float32(0.01), lora)


def _naive(lora, scale):
    """The textbook interceptor: (x a) b over x (B, T, m)."""

    def intercept(next_call, args, kwargs, context):
        y = next_call(*args, **kwargs)
        if not isinstance(context.module, nn.Dense):
            return y
        node = lora
        for key in context.module.path:
            node = node[key]
        return y + scale * (args[0] @ node["lora_a"]) @ node["lora_b"]

    return intercept


def linen_variants(settings: Settings) -> list[Variant]:
    """Full, floor, naive and ours, on (B, T, D)."""
    model = LinenStack()
    shape = settings.batch, settings.length, CONFIG.hidden_size
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    variables = model.init(jax.random.key(1), x)
    made = lora_linen.init_lora(
        jax.random.key(2), variables["params"], settings.rank, targets=LINEARS
    )
    lora = _grown(made)

    def full(variables, x):
        return _loss(model.apply(variables, x))

    def floor(shift_D, frozen):
        variables, x = frozen
        return _loss(model.apply(variables, x + shift_D[None, None, :]))

    def naive(lora, frozen):
        variables, x = frozen
        with nn.intercept_methods(_naive(lora, settings.scale)):
            return _loss(model.apply(variables, x))

    def ours(lora, frozen):
        variables, x = frozen
        y = lora_linen.apply_with_lora(model, variables, lora, x, scale=settings.scale)
        return _loss(y)

    frozen, shift_D = (variables, x), jnp.zeros(CONFIG.hidden_size, jnp.float32)
    return [
        Variant("linen", "full", full, variables, x),
        Variant("linen", "floor", floor, shift_D, frozen),
        Variant("linen", "naive", naive, lora, frozen),
        Variant("linen", "ours", ours, lora, frozen),
    ]


def nnx_variants(settings: Settings) -> list[Variant]:
    """Full, floor and ours, on (B T, D)."""
    model = NNXStack(nnx.Rngs(1))
    rows = settings.batch * settings.length
    x = jax.random.normal(jax.random.key(0), (rows, CONFIG.hidden_size), jnp.float32)
    bias_B11S = jnp.zeros((settings.batch, 1, 1, settings.length), jnp.float32)
    graph, params = nnx.split(model)
    alpha = settings.scale * settings.rank
    lora_nnx.add_lora(model, settings.rank, alpha, targets=NNX_LINEARS, rngs=nnx.Rngs(2))
    lora_graph, made, base = nnx.split(model, nnx.LoRAParam, ...)
    lora = _grown(made)

    def full(params, x):
        return _loss(nnx.merge(graph, params)(x, bias_B11S))

    def floor(shift_D, frozen):
        params, x = frozen
        return _loss(nnx.merge(graph, params)(x + shift_D[None, :], bias_B11S))

    def ours(lora, frozen):
        base, x = frozen
        return _loss(nnx.merge(lora_graph, lora, base)(x, bias_B11S))

    return [
        Variant("nnx", "full", full, params, x),
        Variant("nnx", "floor", floor, jnp.zeros(CONFIG.hidden_size, jnp.float32), (params, x)),
        Variant("nnx", "ours", ours, lora, (base, x)),
    ]


def measure(variants: list[Variant], rounds: int) -> list[dict]:
    """Seconds of each step, and its ratio to full fine-tuning in the same framework."""

    def call(variant: Variant) -> Callable[[], None]:
        step = jax.jit(jax.value_and_grad(variant.step))
        return lambda: jax.block_until_ready(step(variant.trainable, variant.frozen))

    calls = {(variant.framework, variant.name): call(variant) for variant in variants}
    times = timing.by_turns(calls, rounds)
    rows = []
    for framework in dict.fromkeys(variant.framework for variant in variants):
        own = {name: t for (where, name), t in times.items() if where == framework}
        rows += [{"framework": framework, **row} for row in timing.summary(own, "full")]
    return rows


def main(settings: Settings) -> None:
    """Measures, shows, and appends one JSON line per variant."""
    rows = measure(linen_variants(settings) + nnx_variants(settings), settings.rounds)
    timing.show(rows, f"one step, {settings.batch} x {settings.length} tokens, r = {settings.rank}")
    timing.append(rows, "adapter", settings, settings.results)


if __name__ == "__main__":
    main(tyro.cli(Settings))
