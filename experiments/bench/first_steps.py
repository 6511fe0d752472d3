"""The steps right after a badly conditioned start, on a problem whose answer is known.

    python -m experiments.bench.first_steps

loss = ||s a b - T||² / 2 with T (192, 160) of rank 2 r plus noise of a tenth of its norm, s = 2,
||T|| = 1, float32. a is kaiming-uniform as in the library's init, b the same times 0, 1e-5, 1e-3 or
0.1. The gradient of the weight is s a b - T, well conditioned: whatever rises is the optimizer's
doing.

`default` is lorapro_adamw as it comes; `undamped` has x="sylvester", radius=None and damping=1e-6,
which is the paper's closed form and both factors' steps added. `dense` is optax.adam on the (m, n)
weight: where it rises, the rate is too high for full fine-tuning, too. `projection` is lp.lorapro
with SGD, whose only protection is `damping`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import lorapro_jax as lp
from experiments.bench import timing

SCALE = 2.0
M, N = 192, 160
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SGD_RATES = (1e-2, 1e-1, 1.0)  # of dense SGD 1 is Newton's step and 2 the limit
DAMPINGS = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)
UNDAMPED = {"x": "sylvester", "radius": None, "damping": 1e-6}
FORMS = {"default": {}, "undamped": UNDAMPED}
MODES = ("full", "factored", "efficient")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    ranks: tuple[int, ...] = (4, 16, 64, 128)
    sizes: tuple[float, ...] = (0.0, 1e-5, 1e-3, 1e-1)
    """Of b relative to a."""
    steps: int = 100
    first: int = 30
    """Steps whose losses are kept, and which monotony is asked of."""
    seed: int = 0
    results: pathlib.Path = pathlib.Path("experiments/results/bench_first_steps.jsonl")
    plot: pathlib.Path = pathlib.Path("experiments/results/first_steps.png")


def start(rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a (m, r) and b (r, n) of one size, and the target T (m, n) of norm 1."""
    rng = np.random.default_rng(seed)
    bound = M**-0.5
    a, b = (rng.uniform(-bound, bound, shape) for shape in ((M, rank), (rank, N)))
    T = rng.normal(size=(M, 2 * rank)) @ rng.normal(size=(2 * rank, N))
    noise = rng.normal(size=(M, N))
    T = T / np.linalg.norm(T) + 0.1 * noise / np.linalg.norm(noise)
    return a, b, T / np.linalg.norm(T)


def run(tx: optax.GradientTransformation, params: Any, weight: Callable, T: Any, steps: int) -> Any:
    """Losses before each step and after the last one: (steps + 1,)."""

    def loss(params):
        return jnp.sum((weight(params) - T) ** 2) / 2

    def step(carry, _):
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params)
        updates, state = tx.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return jnp.append(values, loss(params))


def product(params: dict) -> jax.Array:
    """s a b."""
    return SCALE * params["q"]["lora_a"] @ params["q"]["lora_b"]


def adam(mode: str, form: dict) -> Callable:
    """rate -> lorapro_adamw of that mode."""
    return lambda rate: lp.lorapro_adamw(rate, SCALE, mode=mode, **form)


def projection(damping: float) -> Callable:
    """rate -> the plain projection under SGD."""
    return lambda rate: optax.chain(lp.lorapro(SCALE, damping=damping), optax.sgd(rate))


def curves(
    make: Callable, rank: int, sizes: tuple[float, ...], rates: tuple[float, ...], s: Settings
) -> np.ndarray:
    """Losses by size of b and rate: (sizes, rates, steps + 1), over the initial one."""
    a, b, T = (jnp.asarray(x, jnp.float32) for x in start(rank, s.seed))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    @functools.partial(jax.vmap, in_axes=(0, None))
    def all_of(rate, size):
        return run(make(rate), {"q": {"lora_a": a, "lora_b": size * b}}, product, T, s.steps)

    losses = np.asarray(all_of(jnp.asarray(rates), jnp.asarray(sizes)), np.float64)
    return losses / losses[..., :1]


def dense_curves(make: Callable, rates: tuple[float, ...], rank: int, s: Settings) -> np.ndarray:
    """The same of full fine-tuning from zero: (rates, steps + 1)."""
    T = jnp.asarray(start(rank, s.seed)[2], jnp.float32)

    @jax.jit
    @jax.vmap
    def all_of(rate):
        return run(make(rate), jnp.zeros_like(T), lambda weight: weight, T, s.steps)

    losses = np.asarray(all_of(jnp.asarray(rates)), np.float64)
    return losses / losses[..., :1]


def record(losses: np.ndarray, first: int) -> dict:
    """What a curve shows; losses are relative to the initial one."""
    head = losses[: first + 1]
    rises = np.diff(head)
    finite = bool(np.all(np.isfinite(losses)))
    return {
        # below 4 eps a float32 sum of 30,720 squares is rounding
        "monotone": finite and bool(np.all(rises <= 4 * np.finfo(np.float32).eps)),
        "largest_jump": _short(max(np.max(rises), 0.0)) if finite else None,
        "peak": _short(np.max(head)) if finite else None,
        "loss_last": _short(losses[-1]) if finite else None,
        "losses": [_short(x) if np.isfinite(x) else None for x in head],
    }


def _short(x: float) -> float:
    return float(f"{x:.5g}")


def measured(s: Settings, rank: int) -> list[dict]:
    """One row for each run at one rank."""
    rows = []

    def add(variant: str, form: str, size: float | None, rate: float, losses: np.ndarray) -> None:
        told = {"variant": variant, "form": form, "rank": rank, "size": size, "rate": rate}
        rows.append(told | record(losses, s.first))

    def add_all(variant: str, form: str, make: Callable, rates: tuple[float, ...]) -> None:
        for size, by_rate in zip(s.sizes, curves(make, rank, s.sizes, rates, s), strict=True):
            for rate, losses in zip(rates, by_rate, strict=True):
                add(variant, form, size, rate, losses)

    for variant, make, rates in (("adam", optax.adam, RATES), ("sgd", optax.sgd, SGD_RATES)):
        for rate, losses in zip(rates, dense_curves(make, rates, rank, s), strict=True):
            add(variant, "dense", None, rate, losses)
    for mode in MODES:
        for form, arguments in FORMS.items():
            add_all(mode, form, adam(mode, arguments), RATES)
    for damping in DAMPINGS:
        add_all("projection", f"damping={damping:.0e}", projection(damping), SGD_RATES)
    return rows


def overview(rows: list[dict]) -> list[dict]:
    """By variant, form and size of b: at each rate, in how many ranks it fell, and the worst rise.

    "4/4" is monotone at all four ranks; "3/4 2e-03" rose by at most 0.2 % of the initial loss.
    """
    result: dict[tuple, dict] = {}
    rates = sorted({row["rate"] for row in rows})
    for row in rows:
        key = row["variant"], row["form"], row["size"]
        cells = dict(zip(("variant", "form", "size of b"), key, strict=True))
        same = [
            [x for x in rows if (x["variant"], x["form"], x["size"], x["rate"]) == (*key, rate)]
            for rate in rates
        ]
        result[key] = cells | {f"{r:g}": _cell(x) for r, x in zip(rates, same, strict=True)}
    return list(result.values())


def _cell(rows: list[dict]) -> str:
    if not rows:
        return ""
    fell = sum(row["monotone"] for row in rows)
    jumps = [row["largest_jump"] for row in rows]
    worst = "inf" if None in jumps else f"{max(jumps):.0e}"
    return f"{fell}/{len(rows)}" + ("" if fell == len(rows) else f" {worst}")


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Largest rise of the loss by rate (SGD: by damping), a row of panels for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = sorted({row["rank"] for row in rows})
    sizes = sorted({row["size"] for row in rows if row["size"] is not None})
    variants = (*MODES, "projection")
    shape = {"figsize": (3.2 * len(ranks), 10.5), "layout": "constrained"}
    figure, panels = plt.subplots(len(variants), len(ranks), sharey=True, squeeze=False, **shape)
    colours = dict(zip(sizes, ("#000000", "#0072B2", "#D55E00", "#009E73"), strict=False))
    markers = dict(zip(sizes, "osD^", strict=False))

    def line(panel: Any, chosen: list[dict], x: str, **style: Any) -> None:
        # below 1e-7 there is nothing but rounding: monotone
        heights = [1e10 if r["largest_jump"] is None else r["largest_jump"] for r in chosen]
        panel.loglog([r[x] for r in chosen], np.maximum(heights, 1e-7), **style)

    for i, variant in enumerate(variants):
        for panel, rank in zip(panels[i], ranks, strict=True):
            here = [row for row in rows if row["rank"] == rank]
            own = [row for row in here if row["variant"] == variant]
            panel.set_title(f"{variant}, r = {rank}", fontsize=10)
            for size in sizes:
                mine = [row for row in own if row["size"] == size]
                look = {"color": colours[size], "marker": markers[size], "ms": 4}
                if variant == "projection":
                    mine = [r | {"damping": float(r["form"].split("=")[1])} for r in mine]
                    for rate, dash in zip(SGD_RATES, (":", "--", "-"), strict=True):
                        at = [row for row in mine if row["rate"] == rate]
                        label = f"rate {rate:g}" if size == sizes[0] else None
                        line(panel, at, "damping", ls=dash, label=label, **look)
                    continue
                for form, dash in (("default", "-"), ("undamped", "--")):
                    at = [row for row in mine if row["form"] == form]
                    line(panel, at, "rate", ls=dash, label=f"{form}, b × {size:g}", **look)
            if variant != "projection":
                dense = [row for row in here if (row["variant"], row["form"]) == ("adam", "dense")]
                line(panel, dense, "rate", color="#999999", lw=4, alpha=0.5, label="full FT, Adam")
            panel.axhline(1.0, color="#bbbbbb", lw=0.7, zorder=0)
            panel.set_xlabel("damping" if variant == "projection" else "learning rate")
        panels[i, 0].set_ylabel("largest rise / initial loss")
        panels[i, 0].legend(fontsize=6, loc="upper left")
    figure.suptitle("Largest rise of the loss in one of the first steps (lowest: none)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(settings: Settings) -> None:
    """Runs, shows, draws, and appends one JSON line per run."""
    rows = [row for rank in settings.ranks for row in measured(settings, rank)]
    timing.show(overview(rows), f"monotone runs and the worst rise in {settings.first} steps")
    draw(rows, settings.plot)
    timing.append(rows, "first_steps", settings, settings.results)


if __name__ == "__main__":
    main(tyro.cli(Settings))
