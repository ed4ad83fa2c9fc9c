"""Weights for other frameworks: safetensors of dense arrays, or of integers and scales."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from compress_jax.core.errors import ArtifactError, ExportError
from compress_jax.core.files import write_atomically
from compress_jax.core.packed import Quantized, unpack
from compress_jax.core.paths import flatten
from compress_jax.core.sparse import Sparse
from compress_jax.core.types import PyTree, Variables
from compress_jax.export._artifact.structure import is_key

# PyTorch's names for Flax's leaves; all others (a bias) keep theirs.
TORCH = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
COLLECTIONS = ("params", "batch_stats")


def to_safetensors(
    variables: Variables,
    path: str | os.PathLike[str],
    *,
    weights: Literal["dense", "integers"] = "dense",
    layout: Literal["flax", "torch"] = "flax",
    metadata: Mapping[str, object] | None = None,
) -> int:
    """Write weights as tensors that any safetensors reader can read.

    ``weights="dense"``: every leaf is an array of its own dtype, exactly what the model was
      evaluated with.
    ``weights="integers"``: a uniformly quantized leaf ``name`` is three tensors, ``name.codes``
    (uint8 in the shape of the array), ``name.scale`` (float32) and ``name.zero_point`` (uint8),
    with

        array = (codes - zero_point) * scale,

    in float32; scale and zero point broadcast against the array, or, where ``name`` is in the
    metadata's ``groups``, against the array as ``[groups, group size, channels]``. Other leaves are
    dense; a typed random key is its data (uint32). Smaller files, which only this package reads,
    are those of `save`.

    ``layout="flax"`` keeps paths, keys joined by ``/``, and shapes. ``layout="torch"`` is
    PyTorch's: keys joined by ``.``, without the collections ``params`` and ``batch_stats``;
    ``kernel``, ``embedding`` and a norm's ``scale`` are called ``weight``, and ``mean`` and ``var``
    ``running_mean`` and ``running_var``; kernels have their output axis first,
    ``[out, in, height, width]``.

    The metadata's strings are ``format`` (``"pt"`` or ``"flax"``), ``weights``, ``groups`` (JSON,
    ``{name: group size}``) and what is given as ``metadata`` (JSON where it is no text).

    Args:
      variables: packed or not.
      path: the file to write.
      weights: dense or integers.
      layout: whose names and order of axes.
      metadata: text or what JSON takes, by name.

    Returns:
      Bytes written.

    Raises:
      ExportError: if two leaves would have the same name, or integers are asked for in PyTorch's
        layout with groups.
      ArtifactError: if the metadata cannot be written as JSON, or the disk is full or not writable.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> params = {"params": {"dense": {"kernel": jnp.eye(3, 2), "bias": jnp.zeros(2)}}}
      >>> int4 = cj.quantize.uniform(bits=4)
      >>> packed = int4.pack(params, int4.init(params))
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> _ = cj.export.to_safetensors(packed, file, layout="torch")
      >>> {name: x.shape for name, x in sorted(safetensors.numpy.load_file(file).items())}
      {'dense.bias': (2,), 'dense.weight': (2, 3)}
    """
    if weights not in ("dense", "integers") or layout not in ("flax", "torch"):
        raise ExportError(
            f"weights={weights!r} is no 'dense' or 'integers', or layout={layout!r} no 'flax' or "
            "'torch'"
        )
    # One leaf becomes one tensor, or three if its integers are kept.
    tensors: dict[str, np.ndarray] = {}
    groups: dict[str, int] = {}
    for place, leaf in flatten(variables)[0].items():
        name = _name(place) if layout == "torch" else place
        if weights == "integers" and isinstance(leaf, Quantized) and leaf.layout.group_size:
            groups[name] = leaf.layout.group_size
        for end, x in _parts(leaf, weights):
            # In PyTorch's layout params/x and batch_stats/x have one name.
            if name + end in tensors:
                raise ExportError(
                    f"two leaves would be called {name + end!r}; the second is {place!r}"
                )
            kernel = layout == "torch" and place.rpartition("/")[2] == "kernel" and x.ndim >= 2
            tensors[name + end] = np.ascontiguousarray(_outputs_first(x) if kernel else x)
    # A group is a run of contracted entries in Flax's order, which PyTorch's order separates.
    if groups and layout == "torch":
        raise ExportError(
            "groups follow Flax's order of axes; use layout='flax', or dense weights (for example "
            f"of {next(iter(groups))!r})"
        )
    entries = {
        "format": "pt" if layout == "torch" else "flax",
        "weights": weights,
        "groups": groups,
        **(metadata or {}),
    }
    try:
        strings = {key: _as_text(value) for key, value in entries.items()}
        data = safetensors.numpy.save(tensors, strings)
    except (TypeError, ValueError, KeyError) as error:
        raise ArtifactError(f"a tensor or the metadata cannot be written: {error}") from error
    write_atomically(Path(path), data)
    return len(data)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _parts(leaf: PyTree, weights: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a leaf, each with its suffix to the leaf's name."""
    if weights == "integers" and isinstance(leaf, Quantized):
        # A scalar is repeated: scale and zero point always broadcast alike.
        zero = jnp.broadcast_to(leaf.zero_point, leaf.scale.shape)
        yield ".codes", np.asarray(_whole(leaf, zero))
        yield ".scale", np.asarray(leaf.scale)
        yield ".zero_point", np.asarray(zero)
    else:
        dense = unpack({"": leaf})[""]
        # NumPy has no dtype for typed keys; their data are uint32 words.
        yield "", np.asarray(jax.random.key_data(dense) if is_key(dense) else dense)


def _whole(leaf: Quantized, zero: jax.Array) -> jax.Array:
    """Return the codes of all entries; masked ones have the code of zero."""
    codes = leaf.codes.unpack().astype(jnp.uint8)
    if not isinstance(leaf.codes, Sparse):
        return codes
    # Masked codes are unpacked to 0, and the code of zero is the zero point.
    mask = leaf.codes.mask.unpack().astype(bool)
    arranged = leaf.layout.arrange(codes)  # [..., groups, group size, channels] if it has groups
    return jnp.where(mask, codes, leaf.layout.restore(jnp.broadcast_to(zero, arranged.shape)))


def _name(place: str) -> str:
    keys = place.split("/")
    keys = keys[1:] if keys[0] in COLLECTIONS and len(keys) > 1 else keys
    return ".".join([*keys[:-1], TORCH.get(keys[-1], keys[-1])])


def _outputs_first(x: np.ndarray) -> np.ndarray:
    """Return ``[..., in, out]`` as ``[out, in, ...]``."""
    return np.transpose(x, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)))
