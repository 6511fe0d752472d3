"""Tasks as text to text: a prompt for each example, and a word for each label.

The prompts of GLUE are those behind the paper's table (LoRA-GA's set-up; rte's is built like
mnli's, pydoc's like cola's). T5 v1.0 saw GLUE in its pre-training, under other prompts ("cola
sentence: ..."), and would answer those from memory.
"""

from typing import NamedTuple

from experiments.data.task import Example, Task


class Prompt(NamedTuple):
    """How a task is put to a text-to-text model."""

    template: str  # with the task's fields in braces
    words: tuple[str, ...]  # the answers, in the order of the task's labels

    def example(self, task: Task, example: Example) -> Example:
        """The example with its prompt for its only text."""
        fields = dict(zip(task.fields, example.texts, strict=True))
        return example._replace(texts=(self.template.format(**fields),))


_SIMILARITY = "classify the semantic similarity of the text: {}\n{}\nresult: "
_GRAMMAR = Prompt(
    "classify the grammaticality of the text: {sentence}\nresult: ", ("unacceptable", "acceptable")
)
_ENTAILMENT = ("entailment", "not_entailment")

PROMPTS = {
    "cola": _GRAMMAR,
    "pydoc": _GRAMMAR,
    "sst2": Prompt(
        "classify the sentiment of the text: {sentence}\nresult: ", ("negative", "positive")
    ),
    "mrpc": Prompt(_SIMILARITY.format("{sentence1}", "{sentence2}"), ("different", "equivalent")),
    "rte": Prompt(_SIMILARITY.format("{sentence1}", "{sentence2}"), _ENTAILMENT),
    "mnli": Prompt(
        _SIMILARITY.format("{premise}", "{hypothesis}"), ("entailment", "neutral", "contradiction")
    ),
    "qnli": Prompt(
        "classify the semantic similarity of the question and the sentence: "
        "{question}\n{sentence}\nresult: ",
        _ENTAILMENT,
    ),
}
