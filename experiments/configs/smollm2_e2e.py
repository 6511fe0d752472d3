"""E2E NLG with SmolLM2: a restaurant's facts to a sentence, on a documented share of the data.

    python -m experiments.finetune --config smollm2_e2e --data-dir ../shared

200 steps of 8 rows of at most 96 tokens, of 5,258 an epoch: 20 minutes a run on two CPU cores.
"""

from experiments.finetune.config import Command

CONFIG = Command(
    config="smollm2_e2e",
    model="smollm2",
    task="e2e",
    plain=True,
    methods=("lora", "lorapro-factored", "full"),
    batch_size=8,
    max_length=96,
    train_examples=1640,  # 1,600 of them fit into 96 tokens
    eval_examples=150,
    seeds=(0, 1),
)
