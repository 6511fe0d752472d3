"""Each preset against the forward pass of the project whose factors it reads.

The truth is what that project's own code adds to a layer's output: a linear map of the input, whose
Jacobian is delta K. Its entries, autodiff's gradients through it, and the dense oracle's solution
for those entries must be what the layout's view of the leaves gives. Where PyPI has no working
package the forward pass is the project's equation in einsum, with its shapes and paths.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from flax import nnx

import lorapro_jax as lp
from lorapro_jax._layouts import find_pairs, flatten, read
from lorapro_jax._partition import labels

pytestmark = pytest.mark.usefixtures("x64")
RANK, D, N, H, F = 2, 6, 3, 4, 5  # rank, model width, heads, head size, feed-forward width


def randomised(tree, seed=0):
    """The same tree with normal entries in float64, so that no factor is zero."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, x.shape, jnp.float64) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


def jacobian(forward, params, in_shape):
    """The kernel that `forward(params, x)` applies to one input, as (*inputs, *outputs)."""
    J = jax.jacobian(lambda x: forward(params, x))(jnp.zeros(in_shape))
    out = J.ndim - len(in_shape)
    return jnp.moveaxis(J, range(out), range(-out, 0))


def check(params, deltas, layout, scale, expected_pairs):
    """`deltas(params)`: {pair: (batch, m, n)}, what the project's forward adds to each kernel."""
    paths, leaves, treedef = flatten(params)
    pairs = find_pairs(paths, leaves, layout, require_pairs=True)
    assert [pair.path for pair in pairs] == sorted(expected_pairs)
    truth = jax.jit(deltas)(params)
    rng = np.random.default_rng(5)
    G = {name: rng.normal(size=delta.shape) for name, delta in truth.items()}

    def loss(params):
        return sum(jnp.vdot(G[name], delta) for name, delta in deltas(params).items())

    grads = jax.jit(jax.grad(loss))(params)
    tx = lp.lorapro(scale, layout=layout, damping=0.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    in_pairs = {paths[i] for pair in pairs for i in (pair.a, pair.b)}
    label_of = dict(zip(paths, jax.tree.leaves(labels(params, layout=layout)), strict=True))
    assert {path for path, label in label_of.items() if label == "lora"} == in_pairs
    for pair in pairs:
        views = read(pair, leaves), read(pair, treedef.flatten_up_to(grads), gradients=True)
        views = *views, read(pair, treedef.flatten_up_to(updates))
        # one entry of the batch after the other
        (a, b), (h_a, h_b), (da, db) = (
            [np.asarray(x).reshape(len(truth[pair.path]), -1) for x in view] for view in views
        )
        for i, (delta, g) in enumerate(zip(truth[pair.path], G[pair.path], strict=True)):
            a2, b2 = a[i].reshape(-1, RANK), b[i].reshape(RANK, -1)
            np.testing.assert_allclose(scale * a2 @ b2, delta, atol=1e-12)
            for ours, theirs in zip(
                (h_a[i], h_b[i]), oracle.factor_gradients(a2, b2, g, scale), strict=True
            ):
                np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=1e-12)
            solution = oracle.minimum_norm_solution(a2, b2, g, scale)
            for ours, theirs in zip((da[i], db[i]), solution, strict=True):
                np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=1e-8)


# ---------------------------------------------------------------- flax


def test_flax_nnx_lora():
    graph, state = nnx.split(nnx.LoRA(D, RANK, F, rngs=nnx.Rngs(0)))
    params = randomised(nnx.to_pure_dict(state))

    def deltas(params):
        return {"lora": jacobian(lambda p, x: nnx.merge(graph, p)(x), params, (D,))[None]}

    check(params, deltas, lp.layouts.FLAX, 1.0, ["lora"])


def test_flax_nnx_lora_linear_with_its_base():
    graph, state = nnx.split(nnx.LoRALinear(D, F, lora_rank=RANK, rngs=nnx.Rngs(0)))
    params = randomised(nnx.to_pure_dict(state))

    def deltas(params):
        whole = jacobian(lambda p, x: nnx.merge(graph, p)(x), params, (D,))
        return {"lora": (whole - params["kernel"])[None]}

    check(params, deltas, lp.layouts.FLAX, 1.0, ["lora"])


def test_flax_nnx_lora_over_a_layer_and_stacked_by_vmap():
    @nnx.vmap
    def layers(rngs):
        return nnx.LoRA(D, RANK, F, rngs=rngs)

    graph, state = nnx.split(layers(nnx.Rngs(0).split(3)))
    params = randomised({"layers": nnx.to_pure_dict(state)})

    def deltas(params):
        @nnx.vmap
        def outputs(layer, x):
            return layer(x)

        # one input a layer: only the blocks of a layer's own input are not zero
        J = jacobian(lambda p, x: outputs(nnx.merge(graph, p["layers"]), x), params, (3, D))
        return {"layers": jnp.stack([J[i, :, i] for i in range(3)])}

    stacked = lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))
    check(params, deltas, lp.layouts.FLAX.declare({"layers": stacked}), 1.0, ["layers"])


# ---------------------------------------------------------------- qwix

# qwix 0.1.8 calls names that flax has deprecated
qwix_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(F, name="up")(x)


class Query(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((N, H), name="q")(x)


class Output(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(D, axis=(-2, -1), name="o")(x)


class Einsum(nnx.Module):
    """In NNX: qwix's own einsum rule fails on a compact Linen module, which is frozen."""

    def __init__(self, equation, shape):
        self.equation, self.w = equation, nnx.Param(jnp.ones(shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


def _qwix(model, x, alpha=3.0):
    """(randomised lora and base parameters, forward) of a Linen or NNX model under qwix."""
    qwix = pytest.importorskip("qwix")
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=alpha)
    if isinstance(model, nnx.Module):
        adapted = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))
        graph, params, rest = nnx.split(adapted, nnx.Param, ...)
        params = randomised(nnx.to_pure_dict(params))
        return params, lambda params, x: nnx.merge(graph, params, rest)(x)
    adapted = qwix.apply_lora_to_model(model, provider)
    params = randomised(adapted.init(jax.random.key(0), x)["params"])
    return params, lambda params, x: adapted.apply({"params": params}, x)


def _without_lora(params):
    """The same tree with every lora_b at zero, which is the base model."""
    paths, leaves, treedef = flatten(params)
    zeroed = [x * (not p.endswith("lora_b")) for p, x in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(treedef, zeroed)


QWIX = {
    # name: model, shape of one input, path of the pair
    "dense": (Dense, (D,), "up/kernel"),
    "query": (Query, (D,), "q/kernel"),
    "output": (Output, (N, H), "o/kernel"),
    "einsum query": (lambda: Einsum("D,DNH->NH", (D, N, H)), (D,), "w"),
    "einsum key and value share a": (lambda: Einsum("D,CDKH->CKH", (2, D, N, H)), (D,), "w"),
    "einsum output": (lambda: Einsum("NH,NHD->D", (N, H, D)), (N, H), "w"),
}


@qwix_warns
@pytest.mark.parametrize("case", QWIX)
def test_qwix_on_dense_and_einsum(case):
    model, in_shape, pair = QWIX[case]
    params, forward = _qwix(model(), jnp.ones(in_shape))

    def deltas(params):
        J = jacobian(forward, params, in_shape) - jacobian(forward, _without_lora(params), in_shape)
        return {pair: J.reshape(1, np.prod(in_shape), -1)}

    check(params, deltas, lp.layouts.QWIX, 3.0 / RANK, [pair])


@qwix_warns
def test_qwix_experts_that_share_b_are_one_matrix():
    """EBD,EDF->EBF: a (E, D, r), b (r, F); the experts' kernels one below the other."""
    experts = 4
    params, forward = _qwix(Einsum("ED,EDF->EF", (experts, D, F)), jnp.ones((experts, D)))

    def deltas(params):
        shape = (experts, D)
        J = jacobian(forward, params, shape) - jacobian(forward, _without_lora(params), shape)
        own = jnp.stack([J[e, :, e] for e in range(experts)])  # (E, D, F)
        return {"w": own.reshape(1, experts * D, F)}

    check(params, deltas, lp.layouts.QWIX, 3.0 / RANK, ["w"])


@qwix_warns
@pytest.mark.parametrize("axis", [0, 1])
def test_qwix_under_nn_scan(axis):
    layers = 3

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(D, name="dense")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=layers
            )
            return scanned(name="layers")(x, None)[0]

    params, _ = _qwix(Stack(), jnp.ones((D,)))
    factors = params["layers"]["dense"]
    qwix = pytest.importorskip("qwix")
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=3.0)
    one = qwix.apply_lora_to_model(nn.Dense(D), provider)

    def deltas(params):
        def delta(layer):
            p = jax.tree.map(lambda x: jnp.take(x, layer, axis), params["layers"]["dense"])
            return jacobian(lambda p, x: one.apply({"params": p}, x), p, (D,)) - p["kernel"]

        return {"layers/dense/kernel": jnp.stack([delta(i) for i in range(layers)])}

    assert factors["kernel_lora_a"].shape == ((layers, D, RANK), (D, layers, RANK))[axis]
    dims = lp.LoRADimensionNumbers(a_batch=(axis,), b_batch=(axis,))
    layout = lp.layouts.QWIX.declare({r"layers/.*": dims})
    check(params, deltas, layout, 3.0 / RANK, ["layers/dense/kernel"])


@qwix_warns
def test_qwix_on_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(D, F, rngs=rngs)

        def __call__(self, x):
            return self.up(x)

    params, forward = _qwix(Model(nnx.Rngs(0)), jnp.ones((D,)))

    def deltas(params):
        return {"up/kernel": (jacobian(forward, params, (D,)) - params["up"]["kernel"])[None]}

    check(params, deltas, lp.layouts.QWIX, 3.0 / RANK, ["up/kernel"])


# ---------------------------------------------------------------- gemma

GEMMA = {
    "einsum query": ("D,NDH->NH", (N, D, H), (D,)),
    "einsum output": ("NH,NHD->D", (N, H, D), (N, H)),
    "gating": ("F,CFH->CH", (2, D, F), (D,)),
}


@pytest.mark.parametrize("case", GEMMA)
def test_gemma_einsum(case):
    peft = pytest.importorskip("gemma.peft")
    equation, shape, in_shape = GEMMA[case]
    adapter = peft.LoRAEinsumAdapter(
        rank=RANK, einsum_str=equation, shape=shape, dtype=jnp.float64, name=None
    )
    inner = adapter.init(jax.random.key(0), jnp.ones(in_shape))["params"]
    params = {"attn": {"q_einsum": {"_LoRAEinsum_0": {"lora": randomised(inner)}}}}

    def deltas(params):
        p = {"params": params["attn"]["q_einsum"]["_LoRAEinsum_0"]["lora"]}
        J = jacobian(adapter.apply, p, in_shape)
        return {"attn/q_einsum/_LoRAEinsum_0/lora": J.reshape(1, np.prod(in_shape), -1)}

    check(params, deltas, lp.layouts.GEMMA, 1.0, ["attn/q_einsum/_LoRAEinsum_0/lora"])


@pytest.mark.parametrize("case", ["dense", "general"])
def test_gemma_in_a_model_by_its_interceptor(case):
    peft = pytest.importorskip("gemma.peft")
    model = {"dense": Dense(), "general": Query()}[case]

    def replace(module):
        if isinstance(module, nn.Dense):
            return peft.LoRADense(rank=RANK, wrapped=module, dtype=jnp.float64)
        if isinstance(module, nn.DenseGeneral):
            return peft.LoRADenseGeneral(rank=RANK, wrapped=module, dtype=jnp.float64)
        return module

    def forward(params, x):
        with peft.ModuleInterceptor(replace):
            return model.apply({"params": params}, x)

    with peft.ModuleInterceptor(replace):
        params = randomised(model.init(jax.random.key(0), jnp.ones((D,)))["params"])
    (name,) = params
    (base,) = (k for k in params[name] if k == "kernel")

    def deltas(params):
        J = jacobian(forward, params, (D,)) - params[name][base]
        return {f"{name}/lora": J.reshape(1, D, -1)}

    check(params, deltas, lp.layouts.GEMMA, 1.0, [f"{name}/lora"])


def test_gemma_scanned_layers_are_declared():
    params = randomised({"layers": {"mlp": {"lora": {"a": jnp.ones((3, D, RANK)),
                                                     "b": jnp.ones((3, RANK, F))}}}})  # fmt: skip

    def deltas(params):
        node = params["layers"]["mlp"]["lora"]
        each = jax.vmap(lambda p: jacobian(lambda p, x: x @ p["a"] @ p["b"], p, (D,)))
        return {"layers/mlp/lora": each(node)}

    dims = lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))
    with pytest.raises(ValueError, match=r"layers/mlp/lora is ambiguous.*a_batch=\(0,\)"):
        lp.lorapro(1.0, layout=lp.layouts.GEMMA).init(params)
    layout = lp.layouts.GEMMA.declare({"layers/.*": dims})
    check(params, deltas, layout, 1.0, ["layers/mlp/lora"])


# ---------------------------------------------------------------- openpi


def _openpi(equation, x, a, b):
    """openpi's two einsums for a kernel einsum, the rank's letter L in turn for each kernel axis.

    `equation` is BTD,NDH->BTNH or alike; the axes of the kernel that a and b replace are its last
    two. A letter that is missing from an output is summed over where it is missing.
    """
    lhs, rest = equation.split(",")
    rhs, out = rest.split("->")
    rows, columns = rhs[-2], rhs[-1]
    middle = out.replace(columns, "L")
    low = jnp.einsum(f"{lhs},{rhs.replace(columns, 'L')}->{middle}", x, a)
    return jnp.einsum(f"{middle},{rhs.replace(rows, 'L')}->{out}", low, b)


OPENPI = {
    # name: equation, kernel, whether heads are independent
    "q_einsum": ("D,NDH->NH", (N, D, H)),
    "attn_vec_einsum": ("NH,NHD->D", (N, H, D)),
}


@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("case", OPENPI)
def test_openpi_attention(case, layers):
    equation, (heads, rows, columns) = OPENPI[case]
    stack = () if layers is None else (layers,)
    node = {"lora_a": jnp.ones((*stack, heads, rows, RANK)),
            "lora_b": jnp.ones((*stack, heads, RANK, columns))}  # fmt: skip
    params = randomised({"attn": {case: node}})
    in_shape = (D,) if case == "q_einsum" else (heads, rows)

    def one(node):
        J = jacobian(
            lambda p, x: 2.0 * _openpi(equation, x, p["lora_a"], p["lora_b"]), node, in_shape
        )
        if case == "q_einsum":  # (D, N, H): a kernel for each head
            return jnp.moveaxis(J, 1, 0)
        return J.reshape(1, heads * rows, columns)

    def deltas(params):
        node = params["attn"][case]
        found = one(node) if layers is None else jax.vmap(one)(node)
        return {f"attn/{case}": found.reshape(-1, *found.shape[-2:])}

    check(params, deltas, lp.layouts.OPENPI, 2.0, [f"attn/{case}"])


def test_openpi_feed_forward():
    params = randomised({
        "mlp": {
            "gating_einsum_lora_a": jnp.ones((2, D, RANK)),
            "gating_einsum_lora_b": jnp.ones((2, RANK, F)),
            "linear_lora_a": jnp.ones((F, RANK)),
            "linear_lora_b": jnp.ones((RANK, D)),
        }
    })  # fmt: skip

    def deltas(params):
        p = params["mlp"]

        def gate(i):
            return jacobian(
                lambda p, x: x @ p["gating_einsum_lora_a"][i] @ p["gating_einsum_lora_b"][i],
                p,
                (D,),
            )

        down = jacobian(lambda p, x: x @ p["linear_lora_a"] @ p["linear_lora_b"], p, (F,))
        return {"mlp/gating_einsum": jnp.stack([gate(0), gate(1)]), "mlp/linear": down[None]}

    check(params, deltas, lp.layouts.OPENPI, 1.0, ["mlp/gating_einsum", "mlp/linear"])


# ---------------------------------------------------------------- PEFT, lorax, maxdiffusion

NAMES = {
    "adapter file": "base_model.model.encoder.q_proj.lora_{}.weight",
    "adapter's name": "base_model.model.encoder.q_proj.lora_{}.default.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_peft_orientation_in_a_flat_dict(name):
    names = {letter: NAMES[name].format(letter) for letter in "AB"}
    params = randomised({names["A"]: jnp.ones((RANK, D)), names["B"]: jnp.ones((F, RANK))})

    def deltas(params):
        J = jacobian(lambda p, x: 2.0 * p[names["B"]] @ (p[names["A"]] @ x), params, (D,))
        return {"base_model.model.encoder.q_proj": J[None]}

    check(params, deltas, lp.layouts.PEFT, 2.0, ["base_model.model.encoder.q_proj"])


def test_haliax_nested_names():
    params = randomised({"q": {"lora": {"lora_A": {"weight": jnp.ones((RANK, D))},
                                        "lora_B": {"weight": jnp.ones((F, RANK))}}}})  # fmt: skip

    def deltas(params):
        node = params["q"]["lora"]

        def forward(node, x):
            return node["lora_B"]["weight"] @ (node["lora_A"]["weight"] @ x)

        return {"q/lora": jacobian(forward, node, (D,))[None]}

    check(params, deltas, lp.layouts.PEFT, 1.0, ["q/lora"])


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "a", "b"], meta_fields=[])
class LoraWeight:
    """lorax's node, in place of the kernel."""

    def __init__(self, w, a, b):
        self.w, self.a, self.b = w, a, b


def test_lorax_has_the_roles_swapped():
    weight = LoraWeight(jnp.ones((D, F)), jnp.ones((RANK, F)), jnp.ones((D, RANK)))
    params = randomised({"dense": {"kernel": weight, "bias": jnp.ones(F)}})

    def deltas(params):
        def forward(p, x):
            node = p["dense"]["kernel"]
            return x @ (2.0 * node.b @ node.a)

        return {"dense/kernel": jacobian(forward, params, (D,))[None]}

    check(params, deltas, lp.layouts.LORAX, 2.0, ["dense/kernel"])


def test_maxdiffusion_dense_and_convolution():
    params = randomised({
        "to_q": {"lora-0": {"down": {"kernel": jnp.ones((D, RANK))},
                            "up": {"kernel": jnp.ones((RANK, F))}}},
        "conv": {"lora-0": {"down": {"kernel": jnp.ones((3, 3, D, RANK))},
                            "up": {"kernel": jnp.ones((1, 1, RANK, F))}}},
    })  # fmt: skip

    def deltas(params):
        dense = params["to_q"]["lora-0"]
        J = jacobian(lambda p, x: x @ p["down"]["kernel"] @ p["up"]["kernel"], dense, (D,))

        def convolve(p, x):
            """At one output position: a 3 x 3 patch."""
            low = jax.lax.conv_general_dilated(
                x[None], p["down"]["kernel"], (1, 1), "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
            out = jax.lax.conv_general_dilated(
                low, p["up"]["kernel"], (1, 1), "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
            return out[0, 0, 0]

        conv = jacobian(convolve, params["conv"]["lora-0"], (3, 3, D)).reshape(1, 9 * D, F)
        return {"to_q/lora-0": J[None], "conv/lora-0": conv}

    layout = lp.layouts.MAXDIFFUSION.declare({"conv/.*": lp.LoRADimensionNumbers(b_rank=2)})
    check(params, deltas, layout, 1.0, ["conv/lora-0", "to_q/lora-0"])


def test_a_summed_axis_cannot_be_the_rank():
    params = {"q": {"lora_a": jnp.ones((N, H, RANK)), "lora_b": jnp.ones((N, RANK, D))}}
    dims = lp.LoRADimensionNumbers(b_rank=0, b_sum=(0,))
    with pytest.raises(ValueError, match="axis 0 of b was declared both rank and summed"):
        lp.lorapro(1.0, layout=lp.layouts.FLAX.declare({"q": dims})).init(params)
