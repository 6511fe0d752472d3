"""Results to a page: python -m experiments.report writes tables and plots into docs/results.md.

Reads experiments/results/*.jsonl, one line a run. Runs that differ only in their seed are one row:
mean ± sample standard deviation over n seeds. A task has a table of its methods, each at its best
rate, and a sweep over learning rates one by rate. Last comes the paper's table, our runs beside it.
"""

import os
from pathlib import Path

import tyro

from experiments.exits import reported
from experiments.report import paper, plots
from experiments.report.summary import read, summarise
from experiments.report.tables import markdown, notes, tables
from experiments.storage import write_atomic

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def splice(text: str, section: str) -> str:
    """`text` with what stands between the two markers replaced by `section`."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected one line {BEGIN} and, after it, one line {END} in the page")
    return f"{before}{begin}\n\n{section.strip()}\n\n{end}{after}"


def write(
    results: Path = Path("experiments/results"), page: Path = Path("docs/results.md")
) -> list[Path]:
    """Writes the tables and plots of the results into a page; returns what was written.

    Args:
        results: folder of the *.jsonl files; the plots are written there.
        page: file with the two markers.
    """
    rows, text = summarise(read(results)), page.read_text()
    splice(text, "")  # a page without markers is found out before anything is written
    images = plots.draw(rows, results, prefix="finetune-")
    for old in set(results.glob("finetune-*.png")) - set(images.values()):
        old.unlink(missing_ok=True)  # of results that are gone
    links = [f"![{alt}]({os.path.relpath(path, page.parent)})" for alt, path in images.items()]
    made = [*map(markdown, tables(rows)), notes(rows), *links, markdown(paper.table(rows))]
    write_atomic(page, splice(text, "\n\n".join(made)).encode(), "the report")
    return [page, *images.values()]


@reported
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    for path in tyro.cli(write, args=argv, prog="python -m experiments.report"):
        print(f"wrote {path}")
    return 0
