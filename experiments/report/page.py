"""Results to a page: python -m experiments.report writes tables and plots into docs/results.md.

Reads experiments/results/*.jsonl, one line a run. Runs that differ only in their seed are one row:
mean ± sample standard deviation over n seeds. A sweep over learning rates has tables of its own;
of a long list its rows are left out. Last comes the paper's table with our runs of its set-up.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

import tyro

from experiments.report import paper, plots, sensitivity, tables
from experiments.report.summary import Row, read, summarise
from experiments.storage import write_atomic

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
LONG = 30  # rows; of a longer table, those that belong to a sweep are left to the JSON lines


def splice(text: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what stands between the two markers replaced by `section`."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin} and, after it, one line {end} in the page")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{section.strip()}\n\n{end}{rest.split(end)[1]}"


@dataclasses.dataclass(frozen=True)
class Report:
    """Write the table and the plots of the results into a page."""

    results: pathlib.Path = pathlib.Path("experiments/results")
    """Folder of the *.jsonl files; the plots are written there."""
    page: pathlib.Path = pathlib.Path("docs/results.md")
    """File with the two markers."""


def write(command: Report) -> list[pathlib.Path]:
    """Writes the plots, then the page; returns what was written."""
    rows = summarise(read(command.results))
    text = command.page.read_text()
    splice(text, "")  # a page without markers is found out before anything is written
    images = plots.draw(rows, command.results, prefix="finetune-")
    for old in set(command.results.glob("finetune-*.png")) - set(images.values()):
        old.unlink(missing_ok=True)  # of results that are gone
    links = [
        f"![{alt}]({os.path.relpath(image, command.page.parent)})" for alt, image in images.items()
    ]
    section = "\n\n".join([*text_of(rows), *links, paper.section(rows)])
    write_atomic(command.page, splice(text, section).encode(), "the report")
    return [command.page, *images.values()]


def text_of(rows: Sequence[Row]) -> list[str]:
    """The tables and the notes: sweeps first, then the rows, but for a long list's swept ones."""
    parts = [tables.markdown_sensitivity(table) for table in sensitivity.tables(rows)]
    swept = sensitivity.rows_of(sensitivity.sweeps(rows)) if len(rows) > LONG else []
    listed = [row for row in rows if not any(row is other for other in swept)]
    if listed:
        parts.append(tables.markdown_table(listed))
    return [*parts, tables.notes(rows, bool(listed))]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    command = tyro.cli(Report, args=argv, prog="python -m experiments.report")
    try:
        for path in write(command):
            print(f"wrote {path}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
