"""Which sites of a function have their activations quantized, and how.

`activations`, integer inference and the exporters agree on it through these functions.
"""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp

from compress_jax.core.errors import NoMatchError
from compress_jax.core.paths import matches
from compress_jax.quantize._activations.quantizer import ActivationQuantizer
from compress_jax.trace._jaxpr.site import Site

QuantizerRules = ActivationQuantizer | Sequence[tuple[str, ActivationQuantizer | None]]
"""One quantizer for all sites, or pairs of a glob over site names and a quantizer or None."""

SitePatterns = str | tuple[str, ...] | None
"""A glob over site names, or several; None for the sites with a parameter as an operand."""


def pattern_pairs(how: QuantizerRules) -> list[tuple[str, ActivationQuantizer | None]]:
    """Return the globs and quantizers in order; one quantizer alone is for all sites.

    Args:
      how: a quantizer, or pairs.

    Returns:
      The pairs.
    """
    return [("**", how)] if isinstance(how, ActivationQuantizer) else list(how)


def match_site(
    site: Site, how: QuantizerRules, where: SitePatterns = None
) -> ActivationQuantizer | str:
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
      >>> float32 = ["float32"] * 3
      >>> scores = Site("q@k", "dot", None, None, (2, 3), (3, 2), (2, 2), *float32, ((1,), (0,)))
      >>> match_site(scores, dynamic())
      'a product of two activations, which is quantized only if a pattern names it'
      >>> match_site(scores, dynamic(bits=4), where="*@*")
      dynamic(bits=4, symmetric=True, granularity='tensor')
    """
    dtypes = (site.lhs_dtype, site.rhs_dtype)
    # Integer activations are exact as they are.
    if not all(jnp.issubdtype(dtypes[index], jnp.floating) for index in site.inputs.values()):
        return "its activations are not floating-point numbers"
    if where is not None and not matches(where, site.name):
        return "`where` does not name it"
    for glob, quantizer in pattern_pairs(how):
        if not matches(glob, site.name):
            continue
        # The first glob that matches decides.
        if quantizer is None:
            return f"pattern {glob!r} leaves it as it is"
        if site.operand is None and where is None and glob == "**":
            return "a product of two activations, which is quantized only if a pattern names it"
        return quantizer
    return "no pattern matches"


def match_sites(
    sites: Iterable[Site], how: QuantizerRules, where: SitePatterns = None
) -> dict[str, ActivationQuantizer]:
    """Return the quantizers by site, of the sites that have one.

    Args:
      sites: all sites of a function.
      how: as in `match_site`.
      where: as in `match_site`.

    Returns:
      ``{site name: quantizer}``.

    Raises:
      NoMatchError: if a glob matches no site; the message lists the sites.
    """
    by_name = {site.name: site for site in sites}
    # A misspelled glob must not leave a site in floats silently; "**" may match nothing.
    globs = [glob for glob, _ in pattern_pairs(how) if glob != "**"]
    if where is not None:
        globs += [where] if isinstance(where, str) else where
    for glob in globs:
        if not any(matches(glob, name) for name in by_name):
            raise NoMatchError(
                f"pattern {glob!r} matches no site. The sites are:\n  " + "\n  ".join(by_name)
            )
    found = {name: match_site(site, how, where) for name, site in by_name.items()}
    return {name: each for name, each in found.items() if isinstance(each, ActivationQuantizer)}
