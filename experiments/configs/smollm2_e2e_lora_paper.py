"""E2E NLG with SmolLM2 by the protocol of the LoRA paper's GPT-2 (arXiv:2106.09685, table 11).

    python -m experiments.finetune --config smollm2_e2e_lora_paper --data-dir ../shared

Three runs of 26,000 steps: for an accelerator. Not run here, so there is no result to expect; the
paper's BLEU is of GPT-2 and of the test split. Decay is 0.01, as there, for every method.
"""

from experiments.finetune.config import Command

CONFIG = Command(
    config="smollm2_e2e_lora_paper",
    model="smollm2",
    task="e2e",
    plain=True,
    methods=("lora",),
    learning_rates=(2e-4,),
    seeds=(0, 1, 2),
    rank=4,
    alpha=32.0,
    dropout=0.1,
    epochs=5,
    batch_size=8,
    schedule="linear",
    warmup_ratio=0.019,  # 500 steps
    weight_decay=0.01,
    label_smoothing=0.1,
    answers=547,  # every meaning representation of the validation split
    beams=10,
    length_penalty=0.8,
    no_repeat_ngram=4,
)
