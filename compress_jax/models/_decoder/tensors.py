"""Where the numbers of a decoder's leaves come from: names in a file, and how they lie there."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Sharding

from compress_jax.core.paths import flatten
from compress_jax.core.types import DType, Params
from compress_jax.models._published import require_fit

Index = tuple[slice, ...]


class Tensors(Protocol):
    """Arrays of a file by name, of which parts are read."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """Return a part of one."""
        ...


class Stored(NamedTuple):
    """How a leaf, or one layer of a stacked leaf, lies in a file.

    Attributes:
      name: of the array.
      transposed: whether the file has ``[out, in]`` for our ``[in, out]``.
      part: ``(which, of how many)`` of the outputs of an array that holds several leaves.
      plus: what is added to it.
      heads: of rows whose pairs of features lie side by side; 0 where halves do.
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None
    plus: float = 0.0
    heads: int = 0


def filled(
    shapes: Params,
    stored: Callable[[str], Stored],
    tensors: Tensors,
    dtype: DType,
    places: Mapping[str, Sharding],
    ignored: Callable[[str], bool],
) -> Params:
    """Read every leaf of a decoder, one after the other, straight to its devices.

    Args:
      shapes: params as shapes; those below ``layers`` are stacked.
      stored: how the leaf of a path lies in the file, with ``layer_0``, ``layer_1`` in the path.
      tensors: of the file.
      dtype: of the leaves.
      places: where leaves go, by path; the default device where none is given.
      ignored: whether an array of the file need not be used.

    Returns:
      The params.

    Raises:
      WeightsError: if arrays are missing, unexpected or of another shape; it lists them all.
    """
    leaves, rebuild = flatten(shapes)
    plans = {path: _of_leaf(path, x.shape, stored) for path, x in leaves.items()}
    _check(leaves, plans, tensors.shapes(), ignored)
    found = {}
    for path, x in leaves.items():
        found[path] = _placed(x.shape, plans[path], tensors, np.dtype(dtype), places.get(path))
    return rebuild(found)


def _of_leaf(
    path: str, shape: tuple[int, ...], stored: Callable[[str], Stored]
) -> list[Stored] | Stored:
    """Return what a leaf is made of: a list of its layers if it is stacked."""
    if not path.startswith("layers/"):
        return stored(path)
    return [stored(path.replace("layers/", f"layer_{i}/", 1)) for i in range(shape[0])]


def _check(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    plans: Mapping[str, list[Stored] | Stored],
    theirs: Mapping[str, tuple[int, ...]],
    ignored: Callable[[str], bool],
) -> None:
    missing, wrong = [], []
    used = set()
    for path, plan in plans.items():
        ours = leaves[path].shape[1:] if isinstance(plan, list) else leaves[path].shape
        for each in plan if isinstance(plan, list) else [plan]:
            used.add(each.name)
            if each.name not in theirs:
                missing.append(f"{path} (their {each.name})")
            elif (shape := _our_shape(each, theirs[each.name])) != ours:
                wrong.append(f"{each.name}: {shape} here is {ours}")
    unused = [name for name in theirs if name not in used and not ignored(name)]
    problems = {
        "the config wants, the file has not": missing,
        "the file has, the config has no use for": unused,
        "of another shape than the config says": wrong,
    }
    require_fit("their config", problems)


def _our_shape(stored: Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what we make of an array."""
    ours = tuple(reversed(shape)) if stored.transposed else shape
    if stored.part is None:
        return ours
    return (*ours[:-1], ours[-1] // stored.part[1])


def _placed(
    shape: tuple[int, ...],
    plan: list[Stored] | Stored,
    tensors: Tensors,
    dtype: np.dtype,
    sharding: Sharding | None,
) -> jax.Array:
    """Return a leaf on its devices: each one's part is read by itself, layer by layer."""
    own = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def part(index: Index | None) -> np.ndarray:
        given = index or (slice(None),) * len(shape)
        index = tuple(slice(*each.indices(n)) for each, n in zip(given, shape, strict=True))
        if not isinstance(plan, list):
            return _read(plan, index, shape, tensors).astype(dtype)
        layers = plan[index[0]]
        sizes = [each.stop - each.start for each in index]
        out = np.empty(sizes, dtype)
        for row, each in zip(out, layers, strict=True):
            row[...] = _read(each, index[1:], shape[1:], tensors)
        return out

    return jax.make_array_from_callback(shape, own, part)


def _read(stored: Stored, index: Index, shape: tuple[int, ...], tensors: Tensors) -> np.ndarray:
    """Return a part of a leaf, by its own index."""
    if stored.heads:
        return _unpaired(stored, tensors, shape)[index]
    if stored.part is not None:  # counted from where the leaf's outputs begin
        which, _ = stored.part
        begin = which * shape[-1]
        last = index[-1]
        index = (*index[:-1], slice(begin + last.start, begin + last.stop))
    theirs = tuple(reversed(index)) if stored.transposed else index
    x = tensors.read(stored.name, theirs)
    x = x.T if stored.transposed else x
    # As a float32: 1 + w of published norms is computed so.
    return x.astype(np.float32) + np.float32(stored.plus) if stored.plus else x


class Piece(NamedTuple):
    """A leaf, or one layer of a stacked leaf, that an array of a file is made of.

    Attributes:
      path: of the leaf.
      layer: which of the stacked layers; None for the leaf.
      stored: how it lies in the array.
    """

    path: str
    layer: int | None
    stored: Stored


def pieces(
    shapes: Mapping[str, tuple[int, ...]], stored: Callable[[str], Stored]
) -> dict[str, list[Piece]]:
    """Return what each array of a file is made of, by its name: the inverse of `filled`.

    Args:
      shapes: of the leaves, by path.
      stored: how the leaf of a path lies in the file.
    """
    found: dict[str, list[Piece]] = {}
    for path, shape in shapes.items():
        plan = _of_leaf(path, shape, stored)
        rows = enumerate(plan) if isinstance(plan, list) else [(None, plan)]
        for layer, each in rows:
            found.setdefault(each.name, []).append(Piece(path, layer, each))
    return {
        name: sorted(each, key=lambda piece: piece.stored.part or (0, 1))
        for name, each in found.items()
    }


def laid_out(parts: Sequence[tuple[Stored, np.ndarray]]) -> np.ndarray:
    """Return an array of a file: what `filled` reads its pieces from.

    Args:
      parts: of each piece how it lies there, and its numbers.

    Example:
      >>> laid_out([(Stored("x", transposed=True), np.arange(6).reshape(2, 3))]).tolist()
      [[0, 3], [1, 4], [2, 5]]
    """
    arrays = [_laid_out(*each) for each in parts]
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays, 0 if parts[0][0].transposed else -1)  # by outputs


def _laid_out(stored: Stored, x: np.ndarray) -> np.ndarray:
    x = x.T if stored.transposed else x
    if stored.heads:  # halves of a head's features become pairs; see `_unpaired`
        halves = x.reshape(stored.heads, 2, -1, *x.shape[1:])
        x = halves.swapaxes(1, 2).reshape(x.shape)
    return x - np.float32(stored.plus) if stored.plus else x


def _unpaired(stored: Stored, tensors: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array ``[in, out]`` or ``[out]`` with the halves of each head's features in turn.

    Files of llama.cpp have the two features that turn together side by side.
    """
    whole = tuple(slice(0, n) for n in (reversed(shape) if stored.transposed else shape))
    x = tensors.read(stored.name, whole)  # [out, ...]
    paired = x.reshape(stored.heads, -1, 2, *x.shape[1:])
    x = paired.swapaxes(1, 2).reshape(x.shape)
    return x.T if stored.transposed else x
