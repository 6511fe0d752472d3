"""The two files of a PEFT adapter: nothing is unpickled, and a write is whole or leaves no trace.

adapter_model.safetensors holds base_model.model.<module>.lora_A.weight (r, in) and .lora_B.weight
(out, r); adapter_config.json is described in _peft_config.
"""

import json
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lorapro_jax import _peft_config
from lorapro_jax._peft_config import Setting

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


class Adapter(NamedTuple):
    """One module's adapter as PEFT keeps it: its output gains scale B A x."""

    A: np.ndarray  # (r, in)
    B: np.ndarray  # (out, r)
    scale: float


def safetensors() -> ModuleType:
    """The package, with its numpy module imported."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "lorapro_jax.peft reads and writes safetensors files; install the package: "
            'pip install "lorapro-jax[peft]"'
        ) from error
    return safetensors


def read(directory: pathlib.Path) -> dict[str, Adapter]:
    """{module: adapter} of the adapter in `directory`.

    Raises:
      FileNotFoundError: a file of the two is missing.
      ValueError: one of them is damaged, is not plain LoRA, or they contradict each other.
    """
    config = _read_config(directory / CONFIG)
    factors = _read_factors(directory / WEIGHTS)
    found = _peft_config.settings(config, factors, directory / CONFIG)
    for module, pair in factors.items():
        _check_shapes(directory / WEIGHTS, module, pair["A"], pair["B"], found[module].rank)
    return {
        module: Adapter(pair["A"], pair["B"], found[module].scale)
        for module, pair in factors.items()
    }


def _read_config(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; pass the folder that PEFT's save_pretrained or lp.peft.save "
            f"wrote, with {CONFIG} and {WEIGHTS} in it"
        )
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # of the decoding, of JSON, of endless nesting
        raise ValueError(
            f"{file} is not JSON, or was cut short ({error}); save it again"
        ) from error
    _peft_config.check(config, file)
    return config


def _read_factors(file: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """{module: {"A": ..., "B": ...}}, complete, and nothing else in the file."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in _read_tensors(file).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{file}: {name} is no factor of plain LoRA on a linear layer, which are named "
                "base_model.model.<module>.lora_A.weight and .lora_B.weight. Embeddings, biases, "
                "DoRA's magnitudes and whole modules (modules_to_save) cannot be read"
            )
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    if not factors:
        raise ValueError(f"{file} holds no tensor; save the adapter again")
    for module, pair in factors.items():
        if len(pair) == 1:
            missing = "B" if "A" in pair else "A"
            raise ValueError(f"{file}: {module} has no lora_{missing}.weight; save it again")
    return factors


def _read_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    library = safetensors()
    if not file.is_file():
        if (pickled := file.with_name(PICKLE)).exists():
            raise ValueError(
                f"{pickled} is a pickle, which can run any code when it is read, so it is not "
                "opened. Convert it where you trust it: load it in PEFT and save_pretrained(..., "
                f"safe_serialization=True), which writes {WEIGHTS}"
            )
        raise FileNotFoundError(f"{file} does not exist; the adapter is incomplete: save it again")
    try:
        with library.safe_open(file, "numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (library.SafetensorError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is damaged, cut short or no safetensors file "
            f"({error}); copy or save it again"
        ) from error


def _check_shapes(file, module: str, A: np.ndarray, B: np.ndarray, rank: int) -> None:
    for name, factor in (("lora_A", A), ("lora_B", B)):
        if not jnp.issubdtype(factor.dtype, jnp.floating):
            raise ValueError(f"{file}: {module}.{name}.weight has dtype {factor.dtype}, no float")
    if A.ndim != 2 or B.ndim != 2:
        raise ValueError(
            f"{file}: {module} has lora_A {A.shape} and lora_B {B.shape}; only linear layers can "
            "be read, whose factors are matrices"
        )
    if A.shape[0] != rank or B.shape[1] != rank:
        turned = rank in (A.shape[1], B.shape[0]) and A.shape[1] == B.shape[0]
        raise ValueError(
            f"{file}: {module} has rank {rank} by {CONFIG}, so lora_A must be ({rank}, in) and "
            f"lora_B (out, {rank}), but they are {A.shape} and {B.shape}"
            + ("; they lie transposed, as (in, r) and (r, out)" if turned else "")
        )


def write(directory: pathlib.Path, adapters: Mapping[str, Adapter], **options: Any) -> None:
    """Writes both files; `options` are _peft_config.make's.

    A crash or a full disk leaves the old adapter, the new one, or, for the instant in which both
    files are swapped, one without its configuration, which no reader takes for an adapter. What a
    killed process leaves of its work is a folder .partial-*, which may be deleted.
    """
    found = {
        module: Setting(adapter.A.shape[0], adapter.scale) for module, adapter in adapters.items()
    }
    text = json.dumps(_peft_config.make(found, **options), indent=2, allow_nan=False) + "\n"
    tensors = {}
    for module, adapter in adapters.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(adapter.A)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(adapter.B)
    weights = safetensors().numpy.save(tensors, {"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as folder:
        _write_durably(pathlib.Path(folder, WEIGHTS), weights)
        _write_durably(pathlib.Path(folder, CONFIG), text.encode())
        _swap(pathlib.Path(folder), directory)


def _swap(new: pathlib.Path, directory: pathlib.Path) -> None:
    """Moves both files to their places; old weights never stand beside a new configuration."""
    config = directory / CONFIG
    if config.exists() and config.read_bytes() == (new / CONFIG).read_bytes():
        os.replace(new / WEIGHTS, directory / WEIGHTS)
        return
    config.unlink(missing_ok=True)
    os.replace(new / WEIGHTS, directory / WEIGHTS)
    os.replace(new / CONFIG, config)


def _write_durably(file: pathlib.Path, data: bytes) -> None:
    with open(file, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
