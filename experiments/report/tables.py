"""The rows of a summary as tables: for a terminal, and as Markdown with notes below them."""

from collections.abc import Iterable, Sequence
from typing import Any

import rich.box
import rich.table

from experiments.report import sensitivity
from experiments.report.summary import SCORES, Row, leaders, over_seeds, spread

# What has a column, a row or a note of its own; the rest is noted where rows differ in it.
_SHOWN = {"task", "model", "method", "learning_rate", "seed", "epochs", "train_examples"}


def _cells(row: Row, digits: int = 4) -> list[str]:
    record = row.records[0]
    return [
        row.task,
        row.method,
        f"{row.learning_rate:g}",
        str(row.n),
        *(spread(row, name, digits) for name in SCORES),
        f"{record['trainable_parameters']:,}",
        f"{record['optimizer_state_bytes'] / 1e6:.2f}",
        f"{record['step_memory_bytes'] / 1e6:.0f}",
        *(
            "–" if row.diverged else f"{row.mean[name]:.0f}"
            for name in ("examples_per_second", "wall_seconds")
        ),
    ]


_HEADINGS = [
    "task", "method", "learning rate", "n", "accuracy", "F1", "Matthews", "loss",
    "trained parameters", "optimizer state (MB)", "step memory (MB)", "examples/s", "time (s)",
]  # fmt: skip
_HEADING = dict(zip(SCORES, _HEADINGS[4:], strict=False))
_BEST_OF_ONE = "the best; of one seed the spread is not known"
_BEST = "the best, and what is within a standard error of the difference to it"


def rich_table(rows: Sequence[Row]) -> rich.table.Table:
    """The rows of one task for a terminal of 80 columns; the best and its ties have a star."""
    about = ", ".join(_unique(f"{row.model} on {row.task}" for row in rows))
    several = any(row.n > 1 for row in rows)
    spreads = "mean ± std over " if several else ""
    table = rich.table.Table(
        title=f"{about}: validation scores, {spreads}{over_seeds(rows)}",
        box=rich.box.SIMPLE,
        padding=(0, 0, 0, 1),
    )
    table.add_column("method", no_wrap=True)
    metric, best = rows[0].metric, leaders(rows) if len(rows) > 1 else []
    table.caption = f"* {_BEST if several else _BEST_OF_ONE}" if best else None
    shown = ["learning rate", _HEADING[metric], "loss", "optimizer state (MB)", "examples/s"]
    short = ["rate", metric, "loss", "state MB", "ex./s"]
    if len({row.n for row in rows}) > 1:
        shown, short = ["n", *shown], ["n", *short]
    for heading in short:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = dict(zip(_HEADINGS, _cells(row, digits=3), strict=True))
        leads = row in best
        cells[_HEADING[metric]] += "*" if leads else " " if best else ""
        texts = [cells[name].replace(" ± ", "±") for name in shown]
        table.add_row(row.method, *texts, style="bold" if leads else None)
    return table


def rich_sensitivity(made: sensitivity.Table) -> rich.table.Table:
    """One of a sweep's tables for a terminal of 80 columns: a method a column, a rate a row."""
    table = rich.table.Table(
        title=made.title, caption=made.note, box=rich.box.SIMPLE, padding=(0, 0, 0, 1)
    )
    first, *lines = zip(made.headings, *made.cells, strict=True)
    for number, heading in enumerate(first):
        words = heading.replace(" − ", " −\n").replace("lorapro-", "lorapro-\n").replace(": ", "\n")
        table.add_column(words, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(cell.replace(" ± ", "±").replace(" (", "\n(") for cell in line))
    return table


def markdown_sensitivity(made: sensitivity.Table) -> str:
    """One of a sweep's tables as Markdown, a method a column, a rate a row."""
    columns = zip(made.headings, *made.cells, strict=True)
    lines = ["| " + " | ".join(cells).replace("*", "\\*") + " |" for cells in columns]
    rule = "|---|" + "---:|" * len(made.cells)
    return f"**{made.title}.** {made.note}\n\n" + "\n".join([lines[0], rule, *lines[1:]])


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, the headline metric of the best and of its ties in bold."""
    best = leaders(rows)
    lines = ["| " + " | ".join(_HEADINGS) + " |"]
    lines.append("|" + "---|" * 2 + "---:|" * (len(_HEADINGS) - 2))
    for row in sorted(rows, key=lambda row: (row.task, row.model)):
        cells = _cells(row)
        if row in best:
            place = _HEADINGS.index(_HEADING[row.metric])
            cells[place] = f"**{cells[place]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(rows: Sequence[Row]) -> str:
    """What the numbers are of: data, epochs, machines, versions."""
    lines = []
    for task, model in sorted({(row.task, row.model) for row in rows}):
        mine = [r for row in rows if (row.task, row.model) == (task, model) for r in row.records]
        lines.append(f"- {task}, {model}: {'; '.join(_unique(map(_data, mine)))}.")
    records = [record for row in rows for record in row.records]
    lines += [
        f"- Bold: of each task and its settings {_BEST} (with one seed the spread is not known "
        "and counts as 0). Rates are chosen on the validation split that is reported, which "
        "flatters every method alike.",
        "- ± is the sample standard deviation over n seeds; without it there is one seed. Step "
        "memory is that of the largest compiled step: parameters, optimizer state, batch and "
        "temporaries.",
    ]
    lines.append(f"- Measured on {'; '.join(_unique(map(_machine, records)))}.")
    if others := _other_differences(records):
        lines.append(f"- The rows also differ in {', '.join(others)}.")
    return "\n".join(lines)


def _data(record: dict[str, Any]) -> str:
    used, available = record["train_examples"], record["train_examples_available"]
    epochs = record["config"]["epochs"]
    share = f"all {used:,}" if used == available else f"{used:,} ({used / available:.0%})"
    return (
        f"{share} training examples, {epochs} epoch{'s' if epochs > 1 else ''}, "
        f"{record['steps']:,} steps of {record['config']['batch_size']}, validated on "
        f"{record['eval_examples']:,}; headline {record['metric']}"
    )


def _machine(record: dict[str, Any]) -> str:
    p = record["provenance"]
    device = p["cpu"] if p["platform"] == "cpu" else p["device"]
    cores = f", {p['cpu_count']} cores" if p["platform"] == "cpu" else ""
    commit = (p["commit"] or "no commit")[:8] + (" with changes" if p["dirty"] else "")
    return f"{device}{cores}, jax {p['versions']['jax']}, commit {commit}"


def _other_differences(records: list[dict[str, Any]]) -> list[str]:
    """What else the rows were made with; a row from before there was an option says nothing."""
    configs = [record["config"] for record in records]
    names = _unique(name for config in configs for name in config if name not in _SHOWN)
    values = {name: _unique(str(c[name]) for c in configs if name in c) for name in names}
    return [f"{name} ({', '.join(found)})" for name, found in values.items() if len(found) > 1]


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
