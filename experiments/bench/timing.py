"""Timing by turns: variants of one computation in one process, compared within each round.

These are shared machines whose speed drifts. Each round takes every variant once, forwards or
backwards in turn; a ratio is the median over the rounds of the ratio to the reference variant in
the same round, which a drifting machine disturbs least. Each turn is two calls of which the second
is timed: the first finds the caches full of another variant's arrays, and the cores busy with its
worker threads, which in PyTorch's case spin for some milliseconds.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.provenance import provenance


def by_turns(
    calls: Mapping[Hashable, Callable[[], Any]], rounds: int, few: Mapping[str, int] | None = None
) -> dict[Hashable, list[float]]:
    """Seconds of each call in each round; `few` caps the rounds of the slow ones.

    A call must block until its result is there. The first round warms up and is not counted.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            if number >= (few or {}).get(name, rounds):
                continue
            calls[name]()
            start = time.perf_counter()
            calls[name]()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def summary(times: Mapping[str, list[float]], reference: str) -> list[dict]:
    """Per variant: median and minimum seconds, and the median ratio to `reference`."""
    base = times[reference]
    return [
        {
            "variant": name,
            "median_s": statistics.median(own),
            "min_s": min(own),
            "rounds": len(own),
            f"ratio_to_{reference}": statistics.median(
                x / y for x, y in zip(own, base, strict=False)
            ),
        }
        for name, own in times.items()
    ]


def show(rows: list[dict], title: str) -> None:
    """The rows as a table on the terminal."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


def append(
    rows: list[dict], bench: str, settings: Any, path: pathlib.Path, born: dict | None = None
) -> None:
    """One JSON line per row, with the settings and the birth certificate, now's or `born`."""
    born = provenance() if born is None else born
    fields = dataclasses.asdict(settings).items()
    config = {k: v for k, v in fields if not isinstance(v, pathlib.Path)}  # where, not what
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({"bench": bench, **row, "config": config, **born}) + "\n")
