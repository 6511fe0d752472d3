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
        how = {"scanned": True, "remat": True, "spec": _ROWS, "rngs": nnx.Rngs(0)}
        model = llama.Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, **how)
        llama.adapt(model, rank, SCALE * rank, rngs=nnx.Rngs(1))
        return model

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return _workload(make, tokens, llama.next_token_loss, r"layers/.*")


class Model(NamedTuple):
    """A workload, and the sizes it has unless others are asked for."""

    build: Callable[[int, int, int], Workload]  # (batch, length, rank)
    rows: int  # of the batch, for each of its shards
    length: int  # tokens in a row
    rank: int


MODELS = {
    "llama3-8b": Model(lambda *sizes: decoder(llama.LlamaConfig(), *sizes), 1, 2048, 16),
    "tiny": Model(lambda *sizes: decoder(llama.TINY, *sizes), 1, 16, 16),
}
