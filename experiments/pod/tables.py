"""The results of `experiments.pod` as tables: python -m experiments.pod.tables FILE.jsonl

Per model, what a chip holds and does in a whole step, and in the update alone. Of each slice, model
and mode the last row of the file counts. On a terminal they are drawn, from the file in Markdown.
"""

import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

Row = dict[str, Any]


def tables(rows: Sequence[Row], box: rich.box.Box = rich.box.SIMPLE) -> Iterator[rich.table.Table]:
    """Two tables for each model; one where only updates were compiled."""
    for model in dict.fromkeys(row["config"]["model"] for row in rows):
        latest = {
            (row["config"]["topology"], row["variant"]): row
            for row in rows
            if row["config"]["model"] == model
        }
        last = list(latest.values())[-1]
        title = (
            f"{model}, {last['batch'] // last['fsdp']} x {last['length']:,} tokens a chip along "
            f"fsdp, rank {last['rank']}"
        )
        steps = [[*key, *_step(row)] for key, row in sorted(latest.items()) if "fits" in row]
        if steps:
            yield _table(
                f"{title}: one step, per chip", steps, box,
                "slice", "mode", "base GB", "factors MB", "state MB", "temporaries GB", "total GB",
                "fits", "Mcycles", "sent GB", "compile s",
            )  # fmt: skip
        yield _table(
            f"{title}: the update compiled alone, per chip, and its share of that step",
            [[*key, *_update(row)] for key, row in sorted(latest.items())], box,
            "slice", "mode", "Mcycles", "sent MB", "temporaries MB", "state MB", "compile s",
        )  # fmt: skip


def _step(row: Row) -> list[str]:
    held = _scaled(
        row, ("frozen_bytes", 1e9), ("trained_bytes", 1e6), ("state_bytes", 1e6),
        ("temporary_bytes", 1e9), ("total_bytes", 1e9),
    )  # fmt: skip
    fits = "yes" if row["fits"] else f"no: {row.get('compiler_says', 'over the memory')}"
    return [*held, fits, *_scaled(row, ("cycles", 1e6), ("sent_bytes", 1e9), ("compile_s", 1.0))]


def _update(row: Row) -> list[str]:
    update = row["update"]
    parts = []
    for name in ("cycles", "sent_bytes", "temporary_bytes"):
        share = f" ({update[name] / row[name]:.3%})" if row.get(name) else ""
        parts.append(f"{update[name] / 1e6:.4g}{share}")
    return [*parts, *_scaled(update, ("state_bytes", 1e6), ("compile_s", 1.0))]


def _scaled(row: Row, *fields: tuple[str, float]) -> list[str]:
    return [f"{row[name] / unit:.4g}" if name in row else "-" for name, unit in fields]


def _table(title: str, rows: list[list[str]], box: rich.box.Box, *headings: str):
    made = rich.table.Table(title=title, box=box)
    for heading in headings:
        made.add_column(heading, justify="left" if heading in ("slice", "mode") else "right")
    for row in rows:
        made.add_row(*row)
    return made


if __name__ == "__main__":
    lines = pathlib.Path(sys.argv[1]).read_text().splitlines()
    for table in tables([json.loads(line) for line in lines], rich.box.MARKDOWN):
        rich.console.Console(width=200).print(table)
