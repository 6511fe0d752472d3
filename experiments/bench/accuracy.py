"""Error of the equivalent gradient against the factors' condition number, by solver; and its time.

    python -m experiments.bench.accuracy [--seeds 5] [--rounds 20]

Random factors of condition number kappa, a random full gradient G, float32 factors and factor
gradients rounded from float64, (da, db) = lp.lorapro(2.0, solver=..., damping=...), and the
relative Frobenius error of s (da b + a db) against that of the exact solution at the same damping,
which float64 singular value decompositions give. The median over the seeds, and the largest.

On a CPU the precision flag does nothing: products are float32's. What a TPU or GPU would do
without the library's precision=HIGHEST is emulated by rounding both operands of every
`jnp.tensordot`, which all of its contractions are, to tf32's 10 or bf16's 7 bits, with sums in
float32. Eigenvalue and singular value decompositions stay float32's. The rows "float32" are the
library as it is.

Times are of one jitted update by turns, at damping 1e-6, in a file of their own.
"""

import contextlib
import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from rich.console import Console
from rich.table import Table

import lorapro_jax as lp
from experiments.bench import timing

SCALE = 2.0
SOLVERS = ("gram", "qr")
BITS = {"float32": 23, "tf32": 10, "bf16": 7}  # of the operands' mantissas


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    m: int = 256
    n: int = 192
    rank: int = 8
    seeds: int = 5
    rounds: int = 20  # of the timing; 0 for none
    dampings: tuple[float, ...] = (0.0, 1e-6)
    results: pathlib.Path = pathlib.Path("experiments/results/bench_accuracy.jsonl")


@contextlib.contextmanager
def operands(bits: int) -> Iterator[None]:
    """Within, products of all programs that are traced round their operands to `bits`."""
    exact = jnp.tensordot

    def rounded(x, y, *arguments, **options):
        x, y = (lax.reduce_precision(z, exponent_bits=8, mantissa_bits=bits) for z in (x, y))
        return exact(x, y, *arguments, **options)

    jnp.tensordot = rounded
    try:
        yield
    finally:
        jnp.tensordot = exact


def problem(settings: Settings, kappa: float, seed: int) -> tuple[np.ndarray, ...]:
    """a, b of singular values 1 to 1 / kappa, in float32's numbers, and G; all float64."""
    rng = np.random.default_rng(seed)
    values = np.geomspace(1, 1 / kappa, settings.rank)

    def factor(rows: int) -> np.ndarray:
        frame, turn = (
            np.linalg.qr(rng.normal(size=(k, settings.rank)))[0] for k in (rows, settings.rank)
        )
        return (frame * values @ turn).astype(np.float32).astype(np.float64)

    return factor(settings.m), factor(settings.n).T, rng.normal(size=(settings.m, settings.n))


def exact(a: np.ndarray, b: np.ndarray, G: np.ndarray, damping: float) -> np.ndarray:
    """g~ of the damped solution; at damping 0 the projection onto the tangent space."""
    A, p, _ = np.linalg.svd(a, full_matrices=False)
    _, q, B = np.linalg.svd(b, full_matrices=False)
    p, q = (p**2)[:, None], (q**2)[None, :]
    absolute = damping * max(p.sum(), q.sum()) / a.shape[1]
    rows, columns = A.T @ G, G @ B.T
    core = A.T @ columns
    left = p / (p + absolute) * (rows - core @ B)
    right = q / (q + absolute) * (columns - A @ core)
    return A @ left + right @ B + A @ ((p + q) / (p + q + absolute) * core) @ B


def updater(solver: str, damping: float) -> Callable:
    """The jitted projection of a tree of gradients at a tree of parameters."""
    tx = lp.lorapro(SCALE, solver=solver, damping=damping)
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])


def error(update: Callable, a: np.ndarray, b: np.ndarray, G: np.ndarray, damping: float) -> float:
    """Relative error of one problem's g~."""
    narrow = [jnp.asarray(x, jnp.float32) for x in (a, b, SCALE * G @ b.T, SCALE * a.T @ G)]
    params, grads = ({"q": {"lora_a": x, "lora_b": y}} for x, y in (narrow[:2], narrow[2:]))
    found = update(grads, params)["q"]
    da, db = (np.asarray(found[name], np.float64) for name in ("lora_a", "lora_b"))
    truth = exact(a, b, G, damping)
    return float(np.linalg.norm(SCALE * (da @ b + a @ db) - truth) / np.linalg.norm(truth))


def accuracy(settings: Settings) -> list[dict]:
    """One row per arithmetic, damping, solver and condition number."""
    rows = []
    for arithmetic, bits in BITS.items():
        with operands(bits):
            for damping in settings.dampings:
                for solver in SOLVERS:
                    update = updater(solver, damping)
                    for kappa in np.logspace(1, 6, 11):
                        errors = [
                            error(update, *problem(settings, kappa, seed), damping)
                            for seed in range(settings.seeds)
                        ]
                        rows.append({
                            "arithmetic": arithmetic, "damping": damping, "solver": solver,
                            "kappa": float(kappa), "error": statistics.median(errors),
                            "largest_error": max(errors),
                        })  # fmt: skip
    return rows


def show(rows: list[dict]) -> None:
    """Errors by condition number, a column for each arithmetic, damping and solver."""
    columns = list(dict.fromkeys((r["arithmetic"], r["damping"], r["solver"]) for r in rows))
    table = Table("kappa", *(f"{x}\n{y:g}\n{z}" for x, y, z in columns), title="error of g~")
    by_cell = {(r["kappa"], r["arithmetic"], r["damping"], r["solver"]): r["error"] for r in rows}
    for kappa in dict.fromkeys(r["kappa"] for r in rows):
        table.add_row(f"{kappa:.0e}", *(f"{by_cell[kappa, *column]:.1e}" for column in columns))
    Console(width=200).print(table)


def times(settings: Settings, m: int, n: int, rank: int, pairs: int) -> list[dict]:
    """Seconds of one update of so many pairs, by solver."""
    rng = np.random.default_rng(0)

    def tree() -> dict:
        return {
            f"layer_{i}": {
                "lora_a": jnp.asarray(rng.normal(size=(m, rank)), jnp.float32),
                "lora_b": jnp.asarray(rng.normal(size=(rank, n)), jnp.float32),
            }
            for i in range(pairs)
        }

    params, grads = tree(), tree()

    def call(update: Callable) -> Callable:
        return lambda: jax.block_until_ready(update(grads, params))

    calls = {solver: call(updater(solver, 1e-6)) for solver in SOLVERS}
    rows = timing.summary(timing.by_turns(calls, settings.rounds), "gram")
    return [{"m": m, "n": n, "rank": rank, "pairs": pairs, **row} for row in rows]


def main(settings: Settings) -> None:
    """Measures, shows, and appends one JSON line per row."""
    rows = accuracy(settings)
    show(rows)
    timing.append(rows, "accuracy", settings, settings.results)
    if settings.rounds:
        rows = times(settings, 768, 768, 8, 48) + times(settings, 4096, 4096, 64, 8)
        timing.show(rows, "one update")
        path = settings.results.with_name("bench_solver_time.jsonl")
        timing.append(rows, "solver_time", settings, path)


if __name__ == "__main__":
    main(tyro.cli(Settings))
