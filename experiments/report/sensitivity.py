"""How much a method's score depends on the learning rate, from the summarised runs of a sweep.

A sweep is all rows of one task, model and settings of which a method has at least three rates. A
method's band is the stretch of neighbouring rates around its best one whose means are at most one
point, 0.01 of the headline metric, below a reference; its width is log10(highest / lowest). Two
methods are compared at equal rates by the differences of the runs with equal seeds. A rate at which
a seed diverged has no mean: it is in no band and in no comparison.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from experiments.report.summary import ROUNDING, Row, groups

LEAST = 3  # rates of one method that make a sweep
POINT = 0.01
COMPARED = (("lorapro-factored", "lorapro-full"), ("lorapro-adamw", "lora"))


class Sweep(NamedTuple):
    """The rows of one task and settings."""

    data: str  # the task, the model and how many examples
    metric: str  # the task's headline
    rates: list[float]  # ascending, of all methods
    methods: dict[str, dict[float, Row]]  # name -> rate -> row


class Band(NamedTuple):
    """A stretch of neighbouring rates."""

    low: float
    high: float
    open: bool  # it reaches an end of the method's rates, so it may be wider than is known

    @property
    def decades(self) -> float:
        """Its width."""
        return math.log10(self.high / self.low)


class Difference(NamedTuple):
    """Of two methods' scores at one rate, paired by seed."""

    mean: float
    error: float | None  # standard error of the mean; None for one pair
    n: int


class Table(NamedTuple):
    """Ready to be shown, as text or as Markdown."""

    title: str
    headings: list[str]
    cells: list[list[str]]
    note: str


def sweeps(rows: Sequence[Row]) -> list[Sweep]:
    """The sweeps among the rows, in the order of first appearance."""
    found = [_sweep(group) for group in groups(rows)]
    return [s for s in found if any(len(rates) >= LEAST for rates in s.methods.values())]


def _sweep(rows: list[Row]) -> Sweep:
    methods: dict[str, dict[float, Row]] = {}
    for row in sorted(rows, key=lambda row: row.learning_rate):
        methods.setdefault(row.method, {})[row.learning_rate] = row
    methods = {name: methods[name] for name in dict.fromkeys(row.method for row in rows)}
    first = rows[0]
    examples = first.records[0]["train_examples"]
    data = f"{first.task}, {first.model}, {examples:,} training examples"
    return Sweep(data, first.metric, sorted({row.learning_rate for row in rows}), methods)


def rows_of(found: Sequence[Sweep]) -> list[Row]:
    """All rows of the sweeps."""
    return [row for s in found for rates in s.methods.values() for row in rates.values()]


def best_rate(rates: dict[float, Row]) -> float | None:
    """The rate with the highest mean, the lowest of equals; None if every rate has diverged."""
    finished = [rate for rate, row in rates.items() if not row.diverged]
    return max(finished, key=lambda rate: rates[rate].mean["metric"], default=None)


def band(rates: dict[float, Row], reference: float) -> Band | None:
    """The method's band around its best rate below `reference`; None if that is not in it."""
    best, order = best_rate(rates), sorted(rates)
    if best is None or not _near(rates[best], reference):
        return None
    low = high = order.index(best)
    while low > 0 and _near(rates[order[low - 1]], reference):
        low -= 1
    while high + 1 < len(order) and _near(rates[order[high + 1]], reference):
        high += 1
    return Band(order[low], order[high], low == 0 or high == len(order) - 1)


def _near(row: Row, reference: float) -> bool:
    return not row.diverged and row.mean["metric"] >= reference - POINT - ROUNDING


def difference(first: Row, second: Row, name: str = "metric") -> Difference | None:
    """first - second over the seeds of both; None if there is none, or one of the rows diverged."""
    if first.diverged or second.diverged:
        return None
    name = first.metric if name == "metric" else name
    scores = [
        {r["config"]["seed"]: r["final"][name] for r in row.records} for row in (first, second)
    ]
    pairs = [scores[0][seed] - scores[1][seed] for seed in scores[0].keys() & scores[1].keys()]
    if not pairs:
        return None
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return Difference(statistics.fmean(pairs), error, len(pairs))


def tables(rows: Sequence[Row]) -> list[Table]:
    """For each sweep its methods, and the comparisons of those that it has."""
    made = []
    for sweep in sweeps(rows):
        made.append(_methods(sweep))
        if pairs := [pair for pair in COMPARED if set(pair) <= sweep.methods.keys()]:
            made.append(_comparisons(sweep, pairs))
    return made


def score(row: Row | None) -> str:
    """Mean ± standard error, how many seeds diverged, or a dash where nothing was run."""
    if row is None:
        return "–"
    if row.diverged:
        return f"diverged ({row.diverged} of {row.n})"
    return _with_error(f"{row.mean['metric']:.3f}", row.error(), 3)


def _with_error(mean: str, error: float | None, digits: int) -> str:
    return mean if error is None else f"{mean} ± {error:.{digits}f}"


def _methods(sweep: Sweep) -> Table:
    bests = {name: best_rate(rates) for name, rates in sweep.methods.items()}
    tops = {
        name: sweep.methods[name][rate].mean["metric"]
        for name, rate in bests.items()
        if rate is not None
    }
    cells = []
    for name, rates in sweep.methods.items():
        best = bests[name]
        own, top = tops.get(name, math.inf), max(tops.values(), default=math.inf)
        state = next(iter(rates.values())).records[0]["optimizer_state_bytes"]
        cells.append(
            [
                name,
                f"{state / 1e6:.2f}",
                "–" if best is None else f"{best:g}",
                "–" if best is None else score(rates[best]),
                _width(band(rates, own)),
                _width(band(rates, top)),
                *(score(rates.get(rate)) for rate in sweep.rates),
            ]
        )
    headings = ["method", "state MB", "best rate", "there", "own band", "common band"]
    note = (
        "Mean ± standard error over the seeds, at each rate. Bands: decades of neighbouring rates "
        "around the method's best whose mean is within 0.01 of that best (own), or of the best of "
        "all methods (common); 0: one rate only, –: none; ≥: it reaches an end of the rates swept."
    )
    title = f"{sweep.data}: {sweep.metric}"
    return Table(title, [*headings, *(f"{r:g}" for r in sweep.rates)], cells, note)


def _width(found: Band | None) -> str:
    return "–" if found is None else f"{'≥ ' if found.open else ''}{found.decades:.2f}"


def _comparisons(sweep: Sweep, pairs: Sequence[tuple[str, str]]) -> Table:
    cells = []
    for pair in pairs:
        first, second = (sweep.methods[method] for method in pair)
        for what, name in ((sweep.metric, "metric"), ("loss", "loss")):
            found = [_difference(first.get(r), second.get(r), name) for r in sweep.rates]
            cells.append([f"{' − '.join(pair)}: {what}", *found])
    note = "Mean ± its standard error, paired by seed; *: more than one standard error."
    headings = ["difference", *(f"{rate:g}" for rate in sweep.rates)]
    return Table(f"{sweep.data}: differences at equal rates", headings, cells, note)


def _difference(first: Row | None, second: Row | None, name: str) -> str:
    found = difference(first, second, name) if first and second else None
    if found is None:
        return "diverged" if first and second and first.diverged + second.diverged else "–"
    mark = "*" if found.error is not None and abs(found.mean) > found.error + ROUNDING else ""
    return _with_error(f"{found.mean:+.4f}", found.error, 4) + mark
