"""The models an experiment can name: each a classifier and the tokenizer that goes with it."""

import difflib
from collections.abc import Callable

import tokenizers
from flax import nnx

from experiments.models import minilm, tiny
from experiments.models.bert import BertClassifier, BertConfig, BertEncoder

__all__ = ["ADAPTED", "MODELS", "BertClassifier", "BertConfig", "BertEncoder", "build"]

# Every linear of the encoder, none of the head: the modules that get an adapter by default.
ADAPTED = r"encoder/layers/\d+/(attention/(query|key|value|out)|up|down)"

# name -> (load(num_labels, *, rngs, dropout), tokenizer())
MODELS: dict[str, tuple[Callable[..., BertClassifier], Callable[[], tokenizers.Tokenizer]]] = {
    "minilm": (minilm.load, minilm.tokenizer),
    "tiny": (tiny.load, tiny.tokenizer),
}


def build(
    name: str, num_labels: int, *, rngs: nnx.Rngs, dropout: float = 0.0
) -> tuple[BertClassifier, tokenizers.Tokenizer]:
    """The named model with a fresh head of `num_labels` classes, and its tokenizer.

    Raises:
        ValueError: there is no model of that name.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown model {name!r}; {hint}there are {', '.join(sorted(MODELS))}")
    load, tokenizer = MODELS[name]
    return load(num_labels, rngs=rngs, dropout=dropout), tokenizer()
