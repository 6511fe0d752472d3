"""What other programs read of a complete run: its adapters for PEFT, or its whole model.

    peft/    adapter_config.json and adapter_model.safetensors: W + alpha / r B A, of every layer
    merged/  config.json, model.safetensors, tokenizer.json and the chat template

Both lie in the run's folder and are whole or not there. Weights are summed and kept in float32.
"""

import pathlib
import re
from collections.abc import Callable

from flax import nnx

import lorapro_jax as lp
from experiments import storage
from experiments.finetune.config import Command, RunConfig
from experiments.finetune.methods import method_named
from experiments.finetune.prepare import dialect_of
from experiments.finetune.trained import names_of, trained
from experiments.models import MODELS, llama_files, llama_peft, smollm2, t5_files
from experiments.models import get as model_named
from experiments.models.quantized import dequantize

_TASK_TYPES = {"decoder": "CAUSAL_LM", "text-to-text": "SEQ_2_SEQ_LM"}  # PEFT's, of our kinds


def check(command: Command) -> None:
    """Raises a ValueError if --export cannot be carried out for every run of the command."""
    if command.export == "none":
        return
    told = f"--export {command.export}"
    if storage.is_bucket(command.out):
        raise ValueError(
            f"{told} writes to a disk, not to {command.out}; copy the run folders to a disk and "
            "give the same command with that as --out"
        )
    if model_named(command.model).kind not in _TASK_TYPES:
        fitting = ", ".join(name for name in MODELS if model_named(name).kind in _TASK_TYPES)
        raise ValueError(
            f"{told} has no place for the fresh head of --model {command.model}; the models that "
            f"can be exported are {fitting}"
        )
    without = [name for name in command.methods if not method_named(name).adapted]
    if command.export == "peft" and without:
        raise ValueError(
            f"{told} writes adapters, and method {without[0]} has none; leave it out of --methods, "
            "or choose --export merged"
        )


def export(run: RunConfig, folder: pathlib.Path, kind: str) -> pathlib.Path:
    """The folder of what is asked for of a complete run, written unless it is there."""
    path = folder / kind
    if not path.exists():
        model = trained(run, folder)
        with storage.new_folder(path, f"the {kind} files of the run") as temporary:
            _WRITERS[kind](model, run, temporary)
    return path


def _peft(model: nnx.Module, run: RunConfig, folder: pathlib.Path) -> None:
    spec, lora = model_named(run.model), nnx.state(model, nnx.LoRAParam)
    linears = {name.rpartition("/")[0] for name in names_of(nnx.as_pure(lora))}
    base, revision = base_of(run)
    lp.peft.save(
        folder,
        lora,
        run.scale,
        modules={re.escape(path): _module(spec.kind, path) for path in sorted(linears)},
        layout=spec.layout,
        base_model=base,
        task_type=_TASK_TYPES[spec.kind],
        rslora=run.rslora,
    )
    if revision is not None:
        path = folder / llama_peft.CONFIG
        told = storage.read_json(path, (), "an adapter's configuration")
        storage.write_json(path, told | {"revision": revision}, "the adapter's configuration")


def _module(kind: str, path: str) -> str:
    """PyTorch's name of a linear; {0} stands for the layer's number where layers are stacked."""
    _, *inner = path.split("/")
    if kind == "decoder":
        return llama_peft.module_name("{0}", inner[-1])
    return t5_files.tensor_name((*inner, "kernel")).removesuffix(".weight")


def base_of(run: RunConfig) -> tuple[str | None, str | None]:
    """(folder, file or name, commit) of the model that the adapters belong to, as PEFT keeps it."""
    if run.model == "smollm2":
        return smollm2.PUBLISHED, None
    if run.weights is None:
        return None, None
    path = pathlib.Path(run.weights).expanduser()
    if path.exists():
        return str(path.resolve()), None
    name, _, commit = run.weights.partition("@")
    return name, commit or None


def _merged(model: nnx.Module, run: RunConfig, folder: pathlib.Path) -> None:
    if run.quantized is not None:
        dequantize(model.llama)
    if method_named(run.method).adapted:
        lp.nnx.merge_lora(model)
    spec = model_named(run.model)
    if spec.kind == "decoder":
        dialect = dialect_of(run)
        llama_files.save(model.llama, folder, dialect.tokenizer, dialect.template)
    else:
        t5_files.save(model.t5, folder, spec.tokenizer(run.weights))


_WRITERS: dict[str, Callable[[nnx.Module, RunConfig, pathlib.Path], None]] = {
    "peft": _peft,
    "merged": _merged,
}
