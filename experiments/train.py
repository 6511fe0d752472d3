"""One run's training loop: a jitted, donated step over checkpointable batches.

The host runs a few steps ahead of the device and reads each loss when it is due, so that neither
waits for the other; what is shown and checked is always a loss that has been computed. The random
key of a step is made from (seed, step), so a resumed run repeats what an unbroken one does.
"""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import evaluate
from experiments.checkpoint import Checkpoints
from experiments.hosts import ONE, Devices

AHEAD = 2  # steps dispatched before the oldest loss is read
# Batches are cheap to make; more threads would take cores from a CPU run.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class Setup(NamedTuple):
    """What the loop needs, all of it made anew from the configuration at a resumption."""

    graph: nnx.GraphDef
    frozen: nnx.State  # what no step changes
    tx: optax.GradientTransformation
    key: jax.Array  # of the run; a step folds its number in
    batches: grain.MapDataset  # batches[step]
    evaluation: grain.MapDataset
    epochs: int
    diagnose: Callable[..., dict[str, float]] | None  # of (params, grads, updates)
    devices: Devices = ONE


@dataclasses.dataclass
class History:
    """What a run has measured so far; goes into every checkpoint."""

    losses: list[float] = dataclasses.field(default_factory=list)  # of every step
    evaluations: list[dict] = dataclasses.field(default_factory=list)  # at the end of every epoch
    diagnostics: list[dict] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by activity
    step_memory_bytes: int = 0  # of the largest compiled step
    data: dict | None = None  # the state of the iterator over the batches


def loss_fn(params, setup: Setup, frozen, batch, number) -> jax.Array:
    """The weighted mean cross-entropy of one batch, with the dropout of step `number`."""
    model = nnx.merge(setup.graph, params, frozen)
    # Adapters own their streams of keys, each with a count that takes the place of the step.
    counts = nnx.state(model, nnx.RngCount)
    nnx.update(model, jax.tree.map(lambda count: jnp.full_like(count, number), counts))
    rngs = nnx.Rngs(dropout=jax.random.fold_in(setup.key, number))
    logits_BC = model(batch["tokens"], batch["mask"], batch["segments"], rngs=rngs)
    losses_B = optax.softmax_cross_entropy_with_integer_labels(
        logits_BC.astype(jnp.float32), batch["labels"]
    )
    weights_B = batch["weights"]
    return jnp.sum(losses_B * weights_B) / jnp.maximum(jnp.sum(weights_B), 1.0)


def make_step(setup: Setup) -> Callable:
    """step(params, opt_state, frozen, batch, number) -> (params, opt_state, loss), jitted."""

    def step(params, opt_state, frozen, batch, number):
        loss, _, updates, opt_state = _update(setup, params, opt_state, frozen, batch, number)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=setup.devices.replicated)


def make_diagnosis(setup: Setup) -> Callable:
    """diagnosis(params, opt_state, frozen, batch, number) -> {name: figure}, jitted."""

    def diagnosis(params, opt_state, frozen, batch, number):
        _, grads, updates, _ = _update(setup, params, opt_state, frozen, batch, number)
        return setup.diagnose(params, grads, updates)

    return jax.jit(diagnosis, out_shardings=setup.devices.replicated)


def _update(setup: Setup, params, opt_state, frozen, batch, number) -> tuple:
    loss, grads = jax.value_and_grad(loss_fn)(params, setup, frozen, batch, number)
    updates, opt_state = setup.tx.update(grads, opt_state, params)
    return loss, grads, updates, opt_state


class Programs:
    """A jitted function compiled ahead, once per length of batch: the time and memory are known."""

    def __init__(self, jitted: Callable):
        self.jitted = jitted
        self.compiled: dict[int, Any] = {}
        self.memory_bytes = 0

    def get(self, length: int, args: tuple) -> Any:
        """The program for batches of `length` tokens."""
        if length not in self.compiled:
            program = self.jitted.lower(*args).compile()
            self.memory_bytes = max(self.memory_bytes, _memory_bytes(program))
            self.compiled[length] = program
        return self.compiled[length]


def _memory_bytes(program) -> int:
    """Arguments, outputs and temporaries of a compiled program; donated buffers count once."""
    m = program.memory_analysis()
    if m is None:  # a backend that does not tell
        return 0
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return int(held + m.temp_size_in_bytes)


class Clock:
    """Wall-clock seconds by activity, added to a dict that a checkpoint keeps."""

    def __init__(self, seconds: dict[str, float], activity: str):
        self.seconds, self.activity, self.since = seconds, activity, time.perf_counter()

    def tick(self, activity: str | None = None) -> str:
        """Books the time since the last call; what follows belongs to `activity`."""
        now, before = time.perf_counter(), self.activity
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self.since
        self.since, self.activity = now, activity or before
        return before

    @contextlib.contextmanager
    def on(self, activity: str) -> Iterator[None]:
        """Books the time inside the block to `activity`."""
        before = self.tick(activity)
        yield
        self.tick(before)


def train(
    setup: Setup,
    params: nnx.State,
    checkpoints: Checkpoints,
    *,
    checkpoint_every: int,
    diagnose_every: int,
    observe: Callable[[History], None],
) -> tuple[nnx.State, History]:
    """Trains from the last checkpoint, if there is one, to the end; the last step is saved too.

    Args:
        setup: the run.
        params: the initial trainable parameters; donated.
        checkpoints: of the run's folder.
        checkpoint_every: steps between checkpoints; 0: only the last.
        diagnose_every: steps between diagnoses; 0: none.
        observe: is called whenever a loss has been read, with the history so far.

    Raises:
        FloatingPointError: a loss is not finite.
        OSError: a checkpoint could not be written.
    """
    params, opt_state = setup.devices.replicate((params, setup.tx.init(params)))
    history = History()
    if (found := checkpoints.restore((params, opt_state))) is not None:
        (params, opt_state), history = found[0], History(**found[1])
    loop = _Loop(setup, history, observe)
    iterator = iter(setup.batches.to_iter_dataset(_READ))
    if history.data is not None:
        iterator.set_state(history.data)
    total = len(setup.batches)
    per_epoch = total // setup.epochs
    for done in range(len(history.losses) + 1, total + 1):
        batch = setup.devices.shard(next(iterator))
        if diagnose_every and setup.diagnose and done % diagnose_every == 0:
            loop.diagnose(params, opt_state, batch, done)
        params, opt_state = loop.step(params, opt_state, batch, done)
        if done % per_epoch == 0:
            loop.evaluate(params, done)
        if done == total or (checkpoint_every and done % checkpoint_every == 0):
            history.data = iterator.get_state()
            loop.save(checkpoints, done, (params, opt_state))
    return params, history


class _Loop:
    """The parts of the loop, around one history and one queue of losses yet to be read."""

    def __init__(self, setup: Setup, history: History, observe: Callable[[History], None]):
        self.setup, self.history, self.observe = setup, history, observe
        self.programs = Programs(make_step(setup))
        self.pending: collections.deque[jax.Array] = collections.deque()
        self.clock = Clock(history.seconds, "train")
        self.logits = jax.jit(_logits, static_argnums=0)
        self.diagnosis = make_diagnosis(setup)

    def step(self, params, opt_state, batch, done: int) -> tuple:
        """Dispatches one step and reads the losses that are due."""
        args = (params, opt_state, self.setup.frozen, batch, np.int32(done - 1))
        length = batch["tokens"].shape[1]
        if length not in self.programs.compiled:
            self.read(0)  # so that compilation is not timed together with steps under way
            with self.clock.on("compile"):
                self.programs.get(length, args)
        params, opt_state, loss = self.programs.get(length, args)(*args)
        self.pending.append(loss)
        self.read(AHEAD)
        return params, opt_state

    def read(self, leave: int) -> None:
        """Reads all but the last `leave` losses, and stops the run at one that is not finite."""
        while len(self.pending) > leave:
            loss = float(self.pending.popleft())
            self.stop_unless_finite("training", loss, len(self.history.losses) + 1)
            self.history.losses.append(loss)
            self.clock.tick()
            self.observe(self.history)

    def stop_unless_finite(self, what: str, loss: float, number: int) -> None:
        """Raises FloatingPointError for a loss that is NaN or infinite."""
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the {what} loss is {loss} at step {number} of {len(self.setup.batches)}; try "
                "lower --learning-rates, a longer --warmup-ratio or a smaller --clip-norm (and "
                "another --out, or delete the run's folder). Nothing of this step was saved"
            )

    def evaluate(self, params, done: int) -> None:
        """Measures the validation split."""
        self.read(0)
        with self.clock.on("evaluate"):
            logits, labels = evaluate.predict(
                lambda batch: self.logits(self.setup.graph, params, self.setup.frozen, batch),
                map(self.setup.devices.shard, self.setup.evaluation),
                self.setup.devices.gather,
            )
            scores = evaluate.metrics(logits, labels)
        self.stop_unless_finite("validation", scores["loss"], done)
        self.history.evaluations.append({"step": done} | scores)

    def diagnose(self, params, opt_state, batch, done: int) -> None:
        """Measures how close the step that is about to be made is to full fine-tuning's."""
        self.read(0)
        with self.clock.on("diagnose"):
            args = (params, opt_state, self.setup.frozen, batch, np.int32(done - 1))
            figures = {name: float(x) for name, x in self.diagnosis(*args).items()}
            self.history.diagnostics.append({"step": done} | figures)

    def save(self, checkpoints: Checkpoints, done: int, arrays: tuple) -> None:
        """Saves a checkpoint, unless a loss before it is not finite."""
        self.read(0)
        self.history.step_memory_bytes = max(
            self.history.step_memory_bytes, self.programs.memory_bytes
        )
        with self.clock.on("checkpoint"):
            checkpoints.save(done, arrays, dataclasses.asdict(self.history))


def _logits(graph, params, frozen, batch) -> jax.Array:
    model = nnx.merge(graph, params, frozen)
    model.eval()
    return model(batch["tokens"], batch["mask"], batch["segments"])
