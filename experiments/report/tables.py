"""Rows as tables: of a task its methods, of a sweep the score by rate."""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import rich.table
from rich.box import SIMPLE

from experiments.report.summary import (
    DEFAULTS,
    Row,
    best_rows,
    groups,
    is_sweep,
    rate_text,
    ties,
    which_rate,
)

ANSWERED = ("bleu", "chrf", "exact_match")  # scores of what a language model answers
_WIDTH = 80
_SPREAD = "Mean ± standard deviation over the seeds."


class Table(NamedTuple):
    """Ready to be shown."""

    title: str
    note: str
    headings: list[str]
    lines: list[list[str]]  # a cell that ends in * is marked


def tables(rows: Sequence[Row]) -> list[Table]:
    """For each task and its settings the methods and, if it is a sweep, their scores by rate.

    A title has the settings in which the tables of its task and model differ.
    """
    found, made = groups(rows), []
    told = [json.loads(group[0].settings) for group in found]
    names = set().union(*told)
    settings = [{f"{name} {(DEFAULTS | own).get(name)}" for name in names} for own in told]
    about = [(group[0].task, group[0].model) for group in found]
    for group, mine, what in zip(found, settings, about, strict=True):
        alike = [own for own, other in zip(settings, about, strict=True) if other == what]
        title = ", ".join([*what, *sorted(mine - set.intersection(*alike))])
        made.append(_methods(title, group))
        if is_sweep(group):
            made.append(_by_rate(title, group))
    return made


def _methods(title: str, group: Sequence[Row]) -> Table:
    best, metric, lines = best_rows(group), group[0].metric, []
    marked, config = ties(best), group[0].records[0]["config"]
    answered = [name for name in ANSWERED if any(name in row.mean for row in best)]
    for row in best:
        rate, speed = "–", "–"
        if not row.diverged:
            rate, speed = rate_text(row.learning_rate), f"{row.mean['examples_per_second']:.3g}"
        said = [f"{row.mean[name]:.3g}" if row.mean else "–" for name in answered]
        state = f"{row.records[0]['optimizer_state_bytes'] / 1e6:.2f}"
        lines.append([row.method, rate, str(row.n), _score(row, marked), *said, state, speed])
    asked = [f"{name} ({config['answers']} answers)" for name in answered]
    which = which_rate(group)
    headings = ["method", which, "seeds", metric, *asked, "optimizer state (MB)", "examples/s"]
    note = f"{_data(group)} {_SPREAD} Marked: the best and what is within one standard error of it."
    return Table(f"{title}: {metric} at each method's {which}", note, headings, lines)


def _data(group: Sequence[Row]) -> str:
    record = group[0].records[0]
    used = max(r["train_examples"] for row in group for r in row.records)
    share = used / record["train_examples_available"]
    most = max(r["steps"] for row in group for r in row.records)  # one that diverged has fewer
    steps = f"{most:,} steps of {record['config']['batch_size']}"
    validated = f"validated on {record['eval_examples']:,}"
    return f"{used:,} training examples ({share:.0%}), {steps}, {validated}."


def _by_rate(title: str, group: Sequence[Row]) -> Table:
    rates, lines = sorted({row.learning_rate for row in group}), []
    for best in best_rows(group):
        mine = {row.learning_rate: row for row in group if row.method == best.method}
        band = ties(list(mine.values()))
        last = "–" if best.diverged else rate_text(best.learning_rate)
        lines.append([best.method, *(_score(mine.get(rate), band) for rate in rates), last])
    note = f"{_SPREAD} Marked: the good band, within one standard error of a method's best."
    headings = ["method", *map(rate_text, rates), "best"]
    return Table(f"{title}: {group[0].metric} by rate", note, headings, lines)


def _score(row: Row | None, marked: Sequence[Row]) -> str:
    if row is None:
        return "–"
    if row.diverged:
        return f"{row.diverged}/{row.n} diverged"
    spread = f" ± {row.std['metric']:.3f}" if row.n > 1 else ""
    return f"{row.mean['metric']:.3f}{spread}{'*' if row in marked else ''}"


def rich_table(table: Table) -> rich.table.Table:
    """For a terminal of 80 columns: wide tables show no spreads. What is marked has a star."""
    lines = [[cell.replace(" ± ", "±") for cell in line] for line in table.lines]
    note = table.note
    if sum(max(len(cell) + 1 for cell in column) for column in zip(*lines, strict=True)) > _WIDTH:
        lines = [[re.sub(r"±[\d.]+", "", cell) for cell in line] for line in lines]
        note = note.replace(_SPREAD, "Means over the seeds.")
    named = {"title": table.title, "caption": note}
    shown = rich.table.Table(**named, box=SIMPLE, padding=(0, 0, 0, 1))
    for number, heading in enumerate(table.headings):
        words = heading.replace("lorapro-", "lorapro-\n").replace(" (", "\n(")
        shown.add_column(words, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    return shown


def markdown(table: Table) -> str:
    """For a page; what is marked is bold."""
    rule = ["---", *["---:"] * (len(table.headings) - 1)]
    cells = [[f"**{c[:-1]}**" if c.endswith("*") else c for c in line] for line in table.lines]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [table.headings, rule, *cells])
    return f"**{table.title}.** {table.note}\n\n{text}"


def notes(rows: Sequence[Row]) -> str:
    """What holds for all tables, and where the numbers were measured."""
    machines = dict.fromkeys(_machine(record) for row in rows for record in row.records)
    return f"""
- Within one standard error: the gap of two means is at most √(e₁² + e₂²), e their standard errors.
  The error of one seed is not known and counts as 0.
- Rates are chosen on the validation split that is reported, which flatters every method alike.
- Measured on {"; ".join(machines)}.
""".strip()


def _machine(record: dict[str, Any]) -> str:
    p = record["provenance"]
    device = f"{p['cpu']}, {p['cpu_count']} cores" if p["platform"] == "cpu" else p["device"]
    commit = (p["commit"] or "no commit")[:8] + (" with changes" if p["dirty"] else "")
    return f"{device}, jax {p['versions']['jax']}, commit {commit}"
