"""E2E NLG with SmolLM2: a restaurant's facts to a sentence, on a documented share of the data.

    python -m experiments.finetune --config smollm2_e2e --data-dir ../shared

200 steps of 8 rows of at most 64 tokens, the shorter half of the data (47%); a whole epoch has
5,258 steps.
"""

from experiments.finetune.config import Command

CONFIG = Command(
    config="smollm2_e2e",
    model="smollm2",
    task="e2e",
    plain=True,
    methods=("lora", "lorapro-factored", "full"),
    batch_size=8,
    max_length=64,
    train_examples=3520,  # about 1,650 of them fit into 64 tokens
    eval_examples=280,
    seeds=(0, 1),
)
