"""Where a Llama and its dialect come from: SmolLM2's package, a file or folder, or nowhere."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import tokenizers
from flax import nnx
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from experiments.models import llama_files, llama_gguf, llama_vocabulary, weights
from experiments.models import smollm2 as package
from experiments.models.exchanges import Dialect
from experiments.models.llama import TINY, Llama
from experiments.models.llama_config import LlamaConfig
from experiments.models.quantized import Kind, quantize

END = "<|end|>"  # of a tiny model's text


class Source(NamedTuple):
    """A model and how it reads and writes; both take what --weights says."""

    load: Callable[..., Llama]  # (weights, *, rngs, scanned, dtype, remat, quantized)
    dialect: Callable[[str | None], Dialect]


@functools.lru_cache(maxsize=1)  # reading a file's tables takes seconds
def _opened(file: pathlib.Path | None) -> llama_gguf.Gguf:
    return package.opened() if file is None else llama_gguf.opened(file)


def _file(model: str | None) -> pathlib.Path | None:
    """The GGUF file that --weights names; None: it names something else."""
    return pathlib.Path(model) if model is not None and model.endswith(".gguf") else None


@functools.lru_cache(maxsize=1)  # for the next run of a command: reading takes seconds
def _read(model: str | None, **options) -> tuple[nnx.GraphDef, nnx.State]:
    if model is None:
        return nnx.split(package.load(_opened(None), **options))
    if (file := _file(model)) is not None:
        return nnx.split(llama_gguf.load(_opened(file), **options))
    return nnx.split(llama_files.load(model, **options))


def _load(model: str | None, *, rngs: nnx.Rngs, **options) -> Llama:
    """A new module around arrays that are read once."""
    del rngs  # nothing in it is fresh
    graph, state = _read(model, **options)
    return nnx.merge(graph, jax.tree.map(lambda x: x, state))


def _gguf_dialect(found: llama_gguf.Gguf) -> Dialect:
    tokenizer, chat = llama_vocabulary.tokenizer(found), llama_gguf.chat_template(found)
    return _dialect(tokenizer, chat, llama_gguf.config_of(found), found.file)


def _dialect(tokenizer, chat: str | None, config: LlamaConfig, file: pathlib.Path) -> Dialect:
    if not config.eos_token_ids:
        raise ValueError(
            f"{file} names no token that ends a text (eos_token_id); an answer would never end. "
            "Add the token's number to its configuration"
        )
    return Dialect(tokenizer, chat, config.eos_token_ids, config.max_position_embeddings)


def _llama_dialect(model: str) -> Dialect:
    if (file := _file(model)) is not None:
        return _gguf_dialect(_opened(file))
    file = weights.there(weights.folder_of(model), weights.CONFIG)
    config = LlamaConfig.from_json(file)
    return _dialect(llama_files.tokenizer(model), llama_files.chat_template(model), config, file)


TINY_TILE = 16  # divides the widths
TINY_CONFIG = dataclasses.replace(
    TINY, vocab_size=257, max_position_embeddings=1024, eos_token_ids=(256,)
)


def _load_tiny(model: None, *, rngs: nnx.Rngs, quantized: Kind | None = None, **options) -> Llama:
    del model
    made = Llama(TINY_CONFIG, rngs=rngs, **options)
    if quantized is not None:
        quantize(made, quantized, TINY_TILE)
    return made


def _tiny_dialect(model: None) -> Dialect:
    """One token a byte, one that ends a text, and no chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = ByteLevel()
    made.add_special_tokens([AddedToken(END, special=True)])
    return _dialect(made, None, TINY_CONFIG, pathlib.Path("the tiny model"))


smollm2 = Source(_load, lambda model: _gguf_dialect(_opened(None)))
llama = Source(_load, _llama_dialect)
tiny = Source(_load_tiny, _tiny_dialect)
