"""Full mode's GPU kernel takes a dense float64 Adam's steps.

Where there is no GPU, Pallas' interpreter runs it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from trees import SCALE

import lorapro_jax as lp
from lorapro_jax import _full, _full_cuda
from lorapro_jax._full_cuda import Numbers, Tiling

STEPS = 3
ON_GPU = _full_cuda.supported()
# m, n, rank, batch axes of the pair, how the work is cut (None: as the library does)
CASES = {
    "one tile": ((16,), (32,), 4, (), None),
    "several tiles": ((96,), (192,), 8, (), None),
    "several stretches": ((96,), (64,), 8, (), Tiling(16, 32, 32, 4, 1)),
    "batch axes": ((32,), (64,), 3, (2, 2), None),
    "several axes": ((8, 4), (4, 16), 5, (), None),
    "rank of several products": ((48,), (96,), 40, (), None),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture
def kernel(monkeypatch):
    """Full mode by the kernel; an error where it does not take a group."""

    def by_kernel(problems, group, taken, moments, count, adam):
        steps = [_full_cuda.adam_of(p, group, adam, interpret=not ON_GPU) for p in problems]
        assert None not in steps
        return [step(*of, count) for step, *of in zip(steps, taken, moments, strict=True)]

    monkeypatch.setattr(_full, "_adam", by_kernel)


def run(case, pairs=1, mu_dtype=None):
    """[(s (da b + a db), m, v)] of the library and the oracle, after steps at fixed factors."""
    m, n, rank, batch, _ = case
    axes = tuple(range(len(batch)))
    dims = lp.LoRADimensionNumbers(
        a_rank=len(batch) + len(m), b_rank=len(batch), a_batch=axes, b_batch=axes
    )
    layout = lp.layouts.FLAX.declare({"q.*": dims})
    rows, columns, size = (int(np.prod(x)) for x in (m, n, batch))
    rng = np.random.default_rng(0)
    drawn = [oracle.pair(rng, rows, rank, columns) for _ in range(pairs * size)]
    factors = [[x.astype(np.float32).astype(np.float64) for x in pair[:2]] for pair in drawn]

    def tree(flat):
        made = {}
        for k in range(pairs):
            a, b = (np.stack(x) for x in zip(*flat[k * size : (k + 1) * size], strict=True))
            a, b = a.reshape(*batch, *m, rank), b.reshape(*batch, rank, *n)
            made[f"q{k}"] = {"lora_a": jnp.asarray(a, "f4"), "lora_b": jnp.asarray(b, "f4")}
        return made

    # the scale of each pair is its own
    scales = {f"q{k}": SCALE * (k + 1) for k in range(pairs)}
    tx = lp.scale_by_lorapro_adam(
        lambda path: scales[path],
        mode="full",
        damping=0.0,
        mu_dtype=mu_dtype,
        layout=layout,
    )
    params = tree(factors)
    state, update, updates = tx.init(params), jax.jit(tx.update), None
    adams, directions = [oracle.Adam((rows, columns)) for _ in drawn], []
    for _ in range(STEPS):
        gradients = [rng.normal(size=(rows, columns)) for _ in drawn]
        slopes = [
            oracle.factor_gradients(a, b, G, SCALE * (i // size + 1))
            for i, ((a, b), G) in enumerate(zip(factors, gradients, strict=True))
        ]
        updates, state = update(tree(slopes), state, params)
        directions = [
            adam(oracle.projection(a, b, G))
            for adam, (a, b), G in zip(adams, factors, gradients, strict=True)
        ]
    expected = [
        (oracle.projection(a, b, U), adam.m, adam.v)
        for (a, b), U, adam in zip(factors, directions, adams, strict=True)
    ]
    steps = [
        SCALE * (k + 1) * (da @ b + a @ db)
        for k, node in enumerate(updates.values())
        for (a, b), da, db in zip(
            factors[k * size : (k + 1) * size],
            np.reshape(node["lora_a"], (size, rows, rank)),
            np.reshape(node["lora_b"], (size, rank, columns)),
            strict=True,
        )
    ]
    moments = (np.reshape(x["q0"], (-1, rows, columns)) for x in (state.mu, state.nu))
    found = list(zip(steps, *moments, strict=True))
    assert (state.mu["q0"].dtype, state.nu["q0"].dtype) == (mu_dtype or jnp.float32, jnp.float32)
    return found, expected


def compare(found, expected, *tolerances):
    """Each within its tolerance, relative to the largest entry."""
    for got, exact in zip(found, expected, strict=True):
        for x, y, tolerance in zip(got, exact, tolerances, strict=True):
            x = np.asarray(x, np.float64)
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.max(np.abs(y)))


@every_case
def test_the_kernel_takes_a_dense_adams_steps(kernel, monkeypatch, case):
    cut = case[-1]
    if cut is not None:
        monkeypatch.setattr(_full_cuda, "tiling", lambda *sizes: cut)
    compare(*run(case), 1e-4, 1e-5, 1e-5)


def test_stacked_pairs_each_have_their_own_scale(kernel):
    compare(*run(CASES["one tile"], pairs=3), 1e-4, 1e-5, 1e-5)


def test_a_bf16_first_moment_is_within_its_rounding(kernel):
    """Each step rounds by half a unit of bf16's 8 bits, and U by as much."""
    ulp = STEPS * 2**-9
    found, expected = run(CASES["several tiles"], mu_dtype=jnp.bfloat16)
    compare([x[1:] for x in found], [x[1:] for x in expected], ulp, 1e-5)


def test_a_cut_divides_its_shape():
    for m in range(1, 200):
        for n in range(1, 200):
            cut = _full_cuda.tiling(2, m, n, 8)
            if cut is None:
                assert m % 16 or n % 32
                continue
            assert m % cut.stretch == cut.stretch % cut.rows == n % cut.columns == 0


@pytest.mark.parametrize(
    "sizes", [(1, 17, 64, 8), (1, 64, 33, 8), (2**15, 2**8, 2**8, 8), (1, 64, 64, 65)]
)
def test_shapes_that_it_does_not_take(sizes):
    """No tile divides them, their elements are too many for 32 bits, or their rank is too large."""
    assert _full_cuda.tiling(*sizes) is None


def test_only_a_gpu_gets_it():
    assert _full_cuda.supported() == (jax.default_backend() == "gpu")


@pytest.mark.filterwarnings("default:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("rank", [8, 64])
def test_it_lowers_to_a_triton_kernel(rank):
    """As far as a machine without a GPU can tell."""
    m, n = 256, 512
    tall, wide, moment = ((1, *shape) for shape in ((m, rank), (rank, n), (m, n)))
    shapes = tall, wide, tall, wide, (1,), moment, moment
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    cut = _full_cuda.tiling(1, m, n, rank)

    def step(*arrays):
        return _full_cuda.one_pass(*arrays, Numbers(0.9, 0.999, 0.1, 0.001, 0.1, 0.001, 1e-8), cut)

    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        text = jax.jit(step).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize("most", [2**31, 100])
def test_a_batch_of_groups_is_as_each_group_alone(kernel, monkeypatch, most):
    """Under vmap, and under two; also where their elements are too many to be counted."""
    rng = np.random.default_rng(0)

    def arrays(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def step(params, grads, state):
        return lp.scale_by_lorapro_adam(SCALE, mode="full").update(grads, state, params)

    runs, more = 2, 3
    lead = (runs, more)
    params, grads = (
        {"q": {"lora_a": arrays(*lead, 16, 4), "lora_b": arrays(*lead, 4, 32)}} for _ in range(2)
    )

    def pick(tree, i):
        return jax.tree.map(lambda x: x[i], tree)

    init = lp.scale_by_lorapro_adam(SCALE, mode="full").init
    flat = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), x) for x in (params, grads)]
    alone = [step(*one, init(one[0])) for one in (pick(flat, i) for i in range(runs * more))]
    monkeypatch.setattr(_full_cuda, "_MOST", most)
    monkeypatch.setattr(_full_cuda, "tiling", lambda *sizes: Tiling(16, 32, 16, 4, 1))
    state = jax.vmap(jax.vmap(init))(params)
    made = jax.jit(jax.vmap(jax.vmap(step)))(params, grads, state)
    made = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)
    for i, one in enumerate(alone):
        for x, y in zip(*map(jax.tree.leaves, (pick(made, i), one)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
