"""Answers prompts: python -m experiments.generate --adapter FOLDER --prompt "..."

FOLDER is a run of experiments.finetune, its peft/ or merged/ (--export), another PEFT adapter or
another Hugging Face folder. Without --adapter the base answers. The answer to one prompt is printed
alone; those to several come one after the other, each below its prompt.
"""

import dataclasses
import pathlib

import tyro

from experiments.checks import Count, in_range
from experiments.exits import reported
from experiments.finetune.config import Search
from experiments.generate.writers import answers, opened, tokens_of
from experiments.models.llama_decode import Decoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Who answers what."""

    adapter: pathlib.Path | None = None
    """A run folder of experiments.finetune, a PEFT adapter, or a whole model's folder; None: the
    base alone."""
    model: str | None = None
    """The base: a folder as Hugging Face keeps it, a .gguf file, or NAME@COMMIT on its hub. None:
    what a PEFT adapter says it was trained on; SmolLM2 where there is no adapter."""
    prompt: str | None = None
    """What is asked."""
    prompts_file: pathlib.Path | None = None
    """A text file with one prompt a line, asked after --prompt."""
    max_new_tokens: Count = 128
    """Tokens of an answer at most."""
    plain: bool = False
    """Write prompts without the model's chat template; so does a run that was trained plain."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Search, Asked):
    """Let a fine-tuned language model answer prompts."""


@reported
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for a request that cannot be served."""
    settings = tyro.cli(
        Settings,
        args=argv,
        prog="python -m experiments.generate",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    in_range(settings)
    prompts = prompts_of(settings)
    writer = opened(settings.adapter, settings.model)
    if settings.plain:
        writer = writer.plain()
    decoding = decoding_of(settings)
    rows = tokens_of(prompts, writer.dialect, settings.max_new_tokens)
    for prompt, answer in zip(prompts, answers(writer, rows, decoding), strict=True):
        print(answer if len(prompts) == 1 else f"> {prompt}\n{answer}\n", flush=True)
    return 0


def prompts_of(settings: Settings) -> list[str]:
    """All that is asked, in order; a ValueError if there is nothing, or an empty prompt."""
    prompts = {} if settings.prompt is None else {"--prompt": settings.prompt}
    if (file := settings.prompts_file) is not None:
        try:
            lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8 ({error}); convert it") from error
        prompts |= {f"{file}, line {number}": line for number, line in enumerate(lines, 1)}
    if not prompts:
        raise ValueError('there is no prompt; give --prompt "..." or --prompts-file FILE')
    for where, prompt in prompts.items():
        if not prompt.strip():
            raise ValueError(f"{where} is empty; write what is asked")
    return list(prompts.values())


def decoding_of(settings: Settings) -> Decoding:
    """How answers are searched for."""
    names = [field.name for field in dataclasses.fields(Decoding)]
    return Decoding(**{name: getattr(settings, name) for name in names})
