"""Finished statistics of many batches, by site: what the post-training solvers start from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from compress_jax.core.errors import NoMatchError, StateError
from compress_jax.trace._jaxpr.site import Site


class Gram(NamedTuple):
    """Sums of outer products.

    Attributes:
      gram: float32 ``[*batch, k, k]``, not divided by ``count``.
      count: rows in each sum, int32.
    """

    gram: jax.Array
    count: jax.Array


@dataclass(frozen=True)
class Calibration(Mapping[str, Any]):
    """Finished statistics by the names of sites, with the sites themselves: what the post-training solvers start from.

    Attributes:
      statistics: ``{site name: statistics}``.
      sites: ``{site name: site}``: which parameter it is, and which of its axes are summed over.
      left_out: ``{site name: why it has no statistics}``.
    """

    statistics: dict[str, Any]
    sites: dict[str, Site]
    left_out: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """Return the statistics of a site."""
        if name in self.left_out:
            raise NoMatchError(f"site {name!r} has no statistics: {self.left_out[name]}")
        if name not in self.statistics:
            raise NoMatchError(
                f"no site named {name!r} was observed; there are: "
                f"{', '.join(self.statistics) or 'none'}"
            )
        return self.statistics[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the sites."""
        return iter(self.statistics)

    def __len__(self) -> int:
        """Return how many sites there are."""
        return len(self.statistics)


def require(calibration: Any, kind: type, reducer: str) -> None:
    """Refuse statistics that are not those a solver reads.

    Args:
      calibration: what the solver was given.
      kind: what it needs of each input.
      reducer: how such statistics are made.

    Raises:
      StateError: if they are others; it says how to make the right ones.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace import calibrate
      >>> from compress_jax.trace.reducers import absmax
      >>> seen = calibrate(lambda w, x: x @ w["kernel"], absmax(), {"kernel": jnp.ones((2, 3))}, [jnp.ones((4, 2))])
      >>> require(seen, jax.Array, "absmax()")
    """
    how = f"make them with trace.calibrate(fn, trace.{reducer}, params, batches)"
    if not isinstance(calibration, Calibration):
        raise StateError(
            f"calibration is a {type(calibration).__name__}, not the statistics of sites; {how}"
        )
    for name, site in calibration.sites.items():
        if site.param is None:
            continue
        seen = (
            calibration[name].get("input")
            if isinstance(calibration[name], Mapping)
            else calibration[name]
        )
        if not isinstance(seen, kind):
            raise StateError(
                f"the statistics of site {name!r} are {type(seen).__name__}, and {kind.__name__} "
                f"is needed; {how}"
            )
