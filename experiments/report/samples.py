"""What language models wrote, before and after: the answers to the same prompts, run by run."""

from collections.abc import Sequence
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD

SHOWN = 300  # characters of a prompt on the screen: its end


def chosen(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Of every task and model, and of runs with the same prompts, each method's first."""
    found: dict[tuple[str, ...], dict[str, dict]] = {}
    for result in results:
        if result.get("samples") and result["final"] is not None:
            config = result["config"]
            prompts = (sample["prompt"] for sample in result["samples"])
            alike = found.setdefault((config["task"], config["model"], *prompts), {})
            alike.setdefault(config["method"], result)
    return [list(alike.values()) for alike in found.values()]


def _answers(runs: Sequence[dict[str, Any]], number: int) -> dict[str, str]:
    """Who -> what it wrote, of one prompt."""
    first = runs[0]["samples"][number]
    return {"reference": first["reference"], "before": first.get("before", "")} | {
        run["config"]["method"]: run["samples"][number]["after"] for run in runs
    }


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The page samples.md."""
    parts = ["# Answers before and after"]
    for runs in chosen(results):
        config = runs[0]["config"]
        parts.append(f"## {config['task']}, {config['model']}")
        for number, sample in enumerate(runs[0]["samples"]):
            parts.append(f"### Prompt {number + 1}\n\n{_fenced(sample['prompt'])}")
            parts += [f"**{who}**\n\n{_fenced(x)}" for who, x in _answers(runs, number).items()]
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def rich_table(runs: Sequence[dict[str, Any]]) -> rich.table.Table:
    """For a terminal."""
    config = runs[0]["config"]
    shown = rich.table.Table(
        title=f"{config['task']}, {config['model']}: answers before and after",
        box=SIMPLE_HEAD,
        show_lines=True,
    )
    shown.add_column("prompt (its end)", overflow="fold", ratio=2)
    shown.add_column("answers", overflow="fold", ratio=3)
    for number, sample in enumerate(runs[0]["samples"]):
        answers = (f"{who}: {x}" for who, x in _answers(runs, number).items())
        shown.add_row(sample["prompt"][-SHOWN:], "\n".join(answers))
    return shown
