"""A training step over abstract, sharded arrays: what `experiments.pod` compiles for a TPU slice.

Nothing here holds an array: parameters, optimizer state and batch are `jax.ShapeDtypeStruct`s with
a `NamedSharding`, so that 8 billion parameters cost nothing. The mesh has two axes: `fsdp` shards
the rows of the batch and one axis of every kernel, `tensor` the other one. A factor lies like its
kernel: a (m, r) is sharded as the kernel's m, b (r, n) as its n, each over `fsdp` too, and the rank
never. An axis whose size the mesh does not divide is replicated.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lorapro_jax as lp
from experiments import pod_t5
from experiments.models import bert, llama, t5
from experiments.models.t5_config import T5Config
from lorapro_jax import nnx as lora

# LoRA-Pro in its three modes, AdamW on the factors, and the least update that uses every gradient.
MODES = ("efficient", "factored", "full", "lora", "sgd")
HEAD = r"head/.*"  # minilm's, fresh: trained beside the adapters
MINILM = bert.BertConfig(
    vocab_size=30_522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
)
ANSWER = 8  # tokens of T5's targets, padding included: a label's words have two to six
_STACKED = lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))
# Kernels whose inputs are split over `tensor`: they follow one whose outputs are.
_ROW_PARALLEL = re.compile(r"(.*/)?(o|out|down|wo)/(kernel|lora_[ab])")

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


class Step(NamedTuple):
    """A jitted step and the abstract arguments to compile it with."""

    jitted: Any
    args: tuple[Tree, ...]  # trainable, optimizer state, then frozen and batch, or the gradients


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
    how = pod_t5.Scan(rank, alpha, remat, PartitionSpec("fsdp", None, None))

    def make():
        return pod_t5.scanned(config, how, dtype=jnp.bfloat16, param_dtype=dtype, rngs=nnx.Rngs(0))

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


# T5-base as `--config t5_glue` trains it, its weights float32. T5-3B as many tokens a chip in rows of
# its pre-training's length, its weights bf16, as those of models of its size usually are.
MODELS = {
    "minilm": Model(lambda *sizes: encoder(MINILM, *sizes), 32, 128),
    "llama3-8b": Model(lambda *sizes: decoder(llama.LlamaConfig(), *sizes), 1, 2048),
    "t5-base": Model(
        lambda *sizes: text_to_text(pod_t5.BASE, jnp.float32, False, *sizes), 32, 128, rank=8
    ),
    "t5-3b": Model(
        lambda *sizes: text_to_text(pod_t5.THREE_B, jnp.bfloat16, True, *sizes), 8, 512, rank=8
    ),
    "tiny": Model(lambda *sizes: decoder(llama.TINY, *sizes), 1, 16),
}


def optimizer(mode: str, work: Workload, rate: float = 1e-4) -> optax.GradientTransformation:
    """Clipping by global norm, then the rule of `mode`; AdamW for a head."""
    if mode == "sgd":
        return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))
    if mode == "lora":
        tx = optax.adamw(rate)
    else:
        tx = lp.lorapro_adamw(rate, work.scale, mode=mode, layout=work.layout)
    if work.head:
        tx = lp.freeze_base(tx, extra={HEAD: optax.adamw(rate)}, layout=work.layout)
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def path_of(path: tuple) -> str:
    """A leaf's keys joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter lies on the mesh."""
    if len(shape) < 2 or path.endswith("scale"):
        return PartitionSpec()
    rows, columns = ("tensor", "fsdp") if _ROW_PARALLEL.fullmatch(path) else ("fsdp", "tensor")
    if path.endswith("lora_a"):
        wanted = _spread(rows), ()
    elif path.endswith("lora_b"):
        wanted = (), _spread(columns)
    elif path.endswith("embedding"):  # (V, D)
        wanted = ("tensor",), ("fsdp",)
    else:
        wanted = (rows,), (columns,)
    axes = (*((),) * (len(shape) - 2), *wanted)
    return PartitionSpec(
        *(
            axis if axis and size % math.prod(mesh.shape[name] for name in axis) == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def _spread(axis: str) -> tuple[str, ...]:
    """A factor's one long axis: as its kernel's, and over fsdp, which would else repeat it."""
    return (axis,) if axis == "fsdp" else (axis, "fsdp")


def placed(tree: Tree, mesh: Mesh, spec: Callable[[str, tuple[int, ...]], PartitionSpec]) -> Tree:
    """The abstract tree with `spec(path, shape)` as the sharding of every leaf."""

    def one(path, leaf):
        where = NamedSharding(mesh, spec(path_of(path), leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(one, tree)


def _like(tree: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def make(
    work: Workload, mode: str, mesh: Any, tx: optax.GradientTransformation | None = None
) -> Step:
    """The whole step of `mode`: loss, gradients of what trains, update, new parameters.

    `tx` replaces `optimizer(mode, work)`, for another learning rate.
    """
    tx = optimizer(mode, work) if tx is None else tx

    def parameter(path, shape):
        return spec_of(path, shape, mesh) if work.sharded else PartitionSpec()

    trainable = placed(work.trainable, mesh, parameter)
    shapes = {
        path_of(path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(trainable)[0]
    }

    def kernel(pair):
        rows, columns = shapes[f"{pair}/lora_a"][:-1], shapes[f"{pair}/lora_b"][-1]
        return parameter(f"{pair}/kernel", (*rows, columns))

    args = (
        trainable,
        _like(
            jax.eval_shape(tx.init, work.trainable),
            lp.state_shardings(tx, trainable, kernels=kernel, layout=work.layout),
        ),
        placed(work.frozen, mesh, parameter),
        placed(work.batch, mesh, lambda _, shape: PartitionSpec("fsdp")),
    )

    def loss(trainable, frozen, batch):
        return work.loss(nnx.merge(work.graph, trainable, frozen), batch)

    def step(trainable, state, frozen, batch):
        value, gradients = jax.value_and_grad(loss)(trainable, frozen, batch)
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    kept = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in args[:2]]
    replicated = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*kept, replicated))
    return Step(jitted, args)


def make_update(work: Workload, mode: str, mesh: Any) -> Step:
    """The update alone, given the gradients: clipping, the rule of `mode`, new parameters."""
    whole, tx = make(work, mode, mesh), optimizer(mode, work)
    trainable, state, _, _ = whole.args

    def update(trainable, state, gradients):
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state

    kept = tuple(jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (trainable, state))
    jitted = jax.jit(update, donate_argnums=(0, 1), out_shardings=kept)
    return Step(jitted, (trainable, state, trainable))


def bytes_per_chip(tree: Tree) -> int:
    """Bytes of the leaves' shards."""
    return sum(
        jnp.dtype(leaf.dtype).itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )
