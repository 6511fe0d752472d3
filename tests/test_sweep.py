"""Runs trained together leave what `experiments.finetune` leaves of them, one after the other."""

import json

import jax
import numpy as np
import pytest
from test_finetune import run_config, tiny, two_pairs
from test_programs import compilations

from experiments.data.batching import joined
from experiments.finetune import command as finetune
from experiments.finetune import prepare
from experiments.sweep import command as sweep
from experiments.sweep import together

# LoRA's batches are of two lengths, often not the same for both seeds, and two of its runs diverge.
# Factored mode's last batch is half full, and its runs are trained in two groups.
LENGTHS = {"max_length": 48, "batch_size": 4, "train_examples": 36}
FLAGS = {
    "lora": {"learning_rates": "1e-3,1e38", **LENGTHS},
    "lorapro-factored": {"learning_rates": "1e-4,1e-3", "train_examples": 36},
}
GROUPS = {"lora": [], "lorapro-factored": ["--at-once", "3"]}
ALONE = (  # runs that are made one by one too
    ("lora", {"learning_rates": "1e-3"}),
    ("lora", {"learning_rates": "1e38", "seeds": "1"}),
    ("lorapro-factored", {"learning_rates": "1e-3", "seeds": "1"}),
)
TOGETHER = {"lora": 4, "lorapro-factored": 2}


def flags(out, method: str, **changes) -> list[str]:
    return tiny(out, **{"methods": method, "epochs": 2, "seeds": "0,1"} | FLAGS[method] | changes)


def records(out) -> dict[tuple, dict]:
    """(method, rate, seed) -> result, of all that are in results.jsonl."""
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    names = ("method", "learning_rate", "seed")
    return {tuple(record["config"][name] for name in names): record for record in found}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of a sweep, that of its runs made one by one, and what the sweep compiled."""
    out = tmp_path_factory.mktemp("sweep")
    with two_pairs() as patched:
        patched.setattr(prepare, "COMPILATION", 0)  # a length for every bucket
        patched.setattr(together, "STEPS", 4)
        patched.setattr(finetune, "draw", lambda *args: {})
        with compilations() as counts:
            for method, groups in GROUPS.items():
                assert sweep.main([*flags(out / "together", method), *groups]) == (method == "lora")
        for method, changes in ALONE:
            lost = changes["learning_rates"] == "1e38"
            assert finetune.main(flags(out / "alone", method, **changes)) == lost
    return out / "together", out / "alone", counts


def assert_equal_runs(mine: dict, truth: dict) -> None:
    """The same but for rounding, times and memory."""
    assert mine.keys() == (truth.keys() | {"together"}) - {"checkpoint"}
    measured = {"losses", "evaluations", "final", "examples_per_second", "wall_seconds", "seconds"}
    process = {"step_memory_bytes", "provenance", "checkpoint"}
    for name in truth.keys() - measured - process:
        assert mine[name] == truth[name], name
    assert len(mine["losses"]) == len(truth["losses"])
    for ours, theirs in zip(mine["losses"], truth["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for ours, theirs in zip(mine["evaluations"], truth["evaluations"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ends = (
        {k: v for k, v in mine["evaluations"][-1].items() if k != "step"} if mine["final"] else None
    )
    assert mine["final"] == ends


@pytest.mark.slow
@pytest.mark.parametrize("method", FLAGS)
def test_runs_trained_together_end_as_alone(both, method):
    mine, truth = map(records, both[:2])
    compared = [run for run in truth if run[0] == method]
    assert len(compared) == {"lora": 3, "lorapro-factored": 1}[method]
    for run in compared:
        assert_equal_runs(mine[run], truth[run])
    together = [record for run, record in mine.items() if run[0] == method]
    assert [record["together"] for record in together] == 4 * [TOGETHER[method]]
    assert len({json.dumps(record["losses"]) for record in together}) == 4


@pytest.mark.slow
def test_a_run_that_diverged_ends_there_and_its_neighbours_go_on(both):
    mine = records(both[0])
    for seed in (0, 1):
        lost, neighbour = (mine["lora", rate, seed] for rate in (1e38, 1e-3))
        assert 1 < lost["diverged"] < 18
        assert lost["final"] is None
        assert lost["steps"] == len(lost["losses"]) == lost["diverged"] - 1
        assert len(lost["batch_ids"]) == 4
        assert neighbour["steps"] == 18
        assert "diverged" not in neighbour


@pytest.mark.slow
def test_the_seconds_are_those_of_all_runs_and_the_examples_those_of_one(both):
    for (method, rate, _), record in records(both[0]).items():
        if method == "lorapro-factored":
            examples = 2 * 36 / record["seconds"]["train"]
            assert record["examples_per_second"] == pytest.approx(examples)
        elif rate < 1:
            assert set(record["seconds"]) == {"train", "compile", "evaluate"}


@pytest.mark.slow
def test_a_method_is_compiled_once_per_length(both):
    _, _, counts = both
    assert counts["jit(steps)"] == 2 + 1  # LoRA's two lengths; factored mode's one, of two groups


@pytest.mark.slow
def test_what_is_there_is_only_reported(both, capsys, monkeypatch):
    out = both[0]
    before = {path: path.read_bytes() for path in out.glob("*/*.json")}
    assert len(before) == 2 * 8
    for module in ("sweep.command", "finetune.run"):
        monkeypatch.setattr(f"experiments.{module}.load_data", None)
    for main in (sweep.main, finetune.main):
        for method in FLAGS:
            assert main(flags(out, method)) == (method == "lora")
            assert (out / "pydoc-tiny-loss.png").exists()
        shown = capsys.readouterr()
        assert shown.err.count("result.json has the ids of the step's examples") == 2
    assert before == {path: path.read_bytes() for path in out.glob("*/*.json")}


def test_only_the_runs_that_are_missing_are_made(tmp_path, monkeypatch):
    made = []
    result = {"config": {}, "final": {}}
    monkeypatch.setattr(
        sweep, "trained", lambda runs, *rest: made.extend(runs) or [result] * len(runs)
    )
    monkeypatch.setattr(sweep, "show", lambda *args: None)
    for seeds in ("0", "0,1"):
        asked = tiny(tmp_path, methods="full,lora", learning_rates="1e-3,1e-2", seeds=seeds)
        assert sweep.main(asked) == 0
    assert len(made) == len(set(made)) == 8


def rows_of_all_lengths(seed):
    """36 rows of random tokens: Python's own prose has few short ones."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(5, 90, n) for n in rng.integers(4, 49, 36)]
    return joined(tokens, list(map(np.zeros_like, tokens)), [0] * 36, range(36), 0)


def test_stretches_are_equally_long_and_of_one_epoch(monkeypatch):
    monkeypatch.setattr(prepare, "COMPILATION", 0)
    runs = [run_config(seed=seed, epochs=2, **LENGTHS) for seed in (0, 1)]
    data = [prepare.Data(*[rows_of_all_lengths(run.seed)] * 2, 36) for run in runs]
    setups = [prepare.build(*built)[0] for built in zip(runs, data, strict=True)]
    done, counts, lengths = 0, [], set()
    for first, stretch in together._stretches(setups, 3):
        assert first == done
        assert first // 9 == (first + len(stretch) - 1) // 9
        stacked = together._stacked(stretch, 3)
        for name, x in stacked.items():
            for i, seed in np.ndindex(3, 2):
                if i >= len(stretch):
                    assert not x[i].any()
                    continue
                truth = setups[seed].batches[first + i][name]
                kept = tuple(map(slice, truth.shape))
                np.testing.assert_array_equal(x[i, seed][kept], truth)
                assert x[i, seed].sum() == truth.sum()
        done += len(stretch)
        counts.append(len(stretch))
        lengths.add(stacked["tokens"].shape[-1])
    assert done == 18
    assert max(counts) == 3
    assert lengths == {16, 32, 48}


def test_equal_leaves_are_held_once():
    leaves = [jax.numpy.arange(3), jax.random.split(jax.random.key(0))]
    seeds = [leaves, [leaves[0] + 0, leaves[1][::-1]]]
    frozen = together._frozen(seeds, np.array([0, 1, 1]))
    assert list(frozen.shared) == [0]
    assert frozen.own[1].shape == (3, 2)
    assert (frozen.own[1][2] == seeds[1][1]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"methods": "lorapro"}, "unknown method 'lorapro'; did you mean 'lorapro-"),
        ({"learning_rates": "1e-4,-1"}, "--learning-rates -1.0 is out of range"),
        ({"seeds": "1,1"}, "--seeds 1,1 names 1 twice"),
        ({"at_once": "0"}, "--at-once 0 is out of range"),
        ({"train_examples": "1000000"}, "1000000 examples asked for, the split has"),
    ],
)
def test_bad_values_are_named_with_what_to_do(tmp_path, capsys, flags, message):
    assert sweep.main(tiny(tmp_path, **flags)) == 2
    assert message in capsys.readouterr().err


def test_too_many_runs_for_the_memory_are_told_of_at_once(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(sweep, "train", full)
    assert sweep.main(tiny(tmp_path)) == 2
    assert "fewer runs together (--at-once)" in capsys.readouterr().err
