"""A complete run's model, made again of its configuration and its final.safetensors."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import storage
from experiments.finetune.checkpoint import CONFIG, FINAL
from experiments.finetune.config import RunConfig
from experiments.finetune.prepare import model_of
from experiments.models import weights

_REMEDY = "delete the run's folder and give its command again to make it anew"


def names_of(params: Any) -> list[str]:
    """The leaves' paths, as final.safetensors names them."""
    paths = (path for path, _ in jax.tree.leaves_with_path(params))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def run_of(folder: pathlib.Path) -> RunConfig:
    """The run that a folder belongs to.

    Raises:
        ValueError: its config.json is damaged, or of another version of this program.
    """
    found = storage.read_json(folder / CONFIG, (), "a run's configuration", _REMEDY)
    try:
        return RunConfig(**found)
    except TypeError as error:
        raise ValueError(
            f"{folder / CONFIG} is no configuration of this version's runs ({error}); {_REMEDY}"
        ) from error


def trained(run: RunConfig, folder: pathlib.Path) -> nnx.Module:
    """The run's model with its trained parameters, without dropout.

    Raises:
        FileNotFoundError: the folder has no trained parameters.
        ValueError: they are damaged, or another model's.
    """
    file = folder / FINAL
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: the run is not complete, has diverged, or was made by "
            "experiments.sweep, which keeps no parameters. The command of experiments.finetune "
            "completes the first; of the others delete the folder before"
        )
    tensors = weights.read(file, _REMEDY)
    graph, params, frozen = model_of(run)
    leaves, structure = jax.tree.flatten(params)
    expected = {name: leaf.shape for name, leaf in zip(names_of(params), leaves, strict=True)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if differing := sorted(dict(found.items() ^ expected.items())):
        name = differing[0]
        raise ValueError(
            f"{file}: {name} is {found.get(name, 'absent')}; the run's model expects "
            f"{expected.get(name, 'no such array')}: the file, or the model's weights, are not "
            f"those of the run; {_REMEDY}"
        )
    arrays = [jnp.asarray(tensors[x], leaf.dtype) for x, leaf in zip(expected, leaves, strict=True)]
    model = nnx.merge(graph, jax.tree.unflatten(structure, arrays), frozen)
    model.eval()
    return model
