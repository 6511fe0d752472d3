"""The pretraining loop: a compiled, donated step over corrupted spans, until its time is up.

The rate rises linearly, falls as 1/sqrt(step), and over the last fifth of the steps also linearly
to 0. All a step depends on is the settings, its number and which step is the last. That one is
given, or the clock decides it: once, when four fifths of the time are over, and it is kept in a
checkpoint at once. So a run that was killed goes on with the steps that an unbroken one makes.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.checkpoint import Checkpoints
from experiments.data.spans import Spans
from experiments.models import t5

COOLDOWN = 5  # the last 1/COOLDOWN of the steps
# Batches are cheap to make; more threads would take cores from a CPU run.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is pretrained, its text apart."""

    batch_size: int = 8
    """Rows per step."""
    learning_rate: float = 1e-2
    """At the end of the warm-up, where it is highest; a share of a leaf's root mean square."""
    warmup_steps: int = 100
    """Steps over which the rate rises."""
    clip_norm: float = 1.0
    """Bound on the global norm of the gradients."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.99
    """Adam's decay of the second moment."""
    seed: int = 0
    """Draws the weights, the order of the texts, the spans and what is held out."""
    minutes: float = 50.0
    """Time for the steps, compilation and evaluations included; it decides how many they are."""
    steps: int | None = None
    """So many instead, whatever the time; 0: the random model, to compare with."""


@dataclasses.dataclass
class History:
    """What a run has measured so far; goes into every checkpoint."""

    losses: list[float] = dataclasses.field(default_factory=list)  # of every step
    evaluations: list[dict] = dataclasses.field(default_factory=list)
    log: list[dict] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    last: int | None = None  # step, once it is decided
    data: dict | None = None  # the state of the iterator over the batches


class Every(NamedTuple):
    """Steps between what does not change the parameters."""

    log: int
    evaluate: int
    checkpoint: int


class Setup(NamedTuple):
    """What the loop needs, all of it made anew at a resumption."""

    training: Training
    graph: nnx.GraphDef
    batches: grain.MapDataset
    held_out: list[dict[str, np.ndarray]]
    spans: Spans


def rate(training: Training, step: int, last: int | None) -> float:
    """The learning rate of a step, from 1."""
    warm = training.warmup_steps
    value = training.learning_rate * min(step / warm, math.sqrt(warm / step))
    if last is not None:
        value *= min((last + 1 - step) / max(last // COOLDOWN, 1), 1.0)
    return value


def optimizer(training: Training) -> optax.GradientTransformation:
    """Clipping and Adam; the step multiplies by the rate.

    Updates are in proportion to what they update, as Adafactor's are: a T5's embedding starts at a
    root mean square of 1, its kernels at 1/16 or less, and one step for both is too short for one.
    """
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.scale_by_adam(b1=training.b1, b2=training.b2),
        optax.scale_by_param_block_rms(),
    )


def _logits(graph: nnx.GraphDef, params: nnx.State, batch) -> jax.Array:
    model = nnx.merge(graph, params)
    inputs_BS, targets_BT = batch["inputs"], batch["targets"]
    return model(inputs_BS, jnp.ones(inputs_BS.shape, bool), model.shifted(targets_BT))


@functools.lru_cache(maxsize=1)
def step_of(training: Training, graph: nnx.GraphDef) -> Callable:
    """step(params, opt_state, batch, rate) -> (params, opt_state, loss).

    Kept, and so compiled once, for a process that goes on with its run.
    """
    tx = optimizer(training)

    def loss_fn(params, batch):
        targets_BT = batch["targets"]
        everywhere_BT = jnp.ones(targets_BT.shape, bool)
        return t5.token_loss(_logits(graph, params, batch), targets_BT, everywhere_BT)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch, rate):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


@functools.lru_cache(maxsize=1)
def evaluation_of(graph: nnx.GraphDef, spans: Spans) -> Callable:
    """evaluation(params, batch) -> sums over the targets: of losses, and of hidden words alone."""

    @jax.jit
    def evaluation(params, batch):
        logits_BTV, targets_BT = _logits(graph, params, batch), batch["targets"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
        words_BT = spans.is_text(targets_BT)
        right_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
        return {
            "loss": (losses.sum(), losses.size),
            "hidden_loss": ((losses * words_BT).sum(), words_BT.sum()),
            "hidden_accuracy": ((right_BT & words_BT).sum(), words_BT.sum()),
        }

    return evaluation


def pretrain(
    setup: Setup,
    params: nnx.State,
    checkpoints: Checkpoints,
    every: Every,
    observe: Callable[[History], None],
    saved: Callable[[History], None],
) -> tuple[nnx.State, History]:
    """Trains from the last checkpoint, if there is one, to the end; the last step is saved too.

    Args:
        setup: the run.
        params: the initial parameters; donated.
        checkpoints: of the run's folder.
        every: how often to log, to evaluate and to save.
        observe: is called after every step.
        saved: is called after every checkpoint.

    Raises:
        FloatingPointError: a loss is not finite.
        OSError: a checkpoint could not be written.
    """
    opt_state, history = optimizer(setup.training).init(params), History(last=setup.training.steps)
    if (found := checkpoints.restore((params, opt_state))) is not None:
        (params, opt_state), history = found[0], History(**found[1])
    loop = _Loop(setup, history)
    iterator = iter(setup.batches.to_iter_dataset(_READ))
    if history.data is not None:
        iterator.set_state(history.data)
    while len(history.losses) != history.last:
        params, opt_state = loop.step(params, opt_state, next(iterator))
        done, decided = len(history.losses), loop.decide()
        if done % every.log == 0:
            loop.log(every.log)
        if done % every.evaluate == 0 or done == history.last:
            loop.evaluate(params)
        observe(history)
        if decided or done % every.checkpoint == 0 or done == history.last:
            history.data = iterator.get_state()
            checkpoints.save(done, (params, opt_state), dataclasses.asdict(history))
            saved(history)
    if not history.evaluations:  # no step at all
        loop.evaluate(params)
    return params, history


class _Loop:
    """The parts of the loop, around one history."""

    def __init__(self, setup: Setup, history: History):
        self.setup, self.history = setup, history
        self.since = time.perf_counter()
        self.program = step_of(setup.training, setup.graph)
        self.evaluation = evaluation_of(setup.graph, setup.spans)

    def step(self, params, opt_state, batch) -> tuple:
        """One step; its loss is read at once, for the clock decides on what has been computed."""
        number = len(self.history.losses) + 1
        peak = np.float32(rate(self.setup.training, number, self.history.last))
        params, opt_state, loss = self.program(params, opt_state, batch, peak)
        if not math.isfinite(loss := float(loss)):
            raise FloatingPointError(
                f"the loss is {loss} at step {number}; try a lower --learning-rate, more "
                "--warmup-steps or a smaller --clip-norm"
            )
        self.history.losses.append(loss)
        self.tick()
        return params, opt_state

    def decide(self) -> bool:
        """Whether this is the step at which the clock decides which is the last."""
        history, share = self.history, 1 - 1 / COOLDOWN
        if history.last is not None or history.seconds < share * 60 * self.setup.training.minutes:
            return False
        history.last = math.ceil(len(history.losses) / share)
        return True

    def log(self, steps: int) -> None:
        """Keeps a line on the last `steps`."""
        done = len(self.history.losses)
        line = {
            "step": done,
            "loss": float(np.mean(self.history.losses[-steps:])),
            "tokens": done * self.setup.training.batch_size * self.setup.spans.length,
            "seconds": round(self.history.seconds, 1),
            "learning_rate": rate(self.setup.training, done, self.history.last),
        }
        self.history.log.append(line)

    def evaluate(self, params) -> None:
        """Measures the held-out rows."""
        sums = [self.evaluation(params, batch) for batch in self.setup.held_out]
        totals = {name: np.sum([s[name] for s in sums], axis=0, dtype=float) for name in sums[0]}
        scores = {name: float(total / count) for name, (total, count) in totals.items()}
        self.history.evaluations.append({"step": len(self.history.losses)} | scores)
        self.tick()

    def tick(self) -> None:
        """Books the time since the last call."""
        now = time.perf_counter()
        self.history.seconds += now - self.since
        self.since = now
