"""The one idea of the library: a compression is a differentiable view of named arrays, plus the state that defines it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from compress_jax.core.paths import flatten

Params = Any


class CompressionState(NamedTuple):
    """What defines a view, besides the params themselves.

    Attributes:
      learned: ``{path: float arrays}`` an optimizer trains beside the params: centroids, factors, step sizes.
      fixed: ``{path: arrays}`` that are never differentiated: masks, codes, scales.
    """

    learned: dict[str, Any]
    fixed: dict[str, Any]


class Pointwise(NamedTuple):
    """The view of one array, entry by entry: each entry is seen as a function of itself and of what belongs to it.

    Attributes:
      see: ``(x, *operands) -> x`` for entries of any shape, the operands cut likewise; hashable, and the same object for
        arrays that are seen the same way.
      operands: arrays in the shape of the whole array: the scale of each entry, its mask.
    """

    see: Callable[..., Any]
    operands: tuple[Any, ...]


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


class Compression(NamedTuple):
    """Four pure functions over a tree of arrays; every method in this library is one of these.

    In a training loop: ``state = c.init(params)``; in the loss, ``model.apply(c.view(params, state), x)``; after the
    optimizer, ``state = c.update(params, state, step=step)``; at the end ``packed = c.pack(params, state)``, and
    ``unpack(packed)`` equals ``c.view(params, state)`` bit for bit: what was trained is what is shipped.

    A bare algorithm acts on every floating-point leaf it is given; `at` and `rules` choose leaves by name.

    Attributes:
      init: ``(params) -> state``.
      view: ``(params, state) -> params``; same structure, shapes, dtypes and shardings. What the forward pass sees.
      update: ``(params, state, *, step, grads=None, stats=None, key=None) -> state``. Pure; ``grads`` has the structure of
        ``params``, ``stats`` is ``{path: statistics}``, ``key`` a typed PRNG key. Most algorithms need none of them.
      pack: ``(params, state) -> params`` whose compressed leaves are packed nodes (`Quantized`, `Sparse`, ...). Offline:
        takes concrete arrays.
      skipped: ``(params) -> {path: reason}``, the leaves it leaves alone. What is not compressed is never a secret.
      pointwise: ``(params, state) -> {path: Pointwise}`` of the leaves whose view, the state given, goes entry by entry
        (grids, masks): what the post-training solvers round with. Empty for anything else.
    """

    init: Callable[[Params], CompressionState]
    view: Callable[[Params, CompressionState], Params]
    update: Callable[..., CompressionState]
    pack: Callable[[Params, CompressionState], Params]
    skipped: Callable[[Params], dict[str, str]] = _nothing
    pointwise: Callable[[Params, CompressionState], dict[str, Pointwise]] = _nothing


def identity() -> Compression:
    """Return the compression that changes nothing: the neutral element of `chain` and the baseline of an experiment.

    Returns:
      A Compression with empty state whose view is the params.

    Example:
      >>> none = identity()
      >>> none.view({"kernel": 1.0}, none.init({"kernel": 1.0}))
      {'kernel': 1.0}
    """

    def update(params: Params, state: CompressionState, **_: Any) -> CompressionState:
        return state

    def keep(params: Params, state: CompressionState) -> Params:
        return params

    return Compression(
        init=lambda params: CompressionState({}, {}),
        view=keep,
        update=update,
        pack=keep,
        skipped=lambda params: dict.fromkeys(flatten(params)[0], "no compression is applied"),
    )
