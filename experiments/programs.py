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

from experiments import methods
from experiments.config import RunConfig
from experiments.hosts import Devices

KEPT = 2  # methods whose programs are held: a command goes through its methods one by one


class Varied(NamedTuple):
    """What runs may differ in and still share their programs."""

    peaks: methods.Peaks
    key: Any  # uint32 words of the run's random key; a step folds its number in


def varied(run: RunConfig) -> Varied:
    """The run's own, as arrays of the types that every run has."""
    peaks = methods.Peaks(*map(np.float32, methods.peaks(run)))
    return Varied(peaks, np.asarray(jax.random.key_data(jax.random.key(run.seed))))


def loss_fn(params, graph: nnx.GraphDef, frozen, batch, number, key) -> jax.Array:
    """The mean cross-entropy of one batch's rows or tokens, with the dropout of step `number`."""
    model = nnx.merge(graph, params, frozen)
    # Adapters own their streams of keys, each with a count that takes the place of the step.
    counts = nnx.state(model, nnx.RngCount)
    nnx.update(model, jax.tree.map(lambda count: jnp.full_like(count, number), counts))
    rngs = nnx.Rngs(dropout=jax.random.fold_in(jax.random.wrap_key_data(key), number))
    inputs = (batch[name] for name in ("tokens", "mask", "segments", "labels"))
    losses_BL, weights_BL = model.losses(*inputs, rngs=rngs)
    weights_BL = weights_BL * batch["weights"][:, None]
    return jnp.sum(losses_BL * weights_BL) / jnp.maximum(jnp.sum(weights_BL), 1.0)


class Compiled:
    """A jitted function compiled ahead, once per length of batch: the time and memory are known."""

    def __init__(self, jitted: Callable):
        self.jitted = jitted
        self.programs: dict[int, Any] = {}

    def __contains__(self, length: int) -> bool:
        return length in self.programs

    def __getitem__(self, length: int) -> Any:
        return self.programs[length]

    def compile(self, length: int, args: tuple) -> None:
        """Makes the program for batches of `length` tokens."""
        self.programs[length] = self.jitted.lower(*args).compile()

    def memory_bytes(self, length: int) -> int:
        """Arguments, outputs and temporaries of a program; donated buffers count once."""
        m = self.programs[length].memory_analysis()
        if m is None:  # a backend that does not tell
            return 0
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return int(held + m.temp_size_in_bytes)


class Programs:
    """The programs of one configuration.

    step(params, opt_state, frozen, batch, number, varied) -> (params, opt_state, loss), donated
    diagnosis(the same) -> {name: figure}; None for a method without pairs
    logits(params, frozen, batch) -> (B, C)
    """

    def __init__(self, run: RunConfig, steps: int, graph: nnx.GraphDef, devices: Devices):
        self.run, self.steps, self.graph = run, steps, graph
        replicated, measure = devices.replicated, methods.diagnosis(run)

        def step(params, *rest):
            loss, _, updates, opt_state = self._update(params, *rest)
            return optax.apply_updates(params, updates), opt_state, loss

        def diagnosis(params, *rest):
            assert measure is not None
            _, grads, updates, _ = self._update(params, *rest)
            return measure(params, grads, updates)

        def logits(params, frozen, batch):
            model = nnx.merge(graph, params, frozen)
            model.eval()
            return model(batch["tokens"], batch["mask"], batch["segments"])

        self.step = Compiled(jax.jit(step, donate_argnums=(0, 1), out_shardings=replicated))
        self.logits = Compiled(jax.jit(logits))
        self.diagnosis = (
            None if measure is None else Compiled(jax.jit(diagnosis, out_shardings=replicated))
        )

    def init(self, params) -> Any:
        """The optimizer's first state, the same for all rates."""
        return self._optimizer(methods.peaks(self.run)).init(params)

    def _optimizer(self, peaks: methods.Peaks) -> optax.GradientTransformation:
        return methods.optimizer(self.run, self.steps, peaks)

    def _update(self, params, opt_state, frozen, batch, number, varied: Varied) -> tuple:
        loss, grads = jax.value_and_grad(loss_fn)(
            params, self.graph, frozen, batch, number, varied.key
        )
        tx = self._optimizer(varied.peaks)
        updates, opt_state = tx.update(grads, opt_state, params)
        return loss, grads, updates, opt_state


def of(run: RunConfig, steps: int, graph: nnx.GraphDef, devices: Devices) -> Programs:
    """The run's programs: those of an earlier run that it shares them with, or new ones."""
    return _of(run.shared, steps, graph, devices)


_of = functools.lru_cache(maxsize=KEPT)(Programs)


def clear() -> None:
    """Lets go of all programs, so that the next run compiles its own."""
    _of.cache_clear()
