"""LoRA-Pro for JAX: low-rank adapters whose steps are closest to full fine-tuning.

`tx = lp.freeze_base(lp.lorapro_adamw(1e-4, scale=2.0))` trains the adapters of a Flax model.
"""

from lorapro_jax import layouts, linen, nnx, peft
from lorapro_jax._adam import lorapro_adamw, scale_by_lorapro_adam
from lorapro_jax._diagnostics import PairDiagnostics, diagnose
from lorapro_jax._layouts import Layout, LoRADimensionNumbers
from lorapro_jax._muon import lorapro_muon, scale_by_lorapro_muon
from lorapro_jax._partition import freeze_base, labels, merge, split
from lorapro_jax._projection import lorapro, minimum_norm
from lorapro_jax._retraction import retract
from lorapro_jax._state_sharding import state_shardings
from lorapro_jax.linen import merge_lora

__all__ = [
    "LoRADimensionNumbers",
    "Layout",
    "PairDiagnostics",
    "diagnose",
    "freeze_base",
    "labels",
    "layouts",
    "linen",
    "lorapro",
    "lorapro_adamw",
    "lorapro_muon",
    "merge",
    "merge_lora",
    "minimum_norm",
    "nnx",
    "peft",
    "retract",
    "scale_by_lorapro_adam",
    "scale_by_lorapro_muon",
    "split",
    "state_shardings",
]
