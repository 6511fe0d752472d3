"""Factored mode's choices, each against its alternative, in real fine-tuning runs.

    python -m experiments.bench.choices --task sst2 --data-dir DIR --rates 3e-5 3e-4 3e-3

`Draft` is factored mode once more, with (m, n) arrays and a switch for every choice that the
library has made; the library's own solve is all it shares. `reference` is the library's choice.
The others differ from it in one thing:

    adam norm   the step taken is nearest to Adam's in ||D_l^-½ X D_r^-½||, not in ||X||
    no carry    the momentum's shares of a and b stay as they are when the factors move
    clip        Adam's step is scaled down where its root mean square is above 1, as Adafactor's
    svd         the best matrix of rank r after the step, which rotates the factors
    no fit      both factors take their own steps; the product of the two is added
    no radius   nothing bounds the step

and these two from `no fit`, since the library fits after x="sequential" only:

    min-norm    x="sylvester": both factors move, by as little as they can
    symmetric   x="symmetric": both move, each with half of the shared core

`library factored` and `library full` are lorapro_adamw's modes: the first validates the draft.
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import lorapro_jax as lp
from experiments import config, methods, prepare, train
from experiments.bench import tables, timing
from experiments.checkpoint import Checkpoints
from experiments.config import Command, RunConfig
from experiments.provenance import provenance

B1, B2, EPS, DAMPING = 0.9, 0.999, 1e-8, 1e-6  # the library's defaults
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Moments(NamedTuple):
    """The state of one pair."""

    n_a: Any  # (m, r); the momentum is s (n_a b + a n_b), with the a and b below
    n_b: Any  # (r, n)
    row: Any  # (m,) row means of g~²
    col: Any  # (n,) column means
    a: Any  # (m, r), the factors of the last step
    b: Any  # (r, n)


@dataclasses.dataclass(frozen=True)
class Draft:
    """Factored mode for one pair, with its choices open."""

    norm: Literal["frobenius", "adam"] = "frobenius"
    carry: bool = True
    clip: bool = False
    x: str = "sequential"
    retraction: Literal["fit", "svd", "none"] = "fit"
    radius: float | None = 0.05

    def init(self, a, b) -> Moments:
        """No momentum, no means."""
        zero_a, zero_b = jnp.zeros_like(a), jnp.zeros_like(b)
        return Moments(zero_a, zero_b, zero_a[:, 0], zero_b[0], a, b)

    def solve(self, a, b, h_a, h_b, s):
        """(da, db) for the gradients of the factors."""
        tx = lp.lorapro(s, x=self.x, damping=DAMPING)
        slopes, factors = {"lora_a": h_a, "lora_b": h_b}, {"lora_a": a, "lora_b": b}
        found, _ = tx.update(slopes, optax.EmptyState(), factors)
        return found["lora_a"], found["lora_b"]

    def project(self, a, b, X, s):
        """(da, db) of the tangent vector s (da b + a db) nearest to X (m, n)."""
        return self.solve(a, b, s * matmul(X, b.T), s * matmul(a.T, X), s)

    def update(self, a, b, h_a, h_b, old: Moments, *, s, t, rate):
        """What step t, from 1, adds to (a, b), and the new state."""
        da, db = self.solve(a, b, h_a, h_b, s)
        squares = (s * tangent(a, b, da, db)) ** 2
        row = B2 * old.row + (1 - B2) * jnp.mean(squares, axis=1)
        col = B2 * old.col + (1 - B2) * jnp.mean(squares, axis=0)
        n_a, n_b = old.n_a, old.n_b
        if self.carry:
            n_a, n_b = self.project(a, b, s * tangent(old.a, old.b, n_a, n_b), s)
        n_a, n_b = B1 * n_a + (1 - B1) * da, B1 * n_b + (1 - B1) * db
        R, C = (x / (1 - B2**t) + EPS**2 for x in (row, col))
        D_l, D_r = jnp.sqrt(jnp.mean(R) / R)[:, None], 1 / jnp.sqrt(C)[None]
        U = D_l * s * tangent(a, b, n_a, n_b) * D_r / (1 - B1**t)
        step = self.step(a, b, *self.direction(a, b, U, D_l, D_r, s), rate)
        return step, Moments(n_a, n_b, row, col, a, b)

    def direction(self, a, b, U, D_l, D_r, s):
        """(da, db) of the tangent vector nearest to Adam's step U."""
        if self.clip:
            U = U / jnp.maximum(1.0, jnp.sqrt(jnp.mean(U * U)))
        if self.norm == "frobenius":
            return self.project(a, b, U, s)
        root_l, root_r = jnp.sqrt(D_l), jnp.sqrt(D_r)
        da, db = self.project(a / root_l, b / root_r, U / root_l / root_r, s)
        return da * root_l, db * root_r

    def step(self, a, b, da, db, rate):
        """What is added to (a, b) for the direction (da, db)."""
        size = jnp.maximum(jnp.sum(a * a), jnp.sum(b * b)) / len(b)
        if self.radius is not None:
            norm = jnp.linalg.norm(tangent(a, b, da, db)) + jnp.finfo(a.dtype).tiny
            rate = jnp.minimum(rate, self.radius * size / norm)
        da, db = -rate * da, -rate * db
        if self.retraction == "svd":
            return best_of_rank(a, b, da, db)
        return fitted(a, b, da, db, DAMPING * size) if self.retraction == "fit" else (da, db)


def tangent(a, b, da, db):
    """The change da b + a db of the product."""
    return matmul(da, b) + matmul(a, db)


def fitted(a, b, da, db, ridge):
    """The step of the larger factor's partner, and the larger one's as fits its new value."""
    eye = ridge * jnp.eye(len(b), dtype=b.dtype)

    def fit(old, new):
        """(old newᵀ + ridge)(new newᵀ + ridge)⁻¹ of two (r, n)."""
        values, vectors = jnp.linalg.eigh(matmul(new, new.T))
        inverse = matmul(vectors / (jnp.maximum(values, 0) + ridge)[None], vectors.T)
        return matmul(matmul(old, new.T) + eye, inverse)

    b_first = jnp.sum(a * a) >= jnp.sum(b * b)
    return (
        jnp.where(b_first, matmul(da, fit(b, b + db)), da),
        jnp.where(b_first, db, matmul(fit(a.T, (a + da).T).T, db)),
    )


def best_of_rank(a, b, da, db):
    """The step to the best approximation of rank r to a b + da b + a db.

    Its singular values go to b, and a keeps its norm: halves of them on either side would make a as
    small as b is in the beginning, and the radius with it, which is in units of the larger one.
    """
    X = matmul(a + da, b) + matmul(a, db)
    frame, _ = jnp.linalg.qr(jnp.concatenate([a, da], axis=1))  # of X's columns
    inside = matmul(frame.T, X)
    # The left singular vectors; where X = 0, the first ones of the frame, which span what a does.
    _, vectors = jnp.linalg.eigh(-matmul(inside, inside.T))
    left = matmul(frame, vectors[:, : len(b)])
    size = jnp.linalg.norm(a) / len(b) ** 0.5
    return size * left - a, matmul(left.T, X) / size - b


def optimizer(choice: Draft, rate: optax.Schedule, scale: float) -> optax.GradientTransformation:
    """The draft as an optax transformation, for pairs of two matrices `lora_a` and `lora_b`."""

    def init(params):
        states = [jax.vmap(choice.init)(a, b) for _, a, b in stacked(params)]
        return jnp.zeros((), jnp.int32), states

    def update(updates, state, params=None):
        count, states = state
        one = functools.partial(choice.update, s=scale, t=count + 1, rate=rate(count))
        steps, fresh = {}, []
        for (names, a, b), (_, h_a, h_b), old in zip(
            stacked(params), stacked(updates), states, strict=True
        ):
            # Not vmap: jaxlib's batched QR can hang on a CPU of few cores.
            added, new = jax.lax.map(lambda pair: one(*pair), (a, b, h_a, h_b, old))
            fresh.append(new)
            for i, pair in enumerate(names):
                steps |= {name: x[i] for name, x in zip(pair, added, strict=True)}
        taken = jax.tree.map_with_path(lambda path, h: steps[named(path)].astype(h.dtype), updates)
        return taken, (count + 1, fresh)

    return optax.GradientTransformation(init, update)


def named(path: tuple) -> str:
    """q/lora_a."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def stacked(tree: Any) -> list[tuple]:
    """(names of the pairs, (pairs, m, r), (pairs, r, n)) for all pairs of one shape."""
    leaves = {named(path): x for path, x in jax.tree.leaves_with_path(tree)}
    alike: dict[Any, list[tuple[str, str]]] = {}
    for name, a in leaves.items():
        if name.endswith("lora_a"):
            partner = name.removesuffix("lora_a") + "lora_b"
            alike.setdefault((a.shape, leaves[partner].shape), []).append((name, partner))

    def column(pairs, place: int):
        return jnp.stack([leaves[pair[place]] for pair in pairs])

    return [(pairs, column(pairs, 0), column(pairs, 1)) for pairs in alike.values()]


DRAFTS = {
    "reference": Draft(),
    "adam norm": Draft(norm="adam"),
    "no carry": Draft(carry=False),
    "clip": Draft(clip=True),
    "svd": Draft(retraction="svd"),
    "no fit": Draft(retraction="none"),
    "no radius": Draft(radius=None),
    "min-norm": Draft(x="sylvester", retraction="none"),
    "symmetric": Draft(x="symmetric", retraction="none"),
}
LIBRARY = {"library factored": "lorapro-factored", "library full": "lorapro-full"}
VARIANTS = LIBRARY | {name: f"draft-{name}" for name in DRAFTS}  # names of methods


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    task: str = "pydoc"
    data_dir: pathlib.Path | None = None
    """Of tensorflow-datasets, for a GLUE task."""
    model: str = "minilm"
    rates: tuple[float, ...] = (3e-5, 3e-4, 3e-3)
    seeds: tuple[int, ...] = (0,)
    variants: tuple[str, ...] = tuple(VARIANTS)
    train_examples: int = 2400
    eval_examples: int = 0
    """0: all."""
    epochs: int = 1
    batch_size: int = 32
    max_length: int = 64
    results: pathlib.Path = pathlib.Path("experiments/results/bench_choices.jsonl")


@contextlib.contextmanager
def drafts_as_methods() -> Iterator[None]:
    """The drafts are among experiments.methods inside the block: runs know methods by name."""

    def method(choice: Draft) -> methods.Method:
        return methods.Method(True, lambda run, rate: optimizer(choice, rate, run.scale))

    added = {VARIANTS[name]: method(choice) for name, choice in DRAFTS.items()}
    methods.METHODS.update(added)
    try:
        yield
    finally:
        for name in added:
            del methods.METHODS[name]


def runs(variant: str, settings: Settings) -> list[RunConfig]:
    """A variant's runs, seed by seed: a seed has its own training examples."""
    method = VARIANTS[config.one_of("variant", variant, VARIANTS)]
    own = ("variants", "rates", "data_dir", "results")
    shared = {k: v for k, v in vars(settings).items() if k not in own}
    made = config.runs(Command(methods=(method,), learning_rates=settings.rates, **shared))
    return sorted(made, key=lambda run: run.seed)


def result(run: RunConfig, data_dir: pathlib.Path | None) -> dict:
    """What a run showed; None where a loss was not finite."""
    loaded = prepare.load_data(run, None if data_dir is None else str(data_dir))
    setup, params = prepare.build(run, loaded)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        saved = Checkpoints(pathlib.Path(folder))
        held.callback(saved.close)
        try:
            _, history = train.train(setup, params, saved, train.Rhythm())
        except train.DivergedError as error:
            scores = dict.fromkeys(("mean_loss", "largest_loss", "accuracy", "validation_loss"))
            return scores | {"steps": len(error.history.losses)}
    last = history.evaluations[-1]
    return {
        "mean_loss": float(np.mean(history.losses)),
        "largest_loss": max(history.losses),
        "accuracy": last["accuracy"],
        "validation_loss": last["loss"],
        "steps": len(history.losses),
    }


def main(settings: Settings) -> None:
    """Runs, appends one JSON line per run as each variant ends, and shows all."""
    planned = {variant: runs(variant, settings) for variant in settings.variants}
    born, rows = provenance(), []  # of the whole command: its lines are one measurement
    with drafts_as_methods():
        for variant, own in planned.items():
            found = []
            for run in own:
                about = {"variant": variant, "rate": run.learning_rate, "seed": run.seed}
                found.append(about | result(run, settings.data_dir))
                print(found[-1], flush=True)
            timing.append(found, "choices", settings, settings.results, born)
            rows += found
    names, cells = tables.by_rate(rows)
    made = [dict(zip(names, row, strict=True)) for row in cells]
    about = f"{settings.task}, {settings.model}, n={len(settings.seeds)}"
    timing.show(made, f"mean training loss and accuracy: {about}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
