"""The benchmarks at tiny sizes."""

import dataclasses
import json

import jax
import pytest

from benchmarks import bound, bound_sst2, compile_time, smollm2, t5, timing, tpu, train_step, update
from experiments.finetune.config import RunConfig
from experiments.finetune.methods import METHODS
from experiments.finetune.prepare import load_data
from experiments.models.bert import BertConfig

TINY = {"encoder/layers/0/wi": (8, 12), "encoder/layers/1/wi": (8, 12)}
TINY_BERT = BertConfig(
    vocab_size=8,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
)


def test_t5_base_has_192_pairs():
    shapes = t5.base()
    assert len(shapes) == 192
    assert sum(mn == (768, 768) for mn in shapes.values()) == 144
    assert sum(m * n for m, n in shapes.values()) == 198_180_864


def test_a_ratio_is_the_median_within_rounds_and_is_held_to_its_bound():
    times = {"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}
    found = timing.ratio(times, "a", "b", most=1.5)
    assert found["value"] == 2.0
    assert not found["held"]
    assert timing.ratio(times, "a", "b", most=None, least=2.0)["held"]


def test_by_turns_takes_each_variant_as_often_as_asked():
    taken = []
    calls = {name: lambda name=name: taken.append(name) for name in "ab"}
    times = timing.by_turns(calls, 3, {"b": 1})
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 1}
    assert (taken.count("a"), taken.count("b")) == (8, 4)  # twice a round, one round warms up


def test_update_measures_every_ratio_that_has_a_bound(tmp_path):
    times = timing.by_turns(update.ours(TINY, 2), 2)
    assert set(times) == {"adamw", "chain", "factored", "full", "muon", "dense adam"}
    out = tmp_path / "results" / "update.jsonl"
    timing.report("update", timing.medians(times), update.bounds(times), {"rank": 2}, out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 9
    assert all(line["benchmark"] == "update" and line["versions"]["jax"] for line in lines)
    peers = {"peer efficient": times["chain"], "peer full": times["full"]}
    assert len(update.bounds(times | peers)) == 5


def test_train_step_measures_both_frameworks(monkeypatch):
    monkeypatch.setattr(train_step, "ADAPTED", ("adamw", "factored"))
    rows = train_step.bounds(train_step.measure(TINY_BERT, 2, 3, 2, 1))
    assert len(rows) == 4
    assert all(row["value"] > 0 for row in rows)


def test_smollm2_measures_the_steps_of_the_experiments(tmp_path, monkeypatch):
    assert set(smollm2.METHODS) == set(METHODS) - {"full-muon"}
    monkeypatch.setattr(smollm2, "METHODS", ("lora", "lorapro-factored"))
    out = tmp_path / "smollm2.jsonl"
    smollm2.main(batch=2, length=8, rounds=1, model="llama-tiny", out=out)
    lora, factored, bound = map(json.loads, out.read_text().splitlines())
    assert lora["over_lora"] == 1.0
    assert factored["over_lora"] == bound["value"] > 0
    assert (bound["figure"], bound["bound"]) == ("lorapro-factored / lora", "at most 1.03")
    assert lora["tokens_per_s"] * lora["median_s"] == pytest.approx(2 * 8)
    assert lora["memory_bytes"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2s_peer_computes_the_same_loss():
    pytest.importorskip("peft", reason="Hugging Face PEFT is not installed")
    sizes = {"model": "llama-tiny", "batch_size": 2, "max_length": 8}
    run = dataclasses.replace(smollm2.run_of("lora", **sizes), learning_rate=1e-9)
    rows = smollm2.random_rows(257, 2, 8)
    ours, theirs = smollm2.ours(run, rows).call(), smollm2.peers(run, rows).call()
    assert theirs == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("kind", ["separate", "stacked"])
def test_compile_time_tells_tracing_from_compilation(kind):
    found = compile_time.measure(kind, "factored", 1, 2)
    assert found["pairs"] == 10
    assert found["total_s"] == pytest.approx(found["trace_s"] + found["compile_s"])
    assert len(compile_time.bounds([found])) == 1


def test_bound_counts_the_steps_after_the_first_twentieth(monkeypatch):
    monkeypatch.setattr(bound, "CONFIG", BertConfig(len(bound.CODES), 96, 1, 4, 8))
    monkeypatch.setattr(bound, "RATES", (1e-2,))
    lora, pro = bound.measure("linen", 20)
    assert lora["bounded"] is None
    assert 0 <= pro["bounded"] <= 1
    assert pro["loss"] < 6


def test_bound_on_an_encoder_counts_the_same_steps():
    given = {"model": "tiny", "task": "pydoc", "train_examples": 640, "max_length": 16}
    run = RunConfig(method="lorapro-factored", learning_rate=3e-2, seed=0, epochs=1, **given)
    row = bound_sst2.measure(run, load_data(run, None))
    assert row["steps"] == 20
    assert 0 < row["bounded"] < 1
    assert row["loss"] < 3


def test_tpu_cycles_of_a_tiny_update():
    pytest.importorskip("libtpu")
    rows = tpu.measure(("adamw", "factored", "muon"), TINY, 2)
    assert all(row["cycles"] > 0 and row["custom_calls"] == () for row in rows)
    assert len(tpu.bounds(rows)) == 3
    assert jax.default_backend() == "cpu"
