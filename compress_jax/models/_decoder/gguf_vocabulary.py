"""The vocabulary of a GGUF file and the ``tokenizer.json`` of the same, both ways."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compress_jax.core.errors import DataError
from compress_jax.core.types import JsonObject
from compress_jax.data._tokenizer import Tokenizer, json_of

PREFIX = "tokenizer.ggml."
GPT2 = "gpt-2"
PLAIN = 1
UNUSED = 5
AROUND = ("bos", "eos")
# Names of the token that ends a text or a turn, the likelier ones first.
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
    "<eos>",
)
CONTROL, USER = 3, 4  # kinds of tokens that are cut out of a text whole
_DIGITS = {"type": "Digits", "individual_digits": True}
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = {**_WORDS, "use_regex": False}
_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> list[JsonObject]:
    apart = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**apart, "invert": False}, _BYTES]


# How texts are cut before pieces are looked for, by llama.cpp's name of it.
CUTS: Mapping[str, list[JsonObject]] = {
    GPT2: [_WORDS],
    "smollm": [_DIGITS, _WORDS],
    "llama-bpe": _split(_LLAMA),
    "llama3": _split(_LLAMA),
    "qwen2": _split(_QWEN),
}
NORMALIZERS: Mapping[str, JsonObject] = {"qwen2": {"type": "NFC"}}


def tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """Return a file's vocabulary as a ``tokenizer.json``.

    Args:
      metadata: of the file.

    Returns:
      JSON.

    Raises:
      DataError: if the vocabulary is of an unknown kind.
    """
    own = {name.removeprefix(PREFIX): x for name, x in metadata.items()}
    if own.get("model") != "gpt2":
        raise DataError(f"its tokenizer is of the kind {own.get('model')!r}, and 'gpt2' is read")
    cut = own.get("pre", GPT2)
    if cut not in CUTS:
        raise DataError(f"its tokenizer cuts texts as {cut!r}, and {', '.join(CUTS)} are known")
    tokens = own.get("tokens", [])
    kinds = own.get("token_type", [PLAIN] * len(tokens))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind == CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER)
    ]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": NORMALIZERS.get(cut),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[cut]},
        "post_processor": _around(own, tokens),
        "decoder": _WORDS,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": own.get("merges", []),
        },
    }
    return json.dumps(content)


def _around(own: Mapping[str, Any], tokens: Sequence[str]) -> JsonObject | None:
    """Return what puts a token before each text, and one after it, where the file wants that."""
    wanted = {which: own.get(f"{which}_token_id") for which in AROUND}
    numbers = {
        which: i
        for which, i in wanted.items()
        # A damaged file may have any number there.
        if own.get(f"add_{which}_token") and isinstance(i, int) and 0 <= i < len(tokens)
    }
    if not numbers:
        return None
    parts: dict[str, JsonObject] = {
        which: {"SpecialToken": {"id": tokens[i], "type_id": 0}} for which, i in numbers.items()
    }
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [parts.get("bos"), text, parts.get("eos")]
    return {
        "type": "TemplateProcessing",
        "single": [each for each in single if each],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]}
            for i in numbers.values()
        },
    }


def vocabulary(tokenizer: Tokenizer, size: int, eos: int | None = None) -> dict[str, Any]:
    """Return a file's metadata of a tokenizer: the inverse of `tokenizer_json`.

    Args:
      tokenizer: the tokenizer, as `load` gives it.
      size: the number of the model's tokens; more than the tokenizer has are filled up.
      eos: the number of the token that ends a text; None for the one that the tokenizer puts there,
        or the first of `ENDS` that it has.

    Returns:
      The metadata.

    Raises:
      DataError: if llama.cpp has no name for how the tokenizer cuts texts, it is another kind than
        byte-level pairs, has more tokens than the model, or none that ends a text.
    """
    content = json.loads(json_of(tokenizer))
    if (kind := content["model"].get("type")) != "BPE":
        raise DataError(f"the tokenizer is a {kind}, and BPE is written")
    tokens, kinds = _tokens(content, size)
    ends = [*tokenizer.end, *(tokens.index(each) for each in ENDS if each in kinds)]
    ends = ends if eos is None else [eos]
    if not ends:
        raise DataError(f"the tokenizer has none of {', '.join(ENDS)}; give eos=, a token's number")
    own: dict[str, Any] = {
        "model": "gpt2",
        "pre": _cut_of(content),
        "tokens": tokens,
        "token_type": [kinds.get(token, UNUSED) for token in tokens],
        # Newer files of the library have pairs.
        "merges": [x if isinstance(x, str) else " ".join(x) for x in content["model"]["merges"]],
        "eos_token_id": ends[0],
        "add_bos_token": bool(tokenizer.start),
        "add_eos_token": bool(tokenizer.end),
    }
    if tokenizer.start:
        own["bos_token_id"] = tokenizer.start[0]
    return {PREFIX + name: x for name, x in own.items()}


def _tokens(content: JsonObject, size: int) -> tuple[list[str], dict[str, int]]:
    """Return the name of each number, and the kind of each name."""
    numbers = dict(content["model"]["vocab"])
    kinds = dict.fromkeys(numbers, PLAIN)
    for token in content.get("added_tokens", ()):
        numbers[token["content"]] = token["id"]
        kinds[token["content"]] = CONTROL if token["special"] else USER
    names = {number: name for name, number in numbers.items()}
    if (last := max(names)) >= size:
        raise DataError(f"the tokenizer has the token {last}, and the model {size} tokens")
    return [names.get(i, f"[PAD{i}]") for i in range(size)], kinds


def _cut_of(content: JsonObject) -> str:
    """Return llama.cpp's name of how a tokenizer cuts texts."""
    found = content.get("pre_tokenizer") or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    for name, cut in CUTS.items():
        if [*map(_plain, steps)] != [*map(_plain, cut)]:
            continue
        if content.get("normalizer") == NORMALIZERS.get(name):
            return name
    raise DataError(f"the tokenizer cuts texts as none of {', '.join(CUTS)} does")


def _plain(step: JsonObject) -> JsonObject:
    """Return a step with what is left out, and without what changes no token."""
    whole = {"use_regex": True, **step} if step.get("type") == "ByteLevel" else step
    return {name: x for name, x in whole.items() if name != "trim_offsets"}
