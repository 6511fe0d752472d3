"""Results as PNG files: one question a figure, each method's name where its line ends.

The colours can be told apart by the colour-blind and read as text on white; markers and line styles
say the same a second time.
"""

import collections
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments import storage
from experiments.report.summary import (
    LOWER,
    Row,
    best_rows,
    groups,
    is_sweep,
    rate_text,
    which_rate,
)

STYLES = {
    "full": {"color": "#444444", "ls": (0, (1, 1)), "marker": "o"},
    "full-muon": {"color": "#56B4E9", "ls": (0, (1, 2)), "marker": "X"},
    "lora": {"color": "#008060", "ls": "--", "marker": "s"},
    "lorapro-full": {"color": "#0072B2", "ls": "-", "marker": "^"},
    "lorapro-factored": {"color": "#C84E00", "ls": (0, (6, 1.5, 1, 1.5)), "marker": "D"},
    "lorapro-muon": {"color": "#B8860B", "ls": (0, (3, 1, 1, 1, 1, 1)), "marker": "P"},
    "lorapro-adamw": {"color": "#AA4499", "ls": "-.", "marker": "v"},
}
SMOOTHED_OVER = 10  # a point of a curve is the mean of this share of it: 1/10
_NAMES = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation", "loss": "loss"}
_NAMES |= {"bleu": "BLEU", "exact_match": "exact answers"}
_SIZE = (7.0, 4.2)  # inches: at a page's 700 pixels the font's 10 points are 14 pixels
_GAP = 0.075  # between two lines of text, as a share of the height


def draw(rows: Sequence[Row], folder: storage.Path, prefix: str = "") -> dict[str, storage.Path]:
    """Writes the figures of every task and its settings into `folder`, each whole or not at all.

    These are <prefix><task>-<model>-loss.png and, of a sweep over learning rates, -rates.png and
    -rates-loss.png. Further settings of one task and model are numbered from -2 on.

    Returns:
        What a figure shows -> its path.
    """
    made, seen = {}, collections.Counter()
    for group in groups(rows):
        name = f"{group[0].task}-{group[0].model}"
        seen[name] += 1
        name += f"-{seen[name]}" if seen[name] > 1 else ""
        figures: dict[str, tuple[str, Callable]] = {"loss": ("training loss", loss_curves)}
        if is_sweep(group) and group[0].metric != "loss":
            figures["rates"] = ("score by rate", by_rate)
        if is_sweep(group):
            figures["rates-loss"] = ("validation loss by rate", partial(by_rate, name="loss"))
        for file, (what, panel) in figures.items():
            path = folder / f"{prefix}{name}-{file}.png"
            made[f"{name}: {what}"] = _figure(group, panel, path)
    return made


def _figure(rows: Sequence[Row], panel: Callable, path: storage.Path) -> storage.Path:
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, ax = plt.subplots(figsize=_SIZE, layout="constrained")
        question, subtitle = panel(ax, rows)
        figure.get_layout_engine().set(rect=(0, 0, 1, 0.86))  # above it are the two lines of text
        figure.text(0.01, 0.98, question, va="top", fontsize=13, fontweight="bold")
        figure.text(0.01, 0.91, subtitle, va="top", color="#444444")
        ax.grid(alpha=0.25)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format="png", metadata={"Software": None})
        plt.close(figure)
    storage.write_atomic(path, drawn.getvalue(), "the plot")
    return path


def loss_curves(ax: Axes, rows: Sequence[Row]) -> tuple[str, str]:
    """Training loss by step: each method at its best rate, smoothed, the mean over the seeds.

    Up to the last step that all seeds have: of a language model's rows one seed may draw more that
    are too long than another.
    """
    labels = []
    for row in (row for row in best_rows(rows) if not row.diverged):
        style = STYLES[row.method]
        shortest = min(len(record["losses"]) for record in row.records)
        curves = [np.array(record["losses"][:shortest]) for record in row.records]
        steps = curves[0][:, 0]
        losses = smoothed(np.mean([curve[:, 1] for curve in curves], axis=0))
        ax.plot(steps, losses, **style | {"marker": ""}, lw=1.6)
        text = f"{row.method}, {rate_text(row.learning_rate)}"
        labels.append((steps[-1], losses[-1], style["color"], text))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set_xlabel("step")
    _label(ax, labels)
    facts = _facts(rows, "moving mean of the cross-entropy")
    return f"How does the training loss fall at each method's {which_rate(rows)}?", facts


def smoothed(values: np.ndarray) -> np.ndarray:
    """A centred moving mean; at the ends, of the values that there are."""
    window = np.ones(2 * (len(values) // (2 * SMOOTHED_OVER)) + 1)
    sums, counts = (np.convolve(x, window, "same") for x in (values, np.ones(len(values))))
    return sums / counts


def by_rate(ax: Axes, rows: Sequence[Row], name: str = "metric") -> tuple[str, str]:
    """A score against the learning rate, a line per method, its standard error a whisker.

    A cross at the bottom is a rate at which a seed diverged; the line is broken there.
    """
    methods, labels = list(dict.fromkeys(row.method for row in rows)), []
    for number, method in enumerate(methods):
        style = STYLES[method]
        mine = sorted((r for r in rows if r.method == method), key=lambda r: r.learning_rate)
        # Side by side, so that whiskers at one rate do not cover each other.
        shift = 1.035 ** (number - (len(methods) - 1) / 2)
        rates = shift * np.array([row.learning_rate for row in mine])
        means = np.array([np.nan if row.diverged else row.mean[name] for row in mine])
        errors = np.array([0.0 if row.diverged else row.error(name) for row in mine])
        ax.errorbar(rates, means, errors, **style, ms=6, lw=1.8, elinewidth=1, capsize=3)
        lost = rates[np.isnan(means)]
        ax.plot(lost, np.full(len(lost), 0.03 + 0.04 * number), "x", mew=2, color=style["color"],
                transform=ax.get_xaxis_transform())  # fmt: skip
        ends = np.flatnonzero(~np.isnan(means))
        if len(ends):
            labels.append((rates[ends[-1]], means[ends[-1]], style["color"], method))
    rates = sorted({row.learning_rate for row in rows})
    ax.set_xscale("log")
    ax.set_xticks(rates, [rate_text(rate) for rate in rates])
    ax.minorticks_off()
    ax.set_xlabel("peak learning rate")
    _label(ax, labels)
    score = rows[0].metric if name == "metric" else name
    crosses = "; x: diverged" if any(row.diverged for row in rows) else ""
    spread = ", mean ± standard error" if any(row.n > 1 for row in rows) else ""
    facts = _facts(rows, f"validation {_NAMES[score]}{spread}") + crosses
    level = "low" if score in LOWER else "high"
    return f"Which learning rates give a {level} {_NAMES[score]}?", facts


def _facts(rows: Sequence[Row], what: str) -> str:
    data = f"{rows[0].task}, {rows[0].model}, {rows[0].records[0]['train_examples']:,} examples"
    seeds = " or ".join(map(str, sorted({row.n for row in rows})))
    return f"{data}: {what}, {'one seed' if seeds == '1' else f'{seeds} seeds'}"


def _label(ax: Axes, labels: Iterable[tuple[float, float, str, str]]) -> None:
    """Names lines, (x, y of the end, colour, text), right of the axes, none over another."""
    low, high = ax.get_ylim()
    labels = sorted(labels, key=lambda label: label[1])
    ends = np.array([(y - low) / (high - low) for _, y, *_ in labels])
    heights = ends.copy()
    for i in range(1, len(heights)):
        heights[i] = max(ends[i], heights[i - 1] + _GAP)
    if len(labels):  # around the ends, and not above the axes
        heights -= max(np.mean(heights - ends), heights[-1] - 1)
    for height, (x, y, colour, text) in zip(heights, labels, strict=True):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5)}
        ax.annotate(text, (x, y), (1.05, height), textcoords="axes fraction", va="center",
                    color=colour, fontweight="bold", annotation_clip=False,
                    arrowprops=line | {"shrinkA": 0, "shrinkB": 4})  # fmt: skip
    ax.set_ylim(low, high)
