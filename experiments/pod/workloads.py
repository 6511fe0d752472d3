"""What `experiments.pod` compiles a training step of: models and their losses, abstractly.

The shapes are the real models', the weights are not there: `nnx.eval_shape` holds no array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

import lorapro_jax as lp
from experiments.models import bert, llama, t5
from experiments.models.t5_config import T5Config
from experiments.pod.t5 import BASE, THREE_B, Scan, scanned
from lorapro_jax import nnx as lora

HEAD = r"head/.*"  # minilm's, fresh: trained beside the adapters
MINILM = bert.BertConfig(
    vocab_size=30_522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
)
ANSWER = 8  # tokens of T5's targets: the words of a label and the end, padded
_STACKED = lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))

Tree = Any


class Workload(NamedTuple):
    """A model and its loss, abstractly."""

    graph: nnx.GraphDef
    trainable: Tree  # jax.ShapeDtypeStruct
    frozen: Tree
    batch: Tree
    loss: Callable[[nnx.Module, Tree], jax.Array]
    layout: lp.Layout  # of the factors
    scale: float
    head: bool  # whether a head trains beside the factors
    sharded: bool  # whether parameters are; else every chip holds them all, and `fsdp` is the batch


def decoder(config: llama.LlamaConfig, batch: int, length: int, rank: int) -> Workload:
    """Next-token training of a Llama-shaped stack, bf16 weights and activations."""
    alpha = 2.0 * rank

    def make():
        spec = PartitionSpec("fsdp", None, None)
        return llama.Llama(config, rank=rank, alpha=alpha, spec=spec, rngs=nnx.Rngs(0))

    graph, trainable, frozen = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)
    return Workload(
        graph,
        nnx.as_pure(trainable),
        nnx.as_pure(frozen),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        llama.next_token_loss,
        lp.layouts.FLAX.declare({r"layers/.*": _STACKED}),
        alpha / rank,
        head=False,
        sharded=True,
    )


def encoder(config: bert.BertConfig, batch: int, length: int, rank: int) -> Workload:
    """Two-class training of a MiniLM-shaped encoder, float32 weights, bf16 activations.

    Its 90 MB lie whole on every chip: sharded, the activations would travel instead.
    """
    alpha = 2.0 * rank

    def make():
        model = bert.BertClassifier(config, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        targets = r"encoder/layers/\d+/(attention/(query|key|value|out)|up|down)"
        lora.add_lora(model, rank, alpha, targets=targets, rngs=nnx.Rngs(1))
        return model

    def in_head(path, _):
        return path[0] == "head"

    trains = nnx.Any(nnx.LoRAParam, nnx.All(nnx.Param, in_head))
    graph, trainable, frozen = nnx.split(nnx.eval_shape(make), trains, ...)
    data = {
        "tokens": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "mask": jax.ShapeDtypeStruct((batch, length), jnp.bool_),
        "labels": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    return Workload(
        graph,
        nnx.as_pure(trainable),
        nnx.as_pure(frozen),
        data,
        _classification_loss,
        lp.layouts.FLAX,
        alpha / rank,
        head=True,
        sharded=False,
    )


def text_to_text(
    config: T5Config, dtype: Any, remat: bool, batch: int, length: int, rank: int
) -> Workload:
    """Training of a T5 on answers of a few words, weights in `dtype`, bf16 activations."""
    alpha = 2.0 * rank
    how = Scan(rank, alpha, remat, PartitionSpec("fsdp", None, None))

    def make():
        return scanned(config, how, dtype=jnp.bfloat16, param_dtype=dtype, rngs=nnx.Rngs(0))

    graph, trainable, frozen = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)
    data = {
        "tokens": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "mask": jax.ShapeDtypeStruct((batch, length), jnp.bool_),
        "targets": jax.ShapeDtypeStruct((batch, ANSWER), jnp.int32),
        "targets_mask": jax.ShapeDtypeStruct((batch, ANSWER), jnp.bool_),
    }
    return Workload(
        graph,
        nnx.as_pure(trainable),
        nnx.as_pure(frozen),
        data,
        _answer_loss,
        lp.layouts.FLAX.declare({r"(en|de)coder/layers/.*": _STACKED}),
        alpha / rank,
        head=False,
        sharded=True,
    )


def _answer_loss(model: t5.T5, batch: Tree) -> jax.Array:
    inputs_BT = model.shifted(batch["targets"])
    logits_BTV = model(batch["tokens"], batch["mask"], inputs_BT)
    return t5.token_loss(logits_BTV, batch["targets"], batch["targets_mask"])


def _classification_loss(model: nnx.Module, batch: Tree) -> jax.Array:
    logits_BC = model(batch["tokens"], batch["mask"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BC, batch["labels"]))


class Model(NamedTuple):
    """A workload, and the sizes it has unless others are asked for."""

    build: Callable[[int, int, int], Workload]  # (batch, length, rank)
    rows: int  # of the batch, for each of its shards
    length: int  # tokens in a row
    rank: int = 16


# T5-base as `--config t5_glue` trains it, weights in float32. T5-3B with as many tokens a chip, in
# rows as long as its pre-training's, weights in bf16, as is usual at its size.
MODELS = {
    "minilm": Model(lambda *sizes: encoder(MINILM, *sizes), 32, 128),
    "llama3-8b": Model(lambda *sizes: decoder(llama.LlamaConfig(), *sizes), 1, 2048),
    "t5-base": Model(
        lambda *sizes: text_to_text(BASE, jnp.float32, False, *sizes), 32, 128, rank=8
    ),
    "t5-3b": Model(
        lambda *sizes: text_to_text(THREE_B, jnp.bfloat16, True, *sizes), 8, 512, rank=8
    ),
    "tiny": Model(lambda *sizes: decoder(llama.TINY, *sizes), 1, 16),
}
