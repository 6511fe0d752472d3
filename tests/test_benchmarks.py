"""The benchmarks at tiny sizes, and the cycle counter on a program that was added up by hand."""

import importlib.util
import json

import jax
import pytest

from benchmarks import compile_time, hlo, t5, timing, tpu, train_step, update
from experiments.models.bert import BertConfig

TINY = {"encoder/layers/0/wi": (8, 12), "encoder/layers/1/wi": (8, 12)}
TINY_BERT = BertConfig(
    vocab_size=8,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
)

# The entry: 7 cycles, three rounds of the outer loop, the dearer branch (40), a custom call, and a
# copy and a fusion that have no estimate. An outer round: 5 cycles, 1 of its condition, and four
# inner rounds of 11 each. 7 + 3 (5 + 1 + 4 x 11) + 40 = 197. The computations of fusions and the
# scalars, all with an estimate of 1000, do not count: the fusion that calls them does.
NESTED = """HloModule nested, is_scheduled=true, num_partitions=1

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %inside = f32[8]{0} add(%p, %p), backend_config={"window":{"estimated_cycles":"1000"}}
}

%inner_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/mul"}, \
backend_config={"estimated_cycles":"11"}
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %y)
}

%inner_condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %four), direction=LT
}

%outer_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %zero = s32[] constant(0)
  %w = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/add"}, \
backend_config={"estimated_cycles":"5"}
  %start = (s32[], f32[8]{0}) tuple(%zero, %w)
  ROOT %loop = (s32[], f32[8]{0}) while(%start), condition=%inner_condition, body=%inner_body
}

%outer_condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  ROOT %test = pred[] fusion(%t), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1"}
}

%cheap (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"30"}
}

%dear (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %d = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"40"}
}

ENTRY %main (x: f32[8], k: s32[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %k = s32[] parameter(1)
  %seven = f32[8]{0} slice(%x), slice={[0:8]}, backend_config={"estimated_cycles":"7"}
  %buffer = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  %eigh = f32[8]{0} custom-call(%seven), custom_call_target="EighTpu"
  %moved = f32[8]{0} copy(%eigh)
  %first = (s32[], f32[8]{0}) tuple(%k, %moved)
  %outer = (s32[], f32[8]{0}) while(%first), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"3"}}
  %z = f32[8]{0} get-tuple-element(%outer), index=1
  %v = f32[8]{0} conditional(%k, %z, %z), branch_computations={%cheap, %dear}
  ROOT %result = f32[8]{0} fusion(%v), kind=kLoop, calls=%fused
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_a_conditional_its_dearest_branch():
    found = hlo.cycles(NESTED)
    assert found.total == 197
    assert found.by_operation["fusion of mul"] == 3 * 4 * 11
    assert found.by_operation["fusion of add"] == 3 * 5
    assert found.kernels == 1 + 3 * (1 + 1 + 4) + 1
    assert found.unknown_loops == ()


def test_what_has_no_estimate_is_told():
    found = hlo.cycles(NESTED)
    assert found.custom_calls == ("EighTpu",)
    assert found.without_estimate == {"copy": 1, "fusion": 1}


def test_a_loop_whose_trips_cannot_be_read_counts_once_and_is_named():
    found = hlo.cycles(NESTED.replace('"known_trip_count"', '"other"'))
    assert found.total == 7 + (5 + 1 + 4 * 11) + 40
    assert found.unknown_loops == ("%outer",)


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
    assert set(times) == {"adamw", "chain", "factored", "full", "dense adam"}
    out = tmp_path / "results" / "update.jsonl"
    timing.report("update", timing.medians(times), update.bounds(times), {"rank": 2}, out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 7
    assert all(line["benchmark"] == "update" and line["versions"]["jax"] for line in lines)
    peers = {"peer efficient": times["chain"], "peer full": times["full"]}
    assert len(update.bounds(times | peers)) == 4


def test_an_absent_peer_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert update.missing() == ["torch", "lora_pro"]


def test_train_step_measures_both_frameworks(monkeypatch):
    monkeypatch.setattr(train_step, "ADAPTED", ("adamw", "sgd", "factored"))
    rows = train_step.bounds(train_step.measure(TINY_BERT, 2, 3, 2, 1))
    assert len(rows) == 6
    assert all(row["value"] > 0 for row in rows)


@pytest.mark.parametrize("kind", ["separate", "stacked"])
def test_compile_time_tells_tracing_from_compilation(kind):
    found = compile_time.measure(kind, "factored", 1, 2)
    assert found["pairs"] == 10
    assert found["total_s"] == pytest.approx(found["trace_s"] + found["compile_s"])
    assert len(compile_time.bounds([found])) == 1


def test_tpu_cycles_of_a_tiny_update():
    pytest.importorskip("libtpu")
    rows = tpu.measure(("adamw", "factored"), TINY, 2)
    assert all(row["cycles"] > 0 and row["custom_calls"] == () for row in rows)
    assert len(tpu.bounds(rows)) == 2
    whole = {"variant": f"{tpu.LLAMA} whole step", "cycles": 400 * rows[1]["cycles"]}
    share = tpu.bounds([rows[1] | {"variant": f"{tpu.LLAMA} update"}, whole])
    assert share[0]["value"] == 1 / 400
    assert jax.default_backend() == "cpu"
