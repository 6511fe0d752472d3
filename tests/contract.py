"""What the tests of the optax contract share: two optimizers, optax's suites, a tree of pairs.

The optax wheel ships its suites. They are run, not copied: each names its optimizers in a decorator
of absl's, which is given ours while the suite is imported.
"""

import importlib
import os
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from absl.testing import parameterized
from trees import SCALE

import lorapro_jax as lp

LAYOUT = lp.layouts.FLAX.declare({"stack": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))})
SHAPES = {"layers_0": (8, 2, 4), "layers_1": (8, 2, 4), "layers_2": (8, 2, 4), "head": (7, 3, 5)}


def sgd(
    learning_rate: optax.ScalarOrSchedule, scale, damping=1e-6, layout=None, require_pairs=True
):
    """`lp.lorapro` and what makes an optimizer of it."""
    projection = lp.lorapro(scale, damping=damping, layout=layout, require_pairs=require_pairs)
    return optax.chain(projection, optax.scale_by_learning_rate(learning_rate))


FACTORIES = {
    "lorapro": sgd, "lorapro_adamw": lp.lorapro_adamw, "lorapro_muon": lp.lorapro_muon
}  # fmt: skip
NUMBERS = {
    "lorapro": {"learning_rate": 1e-2, "scale": SCALE, "damping": 1e-6},
    "lorapro_adamw": {
        "learning_rate": 1e-2, "scale": SCALE, "damping": 1e-6, "b1": 0.9, "b2": 0.999,
        "eps": 1e-8, "weight_decay": 0.1, "floor": 0.1, "clipping_threshold": 1.0, "radius": 0.05,
    },
    "lorapro_muon": {
        "learning_rate": 1e-2, "scale": SCALE, "damping": 1e-6, "beta": 0.95, "rms": 0.2,
        "adam_b1": 0.9, "adam_b2": 0.999, "adam_eps": 1e-8, "weight_decay": 0.1, "radius": 0.05,
    },
}  # fmt: skip
OPTIMIZERS = {name: FACTORIES[name](**NUMBERS[name], layout=LAYOUT) for name in FACTORIES}
every_optimizer = pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)

# Of a leaf's largest entry: what another order of sums may change, one place for bf16's rounding.
ROUNDING = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 2**-7}


def load(suite, decorator, ours):
    """A test module of optax's, with `ours` in place of what `decorator` is given there."""
    patch = mock.patch.object(parameterized, decorator, ours(getattr(parameterized, decorator)))
    # The modules build optax's optimizers, some of which warn, and one sets XLA_FLAGS.
    with patch, mock.patch.dict(os.environ), warnings.catch_warnings(action="ignore"):
        return importlib.import_module(suite)


def make(dtype=None, seed=0):
    """Three pairs of one group, a lone pair, four scanned layers, a vector and a scalar.

    "mixed" gives the a of every pair in bf16 and all else in float32.
    """
    if dtype == "mixed":
        narrow, wide = make(jnp.bfloat16, seed), make(jnp.float32, seed)
        return jax.tree.map_with_path(
            lambda path, x, y: x if path_str(path).endswith("lora_a") else y, narrow, wide
        )
    params, _, _ = trees.make(seed=seed, dtype=dtype, shapes=SHAPES)
    scanned, _, _ = trees.make(seed + 1, dtype, {name: SHAPES["layers_0"] for name in "abcd"})
    params["stack"] = jax.tree.map(lambda *x: jnp.stack(x), *scanned.values())
    params["bias"] = jnp.arange(4, dtype=params["head"]["lora_a"].dtype)
    params["temperature"] = jnp.asarray(0.5, params["bias"].dtype)
    return params


def path_str(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def loss(params):
    """Half the squared distance of every product s a b, and every leaf in no pair, from 1."""
    values = (
        SCALE * x["lora_a"] @ x["lora_b"] if isinstance(x, dict) else x for x in params.values()
    )
    wide = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in values)
    return sum(jnp.sum((x - 1) ** 2) for x in wide) / 2


gradients = jax.jit(jax.grad(loss))


def types(tree):
    """Shape, dtype, weak type and, under an explicit mesh, sharding of every leaf."""
    return jax.tree.map(jax.typeof, tree)


def assert_same(x, y):
    """Equal structures and types, and values but for the order of sums."""
    assert types(x) == types(y)

    def compare(path, a, b):
        bound = ROUNDING.get(str(a.dtype), 0)
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        largest = np.max(np.abs(b), initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * largest, err_msg=path_str(path))

    jax.tree.map_with_path(compare, x, y)
