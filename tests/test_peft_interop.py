"""Adapters in both directions against Hugging Face PEFT itself, on small random models."""

import copy
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorapro_jax as lp
from experiments.models import minilm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # of transformers, by peft
    ),
    pytest.mark.usefixtures("x64"),
]

BERT = {
    r"layers/(\d+)/attention/(query|key|value)": r"encoder.layer.\1.attention.self.\2",
    r"layers/(\d+)/attention/out": r"encoder.layer.\1.attention.output.dense",
    r"layers/(\d+)/up": r"encoder.layer.\1.intermediate.dense",
    r"layers/(\d+)/down": r"encoder.layer.\1.output.dense",
}
HEADS, KV_HEADS, HEAD, WIDTH, INNER = 4, 2, 6, 20, 28


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=16, initializer_range=0.2,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def llama(layers=2):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD, intermediate_size=INNER,
        max_position_embeddings=16, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def tokens(vocabulary=40):
    return torch.randint(0, vocabulary, (3, 11), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits.numpy()


@nnx.jit
def forward(encoder, ids, mask):
    return encoder(ids, mask)


def randomise(model):
    """Nonzero A and B for every adapter of a PEFT model."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def lora_layers(model):
    """{module's name in the base model: PEFT's layer}."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if hasattr(module, "lora_A")}


def with_added(model, deltas):
    """A copy of `model`, the dense deltas (in, out) added to its weights in float64."""
    merged, found = copy.deepcopy(model), dict(model.named_modules())
    for name, delta in deltas.items():
        weight = merged.get_submodule(name).weight
        conv = type(found[name]).__name__ == "Conv1D"
        weight.data += torch.tensor(np.array(delta if conv else delta.T), dtype=weight.dtype)
    return merged


# ---------------------------------------------------------------- ours, loaded by PEFT


def adapted_bert(model, folder):
    """The NNX encoder with the torch model's weights and adapters of several ranks and scales."""
    model.save_pretrained(folder)
    encoder = minilm.load(2, rngs=nnx.Rngs(0), path=folder).encoder
    lp.nnx.add_lora(encoder, 4, 8.0, targets=r"layers/0/.*", rngs=nnx.Rngs(1))
    lp.nnx.add_lora(encoder, 3, 5.0, targets=r"layers/1/attention/.*", rngs=nnx.Rngs(2))
    lp.nnx.add_lora(encoder, 2, 3.0, targets=r"layers/1/(up|down)", rslora=True, rngs=nnx.Rngs(3))
    key = jax.random.key(4)
    for i, (_, variable) in enumerate(nnx.iter_graph(encoder)):
        if isinstance(variable, nnx.LoRAParam):
            noise = jax.random.normal(jax.random.fold_in(key, i), variable.shape, variable.dtype)
            variable[...] = 0.2 * noise
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(encoder)}
    return encoder, lambda path: modules[path].lora_scale


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_what_the_adapted_jax_bert_computes(tmp_path, rslora):
    model = bert()
    encoder, scale = adapted_bert(model, tmp_path / "base")
    lora = nnx.state(encoder, nnx.LoRAParam)
    lp.peft.save(tmp_path / "adapter", lora, scale, modules=BERT, rslora=rslora)
    with torch.no_grad():
        plain = model(tokens()).last_hidden_state.numpy()
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        theirs = loaded(tokens()).last_hidden_state.numpy()
    ids = jnp.asarray(tokens().numpy(), jnp.int32)
    ours = forward(encoder, ids, jnp.ones(ids.shape, bool))
    assert np.abs(theirs - plain).max() > 0.5
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)


def gaussians(shapes, seed=5):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(0.3 * rng.normal(size=shape))  # noqa: E731
    return {name: {"lora_a": draw(a), "lora_b": draw(b)} for name, (a, b) in shapes.items()}


def scanned_llama():
    """A Gemma-like tree, two layers stacked, key and value and gate and up fused on one a."""
    L, r = 2, 3
    lora = gaussians({
        "q": ((L, WIDTH, r), (L, r, HEADS, HEAD)),
        "kv": ((L, WIDTH, r), (L, r, 2, KV_HEADS, HEAD)),
        "o": ((HEADS, HEAD, L, 2), (L, 2, WIDTH)),
        "gate_up": ((L, WIDTH, r), (L, r, 2 * INNER)),
        "down": ((L, INNER, 4), (4, L, WIDTH)),
    })  # fmt: skip
    stacked = lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))
    layout = lp.layouts.FLAX.declare({
        "q|kv|gate_up": stacked,
        "o": lp.LoRADimensionNumbers(a_batch=(2,), b_batch=(0,)),
        "down": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(1,)),
    })  # fmt: skip
    attention, mlp = "model.layers.{0}.self_attn", "model.layers.{0}.mlp"
    modules = {
        "(q|o)": attention + r".\1_proj",
        "kv": lp.peft.Split((f"{attention}.k_proj", f"{attention}.v_proj"), axis=2),
        "gate_up": lp.peft.Split((f"{mlp}.gate_proj", f"{mlp}.up_proj"), axis=-1),
        "down": f"{mlp}.down_proj",
    }
    return lora, layout, modules


def llama_deltas(lora, scale):
    """The dense deltas (in, out) by einsum over the axes as they are declared above."""
    x = {name: (np.asarray(p["lora_a"]), np.asarray(p["lora_b"])) for name, p in lora.items()}
    q = np.einsum("ldr,lrnh->ldnh", *x["q"]).reshape(2, WIDTH, -1)
    kv = np.einsum("ldr,lrckh->cldkh", *x["kv"]).reshape(2, 2, WIDTH, -1)
    o = np.einsum("nhlr,lrd->lnhd", *x["o"]).reshape(2, HEADS * HEAD, WIDTH)
    gate, up = np.split(np.einsum("ldr,lrf->ldf", *x["gate_up"]), 2, axis=-1)
    down = np.einsum("lfr,rld->lfd", *x["down"])
    parts = {
        "self_attn.q_proj": ("q", q), "self_attn.k_proj": ("kv", kv[0]),
        "self_attn.v_proj": ("kv", kv[1]), "self_attn.o_proj": ("o", o),
        "mlp.gate_proj": ("gate_up", gate), "mlp.up_proj": ("gate_up", up),
        "mlp.down_proj": ("down", down),
    }  # fmt: skip
    return {
        f"model.layers.{layer}.{name}": scale(pair) * delta[layer]
        for name, (pair, delta) in parts.items()
        for layer in range(2)
    }


def test_stacked_and_fused_pairs_reach_each_llama_module(tmp_path):
    model = llama()
    lora, layout, modules = scanned_llama()
    scale = {"q": 2.0, "kv": 1 / 3, "o": 0.1, "gate_up": 16 / 3**0.5, "down": 2.0}.__getitem__
    options = dict(modules=modules, layout=layout, task_type="CAUSAL_LM")
    lp.peft.save(tmp_path, lora, scale, **options)
    expected, plain = logits(with_added(model, llama_deltas(lora, scale))), logits(model)
    theirs = logits(peft.PeftModel.from_pretrained(model, tmp_path).eval())
    assert np.abs(theirs - plain).max() > 0.5
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-11)


def test_gpt2_s_transposed_weights_change_nothing_about_a_and_b(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    lora = gaussians({
        "attn": ((2, 16, 3), (2, 3, 48)), "up": ((2, 16, 3), (2, 3, 64)),
    })  # fmt: skip
    layout = lp.layouts.FLAX.declare({".*": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))})
    modules = {"attn": "transformer.h.{0}.attn.c_attn", "up": "transformer.h.{0}.mlp.c_fc"}
    lp.peft.save(tmp_path, lora, 1.5, modules=modules, layout=layout, fan_in_fan_out=True)
    deltas = {
        modules[name].format(i): 1.5 * np.asarray(pair["lora_a"][i] @ pair["lora_b"][i])
        for name, pair in lora.items()
        for i in range(2)
    }
    expected = logits(with_added(model, deltas))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    np.testing.assert_allclose(logits(theirs), expected, rtol=0, atol=1e-11)
    theirs.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again, _ = lp.peft.load(tmp_path / "again", like=lora, modules=modules, layout=layout)
    jax.tree.map(np.testing.assert_array_equal, again, lora)


class Named(torch.nn.Module):
    """Linear layers under given dotted names, whatever they are."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            node, *path = self, *name.split(".")
            for part in path[:-1]:
                if part not in node._modules:
                    node.add_module(part, torch.nn.Module())
                node = node._modules[part]
            node.add_module(path[-1], torch.nn.Linear(6, 5))


def save_by_name(folder, settings, **options):
    """Saves one pair for each name, of its rank and scale; returns the pairs."""
    rng = np.random.default_rng(6)
    lora = {
        str(i): {"lora_a": jnp.asarray(rng.normal(size=(6, r)), jnp.float32),
                 "lora_b": jnp.asarray(rng.normal(size=(r, 5)), jnp.float32)}
        for i, (r, _) in enumerate(settings.values())
    }  # fmt: skip
    scales = {str(i): s for i, (_, s) in enumerate(settings.values())}
    modules = {str(i): name for i, name in enumerate(settings)}
    lp.peft.save(folder, lora, scales.__getitem__, modules=modules, **options)
    return {name: lora[str(i)] for i, name in enumerate(settings)}


def assert_settings(model, settings, pairs):
    layers = lora_layers(model)
    assert layers.keys() == settings.keys()
    for name, layer in layers.items():
        rank, scale = settings[name]
        assert layer.r["default"] == rank, name
        np.testing.assert_array_almost_equal_nulp(layer.scaling["default"], scale, nulp=1)
        for ours, theirs in (("lora_a", layer.lora_A), ("lora_b", layer.lora_B)):
            np.testing.assert_array_equal(theirs["default"].weight.detach().T, pairs[name][ours])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        [f"layers.{i}.{kind}" for i in range(24) for kind in ("q", "v")],
        ["q", "b.q", "a.b.q", "z.b.q", "a.bxq", "a.b_q", "axb.q", "b.qq.q"],
    ],
    ids=["layers 1 and 11", "names that end in, or read as a regex like, others"],
)
def test_every_module_gets_its_own_rank_and_scale(tmp_path, names, rslora):
    rng = np.random.default_rng(7)
    draw = {name: (int(rng.integers(1, 6)), float(rng.uniform(0.05, 4))) for name in names}
    pairs = save_by_name(tmp_path, draw, rslora=rslora)
    model = peft.PeftModel.from_pretrained(Named(names), tmp_path)
    assert_settings(model, draw, pairs)
    model.save_pretrained(tmp_path / "again")  # sorts the keys of rank_pattern
    again = peft.PeftModel.from_pretrained(Named(names), tmp_path / "again")
    assert_settings(again, draw, pairs)
    _, scales = lp.peft.load(tmp_path / "again")
    for name, layer in lora_layers(again).items():
        assert scales[name.replace(".", "/")] == layer.scaling["default"]


def test_a_module_without_an_adapter_stays_without_one(tmp_path):
    names = ["layers.1.q", "layers.11.q", "layers.1.q_norm", "q", "other.q"]
    settings = {"layers.1.q": (2, 1.0), "q": (2, 1.0)}
    with pytest.warns(UserWarning, match="missing adapter keys"):
        # The one limit: PEFT's target_modules "q" covers every module called q.
        model = peft.PeftModel.from_pretrained(Named(names), save(tmp_path / "short", settings))
    assert lora_layers(model).keys() == {"layers.1.q", "layers.11.q", "q", "other.q"}
    settings = {"layers.1.q": (2, 1.0)}
    model = peft.PeftModel.from_pretrained(Named(names), save(tmp_path / "long", settings))
    assert lora_layers(model).keys() == {"layers.1.q"}


def save(folder, settings):
    save_by_name(folder, settings)
    return folder


# ---------------------------------------------------------------- PEFT's, loaded by us

PEFT_CONFIGS = {
    "plain": dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    "rslora": dict(r=5, lora_alpha=7, use_rslora=True, target_modules="all-linear"),
    "a regex of targets": dict(r=2, target_modules=r".*layers\.(0|11)\..*_proj"),
    "patterns": dict(
        r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, r"^model\.layers\.11\..*": 3,
                      "k_proj": 5, r"layers\.(2|3)\.mlp\.\w+": 6},
        alpha_pattern={"up_proj": 9, "self_attn.q_proj": 2, "layers.1.mlp.down_proj": 11},
    ),
    "patterns with rslora": dict(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"],
        rank_pattern={"1.self_attn.q_proj": 2}, alpha_pattern={"layers.1.*": 3},
    ),
    "some layers": dict(r=2, target_modules=["v_proj"], layers_to_transform=[1, 4]),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_each_module_s_dense_delta_is_peft_s(tmp_path, case):
    model = peft.get_peft_model(llama(12), peft.LoraConfig(**PEFT_CONFIGS[case]))
    randomise(model).save_pretrained(tmp_path)
    lora, scales = lp.peft.load(tmp_path)
    layers = lora_layers(model)
    assert scales == {
        name.replace(".", "/"): layer.scaling["default"] for name, layer in layers.items()
    }
    for name, layer in layers.items():
        node = lora
        for part in name.split("."):
            node = node[part]
        delta = scales[name.replace(".", "/")] * np.asarray(node["lora_a"] @ node["lora_b"])
        expected = layer.get_delta_weight("default").detach().numpy().T
        np.testing.assert_allclose(delta, expected, rtol=1e-12, atol=1e-14)


def test_the_jax_bert_with_peft_s_adapter_computes_what_peft_computes(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    encoder = minilm.load(2, rngs=nnx.Rngs(0), path=tmp_path / "base").encoder
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value", "output.dense"])
    adapted = randomise(peft.get_peft_model(model, config))
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        theirs = adapted(tokens()).last_hidden_state.numpy()
    targets = r"layers/\d+/(attention/(query|value|out)|down)"
    lp.nnx.add_lora(encoder, 4, 6.0, targets=targets, rngs=nnx.Rngs(1))
    state = nnx.state(encoder, nnx.LoRAParam)
    used = {
        pattern.replace("(query|key|value)", "(query|value)"): name
        for pattern, name in BERT.items()
        if "/up" not in pattern
    }
    lora, scales = lp.peft.load(tmp_path / "adapter", like=state, modules=used)
    nnx.update(encoder, lora)
    assert set(scales.values()) == {1.5}
    ids = jnp.asarray(tokens().numpy(), jnp.int32)
    ours = forward(encoder, ids, jnp.ones(ids.shape, bool))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


UNSUPPORTED = {
    "use_dora": dict(use_dora=True),
    "bias": dict(bias="lora_only"),
    "lora_bias": dict(lora_bias=True),
    "modules_to_save": dict(modules_to_save=["lm_head"]),
    "init_lora_weights": dict(init_lora_weights="olora"),
    "trainable_token_indices": dict(trainable_token_indices=[1, 2]),
    "embed_tokens": dict(target_modules=["embed_tokens", "q_proj"]),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
# PEFT's own warnings about lora_bias and embeddings, as it writes them.
@pytest.mark.filterwarnings("ignore:.*(has no bias|have invalid shape)")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, case):
    options = dict(r=2, target_modules=["q_proj"]) | UNSUPPORTED[case]
    model = peft.get_peft_model(llama().float(), peft.LoraConfig(**options))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"adapter_.*{case}"):
        lp.peft.load(tmp_path)


def test_another_method_s_adapter_is_refused(tmp_path):
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[])
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"peft_type is 'IA3'.*expected 'LORA'"):
        lp.peft.load(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_through_unchanged(tmp_path, dtype):
    model = llama().to(getattr(torch, dtype))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    options = dict(autocast_adapter_dtype=False)
    randomise(peft.get_peft_model(model, config, **options)).save_pretrained(tmp_path / "theirs")
    lora, scales = lp.peft.load(tmp_path / "theirs")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(lora)} == {dtype}
    modules = {r"model/layers/(\d)/self_attn/q_proj": r"model.layers.\1.self_attn.q_proj"}
    lp.peft.save(tmp_path / "ours", lora, scales.__getitem__, modules=modules)
    theirs, ours = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("theirs", "ours")
    )
    assert ours == theirs
