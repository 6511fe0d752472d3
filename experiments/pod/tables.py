"""The results of `experiments.pod` as Markdown: python -m experiments.pod.tables FILE.jsonl

Per model, what a chip holds and does in a whole step, and in the update alone. Of each slice, model
and mode the last row of the file counts.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

Key = tuple[str, str]  # topology, mode


def tables(rows: Sequence[dict]) -> str:
    """All tables; a model's sizes are those of its last row."""
    parts = []
    for model in dict.fromkeys(row["config"]["model"] for row in rows):
        own = [row for row in rows if row["config"]["model"] == model]
        steps, updates = {}, {}  # a row has the one, the other, or both
        for row in own:
            key = row["config"]["topology"], row["variant"]
            if "flops" in row:
                steps[key] = row
            if "update" in row and row["variant"] != "sgd":
                updates[key] = row["update"]
        if steps:
            parts += [f"**{model}**, {_sizes(own[-1])}. One whole step, per chip:", _steps(steps)]
        if updates:
            parts += [f"**{model}**, the update alone, per chip, and its share of that step:"]
            parts += [_updates(steps, updates)]
    return "\n\n".join(parts)


def _sizes(row: dict) -> str:
    rank = row["config"]["rank"] or row["rank"]
    return f"{row['batch'] // row['fsdp']} x {row['length']:,} tokens a chip, rank {rank}"


def _steps(steps: dict[Key, dict]) -> str:
    cells = []
    for key, row in sorted(steps.items()):
        parts = [(row["frozen_bytes"] + row["trained_bytes"]) / 1e9, row["state_bytes"] / 1e6]
        parts += [row[k] / 1e9 for k in ("temporary_bytes", "total_bytes")]
        parts += [row["flops"] / 1e12, row["memory_traffic_bytes"] / 1e9, row["sent_bytes"] / 1e9]
        cells.append([*key, *(f"{value:,.4g}" for value in parts)])
    held = ["base + factors GB", "state MB", "temporaries GB", "total GB"]
    return _markdown(["slice", "mode", *held, "TFLOP", "memory traffic GB", "sent GB"], cells)


def _updates(steps: dict[Key, dict], updates: dict[Key, dict]) -> str:
    """The share is left out where the mode's whole step was not compiled."""
    cells = []
    for key, row in sorted(updates.items()):
        whole = steps.get(key)
        costs = {k: row[k] for k in ("flops", "memory_traffic_bytes", "sent_bytes")}
        shares = [f" ({cost / whole[k]:.4%})" if whole else "" for k, cost in costs.items()]
        amounts = (f"{cost / 1e6:,.4g}" for cost in costs.values())
        cells.append([*key, *map("".join, zip(amounts, shares, strict=True))])
    return _markdown(["slice", "mode", "MFLOP", "memory traffic MB", "sent MB"], cells)


def _markdown(names: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(names), *lines[1:]])


if __name__ == "__main__":
    text = pathlib.Path(sys.argv[1]).read_text()
    print(tables([json.loads(line) for line in text.splitlines()]))
