"""The benchmarks' last results as the README's tables: python -m experiments.bench.tables

Reads experiments/results/bench_*.jsonl and writes between the README's speed markers. Of each file
the rows of its latest run count (one run writes all its rows with one time).
"""

import dataclasses
import json
import pathlib

import tyro

from experiments.checkpoint import write_atomic
from experiments.report import splice

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
TITLES = {
    "bench_update": "One update of T5-base's 192 adapter pairs (144 of 768 x 768, 48 of 768 x "
    "3072, r = 8, float32), parameters included. `torch` is lora-pro-adamw 0.2.1 on PyTorch "
    "2.13.0, its two modes as they come.",
    "bench_train_step": "One whole training step of MiniLM by method, 32 x 64 tokens, r = 8 on all "
    "36 linear layers.",
    "bench_adapter": "Forward and backward of a MiniLM-shaped encoder, 32 x 64 tokens, r = 8. "
    "`floor` is a backward pass without any weight's gradient, `naive` is `(x @ a) @ b` over "
    "(B, T, D).",
    "bench_compile_time": "Tracing and compiling one update by number of pairs, three shapes. "
    "`growth` is the time over that at 12 pairs.",
}


@dataclasses.dataclass(frozen=True)
class Tables:
    """Write the benchmarks' tables into the README."""

    results: pathlib.Path = pathlib.Path("experiments/results")
    """Folder of the bench_*.jsonl files."""
    readme: pathlib.Path = pathlib.Path("README.md")
    """File with the two markers."""


def latest(path: pathlib.Path) -> list[dict]:
    """The rows of a file's latest run."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["time"] == rows[-1]["time"]]


def table(rows: list[dict]) -> str:
    """The measured columns, those before the settings, as Markdown."""
    names = [name for name in rows[0] if name != "bench"]
    names = names[: names.index("config")]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|" + "---|" * len(names))
    lines += ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def cell(value) -> str:
    """A number in as many digits as it deserves; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def where(row: dict) -> str:
    """The row's birth certificate in a line."""
    device = (
        f"{row['cpu']}, {row['cpu_count']} cores" if row["platform"] == "cpu" else row["device"]
    )
    commit = (row["commit"] or "none")[:8] + (" with changes" if row["dirty"] else "")
    return f"{device}, jax {row['versions']['jax']}, commit {commit}."


def main(command: Tables) -> None:
    """Writes the section."""
    parts = []
    for name, title in TITLES.items():
        rows = latest(command.results / f"{name}.jsonl")
        script = f"`python -m experiments.bench.{name.removeprefix('bench_')}`"
        parts += [f"{title} {where(rows[0])} {script}", table(rows)]
    text = splice(command.readme.read_text(), "\n\n".join(parts), BEGIN, END)
    write_atomic(command.readme, text.encode(), "the tables")


if __name__ == "__main__":
    main(tyro.cli(Tables))
