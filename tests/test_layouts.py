"""Which leaves pair up, which axes are which, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lorapro_jax as lp
from lorapro_jax._layouts import find_pairs, flatten, read, write
from lorapro_jax._paths import path_str


def pairs_of(tree, layout=None, require_pairs=True):
    paths, leaves, _ = flatten(tree)
    return find_pairs(paths, leaves, layout, require_pairs=require_pairs)


def node(a, b, prefix=""):
    return {f"{prefix}lora_a": jnp.ones(a), f"{prefix}lora_b": jnp.ones(b)}


def test_both_spellings_of_the_flax_preset():
    tree = {
        "layers": {"q": {"kernel": jnp.ones((6, 4)), **node((6, 2), (2, 4), "kernel_")}},
        "head": {"lora": node((4, 2), (2, 5))},
    }
    assert [pair.path for pair in pairs_of(tree)] == ["head/lora", "layers/q/kernel"]


def test_nnx_variables_and_their_values_have_the_same_paths():
    """nnx.Optimizer calls init on State[Variable] and update on plain arrays."""
    state = nnx.state(nnx.LoRALinear(4, 5, lora_rank=2, rngs=nnx.Rngs(0)), nnx.LoRAParam)
    with_value, pure = flatten(state)[0], flatten(nnx.to_pure_dict(state))[0]
    assert with_value == pure == ["lora/lora_a", "lora/lora_b"]


@pytest.mark.parametrize("name", ["value", "array"])
def test_a_parameter_that_is_called_value_keeps_its_name(name):
    (path, _), *_ = jax.tree_util.tree_flatten_with_path({"q": {name: 1.0}})[0]
    assert path_str(path) == f"q/{name}"


def test_a_name_that_merely_ends_alike_is_no_factor():
    """DeepSeek-style wq_a, wkv_b; and words that end in the factor's name."""
    tree = {"attention": {"wq_a": jnp.ones((4, 2)), "wkv_b": jnp.ones((2, 4))},
            "explora_a": jnp.ones((4, 2))}  # fmt: skip
    assert pairs_of(tree, require_pairs=False) == ()


def test_the_root_can_be_a_pair():
    assert [pair.path for pair in pairs_of(node((6, 2), (2, 4)))] == ["lora"]


@pytest.mark.parametrize("missing", ["lora_a", "lora_b"])
def test_a_missing_partner_is_an_error(missing):
    tree = {"layers_0": {"q": node((6, 2), (2, 4))}}
    del tree["layers_0"]["q"][missing]
    with pytest.raises(ValueError, match=r"layers_0/q has lora_. .* but no matching"):
        pairs_of(tree)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((6, 2), (3, 4), "rank 2 .* rank 3"),
        ((5, 6, 2), (5, 2, 4), r"q is ambiguous.*LoRADimensionNumbers\(a_batch"),
        ((5, 6, 2), (5, 2, 3, 4), "q is ambiguous"),
        ((6,), (2, 4), "rank 6 .* rank 2"),
        ((6, 2), (3, 2, 4), r"rank 2 .* rank 3.*declare"),
    ],
)
def test_shapes_that_do_not_fit_or_do_not_tell(a, b, message):
    with pytest.raises(ValueError, match=message):
        pairs_of({"q": node(a, b)})


def test_batches_that_differ_are_an_error():
    layout = lp.layouts.FLAX.declare({"q": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))})
    with pytest.raises(ValueError, match=r"batch \[5\].*batch \[4\]"):
        pairs_of({"q": node((5, 6, 2), (4, 2, 4))}, layout)


@pytest.mark.parametrize(
    "dims",
    [
        lp.LoRADimensionNumbers(a_batch=(3,)),
        lp.LoRADimensionNumbers(a_rank=0, a_batch=(0,)),
        lp.LoRADimensionNumbers(a_batch=(0, 0)),
        lp.LoRADimensionNumbers(a_batch=(0, 1)),
    ],
)
def test_impossible_declarations_are_errors(dims):
    layout = lp.layouts.FLAX.declare({"q": dims})
    with pytest.raises(ValueError, match="^q: "):
        pairs_of({"q": node((6, 2), (2, 4))}, layout)


def test_no_pair_at_all_is_an_error_unless_asked_for():
    with pytest.raises(ValueError, match="none of 1 leaves is a LoRA factor.*require_pairs=False"):
        pairs_of({"kernel": jnp.ones((3, 3))})
    assert pairs_of({"kernel": jnp.ones((3, 3))}, require_pairs=False) == ()
    assert pairs_of({}) == ()


def test_a_declaration_that_matches_no_pair_names_the_near_miss():
    layout = lp.layouts.FLAX.declare({"layer/q": lp.LoRADimensionNumbers()})
    with pytest.raises(ValueError, match=r"layer/q.*Nearest: layers/q"):
        pairs_of({"layers": {"q": node((6, 2), (2, 4))}}, layout)


@pytest.mark.parametrize("dtype", ["int8", "bool", "float0"])
def test_a_factor_without_a_gradient_is_an_error(dtype):
    dtype = jax.dtypes.float0 if dtype == "float0" else np.dtype(dtype)
    tree = {"q": {"lora_a": np.zeros((6, 2), dtype), "lora_b": jnp.ones((2, 4))}}
    with pytest.raises(ValueError, match="q/lora_a has dtype .*lp.split"):
        pairs_of(tree)


CASES = {
    "stacked layers": ((5, 6, 2), (5, 2, 4), dict(a_batch=(0,), b_batch=(0,))),
    "scan on axis 1": ((6, 5, 2), (2, 5, 4), dict(a_batch=(1,), b_batch=(1,))),
    "heads kept": ((6, 2), (2, 3, 4), {}),
    "two input axes": ((3, 4, 2), (2, 6), {}),
    "layers and heads": ((5, 3, 6, 2), (5, 3, 2, 4), dict(a_batch=(0, 1), b_batch=(0, 1))),
    "batch axes crossed": ((5, 3, 6, 2), (3, 5, 2, 4), dict(a_batch=(0, 1), b_batch=(1, 0))),
    "peft": ((2, 6), (4, 2), dict(a_rank=0, b_rank=1)),
    "negative axes": ((5, 6, 2), (5, 2, 4), dict(b_rank=-2, a_batch=(-3,), b_batch=(0,))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_declared_axes_give_each_batch_its_own_dense_solution(x64, case):
    """einsum over the declared axes is the truth: delta K, its gradients, then the oracle."""
    a_shape, b_shape, dims = CASES[case]
    rng = np.random.default_rng(3)
    tree = {"q": {"lora_a": jnp.asarray(rng.normal(size=a_shape)),
                  "lora_b": jnp.asarray(rng.normal(size=b_shape))}}  # fmt: skip
    layout = lp.layouts.FLAX.declare({"q": lp.LoRADimensionNumbers(**dims)})
    (pair,) = pairs_of(tree, layout)
    leaves = jax.tree.leaves(tree)
    a, b = (np.asarray(x) for x in read(pair, leaves))
    batches = len(dims.get("a_batch", ()))
    batch, r = int(np.prod(a.shape[:batches])), a.shape[-1]
    a, b = a.reshape(batch, -1, r), b.reshape(batch, r, -1)
    G = rng.normal(size=(batch, a.shape[1], b.shape[2]))
    grads = [jnp.zeros_like(leaf) for leaf in leaves]
    h = [oracle.factor_gradients(a[i], b[i], G[i], 2.0) for i in range(batch)]
    shaped = [x.shape for x in read(pair, leaves)]
    write(pair, *(jnp.stack([x[j] for x in h]).reshape(shaped[j]) for j in (0, 1)), grads)
    tx = lp.lorapro(2.0, layout=layout, damping=0.0)
    grads = jax.tree.unflatten(jax.tree.structure(tree), grads)
    updates, _ = jax.jit(tx.update)(grads, tx.init(tree), tree)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, tree)
    da, db = (np.asarray(x).reshape(batch, -1) for x in read(pair, jax.tree.leaves(updates)))
    for i in range(batch):
        found = da[i].reshape(a[i].shape), db[i].reshape(b[i].shape)
        expected = oracle.minimum_norm_solution(a[i], b[i], G[i], 2.0)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-8)


def test_reading_a_stack_is_indexing_the_layers():
    a, b = jnp.arange(60.0).reshape(6, 5, 2), jnp.arange(40.0).reshape(2, 5, 4)
    layout = lp.layouts.FLAX.declare({"q": lp.LoRADimensionNumbers(a_batch=(1,), b_batch=(1,))})
    tree = {"q": {"lora_a": a, "lora_b": b}}
    (pair,) = pairs_of(tree, layout)
    got_a, got_b = read(pair, jax.tree.leaves(tree))
    for layer in range(5):
        np.testing.assert_array_equal(got_a[layer], a[:, layer])
        np.testing.assert_array_equal(got_b[layer], b[:, layer])


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_write_undoes_read_for_any_declaration(data):
    def axes(extra):
        order = data.draw(st.permutations(range(1 + batches + extra)))
        return order[0], tuple(order[1 : 1 + batches]), order[1 + batches :]

    batches = data.draw(st.integers(0, 2))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=batches, max_size=batches))
    (a_rank, a_batch, a_rest), (b_rank, b_batch, b_rest) = (
        axes(data.draw(st.integers(1, 2))) for _ in range(2)
    )

    def shape(rank, batch, rest):
        full = {rank: 2, **dict(zip(batch, sizes, strict=True)), **dict.fromkeys(rest, 3)}
        return [full[axis] for axis in range(len(full))]

    shapes = shape(a_rank, a_batch, a_rest), shape(b_rank, b_batch, b_rest)
    tree = {"q": dict(zip(("lora_a", "lora_b"), map(_numbered, shapes), strict=True))}
    dims = lp.LoRADimensionNumbers(a_rank, b_rank, a_batch, b_batch)
    (pair,) = pairs_of(tree, lp.layouts.FLAX.declare({".*": dims}))
    leaves = jax.tree.leaves(tree)
    out = [jnp.zeros_like(leaf) for leaf in leaves]
    write(pair, *read(pair, leaves), out)
    for x, y in zip(out, leaves, strict=True):
        np.testing.assert_array_equal(x, y)


def _numbered(shape):
    return jnp.arange(float(np.prod(shape))).reshape(shape)
