"""Results of runs, grouped: one row per configuration, mean and sample std over its seeds.

A row of which a seed diverged has neither: the mean of the others would flatter it.
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.finetune.config import RunConfig

NEEDED = ("config", "metric", "final")  # in every record
LOWER = ("loss", "perplexity")  # of which less is better
DEFAULTS = {field.name: field.default for field in dataclasses.fields(RunConfig)}


class Row(NamedTuple):
    """The runs of one configuration, over n seeds."""

    task: str
    model: str
    method: str
    learning_rate: float
    settings: str  # what is not the default, without method, rate and seed, as JSON
    metric: str  # the task's headline
    n: int
    diverged: int  # of the n
    mean: dict[str, float]  # of the final scores, "metric" among them; empty if a seed diverged
    std: dict[str, float]  # sample standard deviation; 0 for n = 1; empty if a seed diverged
    records: list[dict[str, Any]]

    def error(self, name: str = "metric") -> float:
        """Standard error of a score's mean; 0 for one seed, whose spread is not known."""
        return self.std[name] / math.sqrt(self.n)


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
            key = special(record["config"])
            if key in records:
                raise ValueError(f"{where} is the same run as {records[key][0]}; remove one")
            records[key] = where, record
    if not records:
        how = "copy a results.jsonl of python -m experiments.finetune there"
        raise ValueError(f"{folder} holds no fine-tuning result; {how}")
    return [record for _, record in records.values()]


def special(config: dict[str, Any], *without: str) -> str:
    """What a configuration has that is not the default, as JSON: older records lack fields."""
    told = {k: v for k, v in config.items() if k not in without and DEFAULTS.get(k, ...) != v}
    return json.dumps(told, sort_keys=True)


def summarise(records: Iterable[dict[str, Any]]) -> list[Row]:
    """One row per configuration without its seed, in the order of first appearance."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(special(record["config"], "seed"), []).append(record)
    return [_row(group) for group in groups.values()]


def _row(group: list[dict[str, Any]]) -> Row:
    config, metric = group[0]["config"], group[0]["metric"]
    named = (config[name] for name in ("task", "model", "method", "learning_rate"))
    settings = special(config, "method", "learning_rate", "seed")
    diverged, n = sum("diverged" in record for record in group), len(group)
    values: dict[str, list[float]] = {}
    if not diverged:
        values = {name: [r["final"][name] for r in group] for name in group[0]["final"]}
        values["metric"] = values[metric]
        values["examples_per_second"] = [r["examples_per_second"] for r in group]
    mean = {name: statistics.fmean(v) for name, v in values.items()}
    std = {name: statistics.stdev(v) if n > 1 else 0.0 for name, v in values.items()}
    return Row(*named, settings, metric, n, diverged, mean, std, group)


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of equal settings, the task among them, in the order of first appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.settings, []).append(row)
    return list(found.values())


def is_sweep(group: Sequence[Row]) -> bool:
    """Whether a method of the group has several learning rates."""
    return len(group) > len({row.method for row in group})


def which_rate(group: Sequence[Row]) -> str:
    """What the rate that is shown of each method may be called."""
    return "best rate" if is_sweep(group) else "rate"


def _score(row: Row) -> float:
    """The headline metric, negated if less is better; a rate that diverged is the last choice."""
    if row.diverged:
        return -math.inf
    return -row.mean["metric"] if row.metric in LOWER else row.mean["metric"]


def best_rows(group: Iterable[Row]) -> list[Row]:
    """Of each method the row of the rate with the best headline metric."""
    best: dict[str, Row] = {}
    for row in group:
        best[row.method] = max(best.get(row.method, row), row, key=_score)
    return list(best.values())


def ties(rows: Sequence[Row]) -> list[Row]:
    """The row with the best headline metric and those within one standard error of it.

    That error is the one of the two means' difference, sqrt(e1² + e2²). Of methods at their best
    rates these are the best, of one method's rates its good band; of a single row there are none.
    """
    finished = [row for row in rows if not row.diverged]
    if len(rows) < 2 or not finished:
        return []
    best = max(finished, key=_score)
    top, error = _score(best), best.error()
    return [row for row in finished if top - _score(row) <= math.hypot(error, row.error())]


def rate_text(rate: float) -> str:
    """A learning rate as it is written on the command line: 2e-3."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1)
