"""One training step of MiniLM's six layers: LoRA under AdamW, LoRA-Pro, and full fine-tuning.

    python -m benchmarks.train_step

32 x 64 positions, rank 8 on all 36 linear maps, random weights, in Flax NNX (the encoder of
experiments.models, on (B T, D)) and in Linen (on (B, T, D)). A step is loss, gradients, update and
new parameters, jitted with donated buffers. Embeddings are left out: they cost LoRA nothing, and
full fine-tuning has 12 million more parameters with them.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import linen as nn
from flax import nnx

import lorapro_jax as lp
from benchmarks import t5, timing
from experiments.models.bert import BertConfig, BertLayer, attend, gelu

MINILM = BertConfig(
    vocab_size=30_522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
)
ADAPTED = ("adamw", "factored", "full")  # rules that train the factors
TARGETS = r"layers(_|/)\d+/(attention/)?(query|key|value|out|up|down)"


class Model(NamedTuple):
    """One framework's encoder: its weights, its factors, and the loss of both ways to train."""

    weights: Any
    factors: Any
    base: Any  # what is frozen beside the factors
    full: Callable[[Any], jax.Array]  # of weights
    adapted: Callable[[Any, Any], jax.Array]  # of (factors, base)


class Layer(nn.Module):
    """The block of experiments.models.bert in Linen, on x (B, T, D)."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Both halves of the block."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads

        def project(name: str) -> jax.Array:
            return nn.Dense(width, name=name)(x_BTD).reshape(*x_BTD.shape[:2], heads, -1)

        bias_B11S = jnp.zeros((len(x_BTD), 1, 1, x_BTD.shape[1]), jnp.float32)
        attended_BTNH = attend(project("query"), project("key"), project("value"), bias_B11S)
        x_BTD = x_BTD + nn.Dense(width, name="out")(attended_BTNH.reshape(x_BTD.shape))
        x_BTD = nn.LayerNorm(use_fast_variance=False)(x_BTD)
        hidden_BTF = gelu(nn.Dense(self.config.intermediate_size, name="up")(x_BTD))
        x_BTD = x_BTD + nn.Dense(width, name="down")(hidden_BTF)
        return nn.LayerNorm(use_fast_variance=False)(x_BTD)


class LinenStack(nn.Module):
    """The blocks in a row."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        for i in range(self.config.num_hidden_layers):
            x_BTD = Layer(self.config, name=f"layers_{i}")(x_BTD)
        return x_BTD


class NNXStack(nnx.Module):
    """The blocks of experiments.models in a row."""

    def __init__(self, config: BertConfig):
        rngs = nnx.Rngs(1)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List(BertLayer(config, rngs=rngs) for _ in layers)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """(B, T, D) to (B T, D)."""
        batch, length, width = x_BTD.shape
        x_PD, bias_B11S = x_BTD.reshape(-1, width), jnp.zeros((batch, 1, 1, length), jnp.float32)
        for layer in self.layers:
            x_PD = layer(x_PD, bias_B11S)
        return x_PD


def loss(y: jax.Array) -> jax.Array:
    """Of the output; any would do that has a gradient."""
    return jnp.mean(jnp.square(y - 0.1))


def linen_model(config: BertConfig, x_BTD: jax.Array, rank: int) -> Model:
    """With the factors beside the weights."""
    stack = LinenStack(config)
    weights = stack.init(jax.random.key(1), x_BTD)["params"]
    factors = lp.linen.init_lora(jax.random.key(2), weights, rank, targets=TARGETS)

    def full(weights: Any) -> jax.Array:
        return loss(stack.apply({"params": weights}, x_BTD))

    def adapted(factors: Any, weights: Any) -> jax.Array:
        variables = {"params": weights}
        return loss(lp.linen.apply_with_lora(stack, variables, factors, x_BTD, scale=t5.SCALE))

    return Model(weights, factors, weights, full, adapted)


def nnx_model(config: BertConfig, x_BTD: jax.Array, rank: int) -> Model:
    """With the factors in the model."""
    stack = NNXStack(config)
    plain, weights = nnx.split(stack)
    lp.nnx.add_lora(stack, rank, t5.SCALE * rank, targets=TARGETS, rngs=nnx.Rngs(2))
    graph, factors, base = nnx.split(stack, nnx.LoRAParam, ...)

    def full(weights: Any) -> jax.Array:
        return loss(nnx.merge(plain, weights)(x_BTD))

    def adapted(factors: Any, base: Any) -> jax.Array:
        return loss(nnx.merge(graph, factors, base)(x_BTD))

    return Model(weights, factors, base, full, adapted)


def stepper(objective: Callable, tx: Any, trained: Any, *frozen: Any) -> Callable[[], None]:
    """One training step, which keeps its own parameters and state."""

    def step(trained, state, *frozen):
        value, grads = jax.value_and_grad(objective)(trained, *frozen)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    carry = [jax.tree.map(jnp.copy, trained), tx.init(trained)]

    def call() -> None:
        *carry[:], value = compiled(*carry, *frozen)
        jax.block_until_ready((carry, value))

    return call


def steppers(framework: str, model: Model) -> dict[str, Callable[[], None]]:
    """{variant: step} of one framework."""
    tx = t5.transformations()
    calls = {f"{framework} fine-tuning adamw": stepper(model.full, tx["adamw"], model.weights)}
    return calls | {
        f"{framework} lora {name}": stepper(model.adapted, tx[name], model.factors, model.base)
        for name in ADAPTED
    }


def measure(config: BertConfig, batch: int, length: int, rank: int, rounds: int) -> timing.Times:
    """Seconds of all variants in both frameworks."""
    shape = batch, length, config.hidden_size
    x_BTD = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    calls = steppers("nnx", nnx_model(config, x_BTD, rank))
    return timing.by_turns(calls | steppers("linen", linen_model(config, x_BTD, rank)), rounds)


def bounds(times: timing.Times) -> list[dict]:
    """The ratios that have a bound."""
    return [
        timing.ratio(times, f"{framework} {over}", f"{framework} {under}", most=most)
        for framework in ("nnx", "linen")
        for over, under, most in (
            ("lora factored", "lora adamw", 1.08),
            ("lora adamw", "fine-tuning adamw", 0.95),
        )
    ]


def main(
    rounds: int = 20,
    batch: int = 32,
    length: int = 64,
    rank: int = 8,
    out: pathlib.Path = timing.RESULTS / "train_step.jsonl",
) -> None:
    """Measures, shows, and appends JSON lines."""
    times = measure(MINILM, batch, length, rank, rounds)
    settings = {"rounds": rounds, "batch": batch, "length": length, "rank": rank}
    timing.report("train_step", timing.medians(times), bounds(times), settings, out)


if __name__ == "__main__":
    tyro.cli(main)
