"""The compiled step, diagnosis and evaluation, shared by runs that differ in rates and seed only.

What such runs differ in, `Varied`, is an argument of the programs; everything else that decides
them is the key under which they are kept. Each is compiled once per length of batch, when a run
first needs it, so a sweep over learning rates compiles as often as one run does.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.finetune.config import RunConfig
from experiments.finetune.devices import Devices
from experiments.finetune.language import decoding_of
from experiments.finetune.methods import Peaks, diagnosis_of, layout_of, optimizer, peaks_of
from experiments.models.llama_decode import decode

KEPT = 2  # methods whose programs are held: a command goes through its methods one by one


class Varied(NamedTuple):
    """What runs may differ in and still share their programs."""

    peaks: Peaks
    key: Any  # uint32 words of the run's random key; a step folds its number in


def varied_of(run: RunConfig) -> Varied:
    """The run's own, as arrays of the types that every run has."""
    peaks = Peaks(*map(np.float32, peaks_of(run)))
    return Varied(peaks, np.asarray(jax.random.key_data(jax.random.key(run.seed))))


class Metrics(NamedTuple):
    """What a step tells of itself, before it."""

    loss: jax.Array
    gradient_norm: jax.Array  # global, of what trains, before clipping


def summed_loss(params, graph: nnx.GraphDef, frozen, batch, number, key) -> tuple:
    """(summed cross-entropy of a batch's rows or tokens, their number), with dropout `number`."""
    model = nnx.merge(graph, params, frozen)
    # Adapters own their streams of keys, each with a count that takes the place of the step.
    counts = nnx.state(model, nnx.RngCount)
    nnx.update(model, jax.tree.map(lambda count: jnp.full_like(count, number), counts))
    rngs = nnx.Rngs(dropout=jax.random.fold_in(jax.random.wrap_key_data(key), number))
    inputs = (batch[name] for name in ("tokens", "mask", "segments", "labels"))
    losses_BL, weights_BL = model.losses(*inputs, rngs=rngs)
    weights_BL = weights_BL * batch["weights"][:, None]
    return jnp.sum(losses_BL * weights_BL), jnp.sum(weights_BL)


def loss_fn(params, graph: nnx.GraphDef, frozen, batch, number, key) -> jax.Array:
    """The mean cross-entropy of one batch's rows or tokens, with the dropout of step `number`."""
    total, count = summed_loss(params, graph, frozen, batch, number, key)
    return total / jnp.maximum(count, 1.0)


def accumulated(parts: int, params, graph: nnx.GraphDef, frozen, batch, number, key) -> tuple:
    """`jax.value_and_grad(loss_fn)`, worked through in `parts` parts of the batch one by one.

    Every part has rows of every device: the first of it has rows 0, `parts`, 2 `parts`, ...
    """

    def cut(x_B: jax.Array) -> jax.Array:
        return jnp.swapaxes(x_B.reshape(-1, parts, *x_B.shape[1:]), 0, 1)

    def of_part(index, part) -> tuple:
        return jax.value_and_grad(summed_loss, has_aux=True)(
            params, graph, frozen, part, number * parts + index, key
        )

    def add(sums, part) -> tuple:
        return jax.tree.map(jnp.add, sums, of_part(*part)), None

    steps = jnp.arange(parts), jax.tree.map(cut, batch)
    like = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], steps))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    ((total, count), grads), _ = jax.lax.scan(add, zeros, steps)
    count = jnp.maximum(count, 1.0)
    return total / count, jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)


class Compiled(dict[int, Any]):
    """A jitted function compiled ahead, once per length of batch: the time and memory are known."""

    def __init__(self, jitted: Callable, devices: Devices):
        super().__init__()
        self.jitted, self.devices = jitted, devices

    def compile(self, length: int, args: tuple) -> None:
        """Makes the program for batches of `length` tokens."""
        with self.devices.in_use():
            self[length] = self.jitted.lower(*args).compile()

    def memory_bytes(self, length: int) -> int:
        """Arguments, outputs and temporaries of a program; donated buffers count once."""
        m = self[length].memory_analysis()
        if m is None:  # a backend that does not tell
            return 0
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return int(held + m.temp_size_in_bytes)


class Programs:
    """The programs of one configuration.

    step(params, opt_state, frozen, batch, number, varied) -> (params, opt_state, metrics), donated
    diagnosis(the same) -> {name: figure}; None for a method without pairs
    outputs(params, frozen, batch) -> (B, C): logits, or of a language model loss and tokens
    answers(params, frozen, batch) -> (B, steps), tokens; None for what is no language model
    """

    def __init__(self, run: RunConfig, steps: int, graph: nnx.GraphDef, devices: Devices):
        self.graph, self.devices, self.layout = graph, devices, layout_of(run)
        self.optimizer = functools.partial(optimizer, run, steps)
        measure = diagnosis_of(run)

        def update(params, opt_state, frozen, batch, number, varied: Varied) -> tuple:
            args = params, graph, frozen, batch, number, varied.key
            if run.accumulate == 1:
                loss, grads = jax.value_and_grad(loss_fn)(*args)
            else:
                loss, grads = accumulated(run.accumulate, *args)
            updates, opt_state = self.optimizer(varied.peaks).update(grads, opt_state, params)
            return loss, grads, updates, opt_state

        def step(params, *rest):
            loss, grads, updates, opt_state = update(params, *rest)
            made = optax.apply_updates(params, updates), opt_state
            if devices.mesh is not None:  # both are held to where they lie before the step
                where = devices.shardings(params), self.state_shardings(params)
                made = jax.lax.with_sharding_constraint(made, where)
            return (*made, Metrics(loss, optax.tree.norm(grads)))

        def diagnosis(params, *rest):
            _, grads, updates, _ = update(params, *rest)
            return measure(params, grads, updates)

        def outputs(params, frozen, batch):
            model = nnx.merge(graph, params, frozen)
            model.eval()
            return model(batch["tokens"], batch["mask"], batch["segments"])

        def answers(params, frozen, batch):
            model = nnx.merge(graph, params, frozen)
            model.eval()
            return decode(model.llama, batch["tokens"], batch["mask"], decoding)

        self.step = Compiled(jax.jit(step, donate_argnums=(0, 1)), devices)
        self.outputs = Compiled(jax.jit(outputs), devices)
        self.answers = None
        if (decoding := decoding_of(run)) is not None:
            answered = jax.jit(answers, out_shardings=devices.replicated)
            self.answers = Compiled(answered, devices)
        measured = jax.jit(diagnosis, out_shardings=devices.replicated)
        self.diagnosis = Compiled(measured, devices) if measure else None

    def init(self, params) -> Any:
        """The optimizer's first state, the same for all rates."""
        tx = self.optimizer()
        if self.devices.mesh is None:
            return tx.init(params)
        return jax.jit(tx.init, out_shardings=self.state_shardings(params))(params)

    def state_shardings(self, params) -> Any:
        """How the optimizer's state lies on the devices."""
        return self.devices.state_shardings(self.optimizer(), params, self.layout)


# Called with `run.shared`: the programs of an earlier run that shares them, or new ones.
programs_of = functools.lru_cache(maxsize=KEPT)(Programs)
