"""Results of runs, grouped: one row per configuration, mean and sample std over its seeds.

A row of which a seed diverged has neither: the mean of the others would flatter it.
"""

import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

ROUNDING = 1e-9  # 0.80 - 0.79 is more than 0.01 in binary
SCORES = ("accuracy", "f1", "matthews", "loss")
NEEDED = ("config", "metric", "final")  # in every record


class Row(NamedTuple):
    """The runs of one configuration, over n seeds."""

    task: str
    model: str
    method: str
    learning_rate: float
    settings: str  # the rest of the configuration, as JSON
    metric: str  # the task's headline
    n: int
    diverged: int  # of the n
    mean: dict[str, float]  # of the final scores, "metric" among them; empty if a seed diverged
    std: dict[str, float]  # sample standard deviation; 0 for n = 1; empty if a seed diverged
    records: list[dict[str, Any]]

    def error(self, name: str = "metric") -> float | None:
        """Standard error of a score's mean; None for one seed."""
        return self.std[name] / math.sqrt(self.n) if self.n > 1 else None


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Every fine-tuning record in <folder>/*.jsonl; other records (benchmarks) are left alone."""
    records: dict[str, tuple[str, dict]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}); remove the line") from error
            if not isinstance(record, dict) or record.get("kind") != "finetune":
                continue
            if missing := [name for name in NEEDED if name not in record]:
                raise ValueError(f"{where} lacks {', '.join(missing)}: it is damaged; remove it")
            key = json.dumps(record["config"], sort_keys=True)
            if key in records:
                raise ValueError(
                    f"{where} has the configuration of {records[key][0]}, seed included; keep one"
                )
            records[key] = where, record
    if not records:
        raise ValueError(
            f"{folder} holds no fine-tuning result; run python -m experiments.finetune and copy "
            "its results.jsonl there"
        )
    return [record for _, record in records.values()]


def summarise(records: Iterable[dict[str, Any]]) -> list[Row]:
    """One row per configuration without its seed, in the order of first appearance."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        config = {k: v for k, v in record["config"].items() if k != "seed"}
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(record)
    return [_row(group) for group in groups.values()]


def _row(group: list[dict[str, Any]]) -> Row:
    config, metric = group[0]["config"], group[0]["metric"]
    rest = {k: v for k, v in config.items() if k not in ("method", "learning_rate", "seed")}
    diverged = sum("diverged" in record for record in group)
    values = {} if diverged else _values(group, metric)
    return Row(
        config["task"],
        config["model"],
        config["method"],
        config["learning_rate"],
        json.dumps(rest, sort_keys=True),
        metric,
        len(group),
        diverged,
        {name: statistics.fmean(v) for name, v in values.items()},
        {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()},
        group,
    )


def _values(group: list[dict[str, Any]], metric: str) -> dict[str, list[float]]:
    values = {name: [record["final"][name] for record in group] for name in SCORES}
    values["metric"] = values[metric]
    for name in ("examples_per_second", "wall_seconds"):
        values[name] = [record[name] for record in group]
    return values


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each task and settings, in the order of first appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((row.task, row.settings), []).append(row)
    return list(found.values())


def _score(row: Row) -> float:
    return row.mean["metric"]


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Per task, settings and method, the row with the highest headline metric of its rates.

    Rates that diverged do not count.
    """
    best: dict[tuple, Row] = {}
    for row in (row for row in rows if not row.diverged):
        key = (row.task, row.settings, row.method)
        best[key] = max(best.get(key, row), row, key=_score)
    return list(best.values())


def leaders(rows: Sequence[Row]) -> list[Row]:
    """Per task and settings, the row with the highest headline metric and those that tie with it.

    A tie is a gap of at most its standard error, sqrt(e1² + e2²) of the two means' errors; the
    error of one seed is not known and counts as 0.
    """
    found = []
    for group in groups(rows):
        finished = [row for row in group if not row.diverged]
        best = max(finished, key=_score, default=None)
        for row in finished:
            error = math.hypot(best.error() or 0.0, row.error() or 0.0)
            found += [row] if _score(best) - _score(row) <= error + ROUNDING else []
    return found


def over_seeds(rows: Iterable[Row]) -> str:
    """How many seeds the rows are of: "one seed", "3 seeds", "1 to 3 seeds"."""
    counts = sorted({row.n for row in rows})
    if counts == [1]:
        return "one seed"
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) + " seeds"


def spread(row: Row, name: str, digits: int = 4) -> str:
    """Mean ± std; the mean alone for one seed; for a row that diverged, that in the headline."""
    if row.diverged:
        return f"diverged ({row.diverged} of {row.n})" if name == row.metric else "–"
    text = f"{row.mean[name]:.{digits}f}"
    return f"{text} ± {row.std[name]:.{digits}f}" if row.n > 1 else text
