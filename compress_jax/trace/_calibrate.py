"""Statistics of many batches, one batch at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from compress_jax.core.errors import DataError, NoMatchError, StateError
from compress_jax.trace._observe import observe
from compress_jax.trace.reducer import Reducer
from compress_jax.trace.site import Site
from compress_jax.trace.traced import trace


@dataclass(frozen=True)
class Calibration(Mapping[str, Any]):
    """Finished statistics by the names of sites, with the sites themselves: what the post-training solvers start from.

    Attributes:
      statistics: ``{site name: statistics}``.
      sites: ``{site name: site}``: which parameter it is, and which of its axes are summed over.
    """

    statistics: dict[str, Any]
    sites: dict[str, Site]

    def __getitem__(self, name: str) -> Any:
        """Return the statistics of a site."""
        if name not in self.statistics:
            raise NoMatchError(f"no site named {name!r} was observed; there are: {', '.join(self.statistics) or 'none'}")
        return self.statistics[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the sites."""
        return iter(self.statistics)

    def __len__(self) -> int:
        """Return how many sites there are."""
        return len(self.statistics)


def calibrate(
    fn: Callable[..., Any], reduce: Reducer, params: Any, batches: Iterable[Any], where: str | tuple[str, ...] | None = None
) -> Calibration:
    """Return the finished statistics of many batches; memory does not grow with their number.

    Args:
      fn: a pure function of params and one batch.
      reduce: what to observe.
      params: tree of arrays.
      batches: what ``fn`` takes after params, one after the other; a tuple is several arguments.
      where: a glob, or several, over the names of sites; by default all.

    Returns:
      ``{site name: reduce.finish(statistics)}``, with the sites.

    Raises:
      DataError: if there is no batch.
      NoMatchError: if no site's name matches ``where``.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace.reducers import absmax
      >>> batches = [jnp.ones((4, 2)), -2 * jnp.ones((4, 2))]
      >>> ranges = calibrate(lambda params, x: x @ params["kernel"], absmax(), {"kernel": jnp.ones((2, 3))}, batches)
      >>> float(ranges["kernel"]["input"]), ranges.sites["kernel"].param_axes
      (2.0, (0,))
    """
    seen = observe(fn, reduce, where)

    @jax.jit
    def first(params: Any, inputs: tuple[Any, ...]) -> dict[str, Any]:
        return seen(params, *inputs)[1]

    @jax.jit
    def following(total: dict[str, Any], params: Any, inputs: tuple[Any, ...]) -> dict[str, Any]:
        return {site: reduce.merge(total[site], new) for site, new in first(params, inputs).items()}

    total, sites = None, {}
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        if total is None:
            total = first(params, inputs)
            sites = {site.name: site for site in trace(fn, params, *inputs).choose(where).values()}
        else:
            total = following(total, params, inputs)
    if total is None:
        raise DataError("there is no batch to calibrate with")
    return Calibration({site: reduce.finish(statistics) for site, statistics in total.items()}, sites)


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
      >>> from compress_jax.trace.reducers import absmax
      >>> seen = calibrate(lambda w, x: x @ w["kernel"], absmax(), {"kernel": jnp.ones((2, 3))}, [jnp.ones((4, 2))])
      >>> require(seen, jax.Array, "absmax()")
    """
    how = f"make them with trace.calibrate(fn, trace.{reducer}, params, batches)"
    if not isinstance(calibration, Calibration):
        raise StateError(f"calibration is a {type(calibration).__name__}, not the statistics of sites; {how}")
    for name, site in calibration.sites.items():
        if site.param is None:
            continue
        seen = calibration[name].get("input") if isinstance(calibration[name], Mapping) else calibration[name]
        if not isinstance(seen, kind):
            raise StateError(
                f"the statistics of site {name!r} are {type(seen).__name__}, and {kind.__name__} is needed; {how}"
            )
