"""Bias correction: take the mean of the error that compression makes out of every layer's outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from compress_jax.core.errors import NonFiniteError
from compress_jax.core.paths import flatten
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.layerwise._problem import fed, met, summed_axes, why_not
from compress_jax.trace import Calibration
from compress_jax.trace._jaxpr.find_sites import trace
from compress_jax.trace._jaxpr.interpret import Where, interpret
from compress_jax.trace._jaxpr.primitives import CASTS
from compress_jax.trace._jaxpr.site import Position, Site
from compress_jax.trace._statistics.calibration import require
from compress_jax.trace._statistics.moments import Moments
from compress_jax.trace._statistics.reducer import expand_count

# Which parameter is added to what comes out of a site: its bias.


MOVES = CASTS | {"broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose"}


@dataclass(frozen=True)
class Origin:
    """A value that is a parameter, or what a site gave, but for moves and casts."""

    param: str | None = None
    site: str | None = None


NOTHING = Origin()


@dataclass
class _Biases:
    """The domain for the interpreter: a value is an `Origin`."""

    sites: dict[Position, Site]
    found: dict[str, str] = field(default_factory=dict)

    def constant(self, aval: Any, value: Any) -> Origin:
        return NOTHING

    def join(self, a: Origin, b: Origin) -> Origin:
        return a if a == b else NOTHING

    def same(self, a: Origin, b: Origin) -> bool:
        return a == b

    def unstack(self, a: Origin, loop: int) -> Origin:
        return a if a.param is not None else NOTHING

    def stack(self, a: Origin, length: int) -> Origin:
        return NOTHING

    def reshard(self, a: Origin, aval: Any) -> Origin:
        return NOTHING

    def equation(self, eqn: JaxprEqn, args: list[Origin], where: Where) -> Sequence[Origin]:
        if where.position in self.sites:
            return [Origin(site=self.sites[where.position].name)]
        name = eqn.primitive.name
        if name in MOVES:
            return [args[0]]
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


class Corrected(NamedTuple):
    """Params with corrected biases.

    Attributes:
      params: plain arrays.
      corrected: ``{path of a bias: path of the kernel whose error it takes up}``.
      skipped: ``{path of a kernel: why no bias takes up its error}``.
      notes: ``{path of a kernel: what was out of the ordinary}``.
    """

    params: Params
    corrected: dict[str, str]
    skipped: dict[str, str]
    notes: Mapping[str, str] = MappingProxyType({})


def correct_bias(
    fn: ModelFn,
    params: Params,
    compressed: Params,
    calibration: Calibration,
    *inputs: PyTree,
) -> Corrected:
    r"""Add to each bias what its layer's kernel lost on average, :math:`b \leftarrow b + (W - \hat W)^\top E[x]`.

    Afterwards the mean of each output over the calibration data is what it was. Of a convolution,
    E[x] is the mean of each input channel wherever the window stands: padding is left out of
    account. Which parameter is a layer's bias is read off the function's jaxpr.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays before compression.
      compressed: the like after it: ``c.view(params, state)`` or a solver's result. If biases are
        compressed too, their correction has to be seen through the compression again.
      calibration: ``trace.calibrate(fn, trace.reducers.moments(), params, batches)``.
      inputs: one example of them; only shapes matter.

    Returns:
      `Corrected`: ``compressed`` with new biases; kernels without a bias are listed.

    Raises:
      NonFiniteError: if calibration statistics are not finite.
      StateError: if they are other statistics.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> from compress_jax.trace.reducers import moments
      >>> fn = lambda p, x: x @ p["kernel"] + p["bias"]
      >>> params = {"kernel": jnp.array([[1.2], [0.9]]), "bias": jnp.zeros(1)}
      >>> rounded = {"kernel": jnp.array([[1.0], [1.0]]), "bias": jnp.zeros(1)}
      >>> x = jnp.array([[1.0, 0.0], [3.0, 2.0]])
      >>> result = correct_bias(fn, params, rounded, calibrate(fn, moments(), params, [x]), x)
      >>> round(float(result.params["bias"][0]), 4), result.corrected
      (0.3, {'bias': 'kernel'})

    References:
      Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
      arXiv:1906.04721, section 4.2, with means that are measured.
    """
    require(calibration, Moments, "reducers.moments()")
    before = flatten(params)[0]
    leaves, rebuild = flatten(compressed)
    added = biases(fn, params, *inputs)
    corrected: dict[str, str] = {}
    skipped: dict[str, str] = {}
    notes: dict[str, str] = {}
    for site, seen in fed(calibration, leaves):
        kernels = [path for path in dict.fromkeys((str(site.param), *site.also)) if path in leaves]
        bias, shift = added.get(site.name), None
        why = "no parameter is added to what it gives" if bias is None else None
        if bias is not None and bias in corrected:
            why = f"its bias {bias!r} already takes up the error of {corrected[bias]!r}"
        elif bias is not None:
            lost = before[kernels[0]] - leaves[kernels[0]]
            shift, why = _shift(site, leaves[bias].shape, lost, seen)
        if bias is None or shift is None:
            skipped |= dict.fromkeys(kernels, why or "")
            continue
        leaves[bias] = (leaves[bias].astype(jnp.float32) + shift).astype(leaves[bias].dtype)
        corrected[bias] = kernels[0]
        notes |= {kernels[0]: why} if why else {}
    return Corrected(rebuild(leaves), corrected, skipped, notes)


def _shift(site: Site, shape: tuple[int, ...], lost: Any, seen: Moments) -> tuple[Any, str | None]:
    """Return what a bias of this shape has to take up, and a note; or None and why it cannot."""
    if reason := why_not(site):
        return None, reason
    if len(site.pieces) != 1:
        return (
            None,
            "several parameters are joined in its product, and one bias is added to all of them",
        )
    never = seen.count == 0
    if bool(never.all()):
        return None, "calibration never reached it"
    answer = met(
        site, site.pieces[0], jnp.where(expand_count(never, seen.mean), 0.0, seen.mean), jnp.mean
    )
    if isinstance(answer, str):
        return None, answer
    box, form, means = answer
    if not bool(jnp.isfinite(means).all()):
        raise NonFiniteError(
            f"the means of what {site.param!r} is fed are not finite; look at the calibration "
            "batches"
        )
    weighed = form.stored(form.matrices(box.take(lost.astype(jnp.float32))) * means[..., None])
    shift = weighed.sum(summed_axes(form))
    if [n for n in shift.shape if n != 1] != [n for n in shape if n != 1]:
        return None, f"its bias has shape {shape}, its outputs {shift.shape}"
    return shift.reshape(shape), "some turns of its loop never ran: not corrected for them" if bool(
        never.any()
    ) else None
