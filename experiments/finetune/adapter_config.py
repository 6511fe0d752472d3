"""lora_config.json beside a run's checkpoints: enough to rebuild its adapters without this code."""

from typing import Any

from experiments import storage
from experiments.finetune.config import RunConfig
from experiments.finetune.methods import method_named
from experiments.models import get as model_named

FILE = "lora_config.json"


def write(folder: storage.Path, run: RunConfig) -> None:
    """Writes the file of a run with adapters, unless it is there."""
    path = folder / FILE
    if method_named(run.method).adapted and not path.exists():
        storage.write_json(path, described(run), "what the adapters are")


def described(run: RunConfig) -> dict[str, Any]:
    """What the run's adapters are, and how they lie in checkpoints and in final.safetensors."""
    model = model_named(run.model)
    axes = "" if model.layout is None else "layers "
    return {
        "rank": run.rank,
        "alpha": run.alpha,
        "rslora": run.rslora,
        "scale": run.scale,
        "targets": run.targets or model.adapted,
        "layout": {
            "weight": "kernel + scale lora_a @ lora_b",
            "kernel": f"{axes}in out",
            "LINEAR/lora_a": f"{axes}in rank",
            "LINEAR/lora_b": f"{axes}rank out",
        },
        "model": run.model,
        "weights": run.weights,
        "method": run.method,
    }
