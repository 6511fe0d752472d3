"""The paper's GLUE table, quoted in paper.json, and our runs of exactly its set-up beside it.

The paper's baselines and set-up are LoRA-GA's (arXiv:2407.05000).
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence

from experiments.configs import CONFIGS
from experiments.finetune.grid import runs
from experiments.models import MODELS
from experiments.report.summary import Row, special
from experiments.report.tables import Table

TASKS = {"mnli": "MNLI", "sst2": "SST-2", "cola": "CoLA", "qnli": "QNLI", "mrpc": "MRPC"}
# Method -> what the paper has for each of TASKS and their average; None: no figure.
FIGURES: dict[str, list[str | None]] = json.loads(
    pathlib.Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
OURS = {
    "full fine-tuning": "full",
    "LoRA": "lora",
    "LoRA-Pro (full mode)": "lorapro-full",
    "LoRA-Pro, factored mode": "lorapro-factored",
    "LoRA-Pro, projection and AdamW": "lorapro-adamw",
}
_NOTE = """
T5-base on GLUE, rank 8, learning rate 1e-4, one epoch: accuracy in per cent, mean ± standard
deviation over three seeds. Paper: arXiv:2407.18242 (LoRA-Pro: its first version, without two
figures that could not be confirmed; LoRA's average is as printed, its figures' mean is 82.01).
Ours: `--config t5_glue --task TASK` with T5-base's weights, empty where nobody has run it.
""".strip()


def table(rows: Sequence[Row]) -> Table:
    """The paper's figures beside ours; a cell of ours is empty where nobody has run it."""
    found, lines = ours(rows), []
    for name in dict.fromkeys([*FIGURES, *OURS]):
        mine = [found.get((OURS.get(name), task)) for task in TASKS]
        figures = FIGURES.get(name, [None] * (len(TASKS) + 1))
        pairs = zip(figures, [*map(_score, mine), _average(mine)], strict=True)
        lines.append([name, *(cell or "" for pair in pairs for cell in pair)])
    names = [*TASKS.values(), "average"]
    columns = [f"{name} {whose}" for name in names for whose in ("paper", "ours")]
    return Table("The paper's table", _NOTE, ["method", *columns], lines)


def ours(rows: Sequence[Row]) -> dict[tuple[str | None, str], Row]:
    """{(method, task): row} of the rows that have the paper's set-up and nothing else."""
    command = dataclasses.replace(CONFIGS["t5_glue"], weights=MODELS["t5"].weights, seeds=(0,))
    asked = [run for task in TASKS for run in runs(dataclasses.replace(command, task=task))]
    names = {special(vars(run), "seed"): (run.method, run.task) for run in asked}
    configs = [special(row.records[0]["config"], "seed") for row in rows]
    return {names[c]: row for c, row in zip(configs, rows, strict=True) if c in names}


def _score(row: Row | None) -> str:
    if row is None:
        return ""
    if row.diverged:
        return f"{row.diverged}/{row.n} diverged"
    mean = f"{100 * row.mean['accuracy']:.2f}"
    return f"{mean}±{100 * row.std['accuracy']:.2f}" if row.n > 1 else f"{mean} (one seed)"


def _average(mine: Sequence[Row | None]) -> str:
    scores = [row.mean["accuracy"] for row in mine if row is not None and not row.diverged]
    return f"{100 * statistics.fmean(scores):.2f}" if len(scores) == len(TASKS) else ""
