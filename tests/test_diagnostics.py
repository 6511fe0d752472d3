"""Diagnostics against the dense arrays they avoid."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import trees

import lorapro_jax as lp


def cosine(x, y):
    return np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y))


@jax.jit
def diagnose(params, grads, updates=None):
    return lp.diagnose(params, grads, trees.SCALE, updates=updates)


def test_every_figure_against_dense_arrays(x64):
    params, grads, dense = trees.make()
    found = jax.jit(lambda p, g: lp.diagnose(p, g, trees.SCALE, damping=1e-2))(params, grads)
    assert set(found) == set(dense)
    for name, (a, b, G) in dense.items():
        target = oracle.projection(a, b, G)
        da, db = oracle.Damped(a, b, trees.SCALE, 1e-2).factors(G)
        taken = oracle.step(a, b, da, db, trees.SCALE)
        h_a, h_b = oracle.factor_gradients(a, b, G, trees.SCALE)
        lora = trees.SCALE * (h_a @ b + a @ h_b)
        expected = lp.PairDiagnostics(
            cosine=cosine(taken, target),
            relative_distance=np.linalg.norm(taken - target) / np.linalg.norm(target),
            lora_cosine=cosine(lora, target),
            lora_relative_distance=np.linalg.norm(lora - target) / np.linalg.norm(target),
            condition_a=np.linalg.cond(a),
            condition_b=np.linalg.cond(b),
            norm_a=np.linalg.norm(da),
            norm_b=np.linalg.norm(db),
            norm_step=np.linalg.norm(taken),
            norm_target=np.linalg.norm(target),
            bounded=np.nan,
        )
        for field, ours, theirs in zip(expected._fields, found[name], expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-7, err_msg=f"{name} {field}")


def test_an_optimizers_own_update_is_judged_as_a_descent_direction(x64):
    params, grads, dense = trees.make()
    sgd = jax.tree.map(lambda g: -0.1 * g, grads)
    found = diagnose(params, grads, sgd)
    for name in dense:
        np.testing.assert_allclose(found[name].cosine, found[name].lora_cosine, rtol=1e-12)
        norm = 0.1 * np.linalg.norm(grads[name]["lora_a"])
        np.testing.assert_allclose(found[name].norm_a, norm, rtol=1e-12)


def test_a_zero_b_reports_an_infinite_condition_and_no_nan():
    params, grads, _ = trees.make()
    params = jax.tree.map(lambda x: x, params)
    for node, g in zip(params.values(), grads.values(), strict=True):
        node["lora_b"] = jnp.zeros_like(node["lora_b"])
        g["lora_a"] = jnp.zeros_like(g["lora_a"])
    found = diagnose(params, grads)
    for figures in found.values():
        assert np.isinf(figures.condition_b)
        for field, value in figures._asdict().items():
            assert field == "bounded" or not np.isnan(value), field


def test_batched_pairs_report_one_figure_a_layer(x64):
    params, grads, dense = trees.make(shapes={f"l{i}": (8, 3, 12) for i in range(4)})
    stacked_p, stacked_g = (
        {"q": jax.tree.map(lambda *x: jnp.stack(x), *tree.values())} for tree in (params, grads)
    )
    layout = lp.layouts.FLAX.declare({"q": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))})
    stacked = jax.jit(lambda p, g: lp.diagnose(p, g, trees.SCALE, layout=layout))
    stacked, single = stacked(stacked_p, stacked_g)["q"], diagnose(params, grads)
    for i, name in enumerate(dense):
        for ours, theirs in zip(stacked, single[name], strict=True):
            assert ours.shape == (4,)
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-9)


def test_no_dense_array_is_formed():
    params, grads, _ = trees.make(shapes={"q": (101, 3, 103)})
    jaxpr = str(jax.make_jaxpr(lambda p, g: lp.diagnose(p, g, trees.SCALE))(params, grads))
    assert "101,103" not in jaxpr


def test_params_and_grads_of_other_shapes_are_refused():
    params, grads, _ = trees.make()
    grads["up_0"], grads["down"] = grads["down"], grads["up_0"]
    with pytest.raises(ValueError, match="down/lora_a: the update has shape"):
        lp.diagnose(params, grads, trees.SCALE)
