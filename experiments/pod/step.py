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
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lorapro_jax as lp
from experiments.pod.workloads import SCALE, Tree, Workload

# LoRA-Pro's modes, AdamW on the projected gradients (the paper's efficient form), and plain LoRA.
MODES = ("factored", "full", "muon", "chain", "lora")
# Kernels whose inputs are split over `tensor`: they follow one whose outputs are.
_ROW_PARALLEL = re.compile(r"(.*/)?(o|down)/(kernel|lora_[ab])")


class Step(NamedTuple):
    """A jitted step and the abstract arguments to compile it with."""

    jitted: Any
    args: tuple[Tree, ...]  # trainable, optimizer state, then frozen and batch, or the gradients


def optimizer(mode: str, work: Workload, rate: float = 1e-4) -> optax.GradientTransformation:
    """Clipping by global norm, then the rule of `mode`."""
    clip = optax.clip_by_global_norm(1.0)
    if mode == "lora":
        return optax.chain(clip, optax.adamw(rate))
    if mode == "chain":
        return optax.chain(clip, lp.lorapro(SCALE, layout=work.layout), optax.adamw(rate))
    if mode == "muon":
        return optax.chain(clip, lp.lorapro_muon(rate, SCALE, layout=work.layout))
    return optax.chain(clip, lp.lorapro_adamw(rate, SCALE, mode=mode, layout=work.layout))


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


def _placed(tree: Tree, shardings: Tree) -> Tree:
    """The abstract tree with these shardings."""

    def one(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(one, tree, shardings)


def make(work: Workload, mode: str, mesh: Any, rate: float = 1e-4) -> Step:
    """The whole step of `mode`: loss, gradients of what trains, update, new parameters."""
    tx = optimizer(mode, work, rate)

    def lying(tree: Tree) -> Tree:
        def one(path, leaf):
            return NamedSharding(mesh, spec_of(path_of(path), leaf.shape, mesh))

        return _placed(tree, jax.tree_util.tree_map_with_path(one, tree))

    def kernel(pair):
        rows, columns = shapes[f"{pair}/lora_a"][:-1], shapes[f"{pair}/lora_b"][-1]
        return spec_of(f"{pair}/kernel", (*rows, columns), mesh)

    def step(trainable, state, frozen, batch):
        def loss(trainable):
            return work.loss(nnx.merge(work.graph, trainable, frozen), batch)

        value, gradients = jax.value_and_grad(loss)(trainable)
        return *updated(tx, gradients, state, trainable), value

    trainable = lying(work.trainable)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    leaves, _ = jax.tree_util.tree_flatten_with_path(trainable)
    shapes = {path_of(path): leaf.shape for path, leaf in leaves}
    states = lp.state_shardings(tx, trainable, kernels=kernel, layout=work.layout)
    args = (
        trainable,
        _placed(jax.eval_shape(tx.init, work.trainable), states),
        lying(work.frozen),
        _placed(work.batch, jax.tree.map(lambda _: rows, work.batch)),
    )
    return _jitted(step, args, NamedSharding(mesh, PartitionSpec()))


def make_update(work: Workload, mode: str, mesh: Any) -> Step:
    """The update alone, given the gradients: clipping, the rule of `mode`, new parameters."""
    tx = optimizer(mode, work)
    trainable, state, *_ = make(work, mode, mesh).args
    return _jitted(lambda t, state, g: updated(tx, g, state, t), (trainable, state, trainable))


def updated(tx: optax.GradientTransformation, gradients, state, trainable) -> tuple:
    """The new parameters and state."""
    updates, state = tx.update(gradients, state, trainable)
    return optax.apply_updates(trainable, updates), state


def _jitted(step: Callable, args: tuple[Tree, ...], *others: NamedSharding) -> Step:
    """With donated parameters and state, which stay where they are, as do `others`."""
    kept = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in args[:2]]
    return Step(jax.jit(step, donate_argnums=(0, 1), out_shardings=(*kept, *others)), args)


def bytes_per_chip(tree: Tree) -> int:
    """Bytes of the leaves' shards."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )
