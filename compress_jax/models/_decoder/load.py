"""Read a published decoder: its shape, its weights, its tokenizer."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compress_jax.core.errors import DataError, ShapeError, WeightsError
from compress_jax.core.paths import flatten, matches
from compress_jax.core.types import DType, JsonObject, Params
from compress_jax.data._tokenizer import Tokenizer, load_tokenizer, tokenizer_of_json
from compress_jax.models._decoder import gguf_names, hugging_face
from compress_jax.models._decoder.config import DecoderConfig
from compress_jax.models._decoder.decoder import Decoder
from compress_jax.models._decoder.gguf import GGUF
from compress_jax.models._decoder.gguf_vocabulary import tokenizer_json
from compress_jax.models._decoder.tensors import Stored, Tensors, filled

CONFIG = "config.json"
GENERATION = "generation_config.json"  # says more of what ends a text


class Loaded(NamedTuple):
    """A published decoder.

    Attributes:
      model: its function: ``model.apply({"params": params}, tokens)``.
      params: its weights.
      tokenizer: its tokenizer; None if there is none that can be read.
    """

    model: Decoder
    params: Params
    tokenizer: Tokenizer | None


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DType = jnp.float32,
    compute: DType = jnp.float32,
    scan: bool = False,
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, PartitionSpec]] = (),
    log_fn: Callable[[str], None] = print,
) -> Loaded:
    """Read a decoder of Hugging Face or llama.cpp: Llama, Mistral, Qwen, Gemma or GPT-2.

    Leaves are read one after the other, each straight to its devices: beside the params no more
    than the part of a leaf is held. No code from a file is executed.

    Args:
      path: a folder with ``config.json`` and safetensors, one such file in its folder, or a GGUF
        file (which needs ``pip install 'compress_jax[llm]'``).
      dtype: of the params; what a GGUF file has quantized is dequantized.
      compute: the dtype of the layers' computation.
      scan: whether layers are stacked, which compiles fast and divides well; see `Decoder`.
      mesh: of devices that the params are divided over; None for the default device.
      rules: how they are divided: pairs of a glob over paths and a ``PartitionSpec``; the first
        that matches counts, and what none matches is whole on each device.
      log_fn: called with one line for what is not read, such as a tokenizer.

    Returns:
      ``(model, params, tokenizer)``.

    Raises:
      WeightsError: if the files are damaged, of an unknown family, or do not fit their config.

    Example:
      >>> import compress_jax as cj
      >>> cj.models.load("no-such-folder")
      Traceback (most recent call last):
      compress_jax.core.errors.WeightsError: there is no no-such-folder; give a folder ...
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise WeightsError(
            f"there is no {path}; give a folder with config.json and safetensors, or a GGUF file"
        )
    is_gguf = given.is_file() and given.suffix == ".gguf"
    source = _gguf if is_gguf else _hugging_face
    with source(given if given.is_dir() or is_gguf else given.parent) as found:
        model = Decoder(found.config, scan=scan, dtype=compute)
        shapes = shapes_of(model)
        places = {} if mesh is None else _places(shapes, mesh, rules)
        params = filled(shapes, found.stored, found.tensors, dtype, places, found.ignored)
        tokenizer = None
        try:
            tokenizer = found.tokenizer()
        except DataError as error:
            log_fn(f"{path} gives no tokenizer: {error}")
    return Loaded(model, params, tokenizer)


class _Found(NamedTuple):
    """What files hold: the shape, the arrays, how leaves lie in them, the tokenizer."""

    config: DecoderConfig
    tensors: Tensors
    stored: Callable[[str], Stored]
    ignored: Callable[[str], bool]
    tokenizer: Callable[[], Tokenizer]


@contextlib.contextmanager
def _hugging_face(folder: Path) -> Iterator[_Found]:
    family, config = hugging_face.decoder_config(_read_config(folder / CONFIG))
    if (folder / GENERATION).is_file():
        stop = hugging_face.stop_tokens(_read_config(folder / GENERATION), config.vocabulary)
        config = dataclasses.replace(config, stop=stop or config.stop)
    with hugging_face.opened(folder) as tensors:
        yield _Found(
            config,
            tensors,
            hugging_face.stored_as(family, tensors.shapes()),
            lambda name: hugging_face.is_unused(name, config.tied),
            lambda: load_tokenizer(folder),
        )


@contextlib.contextmanager
def _gguf(path: Path) -> Iterator[_Found]:
    file = GGUF(path)
    family, config = gguf_names.gguf_config(file)
    yield _Found(
        config,
        file,
        gguf_names.stored_in_gguf(family, config),
        lambda name: name == gguf_names.FACTORS,  # it is in the config
        lambda: tokenizer_of_json(tokenizer_json(file.metadata), path),
    )


def _read_config(file: Path) -> JsonObject:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"cannot read {file}, which says what the weights are: {error}"
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"{file} is no object of JSON")
    return config


def shapes_of(model: Decoder) -> Params:
    """Return the params of a decoder as shapes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def _places(
    shapes: Params, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]]
) -> dict[str, NamedSharding]:
    """Return where each leaf goes."""
    places = {}
    for path, x in flatten(shapes)[0].items():
        spec = next((spec for glob, spec in rules if matches(glob, path)), PartitionSpec())
        places[path] = NamedSharding(mesh, spec)
        try:
            places[path].shard_shape(x.shape)
        except ValueError as error:
            raise ShapeError(f"{path} {x.shape} cannot be divided as {spec}: {error}") from error
    return places
