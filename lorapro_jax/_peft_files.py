"""The two files of a PEFT adapter: nothing is unpickled, and a write is whole or leaves no trace.

adapter_model.safetensors holds base_model.model.<module>.lora_A.weight (r, in) and .lora_B.weight
(out, r). PEFT computes W x + scale B A x with scale = alpha / r, or alpha / sqrt(r) with rsLoRA;
adapter_config.json has r and lora_alpha, and exceptions in rank_pattern and alpha_pattern.
"""

import json
import math
import os
import pathlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"

TASK_TYPES = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip

_MODULE = r"(.*\.)?({})$"  # a key matches a module's end, from any dot on; the first counts
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

# The values of these that are plain LoRA; the other initialisations change the base weights.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}

# Read elsewhere, or without influence on what a trained adapter computes. fan_in_fan_out is about
# the base weight's orientation (GPT-2's Conv1D): A and B lie the same way for both.
_FREE = frozenset({
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout",
    "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "peft_version", "runtime_config", "megatron_core", "qalora_group_size", "eva_config",
    "corda_config", "loftq_config", "lora_ga_config", "velora_config",
})  # fmt: skip


class Adapter(NamedTuple):
    """One module's adapter as PEFT keeps it: its output gains scale B A x."""

    A: np.ndarray  # (r, in)
    B: np.ndarray  # (out, r)
    scale: float


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            'lorapro_jax.peft reads and writes safetensors files: pip install "lorapro-jax[peft]"'
        ) from error
    return safetensors


def read(directory: pathlib.Path) -> dict[str, Adapter]:
    """{module: adapter}; raises where a file is missing, damaged, or contradicts the other."""
    file = directory / CONFIG
    config, tensors = _read_config(file), _read_tensors(directory / WEIGHTS)
    ranks = _values(config, "rank_pattern", config.get("r"), tensors, file)
    alphas = _values(config, "alpha_pattern", config.get("lora_alpha"), tensors, file)
    adapters = {}
    for module, (A, B) in tensors.items():
        rank, alpha = ranks[module], alphas[module]
        if not _targeted(config.get("target_modules"), module):
            raise ValueError(f"{file}: target_modules does not cover {module}, which has weights")
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{file}: the rank of {module} is {rank!r}, not a positive integer")
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise ValueError(f"{file}: the alpha of {module} is {alpha!r}, not a positive number")
        _check_shapes(f"{directory / WEIGHTS}: {module}", A, B, rank)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        adapters[module] = Adapter(A, B, scale)
    return adapters


def _read_config(file: pathlib.Path) -> dict[str, Any]:
    """The configuration, which must be of plain LoRA: an option not known here must be off."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; pass the folder of a saved adapter")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # of the decoding, of JSON, of endless nesting
        raise ValueError(f"{file} is not JSON, or cut short ({error}); save it again") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(f"{file} is no PEFT configuration: it has no peft_type")
    for key in ("peft_type", *config):  # the first says the most about what is wrong
        value, plain = config[key], _PLAIN.get(key)
        fine = value in plain if plain else key in _FREE or not value
        if not fine:
            expected = f"; expected {' or '.join(map(repr, plain))}" if plain else ""
            raise ValueError(
                f"{file}: {key} is {value!r}, which is not plain LoRA (W + scale B A){expected}. "
                "Convert the adapter in PEFT first, or merge it there (merge_and_unload)"
            )
    return config


def _values(config: dict, name: str, default: Any, modules: Iterable[str], file: Any) -> dict:
    """{module: its value} by rank_pattern or alpha_pattern."""
    entries = config.get(name) or {}
    if not isinstance(entries, dict):
        raise ValueError(f"{file}: {name} is {entries!r}, not an object")
    try:
        regexes = [(re.compile(_MODULE.format(key)), value) for key, value in entries.items()]
    except re.error as error:
        raise ValueError(f"{file}: a key of {name} is not a valid regex: {error}") from error
    values = {}
    for module in modules:
        matched = (value for regex, value in regexes if regex.match(module))
        # As PEFT does: a name that is no regex for itself still counts as a plain key.
        values[module] = next(matched, entries.get(module, default))
    return values


def _targeted(targets: Any, module: str) -> bool:
    if isinstance(targets, list):
        return any(f".{module}".endswith(f".{name}") for name in targets)
    everywhere = targets in (None, "all-linear")
    return everywhere or (isinstance(targets, str) and bool(re.fullmatch(targets, module)))


def _read_tensors(file: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{module: (A, B)}; raises for anything else in the file."""
    library = _safetensors()
    if not file.is_file():
        if (pickled := file.with_name(PICKLE)).exists():
            raise ValueError(
                f"{pickled} is a pickle, which can run any code, and is not opened: load it in "
                "PEFT where you trust it, and save_pretrained(..., safe_serialization=True)"
            )
        raise FileNotFoundError(f"{file} does not exist; the adapter is incomplete: save it again")
    try:
        with library.safe_open(file, "numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (library.SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is cut short or no safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"{file} holds no tensor; save the adapter again")
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(f"{file}: {name} is no factor of plain LoRA on a linear layer")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{file}: {name} has dtype {tensor.dtype}, no float")
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    for module, factors in found.items():
        for missing in {"A", "B"} - factors.keys():
            raise ValueError(f"{file}: {module} has no lora_{missing}.weight; save it again")
    return {module: (factors["A"], factors["B"]) for module, factors in found.items()}


def _check_shapes(where: str, A: np.ndarray, B: np.ndarray, rank: int) -> None:
    if A.ndim != 2 or B.ndim != 2:
        raise ValueError(f"{where} has lora_A {A.shape}, lora_B {B.shape}; only linear layers fit")
    if A.shape[0] != rank or B.shape[1] != rank:
        turned = rank in (A.shape[1], B.shape[0]) and A.shape[1] == B.shape[0]
        hint = "they lie transposed, as (in, r) and (r, out): " if turned else ""
        raise ValueError(
            f"{where} has rank {rank} by {CONFIG}; {hint}expected lora_A ({rank}, in) and lora_B "
            f"(out, {rank}), but they are {A.shape} and {B.shape}"
        )


def write(
    directory: pathlib.Path, adapters: Mapping[str, Adapter], *, rslora: bool, **options: Any
) -> None:
    """Writes both files; `options` go into the configuration as they are.

    A crash or a full disk leaves the old adapter, the new one, or weights without a configuration;
    a killed process may leave a folder .partial-* to delete.
    """
    text = json.dumps(_config(adapters, rslora) | options, indent=2, allow_nan=False) + "\n"
    tensors = {
        f"base_model.model.{module}.{name}.weight": np.ascontiguousarray(factor)
        for module, (A, B, _) in adapters.items()
        for name, factor in (("lora_A", A), ("lora_B", B))
    }
    weights = _safetensors().numpy.save(tensors, {"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as folder:
        for name, data in ((WEIGHTS, weights), (CONFIG, text.encode())):
            with open(pathlib.Path(folder, name), "wb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
        config = directory / CONFIG
        # the weights of one adapter never stand beside another configuration
        if config.exists() and config.read_bytes() != text.encode():
            config.unlink()
        for name in (WEIGHTS, CONFIG):
            os.replace(pathlib.Path(folder, name), directory / name)


def _config(adapters: Mapping[str, Adapter], rslora: bool) -> dict[str, Any]:
    """The configuration that gives every module its rank and scale."""
    ranks = {module: adapter.A.shape[0] for module, adapter in adapters.items()}
    alphas = {module: _alpha(ranks[module], x.scale, rslora) for module, x in adapters.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rslora,
        "rank_pattern": {_key(x, ranks): ranks[x] for x in ranks if ranks[x] != rank},
        "alpha_pattern": {_key(x, ranks): alphas[x] for x in ranks if alphas[x] != alpha},
        "target_modules": sorted(ranks),  # whole names: a short one could match other layers too
        "inference_mode": True, "lora_dropout": 0.0, "bias": "none", "use_dora": False,
        "modules_to_save": None, "init_lora_weights": True,
    }  # fmt: skip


def _alpha(rank: int, scale: float, rslora: bool) -> float | int:
    """The alpha that gives `scale` up to float64's last digit; an integer where that is exact."""
    divisor = math.sqrt(rank) if rslora else rank
    alpha = scale * divisor
    return round(alpha) if round(alpha) / divisor == scale else alpha


def _key(module: str, modules: Iterable[str]) -> str:
    """The plain name, which older readers look up, if it matches no other; else an exact regex."""
    try:
        regex = re.compile(_MODULE.format(module))
    except re.error:
        return "^" + re.escape(module)
    matched = [other for other in modules if regex.match(other)]
    return module if matched == [module] else "^" + re.escape(module)
