"""The rows of a summary as tables: for a terminal, and as Markdown with notes below them."""

from collections.abc import Iterable, Sequence
from typing import Any

import rich.box
import rich.table

from experiments.report import sensitivity
from experiments.report.summary import SCORES, Row, best_rows, spread

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
    "task",
    "method",
    "learning rate",
    "n",
    "accuracy",
    "F1",
    "Matthews",
    "loss",
    "trained parameters",
    "optimizer state (MB)",
    "step memory (MB)",
    "examples/s",
    "time (s)",
]
_STEP_MEMORY = _HEADINGS.index("step memory (MB)")


def rich_table(rows: Sequence[Row]) -> rich.table.Table:
    """The rows for a terminal: short headings, the best rate of every method in bold."""
    about = ", ".join(_unique(f"{row.model} on {row.task}" for row in rows))
    table = rich.table.Table(
        title=f"{about}: validation scores, mean ± std over n seeds",
        box=rich.box.SIMPLE,
        padding=(0, 0, 0, 1),
    )
    table.add_column("method", no_wrap=True)
    headings = ("rate", "n", "accuracy", "F1", "Matthews", "loss", "trained", "state MB", "ex./s")
    for heading in (*headings, "s"):
        table.add_column(heading, justify="right")
    best = best_rows(rows)
    several = len(best) < len(rows)
    for row in rows:
        cells = [cell.replace(" ± ", "±") for cell in _cells(row, digits=3)[1:]]
        del cells[_STEP_MEMORY - 1]
        bold = several and any(row is other for other in best)
        table.add_row(*cells, style="bold" if bold else None)
    return table


def rich_sensitivity(made: sensitivity.Table) -> rich.table.Table:
    """One of a sweep's tables for a terminal."""
    table = rich.table.Table(
        title=made.title, caption=made.note, box=rich.box.SIMPLE, padding=(0, 0, 0, 1)
    )
    for number, heading in enumerate(made.headings):
        justify = "right" if number else "left"
        table.add_column(heading.replace(" ", "\n"), justify=justify, no_wrap=True)
    for cells in made.cells:
        # What is long is broken here, lest rich cut the numbers.
        short = [cell.replace(" ± 0.", "±.").replace(" (", "\n(") for cell in cells]
        table.add_row(*(cell.replace(" − ", "\n− ") for cell in short))
    return table


def markdown_sensitivity(made: sensitivity.Table) -> str:
    """One of a sweep's tables as Markdown."""
    escaped = [[cell.replace("*", "\\*") for cell in cells] for cells in made.cells]
    lines = ["| " + " | ".join(cells) + " |" for cells in (made.headings, *escaped)]
    rule = "|---|" + "---:|" * (len(made.headings) - 1)
    return f"**{made.title}.** {made.note}\n\n" + "\n".join([lines[0], rule, *lines[1:]])


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, the best rate's headline metric of every method in bold."""
    best = best_rows(rows)
    lines = ["| " + " | ".join(_HEADINGS) + " |"]
    lines.append("|" + "---|" * 2 + "---:|" * (len(_HEADINGS) - 2))
    for row in sorted(rows, key=lambda row: (row.task, row.model)):
        cells = _cells(row)
        if any(row is other for other in best):
            place = 4 + SCORES.index(row.metric)
            cells[place] = f"**{cells[place]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(rows: Sequence[Row], listed: bool = True) -> str:
    """What the numbers are of: data, epochs, machines, versions; `listed`: there is a table."""
    lines = []
    for task, model in sorted({(row.task, row.model) for row in rows}):
        mine = [r for row in rows if (row.task, row.model) == (task, model) for r in row.records]
        lines.append(f"- {task}, {model}: {'; '.join(_unique(map(_data, mine)))}.")
    records = [record for row in rows for record in row.records]
    about_table = [
        "- Bold: each method's learning rate with the highest headline metric (accuracy; "
        "Matthews where the task's own is that). It is chosen on the validation split that is "
        "reported, so it flatters every method alike.",
        "- ± is the sample standard deviation over n seeds. Step memory is that of the largest "
        "compiled step: parameters, optimizer state, batch and temporaries.",
    ]
    lines += about_table if listed else []
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
