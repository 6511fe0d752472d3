"""The paper's GLUE table, and our runs of exactly its set-up beside it.

`_ABOUT` says what it holds. The paper's baselines and set-up are LoRA-GA's (arXiv:2407.05000).
"""

import dataclasses
import statistics
from collections.abc import Sequence

from experiments.configs import CONFIGS
from experiments.finetune.config import runs
from experiments.models import MODELS
from experiments.report.summary import Row

TASKS = {"mnli": "MNLI", "sst2": "SST-2", "cola": "CoLA", "qnli": "QNLI", "mrpc": "MRPC"}

# Method -> what the paper has for each of TASKS and their average; None: no figure.
FIGURES: dict[str, tuple[str | None, ...]] = {
    "full fine-tuning": ("86.33±.00", "94.75±.21", "80.70±.24", "93.19±.22", "84.56±.73", "87.91"),
    "LoRA": ("85.30±.04", "94.04±.11", "69.35±.05", "92.96±.09", "68.38±.01", "82.08"),
    "PiSSA": ("85.75±.07", "94.07±.06", "74.27±.39", "93.15±.14", "76.31±.51", "84.71"),
    "rsLoRA": ("85.73±.10", "94.19±.23", "72.32±1.12", "93.12±.09", "52.86±2.27", "79.64"),
    "LoRA+": ("85.81±.09", "93.85±.24", "77.53±.20", "93.14±.03", "74.43±1.39", "84.95"),
    "DoRA": ("85.67±.09", "94.04±.53", "72.04±.94", "93.04±.06", "68.08±.51", "82.57"),
    "AdaLoRA": ("85.45±.11", "93.69±.20", "69.16±.24", "91.66±.05", "68.14±.28", "81.62"),
    "LoRA-GA": ("85.70±.09", "94.11±.18", "80.57±.20", "93.18±.06", "85.29±.24", "87.77"),
    "LoRA-Pro (full mode)": ("86.92", "94.46", None, None, "87.50", "88.80"),
    "LoRA-Pro, factored mode": (None,) * 6,
    "LoRA-Pro, projection and AdamW": (None,) * 6,
}
OURS = {
    "full fine-tuning": "full",
    "LoRA": "lora",
    "LoRA-Pro (full mode)": "lorapro-full",
    "LoRA-Pro, factored mode": "lorapro-factored",
    "LoRA-Pro, projection and AdamW": "lorapro-adamw",
}


def ours(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """{(method, task): row} of the rows that have the paper's set-up and nothing else."""
    command = dataclasses.replace(CONFIGS["t5_glue"], weights=MODELS["t5"].weights)
    found = {}
    for task in TASKS:
        for run in runs(dataclasses.replace(command, task=task, seeds=(0,))):
            asked = {k: v for k, v in dataclasses.asdict(run).items() if k != "seed"}
            for row in rows:
                config = row.records[0]["config"]
                if {k: v for k, v in config.items() if k != "seed"} == asked:
                    found[run.method, task] = row
    return found


def table(rows: Sequence[Row]) -> str:
    """The table as Markdown; a cell of ours is empty where nobody has run it."""
    found = ours(rows)
    headings = [*(f"{name} {whose}" for name in TASKS.values() for whose in ("paper", "ours"))]
    headings = ["method", *headings, "average paper", "average ours"]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for name, figures in FIGURES.items():
        mine = [found.get((OURS.get(name, ""), task)) for task in TASKS]
        cells = [name]
        for figure, row in zip(figures, mine, strict=False):
            cells += [figure or "", "" if row is None else _score(row)]
        scores = [row.mean["accuracy"] for row in mine if row is not None and not row.diverged]
        average = f"{100 * statistics.fmean(scores):.2f}" if len(scores) == len(TASKS) else ""
        lines.append("| " + " | ".join([*cells, figures[-1] or "", average]) + " |")
    return "\n".join(lines)


def _score(row: Row) -> str:
    if row.diverged:
        return f"diverged ({row.diverged} of {row.n})"
    mean = f"{100 * row.mean['accuracy']:.2f}"
    return f"{mean}±{100 * row.std['accuracy']:.2f}" if row.n > 1 else f"{mean} (one seed)"


_ABOUT = """
### The paper's table

T5-base on GLUE, rank 8, learning rate 1e-4, one epoch: accuracy in per cent, mean ± standard
deviation over three seeds. The columns "paper" quote Wang et al., arXiv:2407.18242 (LoRA-Pro's: its
first version; two figures that could not be confirmed are left out; LoRA's average is as printed,
the mean of its figures is 82.01). The columns "ours" are runs of `--config t5_glue --task TASK`,
empty where nobody has made them: they need T5-base's weights and an accelerator.
"""


def section(rows: Sequence[Row]) -> str:
    """The table under a heading, with what it is of."""
    return f"{_ABOUT.strip()}\n\n{table(rows)}"
