"""T5 checkpoints as Hugging Face writes them, from a folder or by name, and their tokenizers.

A model is config.json; model.safetensors, or its shards and model.safetensors.index.json; and
tokenizer.json or spiece.model.
"""

import dataclasses
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from experiments.models import weights
from experiments.models.t5 import T5
from experiments.models.t5_config import T5Config

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


def load(
    model: str | pathlib.Path,
    *,
    dropout: float | None = None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat: bool = False,
) -> T5:
    """The pretrained T5 of a folder, or of NAME@COMMIT on the Hugging Face hub.

    `dropout` None is the config's rate, `dtype` of the activations, `param_dtype` of the weights;
    with `remat` the backward pass recomputes every layer.

    Raises:
        FileNotFoundError: there is no such folder or name, or a file is missing.
        ValueError: a file is damaged, or does not fit the config.
    """
    folder = weights.folder_of(model)
    config = T5Config.from_json(weights.there(folder, weights.CONFIG))
    if dropout is not None:
        config = dataclasses.replace(config, dropout_rate=dropout)
    file, tensors = weights.tensors_of(folder)
    tied = _drop_copies(tensors, file)
    options = {"tied": tied, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    made = nnx.eval_shape(lambda: T5(config, **options, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(made, nnx.Param, ...)
    params = weights.filled(
        params, tensors, tensor_name, what="a T5", file=file, remedy=weights.REMEDY
    )
    return nnx.merge(graph, params, rest)


def save(model: T5, folder: str | pathlib.Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Writes config.json, model.safetensors and tokenizer.json, which `load` and PyTorch read.

    Raises:
        ValueError: the model has adapters; merge them first (`lorapro_jax.nnx.merge_lora`).
    """
    # The scale is what a reader infers from tie_word_embeddings, tied or not.
    told = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    told |= {"tie_word_embeddings": model.config.scale_decoder_outputs, "is_encoder_decoder": True}
    told |= dataclasses.asdict(model.config)
    files = {weights.TOKENIZER: tokenizer.to_str(pretty=True)}
    weights.save(folder, nnx.state(model, nnx.Param), tensor_name, told, files)


def _drop_copies(tensors: dict[str, np.ndarray], file: pathlib.Path) -> bool:
    """Removes what repeats the embedding, and says whether the head does too."""
    tensors.pop(_UNUSED, None)
    for name in _COPIES:
        copy = tensors.pop(name, None)
        if copy is not None and not np.array_equal(copy, tensors.setdefault("shared.weight", copy)):
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
        ValueError: the file is damaged, no Unigram model, or does not fit the config.
    """
    folder = weights.folder_of(model)
    if (file := folder / weights.TOKENIZER).is_file():
        loaded = weights.read_tokenizer(file)
    else:
        file = weights.there(folder, "spiece.model")
        loaded = from_sentencepiece(file)
    config = T5Config.from_json(weights.there(folder, weights.CONFIG))
    end, most = loaded.token_to_id("</s>"), max(loaded.get_vocab().values(), default=-1)
    if end != config.eos_token_id or most >= config.vocab_size:
        raise ValueError(
            f"{file} has '</s>' as token {end} and tokens up to {most}; {folder / weights.CONFIG} "
            f"expects it as {config.eos_token_id} and all below {config.vocab_size}: they belong "
            f"to different models; {weights.REMEDY}"
        )
    return loaded


def from_sentencepiece(file: pathlib.Path) -> tokenizers.Tokenizer:
    """T5's tokenizer from its SentencePiece model, with the sentinels behind its pieces."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
        spec, pieces = proto.trainer_spec, [(piece.piece, piece.score) for piece in proto.pieces]
        kind = spec.ModelType.Name(spec.model_type)
        if kind != "UNIGRAM" or not proto.HasField("normalizer_spec"):  # the last part of a file
            raise ValueError(f"{kind}, {len(pieces)} pieces; expected UNIGRAM and a normalizer")
        return unigram(pieces, spec.unk_id, proto.normalizer_spec.precompiled_charsmap)
    except Exception as error:  # protobuf's DecodeError, the plain Exception of tokenizers
        raise ValueError(f"{file} is no T5's tokenizer ({error}); {weights.REMEDY}") from error


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
