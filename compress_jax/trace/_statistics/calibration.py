"""Finished statistics of many batches, by site: the input of the post-training solvers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from compress_jax.core.errors import NoMatchError, StateError
from compress_jax.core.types import PyTree
from compress_jax.trace._jaxpr.site import Site


class Gram(NamedTuple):
    """Sums of outer products.

    Attributes:
      gram: float32 ``[*batch, k, k]``, not divided by ``count``.
      count: rows in each sum, int32.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> observed = cj.trace.observe(fn, cj.trace.gram())
      >>> _, found = observed({"kernel": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0], [0.0, 1.0]]))
      >>> [x.tolist() for x in found["kernel"]["input"]]
      [[[1.0, 2.0], [2.0, 5.0]], 2]
    """

    gram: jax.Array
    count: jax.Array


@dataclass(frozen=True)
class Calibration(Mapping[str, PyTree]):
    """Finished statistics by the names of sites; a mapping.

    Attributes:
      statistics: ``{site name: statistics}``.
      sites: ``{site name: site}``: which parameter it is, and which of its axes are summed over.
      left_out: ``{site name: why it has no statistics}``.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> batches = [jnp.ones((4, 2)), -2 * jnp.ones((4, 2))]
      >>> absmax = cj.trace.reducers.absmax()
      >>> found = cj.trace.calibrate(fn, absmax, {"kernel": jnp.ones((2, 3))}, batches)
      >>> list(found), float(found["kernel"]["input"]), found.sites["kernel"].kind
      (['kernel'], 2.0, 'dot')
    """

    statistics: dict[str, PyTree]
    sites: dict[str, Site]
    left_out: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> PyTree:
        """Return the statistics of a site."""
        # The site exists: say why it has no statistics.
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


def require(calibration: object, kind: type, reducer: str) -> None:
    """Raise unless the statistics are of the kind that a solver reads.

    Args:
      calibration: argument of the solver.
      kind: class of the statistics that it needs of each input.
      reducer: the reducer that makes them, as it is called.

    Raises:
      StateError: if they are of another kind; the message says how to make the right ones.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> absmax = cj.trace.reducers.absmax()
      >>> found = cj.trace.calibrate(fn, absmax, {"kernel": jnp.ones((2, 3))}, [jnp.ones((4, 2))])
      >>> require(found, jax.Array, "absmax()")
    """
    how = f"make them with trace.calibrate(fn, trace.{reducer}, params, batches)"
    if not isinstance(calibration, Calibration):
        raise StateError(
            f"calibration is a {type(calibration).__name__}, not the statistics of sites; {how}"
        )
    for name, site in calibration.sites.items():
        # Solvers read the sites of parameters only; attention scores may hold anything.
        if site.param is None:
            continue
        statistics = calibration[name]
        # Reducers that measure each input return {"input": statistics} beside a parameter.
        if isinstance(statistics, Mapping):
            statistics = statistics.get("input")
        if not isinstance(statistics, kind):
            raise StateError(
                f"the statistics of site {name!r} are {type(statistics).__name__}, and "
                f"{kind.__name__} is needed; {how}"
            )
