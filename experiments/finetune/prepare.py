"""A run's data, model and optimizer, made from its configuration alone: the same at every start."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.data.batching import BUCKETS, Encoded, batches_of, encode
from experiments.data.prompts import PROMPTS
from experiments.data.tasks import load_task, task_named
from experiments.finetune.config import RunConfig
from experiments.finetune.devices import ONE, Devices
from experiments.finetune.methods import split
from experiments.finetune.programs import programs_of, varied_of
from experiments.finetune.train import Setup
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


def load_data(run: RunConfig, data_dir: str | None) -> Data:
    """The run's examples; those of the last few runs are kept."""
    names = "task", "model", "weights", "max_length", "train_examples", "eval_examples"
    seed = run.seed if run.train_examples else 0
    return _load_data(data_dir, seed, *(getattr(run, name) for name in names))


@functools.lru_cache(maxsize=2)
def _load_data(
    data_dir, seed, task, model, weights, max_length, train_examples, eval_examples
) -> Data:
    splits, spec = load_task(task, data_dir=data_dir, seed=DATA_SEED), task_named(task)
    found = model_named(model)
    tokenizer = found.tokenizer(weights)

    def encoded(split, count: int, seed: int) -> Encoded:
        examples = (split[i] for i in subset(len(split), count, seed))
        if found.text_to_text:
            examples = (PROMPTS[task].example(spec, example) for example in examples)
        return encode(examples, tokenizer, max_length)

    return Data(
        encoded(splits.train, train_examples, seed),
        encoded(splits.validation, eval_examples, DATA_SEED),
        len(splits.train),
    )


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
    tokens = np.minimum(tokens, run.max_length)
    steps = run.epochs / run.batch_size  # per example

    def cost(chosen: tuple[int, ...]) -> float:
        padded = np.asarray(chosen)[np.searchsorted(chosen, tokens)]
        return steps * padded.sum() + COMPILATION * len(np.unique(padded))

    offered = [length for length in BUCKETS if length < run.max_length]
    choices = itertools.chain.from_iterable(
        itertools.combinations(offered, count) for count in range(len(offered) + 1)
    )
    return min(((*chosen, run.max_length) for chosen in choices), key=cost)


def build(run: RunConfig, loaded: Data, devices: Devices = ONE) -> tuple[Setup, nnx.State]:
    """The run's setup and initial trainable parameters, all from its configuration."""
    with devices.loading():
        rngs = nnx.Rngs(run.seed)
        model = model_named(run.model).load(
            task_named(run.task),
            run.weights,
            rngs=rngs,
            dropout=run.dropout,
            dtype=jnp.dtype(run.dtype),
            remat=run.remat,
        )
        graph, params, frozen = split(model, run, rngs)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
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
    )
    return setup, params
