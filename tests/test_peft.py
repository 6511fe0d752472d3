"""PEFT's files without PEFT: round trips, orientation, atomic writes, and what is refused."""

import json
import math
import os
import pathlib
import pickle
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lorapro_jax as lp

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
MODULES = {r"(\w+)": r"layer.\1"}


def node(a, b, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype)
            for name, shape in (("lora_a", a), ("lora_b", b))}  # fmt: skip


def tree(seed=0, rank=2):
    return {"q": node((6, rank), (rank, 4), seed), "v": node((6, rank), (rank, 5), seed + 1)}


def saved(folder, lora=None, scale=2.0, **options):
    lp.peft.save(folder, tree() if lora is None else lora, scale, **{"modules": MODULES} | options)
    return folder


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), got, expected)


# ---------------------------------------------------------------- what the files hold


def test_factors_lie_transposed_under_the_modules_names(tmp_path):
    lora = tree()
    found = tensors_of(saved(tmp_path, lora))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        f"{PREFIX}layer.q.lora_A.weight": (2, 6), f"{PREFIX}layer.q.lora_B.weight": (4, 2),
        f"{PREFIX}layer.v.lora_A.weight": (2, 6), f"{PREFIX}layer.v.lora_B.weight": (5, 2),
    }  # fmt: skip
    np.testing.assert_array_equal(found[f"{PREFIX}layer.q.lora_A.weight"], lora["q"]["lora_a"].T)
    np.testing.assert_array_equal(found[f"{PREFIX}layer.q.lora_B.weight"], lora["q"]["lora_b"].T)
    assert sorted(contents(tmp_path)) == [CONFIG, WEIGHTS]


def test_the_configuration_says_what_was_asked(tmp_path):
    options = dict(base_model="some/bert", task_type="FEATURE_EXTRACTION", fan_in_fan_out=True)
    found = config_of(saved(tmp_path, **options))
    assert found["base_model_name_or_path"] == "some/bert"
    assert found["task_type"] == "FEATURE_EXTRACTION"
    assert found["fan_in_fan_out"] is True
    assert (found["r"], found["lora_alpha"], found["use_rslora"]) == (2, 4, False)
    assert isinstance(found["lora_alpha"], int)
    assert found["rank_pattern"] == found["alpha_pattern"] == {}
    assert found["target_modules"] == ["layer.q", "layer.v"]


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-6, 1e6), st.sampled_from([1, 2, 3, 7, 8, 48, 100]), st.booleans())
def test_alpha_gives_the_scale_back_up_to_the_last_digit(tmp_path_factory, scale, rank, rslora):
    folder = tmp_path_factory.mktemp("scale")
    lora = {"q": node((1, rank), (rank, 1))}
    found = config_of(saved(folder, lora, scale, rslora=rslora))
    divisor = math.sqrt(found["r"]) if found["use_rslora"] else found["r"]
    np.testing.assert_array_almost_equal_nulp(found["lora_alpha"] / divisor, scale, nulp=1)
    assert lp.peft.load(folder)[1] == {"layer/q": found["lora_alpha"] / divisor}


@pytest.mark.parametrize("alpha", [1, 8, 16, 20])
@pytest.mark.parametrize("rank", [1, 3, 8, 12, 48])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_integer_alpha_comes_back_as_one(tmp_path, alpha, rank, rslora):
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    found = config_of(saved(tmp_path, {"q": node((2, rank), (rank, 1))}, scale, rslora=rslora))
    assert repr(found["lora_alpha"]) == repr(alpha)


# ---------------------------------------------------------------- layouts

BATCH = lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))
# Shapes of a and b, dimension numbers, target, and the delta (in, out) of each module by einsum.
LAYOUTS = {
    "stacked layers": ((3, 6, 2), (3, 2, 4), BATCH, "l.{0}.q", "lir,lro->lio", "l.{0}.q"),
    "scan on axis 1": (
        (6, 3, 2), (2, 3, 4), lp.LoRADimensionNumbers(a_batch=(1,), b_batch=(1,)),
        "l.{0}.q", "ilr,rlo->lio", "l.{0}.q",
    ),
    "layers and experts": (
        (2, 3, 6, 2), (3, 2, 2, 4), lp.LoRADimensionNumbers(a_batch=(0, 1), b_batch=(1, 0)),
        "l.{0}.experts.{1}.up", "leir,elro->leio", "l.{0}.experts.{1}.up",
    ),
    "heads out of b": ((6, 2), (2, 3, 4), lp.LoRADimensionNumbers(), "q", "ir,rnh->inh", "q"),
    "heads into a": ((3, 4, 2), (2, 6), lp.LoRADimensionNumbers(), "o", "nhr,ro->nho", "o"),
    "PEFT's own": (
        (2, 6), (4, 2), lp.LoRADimensionNumbers(a_rank=0, b_rank=1), "q", "ri,or->io", "q",
    ),
    "key and value on one a": (
        (6, 2), (2, 2, 3, 4), lp.LoRADimensionNumbers(), lp.peft.Split(("0.kv", "1.kv"), axis=1),
        "ir,rcnh->cinh", "{0}.kv",
    ),
    "the same, stacked": (
        (5, 6, 2), (5, 2, 2, 12), BATCH, lp.peft.Split(("l.{0}.0", "l.{0}.1"), axis=-2),
        "lir,lrco->lcio", "l.{0}.{1}",
    ),
    "gate and up stacked": (
        (2, 6, 2), (2, 2, 4), BATCH, lp.peft.Split(("0.up", "1.up"), axis=0), "cir,cro->cio",
        "{0}.up",
    ),
    "gate and up stacked, in layers": (
        (3, 6, 2, 2), (3, 2, 2, 4), lp.LoRADimensionNumbers(a_batch=(0, 2), b_batch=(0, 1)),
        lp.peft.Split(("l.{0}.0", "l.{0}.1"), axis=2, factor="a"), "licr,lcro->lcio", "l.{0}.{1}",
    ),
    "a pair for each head's outputs": (
        (3, 6, 2), (3, 2, 4), BATCH, lp.peft.Join("q"), "nir,nrh->inh", "q",
    ),
    "a pair for each head's inputs": (
        (3, 4, 2), (3, 2, 6), BATCH, lp.peft.Join("o", factor="a"), "nhr,nro->nho", "o",
    ),
    "the same for layers": (
        (2, 3, 4, 2), (2, 3, 2, 6), lp.LoRADimensionNumbers(a_batch=(0, 1), b_batch=(0, 1)),
        lp.peft.Join("l.{0}.o", factor="a"), "lnhr,lnro->lnho", "l.{0}.o",
    ),
    "key and value, a pair for each head": (
        (2, 3, 6, 2), (2, 3, 2, 4), lp.LoRADimensionNumbers(a_batch=(0, 1), b_batch=(0, 1)),
        lp.peft.Join(lp.peft.Split(("0.kv", "1.kv"), axis=0)), "cnir,cnrh->cinh", "{0}.kv",
    ),
    "experts that share b": (
        (3, 6, 2), (2, 4), lp.LoRADimensionNumbers(),
        lp.peft.Split(("e.0", "e.1", "e.2"), axis=0, factor="a"), "eir,ro->eio", "e.{0}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_goes_out_as_its_dense_deltas_and_comes_back(tmp_path, case, dtype):
    a, b, dims, target, product, name = LAYOUTS[case]
    lora = {"block": {"kernel": jnp.ones(2), **node(a, b, dtype=dtype)}}
    options = dict(modules={"block": target}, layout=lp.layouts.FLAX.declare({"block": dims}))
    lp.peft.save(tmp_path, lora, 0.5, **options)

    with safetensors.safe_open(tmp_path / WEIGHTS, "numpy") as opened:
        found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    factors = (np.asarray(lora["block"][key], np.float64) for key in ("lora_a", "lora_b"))
    delta = np.einsum(product, *factors)
    indices = list(np.ndindex(delta.shape[: name.count("{")]))
    assert len(found) == 2 * len(indices)
    for index in indices:
        A, B = (
            found[f"{PREFIX}{name.format(*index)}.lora_{x}.weight"].astype(np.float64) for x in "AB"
        )
        np.testing.assert_allclose((B @ A).T.ravel(), delta[index].ravel(), rtol=1e-12, atol=1e-12)

    zeros = jax.tree.map(jnp.zeros_like, lora)
    zeros["block"]["kernel"] = lora["block"]["kernel"]
    got, scales = lp.peft.load(tmp_path, like=zeros, **options)
    assert_same(got, lora)
    assert scales == {"block": 0.5}


def test_a_fused_projection_of_unequal_parts(tmp_path):
    lora = {"qkv": node((6, 2), (2, 8 + 2 + 3))}
    parts = lp.peft.Split(("q", "k", "v"), axis=1, sizes=(8, 2, 3))
    lp.peft.save(tmp_path, lora, 1.0, modules={"qkv": parts})
    found = tensors_of(tmp_path)
    joined = np.concatenate([found[f"{PREFIX}{x}.lora_B.weight"] for x in "qkv"])
    np.testing.assert_array_equal(joined, lora["qkv"]["lora_b"].T)
    for name in "qkv":
        np.testing.assert_array_equal(
            found[f"{PREFIX}{name}.lora_A.weight"], lora["qkv"]["lora_a"].T
        )


def test_an_nnx_state_is_restored_and_only_its_factors(tmp_path):
    def model(seed):
        made = nnx.Sequential(
            nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 3, rngs=nnx.Rngs(0))
        )
        lp.nnx.add_lora(made, 2, targets=r"layers/\d", rngs=nnx.Rngs(seed))
        made.layers[1].lora_b[...] = jnp.full((2, 3), float(seed))
        return made

    first, second, x = model(1), model(2), jnp.ones((1, 4))
    modules = {r"layers/(\d)": r"net.\1"}
    lp.peft.save(tmp_path, nnx.state(first, nnx.Param), 8.0, modules=modules)
    abstract = jax.eval_shape(lambda: nnx.state(second, nnx.LoRAParam))
    for like in (nnx.state(second, nnx.Param), abstract):
        state, _ = lp.peft.load(tmp_path, like=like, modules=modules)
        fresh = model(2)
        assert not np.array_equal(fresh(x), first(x))
        nnx.update(fresh, state)
        np.testing.assert_array_equal(fresh(x), first(x))


def test_scales_may_differ_by_pair_and_serve_as_a_scale_again(tmp_path):
    saved(tmp_path, scale={"q": 0.3, "v": 7.0}.__getitem__)
    lora, scales = lp.peft.load(tmp_path)
    assert scales == {"layer/q": 0.3, "layer/v": 7.0}
    lp.lorapro(scales.__getitem__).init(lora)
    again = tmp_path / "again"
    modules = {r"layer/(.)": r"layer.\1"}
    lp.peft.save(again, lora, scales.__getitem__, modules=modules)
    assert contents(again) == {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}


# ---------------------------------------------------------------- what save refuses

BAD_MODULES = {
    "no name for v": ({"q": "q"}, "every pair: v is matched by none"),
    "matches nothing": ({r"\w": "l.x", "layers/q": "y"}, "'layers/q' matches none of 2"),
    "two patterns": ({r"\w": "a", "q": "b"}, r"q is matched by \['\\\\w', 'q'\]"),
    "one module twice": ({r"\w": "layer"}, "names layer twice, for q and v"),
    "no such group": ({r"\w": r"layer.\1"}, "0 groups"),
    "no such axis": ({r"(\w)": r"layer.{0}.\1"}, "0 batch axes"),
    "an empty name": ({r"(\w)(x?)": r"layer.\1.\2"}, r"becomes 'layer\.q\.', which is no module"),
    "an impossible axis": (
        {"q": lp.peft.Split(("a", "b"), axis=2), "v": "v"}, "axis 2 of b cannot be split",
    ),
    "the rank split": (
        {"q": lp.peft.Split(("a", "b"), axis=0), "v": "v"}, "axis 0 of b cannot be split",
    ),
    "unequal parts": (
        {"q": lp.peft.Split(("a", "b", "c"), axis=1), "v": "v"},
        "size 4, which equal parts cannot divide among 3",
    ),
    "wrong sizes": (
        {"q": lp.peft.Split(("a", "b"), axis=1, sizes=(1, 2)), "v": "v"}, "sizes=(1, 2)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODULES)
def test_names_that_do_not_fit_the_pairs_are_refused_and_nothing_is_written(tmp_path, case):
    modules, message = BAD_MODULES[case]
    message = message.replace("(1, 2)", r"\(1, 2\)")
    with pytest.raises(ValueError, match=message):
        lp.peft.save(tmp_path / "new", tree(), 1.0, modules=modules)
    assert not (tmp_path / "new").exists()


def test_a_split_batch_axis_needs_a_name_for_every_entry(tmp_path):
    layout = lp.layouts.FLAX.declare({"q": BATCH})
    modules = {"q": lp.peft.Split(("gate", "up"), axis=0)}
    with pytest.raises(ValueError, match="q: axis 0 of b has size 4.*among 2 modules"):
        lp.peft.save(
            tmp_path, {"q": node((4, 6, 2), (4, 2, 4))}, 1.0, modules=modules, layout=layout
        )


def test_stacked_layers_need_their_index_in_the_name(tmp_path):
    layout = lp.layouts.FLAX.declare({"q": BATCH})
    with pytest.raises(ValueError, match=r"names layer twice, for q and q.*\{0\}"):
        lp.peft.save(
            tmp_path, {"q": node((3, 6, 2), (3, 2, 4))}, 1.0, modules={"q": "layer"}, layout=layout
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lora={"q": {"lora_a": jnp.ones((6, 2))}}), "q has lora_a .* no matching b"),
        (dict(lora={"q": node((3, 6, 2), (3, 2, 4))}), "q is ambiguous"),
        (dict(lora={"kernel": jnp.ones(3)}), "none of 1 leaves is a LoRA factor"),
        (dict(lora={}, modules={}), "there is no adapter to save"),
        (dict(scale=0.0), "q: scale must be positive and finite, not 0.0"),
        (dict(scale=lambda path: math.nan), "q: scale must be positive"),
        (dict(task_type="CLASSIFY"), "task_type must be one of SEQ_CLS"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        saved(tmp_path / "new", **change)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- atomic writes


def test_a_full_disk_leaves_the_old_adapter_whole(tmp_path):
    before = contents(saved(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            saved(tmp_path, tree(1, rank=40), 3.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


WRITER = """
import itertools, sys
import numpy as np
from lorapro_jax._peft_files import Adapter, write
options = dict(rslora=False, fan_in_fan_out=False, base_model=None, task_type=None)
for i in itertools.count(1):
    # Alternately another scale and another rank: configuration and weights belong together.
    rank, scale = 1 + i % 2, float(1 + i % 3)
    A, B = np.full((rank, 300), scale, np.float32), np.full((300, rank), scale, np.float32)
    write(__import__("pathlib").Path(sys.argv[1]), {"m": Adapter(A, B, scale)}, **options)
    print(i, flush=True)
"""


def test_a_killed_writer_never_leaves_a_mixture(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(lp.__file__).parents[1])}
    whole = 0
    for delay in (0.0, 0.0013, 0.0029):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as writer:
            for _ in range(5):
                writer.stdout.readline()
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        try:
            lora, scales = lp.peft.load(tmp_path)
        except FileNotFoundError as error:
            assert CONFIG in str(error)  # noqa: PT017 (either outcome is right)
            continue
        whole += 1
        values = {float(x) for leaf in jax.tree.leaves(lora) for x in leaf.ravel()}
        assert values == set(scales.values())
    assert whole


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_write_that_fails_anywhere_never_leaves_a_mixture(tmp_path, monkeypatch, failing, call):
    before = contents(saved(tmp_path / "adapter"))
    new = contents(saved(tmp_path / "other", tree(1, rank=3), 5.0))
    real, calls = getattr(os, failing), []

    def fail(*args):
        calls.append(args)
        if len(calls) == call:
            raise OSError(5, "Input/output error")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, fail)
        with pytest.raises(OSError, match="Input/output error"):
            saved(tmp_path / "adapter", tree(1, rank=3), 5.0)
    left = contents(tmp_path / "adapter")
    if failing == "fsync":
        assert left == before
    else:
        assert left == {WEIGHTS: (before, new)[call - 1][WEIGHTS]}
        with pytest.raises(FileNotFoundError, match=f"{CONFIG} does not exist"):
            lp.peft.load(tmp_path / "adapter")


def test_saving_again_replaces_the_adapter_and_nothing_else(tmp_path):
    saved(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    saved(tmp_path, tree(1, rank=3), 5.0)
    assert_same(lp.peft.load(tmp_path)[0]["layer"], tree(1, rank=3))
    assert sorted(contents(tmp_path)) == ["README.md", CONFIG, WEIGHTS]


# ---------------------------------------------------------------- bad files


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["LORAPRO_TEST_EVIL"],)


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_a_pickle_is_never_opened(tmp_path, monkeypatch, name):
    saved(tmp_path / "adapter")
    marker = tmp_path / "was unpickled"
    monkeypatch.setenv("LORAPRO_TEST_EVIL", str(marker))
    (tmp_path / "adapter" / WEIGHTS).unlink()
    (tmp_path / "adapter" / name).write_bytes(pickle.dumps(Evil()))
    message = "is a pickle.*save_pretrained" if name != WEIGHTS else "no safetensors file"
    with pytest.raises(ValueError, match=message):
        lp.peft.load(tmp_path / "adapter")
    assert not marker.exists()
    pickle.loads((tmp_path / "adapter" / name).read_bytes())
    assert marker.exists()  # the trap works: opened, it would have gone off


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path, name):
    data = (saved(tmp_path) / name).read_bytes()
    for length in (0, 1, 7, 8, 20, len(data) // 2, len(data) - 2):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"{name}.*(cut short|no PEFT)"):
            lp.peft.load(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(tmp_path, name):
    (saved(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        lp.peft.load(tmp_path)


Q, V = f"{PREFIX}layer.q.lora_", f"{PREFIX}layer.v.lora_"
BAD_TENSORS = {
    "wrong rank": ({f"{Q}A.weight": (3, 6), f"{Q}B.weight": (4, 3)}, r"layer\.q has rank 2 by"),
    "ranks that differ": ({f"{Q}B.weight": (4, 3)}, r"lora_B \(out, 2\), but .* \(4, 3\)$"),
    "transposed": (
        {f"{Q}A.weight": (6, 2), f"{Q}B.weight": (2, 4)}, "they lie transposed, as .in, r.",
    ),
    "missing B": ({f"{Q}B.weight": None}, r"layer\.q has no lora_B\.weight"),
    "missing A": ({f"{V}A.weight": None}, r"layer\.v has no lora_A\.weight"),
    "a convolution": (
        {f"{Q}A.weight": (2, 6, 3, 3), f"{Q}B.weight": (4, 2, 1, 1)}, "only linear layers",
    ),
    "an embedding": ({f"{PREFIX}embed.lora_embedding_A": (2, 9)}, "embed.lora_embedding_A is no"),
    "a bias": ({f"{Q}B.bias": (4,)}, r"layer\.q\.lora_B\.bias is no factor"),
    "a magnitude": ({f"{Q}magnitude_vector": (4,)}, "lora_magnitude_vector is no factor"),
    "another prefix": ({"layer.q.lora_A.weight": (2, 6)}, r"layer\.q\.lora_A\.weight is no factor"),
    "an untargeted module": (
        {f"{PREFIX}x.lora_A.weight": (2, 6), f"{PREFIX}x.lora_B.weight": (4, 2)},
        "target_modules does not cover x",
    ),
    "nothing": (dict.fromkeys([f"{x}{y}.weight" for x in (Q, V) for y in "AB"]), "no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_are_not_the_configured_adapter_are_refused(tmp_path, case):
    changes, message = BAD_TENSORS[case]
    tensors = tensors_of(saved(tmp_path))
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.ones(shape, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message) as raised:
        lp.peft.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_integers_are_no_factors(tmp_path):
    tensors = tensors_of(saved(tmp_path))
    tensors[f"{Q}A.weight"] = np.ones((2, 6), np.int8)
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"layer.q.lora_A.weight has dtype int8"):
        lp.peft.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(peft_type="LOHA"), "peft_type is 'LOHA'.*expected 'LORA'"),
        (dict(peft_type=None), "peft_type is None"),
        (dict(bias="all"), "bias is 'all'.*expected 'none'"),
        (dict(use_dora=True), "use_dora is True"),
        (dict(modules_to_save=["classifier"]), r"modules_to_save is \['classifier'\]"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
        (dict(layer_replication=[[0, 4]]), "layer_replication is"),
        (dict(an_option_of_tomorrow=0.5), "an_option_of_tomorrow is 0.5"),
        (dict(r=0), r"rank of layer\.\w is 0, not a positive integer"),
        (dict(r=2.0), r"is 2\.0, not a positive integer"),
        (dict(r=True), "is True, not a positive integer"),
        (dict(r=None), "is None, not a positive integer"),
        (dict(lora_alpha=-1), r"alpha of layer\.\w is -1, not a positive number"),
        (dict(lora_alpha="16"), "is '16', not a positive number"),
        (dict(rank_pattern={"q": 3}), r"layer\.q has rank 3 by"),
        (dict(rank_pattern={"(q": 3}), "a key of rank_pattern is not a valid regex"),
        (dict(alpha_pattern=[1]), r"alpha_pattern is \[1\], not an object"),
        (dict(target_modules=["q"]), r"target_modules does not cover layer\.v"),
        (dict(target_modules="layer"), "target_modules does not cover"),
        (dict(target_modules=3), "target_modules does not cover"),
    ],
)
def test_configurations_that_are_not_plain_lora_are_refused(tmp_path, change, message):
    found = config_of(saved(tmp_path)) | change
    (tmp_path / CONFIG).write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message) as raised:
        lp.peft.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "3", "{", "[" * 99999, "\x00", '{"r": 8}'],
    ids=range(7),
)
def test_json_that_is_no_configuration_is_refused(tmp_path, text):
    (saved(tmp_path) / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=f"{CONFIG} is no(t JSON| PEFT configuration)"):
        lp.peft.load(tmp_path)


# ---------------------------------------------------------------- files that do not fit `like`


@pytest.mark.parametrize(
    ("like", "modules", "message"),
    [
        (tree(rank=3), MODULES, r"q does not fit layer\.q.*make `like` with rank 2"),
        ({"q": node((7, 2), (2, 4)), "v": tree()["v"]}, MODULES, r"asks for lora_A \(2, 7\)"),
        ({"q": tree()["q"]}, MODULES, "also adapts 1 modules: layer.v"),
        (tree() | {"k": tree()["q"]}, MODULES, "has no adapter for 1 modules: layer.k"),
        (
            {"qv": node((6, 2), (2, 9))},
            {"qv": lp.peft.Split(("layer.q", "layer.v"), axis=1, sizes=(4, 5))},
            "qv has one a for layer.q and layer.v, but in the file theirs differ",
        ),
    ],
)
def test_a_tree_that_the_adapter_does_not_fit_is_refused(tmp_path, like, modules, message):
    with pytest.raises(ValueError, match=message):
        lp.peft.load(saved(tmp_path), like=like, modules=modules)


def test_heads_that_were_trained_as_one_pair_do_not_come_apart(tmp_path):
    saved(tmp_path, {"q": node((6, 6), (6, 12))})
    like = {"q": node((3, 6, 2), (3, 2, 4))}
    options = dict(layout=lp.layouts.FLAX.declare({"q": BATCH}))
    with pytest.raises(ValueError, match=r"layer\.q was not made of 3 separate pairs: its lora_B"):
        lp.peft.load(tmp_path, like=like, modules={"q": lp.peft.Join("layer.q")}, **options)


def test_openpi_s_summed_heads_go_out_as_their_sum(tmp_path):
    lora = {"attn_vec_einsum": node((3, 4, 2), (3, 2, 6))}
    options = dict(modules={".*": "o_proj"}, layout=lp.layouts.OPENPI)
    lp.peft.save(tmp_path, lora, 1.0, **options)
    a, b = (np.asarray(x, np.float64) for x in lora["attn_vec_einsum"].values())
    expected = np.einsum("nhr,mro->nho", a, b).reshape(12, 6)
    for tree_, _ in (lp.peft.load(tmp_path), lp.peft.load(tmp_path, like=lora, **options)):
        pair = tree_.get("o_proj") or tree_["attn_vec_einsum"]
        a, b = np.asarray(pair["lora_a"], np.float64), np.asarray(pair["lora_b"], np.float64)
        delta = a.reshape(12, 2) @ (b if b.ndim == 2 else b.sum(0))
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)


def test_scales_that_differ_within_one_pair_are_refused(tmp_path):
    saved(tmp_path, scale={"q": 0.5, "v": 7.0}.__getitem__)
    like = {"qv": node((6, 2), (2, 9))}
    modules = {"qv": lp.peft.Split(("layer.q", "layer.v"), axis=1, sizes=(4, 5))}
    with pytest.raises(ValueError, match="one scale.*layer.q 0.5, layer.v 7.0"):
        lp.peft.load(tmp_path, like=like, modules=modules)


def test_like_and_modules_come_together(tmp_path):
    with pytest.raises(ValueError, match="like= and modules= together"):
        lp.peft.load(saved(tmp_path), like=tree())
    with pytest.raises(ValueError, match="like= and modules= together"):
        lp.peft.load(tmp_path, modules=MODULES)


def test_like_decides_the_dtype(tmp_path):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree())
    got, _ = lp.peft.load(saved(tmp_path), like=like, modules=MODULES)
    assert_same(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree()))


def test_without_safetensors_the_library_imports_and_says_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import lorapro_jax as lp, numpy as np\n"
        "pair = {'lora_a': np.ones((2, 1)), 'lora_b': np.ones((1, 2))}\n"
        f"lp.peft.save({str(tmp_path)!r}, {{'q': pair}}, 1.0, modules={{'q': 'q'}})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(lp.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert b"ImportError: lorapro_jax.peft reads and writes" in ran.stderr
    assert b'pip install "lorapro-jax[peft]"' in ran.stderr
    assert not any(tmp_path.iterdir())
