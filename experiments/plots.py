"""Loss curves and a bar chart of the headline metric, from summarised results, as PNG files.

Colours are Okabe and Ito's, which the colour-blind can tell apart; line styles and hatches say the
same a second time.
"""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.summary import Row, best_rows

# method -> (colour, line style, hatch)
STYLES = {
    "full": ("#444444", "-", ""),
    "lora": ("#E69F00", "--", "//"),
    "lorapro-full": ("#0072B2", "-", ".."),
    "lorapro-efficient": ("#009E73", "-.", "xx"),
}
_LABELLED = 6  # bars of a panel up to which their values fit above them
_OTHER = ("#CC79A7", ":", "++")
SMOOTHED_OVER = 10  # a point of a curve is the mean of this share of it: 1/10


def draw(rows: Sequence[Row], folder: pathlib.Path, prefix: str = "") -> list[pathlib.Path]:
    """Writes <prefix>loss.png and <prefix>metric.png into `folder`; one panel per task."""
    return [
        _figure(rows, loss_curves, folder / f"{prefix}loss.png"),
        _figure(rows, metric_bars, folder / f"{prefix}metric.png"),
    ]


def _figure(rows: Sequence[Row], panel, path: pathlib.Path) -> pathlib.Path:
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, axes = plt.subplots(
        1,
        len(tasks),
        figsize=(max(4.2 * len(tasks), 6.4), 4.0),
        layout="constrained",
        squeeze=False,
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        panel(ax, [row for row in rows if row.task == task])
        ax.spines[["top", "right"]].set_visible(False)
    handles = {
        label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png", metadata={"Software": None})
    plt.close(figure)
    temporary.replace(path)
    return path


def loss_curves(ax: Axes, rows: Sequence[Row]) -> None:
    """Training loss by step: each method at its best rate, smoothed, the mean over the seeds."""
    for row in best_rows(rows):
        colour, line, _ = STYLES.get(row.method, _OTHER)
        curves = [np.array(record["losses"]) for record in row.records]
        steps = curves[0][:, 0]
        losses = smoothed(np.mean([curve[:, 1] for curve in curves], axis=0))
        ax.plot(steps, losses, line, color=colour, lw=1.8, label=row.method)
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
        colour, _, hatch = STYLES.get(row.method, _OTHER)
        first = row is next(r for r in rows if r.method == row.method)
        bar = ax.bar(
            place,
            row.mean["metric"],
            0.9 * width,
            yerr=row.std["metric"] if row.n > 1 else None,
            capsize=3,
            ecolor="#000000",
            color=colour,
            alpha=0.85,
            hatch=hatch,
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


def _cut_axis(ax: Axes, rows: Sequence[Row]) -> None:
    """Starts the axis a little under the lowest bar, and says so, where 0 would hide the gaps."""
    lows = [row.mean["metric"] - row.std["metric"] for row in rows]
    highs = [row.mean["metric"] + row.std["metric"] for row in rows]
    low = min(lows) - max(0.25 * (max(highs) - min(lows)), 0.02)
    if low > 0.2:
        ax.set_ylim(bottom=low)
        ax.set_ylabel(f"{rows[0].metric} (axis starts at {low:.2f})")
    ax.margins(y=0.12)
