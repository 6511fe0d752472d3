"""Runs that differ in rates and seed only, trained at once: one vmapped step for all R of them.

A step of a small model is hundreds of kernels that each fill a small part of a GPU; the kernels of
R runs are as many, and fill it. Everything of a run has an axis for the runs in front:

    parameters, optimizer state    (R, ...)
    frozen                         once if it is equal in all runs (a pretrained base), or (R, ...)
    batches of K steps             (K, S, B, T) of S seeds: runs of one seed read the same

The steps are those of `experiments.finetune.programs`, and what they measure is what
`experiments.finetune.train` measures, up to rounding: a batch is padded to the longest that a seed
has at that step, and the padding is masked. Only dropout is drawn anew, if that made a batch
longer. K steps at most are sent to the device at once, as a loop of those that are equally long.

A run that diverges goes on as NaNs, which its neighbours do not see; its record ends there.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.finetune.config import RunConfig
from experiments.finetune.devices import ONE
from experiments.finetune.evaluate import predict
from experiments.finetune.programs import Compiled, Metrics, Programs, Varied, varied_of
from experiments.finetune.train import AHEAD, Clock, DivergedError, History, Setup

STEPS = 16  # sent at once, at most: of 30 ms each, half a second for the host to make the next


class Frozen(NamedTuple):
    """What no step changes, by the number of the leaf."""

    shared: dict[int, jax.Array]  # equal in all runs
    own: dict[int, jax.Array]  # (R, ...)


class Group(NamedTuple):
    """What the loop needs of runs that are trained together."""

    programs: "Vmapped"
    setups: list[Setup]  # of every seed, without what is frozen
    of_run: np.ndarray  # (R,) the place of a run's seed among the setups
    frozen: Frozen
    varied: Varied  # (R, ...)


class Vmapped:
    """The programs of one method for a number of runs.

    steps(params, opt_state, frozen, batches, of_run, first, count, varied)
        -> (params, opt_state, metrics (K, R)), donated: `count` of K steps, from number `first` on
    outputs(params, frozen, batch) -> (B, R, C)
    """

    def __init__(self, single: Programs, structure: Any, shape: tuple):
        del shape  # tells groups of one method apart that need programs of their own
        axes = Frozen(None, 0)  # type: ignore[arg-type]

        def whole(frozen: Frozen) -> nnx.State:
            leaves = frozen.shared | frozen.own
            return structure.unflatten([leaves[number] for number in range(len(leaves))])

        @functools.partial(jax.vmap, in_axes=(0, 0, axes, 0, None, 0))
        def step(params, opt_state, frozen, *rest):
            return single.step.jitted(params, opt_state, whole(frozen), *rest)

        @functools.partial(jax.vmap, in_axes=(0, axes, None), out_axes=1)
        def outputs(params, frozen, batch):
            return single.outputs.jitted(params, whole(frozen), batch)

        self.steps = Compiled(jax.jit(_repeated(step), donate_argnums=(0, 1)), ONE)
        self.outputs = Compiled(jax.jit(outputs), ONE)
        self.init = jax.jit(jax.vmap(single.init))


def _repeated(step: Callable) -> Callable:
    """`count` steps in a loop, so that stretches of all lengths up to K are one program."""

    def steps(params, opt_state, frozen, batches, of_run, first, count, varied):
        def one(i, carry):
            params, opt_state, measured = carry
            batch = {name: x_KSB[i][of_run] for name, x_KSB in batches.items()}
            params, opt_state, new = step(params, opt_state, frozen, batch, first + i, varied)
            measured = jax.tree.map(lambda x_KR, x_R: x_KR.at[i].set(x_R), measured, new)
            return params, opt_state, measured

        room = len(batches["weights"]), len(of_run)
        measured = Metrics(jnp.zeros(room, jnp.float32), jnp.zeros(room, jnp.float32))
        return jax.lax.fori_loop(0, count, one, (params, opt_state, measured))

    return steps


_vmapped = functools.lru_cache(maxsize=1)(Vmapped)  # the group before may have been alike


def join(
    runs: Sequence[RunConfig], seeds: Sequence[int], built: Sequence[tuple[Setup, nnx.State]]
) -> tuple[Group, nnx.State]:
    """The runs' group and initial parameters (R, ...), from what `build` made of each seed."""
    setups, params = zip(*built, strict=True)
    of_run = np.array([seeds.index(run.seed) for run in runs], np.int32)
    frozen = _frozen([setup.frozen for setup in setups], of_run)
    structure = jax.tree.structure(setups[0].frozen)
    shape = len(runs), len(seeds), tuple(frozen.own)
    group = Group(
        _vmapped(setups[0].programs, structure, shape),
        [setup._replace(frozen=None) for setup in setups],
        of_run,
        frozen,
        jax.tree.map(lambda *x: np.stack(x), *map(varied_of, runs)),
    )
    return group, jax.tree.map(lambda *leaves: _by_run(leaves, of_run), *params)


def _frozen(of_seeds: Sequence[nnx.State], of_run: np.ndarray) -> Frozen:
    frozen = Frozen({}, {})
    for number, leaves in enumerate(zip(*map(jax.tree.leaves, of_seeds), strict=True)):
        if all(bool(jnp.all(leaves[0] == leaf)) for leaf in leaves[1:]):
            frozen.shared[number] = leaves[0]
        else:
            frozen.own[number] = _by_run(leaves, of_run)
    return frozen


def _by_run(leaves: Sequence[jax.Array], of_run: np.ndarray) -> jax.Array:
    return jnp.stack([leaves[place] for place in of_run])


def train(
    group: Group, params: nnx.State, observe: Callable[[History], None]
) -> list[tuple[History, DivergedError | None]]:
    """Trains all runs to their end, with an evaluation after every epoch; what became of each.

    The initial `params` (R, ...) are donated. `observe` is called whenever something has been
    measured, with the history of the first run that has not diverged. The seconds of a history are
    those of all runs together, up to the run's end.
    """
    opt_state = jax.block_until_ready(group.programs.init(params))
    loop = _Loop(group, observe)
    for first, stretch in _stretches(group.setups, STEPS):
        params, opt_state = loop.dispatch(params, opt_state, stretch, first)
        if (done := first + len(stretch)) % loop.per_epoch == 0:
            loop.evaluate(params, done)
    loop.read(0)
    return [(history, loop.diverged.get(n)) for n, history in enumerate(loop.histories)]


def _stretches(setups: Sequence[Setup], most: int) -> Iterator[tuple[int, list[list[dict]]]]:
    """(first step, batches [step][seed]) of steps that are equally long, and of one epoch."""
    total = len(setups[0].batches)
    per_epoch = total // setups[0].epochs
    for epoch, start in itertools.product(range(0, total, per_epoch), range(0, per_epoch, most)):
        numbers = range(epoch + start, epoch + min(start + most, per_epoch))
        # Seed by seed, for a seed's order of an epoch is kept for a few seeds only.
        by_seed = [[setup.batches[number] for number in numbers] for setup in setups]
        first = numbers.start
        for _, steps in itertools.groupby(zip(*by_seed, strict=True), key=_length):
            stretch = list(map(list, steps))
            yield first, stretch
            first += len(stretch)


def _length(step: Sequence[dict[str, np.ndarray]]) -> int:
    return max(batch["tokens"].shape[-1] for batch in step)


def _stacked(stretch: list[list[dict]], room: int) -> dict[str, np.ndarray]:
    """The batches of a stretch as arrays (K, S, B) or (K, S, B, T); what they leave is masked."""
    length, stacked = _length(stretch[0]), {}
    for name, x in stretch[0][0].items():
        shape = (len(x), length) if x.ndim == 2 else x.shape
        stacked[name] = np.zeros((room, len(stretch[0]), *shape), x.dtype)
    for i, step in enumerate(stretch):
        for seed, batch in enumerate(step):
            for name, x in batch.items():
                stacked[name][(i, seed, *map(slice, x.shape))] = x
    return stacked


class _Loop:
    """The parts of the loop, around the runs' histories and one queue of losses yet to be read."""

    def __init__(self, group: Group, observe: Callable[[History], None]):
        self.group, self.observe = group, observe
        self.total = len(group.setups[0].batches)
        self.per_epoch = self.total // group.setups[0].epochs
        self.histories = [History() for _ in group.of_run]
        self.diverged: dict[int, DivergedError] = {}
        self.pending: collections.deque[tuple[int, Metrics]] = collections.deque()
        self.memory = 0  # bytes of the largest program of steps
        self.clock = Clock({"compile": 0.0}, "train")

    def program(self, compiled: Compiled, length: int, args: tuple) -> Any:
        """The program for batches of this length, compiled if no group has needed it yet."""
        if length not in compiled:
            self.read(0)  # so that compilation is not timed together with steps under way
            with self.clock.on("compile"):
                compiled.compile(length, args)
        return compiled[length]

    def dispatch(self, params, opt_state, stretch: list[list[dict]], first: int) -> tuple:
        """Dispatches a stretch of steps and reads the losses that are due."""
        group, steps, length = self.group, self.group.programs.steps, _length(stretch[0])
        numbers = np.int32(first), np.int32(len(stretch))
        batches = _stacked(stretch, STEPS)
        args = (params, opt_state, group.frozen, batches, group.of_run, *numbers, group.varied)
        params, opt_state, measured = self.program(steps, length, args)(*args)
        self.memory = max(self.memory, steps.memory_bytes(length))
        self.pending.append((len(stretch), measured))
        self.read(AHEAD)
        return params, opt_state

    def read(self, leave: int) -> None:
        """Reads the losses of all but the last `leave` stretches."""
        while len(self.pending) > leave:
            count, measured = self.pending.popleft()
            losses_KR, norms_KR = (np.asarray(x)[:count].tolist() for x in measured)
            self.clock.tick()
            for losses_R, norms_R in zip(losses_KR, norms_KR, strict=True):
                self.record(lambda n, h: h.add_step(losses_R[n], norms_R[n], self.total))  # noqa: B023

    def record(self, add: Callable[[int, History], None]) -> None:
        """Lets `add` (a run's number, its history) of every run; it ends a run if it diverged."""
        for number, history in enumerate(self.histories):
            if number not in self.diverged:
                history.seconds = dict(self.clock.seconds)
                history.step_memory_bytes = self.memory
                try:
                    add(number, history)
                except DivergedError as error:
                    self.diverged[number] = error
        if left := [h for n, h in enumerate(self.histories) if n not in self.diverged]:
            self.observe(left[0])

    def evaluate(self, params, done: int) -> None:
        """Measures the validation split, the same for every run."""
        self.read(0)

        def outputs(batch) -> jax.Array:
            args = (params, self.group.frozen, batch)
            return self.program(self.group.programs.outputs, _length([batch]), args)(*args)

        with self.clock.on("evaluate"):
            setup = self.group.setups[0]
            outputs_NRC, labels = predict(outputs, setup.evaluation)
            scores = [
                setup.scores(outputs_NRC[:, n], labels) if n not in self.diverged else {}
                for n in range(len(self.histories))
            ]
        self.record(lambda n, history: history.add_evaluation(done, scores[n], self.total))
