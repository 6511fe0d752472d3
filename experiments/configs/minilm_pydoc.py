"""The README's second job: MiniLM learns to tell intact sentences from disturbed ones.

    python -m experiments.finetune --config minilm_pydoc

Six runs of 116 steps, one a method; a run takes half a minute to a minute on two free CPU cores.

Expected, validation accuracy in per cent on 368 sentences, mean ± sample standard deviation of
seeds 0 and 1 (`--seeds 0,1`); guessing has 50, the standard error of one accuracy is 2.5 points.
Each method is at its rate in `RATES`, not at its best. Some runs do not leave 50 in so few steps:
this shows how the command works, and ranks no method.

    full                70.0 ± 9.4
    lora                52.9 ± 4.0
    lorapro-full        67.3 ± 9.0
    lorapro-factored    73.5 ± 1.3
    lorapro-muon        63.3 ± 11.9
    lorapro-adamw       58.2 ± 11.1
"""

from experiments.finetune.config import Command

CONFIG = Command(
    config="minilm_pydoc",
    model="minilm",
    task="pydoc",
    epochs=1,
    batch_size=16,
    max_length=64,
)
