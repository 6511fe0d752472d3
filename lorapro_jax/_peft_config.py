"""adapter_config.json: each module's rank and scale, by the rules with which PEFT reads it.

PEFT computes W x + scale B A x with scale = alpha / r, or alpha / sqrt(r) with rsLoRA. `r` and
`lora_alpha` hold for every module but those that a key of rank_pattern or alpha_pattern matches:
a regex for the end of the module's name, from any of its dots on; the first that matches counts.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

TASK_TYPES = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip


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


def check(config: Any, file: Any) -> None:
    """Raises ValueError unless the configuration is one of plain LoRA on linear layers.

    An option that is not known here must be off: it may change what the adapter computes.
    """
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


def settings(
    config: Mapping[str, Any], modules: Iterable[str], file: Any
) -> dict[str, tuple[int, float]]:
    """{module: its rank and scale}; raises ValueError where PEFT could not use them."""
    ranks, alphas = (_patterns(config, key, file) for key in ("rank_pattern", "alpha_pattern"))
    found = {}
    for module in modules:
        if not _targeted(config.get("target_modules"), module):
            raise ValueError(
                f"{file}: target_modules does not cover {module}, for which the adapter has "
                "weights: PEFT would ignore them. The two files belong to different adapters"
            )
        rank = _lookup(ranks, module, config.get("r"))
        alpha = _lookup(alphas, module, config.get("lora_alpha"))
        if not _is_positive(rank) or not isinstance(rank, int):
            raise ValueError(f"{file}: the rank of {module} is {rank!r}, not a positive integer")
        if not _is_positive(alpha):
            raise ValueError(f"{file}: the alpha of {module} is {alpha!r}, not a positive number")
        found[module] = rank, alpha / _divisor(rank, bool(config.get("use_rslora")))
    return found


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def _divisor(rank: int, rslora: bool) -> float:
    return math.sqrt(rank) if rslora else float(rank)


def _regex(key: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({key})$")


def _patterns(config: Mapping[str, Any], name: str, file: Any) -> dict[str, tuple[re.Pattern, Any]]:
    """{key: (its regex, its value)} of rank_pattern or alpha_pattern, in the file's order."""
    entries = config.get(name) or {}
    if not isinstance(entries, dict):
        raise ValueError(f"{file}: {name} is {entries!r}, not an object")
    try:
        return {key: (_regex(key), value) for key, value in entries.items()}
    except re.error as error:
        raise ValueError(f"{file}: a key of {name} is not a valid regex: {error}") from error


def _lookup(patterns: Mapping[str, tuple[re.Pattern, Any]], module: str, default: Any) -> Any:
    matched = (value for regex, value in patterns.values() if regex.match(module))
    # As PEFT does: a name that is no regex for itself still counts as a plain key.
    return next(matched, patterns[module][1] if module in patterns else default)


def _targeted(targets: Any, module: str) -> bool:
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    names = targets if isinstance(targets, list) else []
    return any(f".{module}".endswith(f".{name}") for name in names)


def make(
    found: Mapping[str, tuple[int, float]], *, rslora: bool, base_model: str | None, **options: Any
) -> dict[str, Any]:
    """The configuration that gives every module its rank and scale; `options` as they are."""
    ranks = {module: rank for module, (rank, _) in found.items()}
    alphas = {module: _alpha(*setting, rslora) for module, setting in found.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        **options,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": {_key(x, found): ranks[x] for x in found if ranks[x] != rank},
        "alpha_pattern": {_key(x, found): alphas[x] for x in found if alphas[x] != alpha},
        # Whole names: a short one could also match layers that have no adapter here.
        "target_modules": sorted(found),
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _alpha(rank: int, scale: float, rslora: bool) -> float | int:
    """The alpha from which PEFT computes `scale`, an integer where that is exact.

    Where the divisor is no power of two, one scale in six is off in float64's last digit.
    """
    alpha = scale * _divisor(rank, rslora)
    return round(alpha) if round(alpha) / _divisor(rank, rslora) == scale else alpha


def _key(module: str, modules: Iterable[str]) -> str:
    """The plain name, which older readers look up, if it matches no other; else an exact regex."""
    try:
        regex = _regex(module)
    except re.error:
        return "^" + re.escape(module)
    matched = [other for other in modules if regex.match(other)]
    return module if matched == [module] else "^" + re.escape(module)
