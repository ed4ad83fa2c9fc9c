"""Which criterion is taken: the one whose smaller function is nearest on held-out batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import NonFiniteError, ShapeError
from compress_jax.core.paths import flatten
from compress_jax.core.types import ModelFn, Params, PyTree, Scalar
from compress_jax.prune import importance
from compress_jax.prune._channels.scores import Importance
from compress_jax.trace import Groups, calibrate, reducers, resize, sites

Distance: TypeAlias = Callable[[PyTree, PyTree], jax.Array]
"""``(outputs of the smaller function, outputs of the full one) -> distances``: `distill.kl`."""

Arguments: TypeAlias = tuple[PyTree, ...]


class Judged(NamedTuple):
    """A way to choose what is removed, and how far it leads from the full function.

    Attributes:
      name: of the criterion.
      distance: on held-out batches, the mean.
      taken: whether it is the nearest.
      note: what else is to be said.
    """

    name: str
    distance: float
    taken: bool
    note: str = ""

    def __str__(self) -> str:
        """Return a line of the table."""
        said = ", taken" if self.taken else ""
        note = f" ({self.note})" if self.note else ""
        return f"by {self.name}: distance {self.distance:.4g}{said}{note}"


def criteria(
    fn: ModelFn,
    params: Params,
    batches: Sequence[Arguments],
    loss: Callable[..., Scalar] | None = None,
) -> dict[str, Importance]:
    """Return the criteria that data can tell between, by name.

    Args:
      fn: a pure function of ``(params, *batch)``.
      params: tree of arrays.
      batches: that activations and gradients are taken of.
      loss: ``(params, *batch) -> scalar``; without it no criterion is of gradients.

    Returns:
      Magnitude, activation, activation weighted; taylor if there is a loss.
    """
    # Only kernels are scored: what activations multiply among themselves need not be kept.
    names = [site.name for site in sites(fn, params, *batches[0]) if site.param is not None]
    found = {"magnitude": importance.magnitude()}
    if names:
        moments = calibrate(fn, reducers.moments(), params, batches, where=tuple(names))
        found["activation"] = importance.activation(moments)
        found["activation, weighted"] = importance.activation(moments, weighted=True)
    if loss is not None:
        found["taylor"] = importance.taylor(importance.gradients(loss, params, batches))
    return found


def distances(
    fn: ModelFn,
    params: Params,
    found: Groups,
    choices: Mapping[str, Mapping[str, np.ndarray]],
    batches: Sequence[Arguments],
    distance: Distance | None = None,
    numbers: Mapping[str, bool] | None = None,
) -> dict[str, float]:
    """Return how far each choice of channels leads from the full function, the mean over batches.

    Choices of the same sizes run in one program: any channels may be the first ones, so the
    function that keeps the first ones takes the parameters of all.

    Args:
      fn: a pure function of ``(params, *batch)``.
      params: tree of arrays.
      found: the groups of the function.
      choices: by name of a choice, what `Groups.keep` takes.
      batches: that it is measured on.
      distance: by default `relative_error`.
      numbers: as of `shrink`.

    Returns:
      ``{name of a choice: distance}``.

    Raises:
      NonFiniteError: if no distance is finite.
    """
    measure = _programs(fn, params, found, distance or relative_error, numbers)
    full = jax.jit(fn)
    total = dict.fromkeys(choices, 0.0)
    for batch in batches:
        outputs = full(params, *batch)
        for name, kept in choices.items():
            # One smaller model at a time: a slice is cheap beside a forward pass.
            program = measure({group: len(channels) for group, channels in kept.items()})
            total[name] += float(program(found.keep(params, kept), outputs, *batch))
    return {name: each / len(batches) for name, each in total.items()}


def _programs(
    fn: ModelFn,
    params: Params,
    found: Groups,
    distance: Distance,
    numbers: Mapping[str, bool] | None,
) -> Callable[[dict[str, int]], Callable[..., jax.Array]]:
    """Return what gives the program of certain sizes, made once."""
    known: dict[tuple[tuple[str, int], ...], Callable[..., jax.Array]] = {}

    def program(sizes: dict[str, int]) -> Callable[..., jax.Array]:
        shorter = {name: n for name, n in sizes.items() if n < found[name].size}
        key = tuple(sorted(shorter.items()))
        if key not in known:
            first = {name: np.arange(n) for name, n in shorter.items()}
            smaller = resize(fn, params, found, first, numbers)

            def measured(params: Params, outputs: PyTree, *batch: PyTree) -> jax.Array:
                return jnp.mean(distance(smaller(params, *batch), outputs))

            known[key] = jax.jit(measured)
        return known[key]

    return program


def nearest(found: Mapping[str, float], notes: Mapping[str, str]) -> tuple[Judged, ...]:
    """Return the judgments, with the one of the least distance taken.

    Raises:
      NonFiniteError: if no distance is finite.

    Example:
      >>> [each.name for each in nearest({"a": float("nan"), "b": 2.0}, {}) if each.taken]
      ['b']
    """
    finite = {name: each for name, each in found.items() if np.isfinite(each)}
    if not finite:
        raise NonFiniteError(f"no distance from the full function is finite: {dict(found)}")
    best = min(finite, key=finite.__getitem__)
    return tuple(
        Judged(name, each, name == best, notes.get(name, "")) for name, each in found.items()
    )


def relative_error(smaller: PyTree, full: PyTree) -> jax.Array:
    r"""Return the squared error of outputs relative to their power.

    .. math:: \sum_i (y'_i - y_i)^2 / \sum_i y_i^2

    Outputs that are not floating-point, or of another shape (updated parameters), do not count.

    Raises:
      ShapeError: if no output is left.

    Example:
      >>> float(relative_error({"y": jnp.array([1.0, 2.0])}, {"y": jnp.array([1.0, 3.0])}))
      0.10000000149011612
    """
    ours = flatten(smaller)[0]
    pairs = [(ours[path], y) for path, y in flatten(full)[0].items() if path in ours]
    pairs = [
        (x.astype(jnp.float32), y.astype(jnp.float32))
        for x, y in pairs
        if x.shape == y.shape and jnp.issubdtype(y.dtype, jnp.floating)
    ]
    if not pairs:
        raise ShapeError("no output is floating-point and of the same shape; give a distance")
    error = jnp.stack([jnp.square(x - y).sum() for x, y in pairs]).sum()
    power = jnp.stack([jnp.square(y).sum() for _, y in pairs]).sum()
    return error / jnp.maximum(power, jnp.finfo(jnp.float32).tiny)
