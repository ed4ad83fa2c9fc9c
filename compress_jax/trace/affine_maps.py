"""Scales and shifts by parameters that follow a site: recognised by what is computed, however it is written."""

from dataclasses import dataclass

from compress_jax.trace.affine_walk import Mapped, Walk
from compress_jax.trace.polynomials import Atom
from compress_jax.trace.site import Position, Site


@dataclass(frozen=True)
class AffineMap:
    """A scale and shift that follows a site directly, as far as nothing else happens to what it is made of.

    Attributes:
      kernel: the site's parameter, as the site sees it.
      made: the value, y a + b.
      steps: positions of the equations that it consists of.
    """

    kernel: Atom
    made: Mapped
    steps: frozenset[Position]


def affine_maps(found: Walk, site: Site) -> list[AffineMap]:
    """Return the scales and shifts that follow a site, each one step longer than the one before.

    Each is all that happens to what the site gives, up to there.

    Args:
      found: by `walk`.
      site: the site.

    Returns:
      The maps, the shortest first; none if it does not see its parameter as it is stored.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace.affine_walk import walk
      >>> from compress_jax.trace.traced import trace
      >>> params = {"kernel": jnp.ones((3, 2)), "gain": jnp.ones(2), "bias": jnp.ones(2)}
      >>> traced = trace(lambda p, x: jnp.tanh((x @ p["kernel"] + p["bias"]) * p["gain"]), params, jnp.ones((1, 3)))
      >>> last = affine_maps(walk(traced), next(iter(traced.sites.values())))[-1]
      >>> sorted(last.made.scale.paths), sorted(last.made.shift.paths)
      (['gain'], ['bias', 'gain'])
    """
    if site.position not in found.values or site.position not in found.kernels:
        return []
    maps, here, steps = [], site.position, []
    following = {parent: key for key, (_, parent) in found.values.items() if parent is not None}
    while (following.get(here) is not None) and len(found.goes.get(here, ())) == 1:
        (use,) = found.goes[here]
        if not use.step or use.position not in found.values or found.values[use.position][1] != here:
            break
        here = use.position
        steps.append(here)
        maps.append(AffineMap(found.kernels[site.position], found.values[here][0], frozenset(steps)))
    return maps
