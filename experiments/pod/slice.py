"""A slice of TPUs that need not exist: from a name like v5e:16x16 to its chips and their mesh."""

import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments.checks import one_of

LIBTPU = "pip install libtpu==0.0.42.1"
# generation -> (name in TPU_ACCELERATOR_TYPE, cores a chip that it counts, GiB of memory a chip)
GENERATIONS = {
    "v4": ("v4", 2, 32),
    "v5e": ("v5litepod", 1, 16),
    "v5p": ("v5p", 2, 95),
    "v6e": ("v6e", 1, 32),
}


def chips_of(topology: str) -> int:
    """How many chips a topology has; a ValueError for a name that is none."""
    generation, _, shape = topology.partition(":")
    one_of("TPU generation", generation, GENERATIONS)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise ValueError(
            f"--topology {topology!r} has no shape such as 4x4; write GENERATION:SHAPE, "
            "as in v5e:4x4, v5e:16x16 or v5p:4x4x4"
        )
    return math.prod(map(int, shape.split("x")))


def mesh_of(topology: str, sizes: tuple[int, int]) -> Mesh:
    """The chips of the slice along the axes "fsdp" and "tensor"."""
    return Mesh(np.array(devices(topology)).reshape(sizes), ("fsdp", "tensor"))


def sizes_of(mesh: str | None, chips: int) -> tuple[int, int]:
    """The sizes of "fsdp" and "tensor" that --mesh asks for."""
    if mesh is None:
        return chips, 1
    sizes = tuple(map(int, mesh.split("x"))) if re.fullmatch(r"\d+x\d+", mesh) else ()
    if math.prod(sizes) != chips or not sizes:
        raise ValueError(
            f"--mesh {mesh!r} is not FSDPxTENSOR, whose product must be {chips}, such as {chips}x1"
        )
    return sizes


def memory(topology: str) -> int:
    """Bytes of main memory of a chip."""
    return GENERATIONS[topology.partition(":")[0]][2] * 2**30


def devices(topology: str) -> list[Any]:
    """The devices of a slice; an OSError without libtpu, a ValueError if it has no such slice."""
    name, cores, _ = GENERATIONS[topology.partition(":")[0]]
    # libtpu reads these when it is loaded: which slice this host belongs to (one that it would
    # else ask the cloud's metadata server for), and where the other hosts are.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{name}-{cores * chips_of(topology)}",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no chip is taken: another process may compile too
    )
    jax.config.update("jax_platforms", "cpu")  # tracing must not take a TPU that is there
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # what libtpu raises has no type of its own
        if "TPU support not installed" in str(error):
            raise OSError(
                f"libtpu, which holds the TPU compiler, is not installed; `{LIBTPU}`"
            ) from error
        first = str(error).splitlines()[0]
        raise ValueError(f"libtpu has no topology {topology!r}: {first}") from error
