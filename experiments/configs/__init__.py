"""Configurations by name: `--config NAME` gives the other flags their defaults."""

from experiments.configs import (
    minilm_pydoc,
    minilm_sst2,
    smollm2_docstrings,
    smollm2_e2e,
    smollm2_e2e_lora_paper,
    t5_glue,
)
from experiments.finetune.config import Command

CONFIGS: dict[str, Command] = {
    "smollm2_docstrings": smollm2_docstrings.CONFIG,
    "smollm2_e2e": smollm2_e2e.CONFIG,
    "smollm2_e2e_lora_paper": smollm2_e2e_lora_paper.CONFIG,
    "minilm_pydoc": minilm_pydoc.CONFIG,
    "minilm_sst2": minilm_sst2.CONFIG,
    "t5_glue": t5_glue.CONFIG,
}
