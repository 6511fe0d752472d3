"""The sizes of a Llama, Qwen2 or Qwen3, under the names of Hugging Face's config.json."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from experiments.models import weights
from experiments.storage import read_json

# model_type -> what it implies and config.json does not say.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True, "output_bias": False, "mlp_bias": False},
    "qwen3": {"head_norms": True, "mlp_bias": False},
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's: rotations too slow to turn once within the old context are slowed by `factor`.

    s = clip((turns - low) / (high - low), 0, 1), f <- f (s + (1 - s) / factor), for a frequency f
    and its `turns` within the original context.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if not (self.factor >= 1 and self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                f"rope_scaling is {self}; expected a factor of at least 1, and low below high"
            )

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """The frequencies, (H/2,), in radians a position, as they are used."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a decoder; the defaults are Llama 3 8B's."""

    vocab_size: int = 128_256
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of o
    mlp_bias: bool = False
    head_norms: bool = False  # of every head's query and key, before they turn
    eos_token_ids: tuple[int, ...] = ()  # any of them ends a text

    def __post_init__(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{kv_heads}; every key/value head serves the same number of queries"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn halves")
        for token in self.eos_token_ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"eos token {token} is not below vocab_size, {self.vocab_size}")

    @property
    def frequencies(self) -> np.ndarray:
        """Of the rotary positions, (H/2,), in radians a position, float64."""
        half = self.head_dim // 2
        plain = self.rope_theta ** (-np.arange(half) / half)
        return plain if self.rope_scaling is None else self.rope_scaling(plain)

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> "LlamaConfig":
        """Reads a Hugging Face config.json; ignores the keys that do not change the forward pass.

        Raises:
            ValueError: it describes another architecture or a variant not computed here, or lacks a
                size.
        """
        path = pathlib.Path(path)
        return from_dict(read_json(path, (), "a model's configuration", weights.REMEDY), path)


def from_dict(found: dict[str, Any], path: pathlib.Path) -> LlamaConfig:
    """The config of what `path` holds under Hugging Face's keys."""
    family = found.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: model_type is {family!r:.40}; this model computes {', '.join(FAMILIES)}"
        )
    _check_computed(found, path)
    rope = found.get("rope_scaling") or found.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {rope!r:.40}; expected an object")
    known = {"rope_theta": rope.get("rope_theta") or 10_000.0, "max_position_embeddings": 2048}
    known |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    known |= {key: value for key, value in found.items() if value is not None}
    known.setdefault("num_key_value_heads", known.get("num_attention_heads"))
    known.setdefault("output_bias", known.get("attention_bias"))  # before the family's word
    known |= FAMILIES[family] | {"rope_scaling": None}
    heads, width = known.get("num_attention_heads"), known.get("hidden_size")
    if "head_dim" not in known and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        known["head_dim"] = width // heads
    config = weights.config(LlamaConfig, known, path, (*_SIZES, "num_attention_heads", "head_dim"))
    try:
        return dataclasses.replace(
            config, rope_scaling=_scaling(rope, path), eos_token_ids=_ends(found)
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {weights.REMEDY}") from error


def _check_computed(found: dict[str, Any], path: pathlib.Path) -> None:
    computed = {  # a key that changes the forward pass -> the values of it that are computed
        "hidden_act": ("silu", None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
    }
    for key, values in computed.items():
        if found.get(key) not in values:
            raise ValueError(
                f"{path}: {key} is {found[key]!r:.60}; this model computes {values[0]!r} only"
            )
    kinds = found.get("layer_types") or []
    if others := [kind for kind in kinds if kind != "full_attention"]:
        raise ValueError(
            f"{path}: layer_types has {others[0]!r:.40}; this model computes full_attention only"
        )


def _scaling(rope: dict[str, Any], path: pathlib.Path) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type is {kind!r:.40}; this model computes default and llama3")
    return weights.config(RopeScaling, rope, path, _ROPE)


def _ends(found: dict[str, Any]) -> tuple[int, ...]:
    ends = found.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int for token in ends):
        raise ValueError(f"eos_token_id is {ends!r:.40}; expected a token's number, or several")
    return tuple(ends)


def to_dict(config: LlamaConfig) -> dict[str, Any]:
    """What Hugging Face's config.json says of the model; `from_dict` reads it."""
    fields = dataclasses.asdict(config)
    biases = fields.pop("output_bias"), fields["attention_bias"]
    family = "qwen3" if fields.pop("head_norms") else "llama" if biases[0] == biases[1] else "qwen2"
    if (FAMILIES[family] and config.mlp_bias) or (family == "qwen2" and biases != (False, True)):
        raise ValueError(f"no family has the biases of {config}")
    rope, ends = fields.pop("rope_scaling"), list(fields.pop("eos_token_ids"))
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    told = {"model_type": family, "architectures": [f"{name}ForCausalLM"], "hidden_act": "silu"}
    told |= {"eos_token_id": ends or None}
    told |= {"rope_scaling": None if rope is None else {"rope_type": "llama3"} | rope}
    return told | fields


TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
