"""The models an experiment can name: each a classifier and the tokenizer that goes with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tokenizers
from flax import nnx

from experiments.checks import one_of
from experiments.data.prompts import PROMPTS
from experiments.data.task import Task
from experiments.models import minilm, t5, t5_files, t5_tiny, tiny
from experiments.models.bert import BertClassifier, BertConfig, BertEncoder
from experiments.models.t5_classifier import T5Classifier, answers_of

__all__ = ["MODELS", "BertClassifier", "BertConfig", "BertEncoder", "Model", "T5Classifier", "get"]


class Model(NamedTuple):
    """How a model is made. `weights` is what the command's flag of that name says."""

    load: Callable[..., nnx.Module]  # (task, weights, *, rngs, dropout, dtype, remat) -> classifier
    tokenizer: Callable[[str | None], tokenizers.Tokenizer]  # (weights) -> tokenizer
    adapted: str  # the paths of the linears that get an adapter
    text_to_text: bool  # it reads prompts and answers in words; otherwise a fresh head trains too
    weights: str | None = None  # where there is a choice: what is taken by default


def get(name: str) -> Model:
    """The named model.

    Raises:
        ValueError: there is no model of that name.
    """
    return MODELS[one_of("model", name, MODELS)]


def _encoder(module: Any) -> Model:
    """A BERT from a module with `load` and `tokenizer`, under a fresh head."""

    def load(task: Task, weights: str | None, **options) -> BertClassifier:
        del weights
        return module.load(len(task.labels), **options)

    adapted = r"encoder/layers/\d+/(attention/(query|key|value|out)|up|down)"
    return Model(load, lambda weights: module.tokenizer(), adapted, text_to_text=False)


def _text_to_text(load: Callable[..., t5.T5], tokenizer, weights: str | None = None) -> Model:
    """A T5 that answers with the words of the task's labels."""

    def classifier(task: Task, weights: str | None, **options) -> T5Classifier:
        answers = answers_of(PROMPTS[task.name].words, tokenizer(weights))
        return T5Classifier(load(weights, **options), answers)

    return Model(classifier, tokenizer, t5.ADAPTED, text_to_text=True, weights=weights)


def _pretrained_t5(weights: str, *, rngs: nnx.Rngs, **options) -> t5.T5:
    del rngs  # nothing in it is fresh
    return t5_files.load(weights, **options)


T5_BASE = "google-t5/t5-base@a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1"  # on the Hugging Face hub

MODELS: dict[str, Model] = {
    "minilm": _encoder(minilm),
    "tiny": _encoder(tiny),
    "t5": _text_to_text(_pretrained_t5, t5_files.tokenizer, T5_BASE),
    "t5-tiny": _text_to_text(t5_tiny.load, t5_tiny.tokenizer),
}
