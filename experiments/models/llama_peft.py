"""PEFT's adapters on a Llama of stacked layers: one of each linear and layer <-> one stack.

Ranks and scales may differ in the files, and layers may have none: the factors of a linear are
padded with zeros to the largest rank, a (L, D, R), b (L, R, F), and b takes up the scale.
"""

import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

import lorapro_jax as lp
from experiments.models import llama, llama_files
from experiments.models.llama import Llama
from experiments.storage import read_json

CONFIG = "adapter_config.json"
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer


class _Pair(NamedTuple):
    """The adapter of one linear of one layer."""

    module: str  # Hugging Face's name
    a: np.ndarray  # (D, r)
    b: np.ndarray  # (r, F), scaled


def module_name(layer: int | str, linear: str) -> str:
    """Hugging Face's name of a layer's linear."""
    return llama_files.tensor_name(("layers", layer, linear, "kernel")).removesuffix(".weight")


def base_of(folder: pathlib.Path) -> str | None:
    """The model that an adapter belongs to, a folder, file, NAME or NAME@COMMIT; None: not told.

    Raises:
        ValueError: the adapter's configuration is damaged.
    """
    found = read_json(folder / CONFIG, (), "an adapter's configuration", "Save it again")
    name, commit = found.get("base_model_name_or_path"), found.get("revision")
    return f"{name}@{commit}" if name and commit else name


def adapt(model: Llama, folder: pathlib.Path) -> None:
    """Adds the adapters of a PEFT folder to a model with stacked layers, in place.

    Raises:
        FileNotFoundError: a file of the two is missing.
        ValueError: a file is damaged, or the adapter is not of this model's linears.
    """
    pairs = _pairs(folder, model.config.num_hidden_layers)
    rank = max(pair.a.shape[1] for pair in pairs.values())
    linears = sorted({linear for _, linear in pairs})
    llama.adapt(model, rank, rank, targets="|".join(linears), rngs=nnx.Rngs(0))  # a scale of 1
    for name in linears:
        linear = getattr(model.layers, name)
        a, b = (np.zeros(x.shape, np.float32) for x in (linear.lora_a, linear.lora_b))
        for (layer, _), pair in ((key, pairs[key]) for key in pairs if key[1] == name):
            _check_shape(pair, (a.shape[1], b.shape[2]), folder)
            r = pair.a.shape[1]
            a[layer, :, :r], b[layer, :r] = pair.a, pair.b
        linear.lora_a[...], linear.lora_b[...] = jnp.asarray(a), jnp.asarray(b)


def _pairs(folder: pathlib.Path, layers: int) -> dict[tuple[int, str], _Pair]:
    """{(layer, linear): its adapter} of a PEFT folder."""
    tree, scales = lp.peft.load(folder)
    factors = traverse_util.flatten_dict(tree, sep="/")
    places = {module_name(i, linear): (i, linear) for i in range(layers) for linear in LINEARS}
    pairs = {}
    for path, scale in scales.items():
        if (module := path.replace("/", ".")) not in places:
            raise ValueError(
                f"{folder} adapts {module}, which is no linear of this model's {layers} layers; "
                "give the model that it was trained on (--model)"
            )
        a, b = (np.asarray(factors[f"{path}/{x}"], np.float32) for x in ("lora_a", "lora_b"))
        pairs[places[module]] = _Pair(module, a, b * scale)
    return pairs


def _check_shape(pair: _Pair, expected: tuple[int, int], folder: pathlib.Path) -> None:
    if (found := (pair.a.shape[0], pair.b.shape[1])) != expected:
        raise ValueError(
            f"{folder}: {pair.module} goes from {found[0]} to {found[1]} features, in this model "
            f"from {expected[0]} to {expected[1]}; give the model that it was trained on (--model)"
        )
