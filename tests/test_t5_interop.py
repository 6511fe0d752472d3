"""T5 side by side with transformers' PyTorch: files both ways, and t5-base's true size."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_t5 import CASE, NAMES, adapted, batch, compare, logits, outputs, reference, write

from experiments.models import t5_files

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow


def theirs(model, tokens, mask, inputs):
    with torch.no_grad():
        given = (torch.tensor(np.asarray(x)).long() for x in (tokens, mask, inputs))
        names = "input_ids", "attention_mask", "decoder_input_ids"
        return model(**dict(zip(names, given, strict=True))).logits.numpy()


@pytest.mark.parametrize("case", ["v1.0", "v1.1"])
def test_pytorch_reads_what_save_writes(tmp_path, case):
    settings = reference.CASES[case] | {"vocab_size": 110}  # room for the tokenizer's sentinels
    write(tmp_path / "one", settings)
    ours = t5_files.load(tmp_path / "one")
    t5_files.save(ours, tmp_path / "two", t5_files.unigram(NAMES, 2))
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "two").eval()
    inputs = batch(settings)[:3]
    np.testing.assert_allclose(logits(ours, *inputs), theirs(model, *inputs), atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "two")
    assert tokenizer("a").input_ids == t5_files.tokenizer(tmp_path / "two").encode("a").ids


@pytest.mark.parametrize("case", ["v1.0", "v1.1"])
def test_load_reads_what_pytorch_writes(tmp_path, case):
    settings = reference.CASES[case]
    model = reference.model(settings, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    inputs = batch(settings)[:3]
    found = logits(t5_files.load(tmp_path), *inputs)
    np.testing.assert_allclose(found, theirs(model, *inputs), atol=1e-4)


def test_bfloat16_files_are_read(tmp_path):
    model = reference.model(CASE, torch.bfloat16)
    model.save_pretrained(tmp_path)
    ours = t5_files.load(tmp_path)
    inputs = batch(CASE)[:3]
    np.testing.assert_allclose(logits(ours, *inputs), theirs(model.float(), *inputs), atol=1e-4)


def test_t5_base_in_its_true_size(tmp_path):
    """In float32 encoder states, logits and loss; in float64 all adapters' gradients.

    PyTorch's own float32 gradients are up to 4e-4 from its float64 ones here: units at the edge of
    the relu turn on or off by rounding.
    """
    expected = reference.computed(reference.BASE, torch.float64)
    write(tmp_path, reference.BASE | {"eos_token_id": int(expected["eos"])})
    inputs = batch(reference.BASE)
    model = adapted(t5_files.load(tmp_path))
    *found, _ = outputs(model, *inputs)
    values = {name: value for name, value in expected.items() if not name.startswith("grad/")}
    compare((*found, nnx.State({})), values, np.asarray(inputs[1]), atol=1e-4)
    del model, found
    wide = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    found = outputs(adapted(t5_files.load(tmp_path, **wide), jnp.float64), *inputs)
    assert len(jax.tree.leaves(found[3])) == 2 * 192
    compare(found, expected, np.asarray(inputs[1]), atol=1e-7)
