"""The trainers people have, each for some steps: the loss falls, the base stays, factors move.

The lines that set them up are those of the guide's table, docs/trainers.md.
"""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import lorapro_jax as lp

GUIDE = (pathlib.Path(__file__).parent.parent / "docs" / "trainers.md").read_text()
TABLE = GUIDE.split("<!-- trainers -->\n")[1].split("\n\n")[0].splitlines()[2:]
LINES = {
    row.split(" | ")[0].removeprefix("| "): re.findall(r"`([^`]*)`", row.split(" | ", 1)[1])
    for row in TABLE
}
X = jax.random.normal(jax.random.key(0), (64, 8))
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (8, 4)))
third_party_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Linen(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="down")(nn.relu(nn.Dense(16, name="up")(x)))


class Nnx(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def mean_square(y):
    return jnp.mean((y - Y) ** 2)


def run_lines(start, **names):
    """Executes the two lines of the table's row that starts so; returns all names afterwards."""
    (lines,) = (lines for row, lines in LINES.items() if row.startswith(start))
    assert len(lines) == 2, lines
    exec("\n".join(lines), names)
    return names


def verify(before, after, losses):
    """`before`, `after`: {path: array}."""
    assert losses[-1] < 0.8 * losses[0], losses
    assert before.keys() == after.keys()
    assert {has_lora(path) for path in before} == {True, False}
    for path, value in before.items():
        if has_lora(path):
            assert np.any(np.asarray(after[path]) != np.asarray(value)), f"{path} did not move"
        else:
            np.testing.assert_array_equal(after[path], value, err_msg=path)


def leaves_of(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in flat}


def has_lora(path):
    return "lora" in path


def train_nnx(model, optimizer, steps=40):
    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(
            lambda model: mean_square(model(X)), argnums=nnx.DiffState(0, nnx.LoRAParam)
        )(model)
        optimizer.update(model, grads)
        return loss

    before = leaves_of(nnx.state(model, nnx.Param))
    losses = [float(step(model, optimizer)) for _ in range(steps)]
    verify(before, leaves_of(nnx.state(model, nnx.Param)), losses)


def train_tree(tx, params, loss_of, steps=40):
    """On the whole tree of parameters; what does not train must be frozen by `tx`."""

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    now, state, losses = params, tx.init(params), []
    for _ in range(steps):
        now, state, loss = step(now, state)
        losses.append(float(loss))
    verify(leaves_of(params), leaves_of(now), losses)
    return state


def test_nnx():
    model = Nnx(nnx.Rngs(0))
    names = run_lines("Flax NNX", lp=lp, nnx=nnx, model=model, rngs=nnx.Rngs(1))
    train_nnx(model, names["optimizer"])


def test_linen_train_state():
    model = Linen()
    params = model.init(jax.random.key(0), X)["params"]

    def apply_fn(lora, x):
        return lp.linen.apply_with_lora(model, {"params": params}, lora, x, scale=2.0)

    given = {"params": params, "apply_fn": apply_fn, "key": jax.random.key(1)}
    state = run_lines("Flax Linen", lp=lp, TrainState=TrainState, **given)["state"]
    before = leaves_of(params) | leaves_of(state.params)

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: mean_square(state.apply_fn(p, X)))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(40):
        state, loss = step(state)
        losses.append(float(loss))
    verify(before, leaves_of(params) | leaves_of(state.params), losses)


@third_party_warns
@pytest.mark.parametrize("quantized", [None, "int8"], ids=["float", "int8 base"])
def test_qwix_on_nnx(quantized):
    qwix = pytest.importorskip("qwix")

    def provider(**kwargs):
        return qwix.LoraProvider(**kwargs, weight_qtype=quantized)

    given = {"model": Nnx(nnx.Rngs(0)), "x": X, "rngs": nnx.Rngs(1), "lp": lp, "nnx": nnx}
    own = types.SimpleNamespace(LoraProvider=provider, apply_lora_to_model=qwix.apply_lora_to_model)
    names = run_lines("Qwix", qwix=own, **given)
    model = names["model"]
    dtypes = {str(x.dtype) for x in jax.tree.leaves(nnx.state(model, nnx.Param))}
    assert ("int8" in dtypes) == (quantized is not None)
    train_nnx(model, names["optimizer"])


@third_party_warns
def test_qlora_on_linen_splits_before_grad():
    """The quantised base has integer leaves, which jax.grad refuses."""
    qwix = pytest.importorskip("qwix")
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0, weight_qtype="int8")
    model = qwix.apply_lora_to_model(Linen(), provider)
    params = model.init(jax.random.key(0), X)["params"]
    lora, base = lp.split(params, layout=lp.layouts.QWIX)
    tx = lp.lorapro_adamw(1e-2, scale=2.0, layout=lp.layouts.QWIX)
    with pytest.raises(ValueError, match="int8.*lp.split"):
        lp.lorapro_adamw(1e-2, scale=2.0, layout=lp.layouts.QWIX).init(params)

    @jax.jit
    def step(lora, state):
        loss, grads = jax.value_and_grad(
            lambda lora: mean_square(model.apply({"params": lp.merge(lora, base)}, X))
        )(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    now, state, losses = lora, tx.init(lora), []
    for _ in range(40):
        now, state, loss = step(now, state)
        losses.append(float(loss))
    verify(leaves_of(params), leaves_of(lp.merge(now, base)), losses)


@third_party_warns
def test_tunix(tmp_path):
    qwix = pytest.importorskip("qwix")
    trainers = pytest.importorskip("tunix.sft.peft_trainer", reason="google-tunix: own command")
    config = trainers.TrainingConfig(eval_every_n_steps=100, max_steps=40)
    names = run_lines(
        "Tunix", lp=lp, qwix=qwix, PeftTrainer=trainers.PeftTrainer, config=config,
        model=Nnx(nnx.Rngs(0)), x=X, rngs=nnx.Rngs(1),
    )  # fmt: skip
    model, trainer = names["model"], names["trainer"]
    before = leaves_of(nnx.state(model, nnx.Param))
    first = float(mean_square(model(X)))
    trainer = trainer.with_loss_fn(lambda model, x: mean_square(model(x)))
    trainer.train([{"x": X}] * 40)
    last = float(mean_square(model(X)))
    verify(before, leaves_of(nnx.state(model, nnx.Param)), [first, last])


@third_party_warns
def test_gemma():
    peft = pytest.importorskip("gemma.peft")

    def replace(module):
        return peft.LoRADense(rank=2, wrapped=module) if isinstance(module, nn.Dense) else module

    def forward(params, x):
        with peft.ModuleInterceptor(replace):
            return Linen().apply({"params": params}, x)

    with peft.ModuleInterceptor(replace):
        params = Linen().init(jax.random.key(0), X)["params"]
    tx = run_lines("Gemma", lp=lp)["tx"]
    train_tree(tx, params, lambda params: mean_square(forward(params, X)))


def test_openpi():
    """Attention heads with a pair each, and an output projection that sums them."""
    shapes = {
        "q_einsum": {"w": (2, 8, 8), "lora_a": (2, 8, 2), "lora_b": (2, 2, 8)},
        "attn_vec_einsum": {"w": (2, 8, 4), "lora_a": (2, 8, 2), "lora_b": (2, 2, 4)},
    }
    keys = iter(jax.random.split(jax.random.key(0), 6))
    params = {
        module: {name: 0.3 * jax.random.normal(next(keys), shape) for name, shape in own.items()}
        for module, own in shapes.items()
    }

    def forward(params, x):
        q, o = params["q_einsum"], params["attn_vec_einsum"]
        low = jnp.einsum("BD,NDL->BNL", x, q["lora_a"])
        heads = jnp.einsum("BD,NDH->BNH", x, q["w"]) + jnp.einsum("BNL,NLH->BNH", low, q["lora_b"])
        heads = nn.relu(heads)
        low = jnp.einsum("BNH,NHL->BL", heads, o["lora_a"])
        out = jnp.einsum("BNH,NHD->BD", heads, o["w"])
        return out + jnp.einsum("BL,NLD->BD", low, o["lora_b"])

    tx = run_lines("openpi", lp=lp)["tx"]
    train_tree(tx, params, lambda params: mean_square(forward(params, X)))


@third_party_warns
def test_maxtext_style_scan_on_axis_1():
    qwix = pytest.importorskip("qwix")

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.relu(nn.Dense(8, name="mlp")(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3
            )
            return scanned(name="layers")(x, None)[0][:, :4]

    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0)
    model = qwix.apply_lora_to_model(Stack(), provider)
    params = model.init(jax.random.key(0), X)["params"]
    assert params["layers"]["mlp"]["kernel_lora_a"].shape == (8, 3, 2)
    tx = run_lines("MaxText-style", lp=lp)["tx"]
    train_tree(tx, params, lambda params: mean_square(model.apply({"params": params}, X)))


def lora_mask(params):
    return jax.tree.map(lambda label: label == "lora", lp.labels(params))


def base_mask(params):
    return jax.tree.map(lambda label: label != "lora", lp.labels(params))


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(lp.freeze_base(tx), 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(lp.freeze_base(tx), 3),
    "chain with clipping": lambda tx: lp.freeze_base(
        optax.chain(optax.clip_by_global_norm(1.0), tx)
    ),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, lora_mask), optax.masked(optax.set_to_zero(), base_mask)
    ),
    "partition": lambda tx: optax.partition({"lora": tx, "frozen": optax.set_to_zero()}, lp.labels),
    "selective_transform": lambda tx: optax.selective_transform(
        tx, freeze_mask=base_mask(linen_tree()[0])
    ),
}


def linen_tree():
    """(one tree of base weights and factors, its loss): each layer's factors beside its kernel."""
    model = Linen()
    params = model.init(jax.random.key(0), X)["params"]
    lora = lp.linen.init_lora(jax.random.key(1), params, rank=2, targets=r"up|down")

    def loss_of(tree):
        lora = {name: {k: v for k, v in node.items() if "lora" in k} for name, node in tree.items()}
        y = lp.linen.apply_with_lora(model, {"params": tree}, lora, X, scale=2.0)
        return mean_square(y)

    return {name: params[name] | lora[name] for name in params}, loss_of


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_optax_wrappers(wrapper):
    params, loss_of = linen_tree()
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-2, 5, 80)
    tx = WRAPPERS[wrapper](lp.lorapro_adamw(schedule, scale=2.0))
    train_tree(tx, params, loss_of, steps=60 if wrapper == "MultiSteps" else 40)


def test_inject_hyperparams_follows_the_schedule():
    params, loss_of = linen_tree()
    schedule = optax.linear_schedule(2e-2, 0.0, 40)
    tx = optax.inject_hyperparams(lp.lorapro_adamw)(learning_rate=schedule, scale=2.0)
    state = train_tree(lp.freeze_base(tx), params, loss_of)
    (injected,) = (
        inner
        for inner in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "hyperparams"))
        if hasattr(inner, "hyperparams")
    )
    # compiled as the step is: eagerly it is rounded otherwise, so near its end
    assert injected.hyperparams["learning_rate"] == pytest.approx(jax.jit(schedule)(jnp.int32(39)))
