"""What `experiments.pod` compiles a training step of: models and their losses, abstractly.

The shapes are the real models', the weights are not there: `nnx.eval_shape` holds no array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

import lorapro_jax as lp
from experiments.models import llama
from experiments.models.t5 import T5, token_loss
from experiments.models.t5_config import T5Config
from experiments.pod.t5 import BASE, THREE_B, Scan, scanned

ANSWER = 8  # tokens of T5's targets: the words of a label and the end, padded
SCALE = 2.0  # of the adapters; no cost depends on it
_ROWS = PartitionSpec("fsdp", None, None)  # of the activations (B, T, D)

Tree = Any


class Workload(NamedTuple):
    """A model and its loss, abstractly."""

    graph: nnx.GraphDef
    trainable: Tree  # jax.ShapeDtypeStruct
    frozen: Tree
    batch: Tree
    loss: Callable[[nnx.Module, Tree], jax.Array]
    layout: lp.Layout  # of the factors


def _workload(make: Callable[[], nnx.Module], batch: Tree, loss: Callable, stacked: str):
    """The workload of a model whose layers at `stacked` lie along one leading axis."""
    graph, trainable, frozen = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)
    layers = lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))
    layout = lp.layouts.FLAX.declare({stacked: layers})
    return Workload(graph, nnx.as_pure(trainable), nnx.as_pure(frozen), batch, loss, layout)


def decoder(config: llama.LlamaConfig, batch: int, length: int, rank: int) -> Workload:
    """Next-token training of a Llama-shaped stack, bf16 weights and activations."""

    def make():
        return llama.Llama(config, rank=rank, alpha=SCALE * rank, spec=_ROWS, rngs=nnx.Rngs(0))

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return _workload(make, tokens, llama.next_token_loss, r"layers/.*")


def text_to_text(
    config: T5Config, dtype: Any, remat: bool, batch: int, length: int, rank: int
) -> Workload:
    """Training of a T5 on answers of a few words, weights in `dtype`, bf16 activations."""

    def make():
        how = Scan(rank, SCALE * rank, remat, _ROWS)
        return scanned(config, how, dtype=jnp.bfloat16, param_dtype=dtype, rngs=nnx.Rngs(0))

    fields = {"tokens": (length, jnp.int32), "mask": (length, jnp.bool_)}
    fields |= {"targets": (ANSWER, jnp.int32), "targets_mask": (ANSWER, jnp.bool_)}
    data = {name: jax.ShapeDtypeStruct((batch, n), kind) for name, (n, kind) in fields.items()}
    return _workload(make, data, answer_loss, r"(en|de)coder/layers/.*")


def answer_loss(model: T5, batch: Tree) -> jax.Array:
    """The mean loss of the answers' tokens."""
    inputs_BT = model.shifted(batch["targets"])
    logits_BTV = model(batch["tokens"], batch["mask"], inputs_BT)
    return token_loss(logits_BTV, batch["targets"], batch["targets_mask"])


class Model(NamedTuple):
    """A workload, and the sizes it has unless others are asked for."""

    build: Callable[[int, int, int], Workload]  # (batch, length, rank)
    rows: int  # of the batch, for each of its shards
    length: int  # tokens in a row
    rank: int


# T5-base as `--config t5_glue` trains it, weights in float32. T5-3B with as many tokens a chip, in
# rows as long as its pre-training's, weights in bf16, as is usual at its size.
MODELS = {
    "llama3-8b": Model(lambda *sizes: decoder(llama.LlamaConfig(), *sizes), 1, 2048, 16),
    "t5-base": Model(lambda *sizes: text_to_text(BASE, jnp.float32, False, *sizes), 32, 128, 8),
    "t5-3b": Model(lambda *sizes: text_to_text(THREE_B, jnp.bfloat16, True, *sizes), 8, 512, 8),
    "tiny": Model(lambda *sizes: decoder(llama.TINY, *sizes), 1, 16, 16),
}
