"""Variants of one computation timed by turns, and their ratios beside the bounds.

A machine's speed drifts, so every round takes every variant once, forwards or backwards in turn.
A ratio is the median over the rounds of the ratio within a round. Each turn is two calls of which
the second is timed: the first finds the caches full of another variant's arrays.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.provenance import provenance

Times = dict[str, list[float]]  # variant -> seconds of each round

RESULTS = pathlib.Path(__file__).parent / "results"


def by_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, slow: Mapping[str, int] | None = None
) -> Times:
    """Seconds of every call in every round.

    Args:
      calls: {variant: a call that blocks until its result is there}.
      rounds: that are counted, after one that warms up.
      slow: {variant: its own, smaller number of rounds}.
    """
    times: Times = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            if number >= (slow or {}).get(name, rounds):
                continue
            calls[name]()
            start = time.perf_counter()
            calls[name]()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def medians(times: Times) -> list[dict]:
    """One row for each variant."""
    return [
        {"variant": name, "median_s": statistics.median(seconds), "rounds": len(seconds)}
        for name, seconds in times.items()
    ]


def ratio(times: Times, over: str, under: str, *, most: float | None, least: float = 0.0) -> dict:
    """The paired ratio of two variants, its quartiles, and whether it is within its bounds."""
    paired = [x / y for x, y in zip(times[over], times[under], strict=False)]
    quartiles = statistics.quantiles(paired, n=4) if len(paired) > 1 else paired * 3
    return bounded(f"{over} / {under}", statistics.median(paired), most=most, least=least) | {
        "quartiles": (quartiles[0], quartiles[2])
    }


def bounded(name: str, value: float, *, most: float | None, least: float = 0.0) -> dict:
    """One row of a table of bounds; `most` is None where only `least` matters."""
    bound = f"at least {least:g}" if most is None else f"at most {most:g}"
    held = value >= least and (most is None or value <= most)
    return {"figure": name, "value": value, "bound": bound, "held": held}


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table on the terminal."""
    columns, table = list(rows[0]), Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(
    benchmark: str, rows: Sequence[dict], bounds: Sequence[dict], settings: dict, out: pathlib.Path
) -> None:
    """Shows both tables and appends a JSON line for each row, with its birth certificate."""
    show(benchmark, rows)
    if bounds:
        show("bounds", bounds)
    told = {"settings": settings} | provenance()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for row in (*rows, *bounds):
            file.write(json.dumps({"benchmark": benchmark, **row, **told}) + "\n")
