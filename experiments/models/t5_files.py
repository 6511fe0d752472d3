"""T5 checkpoints as Hugging Face writes them, from a folder or by name, and their tokenizers.

A model is config.json; model.safetensors, or its shards and model.safetensors.index.json; and
tokenizer.json or spiece.model.
"""

import dataclasses
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from flax import nnx
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from experiments.exits import first_line
from experiments.models import weights
from experiments.models.t5 import T5
from experiments.models.t5_config import T5Config
from experiments.storage import write_atomic

_INDEX, _WEIGHTS, _CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_PATTERNS = [_CONFIG, "*.safetensors", _INDEX, "tokenizer.json", "spiece.model"]
SENTINELS = 100  # <extra_id_99> to <extra_id_0>, behind the pieces of spiece.model

# Copies of the embedding that older files hold, and a bias that no T5 ever used.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

# Our module in a layer -> Hugging Face's, for the encoder and the decoder.
_SUBLAYERS = {
    "encoder": {"attention": (0, "SelfAttention"), "mlp": (1, "DenseReluDense")},
    "decoder": {
        "attention": (0, "SelfAttention"),
        "cross_attention": (1, "EncDecAttention"),
        "mlp": (2, "DenseReluDense"),
    },
}
STACKS = tuple(_SUBLAYERS)
_NORMS = {"attention_norm": "attention", "cross_norm": "cross_attention", "mlp_norm": "mlp"}


def tensor_name(path: tuple) -> str:
    """Hugging Face's name of a leaf, ("encoder", "layers", 0, "mlp", "wi", "kernel") for one."""
    stack, *inner, _ = path
    if stack not in _SUBLAYERS:  # shared, lm_head
        return f"{stack}.weight"
    if inner == ["norm"]:
        return f"{stack}.final_layer_norm.weight"
    if inner == ["position"]:
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    _, layer, module, *linear = inner
    number, theirs = _SUBLAYERS[stack][_NORMS.get(module, module)]
    name = "layer_norm" if module in _NORMS else f"{theirs}.{linear[0]}"
    return f"{stack}.block.{layer}.layer.{number}.{name}.weight"


def folder_of(model: str | pathlib.Path) -> pathlib.Path:
    """The folder that `model` is, or the one that huggingface_hub has or downloads for its name.

    Raises:
        FileNotFoundError: it is no folder, and no model of that name could be had.
    """
    folder = pathlib.Path(model).expanduser()
    if folder.is_dir():
        return folder
    import huggingface_hub  # a second to import: only where a name is asked for

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(model), allow_patterns=_PATTERNS))
    except Exception as error:  # of the hub, of its HTTP library and of the file system
        raise FileNotFoundError(
            f"there is no folder {folder}, and the Hugging Face hub did not give {str(model)!r} "
            f"({first_line(error)}). Without a network, copy {_CONFIG}, {_WEIGHTS} and "
            "tokenizer.json or spiece.model from a connected machine into a folder, and pass that"
        ) from error


def load(
    model: str | pathlib.Path,
    *,
    dropout: float | None = None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat: bool = False,
) -> T5:
    """The pretrained T5 of a folder, or of a name on the Hugging Face hub ("t5-base").

    Args:
        model: the folder, or the name.
        dropout: rate everywhere in the model; None is the config's.
        dtype: of the activations.
        param_dtype: of the weights.
        remat: whether the backward pass computes every layer anew.

    Raises:
        FileNotFoundError: there is no such folder or name, or a file is missing.
        ValueError: a file is damaged, or does not fit the config.
    """
    folder = folder_of(model)
    config = T5Config.from_json(_there(folder, _CONFIG))
    if dropout is not None:
        config = dataclasses.replace(config, dropout_rate=dropout)
    file, tensors = _tensors(folder)
    tied = _drop_copies(tensors, file)
    options = {"tied": tied, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    made = nnx.eval_shape(lambda: T5(config, **options, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(made, nnx.Param, ...)
    remedy = "copy the files of one model anew"
    params = weights.filled(params, tensors, tensor_name, what="a T5", file=file, remedy=remedy)
    return nnx.merge(graph, params, rest)


def save(model: T5, folder: str | pathlib.Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Writes config.json, model.safetensors and tokenizer.json, which `load` and PyTorch read.

    Raises:
        ValueError: the model has adapters; merge them first (`lorapro_jax.nnx.merge_lora`).
    """
    if nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        raise ValueError(
            "the model has adapters, which a T5's file has no place for; merge_lora it"
        )
    folder = pathlib.Path(folder)
    fields = dataclasses.asdict(model.config)
    # The scale is what a reader infers from tie_word_embeddings, tied or not.
    told = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    told |= {"tie_word_embeddings": model.config.scale_decoder_outputs, "is_encoder_decoder": True}
    tensors = weights.named(nnx.state(model, nnx.Param), tensor_name)
    files = {
        _WEIGHTS: safetensors.numpy.save(tensors, metadata={"format": "pt"}),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        _CONFIG: (json.dumps(told | fields, indent=2) + "\n").encode(),
    }
    for name, content in files.items():
        write_atomic(folder / name, content, "the model")


def _there(folder: pathlib.Path, name: str) -> pathlib.Path:
    file = folder / name
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{file} does not exist; in the folder there is {found}")
    return file


def _tensors(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """(the file to name in errors, all tensors) of one file or of its shards."""
    remedy = "copy or download it again"
    if not (folder / _INDEX).is_file():
        file = _there(folder, _WEIGHTS)
        return file, weights.read(file, remedy)
    index, tensors = folder / _INDEX, {}
    try:
        shard_of = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r}); {remedy}") from error
    for shard in sorted(set(shard_of.values())):
        tensors |= weights.read(_there(folder, shard), remedy)
    if lost := sorted(shard_of.keys() - tensors.keys()):
        raise ValueError(f"{index}: the shards lack {len(lost)} tensors ({lost[0]}); {remedy}")
    return index, tensors


def _drop_copies(tensors: dict[str, np.ndarray], file: pathlib.Path) -> bool:
    """Removes what repeats the embedding, and says whether the head does too."""
    tensors.pop(_UNUSED, None)
    if "shared.weight" not in tensors and _COPIES[0] in tensors:
        tensors["shared.weight"] = tensors[_COPIES[0]]
    for name in _COPIES:
        copy = tensors.pop(name, None)
        if copy is not None and not np.array_equal(copy, tensors["shared.weight"]):
            raise ValueError(
                f"{file}: {name} is not shared.weight; this T5 has one embedding for both stacks"
            )
    head = tensors.get("lm_head.weight")
    if head is None:
        return True
    if np.array_equal(head, tensors.get("shared.weight")):
        del tensors["lm_head.weight"]
        return True
    return False


def tokenizer(model: str | pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer of a T5's folder or name, which ends every text with "</s>".

    Raises:
        FileNotFoundError: there is no such folder or name, or it has no tokenizer.
        ValueError: spiece.model is no Unigram model.
    """
    folder = folder_of(model)
    if (folder / "tokenizer.json").is_file():
        loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        loaded.no_padding()
        loaded.no_truncation()
        return loaded
    return from_sentencepiece(_there(folder, "spiece.model"))


def from_sentencepiece(file: pathlib.Path) -> tokenizers.Tokenizer:
    """T5's tokenizer from its SentencePiece model, with the sentinels behind its pieces."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    if kind != "UNIGRAM" or not proto.pieces:
        raise ValueError(f"{file} is a {kind} model of {len(proto.pieces)} pieces; T5's is UNIGRAM")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    charsmap = proto.normalizer_spec.precompiled_charsmap
    return unigram(pieces, proto.trainer_spec.unk_id, charsmap)


def unigram(
    pieces: list[tuple[str, float]], unk_id: int, charsmap: bytes = b""
) -> tokenizers.Tokenizer:
    """A tokenizer like T5's of those pieces and their log-probabilities, and the sentinels."""
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]
    known = {piece for piece, _ in pieces}
    pieces = pieces + [(name, 0.0) for name in sentinels if name not in known]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id, byte_fallback=False))
    if charsmap:
        made.normalizer = normalizers.Precompiled(charsmap)
    space = {"replacement": "▁", "prepend_scheme": "always"}
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    made.decoder = decoders.Metaspace(**space)
    made.add_special_tokens([name for name, _ in pieces if re.fullmatch("<.+>", name)] + ["</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>",
        pair="$A </s> $B </s>",
        special_tokens=[("</s>", made.token_to_id("</s>"))],
    )
    return made
