"""Llama, Qwen2 and Qwen3 as Hugging Face keeps them: a folder's config, tensors, tokenizer, chat.

A model is config.json; model.safetensors, or its shards and their index; tokenizer.json; and for
chats tokenizer_config.json or chat_template.jinja.
"""

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from experiments.models import llama_config, weights
from experiments.models.llama import Llama
from experiments.models.llama_config import LlamaConfig
from experiments.models.quantized import TILE, Kind, kind_of, quantize, quantized_kernel
from experiments.storage import read_json

CHAT_FILE, CHAT = weights.CHAT_FILES

# Our module -> Hugging Face's, in the model and in a layer.
_MODEL = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"self_attn.{name}" for name in ("q_norm", "k_norm")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def tensor_name(path: tuple) -> str:
    """Hugging Face's name of a leaf, ("layers", 0, "q", "kernel") for one."""
    *module, leaf = path
    kind = "bias" if leaf == "bias" else "weight"
    if module[0] != "layers":
        return f"{_MODEL[module[0]]}.{kind}"
    return f"model.layers.{module[1]}.{_LAYER[module[2]]}.{kind}"


def load(model: str | pathlib.Path, **options) -> Llama:
    """The pretrained model of a folder, or of NAME@COMMIT on the Hugging Face hub.

    The options are `Llama`'s (`scanned`, `remat`, `dtype`, `param_dtype`), and `quantized` and
    `tile`, the kind and tile of `quantized.quantize`: one tensor at a time is dense.

    Raises:
        FileNotFoundError: there is no such folder or name, or a file is missing.
        ValueError: a file is damaged, of another architecture, or does not fit the config; or
            `tile` does not fit a layer.
    """
    folder = weights.folder_of(model)
    config = LlamaConfig.from_json(weights.there(folder, weights.CONFIG))
    file, tensors = weights.tensors_of(folder)
    # Older files hold the rotations' frequencies; a tied head may be there as a copy.
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]
    if config.tie_word_embeddings:
        _drop_copy(tensors, file)
    return filled(config, tensors, tensor_name, file, **options)


def _drop_copy(tensors: weights.Tensors, file: pathlib.Path) -> None:
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not np.array_equal(head, tensors.get("model.embed_tokens.weight")):
        raise ValueError(
            f"{file}: lm_head.weight is not model.embed_tokens.weight, though config.json says "
            f"that they are tied; {weights.REMEDY}"
        )


def filled(
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    name_of: weights.TensorName,
    file: pathlib.Path,
    *,
    sizes: str = weights.CONFIG,
    remedy: str = weights.REMEDY,
    quantized: Kind | None = None,
    tile: int = TILE,
    **options,
) -> Llama:
    """A `Llama(config, **options)` of the tensors; the rest as in `load` and `weights.filled`."""

    def made(**options) -> Llama:
        model = Llama(config, **options, rngs=nnx.Rngs(0))
        if quantized is not None:
            quantize(model, quantized, tile)
        return model

    def held(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if quantized is None or path[0] != "layers" or path[-1] != "kernel":
            return variable
        return quantized_kernel(variable, quantized, tile)

    graph = nnx.graphdef(nnx.eval_shape(lambda: made(**options)))  # first: refuses what is odd
    dense = nnx.eval_shape(lambda: Llama(config, **options | {"scanned": False}, rngs=nnx.Rngs(0)))
    params = weights.filled(
        nnx.state(dense, nnx.Param),
        tensors,
        name_of,
        what="a decoder",
        file=file,
        remedy=remedy,
        sizes=sizes,
        held=held,
    )
    return nnx.merge(graph, stacked(params) if options.get("scanned") else params)


def stacked(params: nnx.State) -> nnx.State:
    """The parameters of listed layers as those of scanned ones: one array, leading axis L."""
    new: dict[tuple, list] = {}
    for path, variable in nnx.to_flat_state(params):
        if path[0] == "layers":
            path = "layers", *path[2:]
        new.setdefault(path, []).append(variable)
    return nnx.from_flat_state(
        {
            path: jax.tree.map(lambda *x: jnp.stack(x), *v) if path[0] == "layers" else v[0]
            for path, v in new.items()
        }
    )


def listed(params: nnx.State) -> nnx.State:
    """The parameters of scanned layers as those of listed ones."""
    new = {}
    for path, variable in nnx.to_flat_state(params):
        if path[0] != "layers":
            new[path] = variable
            continue
        for i, array in enumerate(variable[...]):
            new["layers", i, *path[1:]] = variable.replace(array)
    return nnx.from_flat_state(new)


def save(
    model: Llama,
    folder: str | pathlib.Path,
    tokenizer: tokenizers.Tokenizer | None = None,
    chat: str | None = None,
) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and the chat template, for `load`.

    transformers reads them too.

    Raises:
        ValueError: the model has adapters; merge them first (`lorapro_jax.nnx.merge_lora`). Or it
            is quantised.
    """
    if (kind := kind_of(model)) is not None:
        raise ValueError(
            f"the model's kernels are held as {kind}, which a model's file has no place for; "
            "quantized.dequantize it, then merge_lora it"
        )
    params = nnx.state(model, nnx.Param)
    files = {} if tokenizer is None else {weights.TOKENIZER: tokenizer.to_str(pretty=True)}
    files |= {} if chat is None else {CHAT_FILE: chat}
    params = listed(params) if model.scanned else params
    weights.save(folder, params, tensor_name, llama_config.to_dict(model.config), files)


def tokenizer(model: str | pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder or name.

    Raises:
        FileNotFoundError: there is no such folder or name, or it has no tokenizer.json.
        ValueError: the file is damaged, or does not fit the config.
    """
    folder = weights.folder_of(model)
    loaded = weights.read_tokenizer(file := weights.there(folder, weights.TOKENIZER))
    config = LlamaConfig.from_json(weights.there(folder, weights.CONFIG))
    check_fits(loaded, config, file)
    return loaded


def check_fits(loaded: tokenizers.Tokenizer, config: LlamaConfig, file: pathlib.Path) -> None:
    """Raises a ValueError if the tokenizer has a token that the model's embedding has not."""
    most = max(loaded.get_vocab().values(), default=-1)
    if not 0 <= most < config.vocab_size:
        raise ValueError(
            f"{file} has tokens up to {most}; the model has {config.vocab_size} (vocab_size): they "
            f"belong to different models; {weights.REMEDY}"
        )


def chat_template(model: str | pathlib.Path) -> str | None:
    """The Jinja template of a folder's or name's chats; None if it has none."""
    folder = weights.folder_of(model)
    if (file := folder / CHAT_FILE).is_file():
        return file.read_text(encoding="utf-8")
    if not (file := folder / CHAT).is_file():
        return None
    found = read_json(file, (), "a tokenizer's settings", weights.REMEDY).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
        found = named.get("default")
    if not isinstance(found, str | None):
        raise ValueError(f"{file}: chat_template is {found!r:.40}; expected a Jinja template")
    return found
