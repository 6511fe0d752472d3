"""One run's training loop: a compiled, donated step over checkpointable batches.

The host runs a few steps ahead of the device and reads each loss when it is due, so that neither
waits for the other; what is shown and checked is always a loss that has been computed. The random
key of a step is made from (seed, step), so a resumed run repeats what an unbroken one does; so
does the replay up to a step that went wrong.
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
import numpy as np
from flax import nnx

from experiments.finetune.checkpoint import Checkpoints
from experiments.finetune.devices import ONE, Devices
from experiments.finetune.evaluate import metrics, predict
from experiments.finetune.language import Questions
from experiments.finetune.programs import Compiled, Metrics, Programs, Varied

PROFILE = "profile"  # folder of the traces
AHEAD = 2  # steps dispatched before the oldest loss is read
# Batches are cheap to make; more threads would take cores from a CPU run.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class Setup(NamedTuple):
    """What the loop needs, all of it made anew from the configuration at a resumption."""

    programs: Programs  # shared with the runs that differ in rates and seed only
    varied: Varied  # the run's own rates and key
    frozen: nnx.State  # what no step changes
    batches: grain.MapDataset  # batches[step]
    evaluation: grain.MapDataset
    epochs: int
    devices: Devices = ONE
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]] = metrics  # of outputs and labels
    questions: Questions | None = None  # that a language model answers at every evaluation


class DivergedError(FloatingPointError):
    """A loss, or the norm of a gradient, is NaN or infinite."""

    def __init__(self, what: str, step: int, before: int, history: "History"):
        super().__init__(what)
        self.step = step  # from 1
        self.before = before  # steps after which the parameters stood that showed it
        self.history = history  # of the steps before


class PreemptedError(Exception):
    """The run was told to end, and has saved where it stands."""


class Rhythm(NamedTuple):
    """When the loop does what, in steps; 0 is never."""

    checkpoint_every: int = 0  # beside the last step
    evaluate_every: int = 0  # beside the end of every epoch
    diagnose_every: int = 0
    profile_steps: tuple[int, int] | None = None  # the first and the last that are traced
    last: int | None = None  # the step to end with; None: the run's last


@dataclasses.dataclass
class History:
    """What a run has measured so far; goes into every checkpoint."""

    losses: list[float] = dataclasses.field(default_factory=list)  # of every step
    gradient_norms: list[float] = dataclasses.field(default_factory=list)  # of every step
    evaluations: list[dict] = dataclasses.field(default_factory=list)
    diagnostics: list[dict] = dataclasses.field(default_factory=list)
    answers: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # "before" and "after"
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by activity
    step_memory_bytes: int = 0  # of the largest compiled step
    data: dict | None = None  # the state of the iterator over the batches

    def add_step(self, loss: float, norm: float, steps: int) -> None:
        """Adds what the next of all `steps` measured; a DivergedError if it is not finite."""
        number = len(self.losses) + 1
        self._check("the training loss", loss, number, number - 1, steps)
        self._check("the norm of the gradient", norm, number, number - 1, steps)
        self.losses.append(loss)
        self.gradient_norms.append(norm)

    def add_evaluation(self, done: int, scores: dict[str, float], steps: int) -> None:
        """Adds the scores after `done` of all `steps`; a DivergedError if the loss is NaN or so."""
        self._check("the validation loss", scores["loss"], done, done, steps)
        self.evaluations.append({"step": done} | scores)

    def _check(self, what: str, value: float, number: int, before: int, steps: int) -> None:
        if not math.isfinite(value):
            where = f"at step {number} of {steps}"
            raise DivergedError(f"{what} is {value} {where}", number, before, self)


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
    rhythm: Rhythm,
    *,
    observe: Callable[[History], None] = lambda history: None,
    told_to_end: Callable[[int], bool] = lambda step: False,
) -> tuple[nnx.State, History]:
    """Trains from the last checkpoint, if there is one, to the end; the last step is saved too.

    The initial `params` are donated. `observe` is called whenever something has been measured,
    `told_to_end` after every step, with its number. Traces go beside the checkpoints. Ends in a
    DivergedError, or a PreemptedError if it was told to end.
    """
    params = setup.devices.place(params)
    arrays, history = (params, setup.programs.init(params)), History()
    if (found := checkpoints.restore(arrays)) is not None:
        arrays, history = found[0], History(**found[1])
    loop, iterator = _Loop(setup, history, observe), iter(setup.batches.to_iter_dataset(_READ))
    if history.data is not None:
        iterator.set_state(history.data)
    total, start = len(setup.batches), len(history.losses)
    last = total if rhythm.last is None else rhythm.last
    observe(history)  # what a log holds beyond the checkpoint is void
    if setup.questions is not None and not history.evaluations and last:
        loop.evaluate(arrays[0], 0)
    with contextlib.ExitStack() as tracing:
        for done in range(start + 1, last + 1):
            batch = setup.devices.shard(next(iterator))
            if setup.programs.diagnosis is not None and _due(done, rhythm.diagnose_every):
                loop.diagnose(arrays, batch, done)
            first, final = rhythm.profile_steps or (0, 0)
            if done == max(first, start + 1) <= final:
                loop.read(0)
                tracing.enter_context(jax.profiler.trace(str(checkpoints.path.parent / PROFILE)))
            arrays = loop.step(arrays, batch, done)
            if done == final:
                loop.read(0)
                tracing.close()
            if _due(done, total // setup.epochs) or _due(done, rhythm.evaluate_every):
                loop.evaluate(arrays[0], done)
            ending = done < last and told_to_end(done)
            if done == last or ending or _due(done, rhythm.checkpoint_every):
                history.data = iterator.get_state()
                loop.save(checkpoints, done, arrays)
            if ending:
                checkpoints.wait()
                where = f"step {done} of {total}, of which there is a checkpoint"
                raise PreemptedError(f"stopped after {where}")
    if last == 0:  # a replay that ends before the first step
        loop.save(checkpoints, 0, arrays)
    return arrays[0], history


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


class _Loop:
    """The parts of the loop, around one history and one queue of losses yet to be read."""

    def __init__(self, setup: Setup, history: History, observe: Callable[[History], None]):
        self.setup, self.history, self.observe = setup, history, observe
        self.programs = setup.programs
        self.pending: collections.deque[Metrics] = collections.deque()
        history.seconds.setdefault("compile", 0.0)  # an earlier run may have made every program
        self.clock = Clock(history.seconds, "train")

    def call(self, compiled: Compiled, batch, args: tuple) -> Any:
        """Dispatches the program for batches as long as this one, compiled if none has been."""
        length = batch["tokens"].shape[1]
        if length not in compiled:
            self.read(0)  # so that compilation is not timed together with steps under way
            with self.clock.on("compile"):
                compiled.compile(length, args)
        if compiled is self.programs.step:
            held = max(self.history.step_memory_bytes, compiled.memory_bytes(length))
            self.history.step_memory_bytes = held
        return compiled[length](*args)

    def step(self, arrays: tuple, batch, done: int) -> tuple:
        """Dispatches one step and reads the losses that are due."""
        *arrays, measured = self.call(self.programs.step, batch, self._args(arrays, batch, done))
        self.pending.append(measured)
        self.read(AHEAD)
        return tuple(arrays)

    def _args(self, arrays: tuple, batch, done: int) -> tuple:
        """What the step and its diagnosis take."""
        return *arrays, self.setup.frozen, batch, np.int32(done - 1), self.setup.varied

    def read(self, leave: int) -> None:
        """Reads all but the last `leave` losses, and stops the run at one that is not finite."""
        while len(self.pending) > leave:
            loss, norm = map(float, self.pending.popleft())
            self.clock.tick()
            self.history.add_step(loss, norm, len(self.setup.batches))
            self.observe(self.history)

    def evaluate(self, params, done: int) -> None:
        """Measures the validation split, and has the questions answered."""
        self.read(0)
        setup = self.setup
        with self.clock.on("evaluate"):
            outputs, labels = predict(
                lambda x: self.call(self.programs.outputs, x, (params, setup.frozen, x)),
                map(setup.devices.shard, setup.evaluation),
                setup.devices.gather,
            )
            scores = setup.scores(outputs, labels)
        if setup.questions is not None:
            with self.clock.on("answer"):
                answers = setup.questions.answers(lambda batch: self.decode(params, batch))
            self.history.answers["after" if done else "before"] = answers
            scores |= setup.questions.scores(answers)
        self.history.add_evaluation(done, scores, len(setup.batches))
        self.observe(self.history)

    def decode(self, params, batch: dict[str, np.ndarray]) -> np.ndarray:
        """The answers' tokens, of all processes' rows."""
        batch = self.setup.devices.shard(batch)
        answers = self.call(self.programs.answers, batch, (params, self.setup.frozen, batch))
        return self.setup.devices.gather(answers)

    def diagnose(self, arrays: tuple, batch, done: int) -> None:
        """Measures how close the step that is about to be made is to full fine-tuning's."""
        self.read(0)
        with self.clock.on("diagnose"):
            args = self._args(arrays, batch, done)
            found = self.call(self.programs.diagnosis, batch, args)
            figures = {name: float(x) for name, x in found.items()}
            self.history.diagnostics.append({"step": done} | figures)
        self.observe(self.history)

    def save(self, checkpoints: Checkpoints, done: int, arrays: tuple) -> None:
        """Saves a checkpoint, unless a loss before it is not finite."""
        self.read(0)
        with self.clock.on("checkpoint"):
            checkpoints.save(done, arrays, dataclasses.asdict(self.history))
