"""The sparsity of each layer (ERK, `shares`) and of each step (`cubic`)."""

import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compress_jax.core._leafwise import why_not_float
from compress_jax.core.amount import amount_exact
from compress_jax.core.arguments import number, whole
from compress_jax.core.axes import Axes
from compress_jax.core.compression import CompressionState
from compress_jax.core.errors import ArgumentError
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.types import Params, PyTree, Shape


def erk(
    params: Params,
    sparsity: float,
    pattern: Patterns | None = None,
    *,
    kernel: bool = True,
    layouts: Mapping[str, Axes] | None = None,
) -> dict[str, float]:
    r"""Return the sparsity of each kernel by the Erdős-Rényi-kernel rule; the total is exact.

    A kernel of shape :math:`(k_1, \ldots, k_r)` keeps the share
    :math:`\epsilon \frac{\sum_i k_i}{\prod_i k_i}` of its weights, or all where that exceeds 1.
    The factor :math:`\epsilon` is such that the kernels together reach the sparsity. Counts are
    rounded to integers of the same sum, the largest fractions up.

    Args:
      params: tree of arrays or shapes.
      sparsity: share of the weights of all these kernels to prune, 0 to 1.
      pattern: globs of the kernels; by default all floating-point leaves of rank 2 and more. The
        others stay dense.
      kernel: False for the Erdős-Rényi rule, which counts inputs and outputs but not the window of
        a convolution.
      layouts: the axes of the leaves, from ``cj.trace.layouts(fn, params, *inputs)``. A stack of
        layers then gets the sparsity that each layer alone would get. Without it a leaf is one
        layer whose last two axes are inputs and outputs.

    Returns:
      ``{path: sparsity}``, for the ``sparsity`` of any method.

    Raises:
      ArgumentError: if the sparsity is outside [0, 1] or there is no such kernel.
      NoMatchError: if the pattern matches no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"a": jnp.ones((10, 10)), "b": jnp.ones((20, 40)), "bias": jnp.ones(40)}
      >>> cj.prune.erk(params, 0.8)
      {'a': 0.55, 'b': 0.83125}

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, section 3. Mocanu et
      al., "Scalable training of artificial neural networks with adaptive sparse connectivity
      inspired by network science", 2018 (Erdős-Rényi).
    """
    if not 0 <= sparsity <= 1:
        raise ArgumentError(
            f"sparsity is the share of weights to prune, between 0 and 1, got {sparsity}"
        )
    shapes = _kernel_shapes(params, pattern)
    if layouts is not None:
        wrong = [p for p, s in shapes.items() if p not in layouts or layouts[p].shape != s]
        if wrong:
            raise ArgumentError(f"layouts are of other params: none fits {', '.join(wrong)}")
    if not shapes:
        raise ArgumentError(
            "there is no kernel of rank 2 or more among the leaves; name the leaves by a pattern"
        )
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    total = sum(sizes.values())
    weights = {}
    for path, shape in shapes.items():
        weights[path] = _weight(shape, kernel, (layouts or {}).get(path))
    shares = fill(weights, sizes, total - amount_exact(sparsity, total))
    kept = round_to_total(shares, sizes)
    return {path: (size - kept[path]) / size for path, size in sizes.items()}


def _kernel_shapes(params: Params, pattern: Patterns | None) -> dict[str, Shape]:
    """Return the shapes of the leaves that match; by default of those of rank 2 and more."""
    leaves = flatten(params)[0]
    shapes = {path: tuple(x.shape) for path, x in leaves.items() if why_not_float(path, x) is None}
    if pattern is None:
        return {path: shape for path, shape in shapes.items() if len(shape) > 1}
    matched = set(match(pattern, shapes))
    return {path: shape for path, shape in shapes.items() if path in matched}


def _weight(shape: Shape, kernel: bool, axes: Axes | None) -> float:
    """Return the weight of a leaf in the allocation: the sum of a layer's sizes, times layers."""
    layers = axes.layers if axes else 1
    layer = axes.layer.shape if axes else shape
    window = axes.layer.window if axes else range(len(shape) - 2)
    counted = range(len(layer))
    if not kernel:
        counted = [axis for axis in counted if axis not in window]
    # Axes that do not count (the window) multiply the weight, as each index is a kernel of its own.
    others = math.prod(layer) / math.prod(layer[axis] for axis in counted)
    return layers * others * sum(layer[axis] for axis in counted)


def fill(weights: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, float]:
    """Divide a total in proportion to weights, such that no share exceeds its size.

    Example:
      >>> fill({"a": 1.0, "b": 1.0}, {"a": 3, "b": 100}, 20)
      {'a': 3.0, 'b': 17.0}
    """
    # A leaf whose share exceeds its size is full; the rest is divided among the others.
    # Every pass fills at least one more, so there are at most as many passes as leaves.
    full: dict[str, float] = {}
    while True:
        free = {path: weight for path, weight in weights.items() if path not in full}
        factor = (total - sum(full.values())) / max(sum(free.values()), 1e-300)
        over = {path for path, weight in free.items() if factor * weight > sizes[path]}
        if not over:
            return {path: full.get(path, factor * weight) for path, weight in weights.items()}
        full.update({path: float(sizes[path]) for path in free if path in over})


def round_to_total(shares: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """Round shares to integers of the same sum, the largest fractions up.

    Of equal fractions the earlier one is rounded up first.

    Example:
      >>> round_to_total({"a": 0.5, "b": 1.5, "c": 3.0}, {"a": 1, "b": 2, "c": 3})
      {'a': 1, 'b': 1, 'c': 3}
    """
    floors = {path: min(math.floor(share), sizes[path]) for path, share in shares.items()}
    left = round(sum(shares.values())) - sum(floors.values())
    # Negated, so that the largest come first.
    fractions = np.array([floors[path] - share for path, share in shares.items()])
    # Rounded, because fractions that are equal on paper may differ in the last bits.
    order = np.argsort(np.round(fractions, 9), kind="stable")
    names = list(shares)
    up = {names[i] for i in order[:left]}
    return {path: floor + (path in up) for path, floor in floors.items()}


def cubic(final: float, begin: int, end: int, initial: float = 0.0) -> optax.Schedule:
    """Return the cubic schedule of gradual pruning: fast at first, slow towards the end.

    ``s(step) = final + (initial - final) * (1 - t)**3`` with ``t = (step - begin) / (end - begin)``
    clipped to [0, 1].

    Args:
      final: sparsity from step ``end`` on, 0 to 1.
      begin: the last step with the sparsity ``initial``, at least 0.
      end: the first step with the sparsity ``final``, after ``begin``.
      initial: sparsity up to step ``begin``, 0 to 1.

    Returns:
      An optax schedule, ``step -> float32`` sparsity.

    Raises:
      ArgumentError: if a sparsity is outside [0, 1], or the steps are not ``0 <= begin < end``.

    Example:
      >>> import compress_jax as cj
      >>> schedule = cj.prune.cubic(0.8, begin=100, end=200)
      >>> [round(float(schedule(step)), 3) for step in (0, 100, 150, 200, 300)]
      [0.0, 0.0, 0.7, 0.8, 0.8]

    References:
      Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
      compression", 2017, equation 1.
    """
    final = number("final", final)
    initial = number("initial", initial)
    begin = whole("begin", begin)
    end = whole("end", end)
    if not (0 <= initial <= 1 and 0 <= final <= 1):
        raise ArgumentError(f"sparsities lie between 0 and 1, got initial={initial}, final={final}")
    if not 0 <= begin < end:
        raise ArgumentError(f"cubic needs 0 <= begin < end, got begin={begin}, end={end}")
    return optax.polynomial_schedule(
        initial, final, power=3, transition_steps=end - begin, transition_begin=begin
    )


def shares(params: Params, state: CompressionState) -> dict[str, float]:
    """Return the sparsity of each leaf that has a mask.

    A global threshold or `lamp` decides how many weights each layer keeps; this map gives `random`,
    `rigl` or `fisher` exactly the same numbers.

    Args:
      params: the params the state belongs to.
      state: the state of a pruning method, alone or inside combinators; concrete arrays.

    Returns:
      ``{path: sparsity}``, for the ``sparsity`` of any method.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"a": jnp.array([1.0, 2.0, 9.0, 8.0]), "b": jnp.array([3.0, 7.0])}
      >>> cj.prune.shares(params, cj.prune.magnitude(0.5, scope="global").init(params))
      {'a': 0.5, 'b': 0.5}
    """
    # Counts are exact; a mean in float32 would not be.
    masks = masks_in(state.fixed, flatten(params)[0])
    return {path: int((~mask).sum()) / mask.size for path, mask in masks.items()}


def masks_in(fixed: PyTree, names: Iterable[str]) -> dict[str, jax.Array]:
    """Return the masks in a fixed state by path of the leaf, at any nesting of combinators.

    Args:
      fixed: ``state.fixed``.
      names: the paths of the params whose masks are returned.

    Returns:
      bool arrays by path.

    Example:
      >>> leaf = {"mask": jnp.array([True]), "carried": jnp.zeros(1)}
      >>> masks_in({"0": {"w": leaf}}, ["w"])["w"].tolist()
      [True]
    """
    # A leaf's state is a mask or a dict with one; combinators nest such states under their keys.
    names = frozenset(names)
    found = {}
    for name, each in fixed.items():
        if isinstance(each, Mapping) and "mask" in each and name in names:
            found[name] = each["mask"]
        elif isinstance(each, Mapping):
            found.update(masks_in(each, names))
        elif name in names and hasattr(each, "dtype") and jnp.issubdtype(each.dtype, jnp.bool_):
            found[name] = each
    return found
