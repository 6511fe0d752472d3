"""A random T5 small enough for tests, and a tokenizer made on the spot: needs no file."""

import dataclasses
import string

import tokenizers
from flax import nnx
from tokenizers import normalizers

from experiments.data.prompts import PROMPTS
from experiments.models import t5, t5_files, tiny

_SPECIAL = ("<pad>", "</s>", "<unk>")


def _pieces() -> list[tuple[str, float]]:
    """Pieces and log-probabilities: words rather than letters, and all letters of ASCII."""
    answers = [word for prompt in PROMPTS.values() for word in prompt.words]
    words = dict.fromkeys(f"▁{word}" for word in [*answers, *tiny.WORDS.split()])
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    costs = {name: 0.0 for name in _SPECIAL} | dict.fromkeys(words, -4.0)
    return list((costs | {"▁": -8.0} | dict.fromkeys(letters, -8.0)).items())


CONFIG = t5.T5Config(
    vocab_size=len(_pieces()) + t5_files.SENTINELS,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
)


def tokenizer(weights: None = None) -> tokenizers.Tokenizer:
    """Lower-cased Unigram over a fixed vocabulary, every text ended by "</s>"."""
    del weights
    made = t5_files.unigram(_pieces(), unk_id=2)
    made.normalizer = normalizers.Lowercase()
    return made


def load(weights: None, *, rngs: nnx.Rngs, dropout: float = 0.0, **options) -> t5.T5:
    """Two random layers in each stack, 32 wide."""
    del weights
    config = dataclasses.replace(CONFIG, dropout_rate=dropout)
    return t5.T5(config, rngs=rngs, **options)
