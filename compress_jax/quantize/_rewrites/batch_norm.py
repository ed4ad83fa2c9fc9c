"""Batch-norm folding: a norm's scale moves into the kernel before it, its shift into its bias."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree
from compress_jax.layerwise._result import Rewritten
from compress_jax.trace._jaxpr.find_sites import trace
from compress_jax.trace._jaxpr.site import Position, Site
from compress_jax.trace._symmetry.affine import Mapped, Walk, walk
from compress_jax.trace._symmetry.polynomials import Atom, Factors, Polynomial, add, evaluate


@dataclass(frozen=True)
class AffineMap:
    """A scale and shift, by parameters, that directly follows a site.

    Attributes:
      kernel: the site's parameter, as it enters the site.
      made: the value, y a + b.
      steps: positions of the equations that compute it.
    """

    kernel: Atom
    made: Mapped
    steps: frozenset[Position]


def affine_maps(found: Walk, site: Site) -> list[AffineMap]:
    """Return the scales and shifts that follow a site, each one step longer than the one before.

    Each is all that happens to the site's output up to there. They are recognized by their value,
    however it is written.

    Args:
      found: by `walk`.
      site: the site.

    Returns:
      The maps, the shortest first; none if the site does not use its parameter as stored.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace._symmetry.affine import walk
      >>> from compress_jax.trace._jaxpr.find_sites import trace
      >>> params = {"kernel": jnp.ones((3, 2)), "gain": jnp.ones(2), "bias": jnp.ones(2)}
      >>> fn = lambda p, x: jnp.tanh((x @ p["kernel"] + p["bias"]) * p["gain"])
      >>> traced = trace(fn, params, jnp.ones((1, 3)))
      >>> last = affine_maps(walk(traced), next(iter(traced.sites.values())))[-1]
      >>> sorted(last.made.scale.paths), sorted(last.made.shift.paths)
      (['gain'], ['bias', 'gain'])
    """
    if site.position not in found.values or site.position not in found.kernels:
        return []
    # Follow the site's output as long as it has one use, which scales or shifts it by parameters.
    maps: list[AffineMap] = []
    steps: list[Position] = []
    here = site.position
    # By the position of a value: the step that computes the next value from it.
    following = {parent: key for key, (_, parent) in found.values.items() if parent is not None}
    while (following.get(here) is not None) and len(found.goes.get(here, ())) == 1:
        (use,) = found.goes[here]
        follows = use.position in found.values and found.values[use.position][1] == here
        if not (use.step and follows):
            break
        here = use.position
        steps.append(here)
        made, _ = found.values[here]
        maps.append(AffineMap(found.kernels[site.position], made, frozenset(steps)))
    return maps


Axes = tuple[int, ...]
Term = tuple[Factors, float]


class Refused(Exception):
    """Why a map is not folded; caught where it is listed."""


class _Frame:
    """One index space for all arrays of a map: the loops around it, then the axes of its value.

    An array in it has length 1 along axes that it does not vary with.
    """

    def __init__(self, each: AffineMap) -> None:
        # Outermost first; the kernel has an axis for each, which the loop slices.
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
        flat = list(itertools.chain.from_iterable(parts))
        # ``~axis``, a negative number, stands for an axis that is reversed.
        if any(axis < 0 for axis in flat) or len(set(flat)) < len(flat):
            raise Refused("the parameters of its norm are reversed or repeated")
        rest = [axis for axis in range(x.ndim) if axis not in flat]
        # All other axes must be of size 1: the frame has one entry for each channel.
        if any(x.shape[axis] != 1 for axis in rest):
            raise Refused(
                "the parameters of its norm do not have one entry for each of its outputs"
            )
        return x.transpose([*flat, *rest]).reshape(self.sizes(x.shape, parts))

    @staticmethod
    def sizes(shape: Sequence[int], parts: Sequence[Axes]) -> list[int]:
        """Return the lengths of a stored array along the axes of the frame."""
        return [math.prod(shape[axis] for axis in part) for part in parts]

    def stored(self, y: np.ndarray, shape: Sequence[int], parts: Sequence[Axes]) -> np.ndarray:
        """Return an array of the frame in its stored axes, of length 1 along those not in it."""
        sizes = self.sizes(shape, parts)
        # Values of fewer axes vary along the last ones of the frame, as NumPy broadcasts.
        y = y.reshape((1,) * (len(sizes) - y.ndim) + y.shape)
        if any(n not in (1, size) for n, size in zip(y.shape, sizes, strict=True)):
            raise Refused(
                "its norm differs along an axis that is none of its outputs', or of no parameter "
                "of the norm"
            )
        # Split the axes of the frame that hold several stored ones, and put all in stored order.
        flat = list(itertools.chain.from_iterable(parts))
        full = (
            np.broadcast_to(y, sizes)
            .reshape([shape[axis] for axis in flat])
            .transpose(np.argsort(flat).tolist())
        )
        return full.reshape([n if axis in flat else 1 for axis, n in enumerate(shape)])


def folded_map(
    each: AffineMap, arrays: Mapping[str, np.ndarray], leaves: Leaves
) -> tuple[dict[str, jax.Array], tuple[str, ...]]:
    r"""Return parameters that scale the kernel and leave of a map :math:`y a + b` only a shift.

    Each parameter of the scale takes the value at which its factor is 1. Those of the shift become
    0, except one, which takes the value that leaves b unchanged. The kernel becomes
    :math:`W a / a'`, a' being the remaining scale.

    Args:
      each: the map.
      arrays: captured constants by name.
      leaves: all parameters by path.

    Returns:
      ``({path: changed array}, paths of the norm's parameters)``.

    Raises:
      Refused: if there are no such parameters.
    """
    frame = _Frame(each)
    kernel = each.kernel
    scale = each.made.scale
    shift = each.made.shift
    if len(scale.terms) != 1:
        raise Refused("the scale after it is a sum")
    # float64, so that a folded parameter is rounded once, when it is cast to its own dtype.
    paths = sorted((scale.paths | shift.paths | {kernel.path}) & leaves.keys())
    old = {path: _float64(leaves[path]) for path in paths}

    def value(p: Polynomial, of: Mapping[str, np.ndarray]) -> np.ndarray:
        own = {**arrays, **of}

        def entries(atom: Atom) -> np.ndarray:
            return frame.spread(atom(own[atom.path]), frame.parts(atom.sliced, atom.dims))

        return evaluate(p, entries)

    with np.errstate(all="ignore"):
        # What the map does now; then neutral parameters, and the one that keeps the shift.
        before = value(scale, old)
        wanted = value(shift, old)
        new, terms = _neutral(scale, shift, old)
        carrier = _carrier(frame, terms, each, old)
        if carrier is not None:
            new |= _carried(frame, carrier, shift, wanted, new, value)
        # The scale left is 1, or what parameters without a neutral value leave of it.
        after = value(scale, new)
        # A carrier that channels share, or whose factor is 0, cannot give every shift.
        tolerance = 1e-6 * (np.abs(wanted).max(initial=0) + 1e-30)
        if not np.allclose(value(shift, new), wanted, rtol=1e-6, atol=tolerance):
            raise Refused("no parameter of its norm could take up the shift")
        # W a / a', in the kernel's own axes.
        factors = frame.stored(before / after, old[kernel.path].shape, frame.channels)
        new[kernel.path] = old[kernel.path] * factors
    cast = {path: jnp.asarray(x).astype(leaves[path].dtype) for path, x in new.items()}
    if not all(bool(jnp.isfinite(x).all()) for x in cast.values()):
        raise Refused("folded parameters would not be finite")
    return cast, _in_order(scale, terms, carrier, new)


def _float64(x: jax.Array) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def _neutral(
    scale: Polynomial, shift: Polynomial, old: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[Term]]:
    """Return parameters that make the scale 1 and terms of the shift 0, and these terms."""
    new = dict(old)
    # Factors of the scale become 1: a gain 1, a variance 1 - eps. Each parameter only once.
    in_scale: set[str] = set()
    for atom, _ in scale.terms[0][0]:
        neutral = atom.inverse(1.0)
        if atom.path in old and atom.path not in in_scale and neutral is not None:
            new[atom.path] = np.full_like(old[atom.path], neutral)
            in_scale.add(atom.path)
    if not in_scale:
        raise Refused("no parameter of the scale after it could make it 1")
    # Then terms of the shift become 0, each by a parameter that no other term has.
    terms = [term for term in shift.terms if _own(term, shift, in_scale) is not None]
    for term in terms:
        atom = _own(term, shift, in_scale)
        assert atom is not None
        zero = atom.inverse(0.0)
        if atom.path in old and zero is not None:
            new[atom.path] = np.full_like(old[atom.path], zero)
    return new, terms


def _own(term: Term, shift: Polynomial, in_scale: set[str]) -> Atom | None:
    """Return the parameter that only this term of the shift depends on, linearly."""
    paths = [_paths_of(factors) for factors, _ in shift.terms]
    for atom, p in term[0]:
        alone = sum(atom.path in own for own in paths) == 1 and atom.path not in in_scale
        if p == 1 and alone and not atom.path.startswith("\0"):  # \0 marks captured constants
            return atom
    return None


def _paths_of(factors: Factors) -> set[str]:
    return {atom.path for atom, _ in factors}


def _carrier(
    frame: _Frame, terms: list[Term], each: AffineMap, old: Mapping[str, np.ndarray]
) -> tuple[Term, Atom] | None:
    """Return the term whose parameter takes up the shift, and that parameter.

    It has the fewest factors, and a mean is taken before a bias of the layer.
    """
    scale = {atom.path for atom, _ in each.made.scale.terms[0][0]}
    found = [
        (term, atom) for term in terms if (atom := _own(term, each.made.shift, scale)) is not None
    ]
    # A parameter with an entry for each channel can take up any shift; a shared one may not.
    full = frame.sizes(old[each.kernel.path].shape, frame.channels)
    wide = [
        (term, atom)
        for term, atom in found
        if frame.sizes(old[atom.path].shape, frame.parts(atom.sliced, atom.dims)) == full
    ]
    return min(wide or found, key=lambda one: (len(one[0][0]), one[0][1] > 0), default=None)


def _carried(
    frame: _Frame,
    carrier: tuple[Term, Atom],
    shift: Polynomial,
    wanted: np.ndarray,
    new: dict[str, np.ndarray],
    value: Callable[[Polynomial, Mapping[str, np.ndarray]], np.ndarray],
) -> dict[str, np.ndarray]:
    """Return the carrier's parameter, solved for the wanted shift once the others are neutral."""
    (factors, k), own = carrier
    rest = add(shift, Polynomial(((factors, k),)), -1.0)
    assert rest is not None
    # shift = rest + times * f(own): what the carrier's term multiplies, without the carrier.
    others = tuple(pair for pair in factors if pair[0] != own)
    times = value(Polynomial(((others, k),)), new)
    entries = own.inverse((wanted - value(rest, new)) / times)
    if entries is None:
        raise Refused("no parameter of its norm could take up the shift")
    shape = new[own.path].shape
    placed = frame.stored(entries, shape, frame.parts(own.sliced, own.dims))
    return {own.path: np.broadcast_to(placed, shape)}


def _in_order(
    scale: Polynomial, terms: list[Term], carrier: tuple[Term, Atom] | None, new: Leaves
) -> tuple[str, ...]:
    """Return the paths of a norm: means, variances, gains, the bias, then a bias before it."""
    factors = scale.terms[0][0]
    spread = [atom.path for atom, power in factors if power < 0]
    gains = [atom.path for atom, power in factors if power >= 0]
    biases = [carrier[1].path] if carrier is not None else []
    means: list[str] = []
    rest: list[str] = []
    for own, k in terms:
        paths = [atom.path for atom, _ in own]
        rest += paths
        if k < 0:  # a mean is subtracted, a bias added
            means += paths
    first = [path for path in means if path not in (*spread, *gains, *biases)]
    first = first or [path for path in means if path in biases]
    return tuple(
        path for path in dict.fromkeys([*first, *spread, *gains, *biases, *rest]) if path in new
    )


def fold_batch_norm(fn: ModelFn, params: Params, *inputs: PyTree) -> Rewritten:
    r"""Fold batch norms into the kernels before them, so that the folded kernels are quantized.

    With :math:`g = \gamma / \sqrt{v + \epsilon}` the kernel becomes :math:`W g`, the norm's bias
    :math:`\beta + (c - \mu) g`, c being the layer's own bias, and the norm becomes the identity:
    mean 0, variance :math:`1 - \epsilon`, scale 1. So the same function runs the params, and its
    outputs are the same. A norm without a bias keeps :math:`(\mu - c) g` as its mean.

    The norm after each kernel is found in the function's jaxpr, so the function must be the one of
    evaluation, in which mean and variance are among ``params``. Any map :math:`y a + b` of a
    layer's outputs counts, a and b computed from parameters, however it is written:
    ``(y - mean) * (gain * rsqrt(variance + eps)) + bias`` (Flax, Haiku),
    ``y * inv + (bias - mean * inv)`` (Keras), a division by a square root, one without gain, bias
    or mean. It is folded if it is all that happens to the layer's outputs, and all that its
    parameters and the kernel are used for.

    Args:
      fn: a pure function of ``(params, *inputs)``, in evaluation mode.
      params: tree of arrays, running statistics included (``{"params": ..., "batch_stats": ...}``).
      inputs: one example of them; only shapes matter.

    Returns:
      ``Rewritten``: params of the same function. ``changed`` maps each kernel to the parameters of
      the norm that it took up, ``skipped`` says why it took up none.

    Example:
      >>> import jax.numpy as jnp
      >>> norm = {"mean": jnp.ones(2), "var": jnp.full(2, 3.0), "gain": jnp.full(2, 4.0)}
      >>> p = {"kernel": jnp.ones((1, 2)), **norm}
      >>> def fn(p, x):
      ...     return (x @ p["kernel"] - p["mean"]) / jnp.sqrt(p["var"] + 1.0) * p["gain"]
      >>> result = fold_batch_norm(fn, p, jnp.ones((1, 1)))
      >>> {name: x.reshape(-1).tolist() for name, x in result.params.items()}
      {'gain': [1.0, 1.0], 'kernel': [2.0, 2.0], 'mean': [2.0, 2.0], 'var': [0.0, 0.0]}

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877, equation 14.
    """
    leaves, rebuild = flatten(params)
    traced = trace(fn, params, *inputs)
    found = walk(traced)
    changed: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    # Each fold starts from the leaves as the folds before it left them.
    for site in traced.sites.values():
        if site.param is None or site.param in changed:
            continue
        try:
            new, changed[site.param] = _best(found, site, leaves)
            leaves |= new
        except Refused as refused:
            skipped.setdefault(site.param, str(refused))
    return Rewritten(rebuild(leaves), changed=changed, skipped=skipped)


def _best(found: Walk, site: Site, leaves: Leaves) -> tuple[dict[str, jax.Array], tuple[str, ...]]:
    """Fold the longest scale and shift possible; else raise the reason for the whole norm."""
    maps = [each for each in affine_maps(found, site) if each.made.scale.paths & leaves.keys()]
    if (why := _kernel_elsewhere(found, site)) or not maps:
        raise Refused(why or _no_norm(found, site))
    # A shorter map is folded where the last steps cannot be, such as a scale used elsewhere too.
    reasons = []
    for each in maps[::-1]:
        try:
            _check_uses(found, each)
            new, paths = folded_map(each, found.arrays, leaves)
            if fixed := sorted(found.fixed & new.keys()):
                raise Refused(
                    f"its norm depends on the present value of {fixed[0]!r}, which would change"
                )
            return new, paths
        except Refused as refused:
            reasons.append(refused)
    raise reasons[0]


def _kernel_elsewhere(found: Walk, site: Site) -> str | None:
    uses = sorted(
        use.name for use in found.uses.get(site.param or "", ()) if use.position != site.position
    )
    if uses:
        return f"it is used elsewhere too: by {', '.join(dict.fromkeys(uses))}"
    if site.position not in found.kernels:
        return (
            "the site does not see it as it is stored, or contracts in a way that is not followed"
        )
    return None


def _no_norm(found: Walk, site: Site) -> str:
    """Say what happens to what a site gives, if that is no scale by parameters."""
    maps = affine_maps(found, site)
    uses = found.goes.get(maps[-1].made.key if maps else site.position, ())
    names = ", ".join(sorted(use.name for use in uses)) or "nothing"
    after = "its outputs, shifted," if maps else "its outputs"
    what = (
        f"{after} are used {len(uses)} times, by {names}"
        if len(uses) > 1
        else f"{after} are followed by {names}"
    )
    return f"no batch norm with fixed statistics is all that follows it: {what}"


def _check_uses(found: Walk, each: AffineMap) -> None:
    """Refuse a map whose parameters are used for anything beside it."""
    for path in sorted(each.made.scale.paths | each.made.shift.paths):
        others = sorted(
            use.name
            for use in found.uses.get(path, ())
            if use.position not in each.steps or not use.step
        )
        if others:
            raise Refused(
                f"{path!r}, of the norm that follows it, is used elsewhere too: by {others[0]}"
            )
