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

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


class Adapter(NamedTuple):
    """One module's adapter as PEFT keeps it: its output gains scale B A x."""

    A: np.ndarray  # (r, in)
    B: np.ndarray  # (out, r)
    scale: float


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "lorapro_jax.peft reads and writes safetensors files; install the package: "
            'pip install "lorapro-jax[peft]"'
        ) from error
    return safetensors


def read(directory: pathlib.Path) -> dict[str, Adapter]:
    """{module: adapter}; raises where a file is missing, damaged, or contradicts the other."""
    config = _read_config(directory / CONFIG)
    factors = _factors(directory / WEIGHTS)
    found = _peft_config.settings(config, factors, directory / CONFIG)
    adapters = {module: Adapter(*pair, found[module][1]) for module, pair in factors.items()}
    for module, adapter in adapters.items():
        _check_shapes(f"{directory / WEIGHTS}: {module}", adapter, found[module][0])
    return adapters


def _read_config(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; pass a folder of PEFT's save_pretrained or lp.peft.save"
        )
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # of the decoding, of JSON, of endless nesting
        raise ValueError(f"{file} is not JSON, or cut short ({error}); save it again") from error
    _peft_config.check(config, file)
    return config


def _factors(file: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{module: (A, B)}; raises for anything else in the file."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in _read_tensors(file).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{file}: {name} is no factor of plain LoRA on a linear layer, such as "
                "base_model.model.<module>.lora_A.weight; nothing else can be read"
            )
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    if not found:
        raise ValueError(f"{file} holds no tensor; save the adapter again")
    for module, pair in found.items():
        for missing in {"A", "B"} - pair.keys():
            raise ValueError(f"{file}: {module} has no lora_{missing}.weight; save it again")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _read_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    library = _safetensors()
    if (pickled := file.with_name(PICKLE)).exists() and not file.is_file():
        raise ValueError(
            f"{pickled} is a pickle, which can run any code, so it is not opened. Write {WEIGHTS} "
            "from it where you trust it: in PEFT, save_pretrained(..., safe_serialization=True)"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; the adapter is incomplete: save it again")
    try:
        with library.safe_open(file, "numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (library.SafetensorError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is damaged, cut short or no safetensors file "
            f"({error}); copy or save it again"
        ) from error


def _check_shapes(where: str, adapter: Adapter, rank: int) -> None:
    A, B = adapter.A, adapter.B
    for name, factor in (("lora_A", A), ("lora_B", B)):
        if not jnp.issubdtype(factor.dtype, jnp.floating):
            raise ValueError(f"{where}.{name}.weight has dtype {factor.dtype}, no float")
    if A.ndim != 2 or B.ndim != 2:
        raise ValueError(
            f"{where} has lora_A {A.shape} and lora_B {B.shape}; only linear layers can be read"
        )
    if A.shape[0] != rank or B.shape[1] != rank:
        turned = rank in (A.shape[1], B.shape[0]) and A.shape[1] == B.shape[0]
        raise ValueError(
            f"{where} has rank {rank} by {CONFIG}, so lora_A must be ({rank}, in) and lora_B "
            f"(out, {rank}), but they are {A.shape} and {B.shape}"
            + ("; they lie transposed, as (in, r) and (r, out)" if turned else "")
        )


def write(directory: pathlib.Path, adapters: Mapping[str, Adapter], **options: Any) -> None:
    """Writes both files; `options` are _peft_config.make's.

    A crash or a full disk leaves the old adapter, the new one, or, while both files are swapped,
    one without its configuration, which no reader takes for an adapter. A killed process may leave
    a folder .partial-*, which may be deleted.
    """
    found, tensors = {}, {}
    for module, (A, B, scale) in adapters.items():
        found[module] = A.shape[0], scale
        for name, factor in (("lora_A", A), ("lora_B", B)):
            tensors[f"base_model.model.{module}.{name}.weight"] = np.ascontiguousarray(factor)
    text = json.dumps(_peft_config.make(found, **options), indent=2, allow_nan=False) + "\n"
    weights = _safetensors().numpy.save(tensors, {"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as folder:
        new = pathlib.Path(folder)
        _write_durably(new / WEIGHTS, weights)
        _write_durably(new / CONFIG, text.encode())
        config = directory / CONFIG
        # old weights never stand beside a new configuration, nor new ones beside an old one
        if not config.exists() or config.read_bytes() != text.encode():
            config.unlink(missing_ok=True)
        os.replace(new / WEIGHTS, directory / WEIGHTS)
        os.replace(new / CONFIG, config)


def _write_durably(file: pathlib.Path, data: bytes) -> None:
    with open(file, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
