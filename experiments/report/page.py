"""Results to a page: python -m experiments.report writes tables and plots into docs/results.md.

Reads experiments/results/*.jsonl, one line a run. Runs that differ only in their seed are one row:
mean ± sample standard deviation over n seeds. A sweep over learning rates has tables of its own;
among the rows is each method's best rate. Last comes the paper's table, our runs beside it.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

import tyro

from experiments.report import paper, plots, sensitivity, tables
from experiments.report.summary import Row, best_rows, read, summarise
from experiments.storage import write_atomic

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


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
    """The tables of the sweeps, the rows (of a sweep, each method's best), and the notes."""
    parts = [tables.markdown_sensitivity(table) for table in sensitivity.tables(rows)]
    swept, best = sensitivity.rows_of(sensitivity.sweeps(rows)), best_rows(rows)
    listed = [row for row in rows if row not in swept or row in best]
    return [*parts, tables.markdown_table(listed), tables.notes(rows)]


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
