"""A scale and shift after a kernel goes into the kernel and one of the parameters of the shift."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compress_jax.trace.affine_maps import AffineMap
from compress_jax.trace.polynomials import Atom, Factors, Polynomial, add, evaluate

Axes = tuple[int, ...]
Term = tuple[Factors, float]


class Refused(Exception):
    """Why a map is not folded; caught where it is listed."""


class _Frame:
    """One index space for all arrays of a map: the loops around it, then the axes of its value.

    An array in it has the length 1 along what it does not vary with.
    """

    def __init__(self, each: AffineMap) -> None:
        self.loops = sorted(loop for _, loop in each.kernel.sliced)
        self.channels = self.parts(each.kernel.sliced, each.made.dims)

    def parts(self, sliced: Sequence[tuple[int, int]], dims: Sequence[Axes]) -> list[Axes]:
        """Return the stored axes that lie along each axis of the frame."""
        if any(loop not in self.loops for _, loop in sliced):
            raise Refused("its norm differs from one turn of a loop to the next, and it does not")
        along = {loop: axis for axis, loop in sliced}
        return [*((along[loop],) if loop in along else () for loop in self.loops), *dims]

    def spread(self, x: np.ndarray, parts: Sequence[Axes]) -> np.ndarray:
        """Return a stored array in the frame."""
        flat = [axis for part in parts for axis in part]
        if any(axis < 0 for axis in flat) or len(set(flat)) < len(flat):
            raise Refused("the parameters of its norm are reversed or repeated")
        rest = [axis for axis in range(x.ndim) if axis not in flat]
        if any(x.shape[axis] != 1 for axis in rest):
            raise Refused("the parameters of its norm do not have one entry for each of its outputs")
        return x.transpose([*flat, *rest]).reshape(self.sizes(x.shape, parts))

    @staticmethod
    def sizes(shape: Sequence[int], parts: Sequence[Axes]) -> list[int]:
        """Return the lengths of a stored array along the axes of the frame."""
        return [math.prod(shape[axis] for axis in part) for part in parts]

    def stored(self, y: np.ndarray, shape: Sequence[int], parts: Sequence[Axes]) -> np.ndarray:
        """Return an array of the frame as it is stored, with the length 1 along stored axes that are not in it."""
        sizes = self.sizes(shape, parts)
        y = y.reshape((1,) * (len(sizes) - y.ndim) + y.shape)
        if any(n not in (1, size) for n, size in zip(y.shape, sizes, strict=True)):
            raise Refused("its norm differs along an axis that is none of its outputs', or of no parameter of the norm")
        flat = [axis for part in parts for axis in part]
        full = np.broadcast_to(y, sizes).reshape([shape[axis] for axis in flat]).transpose(np.argsort(flat).tolist())
        return full.reshape([n if axis in flat else 1 for axis, n in enumerate(shape)])


def folded_map(
    each: AffineMap, arrays: Mapping[str, np.ndarray], leaves: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    r"""Return new parameters with which a map :math:`y a + b` is the identity but for a shift, and its kernel is scaled.

    Each parameter of the scale takes the value at which its factor is 1; those of the shift become 0, but for one, which
    takes the value that leaves b as it is. The kernel becomes :math:`W a / a'`, a' being what is left of the scale.

    Args:
      each: the map.
      arrays: captured constants by name.
      leaves: all parameters by path.

    Returns:
      ``({path: array} of what has changed, paths of the parameters of the norm)``.

    Raises:
      Refused: if there are no such parameters.
    """
    frame, kernel, scale, shift = _Frame(each), each.kernel, each.made.scale, each.made.shift
    if len(scale.terms) != 1:
        raise Refused("the scale after it is a sum")
    params = {path: leaves[path] for path in sorted(scale.paths | shift.paths | {kernel.path}) if path in leaves}
    old = {path: np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64) for path, x in params.items()}

    def value(p: Polynomial, of: Mapping[str, np.ndarray]) -> np.ndarray:
        own = {**arrays, **of}
        return evaluate(p, lambda atom: frame.spread(atom(own[atom.path]), frame.parts(atom.sliced, atom.dims)))

    with np.errstate(all="ignore"):
        before, wanted = value(scale, old), value(shift, old)
        new, terms = _neutral(scale, shift, old)
        carrier = _carrier(frame, terms, each, old)
        if carrier is not None:
            new |= _carried(frame, carrier, shift, wanted, new, value)
        after = value(scale, new)
        if not np.allclose(value(shift, new), wanted, rtol=1e-6, atol=1e-6 * (np.abs(wanted).max(initial=0) + 1e-30)):
            raise Refused("no parameter of its norm could take up the shift")
        grown = old[kernel.path] * frame.stored(before / after, old[kernel.path].shape, frame.channels)
    cast = {path: jnp.asarray(x).astype(leaves[path].dtype) for path, x in {**new, kernel.path: grown}.items()}
    if not all(bool(jnp.isfinite(x).all()) for x in cast.values()):
        raise Refused("folded parameters would not be finite")
    return cast, _in_order(scale, terms, carrier, new)


def _neutral(scale: Polynomial, shift: Polynomial, old: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[Term]]:
    """Return parameters at which the scale is 1 and those of the shift alone are 0, and the terms they are in."""
    new = dict(old)
    in_scale: set[str] = set()
    for atom, _ in scale.terms[0][0]:
        neutral = atom.inverse(1.0)
        if atom.path in old and atom.path not in in_scale and neutral is not None:
            new[atom.path] = np.full_like(old[atom.path], neutral)
            in_scale.add(atom.path)
    if not in_scale:
        raise Refused("no parameter of the scale after it could make it 1")
    terms = [term for term in shift.terms if _own(term, shift, in_scale) is not None]
    for term in terms:
        atom = _own(term, shift, in_scale)
        assert atom is not None
        zero = atom.inverse(0.0)
        if atom.path in old and zero is not None:
            new[atom.path] = np.full_like(old[atom.path], zero)
    return new, terms


def _own(term: Term, shift: Polynomial, in_scale: set[str]) -> Atom | None:
    """Return the parameter that a term of the shift is proportional to, if it is in no other term and not in the scale."""
    for atom, p in term[0]:
        elsewhere = sum(atom.path in {each.path for each, _ in factors} for factors, _ in shift.terms)
        if p == 1 and elsewhere == 1 and atom.path not in in_scale and not atom.path.startswith("\0"):
            return atom
    return None


def _carrier(frame: _Frame, terms: list[Term], each: AffineMap, old: Mapping[str, np.ndarray]) -> tuple[Term, Atom] | None:
    """Return the term whose parameter takes up the shift: the one of fewest factors, a mean before a bias of the layer."""
    scale = {atom.path for atom, _ in each.made.scale.terms[0][0]}
    found = [(term, atom) for term in terms if (atom := _own(term, each.made.shift, scale)) is not None]
    full = frame.sizes(old[each.kernel.path].shape, frame.channels)
    wide = [
        (term, atom)
        for term, atom in found
        if frame.sizes(old[atom.path].shape, frame.parts(atom.sliced, atom.dims)) == full
    ]
    return min(wide or found, key=lambda one: (len(one[0][0]), one[0][1] > 0), default=None)


def _carried(
    frame: _Frame, carrier: tuple[Term, Atom], shift: Polynomial, wanted: np.ndarray, new: dict[str, np.ndarray], value: Any
) -> dict[str, np.ndarray]:
    (factors, k), own = carrier
    rest = add(shift, Polynomial(((factors, k),)), -1.0)
    assert rest is not None
    times = value(Polynomial(((tuple(pair for pair in factors if pair[0] != own), k),)), new)
    entries = own.inverse((wanted - value(rest, new)) / times)
    if entries is None:
        raise Refused("no parameter of its norm could take up the shift")
    shape = new[own.path].shape
    return {own.path: np.broadcast_to(frame.stored(entries, shape, frame.parts(own.sliced, own.dims)), shape)}


def _in_order(
    scale: Polynomial, terms: list[Term], carrier: tuple[Term, Atom] | None, new: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return the paths of a norm: means, variances, gains, the bias, then a bias before it."""
    factors = scale.terms[0][0]
    spread, gains = ([a.path for a, p in factors if (p < 0) == divides] for divides in (True, False))
    means = [atom.path for own, k in terms for atom, _ in own if k < 0]
    biases = [carrier[1].path] if carrier is not None else []
    rest = [atom.path for own, _ in terms for atom, _ in own]
    first = [path for path in means if path not in (*spread, *gains, *biases)] or [p for p in means if p in biases]
    return tuple(path for path in dict.fromkeys([*first, *spread, *gains, *biases, *rest]) if path in new)
