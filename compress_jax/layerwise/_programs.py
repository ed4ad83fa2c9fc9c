"""Blocks as compiled programs: their outputs and the statistics of their sites.

Blocks that are alike (the layers of a decoder) share one program: compiling would take longer than
running it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from compress_jax.core.types import Array, Leaves, PyTree
from compress_jax.trace import Calibration, Reducer, Segment, Site, gram, observe, sites
from compress_jax.trace._jaxpr.same_program import same_program
from compress_jax.trace._statistics.calibration import Gram
from compress_jax.trace._statistics.reducer import Table, windows

Values: TypeAlias = tuple[Array, ...]
"""What crosses a cut, or the leaves of one batch."""

Numbers: TypeAlias = tuple[int, ...]
Sums: TypeAlias = dict[int, dict[str, PyTree]]
"""``{number of a site: {name: {"input": sums}}}``."""

DIFFERENCES = ("cross", "residual")
MERGE = gram().merge


class _Compiled:
    """The programs of the first of several blocks that are alike; leaves are given in its order."""

    def __init__(
        self, part: Segment, names: Sequence[str], reducers: Mapping[str, Reducer]
    ) -> None:
        self.part = part
        self.names = names
        self.reducers = reducers
        self.run = jax.jit(self._run)
        self.measure = jax.jit(self._measure, static_argnames="numbers")
        self.compare = jax.jit(self._compare, static_argnames=("numbers", "normalize"))
        self.merge = jax.jit(self._merge)

    def _run(self, leaves: Sequence[Array], values: Values) -> Values:
        return self.part.run(dict(zip(self.part.paths, leaves, strict=True)), *values)

    def _observed(
        self,
        reduce: Callable[..., PyTree],
        leaves: Sequence[Array],
        values: Values,
        numbers: Numbers,
    ) -> dict[int, PyTree]:
        chosen = {self.names[i]: i for i in numbers}
        observed = observe(self.part.run, reduce, tuple(chosen))
        found = observed(dict(zip(self.part.paths, leaves, strict=True)), *values)[1]
        return {chosen[name]: statistics for name, statistics in found.items()}

    def _measure(self, leaves: Sequence[Array], values: Values, numbers: Numbers) -> Sums:
        """Return ``{number: {name of a reducer: its statistics}}`` of one batch."""

        def reduce(site: Site, lhs: jax.Array, rhs: jax.Array) -> PyTree:
            return {name: each(site, lhs, rhs) for name, each in self.reducers.items()}

        return self._observed(Reducer(reduce, self._merged), leaves, values, numbers)

    def _merge(self, old: Sums, new: Sums) -> Sums:
        return {i: self._merged(old[i], new[i]) for i in old}

    def _merged(self, old: dict[str, PyTree], new: dict[str, PyTree]) -> dict[str, PyTree]:
        return {name: each.merge(old[name], new[name]) for name, each in self.reducers.items()}

    def _compare(
        self,
        leaves: Sequence[Array],
        values: Values,
        exact: Values,
        numbers: Numbers,
        normalize: bool,
    ) -> Sums:
        """Return sums over the inputs of sites and how they differ from the exact ones."""
        laid_out: dict[int, Callable[..., Table]] = {}

        def reduce(site: Site, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            index = site.inputs["input"]
            laid_out[self.names.index(site.name)] = partial(windows, site, index)
            return (lhs, rhs)[index]

        ours = self._observed(reduce, leaves, values, numbers)
        theirs = self._observed(reduce, leaves, exact, numbers)
        found = {}
        for i, lay in laid_out.items():
            found[i] = _differences(lay(ours[i]), lay(theirs[i]), normalize)
        return found


def _differences(x: Table, exact: Table, normalize: bool) -> dict[str, PyTree]:
    r"""Return :math:`X^\top (X - X_f)` and :math:`(X - X_f)^\top (X - X_f)`.

    Rows are weighted by the inverse of their mean square in X, if asked.
    """
    columns = tuple(range(x.values.ndim - x.columns, x.values.ndim))
    scale = jnp.float32(1.0)
    if normalize:
        square = jnp.square(x.values).mean(columns, keepdims=True)
        scale = jnp.where(square > 0, jax.lax.rsqrt(square), 0.0)
    ours = x.values * scale
    missing = ours - exact.values * scale
    batch = tuple(range(x.batch))
    product = partial(
        jax.lax.dot_general,
        dimension_numbers=((x.rows, x.rows), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return {
        "cross": {"input": Gram(x.flat(product(ours, missing), 2), x.count)},
        "residual": {"input": Gram(x.flat(product(missing, missing), 2), x.count)},
    }


class BlockProgram(NamedTuple):
    """The programs of one block, under its own names.

    Attributes:
      part: the block.
      sites: its contractions.
      compiled: the programs, made for the first block that is alike.
    """

    part: Segment
    sites: tuple[Site, ...]
    compiled: _Compiled

    def outputs(self, leaves: Leaves, values: Values) -> Values:
        """Return what the block gives to the next."""
        return self.compiled.run([leaves[path] for path in self.part.paths], values)

    def numbers(self, paths: Iterable[str]) -> Numbers:
        """Return the numbers of the sites that use some leaves."""
        own = set(paths)
        return tuple(i for i, site in enumerate(self.sites) if own & {site.param, *site.also})

    def statistics(
        self, leaves: Leaves, batches: Sequence[Values], numbers: Numbers
    ) -> dict[str, Calibration]:
        """Return ``{name of a reducer: statistics of some sites}``."""
        given = [leaves[path] for path in self.part.paths]
        total: Sums | None = None
        for values in batches if numbers else ():
            new = self.compiled.measure(given, values, numbers=numbers)
            total = new if total is None else self.compiled.merge(total, new)
        finish = {name: each.finish for name, each in self.compiled.reducers.items()}
        return {name: self._named(total or {}, name, each) for name, each in finish.items()}

    def differences(
        self,
        leaves: Leaves,
        batches: Sequence[Values],
        exact: Sequence[Values],
        numbers: Numbers,
        normalize: bool,
    ) -> dict[str, Calibration]:
        r"""Return sums over inputs X and the exact ones; those of sites in loops are left out.

        ``"cross"`` has :math:`X^\top (X - X_f)`, ``"residual"``
        :math:`(X - X_f)^\top (X - X_f)`.
        """
        numbers = tuple(i for i in numbers if not self.sites[i].loops)
        given = [leaves[path] for path in self.part.paths]
        total: Sums | None = None
        for values, theirs in zip(batches, exact, strict=True) if numbers else ():
            new = self.compiled.compare(given, values, theirs, numbers=numbers, normalize=normalize)
            if total is not None:
                for i, own in new.items():
                    new[i] = {name: MERGE(total[i][name], own[name]) for name in own}
            total = new
        return {name: self._named(total or {}, name, lambda x: x) for name in DIFFERENCES}

    def _named(self, total: Sums, name: str, finish: Callable[[PyTree], PyTree]) -> Calibration:
        own = {self.sites[i].name: finish(each[name]) for i, each in total.items()}
        return Calibration(own, {self.sites[i].name: self.sites[i] for i in total})


def added(one: Calibration, other: Calibration) -> Calibration:
    """Return the statistics of two sets of batches together: sums of outer products add up."""
    return Calibration({site: MERGE(one[site], other[site]) for site in one}, one.sites)


class Programs:
    """The programs of all blocks.

    Args:
      reducers: what is measured, by name.
    """

    def __init__(self, reducers: Mapping[str, Reducer]) -> None:
        """Start without any."""
        self.reducers = reducers
        self.known: list[tuple[ClosedJaxpr, _Compiled]] = []

    def of(self, part: Segment, leaves: Leaves, values: Values) -> BlockProgram:
        """Return the programs of a block; those of an earlier one, if it is the same program."""
        given = [leaves[path] for path in part.paths]

        def run(given: Sequence[jax.Array], values: Values) -> Values:
            return part.run(dict(zip(part.paths, given, strict=True)), *values)

        jaxpr = jax.make_jaxpr(run)(given, values)
        own = tuple(sites(part.run, dict(zip(part.paths, given, strict=True)), *values))
        for other, compiled in self.known:
            if same_program(jaxpr, other):
                return BlockProgram(part, own, compiled)
        compiled = _Compiled(part, [site.name for site in own], self.reducers)
        self.known.append((jaxpr, compiled))
        return BlockProgram(part, own, compiled)
