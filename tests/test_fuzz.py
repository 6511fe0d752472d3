"""Many small pairs, sparse gradients, dead inputs and outputs: float32 against float64.

The truth is the mode's definition in dense float64 arrays (oracle.py) at the factors and gradients
that the float32 run had, step by step. Of every step of the weight:

  bound   its norm is at most rate · sqrt(m n) · threshold, or that of Muon's singular values and a
          tenth, for the damping
  error   it is the definition's up to `allowance` of that bound; so rows and columns without a
          gradient move no further than the definition says
  dead    the definition moves them less than the others
"""

import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import trees
from trees import SCALE

RATE, EPS = 1e-2, 2.0**-23
every_mode = pytest.mark.parametrize("mode", trees.MODES)
# r below and above both sides, above one of them, one row, one number
SHAPES = [(6, 2, 5), (3, 8, 2), (16, 16, 8), (16, 8, 16), (1, 4, 9), (1, 1, 1)]
WIDE = [(384, 8, 2), (64, 8, 8), (96, 16, 8)]
KAPPAS = [1, 1e2, 1e4]


def allowance(mode, shape, kappa, floor=0.1):
    """Of a step's error over its bound.

    The projections are off by twenty roundings times κ, where the damping lets κ act (to 1e3, at
    1e-6), and by four times as many where r is above a side: frames have directions there that
    are rounding errors. The division by sqrt(v^) enlarges small entries by 1/floor.

    In factored mode the averages of h_a belong to the b that was. Where r is above a side, they
    have a part of the step's size, RATE κ beside b, along the null space of the b that is. It
    vanishes but for the Gram's rounding over the damping, an eighth; a column that is small is
    enlarged by 1/sqrt(floor). At this rate nothing but the bound is claimed beyond κ = 25.

    Nor of Muon's step: of sparse gradients T has singular values that are rounding errors, and
    msign makes ones of those above a thousandth.
    """
    m, r, n = shape
    above = r > min(m, n)
    if mode == "muon":
        return 2
    old = RATE * kappa / 8 / np.sqrt(floor) if mode == "factored" and above else 0
    roundings = 80 if above else 20
    return roundings * EPS * min(kappa, 1e3) / floor + (old if old < 0.1 else 2)


def check(seen, truth, rows, columns, kappa, bound, allowed):
    """The claims of the module's docstring about every step of every pair."""
    for step, (a, b, h_a, h_b, da, db) in enumerate(zip(*seen, strict=True)):
        found, expected = oracle.step(a, b, da, db, SCALE), -RATE * truth(a, b, h_a, h_b)
        assert np.all(np.isfinite(found))
        assert np.max(oracle.norm(found)) <= 1.01 * bound
        error = oracle.norm(found - expected) / bound
        assert np.max(error) <= allowed, f"{np.max(error):.1e}, {np.argmax(error)}"
        if step == 0 and kappa <= 1e2:  # beyond, the damping moves what belongs to no direction
            for dead, axis in ((rows, 2), (columns, 1)):
                squares = np.mean(expected**2, axis=axis)
                assert not np.any(dead) or np.mean(squares[dead]) < np.mean(squares[~dead])


def fuzz(mode, shape, kappa, pairs, seed=0, shares=((0.1, 0.0), (1.0, 0.25), (0.1, 0.25))):
    """Every third of the pairs has one (density of G, share of dead rows and columns)."""
    rng = np.random.default_rng(seed)
    parts = [
        trees.many(rng, pairs // len(shares), shape, kappa, density=density, dead=dead)
        for density, dead in shares
    ]
    a, b, G, rows, columns = (np.concatenate(x) for x in zip(*parts, strict=True))
    tx = optax.chain(trees.direction(mode), optax.scale(-RATE))
    seen, _ = trees.run(tx, a, b, G, jnp.float32)
    truth = oracle.MODES[mode](SCALE, rounding=EPS)
    m, r, n = shape
    bound = RATE * np.sqrt(m * n)
    if mode == "muon":
        bound = 1.1 * RATE * 0.2 * np.sqrt((m + n) / 2 * min(m, n, 2 * r))
    check(seen, truth, rows, columns, kappa, bound, allowance(mode, shape, kappa))


@pytest.mark.float32
@every_mode
@pytest.mark.parametrize("shape", [(6, 2, 5), (3, 8, 2), (16, 16, 8)], ids=str)
@pytest.mark.parametrize("kappa", [1e2])
def test_some_runs(mode, shape, kappa):
    fuzz(mode, shape, kappa, 30)


@pytest.mark.slow
@pytest.mark.float32
@every_mode
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_thirteen_thousand_runs_in_either_mode(mode, shape, kappa):
    fuzz(mode, shape, kappa, 900)


@pytest.mark.slow
@pytest.mark.float32
@every_mode
@pytest.mark.parametrize("shape", WIDE, ids=str)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_layers_with_few_outputs(mode, shape, kappa):
    """Routers and heads: n <= r, and a quarter of the inputs always zero."""
    fuzz(mode, shape, kappa, 60)


def moved(mode, shape, rate, dtype):
    """RMS of 50 steps' change of the weight: of dead rows, of dead columns, of all others."""
    (m, r, n), pairs, rng = shape, 4, np.random.default_rng(0)
    a = rng.uniform(-1, 1, (pairs, m, r)) / np.sqrt(m)
    b = 0.02 * rng.normal(size=(pairs, r, n))
    rows, columns = rng.random((pairs, m, 1)) < 0.25, rng.random((pairs, 1, n)) < 0.25 * (n > 4)
    G = rng.normal(size=(pairs, 50, m, n)) * ~(rows | columns)[:, None]
    # float32's least damping in float64 too
    tx = trees.optimizer(mode, rate, damping=8 * EPS * r)
    seen, _ = trees.run(tx, a, b, G, dtype)
    last, first = (seen[0][-1] + seen[4][-1]) @ (seen[1][-1] + seen[5][-1]), seen[0][0] @ seen[1][0]
    squares = (SCALE * (last - first)) ** 2
    groups = (rows & ~columns, columns & ~rows, ~(rows | columns))
    return [np.sqrt(np.mean(squares, where=group)) if group.any() else 0.0 for group in groups]


@pytest.mark.parametrize(
    ("mode", "rate"),
    [
        ("full", 1e-3),
        ("factored", 1e-3),
        ("muon", 1e-4),
        *(pytest.param(mode, 1e-4, marks=pytest.mark.slow) for mode in ("full", "factored")),
    ],
)
@pytest.mark.parametrize(
    "shape",
    [(64, 8, 8), *(pytest.param(x, marks=pytest.mark.slow) for x in [*WIDE, (64, 4, 48)])],
    ids=str,
)
def test_inputs_and_outputs_that_never_occur_move_less_than_the_others(x64, mode, shape, rate):
    """In float32 as in float64: by at most a tenth of the others' more than there.

    Not so Muon at 1e-3, where n <= r: what the average has from older factors, some percent of it,
    gets a singular value of one, and dead columns move as far as the others.
    """
    exact, found = (moved(mode, shape, rate, dtype) for dtype in (jnp.float64, jnp.float32))
    assert max(exact[:2]) < exact[2]
    assert max(found[:2]) < found[2]
    np.testing.assert_allclose(found[2], exact[2], rtol=0.01)
    assert all(x <= y + 0.1 * exact[2] for x, y in zip(found[:2], exact[:2], strict=True))
