"""A conversation as the text that a model was trained on, by the model's own Jinja template."""

import functools
from collections.abc import Sequence
from typing import Any

from experiments.data.language import Message


def rendered(
    template: str, messages: Sequence[Message], *, answer: bool = False, **tokens: str
) -> str:
    """The text of the messages.

    Args:
        template: the model's, which is a program of strangers: it runs in Jinja's sandbox.
        messages: in turn.
        answer: whether the text ends where the assistant's answer begins.
        tokens: what else the template asks for, such as bos_token and eos_token.

    Raises:
        ValueError: the template cannot be read, or does not take these messages.
    """
    import jinja2  # only where there is a chat

    try:
        given = {"messages": list(messages), "add_generation_prompt": answer} | tokens
        return _compiled(template).render(**given)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(
            f"the model's chat template refuses {len(messages)} messages ({error}); check their "
            "roles and order, or use another template"
        ) from error


@functools.lru_cache(maxsize=4)  # compiling one takes many times as long as writing a text
def _compiled(template: str) -> Any:
    import jinja2.sandbox

    def refuse(why: str) -> None:
        raise jinja2.TemplateError(why)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.globals["raise_exception"] = refuse
    return sandbox.from_string(template)
