"""Which sites of a function have their activations quantized, and how: what `activations` and integer inference agree on."""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp

from compress_jax.core.errors import NoMatchError
from compress_jax.core.paths import matches
from compress_jax.quantize._activations.quantizer import ActivationQuantizer
from compress_jax.trace._jaxpr.site import Site

How = ActivationQuantizer | Sequence[tuple[str, ActivationQuantizer | None]]
Where = str | tuple[str, ...] | None


def pairs(how: How) -> list[tuple[str, ActivationQuantizer | None]]:
    """Return the globs and quantizers in order; one quantizer alone is for all.

    Args:
      how: a quantizer, or pairs.

    Returns:
      The pairs.
    """
    return [("**", how)] if isinstance(how, ActivationQuantizer) else list(how)


def choose(site: Site, how: How, where: Where = None) -> ActivationQuantizer | str:
    """Return the quantizer of a site, or the reason why it has none.

    Args:
      site: the site.
      how: a quantizer, or pairs of a glob and a quantizer or None; the first glob that matches
        decides.
      where: a glob, or several, that must match as well; by default a parameter must be an operand,
        or a glob in ``how`` other than ``"**"`` match.

    Returns:
      The quantizer, or a reason.

    Example:
      >>> from compress_jax.quantize._activations.dynamic import dynamic
      >>> scores = Site("q@k", "dot", None, None, (2, 3), (3, 2), (2, 2), *["float32"] * 3, ((1,), (0,)))
      >>> choose(scores, dynamic())
      'a product of two activations, which is quantized only if a pattern names it'
      >>> choose(scores, dynamic(bits=4), where="*@*")
      dynamic(bits=4, symmetric=True, granularity='tensor')
    """
    if not all(
        jnp.issubdtype((site.lhs_dtype, site.rhs_dtype)[index], jnp.floating)
        for index in site.inputs.values()
    ):
        return "its activations are not floating-point numbers"
    if where is not None and not matches(where, site.name):
        return "`where` does not name it"
    for glob, quantizer in pairs(how):
        if matches(glob, site.name):
            if site.operand is None and where is None and glob == "**" and quantizer is not None:
                return "a product of two activations, which is quantized only if a pattern names it"
            return f"pattern {glob!r} leaves it as it is" if quantizer is None else quantizer
    return "no pattern matches"


def chosen(sites: Iterable[Site], how: How, where: Where = None) -> dict[str, ActivationQuantizer]:
    """Return the quantizers by site, of those that have one.

    Args:
      sites: all sites of a function.
      how: as in `choose`.
      where: as in `choose`.

    Returns:
      ``{site name: quantizer}``.

    Raises:
      NoMatchError: if a glob matches no site; it lists them.
    """
    every = {site.name: site for site in sites}
    globs = [glob for glob, _ in pairs(how) if glob != "**"]
    globs += [] if where is None else [where] if isinstance(where, str) else where
    for glob in globs:
        if not any(matches(glob, name) for name in every):
            raise NoMatchError(
                f"pattern {glob!r} matches no site. The sites are:\n  " + "\n  ".join(every)
            )
    found = {name: choose(site, how, where) for name, site in every.items()}
    return {name: each for name, each in found.items() if isinstance(each, ActivationQuantizer)}
