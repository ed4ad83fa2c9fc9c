"""The chat template that comes with a published decoder."""

import json
import os
from pathlib import Path

from compress_jax.core.errors import WeightsError
from compress_jax.core.types import JsonObject
from compress_jax.data import ChatTemplate
from compress_jax.models._decoder.gguf import GGUF

TOKENS = ("bos_token", "eos_token")


def chat_template(path: str | os.PathLike[str]) -> ChatTemplate | None:
    """Return the chat template of a model, for `data.chat`.

    Args:
      path: as `load` takes it: a folder of Hugging Face's, or a GGUF file.

    Returns:
      The template, with the tokens that begin and end a text; None if the model has none.

    Raises:
      WeightsError: if a file is damaged.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> cj.models.chat_template(tempfile.mkdtemp()) is None
      True
    """
    given = Path(path).expanduser()
    if given.suffix == ".gguf":
        return _of_gguf(GGUF(given).metadata)
    folder = given if given.is_dir() else given.parent
    file = folder / "tokenizer_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        config = config if isinstance(config, dict) else {}
        text = _default(config.get("chat_template"))
        file = folder / "chat_template.jinja"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    names = {name: _content(config.get(name)) for name in TOKENS}
    return None if text is None else ChatTemplate(text, {n: x for n, x in names.items() if x})


def _of_gguf(metadata: JsonObject) -> ChatTemplate | None:
    text = metadata.get("tokenizer.chat_template")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    names = {}
    for name in TOKENS:
        number = metadata.get(f"tokenizer.ggml.{name}_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            names[name] = tokens[number]
    return ChatTemplate(text, names) if isinstance(text, str) else None


def _content(token: object) -> str:
    """Return the text of a token, which may be described by an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _default(found: object) -> str | None:
    """Return the template, or of several by name the one that is called default."""
    if isinstance(found, list):
        named = {each.get("name"): each for each in found if isinstance(each, dict)}
        found = named.get("default", {}).get("template")
    return found if isinstance(found, str) else None
