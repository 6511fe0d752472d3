"""The devices of a run: which share the rows of a batch, and which share the parameters.

The mesh has two axes. Batches are cut over both. Parameters, what is frozen, and the optimizer's
state are cut over "fsdp", each along one axis, and lie whole along "data": XLA gathers a weight
where it is used and adds up gradients where a sum crosses a cut. With one device there is no mesh
and nothing here does anything.
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lorapro_jax as lp
from experiments.finetune.config import Command
from experiments.models.rows import AXES

SMALLEST = 2**10  # elements of an array that it pays to cut


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that share every batch; `mesh` is None for one."""

    mesh: Mesh | None = None

    @property
    def count(self) -> int:
        """How many they are, over all processes."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of an array of which every device has the whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def in_use(self) -> contextlib.AbstractContextManager:
        """Inside it, what is traced is for these devices."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def loading(self) -> contextlib.AbstractContextManager:
        """Inside it, arrays are made on the host, for no device need hold a model whole."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.default_device(jax.local_devices(backend="cpu")[0])

    def shardings(self, params: Any) -> Any:
        """How parameters lie: each cut over "fsdp" along its longest axis that allows it."""

        def one(path, leaf) -> NamedSharding:
            axis = _axis_to_cut(path, leaf.shape, self.mesh.shape["fsdp"])
            spec = () if axis is None else (*(None,) * axis, "fsdp")
            return NamedSharding(self.mesh, PartitionSpec(*spec))

        return jax.tree_util.tree_map_with_path(one, params)

    def state_shardings(
        self, tx: optax.GradientTransformation, params: Any, layout: lp.Layout | None = None
    ) -> Any:
        """How the optimizer's state lies: each array as what it belongs to."""
        abstract = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            params,
            self.shardings(params),
        )
        return lp.state_shardings(tx, abstract, layout=layout)

    def place(self, params: Any) -> Any:
        """The same values on the devices; every process has them already."""
        return params if self.mesh is None else jax.device_put(params, self.shardings(params))

    def replicate(self, tree: Any) -> Any:
        """The same values, whole on every device; every process has them already."""
        return tree if self.mesh is None else jax.device_put(tree, self.replicated)

    def shard(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The global batch, of which this process has `batch`."""
        if self.mesh is None:
            return batch
        rows = NamedSharding(self.mesh, PartitionSpec(AXES))
        return {k: jax.make_array_from_process_local_data(rows, x) for k, x in batch.items()}

    def gather(self, x: Any) -> np.ndarray:
        """All of an array, in every process."""
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))


ONE = Devices()


def _axis_to_cut(path: tuple, shape: tuple[int, ...], parts: int) -> int | None:
    """The longest axis that `parts` divides and that is no rank; None: the array stays whole."""
    if parts == 1 or len(shape) < 2 or math.prod(shape) < SMALLEST:
        return None
    leaf = jax.tree_util.keystr(path[-1:], simple=True)
    rank = {"lora_a": len(shape) - 1, "lora_b": len(shape) - 2}.get(leaf)
    fit = [axis for axis, size in enumerate(shape) if size % parts == 0 and axis != rank]
    return max(fit, key=lambda axis: shape[axis], default=None)


def devices_of(command: Command) -> Devices:
    """The devices that the command asks for, the same number of every process; or a ValueError."""
    there = jax.local_device_count()
    wanted = command.devices or (there if command.distributed else 1)
    count = wanted * jax.process_count()
    shares = count * command.accumulate
    if wanted > there:
        raise ValueError(
            f"--devices {wanted}, but this process has {there} of {jax.default_backend()}; ask for "
            f"fewer, or set JAX_NUM_CPU_DEVICES={wanted} to divide a CPU"
        )
    if command.distributed and wanted < there:
        raise ValueError(
            f"--devices {wanted}, but this process has {there}; a distributed run takes all: leave "
            "--devices out, or hide devices from the process"
        )
    if count % command.fsdp:
        raise ValueError(
            f"--fsdp {command.fsdp} does not divide the {count} devices of this run; choose a "
            "divisor, or other --devices"
        )
    if command.batch_size % shares:
        raise ValueError(
            f"--batch-size {command.batch_size} cannot be shared by {count} devices in "
            f"{command.accumulate} parts (--accumulate); make it a multiple of {shares}"
        )
    if count == 1:
        return ONE
    # In the order of their processes, for a process's share of the rows is that of its rank.
    chosen = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))[:count]
    return Devices(Mesh(np.array(chosen).reshape(-1, command.fsdp), AXES))
