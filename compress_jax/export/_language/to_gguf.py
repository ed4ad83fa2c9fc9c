"""GGUF: a compressed decoder in one file that llama.cpp loads, codes and scales as trained."""

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from compress_jax.core.arguments import one_of, whole
from compress_jax.core.errors import ExportError
from compress_jax.core.files import replacing
from compress_jax.core.packed import Quantized, is_packed
from compress_jax.core.types import Params
from compress_jax.data import ChatTemplate
from compress_jax.data._tokenizer import Tokenizer
from compress_jax.export._exported import Exported, Row
from compress_jax.export._language.blocks import Blocks, Entries, blocks_of, entries_of
from compress_jax.export._language.leaves import (
    Leaves,
    dense,
    leaves_of,
    of_file,
    require_same,
    square,
)
from compress_jax.models._decoder import gguf_names
from compress_jax.models._decoder.config import DecoderConfig, published_family
from compress_jax.models._decoder.decoder import Decoder
from compress_jax.models._decoder.gguf import library
from compress_jax.models._decoder.gguf_vocabulary import PREFIX, vocabulary
from compress_jax.models._decoder.tensors import Index, Piece, pieces

Floats = Literal["F32", "F16"]
NO_VOCABULARY = {PREFIX + "model": "no_vocab"}


def to_gguf(
    model: Decoder,
    params: Params,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    floats: Floats = "F32",
    otherwise: Floats | None = None,
    context: int = 4096,
    eos: int | None = None,
    chat_template: ChatTemplate | None = None,
) -> Exported:
    """Write a decoder as a GGUF file, which llama.cpp and `models.load` read.

    A packed leaf whose values are those of a block format, as `quantize.gguf` makes them, is
    written with its own codes and scales as Q4_0, Q4_1 or Q8_0: the file holds the very numbers
    that the model was evaluated with. llama.cpp itself rounds activations to 8 bits where weights
    are quantized, so its logits differ a little. Norms and biases are float32.

    Args:
      model: the decoder.
      params: its params, packed or not.
      path: the file to write.
      tokenizer: as `models.load` gives it; without one llama.cpp takes tokens alone.
      floats: the type of matrices that are not packed.
      otherwise: the type of packed leaves that are on no grid of GGUF; None to refuse them.
      context: tokens of a context, for llama.cpp; of no meaning where positions are learned.
      chat_template: of the model, see `models.chat_template`.
      eos: the number of the token that ends a text; None for the first of the config's ``stop``, or
        what the tokenizer says or names so.

    Returns:
      The file; one row for each of its arrays. ``difference`` is that of the weights.

    Raises:
      ExportError: if no family of llama.cpp computes the model, the params are not its own, a
        packed leaf is on no grid and ``otherwise`` is None, or a weight is too large for F16.
      DataError: if the tokenizer is of a kind that GGUF has no name for.
      ArtifactError: if the disk is full or not writable.
      WeightsError: if the gguf package is missing: ``pip install 'compress_jax[llm]'``.

    Example:
      >>> import tempfile
      >>> import jax, jax.numpy as jnp
      >>> import compress_jax as cj
      >>> config = cj.models.DecoderConfig(
      ...     50, 32, 1, heads=2, kv_heads=1, head_width=16, hidden=64
      ... )
      >>> model = cj.models.Decoder(config)
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
      >>> c = cj.at("**/kernel", cj.quantize.gguf("Q4_0"))
      >>> file = tempfile.mkdtemp() + "/model.gguf"
      >>> exported = cj.export.to_gguf(model, c.pack(params, c.init(params)), file)
      >>> exported.rows[1]
      Row(name='blk.0.attn_output.weight', form='Q4_0', reason='')
    """
    one_of("floats", floats, ("F32", "F16"))
    if otherwise is not None:
        one_of("otherwise", otherwise, ("F32", "F16"))
    leaves = leaves_of(model, params)
    config = model.config
    family = published_family(config)
    size = config.vocabulary
    eos = next(iter(config.stop), None) if eos is None else whole("eos", eos, 0, size - 1)
    words = NO_VOCABULARY if tokenizer is None else vocabulary(tokenizer, size, eos)
    metadata = gguf_names.gguf_metadata(family, config, whole("context", context, 1)) | words
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template.text
    arrays = [*_arrays(leaves, family, config, floats, otherwise)]
    _require_grid(arrays)
    file = Path(path)
    draft = _Draft(file, metadata, {x.name: x for x in arrays})
    require_same(config, gguf_names.gguf_config(draft)[1], f"{family} of llama.cpp")
    if gguf_names.FACTORS in draft.arrays and family != "llama":
        raise ExportError(
            f"llama.cpp reads factors of rotary positions for llama, not for {family}"
        )
    nbytes = _write(file, family, metadata, arrays)
    missed = sum(x.missed for x in arrays) / max(sum(x.size for x in arrays), 1e-30)
    rows = tuple(Row(x.name, x.kind, x.reason) for x in arrays)
    notes = tuple(_notes(family, config, metadata, eos, tokenizer))
    return Exported(file, "gguf", nbytes, rows, math.sqrt(missed), notes=notes)


class _Array(NamedTuple):
    """An array of the file.

    Attributes:
      name: of llama.cpp.
      kind: of its numbers.
      data: its bytes, or its numbers.
      shape: of its numbers.
      reason: why a packed leaf is of another kind.
      refused: whether that was not asked for.
      missed: the sum of the squares of what rounding took away.
      size: the sum of the squares of the weights.
    """

    name: str
    kind: str
    data: np.ndarray
    shape: tuple[int, ...]
    reason: str = ""
    refused: bool = False
    missed: float = 0.0
    size: float = 0.0


class _Draft(NamedTuple):
    """What is to become a file, for the reader of such files."""

    path: Path
    metadata: Mapping[str, Any]
    arrays: Mapping[str, _Array]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: each.shape for name, each in self.arrays.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        return self.arrays[name].data[index]


def _arrays(
    leaves: Leaves, family: str, config: DecoderConfig, floats: Floats, otherwise: Floats | None
) -> Iterator[_Array]:
    """Yield the arrays of a file."""
    # What an array is made of lies side by side: at most three leaves are unpacked at a time.
    values = functools.lru_cache(3)(lambda path: dense(leaves[path]))
    entries = functools.lru_cache(3)(lambda path: entries_of(leaves[path]))
    for name, x in gguf_names.gguf_factors(config).items():
        yield _Array(name, "F32", x, x.shape)
    shapes = {path: tuple(x.shape) for path, x in leaves.items()}
    for name, parts in pieces(shapes, gguf_names.stored_in_gguf(family, config)).items():
        own = [leaves[part.path] for part in parts]
        x = of_file(parts, [values(part.path) for part in parts])
        packed = any(map(is_packed, own))
        if x.ndim == 1:
            yield _in_floats(name, x, "F32", "llama.cpp takes vectors in float32" if packed else "")
        elif not packed:
            yield _in_floats(name, x, floats)
        else:
            found: Blocks | str = "it is no array of integer codes"
            if all(isinstance(each, Quantized) for each in own):
                found = _blocks(parts, [entries(part.path) for part in parts], x)
            yield _packed(name, x, found, otherwise)


def _blocks(parts: Sequence[Piece], entries: Sequence[Entries], x: np.ndarray) -> Blocks | str:
    """Return an array as blocks that hold its very values, or why none do."""
    found = blocks_of(Entries(*(of_file(parts, each) for each in zip(*entries, strict=True))))
    if isinstance(found, str):
        return found
    package = library()
    values = package.quants.dequantize(found.data, package.GGMLQuantizationType[found.kind])
    x = np.ascontiguousarray(x)
    if not np.array_equal(values.view(np.uint32), x.view(np.uint32)):
        return "its values were rounded after they were scaled, to another dtype than float32"
    return found


def _packed(name: str, x: np.ndarray, found: Blocks | str, otherwise: Floats | None) -> _Array:
    if isinstance(found, str):
        made = _in_floats(name, x, otherwise or "F32", found)
        return made._replace(refused=otherwise is None)
    return _Array(name, found.kind, found.data, x.shape, size=square(x))


def _in_floats(name: str, x: np.ndarray, kind: Floats, reason: str = "") -> _Array:
    with np.errstate(over="ignore"):  # it is refused below, by name
        data = x.astype(np.float16 if kind == "F16" else np.float32)
    if not np.isfinite(data).all():
        raise ExportError(
            f"{name} has numbers that are not finite in {kind}; the largest is {np.abs(x).max()}"
        )
    missed = square(data.astype(np.float32) - x)
    return _Array(name, kind, data, x.shape, reason, missed=missed, size=square(x))


def _require_grid(arrays: Sequence[_Array]) -> None:
    refused = [f"{x.name}: {x.reason}" for x in arrays if x.refused]
    if refused:
        raise ExportError(
            f"{len(refused)} packed arrays are on no grid of GGUF; quantize with quantize.gguf "
            "(a table of tokens with axis=0, or bound), or pass otherwise='F16' or 'F32' to write "
            "them as floats:\n  " + "\n  ".join(refused)
        )


def _write(file: Path, family: str, metadata: Mapping[str, Any], arrays: Sequence[_Array]) -> int:
    """Write a file and return its size."""
    package = library()
    with replacing(file, sum(x.data.nbytes for x in arrays)) as temporary:
        with contextlib.closing(package.GGUFWriter(temporary, family)) as writer:
            writer.add_name(file.stem)
            writer.add_quantization_version(package.GGML_QUANT_VERSION)
            writer.add_file_type(_file_type(arrays))
            for name, value in metadata.items():
                if name != gguf_names.ARCHITECTURE:  # the writer's own
                    _add(writer, name, value)
            for x in arrays:
                writer.add_tensor(x.name, x.data, raw_dtype=package.GGMLQuantizationType[x.kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        return temporary.stat().st_size


def _add(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _file_type(arrays: Sequence[_Array]) -> int:
    """Return llama.cpp's number of what most bytes are."""
    nbytes: dict[str, int] = {}
    for x in arrays:
        nbytes[x.kind] = nbytes.get(x.kind, 0) + x.data.nbytes
    most = max(nbytes, key=nbytes.__getitem__)
    types = library().LlamaFileType
    return types.ALL_F32 if most == "F32" else types[f"MOSTLY_{most}"]


def _notes(
    family: str,
    config: DecoderConfig,
    metadata: Mapping[str, Any],
    eos: int | None,
    tokenizer: Tokenizer | None,
) -> Iterator[str]:
    """Yield what was guessed, and what llama.cpp does otherwise."""
    if tokenizer is None:
        yield "without a tokenizer: llama.cpp takes and gives numbers of tokens"
    elif eos is None and not tokenizer.end:
        number = metadata[PREFIX + "eos_token_id"]
        text = metadata[PREFIX + "tokens"][number]
        yield f"a text ends with {text} ({number}), going by its name; eos= says otherwise"
    if any(config.sliding) and not family.startswith("gemma3"):
        yield f"llama.cpp lets all layers of {family} see more than {config.window} tokens back"
