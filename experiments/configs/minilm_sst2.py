"""SST-2 with MiniLM: how a method's score depends on its learning rate (docs/results.md).

    python -m experiments.finetune --config minilm_sst2 --data-dir ../shared/tfds

20 runs of 75 steps, 17 minutes on two CPU cores. Needs SST-2 prepared by TFDS, or a network.

Expected, validation accuracy in per cent, mean ± sample standard deviation of seeds 0 and 1; the
standard error of one accuracy on 872 rows is 1.3 points:

    rate       1e-4         3e-4         1e-3         2e-3         3e-3
    factored   79.8 ± 1.2   82.2 ± 0.2   81.7 ± 1.2   78.8 ± 1.1   78.3 ± 0.3
    full       80.5 ± 1.2   81.5 ± 0.7   80.4 ± 0.7   78.2 ± 0.1   76.5 ± 0.8

LoRA: `--methods lora --learning-rates 1e-3,3e-3`: 80.9 ± 1.3, 81.8 ± 0.7.
"""

from experiments.finetune.config import Command

CONFIG = Command(
    config="minilm_sst2",
    model="minilm",
    task="sst2",
    max_length=64,
    train_examples=2400,
    methods=("lorapro-factored", "lorapro-full"),
    learning_rates=(1e-4, 3e-4, 1e-3, 2e-3, 3e-3),
    seeds=(0, 1),
)
