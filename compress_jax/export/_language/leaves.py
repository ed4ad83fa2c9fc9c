"""The leaves of a decoder that is written as published ones are."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.packed import to_dense, unpack
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaf, Params
from compress_jax.models._decoder.config import DecoderConfig
from compress_jax.models._decoder.decoder import Decoder
from compress_jax.models._decoder.load import shapes_of
from compress_jax.models._decoder.tensors import Piece, laid_out

Leaves = dict[str, Leaf]


def leaves_of(model: Decoder, params: Params) -> Leaves:
    """Return the leaves of a decoder by path, packed or not.

    Args:
      model: the decoder.
      params: its params, packed or not; variables are taken too.

    Returns:
      The leaves.

    Raises:
      ExportError: if the model is no decoder, or the params are not its own.
    """
    if not isinstance(model, Decoder):
        raise ExportError(
            f"a {type(model).__name__} is no models.Decoder, which published files hold"
        )
    own = params["params"] if "params" in params else params
    leaves = flatten(own)[0]
    given = {path: x.shape for path, x in flatten(jax.eval_shape(unpack, own))[0].items()}
    wanted = {path: x.shape for path, x in flatten(shapes_of(model))[0].items()}
    for path in {**wanted, **given}:
        if given.get(path) != wanted.get(path):
            raise ExportError(
                f"these params are not of this model: {path} is {given.get(path, 'not there')}, "
                f"and {wanted.get(path, 'not there')} in the model"
            )
    return leaves


def dense(leaf: Leaf) -> np.ndarray:
    """Return a leaf as a float32 array."""
    return np.asarray(to_dense(leaf)).astype(np.float32)


def of_file(parts: Sequence[Piece], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return an array of the file.

    Args:
      parts: what it is made of.
      arrays: the whole leaf of each part, or something else in its shape.
    """
    own = [
        x if part.layer is None else x[part.layer] for part, x in zip(parts, arrays, strict=True)
    ]
    return laid_out([(part.stored, x) for part, x in zip(parts, own, strict=True)])


def require_same(config: DecoderConfig, read: DecoderConfig, family: str) -> None:
    """Raise an ExportError unless a file, as it is read, says what the model is.

    Args:
      config: the model's shape.
      read: what the reader of such files makes of the file.
      family: whose files these are.
    """
    ours, theirs = (_comparable(each) for each in (config, read))
    differ = [name for name in ours if not _close(ours[name], theirs[name])]
    if differ:
        wrong = [f"{name}={ours[name]} and not {theirs[name]}" for name in differ]
        raise ExportError(
            f"no family of published decoders is this model: it is nearest to {family}, but has "
            + "; ".join(wrong)
        )


def _comparable(config: DecoderConfig) -> dict[str, Any]:
    """Return a shape with its defaults, and without what has no effect."""
    slides = any(config.sliding)
    scale = config.query_scale
    rotary = config.positions is None
    return dataclasses.asdict(config) | {
        "stop": (),
        "query_scale": config.head_width**-0.5 if scale is None else scale,
        "sliding": config.sliding if slides else (),
        "window": config.window if slides else None,
        "local_rope": (config.local_rope or config.rope).theta if slides else None,
        "rope": config.rope.theta if rotary else None,
        "factors": config.rope.factors,
    }


def _close(ours: Any, theirs: Any) -> bool:
    """Return whether two values of shapes are one, as float32 numbers and decimal ones are."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_close, ours, theirs))
    return bool(ours == theirs)


def square(x: np.ndarray) -> float:
    """Return the sum of the squares of an array."""
    return float(np.square(x, dtype=np.float64).sum())
