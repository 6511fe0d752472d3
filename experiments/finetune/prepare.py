"""A run's data, model and optimizer, made from its configuration alone: the same at every start."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.data.batching import BUCKETS, Encoded, batches_of, encode
from experiments.data.language import Exchange
from experiments.data.prompts import PROMPTS
from experiments.data.task import Example
from experiments.data.tasks import load_task, task_named
from experiments.finetune.config import RunConfig
from experiments.finetune.devices import ONE, Devices
from experiments.finetune.evaluate import metrics
from experiments.finetune.language import (
    Prompt,
    decoding_of,
    encode_exchanges,
    loss_scores,
    prompts_of,
    questions_of,
)
from experiments.finetune.methods import split
from experiments.finetune.programs import programs_of, varied_of
from experiments.finetune.train import Setup
from experiments.models import Dialect
from experiments.models import get as model_named

EVAL_BATCH = 64
# What compiling for one more length costs, in steps x tokens of its padding: on 2 CPU cores a
# program takes about as long as a dozen steps of 32 tokens.
COMPILATION = 400
DATA_SEED = 0  # draws the task and the validation subset: the same for every run


class Data(NamedTuple):
    """A task's examples, tokenised."""

    train: Encoded
    validation: Encoded
    available: int  # training examples before --train-examples
    left_out: int = 0  # rows of both splits that are longer than --max-length
    prompts: Sequence[Prompt] = ()  # of the validation split, that are answered at evaluations


def load_data(run: RunConfig, data_dir: str | None) -> Data:
    """The run's examples; those of the last few runs are kept."""
    ignored = {"method": "", "learning_rate": 1.0, "seed": run.seed if run.train_examples else 0}
    return _load_data(dataclasses.replace(run.shared, **ignored), data_dir)


@functools.lru_cache(maxsize=2)
def _load_data(run: RunConfig, data_dir: str | None) -> Data:
    files = (run.data, run.validation_data) if run.data else ()
    splits = load_task(run.task, data_dir=data_dir, seed=DATA_SEED, files=files)
    rows = (
        [split[i] for i in subset(len(split), count, seed)]
        for split, count, seed in zip(
            splits, (run.train_examples, run.eval_examples), (run.seed, DATA_SEED), strict=True
        )
    )
    if model_named(run.model).kind == "decoder":
        train, validation, left_out, prompts = _exchanges(run, *rows)
    else:
        train, validation = (_texts(run, examples) for examples in rows)
        left_out, prompts = 0, ()
    return Data(train, validation, len(splits.train), left_out, prompts)


def _texts(run: RunConfig, examples: Sequence[Example]) -> Encoded:
    model, task = model_named(run.model), task_named(run.task)
    if model.kind == "text-to-text":
        examples = [PROMPTS[run.task].example(task, example) for example in examples]
    return encode(examples, model.tokenizer(run.weights), run.max_length)


def _exchanges(run: RunConfig, train: Sequence[Exchange], validation: Sequence[Exchange]) -> tuple:
    dialect = dialect_of(run)
    if run.max_length > dialect.context:
        raise ValueError(
            f"--max-length {run.max_length} is more than the model's context, {dialect.context} "
            "positions; shorten it"
        )
    made = [encode_exchanges(rows, dialect, run.max_length) for rows in (train, validation)]
    prompts: list[Prompt] = []
    if (decoding := decoding_of(run)) is not None:
        room = min(run.max_length, dialect.context - decoding.max_new_tokens)
        prompts = prompts_of(validation, dialect, run.answers, room)
    left_out = len(train) + len(validation) - sum(map(len, made))
    return *made, left_out, prompts


def dialect_of(run: RunConfig) -> Dialect:
    """How the run's language model reads and writes."""
    dialect = model_named(run.model).dialect(run.weights)
    return dialect._replace(template=None) if run.plain else dialect


def subset(available: int, count: int, seed: int) -> list[int]:
    """`count` of `available` rows drawn by `seed`, in order; all of them for 0."""
    if count > available:
        raise ValueError(
            f"{count} examples asked for, the split has {available}; ask for fewer, or 0 for all"
        )
    if count == 0:
        return list(range(available))
    return sorted(np.random.default_rng(seed).permutation(available)[:count].tolist())


def lengths(run: RunConfig, tokens: np.ndarray) -> tuple[int, ...]:
    """The lengths to pad batches to: those that cost least in padding and compilation together.

    `tokens` (examples,) are the lengths of the training examples; the last one is max_length.
    """
    tokens, counts = np.unique(np.minimum(tokens, run.max_length), return_counts=True)
    steps = run.epochs / run.batch_size  # per example

    def cost(chosen: tuple[int, ...]) -> float:
        padded = np.asarray(chosen)[np.searchsorted(chosen, tokens)]
        return steps * (counts @ padded) + COMPILATION * len(np.unique(padded))

    offered = [length for length in BUCKETS if length < run.max_length]
    choices = itertools.chain.from_iterable(
        itertools.combinations(offered, count) for count in range(len(offered) + 1)
    )
    return min(((*chosen, run.max_length) for chosen in choices), key=cost)


def model_of(run: RunConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, what trains, the rest) of the run's model before its first step."""
    rngs, spec = nnx.Rngs(run.seed), model_named(run.model)
    decoder = spec.kind == "decoder"
    model = spec.load(
        task_named(run.task),
        run.weights,
        rngs=rngs,
        dropout=run.dropout,
        dtype=jnp.dtype(run.dtype),
        remat=run.remat,
        **({"quantized": run.quantized} if decoder else {}),
    )
    if decoder:
        model.label_smoothing = run.label_smoothing
    return split(model, run, rngs)


def build(run: RunConfig, loaded: Data, devices: Devices = ONE) -> tuple[Setup, nnx.State]:
    """The run's setup and initial trainable parameters, all from its configuration."""
    decoder, questions = model_named(run.model).kind == "decoder", None
    with devices.loading():
        graph, params, frozen = model_of(run)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    if loaded.prompts:
        about = dialect_of(run), task_named(run.task), decoding_of(run)
        questions = questions_of(loaded.prompts, *about, devices.count, **share)
    share |= {"buckets": lengths(run, loaded.train.lengths)}
    batches = batches_of(loaded.train, run.batch_size, seed=run.seed, epochs=run.epochs, **share)
    eval_batch = -(-EVAL_BATCH // devices.count) * devices.count  # every device has as many rows
    setup = Setup(
        programs=programs_of(run.shared, len(batches), graph, devices),
        varied=devices.replicate(varied_of(run)),
        frozen=devices.place(frozen),
        batches=batches,
        evaluation=batches_of(loaded.validation, eval_batch, seed=None, epochs=1, **share),
        epochs=run.epochs,
        devices=devices,
        scores=loss_scores if decoder else metrics,
        questions=questions,
    )
    return setup, params
