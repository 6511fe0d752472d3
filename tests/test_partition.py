"""Labels for every leaf, a base that cannot move, and a tree that can be split and merged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import lorapro_jax as lp


def with_base(dtype=None):
    """A tree of pairs, kernels beside them, a head and an integer table."""
    params, grads, _ = trees.make(dtype=dtype)
    for tree in (params, grads):
        for node in tree.values():
            shape = node["lora_a"].shape[0], node["lora_b"].shape[1]
            node["kernel"] = jnp.linspace(-1, 1, shape[0] * shape[1]).reshape(shape)
        tree["head"] = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
    return params, grads


def boxed(tree):
    return jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), tree)


def as_state(tree):
    return nnx.State(jax.tree.map(nnx.Param, tree))


CONTAINERS = {"dict": lambda t: t, "FrozenDict": FrozenDict, "boxed": boxed, "nnx.State": as_state}
every_container = pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS.keys())


@every_container
def test_every_leaf_gets_a_label(wrap):
    params, _ = with_base()
    named = lp.labels(wrap(params), extra=[r"head/.*"])
    counts = {}
    for name in jax.tree.leaves(named):
        counts[name] = counts.get(name, 0) + 1
    assert counts == {"lora": 8, "frozen": 4, r"head/.*": 2}
    assert jax.tree.structure(named) == jax.tree.structure(wrap(params))


@every_container
@pytest.mark.parametrize("mode", trees.MODES)
def test_the_base_does_not_move_and_holds_no_state(wrap, mode):
    params, grads = with_base()
    params, grads = wrap(params), wrap(grads)
    tx = lp.freeze_base(
        trees.optimizer(mode, 1e-2, weight_decay=0.1),
        extra={r"head/.*": optax.adamw(1e-3)},
    )
    state = tx.init(params)
    lora_only, _ = lp.split(params)
    inner = trees.optimizer(mode, 1e-2).init(lora_only)
    held = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert held == sum(x.size for x in jax.tree.leaves(inner) if x.ndim) + 2 * (4 * 2 + 2)
    update = jax.jit(tx.update)
    new = params
    for _ in range(3):
        updates, state = update(grads, state, new)
        new = optax.apply_updates(new, updates)
    named = jax.tree.leaves(lp.labels(params, extra=[r"head/.*"]))
    for name, x, y in zip(named, jax.tree.leaves(params), jax.tree.leaves(new), strict=True):
        if name == "frozen":
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert np.any(np.asarray(x) != np.asarray(y))


@every_container
def test_split_and_merge_are_inverse(wrap):
    params = wrap(with_base()[0])
    lora, base = lp.split(params)
    assert len(jax.tree.leaves(lora)) == 8
    assert len(jax.tree.leaves(base)) == 6
    whole = lp.merge(lora, base)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True):
        assert x is y


def test_gradients_of_the_lora_half_alone():
    """Integer leaves of a quantised base are never differentiated."""
    params, _ = with_base()
    params["table"] = jnp.arange(5)
    lora, base = lp.split(params)

    def loss(lora):
        whole = lp.merge(lora, base)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(whole))

    grads = jax.jit(jax.grad(loss))(lora)
    assert len(jax.tree.leaves(grads)) == 8
    trees.assert_close(grads, jax.tree.map(lambda x: 2 * x, lora))
    tx = lp.lorapro_adamw(1e-2, trees.SCALE)
    updates, _ = jax.jit(tx.update)(grads, tx.init(lora), lora)
    merged = lp.merge(optax.apply_updates(lora, updates), base)
    assert merged["table"] is params["table"]


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.LoRALinear(6, 6, lora_rank=2, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@pytest.mark.parametrize("mode", trees.MODES)
@pytest.mark.parametrize("frozen", [False, True])
def test_nnx_optimizer_trains_the_adapters_only(mode, frozen):
    """wrt=LoRAParam, and wrt=Param with freeze_base, on flax's own LoRALinear."""
    model = Model(nnx.Rngs(0))
    tx = trees.optimizer(mode, 1e-2, 1.0)
    wrt = nnx.Param if frozen else nnx.LoRAParam
    optimizer = nnx.Optimizer(model, lp.freeze_base(tx) if frozen else tx, wrt=wrt)
    before = {path: np.asarray(x) for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    x, y = jnp.linspace(-1, 1, 24).reshape(4, 6), jnp.ones((4, 6)) * 0.3

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(
            lambda m: jnp.mean((m(x) - y) ** 2), argnums=nnx.DiffState(0, wrt)
        )(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        moved = before[path].tobytes() != np.asarray(value).tobytes()
        assert moved == (path[-1] in ("lora_a", "lora_b")), path


def test_a_pattern_that_matches_nothing_names_the_near_miss():
    params, _ = with_base()
    with pytest.raises(ValueError, match=r"extra 'heads/\.\*' matches none.*Nearest: head/"):
        lp.labels(params, extra=[r"heads/.*"])
    tx = lp.freeze_base(optax.sgd(1.0), extra={r"heads/.*": optax.sgd(1.0)})
    with pytest.raises(ValueError, match="matches none"):
        tx.init(params)


def test_patterns_match_whole_paths_and_may_not_overlap():
    params, _ = with_base()
    with pytest.raises(ValueError, match="matches none"):
        lp.labels(params, extra=["head"])
    with pytest.raises(ValueError, match="head/.* is matched by .*disjoint"):
        lp.labels(params, extra=[r"head/.*", r".*/bias"])
    with pytest.raises(ValueError, match="label is taken"):
        lp.freeze_base(optax.sgd(1.0), extra={"frozen": optax.sgd(1.0)})


def test_a_wide_pattern_leaves_the_factors_to_lora_pro():
    params, _ = with_base()
    named = lp.labels(params, extra=[".*"])
    assert named["up_0"] == {"kernel": ".*", "lora_a": "lora", "lora_b": "lora"}


def test_a_tree_without_adapters_would_not_train_and_is_refused():
    for call in (lp.labels, lp.split, lp.freeze_base(optax.sgd(1.0)).init):
        with pytest.raises(ValueError, match="none of 1 leaves is a LoRA factor"):
            call({"kernel": jnp.ones((2, 2))})


def test_halves_that_do_not_fit_are_refused():
    params, _ = with_base()
    lora, base = lp.split(params)
    with pytest.raises(ValueError, match="kernel is in both lora and base"):
        lp.merge(params, base)
    with pytest.raises(ValueError, match="not two halves of one tree"):
        lp.merge(lora, {"other": None})


def test_empty_parts_of_a_tree_stay_empty():
    """As the zero point of a kernel that qwix quantised symmetrically."""
    params, _ = with_base()
    params["q8"] = {"scale": jnp.ones(2), "zero_point": None}
    whole = lp.merge(*lp.split(params))
    assert jax.tree.structure(whole) == jax.tree.structure(params)
