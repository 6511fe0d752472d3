"""Runs that differ in rates and seed share their programs, and end as they would alone."""

import collections
import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from flax import nnx
from test_finetune import run_config, tiny

from experiments.finetune import command as finetune
from experiments.finetune import methods, prepare, programs
from experiments.finetune.methods import METHODS, Peaks

ROOT = pathlib.Path(__file__).parents[1]
COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[collections.Counter]:
    """How often XLA compiled each function inside the block, by JAX's own account."""
    counts = collections.Counter()

    def listen(event: str, duration: float, **about) -> None:
        if event == COMPILED:
            counts[about["fun_name"]] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def final(out, rate, seed) -> bytes:
    name = f"pydoc-tiny-lora-lr{rate:g}-seed{seed}"
    return (out / name / "final.safetensors").read_bytes()


def test_a_sweep_compiles_once_and_its_runs_end_as_alone(tmp_path):
    flags = {"methods": "lora", "train_examples": 32, "checkpoint_every": 0}
    programs.programs_of.cache_clear()
    with compilations() as counts:
        swept = tiny(tmp_path / "swept", learning_rates="1e-4,1e-3", seeds="0,1", **flags)
        assert finetune.main(swept) == 0
    assert counts["jit(step)"] == counts["jit(outputs)"] == 1
    finals = {final(tmp_path / "swept", rate, seed) for rate in (1e-4, 1e-3) for seed in (0, 1)}
    assert len(finals) == 4
    programs.programs_of.cache_clear()
    assert finetune.main(tiny(tmp_path / "alone", learning_rates="1e-3", seeds="1", **flags)) == 0
    assert final(tmp_path / "alone", 1e-3, 1) == final(tmp_path / "swept", 1e-3, 1)


@pytest.mark.slow
def test_a_sweep_over_several_devices_ends_as_alone(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    flags = {"methods": "lora", "devices": 2, "train_examples": 32, "checkpoint_every": 0}
    commands = [tiny(tmp_path / name, seeds=seeds, **flags)
                for name, seeds in (("swept", "0,1"), ("alone", "1"))]  # fmt: skip
    script = (
        "from experiments.finetune import command as finetune, programs\n"
        f"for command in {commands}:\n"
        "    programs.programs_of.cache_clear()\n"
        "    assert finetune.main(command) == 0\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone, swept = (final(tmp_path / name, 2e-3, 1) for name in ("alone", "swept"))
    assert alone == swept


def _programs(**changes) -> programs.Programs:
    run = run_config(**changes)
    return prepare.build(run, prepare.load_data(run, None))[0].programs


@pytest.mark.parametrize("method", METHODS)
def test_rates_and_seed_share_and_everything_else_does_not(method):
    mine = _programs(method=method)
    shared = {"learning_rate": 0.5, "head_learning_rate": 0.1, "seed": 3}
    assert _programs(method=method, **shared) is mine
    for change in ({"b1": 0.8}, {"rank": 4}, {"clip_norm": 0.0}, {"epochs": 2}):
        assert _programs(method=method, **change) is not mine


def test_programs_of_methods_long_finished_are_let_go():
    first = _programs(method="full")
    for method in ("lora", "lorapro-full"):
        _programs(method=method)
    assert programs.KEPT == 2
    assert _programs(method="full") is not first


@pytest.mark.parametrize("method", METHODS)
def test_a_traced_rate_gives_the_steps_of_a_constant_one(method):
    run = run_config(method=method, learning_rate=3e-3, head_learning_rate=1e-2, warmup_ratio=0.4)
    _, params = prepare.build(run, prepare.load_data(run, None))
    # one linear and the head, which have a rate each
    linear = params["encoder"]["layers"][0]["attention"]["query"]
    params = nnx.to_pure_dict(nnx.State({"query": linear, "head": params["head"]}))
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)

    @jax.jit
    def update(grads, state, params, peaks=None):
        return methods.optimizer(run, 5, peaks).update(grads, state, params)

    def last_of_three(**given) -> dict:
        state = methods.optimizer(run, 5).init(params)
        for _ in range(3):
            updates, state = update(grads, state, params, **given)
        return updates

    constant = last_of_three()
    traced = last_of_three(peaks=Peaks(np.float32(3e-3), np.float32(1e-2)))
    assert jax.tree.structure(constant) == jax.tree.structure(traced)
    for x, y in zip(jax.tree.leaves(constant), jax.tree.leaves(traced), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-12)
