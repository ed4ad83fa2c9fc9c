"""Measure a language model and a compressed one beside it, show what both write, export them."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax

from compress_jax.cli.console import shown, stdout
from compress_jax.core.errors import ArtifactError, ConfigError, DataError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Params

if TYPE_CHECKING:
    from compress_jax.search import Comparison

DEFAULT_CONTEXT = 512


class Asked(NamedTuple):
    """What is to be measured.

    Attributes:
      text: files of text.
      compressed: an artifact of the model's params; None for the model alone.
      prompt: beginnings that are continued.
      chat: what a user says, which is answered by the model's chat template.
      tokens: how many tokens are written after each.
      context: tokens that the model sees at once.
      stride: by how many tokens windows move on; None for the context.
    """

    text: tuple[Path, ...] = ()
    compressed: Path | None = None
    prompt: tuple[str, ...] = ()
    chat: tuple[str, ...] = ()
    tokens: int = 64
    context: int = DEFAULT_CONTEXT
    stride: int | None = None


def is_language_model(path: Path) -> bool:
    """Return whether a path is a published language model, and no run's folder."""
    return path.suffix in (".gguf", ".safetensors") or (path / "config.json").is_file()


def evaluate_language(path: Path, asked: Asked) -> int:
    """Print a table of measurements, and what the models write.

    Args:
      path: of the model: a folder of Hugging Face's, or a GGUF file.
      asked: what is to be measured.

    Returns:
      The exit code, 0.

    Raises:
      ConfigError: if nothing is asked.
      DataError: if the model has no tokenizer, or a file cannot be read.
      WeightsError, ArtifactError: if a file is damaged.
    """
    from compress_jax import models
    from compress_jax.search import compare_language

    if not (asked.text or asked.prompt or asked.chat):
        raise ConfigError("say what to measure: --text FILE, or --prompt 'Once upon a time'")
    if asked.prompt and asked.chat:
        raise ConfigError("give --prompt, which is continued, or --chat, which is answered")
    template = models.chat_template(path) if asked.chat else None
    if asked.chat and template is None:
        raise DataError(f"{path} has no chat template: continue a beginning with --prompt")
    console = stdout()
    model, params, tokenizer = models.load(path, log_fn=lambda line: console.print(shown(line)))
    if tokenizer is None:
        raise DataError(f"{path} has no tokenizer that can be read, so it reads and writes no text")
    variants = {"original": params}
    if asked.compressed is not None:
        variants["compressed"] = _artifact(asked.compressed, params)
    contents = [_read(file) for file in asked.text]
    count = sum(len(each.encode()) for each in contents)
    texts = [[*tokenizer.start, *ids] for ids in tokenizer.encode(contents)]
    found = compare_language(
        model,
        variants,
        tokenizer,
        texts=texts,
        prompts=asked.prompt or asked.chat,
        template=template,
        length=asked.tokens,
        context=asked.context,
        stride=asked.stride,
        nbytes=count if texts else None,
    )
    sizes = {"original": _nbytes(path)}
    if asked.compressed is not None:
        sizes["compressed"] = _nbytes(asked.compressed)
    predicted = sum(len(each) - 1 for each in texts)
    title = f"{predicted:,} tokens, context {asked.context}" if texts else ""
    print_comparison(found, sizes, title)
    return 0


def print_comparison(found: "Comparison", nbytes: dict[str, int], title: str) -> None:
    """Print what was measured of networks as a table, and below it what they answer.

    Args:
      found: of the networks.
      nbytes: of each on disk.
      title: of the table.
    """
    from compress_jax.report import Table, rich_table

    console = stdout()
    head = ("", *found.measures, "bytes on disk")
    rows = [(name, *own, f"{nbytes[name]:,}") for name, own in found.values.items()]
    console.print(rich_table(Table(title, head, tuple(rows))))
    for i, prompt in enumerate(found.prompts):
        console.print(f"\n[bold]{shown(prompt)}[/]")
        for name, own in found.answers.items():
            console.print(f"{shown(name)}: {shown(own[i].strip())}")


class Export(NamedTuple):
    """Where a language model is to be written, and how.

    Attributes:
      to: whose files: ``"gguf"`` or ``"hugging-face"``.
      out: the file, or the folder of Hugging Face.
      compressed: an artifact of the model's params; None for the model as it is.
      otherwise: GGUF's type of packed leaves that are on none of its grids; None to refuse them.
    """

    to: tuple[str, ...]
    out: Path | None
    compressed: Path | None
    otherwise: Literal["F32", "F16"] | None


def export_language(path: Path, asked: Export) -> int:
    """Write a language model, compressed or not, as llama.cpp or vLLM read it.

    Args:
      path: of the model: a folder of Hugging Face's, or a GGUF file.
      asked: where, and how.

    Returns:
      The exit code, 0.

    Raises:
      ConfigError: if there is not one target and an ``out``.
      ExportError, WeightsError, ArtifactError, DataError: if the model cannot be read or written.
    """
    from compress_jax import export, models

    if asked.to not in (("gguf",), ("hugging-face",)) or asked.out is None:
        raise ConfigError(
            f"{path} is a language model: say --to gguf --out FILE, or --to hugging-face "
            "--out FOLDER"
        )
    if asked.otherwise is not None and asked.to != ("gguf",):
        raise ConfigError("--otherwise is for --to gguf; other leaves are float32 in safetensors")
    if asked.out.exists() and asked.out.samefile(path):
        raise ConfigError(f"--out {asked.out} is the model itself: give another place")
    console = stdout()
    model, params, tokenizer = models.load(path, log_fn=lambda line: console.print(shown(line)))
    template = models.chat_template(path)
    packed = params if asked.compressed is None else _artifact(asked.compressed, params)
    if asked.to == ("gguf",):
        exported = export.to_gguf(
            model,
            packed,
            asked.out,
            tokenizer=tokenizer,
            otherwise=asked.otherwise,
            chat_template=template,
        )
    else:
        exported = export.to_hugging_face(
            model, packed, asked.out, tokenizer=tokenizer, chat_template=template
        )
    for form, count in Counter(row.form for row in exported.rows).items():
        console.print(f"{count} arrays as {form}")
    for row in exported.rows:
        if row.reason:
            console.print(shown(f"{row.name} as {row.form}: {row.reason}"))
    for note in exported.notes:
        console.print(shown(note))
    console.print(shown(f"{exported.path}: {exported.nbytes:,} bytes"))
    return 0


def _artifact(file: Path, original: Params) -> Params:
    """Return the packed params of a file, which must be of the same model."""
    from compress_jax.core.packed import unpack
    from compress_jax.export import load

    tree = load(file)[0]
    packed = tree["params"] if isinstance(tree, dict) and "params" in tree else tree
    ours = {path: x.shape for path, x in flatten(jax.eval_shape(unpack, packed))[0].items()}
    theirs = {path: x.shape for path, x in flatten(original)[0].items()}
    for path in {**theirs, **ours}:
        if ours.get(path) != theirs.get(path):
            raise ArtifactError(
                f"{file} is not of this model: {path} is {ours.get(path, 'not there')}, and "
                f"{theirs.get(path, 'not there')} in the model"
            )
    return packed


def _nbytes(path: Path) -> int:
    from compress_jax.models._decoder.hugging_face import weight_files

    files = weight_files(path) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error
