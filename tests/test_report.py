"""The report: means and stds against numpy, the page outside the markers untouched."""

import concurrent.futures
import dataclasses
import json
import pathlib
import re
import time

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from experiments import storage
from experiments.configs import CONFIGS
from experiments.finetune import checkpoint
from experiments.finetune import command as finetune
from experiments.finetune.config import RunConfig, runs
from experiments.models import MODELS
from experiments.report import page as report_page
from experiments.report import paper, plots, summary
from experiments.report import tables as report

FACTS = pathlib.Path(__file__).parents[2] / "shared" / "PAPER.md"
PROVENANCE = {
    "platform": "cpu",
    "cpu": "A processor",
    "cpu_count": 2,
    "device": "cpu",
    "versions": {"jax": "0.0"},
    "commit": "0123456789",
    "dirty": False,
}


def record(task="mrpc", method="lora", rate=1e-4, seed=0, accuracy=0.7, **other) -> dict:
    run = RunConfig(task=task, method=method, learning_rate=rate, seed=seed, epochs=1)
    curve = [[step, 1 / step] for step in range(1, 101)]
    return {
        "kind": "finetune",
        "config": vars(run) | other,
        "metric": "matthews" if task == "cola" else "accuracy",
        "final": {"accuracy": accuracy, "f1": 0.6, "matthews": 0.5, "loss": 0.4},
        "train_examples": 100,
        "train_examples_available": 400,
        "eval_examples": 50,
        "steps": 100,
        "examples_per_second": 10.0,
        "wall_seconds": 60.0,
        "trainable_parameters": 1234,
        "optimizer_state_bytes": 9872,
        "step_memory_bytes": 5_000_000,
        "losses": curve,
        "provenance": PROVENANCE,
    }


ACCURACIES = [0.71, 0.74, 0.72]


@pytest.fixture
def records():
    return [record(rate=1e-3, seed=i, accuracy=x) for i, x in enumerate(ACCURACIES)] + [
        record(rate=1e-4, accuracy=0.6),
        record(method="full", accuracy=0.8),
        record(task="cola", accuracy=0.9),
    ]


def test_seeds_are_summarised_by_mean_and_sample_std(records):
    row = summary.summarise(records)[0]
    assert row.n == 3
    assert row.mean["accuracy"] == pytest.approx(np.mean(ACCURACIES))
    assert row.std["accuracy"] == pytest.approx(np.std(ACCURACIES, ddof=1))
    assert row.mean["metric"] == row.mean["accuracy"]


def test_what_is_within_the_standard_error_of_the_difference_ties_with_the_best():
    spread = np.array([-0.01, 0.0, 0.01])  # standard error 0.01 / sqrt 3, of a difference 0.00816
    means = {"full": 0.80, "lora": 0.793, "lorapro-full": 0.791, "lorapro-adamw": 0.5}
    made = [
        record(method=method, seed=seed, accuracy=mean + shift)
        for method, mean in means.items()
        for seed, shift in enumerate(spread)
    ]
    assert {row.method for row in summary.leaders(_rows(made))} == {"full", "lora"}
    one_seed = [r for r in made if r["config"]["seed"] == 1]
    assert {row.method for row in summary.leaders(_rows(one_seed))} == {"full"}
    lost = [r | {"diverged": 3, "final": None} for r in one_seed]
    assert summary.leaders(_rows(lost)) == []
    assert [row.method for row in summary.leaders(_rows([lost[0], *one_seed[1:]]))] == ["lora"]


@pytest.mark.parametrize(
    ("seeds", "title", "caption", "best"),
    [
        ([0], "validation scores, one seed", "of one seed the spread is not known", "0.800*"),
        ([0, 1], "mean ± std over 2 seeds", "standard error", "0.805±0.007*"),
    ],
)
@pytest.mark.parametrize("columns", [80, 120])
def test_the_terminals_table_fits_and_says_what_it_is_of(seeds, title, caption, best, columns):
    made = [
        record(method=method, seed=seed, accuracy=0.8 + seed / 100 - place / 10)
        for place, method in enumerate(plots.STYLES)
        for seed in seeds
    ]
    console = Console(width=columns)
    with console.capture() as captured:
        console.print(report.rich_table(_rows(made)))
    text = captured.get()
    assert title in text
    assert caption in text
    assert "…" not in text
    starred = [line for line in text.splitlines() if "*" in line]
    assert [best in line for line in starred] == [True, False]  # the row, the caption
    assert ("±" in text) == (len(seeds) > 1)


def test_the_best_rate_is_chosen_by_the_headline_metric(records):
    best = {(r.task, r.method): r.learning_rate for r in summary.best_rows(_rows(records))}
    assert best == {("mrpc", "lora"): 1e-3, ("mrpc", "full"): 1e-4, ("cola", "lora"): 1e-4}


def _rows(records):
    return summary.summarise(records)


def test_the_table_states_n_and_marks_the_best_of_each_task(records):
    lines = report.markdown_table(_rows(records)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    by_key = {tuple(row[:3]): row for row in cells}
    assert by_key["mrpc", "lora", "0.001"][3:5] == ["3", "0.7233 ± 0.0153"]
    assert by_key["mrpc", "lora", "0.0001"][3:5] == ["1", "0.6000"]
    assert by_key["mrpc", "full", "0.0001"][4] == "**0.8000**"
    assert by_key["cola", "lora", "0.0001"][4:7] == ["0.9000", "0.6000", "**0.5000**"]


def test_the_notes_state_the_share_of_the_data_and_what_else_differs(records):
    text = report.notes(_rows([*records, record(rate=1e-4, accuracy=0.5, batch_size=8)]))
    assert "100 (25%) training examples, 1 epoch" in text
    assert "batch_size (32, 8)" in text
    assert "A processor, 2 cores, jax 0.0, commit 01234567" in text


def test_only_what_stands_between_the_markers_is_replaced():
    text = f"# A\n{report_page.BEGIN}\nold\n{report_page.END}\nrest\n"
    once = report_page.splice(text, "new")
    assert once.startswith("# A\n")
    assert once.endswith(f"{report_page.END}\nrest\n")
    assert "old" not in once
    assert report_page.splice(once, "new") == once


@pytest.mark.parametrize(
    "text",
    [
        "",
        report_page.BEGIN,
        f"{report_page.END}\n{report_page.BEGIN}",
        f"{report_page.BEGIN}{report_page.END}" * 2,
    ],
)
def test_a_page_without_its_markers_is_an_error(text):
    with pytest.raises(ValueError, match="results:begin"):
        report_page.splice(text, "new")


def _write(folder, records, name="a.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))


def test_the_command_writes_table_and_plots_into_the_page(tmp_path, records, capsys):
    _write(tmp_path / "results", [*records, {"kind": "bench", "anything": 1}])
    page = tmp_path / "results.md"
    page.write_text(f"# A\n\n{report_page.BEGIN}\n{report_page.END}\n\n## B\n")
    argv = ["--results", str(tmp_path / "results"), "--page", str(page)]
    assert report_page.main(argv) == 0
    text = page.read_text()
    assert "0.7233 ± 0.0153" in text
    images = re.findall(r"!\[.+\]\((.+)\)", text)
    assert len(images) == 4  # a loss and a score of each task
    for image in images:
        assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
    assert report_page.main(argv) == 0
    assert page.read_text() == text
    assert "wrote" in capsys.readouterr().out


def test_commands_that_share_a_folder_draw_in_turn_and_the_last_draws_all(tmp_path, monkeypatch):
    told = []

    def draw(rows, folder):
        told.append({row.method for row in rows})
        time.sleep(0.05)
        told.append("drawn")
        return {}

    def command(method):
        result = record(method=method)
        storage.write_json(tmp_path / method / checkpoint.RESULT, result, "a result")
        finetune.show([result], tmp_path, Console(quiet=True))

    monkeypatch.setattr(finetune, "draw", draw)
    methods = sorted(plots.STYLES)
    with concurrent.futures.ThreadPoolExecutor(len(methods)) as pool:
        list(pool.map(command, methods))
    assert told[1::2] == ["drawn"] * len(methods)
    assert told[-2] == set(methods)


def test_a_figure_says_its_question_and_names_every_line_once(tmp_path, monkeypatch):
    """No text over another, none outside the figure, at three methods of one last value."""
    seen = []

    def checked(self, *args, **kwargs):
        self.draw_without_rendering()
        texts = [*self.texts, *self.axes[0].texts]
        boxes = [Text.get_window_extent(text) for text in texts]  # without their lines
        seen.append([t.get_text() for t in self.axes[0].texts])
        for i, box in enumerate(boxes):
            assert self.bbox.x0 <= box.x0
            assert box.x1 <= self.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:i])
            assert not any(box.overlaps(ax.get_window_extent()) for ax in self.axes)

    monkeypatch.setattr(Figure, "savefig", checked)
    made = [
        record(method=method, rate=rate, seed=seed)
        for method in ("lora", "lorapro-full", "lorapro-factored")
        for rate in (1e-4, 3e-4, 1e-3)
        for seed in (0, 1)
    ]
    plots.draw(_rows(made), tmp_path)
    methods = {"lora", "lorapro-full", "lorapro-factored"}
    assert [{text.split(",")[0] for text in texts} for texts in seen] == [methods] * 3


def test_a_missing_marker_is_found_before_anything_is_written(tmp_path, records, capsys):
    _write(tmp_path / "results", records)
    (tmp_path / "results.md").write_text("# A\n")
    argv = ["--results", str(tmp_path / "results"), "--page", str(tmp_path / "results.md")]
    assert report_page.main(argv) == 2
    assert "results:begin" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["a.jsonl"]


def test_a_result_that_is_there_twice_is_an_error(tmp_path):
    _write(tmp_path, [record()])
    _write(tmp_path, [record(accuracy=0.9)], "b.jsonl")
    with pytest.raises(ValueError, match=r"b.jsonl:1 .*a.jsonl:1"):
        summary.read(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"kind": "fine', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"kind": "finetune", "final": {}}', "lacks config, metric"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(record()).encode() + b"\nnull\n[]\n" + line)
    with pytest.raises(ValueError, match=f"a.jsonl:4 {message}"):
        summary.read(tmp_path)


def test_no_result_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"experiments\.finetune"):
        summary.read(tmp_path)


def test_smoothing_keeps_a_line_and_a_constant():
    np.testing.assert_allclose(plots.smoothed(np.full(100, 3.0)), 3.0)
    line = np.arange(100.0)
    half = 100 // (2 * plots.SMOOTHED_OVER)
    np.testing.assert_allclose(plots.smoothed(line)[half:-half], line[half:-half])


def _paper_cells(records) -> dict[str, dict[str, str]]:
    head, _, *lines = paper.table(summary.summarise(records)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def _paper_runs(**changes) -> list[dict]:
    """A record of every run of the paper's set-up on its five tasks, accuracy 0.8 + seed / 100."""
    command = dataclasses.replace(CONFIGS["t5_glue"], weights=MODELS["t5"].weights, **changes)
    made = []
    for task in paper.TASKS:
        for run in runs(dataclasses.replace(command, task=task)):
            one = record(task=task, accuracy=0.8 + run.seed / 100)
            made.append(one | {"config": dataclasses.asdict(run)})
    return made


def test_the_papers_figures_stand_alone_where_nobody_has_run_its_set_up(records):
    cells = _paper_cells([*records, *_paper_runs(rank=16)])
    assert cells["LoRA"]["CoLA paper"] == "69.35±.05"
    assert cells["LoRA-Pro (full mode)"]["CoLA paper"] == ""  # could not be confirmed
    for row in cells.values():
        assert {cell for heading, cell in row.items() if heading.endswith("ours")} == {""}


def test_our_runs_of_its_set_up_stand_beside_them():
    cells = _paper_cells(_paper_runs())
    for name in paper.OURS:
        assert cells[name]["MRPC ours"] == "81.00±1.00"
        assert cells[name]["average ours"] == "81.00"
    assert cells["DoRA"]["MRPC ours"] == ""
    some = [r for r in _paper_runs(seeds=(0,)) if r["config"]["task"] != "qnli"]
    assert _paper_cells(some)["LoRA"]["MNLI ours"] == "80.00 (one seed)"
    assert _paper_cells(some)["LoRA"]["average ours"] == ""


@pytest.mark.skipif(not FACTS.exists(), reason="the paper's facts are not beside the project")
def test_the_papers_figures_are_quoted_right():
    lines = [line.strip("|").split("|") for line in FACTS.read_text().splitlines()]
    theirs = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines if line[1:]}
    theirs["LoRA-Pro (full mode)"] = theirs.pop("LoRA-Pro (v1)")
    for name, figures in paper.FIGURES.items():
        sure = [None if "(u)" in cell else cell for cell in theirs.get(name, ["(u)"] * 6)]
        assert list(figures) == sure, name
