"""From a command line to its runs: what is asked for, checked, and cut down for --smoke."""

import argparse
import dataclasses
import hashlib
import math
import os
import re
from typing import TypeVar

import tyro

from experiments import checks, storage
from experiments.configs import CONFIGS
from experiments.data.tasks import LANGUAGE, OWN_DATA, TASKS
from experiments.finetune.config import RATES, Command, Device, Grid, RunConfig, Training, rate_name
from experiments.models import get as model_named

# The paper trains one epoch of 3,668 to 392,702 examples. `pydoc` has a few thousand, and one
# command with four methods is to end within six minutes on two CPU cores.
EPOCHS = {"pydoc": 2}
PAPER_EPOCHS = 1

# Of single models: where first trials of SmolLM2 did best; no sweep has confirmed them.
RATES_OF = {
    "smollm2": RATES | {"lorapro-full": 1e-3, "lorapro-factored": 1e-3, "lorapro-muon": 3e-3},
}


def rates_of(model: str) -> dict[str, float]:
    """Each method's peak rate, unless the command gives others."""
    return RATES_OF.get(model, RATES)


SCALE = checks.Range(1e-9, 1e9)  # as `lorapro_jax` demands: its inverse is needed too


AnyGrid = TypeVar("AnyGrid", bound=Grid)


def read(argv: list[str] | None, prog: str, kind: type[AnyGrid] = Command) -> AnyGrid:
    """The command that the arguments ask for; a usage error ends the process.

    Each base of `kind` that has no bases itself is a group of flags in the help.
    """
    chooser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    chooser.add_argument("--config")
    chosen = chooser.parse_known_args(argv)[0].config
    preset = CONFIGS[checks.one_of("configuration", chosen, CONFIGS)] if chosen else Command()
    groups = []
    for base in reversed(kind.__mro__):
        if base.__bases__ == (object,):
            names = [f.name for f in dataclasses.fields(base) if hasattr(preset, f.name)]
            default = base(**{name: getattr(preset, name) for name in names})
            groups.append((base.__name__.lower(), base, default))
    form = dataclasses.make_dataclass(kind.__name__, groups)
    form.__doc__ = kind.__doc__
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    found = vars(tyro.cli(form, args=argv, prog=prog, config=flat)).values()
    command = kind(**{name: value for group in found for name, value in vars(group).items()})
    return _with_environment(command) if isinstance(command, Device) else command


def _with_environment(command: Command) -> Command:
    """The command with what it leaves to JAX's variables; nothing if they name no coordinator."""
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return command
    told = {"coordinator": command.coordinator or os.environ["JAX_COORDINATOR_ADDRESS"]}
    for name in ("num_processes", "process_id"):
        variable = f"JAX_{name.upper()}"
        if getattr(command, name) is None and (number := os.environ.get(variable)) is not None:
            if not number.isdecimal():
                raise ValueError(f"{variable} is {number!r}; set it to a whole number")
            told[name] = int(number)
    return dataclasses.replace(command, distributed=True, **told)


SMOKE = {"t5": "t5-tiny", "smollm2": "llama-tiny", "llama": "llama-tiny"}
SMOKE |= {name: name for name in SMOKE.values()}


def shrunk(command: AnyGrid) -> AnyGrid:
    """The command with --smoke carried out: the same methods on next to nothing."""
    if not command.smoke:
        return command
    return dataclasses.replace(
        command,
        model=SMOKE.get(command.model, "tiny"),
        weights=None,
        task=command.task if command.data_dir or command.data else None,
        seeds=command.seeds[:1],
        epochs=1,
        batch_size=8,
        accumulate=math.gcd(command.accumulate, 8),
        max_length=256 if SMOKE.get(command.model) == "llama-tiny" else 32,  # bytes, or words
        answers=min(command.answers, 2),
        max_new_tokens=8,
        train_examples=64,
        eval_examples=32,
    )


def runs(command: Grid) -> list[RunConfig]:
    """The runs that a command stands for, in order; raises ValueError for what cannot be run."""
    shared = {f.name: getattr(command, f.name) for f in dataclasses.fields(Training)}
    shared["task"] = _task_of(command)
    if command.epochs is None:
        shared["epochs"] = EPOCHS.get(shared["task"], PAPER_EPOCHS)
    checks.in_range(command)
    checks.divides("--accumulate", command.accumulate, "--batch-size", command.batch_size)
    checks.different("--methods", command.methods)
    checks.different("--learning-rates", command.learning_rates or (), rate_name)
    checks.different("--seeds", command.seeds)
    if isinstance(command, Command):
        _check_command(command)
    if command.label_smoothing and model_named(command.model).kind != "decoder":
        raise ValueError(f"--label-smoothing is for a language model; {command.model} is none")
    shared["data_sha256"] = _digest(command.data, command.validation_data)
    grid = [
        RunConfig(**shared, method=method, learning_rate=rate, seed=seed)
        for method in command.methods
        for rate in command.learning_rates or (rates_of(command.model)[method],)
        for seed in command.seeds
    ]
    SCALE.check("the scale that --alpha and --rank make,", grid[0].scale)
    return grid


def _task_of(command: Grid) -> str:
    """The task by name; a ValueError if the model does not do it."""
    decoder = model_named(command.model).kind == "decoder"
    if command.data is not None:
        if not decoder or command.task is not None:
            raise ValueError(
                f"--data {command.data} is for a language model, in place of --task; choose "
                "--model smollm2 or llama, and leave --task out"
            )
        return OWN_DATA
    if command.validation_data is not None:
        raise ValueError(f"--validation-data {command.validation_data} goes with --data; add it")
    if command.task is None:
        return "docstrings" if decoder else "pydoc"
    if decoder != (checks.one_of("task", command.task, [*TASKS, *LANGUAGE]) in LANGUAGE):
        fitting = ", ".join(LANGUAGE if decoder else TASKS)
        raise ValueError(
            f"--task {command.task} is not for --model {command.model}, whose tasks are {fitting}"
        )
    return command.task


def _digest(*files: str | None) -> str | None:
    """SHA-256 of the user's files together; None: there are none."""
    contents = [storage.at(file).read_bytes() for file in files if file is not None]
    return hashlib.sha256(b"\0".join(contents)).hexdigest() if contents else None


def _check_command(command: Command) -> None:
    first, *last = command.profile_steps or (1, 1)
    if len(last) != 1 or not 1 <= first <= last[0]:
        raise ValueError(
            f"--profile-steps {','.join(map(str, command.profile_steps or ()))} is not FIRST,LAST "
            "with 1 <= FIRST <= LAST, such as 10,20"
        )
    if storage.is_bucket(command.out) and (command.tensorboard or command.profile_steps):
        raise ValueError(
            f"--tensorboard and --profile-steps write to a disk, not to {command.out}; leave them "
            "out (metrics.jsonl has the same figures), or name a folder"
        )
    if command.coordinator and not re.fullmatch(r".+:\d+", command.coordinator):
        raise ValueError(f"--coordinator {command.coordinator} is not HOST:PORT, as in node0:1234")
    given = (command.coordinator, command.num_processes, command.process_id)
    if not command.distributed and given != (None, None, None):
        raise ValueError(
            "--coordinator, --num-processes and --process-id need --distributed; add it"
        )
