"""The sizes of a T5, as Hugging Face's config.json gives them, and the MLPs that it can name."""

import dataclasses
import functools
import json
import pathlib

from flax import nnx

# feed_forward_proj -> (whether the MLP is gated, its activation)
ACTIVATIONS = {
    "relu": (False, nnx.relu),
    "gated-gelu": (True, functools.partial(nnx.gelu, approximate=True)),
    "gated-silu": (True, nnx.silu),
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The sizes of a T5, under the names that Hugging Face's config.json gives them.

    The defaults are t5-base's.
    """

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 3072
    num_layers: int = 12
    num_decoder_layers: int = 12
    num_heads: int = 12
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    scale_decoder_outputs: bool = True  # by 1/sqrt(d_model), before the head; v1.1 does not
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self):
        if self.feed_forward_proj not in ACTIVATIONS:
            raise ValueError(
                f"feed_forward_proj is {self.feed_forward_proj!r}; this T5 computes "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.relative_attention_num_buckets < 4:
            raise ValueError(
                f"relative_attention_num_buckets is {self.relative_attention_num_buckets}; at "
                "least 4 are needed: two directions, near and far"
            )

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> "T5Config":
        """Reads a Hugging Face config.json; ignores the keys that do not change the forward pass.

        Raises:
            ValueError: the file describes another architecture, or lacks a size.
        """
        found = json.loads(pathlib.Path(path).read_text())
        if found.get("model_type", "t5") != "t5":
            raise ValueError(f"{path}: model_type is {found['model_type']!r}, expected 't5'")
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        if missing := [name for name in sizes if name not in found]:
            raise ValueError(f"{path}: {', '.join(missing)} missing; is it a T5's config.json?")
        found.setdefault("scale_decoder_outputs", found.get("tie_word_embeddings", True))
        if found.get("num_decoder_layers") is None:
            found["num_decoder_layers"] = found["num_layers"]
        names = {field.name for field in dataclasses.fields(cls)}
        known = {k: v for k, v in found.items() if k in names and v is not None}
        try:
            return cls(**known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
