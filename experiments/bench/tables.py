"""The benchmarks' last results as the README's tables: python -m experiments.bench.tables

Reads experiments/results/bench_*.jsonl and pod.jsonl and writes between the README's speed and pod
markers. Of a benchmark the rows of its latest run count (one run writes all its rows with one
time), of one with activations of several types the latest run of each, of `experiments.pod` the
latest row of each slice, model and mode.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import tyro

from experiments.bench import first_steps
from experiments.checkpoint import write_atomic
from experiments.report import splice

SHAPES_RATIOS = ("ratio_to_adamw", "over_copy")
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
PODS = ("llama3-8b", "t5-base", "t5-3b")  # the models that have a table
POD_BEGIN, POD_END = "<!-- pod:begin -->", "<!-- pod:end -->"
TITLES = {
    "bench_update": "One update of T5-base's 192 adapter pairs (144 of 768 x 768, 48 of 768 x "
    "3072, r = 8, float32), parameters included. `torch` is lora-pro-adamw 0.2.1 on PyTorch "
    "2.13.0, its two modes as they come; `dense floor` is one pass over full mode's moments, "
    "`dense adam` plain Adam on weights of these shapes.",
    "bench_train_step": "One whole training step of MiniLM by method, 32 x 64 tokens, r = 8 on all "
    "36 linear layers.",
    "bench_t5_step": "One whole training step of a T5 of t5-base's shapes, random weights, text to "
    "text, r = 8 on all 192 linear layers (3,244,032 parameters), by method and activations. "
    "`memory` is the compiler's figure for the step, `peak` what was measured of a process that "
    "ran nothing else (on a CPU with some 0.5 GB of Python and the compiler); compilation includes "
    "tracing, and its elapsed time whatever else the machine did.",
    "bench_adapter": "Forward and backward of a MiniLM-shaped encoder, 32 x 64 tokens, r = 8. "
    "`floor` is a backward pass without any weight's gradient, `naive` is `(x @ a) @ b` over "
    "(B, T, D).",
    "bench_accuracy": "Relative error of g~ against float64, by the factors' condition number κ, "
    "for each arithmetic of the products, damping and `solver`; median of 5 seeds, r = 8. The "
    "library always asks for float32's; tf32 and bf16, emulated, are what it is spared.",
    "bench_shapes": "One update of one layer's adapters by rank, whole steps, float32: times over "
    "those of optax.adamw, and over those of copying the least bytes that a variant must move.",
    "bench_full_pass": "Full mode's update of one pair against one pass over its two moments "
    "(`floor`), the four products that make and project g~ without any moment (`products`), and as "
    "many operations in square products (`square`).",
    "bench_gpu": "One update on a GPU. Above, full mode of one pair, everything included, against "
    "a pass that reads and writes its two moments (`floor`), with the kernel and as XLA does it in "
    "blocks; the last column is the bandwidth, of 16 m n bytes, over a copy's. Below, whole steps "
    "of T5-base's 192 pairs by the time that the device was busy; `call` is the time of a step "
    "that is waited for, mostly the host's.",
    "bench_first_steps": "||s a b - T||² / 2 from a badly conditioned start, four ranks and four "
    "sizes of b: in how many of 16 runs (of 4, dense) the loss fell in each of the first 30 steps, "
    "and the largest rise of one step over the initial loss where it did not.",
    "bench_choices": "Factored mode's choices, each against its alternative: mean training loss "
    "over all steps and validation accuracy at each rate, MiniLM on SST-2, 2,400 examples, one "
    "epoch of 32 x 64 tokens, r = 8, one seed. `reference` is the library's algorithm written out "
    "densely; `min-norm` and `symmetric` differ in one thing from `no fit`.",
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
    """The rows of a file's latest run, or of the latest for each dtype."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = {row.get("dtype"): row["time"] for row in rows}
    return [row for row in rows if row["time"] == last[row.get("dtype")]]


def table(rows: list[dict]) -> str:
    """The measured columns, those before the settings, as Markdown."""
    names = [name for name in rows[0] if name != "bench"]
    names = names[: names.index("config")]
    cells = [[cell(row[name]) for name in names] for row in rows]
    return markdown([name.replace("_", " ") for name in names], cells)


def markdown(names: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(names), *lines[1:]])


def cell(value) -> str:
    """A number in as many digits as it deserves; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def accuracy_table(rows: list[dict]) -> str:
    """Errors of `experiments.bench.accuracy` by whole decades of κ, a column for each setting."""
    columns = list(dict.fromkeys((r["arithmetic"], r["damping"], r["solver"]) for r in rows))
    errors = {(r["arithmetic"], r["damping"], r["solver"], r["kappa"]): r["error"] for r in rows}
    decades = [k for k in sorted({r["kappa"] for r in rows}) if math.log10(k).is_integer()]
    names = [f"{arithmetic}, {damping:g}: {solver}" for arithmetic, damping, solver in columns]
    cells = [[f"{k:.0e}", *(f"{errors[*c, k]:.1e}" for c in columns)] for k in decades]
    return markdown(["κ", *names], cells)


def shapes_table(rows: list[dict]) -> str:
    """Times of `experiments.bench.shapes` by model and rank, and the exponents."""
    one = [r for r in rows if r["bench"] == "shapes" and r["layers"] == r["width"] == 1]
    variants = ("adamw", "efficient", "factored", "full")
    cells = []
    for model, rank in dict.fromkeys((r["model"], r["rank"]) for r in one if r["rank"]):
        # The first is the one that was measured together with the other ranks.
        own = {r["variant"]: r for r in one[::-1] if (r["model"], r["rank"]) == (model, rank)}
        ratios = [[cell(own.get(v, {}).get(x)) for v in variants] for x in SHAPES_RATIOS]
        milliseconds = cell(1e3 * own["adamw"]["median_s"])
        cells.append([model, str(rank), milliseconds, *ratios[0][1:], *ratios[1]])
    names = [f"{v} / adamw" for v in variants[1:]] + [f"{v} / copy" for v in variants]
    made = markdown(["model", "rank", "adamw ms", *names], cells)
    slopes = [r for r in rows if r["bench"] == "shapes_exponent"]
    keys = list(dict.fromkeys((r["time_by"], r["model"]) for r in slopes))
    found = {(r["time_by"], r["model"], r["variant"]): f"{r['exponent']:.2f}" for r in slopes}
    lines = [[v, *(found.get((*key, v), "") for key in keys)] for v in variants]
    heads = ["time ~ x ** exponent", *(f"{of}, {model}" for of, model in keys)]
    return "\n\n".join([made, markdown(heads, lines)])


def gpu_table(rows: list[dict]) -> str:
    """Both parts of `experiments.bench.gpu`."""
    passes = [r for r in rows if r["bench"] == "gpu_pass"]
    (copied,) = (r["gb_s"] for r in passes if r["variant"] == "copy")
    by_pair, cells = {}, []
    for r in passes:
        if r["variant"] != "copy":
            by_pair.setdefault((r["m"], r["n"], r["rank"]), {})[r["variant"]] = r
    for (m, n, rank), own in by_pair.items():
        times = [cell(1e3 * own[v]["median_s"]) for v in ("floor", "full", "blocks")]
        ratios = [cell(own[v]["ratio_to_floor"]) for v in ("full", "blocks")]
        share = own["full"]["gb_s"] / copied
        cells.append([f"{m:,} x {n:,}", str(rank), *times, *ratios, f"{share:.0%}"])
    heads = ["floor ms", "full ms", "blocks ms", "full / floor", "blocks / floor", "of a copy's"]
    made = markdown(["pair", "rank", *heads], cells)
    updates = [r for r in rows if r["bench"] == "gpu_update"]
    cells = [
        [
            *(r["model"], str(r["rank"]), r["variant"], cell(1e3 * r["device_s"])),
            *(cell(r["device_over_adamw"]), f"{r['kernels']:.0f}", cell(1e3 * r["call_s"])),
            f"{r['state_bytes'] / 1e6:.1f}",
        ]
        for r in updates
    ]
    heads = ["model", "rank", "variant", "device ms", "/ adamw", "kernels", "call ms", "state MB"]
    return "\n\n".join([made, markdown(heads, cells)])


def t5_step_table(rows: list[dict]) -> str:
    """Times and bytes of `experiments.bench.t5_step`, in units that one can read."""
    cells = [
        [
            row["dtype"],
            f"{row['config']['batch']} x {row['config']['length']}",
            row["variant"],
            *(cell(row[name]) for name in ("median_s", "ratio_to_lora", "examples_per_s")),
            f"{row['memory_bytes'] / 1e9:.3f}",
            f"{row['memory_over_lora']:.3f}",
            cell(row["peak_bytes"] and row["peak_bytes"] / 1e9),
            *(f"{row[name] / 1e6:.1f}" for name in ("state_bytes", "trainable_bytes")),
            *(f"{row[name]:.0f}" for name in ("compile_s", "compile_cpu_s")),
        ]
        for row in rows
    ]
    times = ["median s", "/ lora", "examples/s"]
    held = ["memory GB", "/ lora", "peak GB", "state MB", "trained MB"]
    compiled = ["compile s", "compile CPU s"]
    return markdown(["activations", "batch", "variant", *times, *held, *compiled], cells)


def first_steps_table(rows: list[dict]) -> str:
    """In how many runs of `experiments.bench.first_steps` the loss fell, and the worst rise."""
    adam = [r for r in rows if r["variant"] not in ("sgd", "projection")]
    made = first_steps.overview([r | {"size": None} for r in adam])
    names = [name for name in made[0] if name != "size of b"]
    return markdown(names, [[row[name] for name in names] for row in made])


def by_rate(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(headings, cells) of `experiments.bench.choices`: a line for each variant, over the seeds."""
    rates = sorted({r["rate"] for r in rows})
    scores = {"loss": "mean_loss", "accuracy": "accuracy"}
    names = [f"{rate:g}: {what}" for rate in rates for what in scores]
    cells = []
    for variant in dict.fromkeys(r["variant"] for r in rows):
        own = [[r for r in rows if (r["variant"], r["rate"]) == (variant, x)] for x in rates]
        cells.append([variant, *(_mean(seeds, k) for seeds in own for k in scores.values())])
    return ["variant", *names], cells


def _mean(rows: list[dict], name: str) -> str:
    """Over the seeds; where some diverged, how many, in the place of the loss."""
    found = [row[name] for row in rows if row[name] is not None]
    if len(found) < len(rows):
        diverged = f"diverged ({len(rows) - len(found)} of {len(rows)})"
        return diverged if name == "mean_loss" else "–"
    return f"{sum(found) / len(found):.4f}" if found else ""


def choices_table(rows: list[dict]) -> str:
    """Mean training loss and accuracy of `experiments.bench.choices`, at each learning rate."""
    return markdown(*by_rate(rows))


def where(row: dict) -> str:
    """The row's birth certificate in a line."""
    device = (
        f"{row['cpu']}, {row['cpu_count']} cores" if row["platform"] == "cpu" else row["device"]
    )
    commit = (row["commit"] or "none")[:8] + (" with changes" if row["dirty"] else "")
    return f"{device}, jax {row['versions']['jax']}, commit {commit}."


def pod_tables(rows: list[dict], models: Sequence[str] = PODS) -> str:
    """Per model: what a chip holds and does in a whole step, and in the update alone."""
    parts = []
    for model in models:
        own = [row for row in rows if row["config"]["model"] == model]
        step, update = {}, {}  # a row has the one, the other, or both
        for row in own:
            key = row["config"]["topology"], row["variant"]
            if "flops" in row:
                step[key] = row
            if "update" in row:
                update[key] = row["update"]
        if step:
            parts += [f"**{model}**, {_sizes(own[-1])}. One whole step, per chip:"]
            parts += [_pod_steps(sorted(step.items()))]
        alone = [item for item in sorted(update.items()) if item[0][1] != "sgd"]
        if alone:
            parts += [f"**{model}**, the update alone, per chip, and its share of that step:"]
            parts += [_pod_updates(step, alone)]
    return "\n\n".join(parts)


def _sizes(row: dict) -> str:
    rank = row["config"]["rank"] or row["rank"]
    return f"{row['batch'] // row['fsdp']} x {row['length']:,} tokens a chip, rank {rank}"


def _pod_steps(found: list[tuple[tuple, dict]]) -> str:
    cells = []
    for key, row in found:
        parts = [(row["frozen_bytes"] + row["trained_bytes"]) / 1e9, row["state_bytes"] / 1e6]
        parts += [row[k] / 1e9 for k in ("temporary_bytes", "total_bytes")]
        parts += [row["flops"] / 1e12, row["memory_traffic_bytes"] / 1e9, row["sent_bytes"] / 1e9]
        cells.append([*key, *(f"{value:,.4g}" for value in parts)])
    held = ["base + factors GB", "state MB", "temporaries GB", "total GB"]
    return markdown(["slice", "mode", *held, "TFLOP", "memory traffic GB", "sent GB"], cells)


def _pod_updates(step: dict[tuple, dict], found: list[tuple[tuple, dict]]) -> str:
    """The share is left out where the mode's whole step was not compiled."""
    cells = []
    for key, row in found:
        whole = step.get(key)
        costs = {k: row[k] for k in ("flops", "memory_traffic_bytes", "sent_bytes")}
        shares = [f" ({cost / whole[k]:.4%})" if whole else "" for k, cost in costs.items()]
        amounts = (f"{cost / 1e6:,.4g}" for cost in costs.values())
        cells.append([*key, *map("".join, zip(amounts, shares, strict=True))])
    return markdown(["slice", "mode", "MFLOP", "memory traffic MB", "sent MB"], cells)


MADE_BY = {  # others: `table`
    "bench_accuracy": accuracy_table,
    "bench_choices": choices_table,
    "bench_first_steps": first_steps_table,
    "bench_gpu": gpu_table,
    "bench_shapes": shapes_table,
    "bench_t5_step": t5_step_table,
}


def main(command: Tables) -> None:
    """Writes the section."""
    parts = []
    for name, title in TITLES.items():
        rows = latest(command.results / f"{name}.jsonl")
        script = f"`python -m experiments.bench.{name.removeprefix('bench_')}`"
        birth = " ".join(dict.fromkeys(map(where, rows)))
        parts += [f"{title} {birth} {script}", MADE_BY.get(name, table)(rows)]
    text = splice(command.readme.read_text(), "\n\n".join(parts), BEGIN, END)
    pod = [json.loads(line) for line in (command.results / "pod.jsonl").read_text().splitlines()]
    text = splice(text, pod_tables(pod), POD_BEGIN, POD_END)
    write_atomic(command.readme, text.encode(), "the tables")


if __name__ == "__main__":
    main(tyro.cli(Tables))
