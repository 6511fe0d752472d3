"""The sizes of a T5, as Hugging Face's config.json gives them, and the MLPs that it can name."""

import dataclasses
import functools
import pathlib

from flax import nnx

from experiments.models import weights
from experiments.storage import read_json

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
        distance = self.relative_attention_max_distance
        if not 4 <= self.relative_attention_num_buckets < 2 * distance:
            raise ValueError(
                f"relative_attention_num_buckets is {self.relative_attention_num_buckets}; at "
                "least 4 are needed (two directions, near and far), and less than twice the "
                f"distance, relative_attention_max_distance {distance}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate is {self.dropout_rate}; expected 0 or more, below 1")
        last = max(self.pad_token_id, self.eos_token_id, self.decoder_start_token_id)
        if last >= self.vocab_size:
            raise ValueError(f"token {last} is not below vocab_size, {self.vocab_size}")

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> "T5Config":
        """Reads a Hugging Face config.json; ignores the keys that do not change the forward pass.

        Raises:
            ValueError: the file describes another architecture, or lacks a size.
        """
        path = pathlib.Path(path)
        found = read_json(path, (), "a model's configuration", weights.REMEDY)
        if found.get("model_type", "t5") != "t5":
            raise ValueError(f"{path}: model_type is {found['model_type']!r}, expected 't5'")
        found.setdefault("scale_decoder_outputs", found.get("tie_word_embeddings", True))
        if found.get("num_decoder_layers") is None:
            found["num_decoder_layers"] = found.get("num_layers")
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        return weights.config(cls, found, path, sizes)
