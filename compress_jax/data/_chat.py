"""A conversation as the text that a language model was trained to go on with."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from jinja2.sandbox import ImmutableSandboxedEnvironment

from compress_jax.core.errors import ArgumentError, DataError


class ChatTemplate(NamedTuple):
    """The chat template of a model.

    Attributes:
      text: in jinja2.
      names: tokens that it may write, such as ``{"bos_token": "<s>"}``.
    """

    text: str
    names: Mapping[str, str] = {}


LONGEST = 1_000_000  # characters of a rendered conversation


def chat(
    template: ChatTemplate | str,
    messages: Sequence[Mapping[str, str]],
    *,
    answer: bool = True,
    today: datetime.date | None = None,
    **names: object,
) -> str:
    """Return a conversation as a model's template writes it.

    A template is a program that comes with a model: it runs in jinja2's sandbox, without access to
    files, attributes that begin with an underscore, or changes of what it is given.

    Args:
      template: of the model, see `models.chat_template`.
      messages: ``{"role": "user", "content": "..."}``, and so on.
      answer: whether the text ends where the model's answer begins.
      today: the date, for templates that write it; None leaves it to their default.
      names: what else the template may use, such as ``bos_token="<s>"``.

    Returns:
      The text. Its special tokens are spelled out: ``tokenizer.encode([text], special=True)``.

    Raises:
      ArgumentError: if a message has no role or content, or the template refuses the conversation.
      DataError: if the template cannot be read, or does what the sandbox forbids.

    Example:
      >>> import compress_jax as cj
      >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      >>> cj.data.chat(template, [{"role": "user", "content": "Hello"}])
      '<user>Hello'
    """
    for message in [messages] if isinstance(messages, str | Mapping) else messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ArgumentError(
                f"a message is {{'role': 'user', 'content': '...'}}, got {message!r}"
            )
    template = ChatTemplate(template) if isinstance(template, str) else template
    given = {"bos_token": "", "eos_token": "", **template.names, **names}
    try:
        made = _environment(today).from_string(template.text)
        text = made.render(messages=list(messages), add_generation_prompt=answer, **given)
    except _RefusedError as error:
        raise ArgumentError(f"the chat template refuses the conversation: {error}") from error
    except Exception as error:  # whatever a program that is not ours may raise
        kind = type(error).__name__
        raise DataError(f"the chat template cannot be used ({kind}: {error})") from error
    if len(text) > LONGEST:
        raise DataError(f"the chat template made {len(text):,} characters of the conversation")
    return text


class _RefusedError(Exception):
    """What a template says of a conversation that it does not take."""


def _refuse(why: object) -> NoReturn:
    raise _RefusedError(why)


def _as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _environment(today: datetime.date | None) -> ImmutableSandboxedEnvironment:
    """Return what published templates expect: these names, and blocks that leave no lines."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _refuse
    if today is not None:
        environment.globals["strftime_now"] = today.strftime
    environment.filters["tojson"] = _as_json
    return environment
