"""How often `retract`'s bound acts in ordinary training: python -m benchmarks.bound

A character model, three layers of width 96, learns Python's manual; then adapters of rank 8 on its
18 linear maps learn inspect's source. `bounded` is the share of (pair, step) after the first 5%.
"""

import inspect
import pathlib
from pydoc_data.topics import topics

import jax
import numpy as np
import optax
import tyro

import lorapro_jax as lp
from benchmarks import stacks, t5, timing
from experiments.models.bert import BertConfig
from experiments.pod.step import updated

MANUAL, SOURCE = "\n".join(topics.values()), inspect.getsource(inspect)
CODES = {char: code for code, char in enumerate(sorted(set(MANUAL + SOURCE)))}
LENGTH, RATES, CONFIG = 64, (3e-3, 1e-2), BertConfig(len(CODES), 96, 3, 4, 384)
CAUSAL_11TT = np.where(np.tri(LENGTH), 0, -1e9).astype(np.float32)[None, None]


def train(logits, params, tx, text: str, steps: int, retracted: bool = False) -> tuple:
    """The parameters, the mean loss of the last 5% of the steps, and the share bounded before."""
    codes, rng = np.array([CODES[char] for char in text]), np.random.default_rng(0)
    state, losses, bounded = tx.init(params), [], {}

    @jax.jit
    def step(params, state, rows_BT):
        def loss(params):
            surprise = optax.losses.softmax_cross_entropy_with_integer_labels
            return surprise(logits(params, rows_BT[:, :-1]), rows_BT[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return *updated(tx, grads, state, params), value

    for i in range(1, steps + 1):
        starts = rng.integers(0, len(codes) - LENGTH, (16, 1))
        params, state, value = step(params, state, codes[starts + np.arange(LENGTH + 1)])
        losses.append(float(value))
        if retracted and i in (steps // 20, steps):  # the counts do not depend on the gradients
            pairs = jax.jit(lp.diagnose)(params, params, t5.SCALE, state=state).values()
            bounded[i] = i * np.mean([pair.bounded for pair in pairs])
    share = np.diff([*bounded.values()]) / (steps - steps // 20)
    return params, float(np.mean(losses[-(steps // 20) :])), float(share[0]) if retracted else None


def measure(framework: str, steps: int) -> list[dict]:
    """One row for each rule and rate."""
    stack, rows = stacks.FRAMEWORKS[framework](CONFIG, 8), []
    table_VD = np.random.default_rng(1).normal(0, 0.1, (len(CODES), 96)).astype(np.float32)

    def whole(params, x_BT):
        return stack.plain(params[1], params[0][x_BT], CAUSAL_11TT) @ params[0].T

    def adapted(factors, x_BT):
        return stack.adapted(factors, base[1], base[0][x_BT], CAUSAL_11TT) @ base[0].T

    base, *_ = train(whole, (table_VD, stack.weights), optax.adamw(1e-3), MANUAL, steps)
    for rate in RATES:
        for name, tx in ("lora", optax.adamw(rate)), ("lora-pro", lp.lorapro_adamw(rate, t5.SCALE)):
            tuned = train(adapted, stack.factors, tx, SOURCE, steps, retracted=name == "lora-pro")
            row = {"framework": framework, "rule": name, "rate": rate}
            rows.append(row | {"loss": tuned[1], "bounded": tuned[2]})
    return rows


def main(steps: int = 200, out: pathlib.Path = timing.RESULTS / "bound.jsonl") -> None:
    """Trains, shows, and appends JSON lines."""
    rows = [row for framework in stacks.FRAMEWORKS for row in measure(framework, steps)]
    timing.report("bound", rows, [], {"steps": steps}, out)


if __name__ == "__main__":
    tyro.cli(main)
