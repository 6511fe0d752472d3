"""What the tests of the optax contract share: our transformations, optax's suites, a tree of pairs.

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
    learning_rate: optax.ScalarOrSchedule,
    scale,
    damping=1e-6,
    x="sylvester",
    layout=None,
    require_pairs=True,
):
    """`lp.lorapro` and what makes an optimizer of it."""
    projection = lp.lorapro(scale, x=x, damping=damping, layout=layout, require_pairs=require_pairs)
    return optax.chain(projection, optax.scale_by_learning_rate(learning_rate))


def adam(
    learning_rate: optax.ScalarOrSchedule,
    scale,
    mode="full",
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    damping=1e-6,
    mu_dtype=None,
    layout=None,
    require_pairs=True,
):
    """`lp.scale_by_lorapro_adam` and what makes an optimizer of it."""
    direction = lp.scale_by_lorapro_adam(
        scale,
        mode=mode,
        b1=b1,
        b2=b2,
        eps=eps,
        damping=damping,
        mu_dtype=mu_dtype,
        layout=layout,
        require_pairs=require_pairs,
    )
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


FACTORIES = {"lorapro": sgd, "scale_by_lorapro_adam": adam, "lorapro_adamw": lp.lorapro_adamw}
OPTIMIZERS = [
    ("lorapro", {}),
    ("scale_by_lorapro_adam", {"mode": "full"}),
    ("scale_by_lorapro_adam", {"mode": "factored"}),
    ("scale_by_lorapro_adam", {"mode": "efficient"}),
    ("lorapro_adamw", {"mode": "full"}),
    ("lorapro_adamw", {"mode": "factored"}),
    ("lorapro_adamw", {"mode": "efficient"}),
]
RATES = {"learning_rate": 1e-2, "scale": SCALE, "damping": 1e-6}
BETAS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
DEFAULTS = {
    "lorapro": RATES,
    "scale_by_lorapro_adam": RATES | BETAS,
    "lorapro_adamw": RATES | BETAS | {"weight_decay": 0.1},
}

# lorapro_adamw holds scale_by_lorapro_adam whole, between optax's and its own transformations
PAIRED = [case for case in OPTIMIZERS if case[0] != "scale_by_lorapro_adam"]
PAIRED_NAMES = ["-".join([name, *mode.values()]) for name, mode in PAIRED]

# Of a leaf's largest entry: what another order of sums may change, one place for bf16's rounding.
ROUNDING = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2**-7}


def load(suite, decorator, ours):
    """A test module of optax's, with `ours` in place of what `decorator` is given there."""
    patch = mock.patch.object(parameterized, decorator, ours(getattr(parameterized, decorator)))
    # The modules build optax's optimizers, some of which warn, and one sets XLA_FLAGS.
    with patch, mock.patch.dict(os.environ), warnings.catch_warnings(action="ignore"):
        return importlib.import_module(suite)


def optimizer(name, mode, **numbers):
    """One of OPTIMIZERS for the tree of `make`."""
    return FACTORIES[name](**{**DEFAULTS[name], **mode, **numbers}, layout=LAYOUT)


every_optimizer = pytest.mark.parametrize(
    "tx", [optimizer(*case) for case in PAIRED], ids=PAIRED_NAMES
)
# where lorapro alone would show nothing that efficient mode, which begins with it, does not
MODES = {case[1]["mode"]: optimizer(*case) for case in PAIRED[1:]}
every_mode = pytest.mark.parametrize("tx", MODES.values(), ids=MODES.keys())


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


def step(tx, params, state, grads=None):
    """(params, state) after one step."""
    updates, state = tx.update(gradients(params) if grads is None else grads, state, params)
    return optax.apply_updates(params, updates), state


def assert_same(x, y):
    """Equal structures and types, and values but for the order of sums."""
    assert types(x) == types(y)

    def compare(path, a, b):
        bound = ROUNDING.get(str(a.dtype), 0)
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        largest = np.max(np.abs(b), initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * largest, err_msg=path_str(path))

    jax.tree.map_with_path(compare, x, y)
