"""Where a model that writes comes from, told from the files in a folder; and what it writes."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.data.language import question
from experiments.finetune.prepare import dialect_of
from experiments.finetune.trained import run_of, trained
from experiments.models import Dialect, decoders, llama_peft, smollm2, weights
from experiments.models import get as model_named
from experiments.models.exchanges import tokenised
from experiments.models.llama import Llama
from experiments.models.llama_decode import Decoding, decode, padded
from experiments.storage import read_json

TOGETHER = 16  # prompts that are answered at once, at most


class Writer(NamedTuple):
    """A language model, and how it reads and writes."""

    model: Llama
    dialect: Dialect

    def plain(self) -> "Writer":
        """The same without the chat template."""
        return self._replace(dialect=self.dialect._replace(template=None))


def opened(adapter: pathlib.Path | None, model: str | None) -> Writer:
    """The model of a run, of a PEFT adapter on its base `model`, or of a whole model's folder.

    Raises:
        FileNotFoundError: a folder or a file in it is missing.
        ValueError: a file is damaged, the run's model writes no texts, or the base is not known.
    """
    if adapter is None:
        return _base(model)
    if not adapter.is_dir():
        raise FileNotFoundError(f"--adapter {adapter} is no folder; name one")
    if (adapter / llama_peft.CONFIG).is_file():
        return _adapted(adapter, model)
    if model is not None:
        raise ValueError(
            f"--model {model} is the base of a PEFT adapter, but {adapter} has no "
            f"{llama_peft.CONFIG} and knows its model; leave --model out"
        )
    file = weights.there(adapter, weights.CONFIG)
    found = read_json(file, (), "the configuration of a run or a model", weights.REMEDY)
    return _of_run(adapter) if "method" in found else _base(str(adapter))


def _base(model: str | None) -> Writer:
    """A whole model: a folder, a .gguf file or NAME@COMMIT; SmolLM2 for None."""
    source = decoders.llama if model is not None else decoders.smollm2
    options = {"scanned": True, "remat": False, "dtype": jnp.float32}
    return Writer(source.load(model, rngs=nnx.Rngs(0), **options), source.dialect(model))


def _adapted(adapter: pathlib.Path, model: str | None) -> Writer:
    if (told := model or llama_peft.base_of(adapter)) is None:
        raise ValueError(
            f"{adapter / llama_peft.CONFIG} does not say which model it was trained on; name it "
            "with --model"
        )
    writer = _base(None if told == smollm2.PUBLISHED else told)
    llama_peft.adapt(writer.model, adapter)
    return writer


def _of_run(folder: pathlib.Path) -> Writer:
    run = run_of(folder)
    if model_named(run.model).kind != "decoder":
        raise ValueError(
            f"{folder} is a run of {run.model}, which writes no texts; choose a run of smollm2 or "
            "llama"
        )
    return Writer(trained(run, folder).llama, dialect_of(run))


def tokens_of(prompts: Sequence[str], dialect: Dialect, new: int) -> list[list[int]]:
    """The tokens of each prompt, up to where its answer begins, as in training.

    Raises:
        ValueError: a prompt and `new` tokens are more than the model's context.
    """
    # Some answer must follow, for the template to say where it begins.
    rows = tokenised([question(prompt, "-", (), 0) for prompt in prompts], dialect)
    for number, row in enumerate(rows, 1):
        if row.prompt + new > dialect.context:
            raise ValueError(
                f"prompt {number} has {row.prompt} tokens; with --max-new-tokens {new} that is "
                f"more than the model's context, {dialect.context}: shorten it, or ask for fewer"
            )
    return [row.tokens[: row.prompt] for row in rows]


def answers(writer: Writer, rows: Sequence[list[int]], decoding: Decoding) -> Iterator[str]:
    """What the model writes after the tokens of each prompt."""
    model, dialect = writer
    run = nnx.jit(decode, static_argnames="decoding")
    for start in range(0, len(rows), TOGETHER):
        most = dialect.context - decoding.max_new_tokens
        batch = padded(rows[start : start + TOGETHER], most=most)
        for row in np.asarray(run(model, *map(jnp.asarray, batch), decoding=decoding)):
            yield dialect.text(row)
