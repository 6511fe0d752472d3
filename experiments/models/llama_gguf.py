"""Llama, Qwen2 and Qwen3 from one GGUF file: the config, the dequantised tensors, the chat.

A quantised tensor is a number of blocks, which the package gguf turns into float32. The file of a
Llama has the rows of q and k in the order of its rope, which turns pairs (2i, 2i + 1) where ours
turns (i, i + H/2): they are put back here. Those of Qwen are in our order.
"""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import gguf
import numpy as np

from experiments.models import llama_files, weights
from experiments.models.llama import Llama
from experiments.models.llama_config import FAMILIES, LlamaConfig, RopeScaling

REMEDY = "download the file again, or one of another quantisation"
_ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1's frequencies are divided by

# Our module -> the file's, in the model and in a layer.
_MODEL = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
_LAYER = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    **{name: f"attn_{name}" for name in ("q", "k", "v", "q_norm", "k_norm")},
    "o": "attn_output",
    **{name: f"ffn_{name}" for name in ("gate", "up", "down")},
}
# Our field -> the key, after the architecture's name.
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


class Gguf(NamedTuple):
    """An opened file; its tensors are read when they are asked for."""

    file: pathlib.Path
    family: str  # the architecture, one of FAMILIES
    values: dict[str, gguf.ReaderField]
    tensors: dict[str, gguf.ReaderTensor]

    def value(self, key: str, default: Any = None) -> Any:
        """What the file's metadata has under `key`."""
        return self.values[key].contents() if key in self.values else default


def opened(file: str | pathlib.Path) -> Gguf:
    """The file, its metadata read and its tensors' places checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or cut short, no GGUF, or of another architecture.
    """
    file = pathlib.Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; pass the path of a .gguf file")
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is no GGUF, damaged or cut short, or quantised "
            f"in a way that the package gguf does not know ({error}); {REMEDY}"
        ) from error
    found = Gguf(file, "", dict(reader.fields), {x.name: x for x in reader.tensors})
    family = found.value("general.architecture")
    if family not in FAMILIES or found.value(f"{family}.expert_count"):
        experts = " with experts" if family in FAMILIES else ""
        raise ValueError(
            f"{file}: general.architecture is {family!r:.40}{experts}; this model computes "
            f"{', '.join(FAMILIES)}, without experts"
        )
    if found.value("split.count", 1) > 1:
        raise ValueError(
            f"{file} is one of {found.value('split.count')} parts; join them first "
            "(`llama-gguf-split --merge`)"
        )
    return found._replace(family=family)


def config_of(found: Gguf) -> LlamaConfig:
    """The sizes in the metadata, and what the presence of tensors tells.

    Raises:
        ValueError: a size is missing or odd, or positions are turned in a way not computed here.
    """
    known = {name: found.value(f"{found.family}.{key}") for name, key in _SIZES.items()}
    known = {name: value for name, value in known.items() if value is not None}
    known.setdefault("num_key_value_heads", known.get("num_attention_heads"))
    known.setdefault("rope_theta", 10_000.0)
    if "head_dim" not in known and known.get("num_attention_heads"):
        known["head_dim"] = known.get("hidden_size", 0) // known["num_attention_heads"]
    for name, tensor in {
        "attention_bias": "blk.0.attn_q.bias",
        "output_bias": "blk.0.attn_output.bias",
        "mlp_bias": "blk.0.ffn_down.bias",
        "head_norms": "blk.0.attn_q_norm.weight",
    }.items():
        known[name] = tensor in found.tensors
    known["tie_word_embeddings"] = "output.weight" not in found.tensors
    if "token_embd.weight" in found.tensors:
        known["vocab_size"] = int(found.tensors["token_embd.weight"].shape[-1])
    config = weights.config(LlamaConfig, known, found.file, (*_SIZES, "vocab_size"))
    try:
        return dataclasses.replace(
            config, rope_scaling=_scaling(found, config), eos_token_ids=_ends(found)
        )
    except ValueError as error:
        raise ValueError(f"{found.file}: {error}; {REMEDY}") from error


def _ends(found: Gguf) -> tuple[int, ...]:
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot")]
    return tuple(dict.fromkeys(found.value(key) for key in keys if key in found.values))


def _scaling(found: Gguf, config: LlamaConfig) -> RopeScaling | None:
    kind = found.value(f"{found.family}.rope.scaling.type", "none")
    turned = found.value(f"{found.family}.rope.dimension_count", config.head_dim)
    if kind != "none" or turned != config.head_dim:
        raise ValueError(
            f"rope.scaling.type is {kind!r:.40} and rope.dimension_count {turned} of "
            f"{config.head_dim}; this model computes none or Llama 3.1's, of whole heads"
        )
    if _ROPE_FACTORS not in found.tensors:
        return None
    # The file has the divisors only; all Llamas have the other three numbers in common.
    divisors = dequantised(found, _ROPE_FACTORS)
    scaling = RopeScaling(float(np.max(divisors)))
    expected = config.frequencies / scaling(config.frequencies)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(f"{_ROPE_FACTORS} is not of Llama 3.1's form, {scaling}")
    return scaling


def tensor_name(path: tuple) -> str:
    """The file's name of a leaf, ("layers", 0, "q", "kernel") for one."""
    *module, leaf = path
    kind = "bias" if leaf == "bias" else "weight"
    if module[0] != "layers":
        return f"{_MODEL[module[0]]}.{kind}"
    return f"blk.{module[1]}.{_LAYER[module[2]]}.{kind}"


def dequantised(found: Gguf, name: str) -> np.ndarray:
    """The tensor in float32, (out, in).

    Raises:
        ValueError: the package gguf cannot dequantise its type.
    """
    tensor = found.tensors[name]
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    except NotImplementedError as error:
        raise ValueError(
            f"{found.file}: {name} is of type {tensor.tensor_type.name}, which the package gguf "
            f"does not dequantise ({error}); {REMEDY}"
        ) from error


def unturned(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k in the order (i, i + H/2), of a head's pairs (2i, 2i + 1)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def load(file: str | pathlib.Path | Gguf, **options) -> Llama:
    """The pretrained model of a GGUF file; the options are those of `llama_files.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another architecture or quantisation, lacks a tensor, or has
            one of another shape than its metadata say; or `tile` does not fit a layer.
    """
    found = file if isinstance(file, Gguf) else opened(file)
    config = config_of(found)

    def tensor(name: str) -> np.ndarray:
        array = dequantised(found, name)
        turned = found.family == "llama" and (".attn_q." in name or ".attn_k." in name)
        return unturned(array, config.head_dim) if turned else array

    names = found.tensors.keys() - {_ROPE_FACTORS}
    tensors = weights.Tensors({name: functools.partial(tensor, name) for name in names})
    told = {"sizes": "its metadata", "remedy": REMEDY}
    return llama_files.filled(config, tensors, tensor_name, found.file, **told, **options)


def chat_template(found: Gguf) -> str | None:
    """The Jinja template of the model's chats; None if the file has none."""
    return found.value("tokenizer.chat_template")
