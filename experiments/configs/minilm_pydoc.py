"""The README's main job: MiniLM learns to tell intact sentences from disturbed ones, five methods.

python -m experiments.finetune --config minilm_pydoc
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
