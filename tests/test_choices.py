"""The forms of Muon to choose by."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorapro_jax as lp
from experiments.choices import command, muon
from experiments.choices.pairs import by_pairs
from experiments.finetune import methods
from experiments.finetune.config import RATES
from experiments.report.plots import STYLES

SCALE = 2.0


def moved(params, step):
    """s (da b + a db) of every pair."""
    return SCALE * np.array(
        [
            x["lora_a"] @ step[k]["lora_b"] + step[k]["lora_a"] @ x["lora_b"]
            for k, x in params.items()
        ]
    )


def test_the_dense_form_takes_the_librarys_steps_and_the_others_do_not(x64):
    rng = np.random.default_rng(0)

    def tree():
        return {
            f"q_{i}": {
                "lora_a": jnp.array(rng.normal(size=(30, 4))),
                "lora_b": jnp.array(rng.normal(size=(4, 20))),
            }
            for i in range(3)
        }

    params, grads = tree(), [tree() for _ in range(3)]
    txs = {name: by_pairs(rule(SCALE), optax.identity()) for name, rule in muon.DENSE.items()}
    txs["library"] = lp.scale_by_lorapro_muon(SCALE)
    steps = {}
    for name, tx in txs.items():
        state = tx.init(params)
        for g in grads:
            steps[name], state = tx.update(g, state, params)
    theirs = moved(params, steps.pop("library"))
    off = {
        name: np.linalg.norm(moved(params, step) - theirs) / np.linalg.norm(theirs)
        for name, step in steps.items()
    }
    assert off.pop("dense") < 1e-3
    assert off.pop("carried") < 1e-3  # the factors have not moved
    assert min(off.values()) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "llama-tiny"])
def test_every_form_trains_by_the_commands_own_loop(tmp_path, monkeypatch, model):
    for table in (methods.METHODS, RATES, STYLES):
        for name in muon.VARIANTS:
            monkeypatch.setitem(table, name, None)
    given = ["--smoke", "--model", model, "--out", str(tmp_path), "--answers", "0"]
    assert command.main([*given, "--methods", ",".join(muon.VARIANTS), "--lr", "1e-2"]) == 0
    assert len(list(tmp_path.glob("*/result.json"))) == len(muon.VARIANTS)
