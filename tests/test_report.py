"""The report: means and stds against numpy, the page outside the markers untouched."""

import concurrent.futures
import dataclasses
import json
import pathlib
import re
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from experiments import storage
from experiments.configs import CONFIGS
from experiments.finetune import checkpoint
from experiments.finetune import command as finetune
from experiments.finetune.config import RunConfig
from experiments.finetune.grid import runs
from experiments.finetune.methods import METHODS
from experiments.models import MODELS
from experiments.report import page as report_page
from experiments.report import paper, plots, summary, tables

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
    assert _tied(made) == {"full", "lora"}
    one_seed = [r for r in made if r["config"]["seed"] == 1]
    assert _tied(one_seed) == {"full"}
    lost = [r | {"diverged": 3, "final": None} for r in one_seed]
    assert _tied(lost) == set()
    assert _tied([lost[0], *one_seed[1:]]) == {"lora"}
    assert _tied(one_seed[:1]) == set()  # there is nothing to compare


def _tied(records) -> set[str]:
    return {row.method for row in summary.ties(_rows(records))}


@pytest.mark.parametrize("columns", [80, 120])
def test_the_terminals_tables_of_all_methods_fit(columns):
    records = swept(dict.fromkeys(plots.STYLES, MEANS["lora"]))
    console = Console(width=columns)
    with console.capture() as captured:
        for table in tables.tables(_rows(records)):
            console.print(tables.rich_table(table))
    assert captured.get().count("0.800±0.002*") == len(plots.STYLES)  # at its best
    assert captured.get().count("0.800* ") == len(plots.STYLES)  # by rate
    assert len(captured.get().splitlines()[0]) <= 80
    assert "…" not in captured.get()


def _rows(records):
    return summary.summarise(records)


def _cells(table: tables.Table) -> dict[str, dict[str, str]]:
    """First cell of a line -> heading -> cell."""
    return {line[0]: dict(zip(table.headings, line, strict=True)) for line in table.lines}


def test_a_task_has_a_table_of_each_methods_best_rate_by_its_headline_metric(records):
    mrpc, _, cola = tables.tables(_rows(records))
    cells = _cells(mrpc)
    assert list(cells["lora"].values()) == ["lora", "1e-3", "3", "0.723 ± 0.015", "0.01", "10"]
    assert list(cells["full"].values())[1:4] == ["1e-4", "1", "0.800*"]
    assert list(_cells(cola)["lora"].values())[:4] == ["lora", "1e-4", "1", "0.500"]
    assert "100 training examples (25%), 100 steps of 32, validated on 50" in mrpc.note


def test_a_title_states_what_else_differs(records):
    made = tables.tables(_rows([*records[:-1], record(rate=1e-4, accuracy=0.5, batch_size=8)]))
    titles = [table.title.split(":")[0] for table in made]
    assert titles == ["mrpc, minilm, batch_size 32"] * 2 + ["mrpc, minilm, batch_size 8"]


def test_the_notes_state_the_machine(records):
    assert "A processor, 2 cores, jax 0.0, commit 01234567" in tables.notes(_rows(records))


def test_markdown_has_the_marked_cells_bold():
    table = tables.Table("A", "B.", ["method", "score"], [["lora", "0.5*"], ["full", "0.4"]])
    lines = ["| method | score |", "| --- | ---: |", "| lora | **0.5** |", "| full | 0.4 |"]
    assert tables.markdown(table).splitlines() == ["**A.** B.", "", *lines]


RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
MEANS = {  # at RATES; of three seeds with std 0.002 a difference's standard error is 0.00163
    "lora": [0.60, 0.70, 0.799, 0.80, 0.79, 0.70],
    "lorapro-full": [0.70, 0.809, 0.785, 0.81, 0.805, 0.60],
    "lorapro-adamw": [0.50, 0.55, 0.60, 0.70, 0.75, 0.79],
}


def swept(means=MEANS, **other) -> list[dict]:
    return [
        record(method=method, rate=rate, seed=seed, accuracy=mean + shift, **other)
        for method, of_rates in means.items()
        for rate, mean in zip(RATES, of_rates, strict=True)
        for seed, shift in enumerate((-0.002, 0.0, 0.002))
    ]


def test_the_good_band_is_the_rates_within_one_standard_error_of_the_best():
    _, by_rate = tables.tables(_rows(swept()))
    cells = _cells(by_rate)
    assert by_rate.headings == ["method", "1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "best"]
    bands = {
        method: [rate for rate, cell in cells[method].items() if cell.endswith("*")]
        for method in MEANS
    }
    assert bands == {
        "lora": ["1e-4", "3e-4"],
        "lorapro-full": ["3e-5", "3e-4"],
        "lorapro-adamw": ["3e-3"],
    }
    assert [cells[method]["best"] for method in MEANS] == ["3e-4", "3e-4", "3e-3"]
    assert cells["lora"]["1e-5"] == "0.600 ± 0.002"


def _lost(one: dict) -> dict:
    return one | {"final": None, "diverged": 7, "reason": "the training loss is nan"}


def test_a_rate_with_a_diverged_seed_has_no_mean_and_is_not_the_best():
    at = {"method": "lora", "learning_rate": 3e-4, "seed": 1}
    records = [_lost(r) if at.items() <= r["config"].items() else r for r in swept()]
    methods, by_rate = map(_cells, tables.tables(_rows(records)))
    assert by_rate["lora"]["3e-4"] == "1/3 diverged"
    assert methods["lora"]["best rate"] == by_rate["lora"]["best"] == "1e-4"


def test_a_language_models_rate_is_chosen_by_its_loss_with_its_answers_score_beside_it():
    def of(rate, loss, bleu):
        final = {"loss": loss, "perplexity": 3.0, "bleu": bleu}
        return record("e2e", rate=rate) | {"metric": "loss", "final": final}

    made = tables.tables(_rows([of(1e-3, 1.2, 50.0), of(3e-3, 1.1, 40.0), _lost(of(1e-2, 0, 0))]))
    cells = _cells(made[0])["lora"]
    assert (cells["best rate"], cells["loss"], cells["bleu (10 answers)"]) == (
        "3e-3", "1.100", "40",
    )  # fmt: skip


def test_a_method_that_diverged_everywhere_is_in_every_table_and_plot(tmp_path):
    records = [_lost(r) if r["config"]["method"] == "lora" else r for r in swept()]
    rows = _rows(records)
    methods, by_rate = map(_cells, tables.tables(rows))
    assert list(methods["lora"].values()) == ["lora", "–", "3", "3/3 diverged", "0.01", "–"]
    assert list(by_rate["lora"].values())[1:] == ["3/3 diverged"] * len(RATES) + ["–"]
    assert len(plots.draw(rows, tmp_path)) == 3
    alone = [r for r in rows if r.method == "lora"]
    plots.draw(alone[:2], tmp_path)  # scores of nothing but runs that diverged


def test_a_curve_goes_to_the_last_step_that_all_seeds_have():
    whole, short = record(seed=0), record(seed=1)
    ax = plt.figure().add_subplot()
    plots.loss_curves(ax, _rows([whole, short | {"losses": short["losses"][:40]}]))
    assert ax.lines[0].get_xdata()[-1] == 40


def test_other_settings_are_another_sweep_and_one_rate_is_none():
    shown = [table.title for table in tables.tables(_rows([*swept(), *swept(batch_size=8)]))]
    assert [title.split(": ")[1].split()[-1] for title in shown] == ["rate"] * 4
    one_rate = [r for r in swept() if r["config"]["learning_rate"] == 1e-4]
    assert len(tables.tables(_rows(one_rate))) == 1


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
    assert "0.723 ± 0.015" in text
    images = re.findall(r"!\[.+\]\((.+)\)", text)
    assert len(images) == 4  # each task's training loss, and of the sweep two scores by rate
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
    return _cells(paper.table(_rows(records)))


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
        assert figures == sure, name


def test_every_method_has_a_colour_line_and_marker_of_its_own():
    assert set(plots.STYLES) == set(METHODS)
    for part in ("color", "ls", "marker"):
        assert len({style[part] for style in plots.STYLES.values()}) == len(METHODS)
