"""The bench of T5-base's training step, on a T5 small enough to run, and the table it fills."""

import dataclasses
import json
import os

import pytest

from experiments.bench import t5_step, tables
from experiments.bench.update import SHAPES

TINY = t5_step.Settings(
    rounds=1, batch=2, length=8, model="t5-tiny", methods=("full", "lora"), dtypes=("float32",)
)


def test_t5_bases_adapters_are_those_of_its_192_linears():
    assert t5_step.SHAPES["t5-base"].adapters == 8 * sum(m + n for m, n in SHAPES.values())


def test_each_item_has_a_new_process(tmp_path):
    ids = t5_step.in_new_processes(_process, [1, 2], 3, cache=str(tmp_path))
    assert [sums for sums, _ in ids] == [4, 5]
    assert len({os.getpid(), *(process for _, process in ids)}) == 3


def _process(x: int, y: int) -> tuple[int, int]:
    return x + y, os.getpid()


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """What the bench writes about two methods, all in this process."""
    results = tmp_path_factory.mktemp("bench") / "bench_t5_step.jsonl"
    make, made = t5_step.variant, {}

    def variant(run, *rest):  # compiled once, for its own process and for the turns
        made[run] = made.get(run) or make(run, *rest)
        return made[run]

    def here(function, items, *args, **_):
        return [function(item, *args) for item in items]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t5_step, "in_new_processes", here)
        patch.setattr(t5_step, "_compile_into", lambda folder: None)
        patch.setattr(t5_step, "variant", variant)
        t5_step.main(dataclasses.replace(TINY, results=results))
    return tables.latest(results)


def test_the_costs_of_full_fine_tuning_and_of_lora(rows):
    full, lora = rows
    assert [row["variant"] for row in rows] == ["full", "lora"]
    assert lora["trainable_bytes"] == 4 * t5_step.SHAPES["t5-tiny"].adapters
    for row in rows:
        assert row["state_bytes"] == 2 * row["trainable_bytes"]  # Adam's moments
        assert row["memory_bytes"] > row["state_bytes"] + full["trainable_bytes"]
        assert row["examples_per_s"] == pytest.approx(2 / row["median_s"])
        assert row["compile_s"] > 0
    assert lora["memory_over_lora"] == lora["ratio_to_lora"] == 1
    assert full["memory_over_lora"] > 1


def test_the_table_has_the_latest_row_of_each_dtype(rows, tmp_path):
    older = [row | {"time": "2000-01-01T00:00:00+00:00", "dtype": dtype} for row in rows
             for dtype in ("float32", "bfloat16")]  # fmt: skip
    written = tmp_path / "a.jsonl"
    written.write_text("".join(json.dumps(row) + "\n" for row in [*older, *rows]))
    made = tables.t5_step_table(tables.latest(written))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in made.splitlines()]
    assert [line[:3] for line in lines[2:]] == [
        ["bfloat16", "2 x 8", "full"],
        ["bfloat16", "2 x 8", "lora"],
        ["float32", "2 x 8", "full"],
        ["float32", "2 x 8", "lora"],
    ]
    assert lines[-1][7] == "1.000"  # LoRA's memory over LoRA's
