"""Entropy-constrained quantization: codes chosen for their error and for the bits they cost."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core._leafwise import LeafState, leafwise, why_not_float
from compress_jax.core.arguments import flag, number, patterns, whole
from compress_jax.core.axes import Axes
from compress_jax.core.bits import Bits
from compress_jax.core.compression import Compression, Pointwise
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ArgumentError
from compress_jax.core.exact import exact_sum
from compress_jax.core.finite import saturate, where_finite
from compress_jax.core.layout import Layout
from compress_jax.core.packed import Quantized
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.types import Leaf, Params, PyTree
from compress_jax.quantize._scales.levels import Fixed
from compress_jax.quantize._scales.rules import safe_scale

PASSES = (
    5  # codes, then rates of these codes, then codes again: later passes change next to nothing
)
LONGEST = 24.0  # bits: what the coder spends at most on a symbol
TRIALS, NEAR = 15, 1e-3  # steps that are tried at most, and how near an error must come


def rate_distortion(
    lam: float = 0.1, step: float = 0.5, relative: bool = True, bits: int = 8
) -> Compression:
    r"""Round weights to multiples of one step a leaf, each code chosen for its error and its bits.

    A code q of a weight w is that of least cost under the step D,

    .. math:: (w - q D)^2 + \lambda D^2 R(q),

    where R(q) is what an entropy coder will spend on q, in bits. The rates are those of the codes
    themselves, so both are found in turn (`PASSES` times): P(0) is the share of zeros, signs cost a
    bit, and magnitudes follow a geometric law with their mean m,

    .. math:: R(0) = -\log_2 P(0), \qquad
              R(\pm k) = 1 - \log_2 \frac{1 - P(0)}{m} + (k - 1) g, \qquad
              g = -\log_2 (1 - 1 / m),

    the family from which ``save(coded=True)`` starts in each of its contexts. Under these rates the
    choice has a closed form, a uniform quantizer with a dead zone:

    .. math:: q = 0 \text{ where } |w| \le t D, \text{ else }
              sign(w) \max(1, round(|w| / D - \lambda g / 2)), \qquad
              t = \min_k \left( \frac{k}{2} + \lambda \frac{R(k) - R(0)}{2 k} \right).

    At lam = 0 this is rounding to the nearest multiple. At small steps the slope of the
    rate-distortion curve is -6 dB a bit, for which :math:`\lambda = \ln 2 / 6 = 0.116`: about 0.1
    is right for any step, and the step chooses the point on the curve.

    **Which step.** A network that is to lose a given squared error in the fewest bits loses the
    same error in every weight (reverse water-filling), which is one absolute step for all leaves:
    ``relative=False``, with `step_for_error`. A step relative to a leaf's root mean square gives
    all leaves the same relative error instead, at about the same bits a weight each, and follows
    the weights in training.

    Args:
      lam: the price of a bit in squared steps, at least 0.
      step: the distance of two levels: in units of the leaf's root mean square if ``relative``,
        else absolute. A leaf with entries beyond the last level gets a larger one.
      relative: see ``step``.
      bits: 2 to 8: levels from ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1``. Unlike in `uniform`
        it bounds the codes and is not what they cost.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale", "threshold", "shift"}``, float32: D, t and
      :math:`\lambda g / 2`. Packs to `Quantized`, dense, with as many bits as the largest code
      needs: meant for coded files. The gradient of the view is that of the identity.

    Raises:
      ArgumentError: if an argument is none of the above.

    Example:
      >>> import compress_jax as cj
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> nearest, cheap = (cj.quantize.rate_distortion(lam, step=1.0) for lam in (0.0, 0.2))
      >>> [round(float((c.view(params, c.init(params))["kernel"] == 0).mean()), 2)
      ...     for c in (nearest, cheap)]
      [0.37, 0.44]

    References:
      Sullivan, "Efficient scalar quantization of exponential and Laplacian random variables", 1996
      (the dead zone is optimal). Chou, Lookabaugh and Gray, "Entropy-constrained vector
      quantization", 1989 (the iteration). Wiedemann et al., "DeepCABAC", 2019, equation 1.
    """
    chosen = _Choice(
        number("lam", lam, 0),
        number("step", step, 0, above=True),
        flag("relative", relative),
        whole("bits", bits, 2, 8),
    )

    def init(x: jax.Array, key: jax.Array | None, axes: Axes) -> LeafState:
        return None, _state(chosen, _layout(axes), x)

    def update(x: jax.Array, learned: None, fixed: Fixed, *, axes: Axes, **_: PyTree) -> LeafState:
        return init(x, None, axes)

    def view(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> jax.Array:
        layout = _layout(axes)
        return _rounded(layout, chosen.qmax, x, *_thresholds(fixed))

    def pack(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> Quantized:
        layout = _layout(axes)
        levels = np.asarray(_levels_of_leaf(layout, chosen.qmax, x, *_thresholds(fixed)))
        width = max(2, int(np.abs(levels).max()).bit_length() + 1)
        middle = 2 ** (width - 1)
        scale, zero_point = fixed["scale"], jnp.array(middle, jnp.uint8)
        # Dense, however many are zero: a coded file has zeros at their cost, and a mask beside the
        # other codes would hide from its coder which of them are neighbors.
        codes = Bits.pack(levels + middle, width)
        return Quantized(codes, scale, zero_point, layout, x.dtype)

    # Built once: solvers compile once for all leaves whose function is the same object.
    quantize_fn = partial(_nearest, chosen.qmax)

    def pointwise(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> Pointwise:
        return Pointwise(quantize_fn, tuple(map(_layout(axes).spread, _thresholds(fixed))))

    # Checkpoints hold this text and are refused if it differs: its names must not change.
    call = call_of("rate_distortion", **chosen._asdict())
    return leafwise(
        view, init=init, update=update, pack=pack, pointwise=pointwise, layout=True, call=call
    )


def step_for_error(
    params: Params,
    error: float,
    lam: float = 0.1,
    pattern: Patterns = "**",
    bits: int = 8,
) -> float:
    r"""Return the absolute step at which leaves together lose a given share of their norm.

    The error is :math:`\sqrt{\sum (w - \hat w)^2 / \sum w^2}` over all entries of all leaves under
    ``rate_distortion(lam, step, relative=False, bits)``, found to 0.1 %.

    Args:
      params: the leaves.
      error: above 0 and below 1.
      lam: as of `rate_distortion`.
      pattern: which leaves are quantized.
      bits: as of `rate_distortion`.

    Returns:
      The step.

    Raises:
      ArgumentError: if so many bits cannot be that exact, or an argument is out of its range.
      NoMatchError: if no leaf matches.

    Example:
      >>> import compress_jax as cj
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> step = cj.quantize.step_for_error(params, error=0.1)
      >>> c = cj.quantize.rate_distortion(step=step, relative=False)
      >>> lost = c.view(params, c.init(params))["kernel"] - params["kernel"]
      >>> round(float(jnp.linalg.norm(lost) / jnp.linalg.norm(params["kernel"])), 2)
      0.1
    """
    error = number("error", error, 0, 1, above=True, below=True)
    chosen = _Choice(number("lam", lam, 0), 1.0, False, whole("bits", bits, 2, 8))
    named = {path: x for path, x in flatten(params)[0].items() if why_not_float(path, x) is None}
    leaves = {path: named[path] for path in match(patterns("pattern", pattern), named)}

    def rounded(step: float) -> dict[str, jax.Array]:
        # The step is traced: the program is compiled once for all trials.
        return {path: _on_levels(chosen, x, jnp.float32(step)) for path, x in leaves.items()}

    return relative_error(leaves, error, rounded)


def relative_error(
    leaves: Mapping[str, Leaf], error: float, rounded: Callable[[float], Mapping[str, jax.Array]]
) -> float:
    """Return the step with which leaves together lose a given share of their norm.

    Args:
      leaves: by path.
      error: the share.
      rounded: ``step -> rounded leaves by path``.

    Returns:
      The step.

    Raises:
      ArgumentError: if no step is fine enough.
    """
    squares = sum(float(_squares(x)) for x in leaves.values())
    size = (squares / sum(x.size for x in leaves.values())) ** 0.5  # root mean square of all

    def lost(step: float) -> float:
        new = rounded(step)
        return (sum(float(_squares(x, new[path])) for path, x in leaves.items()) / squares) ** 0.5

    # At small steps the error is .3 of a plain step, .5 of a trellis's, and less at larger ones.
    ends = [error * size * 2.0**-1, error * size * 2.0**5]
    found = [lost(step) for step in ends] if size else []
    if not size or found[0] > error:
        raise ArgumentError(
            f"error={error} is below what codes of so many bits lose of these leaves; ask for a "
            "larger error or more bits, or leave out leaves that are zero or have outliers"
        )
    for trial in range(TRIALS):
        # Regula falsi on logarithms, where the curve is nearly straight; every third time halved.
        share = math.log(error / found[0]) / math.log(found[1] / found[0]) if trial % 3 < 2 else 0.5
        middle = ends[0] * (ends[1] / ends[0]) ** share
        now = lost(middle)
        if abs(now - error) <= NEAR * error:
            return middle
        which = int(now > error)
        ends[which], found[which] = middle, now
    return ends[0]


@jax.jit
def _squares(x: jax.Array, less: jax.Array | None = None) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.square(x if less is None else x - less.astype(jnp.float32)).sum()


class _Choice(NamedTuple):
    """The options of `rate_distortion`."""

    lam: float
    step: float
    relative: bool
    bits: int

    @property
    def qmax(self) -> int:
        """The highest level; the lowest is its negative."""
        return 2 ** (self.bits - 1) - 1


def _layout(axes: Axes) -> Layout:
    return Layout.of(axes.shape, "tensor", axes.outputs, stack=axes.stack)


def _thresholds(fixed: Fixed) -> tuple[jax.Array, jax.Array, jax.Array]:
    return fixed["scale"], fixed["threshold"], fixed["shift"]


@partial(jax.jit, static_argnums=(0, 1))
def _state(chosen: _Choice, layout: Layout, x: jax.Array) -> Fixed:
    return _fitted(chosen, layout, x, jnp.float32(chosen.step))


def _fitted(chosen: _Choice, layout: Layout, x: jax.Array, step: jax.Array) -> Fixed:
    """Return step, dead zone and shift of one layer: codes and rates in turn."""
    w = layout.arrange(x.astype(jnp.float32))
    bound = jnp.abs(w).max(layout.reduced, keepdims=True)
    scale = jnp.broadcast_to(step, bound.shape)
    if chosen.relative:
        scale = scale * _root_mean_square(w, bound, layout)
    # The largest entry is no further than .4 steps from the last level: clipping it more would cost
    # more than a step that is too large.
    scale = safe_scale(jnp.maximum(scale, bound * np.float32(1 / (chosen.qmax + 0.4))))

    def body(_: int, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        levels = jnp.abs(_levels(chosen.qmax, w, scale, *found))
        return _decision(chosen, *_moments(levels, layout, chosen.bits))

    start = (jnp.full_like(scale, 0.5), jnp.zeros_like(scale))
    threshold, shift = jax.lax.fori_loop(0, PASSES, body, start)
    return {"scale": scale, "threshold": threshold, "shift": shift}


def _root_mean_square(w: jax.Array, bound: jax.Array, layout: Layout) -> jax.Array:
    unit = w * (1 / safe_scale(bound))  # in [-1, 1], so that no square overflows
    total = exact_sum(jnp.square(unit), layout.reduced).reshape(bound.shape)
    return jnp.sqrt(total * np.float32(bound.size / w.size)) * bound


def _moments(levels: jax.Array, layout: Layout, bits: int) -> tuple[jax.Array, jax.Array, int]:
    """Return how many levels are not zero, the sum of their magnitudes, and how many there are."""
    total = partial(jnp.sum, axis=layout.reduced, keepdims=True, dtype=jnp.uint32)
    nonzero = total(levels != 0).astype(jnp.float32)
    # Bit by bit: a sum of counts is the same however the leaf is sharded, and cannot overflow.
    size = jnp.zeros_like(nonzero)
    for place in range(bits - 1):
        size = size + 2.0**place * total((levels >> place) & 1).astype(jnp.float32)
    return nonzero, size, levels.size // nonzero.size


def _decision(
    chosen: _Choice, nonzero: jax.Array, size: jax.Array, n: int
) -> tuple[jax.Array, jax.Array]:
    """Return the end of the dead zone and the shift towards zero, in steps."""
    share = (nonzero + 0.5) / (n + 1)  # of what is not zero; neither 0 nor 1
    mean = jnp.maximum((size + 0.5) / (nonzero + 0.5), 1)
    gain = jnp.minimum(-jnp.log2(1 - 1 / mean), LONGEST)  # bits from one magnitude to the next
    first = 1 - jnp.log2(share / mean) + jnp.log2(1 - share)  # R(1) - R(0)
    k = np.arange(1, chosen.qmax + 1, dtype=np.float32)
    k = k.reshape((1,) * gain.ndim + (-1,))  # [1, ..., qmax]
    more = first[..., None] + (k - 1) * gain[..., None]  # R(k) - R(0): [..., qmax]
    threshold = (k / 2 + np.float32(chosen.lam / 2) * more / k).min(-1)
    return threshold, np.float32(chosen.lam / 2) * gain


def _levels(
    qmax: int, x: jax.Array, scale: jax.Array, threshold: jax.Array, shift: jax.Array
) -> jax.Array:
    """Return signed levels, int32; all arguments broadcast."""
    x = x.astype(jnp.float32)
    v = jnp.abs(x) * (1 / scale)
    # round(v - shift), half down, without a sum that a compiler would fuse with the product: the
    # levels are the same bits compiled or not.
    nearest = jnp.round(v)
    steps = jnp.floor(shift)
    lower = (v <= nearest - 0.5 + (shift - steps)) & (shift > 0)
    magnitude = jnp.clip(nearest - steps - lower.astype(jnp.float32), 1, qmax)
    magnitude = jnp.where(v > threshold, magnitude, 0)
    return jnp.where(x < 0, -magnitude, magnitude).astype(jnp.int32)


def _nearest(qmax: int, x: jax.Array, *found: jax.Array) -> jax.Array:
    """Return an array on its levels, in its dtype."""
    levels = _levels(qmax, x, *found).astype(jnp.float32)
    return where_finite(x, saturate(levels * found[0], x.dtype))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _rounded(layout: Layout, qmax: int, x: jax.Array, *found: jax.Array) -> jax.Array:
    """Return an array on its levels, with the derivative of the identity."""
    return layout.restore(_nearest(qmax, layout.arrange(x), *found))


@_rounded.defjvp
def _(
    layout: Layout, qmax: int, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    return _rounded(layout, qmax, *primals), tangents[0]


# Compiled once for all leaves of a shape.
@partial(jax.jit, static_argnums=(0, 1))
def _levels_of_leaf(layout: Layout, qmax: int, x: jax.Array, *found: jax.Array) -> jax.Array:
    return layout.restore(_levels(qmax, layout.arrange(x), *found))


@partial(jax.jit, static_argnums=0)
def _on_levels(chosen: _Choice, x: jax.Array, step: jax.Array) -> jax.Array:
    layout = Layout.of(x.shape, "tensor")
    return _nearest(chosen.qmax, x, *_thresholds(_fitted(chosen, layout, x, step)))
