"""Configurations by name: `--config NAME` gives the other flags their defaults."""

from experiments.configs import minilm_pydoc, minilm_sst2, t5_glue
from experiments.finetune.config import Command

CONFIGS: dict[str, Command] = {
    "minilm_pydoc": minilm_pydoc.CONFIG,
    "minilm_sst2": minilm_sst2.CONFIG,
    "t5_glue": t5_glue.CONFIG,
}
