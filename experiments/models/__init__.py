"""The models an experiment can name, and how each is made, adapted and evaluated."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import tokenizers
from flax import nnx

import lorapro_jax as lp
from experiments.checks import one_of
from experiments.data.language import LanguageTask
from experiments.data.prompts import PROMPTS
from experiments.data.task import Task
from experiments.models import decoders, llama, minilm, t5, t5_files, t5_tiny, tiny
from experiments.models.bert import BertClassifier, BertConfig, BertEncoder
from experiments.models.exchanges import Dialect
from experiments.models.language import LanguageModel
from experiments.models.t5_classifier import T5Classifier, answers_of
from lorapro_jax import nnx as lora

__all__ = [
    "MODELS",
    "BertClassifier",
    "BertConfig",
    "BertEncoder",
    "Dialect",
    "LanguageModel",
    "Model",
    "T5Classifier",
    "get",
]


class Model(NamedTuple):
    """How a model is made. `weights` is what the command's flag of that name says."""

    # encoder: a fresh head trains too; text-to-text: answers with words; decoder: writes texts
    kind: Literal["encoder", "text-to-text", "decoder"]
    load: Callable[..., nnx.Module]  # (task, weights, *, rngs, dropout, dtype, remat)
    adapted: str  # the paths of the linears that get an adapter; of a decoder, in a layer
    tokenizer: Callable[[str | None], tokenizers.Tokenizer] | None = None  # of the first two kinds
    dialect: Callable[[str | None], Dialect] | None = None  # of a decoder
    adapt: Callable[..., None] = lora.add_lora  # (model, *, targets, rngs, ...), in place
    layout: lp.Layout | None = None  # of the factors, where layers are stacked
    weights: str | None = None  # where there is a choice: what is taken by default
    other_weights: bool = False  # whether --weights may name others


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
    return Model("encoder", load, adapted, lambda weights: module.tokenizer())


def _text_to_text(load: Callable[..., t5.T5], tokenizer, weights: str | None = None) -> Model:
    """A T5 that answers with the words of the task's labels."""

    def classifier(task: Task, weights: str | None, **options) -> T5Classifier:
        answers = answers_of(PROMPTS[task.name].words, tokenizer(weights))
        return T5Classifier(load(weights, **options), answers)

    named = {"weights": weights, "other_weights": weights is not None}
    return Model("text-to-text", classifier, t5.ADAPTED, tokenizer, **named)


def _pretrained_t5(weights: str, *, rngs: nnx.Rngs, **options) -> t5.T5:
    del rngs  # nothing in it is fresh
    return t5_files.load(weights, **options)


def _decoder(source: decoders.Source, other_weights: bool = False) -> Model:
    """A Llama with its layers in one scanned stack; its dropout is the adapters' own."""

    def load(task: LanguageTask, weights: str | None, *, dropout: float, **options):
        del task, dropout
        return LanguageModel(source.load(weights, scanned=True, **options))

    def adapt(model: LanguageModel, **options) -> None:
        llama.adapt(model.llama, **options)

    layers = {r"llama/layers/.*": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))}
    named = {"dialect": source.dialect, "other_weights": other_weights}
    named |= {"adapt": adapt, "layout": lp.layouts.FLAX.declare(layers)}
    return Model("decoder", load, llama.ADAPTED, **named)


T5_BASE = "google-t5/t5-base@a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1"  # on the Hugging Face hub

MODELS: dict[str, Model] = {
    "smollm2": _decoder(decoders.smollm2),
    "llama": _decoder(decoders.llama, other_weights=True),
    "llama-tiny": _decoder(decoders.tiny),
    "minilm": _encoder(minilm),
    "tiny": _encoder(tiny),
    "t5": _text_to_text(_pretrained_t5, t5_files.tokenizer, T5_BASE),
    "t5-tiny": _text_to_text(t5_tiny.load, t5_tiny.tokenizer),
}
