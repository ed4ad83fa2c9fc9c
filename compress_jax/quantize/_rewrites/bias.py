"""Bias correction: remove the mean of the compression error from every layer's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from compress_jax.core.deprecated import positional_arguments
from compress_jax.core.errors import NonFiniteError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Aval, ModelFn, Params, PyTree, Shape
from compress_jax.layerwise._problem import channel_statistic, fed_sites, summed_axes, why_not
from compress_jax.layerwise._result import Rewritten
from compress_jax.trace._jaxpr.find_sites import trace
from compress_jax.trace._jaxpr.interpret import Where, interpret
from compress_jax.trace._jaxpr.primitives import CASTS
from compress_jax.trace._jaxpr.site import Position, Site
from compress_jax.trace._statistics.calibration import Calibration, require
from compress_jax.trace._statistics.reducer import expand_count
from compress_jax.trace._statistics.statistics import Moments

MOVES = CASTS | {"broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose"}


@dataclass(frozen=True)
class Origin:
    """A value that is a parameter or a site's output, up to moves and casts."""

    param: str | None = None
    site: str | None = None


NOTHING = Origin()


@dataclass
class _Biases:
    """The interpreter's domain of `Origin` values; ``found`` maps sites to their biases."""

    sites: dict[Position, Site]
    found: dict[str, str] = field(default_factory=dict)

    def constant(self, aval: Aval, value: object) -> Origin:
        return NOTHING

    def join(self, a: Origin, b: Origin) -> Origin:
        return a if a == b else NOTHING

    def same(self, a: Origin, b: Origin) -> bool:
        return a == b

    def unstack(self, a: Origin, loop: int) -> Origin:
        # A loop gives each layer its slice of the stacked biases.
        return a if a.param is not None else NOTHING

    def stack(self, a: Origin, length: int) -> Origin:
        # What is added to the outputs of all iterations together is no layer's bias.
        return NOTHING

    def reshard(self, a: Origin, aval: Aval) -> Origin:
        return NOTHING

    def equation(self, eqn: JaxprEqn, args: list[Origin], where: Where) -> Sequence[Origin]:
        if where.position in self.sites:
            return [Origin(site=self.sites[where.position].name)]
        name = eqn.primitive.name
        if name in MOVES:
            return [args[0]]
        # A bias is the first parameter added to a site's output, on either side of the sum.
        if name in ("add", "add_any"):
            for one, other in (args, args[::-1]):
                if one.site is not None and other.param is not None:
                    self.found.setdefault(one.site, other.param)
        return [NOTHING] * len(eqn.outvars)


def biases(fn: ModelFn, params: Params, *inputs: PyTree) -> dict[str, str]:
    """Return the parameter that is added to each site's result.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of the same.

    Returns:
      ``{name of a site: path of its bias}``.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((3, 4)), "shift": jnp.ones(4)}
      >>> biases(lambda p, x: x @ p["kernel"] + p["shift"], params, jnp.ones((2, 3)))
      {'kernel': 'shift'}
    """
    traced = trace(fn, params, *inputs)
    domain = _Biases(traced.sites)
    rest = [NOTHING] * (len(traced.jaxpr.jaxpr.invars) - len(traced.params))
    interpret(domain, traced.jaxpr, [*(Origin(param=path) for path in traced.params), *rest])
    return domain.found


@positional_arguments("compressed", "calibration", after=2)
def correct_bias(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    compressed: Params,
    calibration: Calibration,
) -> Rewritten:
    r"""Add the mean error of a layer's kernel to its bias.

    With :math:`b \leftarrow b + (W - \hat W)^\top E[x]` the mean of each output over the
    calibration data is unchanged by compression. For a convolution, E[x] is the mean of each input
    channel at all positions of the window, without padding. Which parameter is a layer's bias is
    found in the function's jaxpr.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays before compression.
      inputs: one example of them; only shapes matter.
      compressed: the tree after compression: ``c.view(params, state)`` or a solver's ``params``. If
        biases are compressed too, view the result through the compression again. It and
        ``calibration`` may also be given before ``inputs``.
      calibration: ``trace.calibrate(fn, trace.reducers.moments(), params, batches)``.

    Returns:
      ``Rewritten``: ``compressed`` with new biases. ``changed`` maps each bias to the kernel whose
      error it takes up; kernels without a bias are in ``skipped``.

    Raises:
      NonFiniteError: if calibration statistics are not finite.
      StateError: if they are other statistics.

    Example:
      >>> import compress_jax as cj
      >>> fn = lambda p, x: x @ p["kernel"] + p["bias"]
      >>> params = {"kernel": jnp.array([[1.2], [0.9]]), "bias": jnp.zeros(1)}
      >>> rounded = {"kernel": jnp.array([[1.0], [1.0]]), "bias": jnp.zeros(1)}
      >>> x = jnp.array([[1.0, 0.0], [3.0, 2.0]])
      >>> means = cj.trace.calibrate(fn, cj.trace.reducers.moments(), params, [x])
      >>> result = cj.quantize.correct_bias(fn, params, x, compressed=rounded, calibration=means)
      >>> round(float(result.params["bias"][0]), 4), result.changed
      (0.3, {'bias': ('kernel',)})

    References:
      Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
      arXiv:1906.04721, section 4.2, with means that are measured.
    """
    require(calibration, Moments, "reducers.moments()")
    before = flatten(params)[0]
    leaves, rebuild = flatten(compressed)
    added = biases(fn, params, *inputs)
    changed: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    notes: dict[str, str] = {}
    for site, moments in fed_sites(calibration, leaves):
        kernels = [path for path in dict.fromkeys((str(site.param), *site.also)) if path in leaves]
        bias = added.get(site.name)
        if bias is None:
            skipped |= dict.fromkeys(kernels, "no parameter is added to its outputs")
            continue
        # A bias can remove one mean only; a second site that shares it is left.
        if bias in changed:
            reason = f"its bias {bias!r} already takes up the error of {changed[bias][0]!r}"
            skipped |= dict.fromkeys(kernels, reason)
            continue
        error = before[kernels[0]] - leaves[kernels[0]]
        shift, why = _shift(site, leaves[bias].shape, error, moments)
        if shift is None:
            skipped |= dict.fromkeys(kernels, why)
            continue
        # The sum is rounded once, to the bias's own dtype.
        leaves[bias] = (leaves[bias].astype(jnp.float32) + shift).astype(leaves[bias].dtype)
        changed[bias] = (kernels[0],)
        if why:
            notes[kernels[0]] = why
    return Rewritten(rebuild(leaves), changed=changed, skipped=skipped, notes=notes)


def _shift(
    site: Site, shape: Shape, error: jax.Array, moments: Moments
) -> tuple[jax.Array | None, str]:
    """Return what a bias of this shape has to take up, and a note; or None and why it cannot."""
    if reason := why_not(site):
        return None, reason
    if len(site.pieces) != 1:
        return None, "several parameters are joined in its product, and share one bias"
    never = moments.count == 0  # [*loops]
    if bool(never.all()):
        return None, "calibration never reached it"
    known = jnp.where(expand_count(never, moments.mean), 0.0, moments.mean)
    answer = channel_statistic(site, site.pieces[0], known, jnp.mean)
    if isinstance(answer, str):
        return None, answer
    box, form, means = answer  # means: [batch, k]
    if not bool(jnp.isfinite(means).all()):
        raise NonFiniteError(
            f"the means of the inputs of {site.param!r} are not finite; look at the calibration "
            "batches"
        )
    matrices = form.matrices(box.take(error.astype(jnp.float32)))  # [batch, k, n]
    # (W - W')^T E[x], summed in the kernel's own axes: its outputs keep their order and shape.
    shift = form.stored(matrices * means[..., None]).sum(summed_axes(form))
    if [n for n in shift.shape if n != 1] != [n for n in shape if n != 1]:
        return None, f"its bias has shape {shape}, its outputs {shift.shape}"
    partly = "some iterations of its loop never ran: not corrected for them"
    return shift.reshape(shape), partly if bool(never.any()) else ""
