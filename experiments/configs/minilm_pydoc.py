"""The README's second job: MiniLM learns to tell intact sentences from disturbed ones.

    python -m experiments.finetune --config minilm_pydoc

A run of 116 steps for each of the six methods, about a minute on two free CPU cores.

Expected, validation accuracy in per cent on 368 sentences, of one seed (0): there is no spread, and
the standard error of one accuracy is 2.5 points. Each method is at its rate in `RATES`, not at
its best:

    full                63.3
    lora                57.3
    lorapro-full        75.0
    lorapro-factored    62.2
    lorapro-muon        not run here
    lorapro-adamw       not run here
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
