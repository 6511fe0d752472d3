"""The study of factored mode's choices: its own draft against the library, and the command."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import trees
import tyro
from trees import SCALE

import lorapro_jax as lp
from experiments import methods
from experiments.bench import choices, tables
from experiments.bench.choices import DRAFTS

STEPS = 20
RATE = 0.1  # the radius binds in some of the steps and not in others
SIZES = (1.0, 1e-3, 0.0)  # of b at the start
SHAPES = {"wide": (6, 2, 20), "up": (12, 3, 8), "also_up": (12, 3, 8)}


@functools.cache
def steps_of(tx, names=tuple(SHAPES)):
    """Updates on ||s a b - G||² / 2 from every size of b: leaves (steps, sizes, ...)."""
    params, _, dense = trees.make(shapes={name: SHAPES[name] for name in names})

    def loss(params):
        return sum(
            jnp.sum((SCALE * p["lora_a"] @ p["lora_b"] - dense[k][2]) ** 2) / 2
            for k, p in params.items()
        )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), updates

    def run(size):
        scaled = {k: p | {"lora_b": size * p["lora_b"]} for k, p in params.items()}
        return jax.lax.scan(step, (scaled, tx.init(scaled)), length=STEPS)[1]

    return jax.jit(jax.vmap(run, out_axes=1))(jnp.asarray(SIZES))


def schedule(count):
    """Down to half the rate: as optax's, but in floats that no program rounds in its own way."""
    return RATE * (1 - jnp.asarray(count, float) / (2 * STEPS))


@functools.cache
def draft(name):
    return choices.optimizer(DRAFTS[name], schedule, SCALE)


def distances(x, y):
    """Relative difference of each step from each size: (steps, sizes), the worst of all leaves."""

    def apart(p, q):
        norms = [jnp.linalg.norm(v.reshape(STEPS, len(SIZES), -1), axis=-1) for v in (p - q, q)]
        return norms[0] / jnp.maximum(norms[1], jnp.finfo(q.dtype).tiny)  # a's first step may be 0

    return np.max(jax.tree.leaves(jax.tree.map(apart, x, y)), axis=0)


@pytest.mark.parametrize(
    ("name", "chosen", "pairs"),
    [("reference", {}, tuple(SHAPES)), ("min-norm", {"x": "sylvester"}, ("up",))],
)
def test_the_draft_follows_the_library(x64, name, chosen, pairs):
    theirs = lp.lorapro_adamw(schedule, SCALE, mode="factored", **chosen)
    assert np.all(distances(steps_of(draft(name), pairs), steps_of(theirs, pairs)) < 1e-8)


@pytest.mark.parametrize("name", [name for name in DRAFTS if name != "reference"])
def test_every_alternative_goes_another_way(x64, name):
    apart = distances(*(steps_of(draft(x), ("up",)) for x in (name, "reference")))
    assert np.max(apart) > 1e-3  # the radius and the clip may not bind from every start


def test_the_adam_norm_is_what_its_name_says(x64):
    """Either projection of an Adam step U is the nearer one in its own norm."""
    rng = np.random.default_rng(0)
    a, b, U = oracle.pair(rng, *SHAPES["up"])
    D_l, D_r = (np.exp(rng.normal(size=shape)) for shape in ((len(a), 1), (1, b.shape[1])))
    away = {}
    for norm in ("frobenius", "adam"):
        da, db = choices.Draft(norm=norm).direction(*map(jnp.asarray, (a, b, U, D_l, D_r)), SCALE)
        rest = U - SCALE * (da @ b + a @ db)
        away[norm] = np.linalg.norm(rest), np.linalg.norm(rest / np.sqrt(D_l * D_r))
    assert away["frobenius"][0] < away["adam"][0]
    assert away["adam"][1] < away["frobenius"][1]


def test_the_svd_is_the_best_product_of_its_rank(x64):
    rng = np.random.default_rng(0)
    a, b, _ = oracle.pair(rng, *SHAPES["up"])
    da, db, _ = oracle.pair(rng, *SHAPES["up"])
    svd = choices.Draft(retraction="svd", radius=None)
    step = svd.step(*map(jnp.asarray, (a, b, da, db)), 0.5)
    u, values, v = np.linalg.svd(a @ b - 0.5 * (da @ b + a @ db))
    r = len(b)
    new_a, new_b = a + step[0], b + step[1]
    np.testing.assert_allclose(new_a @ new_b, u[:, :r] * values[:r] @ v[:r], atol=1e-13 * values[0])
    assert np.linalg.norm(new_a) == pytest.approx(np.linalg.norm(a))


def test_the_svd_leaves_an_adapter_alive_where_there_is_no_step(x64):
    """b = 0 at the rate 0 of a warm-up's first step: a keeps the span of its columns."""
    a, b, _ = oracle.pair(np.random.default_rng(0), *SHAPES["up"])
    arrays = map(jnp.asarray, (a, 0 * b, 0 * a, b))
    step_a, step_b = choices.Draft(retraction="svd").step(*arrays, 0.0)
    np.testing.assert_allclose(step_b, 0, atol=1e-15)
    new = np.asarray(a + step_a)
    assert np.linalg.matrix_rank(new) == a.shape[1]
    np.testing.assert_allclose(a @ np.linalg.pinv(a) @ new, new, atol=1e-12)


def test_the_command_keeps_every_run(tmp_path, capsys):
    """Draft and library train alike, a loss that is not finite is a result."""
    out, before = tmp_path / "found.jsonl", dict(methods.METHODS)
    words = "--model tiny --max-length 16 --batch-size 8 --train-examples 32 --eval-examples 20"
    chosen = ["--rates", "1e-2", "1e38", "--variants", "reference", "library factored"]
    choices.main(tyro.cli(choices.Settings, args=[*words.split(), *chosen, "--results", str(out)]))
    rows = tables.latest(out)
    assert len(rows) == len(out.read_text().splitlines()) == 4
    assert [(r["variant"], r["rate"]) for r in rows] == [
        (name, rate) for name in ("reference", "library factored") for rate in (1e-2, 1e38)
    ]
    mine, lost, theirs, _ = rows
    assert mine["steps"] == 4 > lost["steps"]
    assert lost["mean_loss"] is lost["largest_loss"] is lost["accuracy"] is None
    assert mine["mean_loss"] == pytest.approx(theirs["mean_loss"], rel=1e-4)
    assert mine["largest_loss"] >= mine["mean_loss"]
    assert capsys.readouterr().out.count("diverged") == 2
    assert before == methods.METHODS


def test_a_misspelt_variant_is_named(tmp_path):
    settings = choices.Settings(variants=("reference", "sdv"), results=tmp_path / "none")
    with pytest.raises(ValueError, match=r"unknown variant 'sdv'; did you mean 'svd'"):
        choices.main(settings)


def test_the_table_has_means_over_the_seeds():
    def row(variant, rate, loss, accuracy):
        return {"variant": variant, "rate": rate, "mean_loss": loss, "accuracy": accuracy}

    rows = [
        row("reference", 1e-3, 0.5, 0.75), row("reference", 1e-3, 0.25, 0.25),
        row("reference", 1e-4, 1.0, 0.5), row("svd", 1e-3, None, None), row("svd", 1e-3, 0.5, 0.5),
    ]  # fmt: skip
    assert tables.choices_table(rows).splitlines() == [
        "| variant | 0.0001: loss | 0.0001: accuracy | 0.001: loss | 0.001: accuracy |",
        "|---|---|---|---|---|",
        "| reference | 1.0000 | 0.5000 | 0.3750 | 0.5000 |",
        "| svd |  |  | diverged (1 of 2) | – |",
    ]
