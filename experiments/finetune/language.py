"""What a language model's run needs beside its loss: its rows, and answers to a few prompts."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data.batching import Encoded, joined
from experiments.data.language import Exchange, LanguageTask
from experiments.data.tasks import task_named
from experiments.finetune.config import RunConfig
from experiments.models import get as model_named
from experiments.models.exchanges import Dialect, tokenised
from experiments.models.llama_decode import Decoding, padded

TOGETHER = 16  # prompts that are answered at once, at most


class Prompt(NamedTuple):
    """What is asked, and what would be right."""

    text: str  # the last message before the answer
    tokens: tuple[int, ...]  # all of the conversation before the answer
    references: tuple[str, ...]


class Questions(NamedTuple):
    """The prompts that are answered at every evaluation, in batches of one shape."""

    prompts: Sequence[Prompt]
    batches: list[dict[str, np.ndarray]]  # "tokens" and "mask" (B, T), of this process's rows
    dialect: Dialect
    task: LanguageTask

    def answers(self, decode: Callable[[dict[str, np.ndarray]], np.ndarray]) -> list[str]:
        """The texts of what `decode` makes of each batch: of all processes' rows, (B, steps)."""
        rows = [row for batch in self.batches for row in decode(batch)]
        texts = map(self.dialect.text, rows)
        return list(texts)[: len(self.prompts)]  # the last batch is filled up

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """The task's, of the answers."""
        return self.task.score(answers, [prompt.references for prompt in self.prompts])


def encode_exchanges(exchanges: Sequence[Exchange], dialect: Dialect, max_length: int) -> Encoded:
    """The rows of at most `max_length` tokens; the segment of what is learnt is 1.

    Raises:
        ValueError: all are longer.
    """
    rows = tokenised(exchanges, dialect)
    kept = [i for i, row in enumerate(rows) if len(row.tokens) <= max_length]
    if rows and not kept:
        shortest = min(len(row.tokens) for row in rows)
        raise ValueError(
            f"all {len(rows)} examples have more than --max-length {max_length} tokens (the "
            f"shortest {shortest}); raise it"
        )
    return joined(
        [np.array(rows[i].tokens, np.int32) for i in kept],
        [np.array(rows[i].segments, np.int32) for i in kept],
        [0] * len(kept),
        [exchanges[i].id for i in kept],
        dialect.ends[0],
    )


def prompts_of(
    exchanges: Sequence[Exchange], dialect: Dialect, count: int, max_length: int
) -> list[Prompt]:
    """The first `count` different prompts of at most `max_length` tokens."""
    found: dict[tuple[int, ...], Prompt] = {}
    for exchange in exchanges:
        if len(found) == count:
            break
        (row,) = tokenised([exchange], dialect)
        tokens = tuple(row.tokens[: row.prompt])
        if len(tokens) <= max_length:
            text = exchange.messages[-2]["content"] if len(exchange.messages) > 1 else ""
            found.setdefault(tokens, Prompt(text, tokens, exchange.references))
    return list(found.values())


def questions_of(
    prompts: Sequence[Prompt],
    dialect: Dialect,
    task: LanguageTask,
    decoding: Decoding,
    devices: int,
    process_index: int,
    process_count: int,
) -> Questions:
    """The prompts in batches of which every device has as many rows."""
    size = -(-min(TOGETHER, len(prompts)) // devices) * devices
    rows = [prompt.tokens for prompt in prompts]
    rows += [rows[-1]] * (-len(rows) % size)
    tokens, mask = padded(rows, most=dialect.context - decoding.max_new_tokens)
    share = size // process_count
    batches = []
    for start in range(share * process_index, len(rows), size):
        mine = slice(start, start + share)
        batches.append({"tokens": tokens[mine], "mask": mask[mine]})
    return Questions(prompts, batches, dialect, task)


def decoding_of(run: RunConfig) -> Decoding | None:
    """How the run's model answers; None: it is no language model, or not asked anything."""
    if model_named(run.model).kind != "decoder" or not run.answers:
        return None
    return Decoding(
        run.max_new_tokens or task_named(run.task).max_new_tokens,
        run.beams,
        run.length_penalty,
        run.no_repeat_ngram,
    )


def headline(run: RunConfig) -> str:
    """The score that stands for a run: the task's, or a language model's loss per learnt token.

    A few answers' score is too coarse to tell one rate from another.
    """
    return "loss" if model_named(run.model).kind == "decoder" else task_named(run.task).metric


def loss_scores(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Loss per learnt token and its exponential, of `LanguageModel`'s outputs (N, 2)."""
    del labels
    total, count = np.asarray(outputs, np.float64).sum(axis=0)
    loss = float(total / count)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
