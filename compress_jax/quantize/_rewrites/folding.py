"""Which scalings may be folded so that a kernel's inputs grow or shrink: who takes them in, who makes up for it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from compress_jax.core.types import ModelFn, Params
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._symmetry.scaling import Part, Scaling, scalings


class Folded(NamedTuple):
    """Params of the same function, in which scales have moved from one parameter into others.

    Attributes:
      params: plain arrays; the function they give is the one it was.
      folded: ``{path of a kernel whose inputs were scaled: the parameters that make up for it}``.
      skipped: ``{path: why its inputs cannot be scaled}``.
      notes: ``{path: what was out of the ordinary}``, such as channels that calibration never saw.
    """

    params: Params
    folded: dict[str, tuple[str, ...]]
    skipped: dict[str, str]
    notes: Mapping[str, str] = MappingProxyType({})


class Fold(NamedTuple):
    """A scaling with the parameters that are multiplied with what it scales.

    Attributes:
      scaling: the scaling.
      consumers: the parts that are summed over along it, all of one power.
    """

    scaling: Scaling
    consumers: tuple[Part, ...]

    @property
    def makers(self) -> tuple[str, ...]:
        """The paths of the other parts: what makes up for the consumers."""
        return tuple(
            dict.fromkeys(part.path for part in self.scaling.parts if part not in self.consumers)
        )

    def factors(self, inward: jax.Array) -> jax.Array:
        """Return the factors that multiply the consumers' rows by ``inward``, float32 ``[*stack, size]``."""
        return inward ** (1 / self.consumers[0].power)


def folds(
    fn: ModelFn, params: Params, inputs: tuple[Any, ...], sites: Mapping[str, Site]
) -> tuple[list[Fold], dict[str, str]]:
    """Return what can be folded, every kernel in at most one of them, and why some kernels are in none.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: one example of them.
      sites: of a calibration, by name.

    Returns:
      ``(folds, {path of a kernel: reason})``.
    """
    found, why = scalings(fn, params, *inputs)
    summed: dict[str, set[int]] = {}
    for site in sites.values():
        if site.param is not None:
            summed.setdefault(site.param, set()).update(site.param_axes or ())
    taken: dict[str, Fold] = {}
    for scaling in found:
        consumers = [
            part for part in scaling.parts if set(part.axes) <= summed.get(part.path, set())
        ]
        if len({part.power for part in consumers}) != 1 or any(
            part.path in taken for part in consumers
        ):
            continue
        if len(consumers) < len(scaling.parts):
            taken |= dict.fromkeys(
                (part.path for part in consumers), Fold(scaling, tuple(consumers))
            )
    reasons = {path: _reason(path, axes, why) for path, axes in summed.items() if path not in taken}
    return list({id(fold): fold for fold in taken.values()}.values()), reasons


def _reason(path: str, axes: set[int], why: Mapping[tuple[str, int], str]) -> str:
    if not axes:
        return "a reshape mixes the axes that are summed over with others"
    said = [why[path, axis] for axis in sorted(axes) if (path, axis) in why]
    said = [each for each in dict.fromkeys(said) if "window" not in each] or said
    return "nothing before it can make up for a scale: " + (
        ", ".join(said) or "another kernel takes it up"
    )
