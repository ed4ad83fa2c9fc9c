"""The decoder that takes the params of a shrunk one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.arguments import whole
from compress_jax.core.errors import ShapeError, WeightsError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Params, Shape
from compress_jax.models._decoder.config import DecoderConfig
from compress_jax.models._decoder.decoder import Decoder

LAYER = re.compile(r"layer_(\d+)/(.*)")


def fitted(
    model: Decoder,
    params: Params,
    *,
    layers: Sequence[int] | None = None,
    head_width: int | None = None,
) -> tuple[Decoder, Params]:
    """Return the decoder whose config has the sizes of smaller params, and its params.

    What `prune.shrink` and `prune.drop_blocks` return is a function; the decoder that computes the
    same has a cache too (`generate`), and can be shrunk, scanned and stored as any other. Queries
    are scaled as before.

    Args:
      model: the decoder before it was shrunk.
      params: of the shrunk function, with or without ``{"params": ...}`` around them.
      layers: the numbers of the layers that stayed. They are read from the names of layers; where
        layers are stacked they matter only if some see a window alone.
      head_width: features of a head, where shapes leave it open: heads and features multiply.

    Returns:
      ``(decoder, params)``, with layers numbered from 0 and the same arrays.

    Raises:
      ShapeError: if no config has such sizes: layers, or the heads of queries and values, differ.
      WeightsError: if it cannot be known which layers see a window, or how wide a head is.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> config = cj.models.DecoderConfig(50, 8, 4, heads=4, kv_heads=2, head_width=2, hidden=16)
      >>> model = cj.models.Decoder(config)
      >>> tokens = jnp.array([[5, 17, 9]])
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> fn = lambda params, tokens: model.apply({"params": params}, tokens)
      >>> small = cj.prune.shrink(fn, params, tokens, ratio={"**/mlp/**": 0.25})
      >>> smaller, params = cj.models.fitted(model, small.params)
      >>> smaller.config.hidden
      12
    """
    old = model.config
    own = params["params"] if set(params) == {"params"} else params
    leaves = flatten(own)[0]
    if head_width is not None:
        whole("head_width", head_width, 1)
    first = "layers" if model.scan else "layer_"
    if "tokens/embedding" not in leaves or not any(path.startswith(first) for path in leaves):
        raise WeightsError(
            f"these are no params of this decoder: it has tokens/embedding and {first}..."
        )
    stacked, numbers = _stacked(leaves, model, layers)
    if layers is not None and not stacked and list(layers) != numbers:
        raise ShapeError(f"the params hold the layers {numbers}, not {list(layers)}")
    shapes = _alike(leaves, stacked, numbers)
    config = _config(old, np.shape(leaves["tokens/embedding"])[1], shapes, head_width)
    sliding = tuple(old.sliding[i] for i in numbers) if old.sliding else ()
    config = replace(config, depth=len(numbers), sliding=sliding)
    renamed = own
    if not stacked:
        places = {f"layer_{i}": f"layer_{new}" for new, i in enumerate(_named(leaves))}
        renamed = {places.get(key, key): each for key, each in own.items()}
    smaller = model.clone(config=config)
    _check(smaller, renamed)
    return smaller, {"params": renamed} if own is not params else renamed


def _named(leaves: Mapping[str, jax.Array]) -> list[int]:
    """Return the numbers in the names of layers, ascending."""
    return sorted({int(found[1]) for path in leaves if (found := LAYER.match(path))})


def _stacked(
    leaves: Mapping[str, jax.Array], model: Decoder, layers: Sequence[int] | None
) -> tuple[bool, list[int]]:
    """Return whether layers are stacked, and the numbers of those that stayed."""
    if not model.scan:
        return False, _named(leaves)
    depth = len(leaves["layers/attention_norm/scale"])
    if layers is not None:
        known = set(range(model.config.depth))
        if len(layers) != depth or not known.issuperset(layers):
            raise ShapeError(
                f"{depth} layers stayed of {model.config.depth}, and layers={tuple(layers)} are "
                "not their numbers"
            )
        return True, list(layers)
    if depth != model.config.depth and len(set(model.config.sliding)) > 1:
        raise WeightsError(
            f"{depth} of {model.config.depth} layers stayed, of which some see a window alone: say "
            "which with layers=small.kept"
        )
    return True, list(range(depth))


def _alike(
    leaves: Mapping[str, jax.Array], stacked: bool, numbers: Sequence[int]
) -> dict[str, Shape]:
    """Return the shapes of a layer's leaves; raise ShapeError if layers differ."""
    if stacked:
        start = "layers/"
        inside = {path: np.shape(x) for path, x in leaves.items() if path.startswith(start)}
        return {path.removeprefix(start): shape[1:] for path, shape in inside.items()}
    every: dict[str, dict[Shape, int]] = {}
    for path, x in leaves.items():
        if found := LAYER.match(path):
            every.setdefault(found[2], {}).setdefault(np.shape(x), int(found[1]))
    for leaf, shapes in every.items():
        if len(shapes) > 1:
            said = ", ".join(f"{shape} in layer {i}" for shape, i in shapes.items())
            raise ShapeError(
                f"the layers differ, and a decoder's do not: {leaf} is {said}; shrink with scope="
                "'local' and one ratio, or run the shrunk function itself"
            )
    return {leaf: next(iter(shapes)) for leaf, shapes in every.items()}


def _config(
    old: DecoderConfig, width: int, shapes: Mapping[str, Shape], head_width: int | None
) -> DecoderConfig:
    """Return the config of a layer's shapes."""
    queries = shapes["attention/query/kernel"][1]
    keys = shapes["attention/key/kernel"][1]
    values = shapes["attention/value/kernel"][1]
    if keys != values or queries != shapes["attention/out/kernel"][0]:
        raise ShapeError(
            f"a decoder's heads are as wide for values ({values} in all) as for keys ({keys}): "
            "shrink queries and keys as much as values, or neither"
        )
    if head_width is None:
        head_width = _head_width(old, shapes, queries, keys)
    if queries % head_width or keys % head_width or (queries // head_width) % (keys // head_width):
        raise ShapeError(
            f"{queries} features of queries and {keys} of keys are no whole heads of {head_width}, "
            "or heads of keys do not divide those of queries"
        )
    # Scores are scaled as in the function that was shrunk.
    scale = old.query_scale
    if head_width != old.head_width and scale is None:
        scale = old.head_width**-0.5
    return replace(
        old,
        width=width,
        heads=queries // head_width,
        kv_heads=keys // head_width,
        head_width=head_width,
        hidden=shapes["mlp/up/kernel"][1],
        query_scale=scale,
    )


def _head_width(old: DecoderConfig, shapes: Mapping[str, Shape], queries: int, keys: int) -> int:
    """Return how wide a head is; raise WeightsError if several widths are possible."""
    if old.qk_norm:
        return shapes["attention/query_norm/scale"][0]
    # Rotary positions hold each feature of a head in its place.
    if old.positions is None or (queries, keys) == _sizes(old):
        return old.head_width
    widths = [n for n in range(1, old.head_width + 1) if not queries % n and not keys % n]
    # No more heads than there were, and no more queries that share a head of keys.
    possible = [n for n in widths if keys // n <= old.kv_heads and queries // keys <= old.groups]
    if len(possible) != 1:
        raise WeightsError(
            f"heads may be {', '.join(map(str, possible)) or 'no'} features wide: say which with "
            "head_width"
        )
    return possible[0]


def _sizes(config: DecoderConfig) -> tuple[int, int]:
    return config.heads * config.head_width, config.kv_heads * config.head_width


def _check(model: Decoder, params: Params) -> None:
    """Raise ShapeError if a decoder takes params of other shapes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted = flatten(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])[0]
    found = {path: np.shape(x) for path, x in flatten(params)[0].items()}
    for path in sorted({*wanted, *found}):
        if path not in wanted or wanted[path].shape != found.get(path):
            shape = wanted[path].shape if path in wanted else None
            raise ShapeError(f"{path} has shape {found.get(path)}, and the decoder has {shape}")
