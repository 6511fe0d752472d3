"""The paper's GLUE table: T5-base, rank 8, batches of 32 x 128, one epoch, rate 1e-4, three seeds.

    python -m experiments.finetune --config t5_glue --task cola

and mrpc, sst2, qnli, mnli. Needs T5-base's weights (`--weights FOLDER`, or a network) and an
accelerator. Not run here: there is no time and no result to expect but the paper's, which stands in
docs/results.md and `experiments/report/paper.json`. `--smoke` does the same in seconds on a random
tiny model.
"""

from experiments.finetune.config import Command

CONFIG = Command(
    config="t5_glue",
    model="t5",
    task="cola",
    methods=("full", "lora", "lorapro-full", "lorapro-factored", "lorapro-adamw"),  # the table's
    learning_rates=(1e-4,),
    seeds=(0, 1, 2),
)
