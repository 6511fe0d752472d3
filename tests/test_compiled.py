"""One program for every backend: compiled, exported, and inside other transformations."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from trees import SCALE

import lorapro_jax as lp

every_mode = pytest.mark.parametrize("mode", trees.MODES)
METHODS = {
    "full": lambda: lp.lorapro_adamw(1e-3, SCALE, mode="full"),
    "factored": lambda: lp.lorapro_adamw(1e-3, SCALE),
    "muon": lambda: lp.lorapro_muon(1e-3, SCALE),
    "lorapro": lambda: optax.chain(lp.lorapro(SCALE), optax.adamw(1e-3)),
}
every_method = pytest.mark.parametrize("method", METHODS)


def two_layers(r, m=12, n=10, dtype=jnp.float32):
    pair = {"lora_a": jnp.ones((m, r), dtype), "lora_b": jnp.ones((r, n), dtype)}
    return {"layers_0": pair, "layers_1": pair}


def lowered(method, params):
    tx = METHODS[method]()
    return jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params), params)


RANKS = [1, 8, pytest.param(64, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)]


@every_method
@pytest.mark.parametrize("r", RANKS)
def test_a_cpus_program_has_no_custom_call(method, r):
    text = lowered(method, two_layers(r)).lower().compile().as_text()
    assert "custom-call" not in text
    assert "lapack" not in text


FOR_A_TPU = """
import sys
sys.path.insert(0, "tests")
import numpy as np, jax, test_compiled
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
on = NamedSharding(Mesh(np.array(devices[:1]), "x"), PartitionSpec())
method, r = sys.argv[1], int(sys.argv[2])
tx, params = test_compiled.METHODS[method](), test_compiled.two_layers(r)
shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on),
    (params, jax.eval_shape(tx.init, params), params),
)
text = jax.jit(tx.update).lower(*shapes).compile().as_text()
calls = {line.split('custom_call_target="')[1].split('"')[0] for line in text.splitlines()
         if 'custom_call_target="' in line}
print("calls:", sorted(calls))
"""
# what the compiler's own passes insert, without a loop or an unknown cost
HARMLESS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding"}


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("r", [1, 8, 64])
def test_a_tpus_program_has_no_custom_call(method, r):
    """Compiled ahead of time, in a process with the compiler's settings; needs libtpu."""
    pytest.importorskip("libtpu")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "JAX_ENABLE_X64": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", FOR_A_TPU, method, str(r)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    calls = set(eval(done.stdout.rsplit("calls:", 1)[1]))
    assert calls <= HARMLESS


@every_method
def test_it_exports_for_every_platform(method):
    tx, params = METHODS[method](), two_layers(8)
    arguments = (params, jax.eval_shape(tx.init, params), params)
    exported = jax.export.export(jax.jit(tx.update), platforms=["cpu", "cuda", "tpu"])(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "custom_call" not in exported.mlir_module().replace("@Sharding", "")


# --- inside other transformations --------------------------------------------------------------

every_inner = pytest.mark.parametrize(
    "method", ["factored", *(pytest.param(x, marks=pytest.mark.slow) for x in ("full", "lorapro"))]
)


def problem(seed, dtype=jnp.float32):
    params, grads, _ = trees.make(seed, dtype, {"q_0": (8, 3, 6), "q_1": (8, 3, 6), "o": (5, 4, 3)})
    return params, grads


def two_steps(tx, params, grads, state=None):
    state = tx.init(params) if state is None else state
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.fixture(scope="module")
def expected():
    """Eight problems, and what each method makes of them one after the other."""
    problems = [problem(seed) for seed in range(8)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *problems)

    @functools.cache
    def of(method):
        run = jax.jit(functools.partial(two_steps, METHODS[method]()))
        return jax.tree.map(lambda *x: np.stack(x), *(run(*x) for x in problems))

    return stacked, of


def close(found, wanted):
    """Of the products, in float32, where programs sum in different orders.

    Where r is above a side, the factors have a part that no product sees.
    """
    for name, node in wanted.items():
        x, y = (np.matmul(*trees.values(of)) for of in (found[name], node))
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), name


@every_inner
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_under_vmap(expected, method, where):
    (params, grads), of = expected
    tx = METHODS[method]()
    state = jax.vmap(tx.init)(params) if where == "outside" else None
    run = jax.jit(jax.vmap(functools.partial(two_steps, tx)))
    close(run(params, grads, *([state] if state is not None else [])), of(method))


@every_inner
def test_under_scan(expected, method):
    (params, grads), of = expected
    tx = METHODS[method]()
    one, grads = (jax.tree.map(lambda x: x[0], tree) for tree in (params, grads))

    def advance(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(advance, (p, tx.init(p)), length=2)[0][0])
    close(run(one), jax.tree.map(lambda x: x[0], of(method)))


@pytest.mark.parametrize(
    "method", ["factored", "full", pytest.param("lorapro", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_under_shard_map(expected, method, where):
    """A problem a device."""
    (params, grads), of = expected
    tx = METHODS[method]()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def one(*arrays):
        arrays = jax.tree.map(lambda x: x[0], arrays)
        return jax.tree.map(lambda x: x[None], two_steps(tx, *arrays))

    arrays = (params, grads)
    if where == "outside":
        arrays += (jax.vmap(tx.init)(params),)
    run = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    close(run(*arrays), of(method))


@every_inner
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_pmap(expected, method, where):
    (params, grads), of = expected
    tx = METHODS[method]()
    arrays = (params, grads)
    if where == "outside":
        arrays += (jax.pmap(tx.init)(params),)
    close(jax.pmap(functools.partial(two_steps, tx))(*arrays), of(method))


# --- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "factored", "lorapro"])
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("bfloat16", "float32"), ("float16",) * 2])
def test_strict_promotion_of_narrow_factors(method, dtypes):
    """Nothing is promoted in silence; steps come in each factor's own dtype, and are finite."""
    params, grads = problem(0)
    params, grads = (
        {k: {leaf: x.astype(d) for (leaf, x), d in zip(v.items(), dtypes, strict=True)}
         for k, v in tree.items()}
        for tree in (params, grads)
    )  # fmt: skip
    tx = METHODS[method]()
    with jax.numpy_dtype_promotion("strict"):
        if method == "lorapro" and dtypes[0] != "float32":
            tx = lp.lorapro(SCALE)  # optax.adamw's own bias correction promotes
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        jax.eval_shape(tx.update, grads, state, params)
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert x.dtype == y.dtype
        assert np.all(np.isfinite(x.astype(jnp.float32)))


@every_mode
def test_bfloat16_factors_take_the_float32_step_rounded(mode):
    params, grads = problem(0)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    tx = trees.direction(mode)
    update = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])
    narrow_grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), grads)
    noise = 6000 * 2.0**-23 if mode == "muon" else 1e-5  # its polynomial enlarges roundings so far
    found = update(narrow_grads, narrow)
    expected = update(jax.tree.map(lambda x: x.astype(jnp.float32), narrow_grads), wide)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=2.0**-8, atol=noise * np.max(np.abs(y)))
