"""Folders of Hugging Face: integer weights as compressed-tensors packs them, others as floats."""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from compress_jax.core.arguments import one_of, whole
from compress_jax.core.errors import ExportError
from compress_jax.core.files import write_atomically
from compress_jax.core.packed import Quantized, is_packed
from compress_jax.core.sparse import width
from compress_jax.core.types import JsonObject, Params
from compress_jax.data import ChatTemplate
from compress_jax.data._tokenizer import Tokenizer, json_of
from compress_jax.export._exported import Exported, Row
from compress_jax.export._language.blocks import Entries, entries_of
from compress_jax.export._language.leaves import (
    Leaves,
    dense,
    leaves_of,
    of_file,
    require_same,
    square,
)
from compress_jax.models._decoder import hugging_face
from compress_jax.models._decoder.decoder import Decoder
from compress_jax.models._decoder.hugging_face_config import config_json
from compress_jax.models._decoder.load import CONFIG
from compress_jax.models._decoder.tensors import Piece, pieces

DTYPES = ("float32", "float16", "bfloat16")
WORD = 32  # bits


def to_hugging_face(
    model: Decoder,
    params: Params,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str = "float32",
    context: int = 4096,
    eos: int | None = None,
    chat_template: ChatTemplate | None = None,
) -> Exported:
    """Write a decoder as a folder that transformers and vLLM read, and `models.load` if plain.

    A kernel that is packed by a symmetric `quantize.uniform`, by channel or in groups, is written
    in the layout ``"pack-quantized"`` of compressed-tensors: codes in 32-bit words, and float32
    scales. Its values there are those that the model was evaluated with, bit for bit. All other
    leaves are floats; rows say why a packed one is. Gemma's norms are stored less 1, which rounds
    them by up to 6e-8 unless they were loaded so.

    Args:
      model: the decoder.
      params: its params, packed or not.
      folder: gets ``config.json``, ``model.safetensors`` and ``tokenizer.json``.
      tokenizer: as `models.load` gives it.
      dtype: of what is written as floats: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
      context: tokens of a context, where positions are not learned.
      chat_template: of the model, see `models.chat_template`.
      eos: the number of the token that ends a text; None for those of the config's ``stop``.

    Returns:
      The folder; one row for each leaf, or each layer of a stacked one. ``difference`` is that of
      the weights.

    Raises:
      ExportError: if no family of Hugging Face computes the model, the params are not its own, or
        the folder holds an index of other weights.
      DataError: if the tokenizer has no ``tokenizer.json``.
      ArtifactError: if the disk is full or not writable.

    Example:
      >>> import tempfile
      >>> import jax, jax.numpy as jnp
      >>> import compress_jax as cj
      >>> config = cj.models.DecoderConfig(
      ...     50, 32, 1, heads=2, kv_heads=1, head_width=16, hidden=64
      ... )
      >>> model = cj.models.Decoder(config)
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
      >>> c = cj.at("**/kernel", cj.quantize.uniform(4, granularity=32))
      >>> folder = tempfile.mkdtemp()
      >>> exported = cj.export.to_hugging_face(model, c.pack(params, c.init(params)), folder)
      >>> exported.rows[0]
      Row(name='model.layers.0.self_attn.k_proj', form='int4, groups of 32', reason='')
    """
    one_of("dtype", dtype, DTYPES)
    if eos is not None:
        whole("eos", eos, 0, model.config.vocabulary - 1)
    leaves = leaves_of(model, params)
    config = config_json(model.config, whole("context", context, 1))
    family, read = hugging_face.decoder_config(config)
    require_same(model.config, read, f"{family} of Hugging Face")
    root = Path(folder)
    if (root / hugging_face.INDEX).exists():
        raise ExportError(f"{root} has an index of other weights; give a folder without one")
    arrays = [*_arrays(leaves, family, dtype)]
    config |= {
        "dtype": dtype,
        "torch_dtype": dtype,
        "eos_token_id": (list(model.config.stop) or None) if eos is None else eos,
    }
    config |= _quantization(arrays)
    data = safetensors.numpy.save(
        {f"{x.module}.{end}": y for x in arrays for end, y in x.tensors.items()}, {"format": "pt"}
    )
    words = None if tokenizer is None else json_of(tokenizer)
    write_atomically(root / "model.safetensors", data)
    if words is not None:
        write_atomically(root / "tokenizer.json", words.encode())
        about = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if chat_template is not None:
            about |= {**chat_template.names, "chat_template": chat_template.text}
        write_atomically(root / "tokenizer_config.json", json.dumps(about).encode())
    write_atomically(root / CONFIG, json.dumps(config, indent=1).encode())
    missed = sum(x.missed for x in arrays) / max(sum(x.size for x in arrays), 1e-30)
    rows = tuple(Row(x.module, x.form, x.reason) for x in arrays)
    return Exported(root, "hugging face", len(data), rows, math.sqrt(missed))


class _Scheme(NamedTuple):
    """How compressed-tensors packs a module; ``group_size`` is None for one scale a channel."""

    bits: int
    group_size: int | None

    def __str__(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "by channel"
        return f"int{self.bits}, {groups}"


class _Array(NamedTuple):
    """What is written of a module's weight or bias.

    Attributes:
      module: its name.
      form: of its numbers.
      tensors: by the end of their names.
      scheme: how it is packed; None for floats.
      reason: why a packed leaf is written as floats.
      missed: the sum of the squares of what rounding took away.
      size: the sum of the squares of the weights.
    """

    module: str
    form: str
    tensors: dict[str, np.ndarray]
    scheme: _Scheme | None = None
    reason: str = ""
    missed: float = 0.0
    size: float = 0.0


def _arrays(leaves: Leaves, family: str, dtype: str) -> Iterator[_Array]:
    """Yield what is written."""
    values = functools.lru_cache(3)(lambda path: dense(leaves[path]))
    entries = functools.lru_cache(3)(lambda path: entries_of(leaves[path]))
    prefix = "transformer." if family == "gpt2" else "model."
    stored = hugging_face.stored_as(family, {prefix: None})
    shapes = {path: tuple(x.shape) for path, x in leaves.items()}
    for name, parts in pieces(shapes, stored).items():
        module, _, end = name.rpartition(".")
        x = of_file(parts, [values(part.path) for part in parts])
        own = [leaves[part.path] for part in parts]
        found: tuple[_Scheme, Entries] | str = ""
        if any(map(is_packed, own)):
            found = _scheme(own[0], parts, entries)
        if isinstance(found, str):
            with np.errstate(over="ignore"):  # it is refused below, by name
                data = x.astype(jnp.dtype(dtype))
            if not np.isfinite(data.astype(np.float32)).all():
                raise ExportError(f"{name} has numbers that are not finite in {dtype}")
            missed = square(data.astype(np.float32) - x)
            tensors = {end: np.ascontiguousarray(data)}
            yield _Array(module, dtype, tensors, None, found, missed, square(x))
        else:
            scheme, each = found
            yield _Array(module, str(scheme), _packed(scheme, each), scheme, size=square(x))


def _scheme(
    leaf: object, parts: Sequence[Piece], entries: Callable[[str], Entries]
) -> tuple[_Scheme, Entries] | str:
    """Return how a module is packed and its entries as the file has them, or why it cannot be."""
    if not isinstance(leaf, Quantized):
        return "it is no array of integer codes"
    if not parts[0].stored.transposed:
        return "only linear layers are packed"
    if leaf.dtype != jnp.float32:
        return f"its values are rounded to {leaf.dtype}"
    found = entries(parts[0].path)
    levels, scale, zero = (of_file(parts, [x]) for x in found)
    bits = width(leaf.codes)
    group_size = leaf.layout.group_size
    inputs = levels.shape[-1]
    if inputs % (group_size or inputs):
        return f"groups of {group_size} do not divide its {inputs} inputs"
    grouped = scale.reshape(len(scale), -1, group_size or inputs)  # [out, groups, group size]
    if not (grouped == grouped[..., :1]).all():
        return "its groups do not lie along the inputs"
    if not -(2 ** (bits - 1)) <= levels.min() <= levels.max() < 2 ** (bits - 1):
        return "its grid is not symmetric"
    return _Scheme(bits, group_size), Entries(levels, grouped[..., 0], zero)


def _packed(scheme: _Scheme, entries: Entries) -> dict[str, np.ndarray]:
    """Return the tensors of compressed-tensors: bit i of a row is bit i of its words."""
    out, inputs = entries.levels.shape
    codes = (entries.levels + 2 ** (scheme.bits - 1)).astype(np.uint8)
    bits = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., : scheme.bits]
    missing = -inputs * scheme.bits % WORD
    row = np.pad(bits.reshape(out, -1), ((0, 0), (0, missing)))
    return {
        "weight_packed": np.packbits(row, axis=-1, bitorder="little").view("<i4"),
        "weight_scale": np.ascontiguousarray(entries.scale),
        "weight_shape": np.array([out, inputs], np.int64),
    }


def _quantization(arrays: Sequence[_Array]) -> JsonObject:
    """Return what ``config.json`` says of packed modules: the modules of each scheme, by name."""
    schemes: dict[_Scheme, list[str]] = {}
    for x in arrays:
        if x.scheme is not None:
            schemes.setdefault(x.scheme, []).append(x.module)
    if not schemes:
        return {}
    groups = {}
    for i, (scheme, modules) in enumerate(schemes.items()):
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if scheme.group_size else "channel",
            "group_size": scheme.group_size,
            "dynamic": False,
        }
        groups[f"group_{i}"] = {"targets": modules, "weights": weights}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [],
        }
    }
