"""How often `retract`'s bound acts on a real encoder: python -m benchmarks.bound_sst2 --data-dir D

MiniLM on SST-2, by the step of `experiments.finetune`, batches of 32 for one epoch, at rates at
which plain LoRA trains well. `bounded` is the share of (pair, step) after the first 5%. A method
that does not train ends at a loss of 0.69.
"""

import pathlib

import jax
import numpy as np
import tyro

import lorapro_jax as lp
from benchmarks import timing
from experiments.finetune.config import RunConfig
from experiments.finetune.methods import layout_of
from experiments.finetune.prepare import Data, build, load_data

METHODS, RATES = ("lorapro-factored", "lorapro-full"), (1e-3, 3e-3)


def measure(run: RunConfig, data: Data) -> dict:
    """The run's mean loss over the last 5% of its steps, and the share that was bounded."""
    setup, params = build(run, data)
    programs, steps = setup.programs, len(setup.batches)
    carry, losses, acted = [params, programs.init(params)], [], {}
    for i, batch in enumerate(setup.batches.to_iter_dataset(), 1):
        args = *carry, setup.frozen, batch, np.int32(i - 1), setup.varied
        length = batch["tokens"].shape[1]
        if length not in programs.step:
            programs.step.compile(length, args)
        *carry, metrics = programs.step[length](*args)
        losses.append(float(metrics.loss))
        if i in (steps // 20, steps):  # the counts do not depend on the gradients
            given, about = (carry[0], carry[0], run.scale), {"layout": layout_of(run)}
            pairs = lp.diagnose(*given, state=carry[1], **about).values()
            acted[i] = i * np.mean([jax.device_get(pair.bounded) for pair in pairs])
    share = np.diff([*acted.values()])[0] / (steps - steps // 20)
    row = {"method": run.method, "rate": run.learning_rate, "steps": steps}
    return row | {"loss": float(np.mean(losses[-(steps // 20) :])), "bounded": float(share)}


def main(
    data_dir: str,
    rows: int = 9600,
    seed: int = 0,
    out: pathlib.Path = timing.RESULTS / "bound_sst2.jsonl",
) -> None:
    """Trains, shows, and appends JSON lines."""
    common = {"model": "minilm", "task": "sst2", "max_length": 64, "epochs": 1, "seed": seed}
    found = []
    for method in METHODS:
        for rate in RATES:
            run = RunConfig(method=method, learning_rate=rate, train_examples=rows, **common)
            found.append(measure(run, load_data(run, data_dir)))
    bounds = [
        timing.bounded(f"{row['method']} at {row['rate']:g}", row["bounded"], most=0.05)
        for row in found
    ]
    timing.report("bound_sst2", found, bounds, {"rows": rows, "seed": seed}, out)


if __name__ == "__main__":
    tyro.cli(main)
