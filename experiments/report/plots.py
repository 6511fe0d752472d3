"""Loss curves and the headline metric, by bars or by learning rate, from results, as PNG files.

Colours are Okabe and Ito's, which the colour-blind can tell apart; line styles, hatches and markers
say the same a second time.
"""

import functools
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments import storage
from experiments.report import sensitivity
from experiments.report.summary import Row, best_rows


class Style(NamedTuple):
    """How a method is drawn."""

    colour: str
    line: Any  # Matplotlib's line style
    hatch: str
    marker: str


STYLES = {
    "full": Style("#444444", "-", "", "o"),
    "lora": Style("#E69F00", "--", "//", "s"),
    "lorapro-full": Style("#0072B2", "-", "..", "^"),
    "lorapro-factored": Style("#D55E00", (0, (5, 1.5, 1, 1.5, 1, 1.5)), "oo", "D"),
    "lorapro-adamw": Style("#009E73", "-.", "xx", "v"),
}
_LABELLED = 6  # bars of a panel up to which their values fit above them
_OTHER = Style("#CC79A7", ":", "++", "P")
SMOOTHED_OVER = 10  # a point of a curve is the mean of this share of it: 1/10


def draw(rows: Sequence[Row], folder: storage.Path, prefix: str = "") -> dict[str, storage.Path]:
    """Writes <prefix>loss.png, and metric.png, rates.png and rates-loss.png or all, into `folder`.

    Rows of a sweep over learning rates go into the rates, the others into metric.png. Each has one
    panel per task and settings. An earlier image that has no rows any more is removed.

    Returns:
        What an image shows -> its path.
    """
    swept = sensitivity.rows_of(sensitivity.sweeps(rows))
    others = [row for row in rows if not any(row is other for other in swept)]
    images = {
        "training loss": (rows, loss_curves, "loss"),
        "headline metric": (others, metric_bars, "metric"),
        "headline metric by learning rate": (swept, by_rate, "rates"),
        "validation loss by learning rate": (
            swept,
            functools.partial(by_rate, name="loss"),
            "rates-loss",
        ),
    }
    made = {}
    for what, (shown, panel, name) in images.items():
        path = folder / f"{prefix}{name}.png"
        if shown:
            made[what] = _figure(shown, panel, path)
        else:
            path.unlink(missing_ok=True)
    return made


def _figure(rows: Sequence[Row], panel, path: storage.Path) -> storage.Path:
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        panels.setdefault((row.task, row.settings), []).append(row)
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(max(4.2 * len(panels), 6.4), 4.0),
        layout="constrained",
        squeeze=False,
    )
    for ax, shown in zip(axes[0], panels.values(), strict=True):
        panel(ax, shown)
        ax.spines[["top", "right"]].set_visible(False)
    handles = {
        label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 3 * len(axes[0])),
        frameon=False,
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format="png", metadata={"Software": None})
    plt.close(figure)
    storage.write_atomic(path, drawn.getvalue(), "the plot")
    return path


def loss_curves(ax: Axes, rows: Sequence[Row]) -> None:
    """Training loss by step: each method at its best rate, smoothed, the mean over the seeds."""
    for row in best_rows(rows):
        style = STYLES.get(row.method, _OTHER)
        curves = [np.array(record["losses"]) for record in row.records]
        steps = curves[0][:, 0]
        losses = smoothed(np.mean([curve[:, 1] for curve in curves], axis=0))
        ax.plot(steps, losses, ls=style.line, color=style.colour, lw=1.8, label=row.method)
    rates = {row.learning_rate for row in rows}
    title = f"{rows[0].task}: training loss"
    ax.set_title(title + (", each method at its best rate" if len(rates) > 1 else ""), fontsize=10)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set_xlabel("step")
    ax.set_ylabel("cross-entropy (moving mean)")
    ax.grid(alpha=0.25)


def smoothed(values: np.ndarray) -> np.ndarray:
    """A centred moving mean; at the ends, of the values that there are."""
    half = len(values) // (2 * SMOOTHED_OVER)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def metric_bars(ax: Axes, rows: Sequence[Row]) -> None:
    """The headline metric of every method, grouped by learning rate, std as a whisker.

    Where each method has one rate only, its bar stands above it.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    rates = sorted({row.learning_rate for row in rows})
    single = len(rows) == len(methods)  # one rate a method: no groups
    width = 0.8 if single else 0.8 / len(methods)
    for row in rows:
        place = methods.index(row.method)
        if not single:
            place = rates.index(row.learning_rate) + width * (place - (len(methods) - 1) / 2)
        if row.diverged:
            ax.text(place, 0.02, "diverged", rotation=90, ha="center",
                    transform=ax.get_xaxis_transform())  # fmt: skip
            continue
        style = STYLES.get(row.method, _OTHER)
        first = row is next(r for r in rows if r.method == row.method)
        bar = ax.bar(
            place,
            row.mean["metric"],
            0.9 * width,
            yerr=row.std["metric"] if row.n > 1 else None,
            capsize=3,
            ecolor="#000000",
            color=style.colour,
            alpha=0.85,
            hatch=style.hatch,
            edgecolor="white",
            label=row.method if first else None,
        )
        if len(rows) <= _LABELLED:
            ax.bar_label(bar, fmt="%.3f", fontsize=8, padding=2)
    ticks = [row.learning_rate for row in rows] if single else rates
    ax.set_xticks(range(len(ticks)), [f"{rate:g}" for rate in ticks])
    ax.set_xlabel("learning rate")
    ax.set_ylabel(rows[0].metric)
    seeds = sorted({row.n for row in rows})
    ax.set_title(
        f"{rows[0].task}: validation {rows[0].metric}, n = {'-'.join(map(str, seeds))}", fontsize=10
    )
    _cut_axis(ax, rows)


def by_rate(ax: Axes, rows: Sequence[Row], name: str = "metric") -> None:
    """A score against the learning rate, a line per method, its standard error a band.

    A cross at the bottom is a rate at which a seed diverged; the line is broken there.
    """
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        style = STYLES.get(method, _OTHER)
        mine = sorted((r for r in rows if r.method == method), key=lambda r: r.learning_rate)
        rates = np.array([row.learning_rate for row in mine])
        means = np.array([np.nan if row.diverged else row.mean[name] for row in mine])
        errors = np.array([0.0 if row.diverged else row.error(name) or 0.0 for row in mine])
        ax.fill_between(rates, means - errors, means + errors, color=style.colour, alpha=0.15, lw=0)
        ax.plot(rates, means, ls=style.line, color=style.colour, marker=style.marker, ms=5, lw=1.8,
                label=method)  # fmt: skip
        lost = rates[[row.diverged > 0 for row in mine]]
        ax.plot(lost, np.full(len(lost), 0.03 + 0.04 * number), "x", color=style.colour, mew=2,
                transform=ax.get_xaxis_transform())  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel("peak learning rate")
    what = rows[0].metric if name == "metric" else name
    ax.set_ylabel(f"validation {what}, mean ± s.e.")
    seeds = sorted({row.n for row in rows})
    crosses = "; x: diverged" if any(row.diverged for row in rows) else ""
    examples = f"{rows[0].records[0]['train_examples']:,} examples"
    count = "-".join(map(str, seeds))
    ax.set_title(f"{rows[0].task}, {examples}, n = {count}{crosses}", fontsize=10)
    ax.grid(alpha=0.25)


def _cut_axis(ax: Axes, rows: Sequence[Row]) -> None:
    """Starts the axis a little under the lowest bar, and says so, where 0 would hide the gaps."""
    rows = [row for row in rows if not row.diverged]
    if not rows:
        return
    lows = [row.mean["metric"] - row.std["metric"] for row in rows]
    highs = [row.mean["metric"] + row.std["metric"] for row in rows]
    low = min(lows) - max(0.25 * (max(highs) - min(lows)), 0.02)
    if low > 0.2:
        ax.set_ylim(bottom=low)
        ax.set_ylabel(f"{rows[0].metric} (axis starts at {low:.2f})")
    ax.margins(y=0.12)
