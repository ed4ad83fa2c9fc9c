"""A compression of a few leaves of a tree: their view and state, without touching the others."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Never

import jax

from compress_jax.core.compression import Compression, CompressionState, Pointwise
from compress_jax.core.errors import ArgumentError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Array, Leaf, Leaves, Params, PyTree
from compress_jax.trace._jaxpr.outputs import Outputs


class Place(NamedTuple):
    """Where the operands of a leaf's grid are among all operands.

    Attributes:
      fn: the grid, as in `Pointwise`.
      outputs: their numbers.
    """

    fn: Callable[..., jax.Array]
    outputs: range


class Restricted:
    """The functions of a compression, traced once, and computed for the leaves that are asked for.

    State stays that of the whole tree, so nothing has to be put together in the end. An array of
    the state belongs to a leaf if `init` makes it of that leaf alone; the others (steps, masks made
    elsewhere, a threshold over all leaves) are held still.

    Args:
      compression: bound to the layouts of the leaves.
      params: the tree.
      state: of the compression.
    """

    def __init__(self, compression: Compression, params: Params, state: CompressionState) -> None:
        """Trace `init`, `view` and `pointwise`."""
        self.compression = compression
        self.leaves, self.rebuild = flatten(params)
        self.skipped = compression.skipped(params)
        self.paths = [path for path in self.leaves if path not in self.skipped]
        self.values, self.structure = jax.tree.flatten(state)
        given = self._arrays({})
        self.inits, self.owners = self._traced_init(given)
        # Scalars that belong to no leaf stay known, as some functions ask for them (`between`).
        self.variable = [i for i, x in enumerate(self.values) if i in self.owners or x.ndim]
        own = [self.values[i] for i in self.variable]
        self.views = Outputs(self._view, given, own)
        self.places: dict[str, Place] = {}
        self.operands = Outputs(self._operands, given, own)

    def mixed(self) -> str | None:
        """Return a leaf whose view depends on other leaves; None if there is none."""
        names = self._names()
        for i, path in enumerate(self.paths):
            needed = [each for each in self.views.needed([i]) if each < len(names)]
            if any(names[each] != path for each in needed):
                return path
        return None

    def to(self, paths: Collection[str], state: CompressionState) -> Compression:
        """Return the compression of some leaves, given as ``{path: leaf}``.

        Its states are those of the whole tree; `init` starts from the one given here.
        """
        own = [path for path in self.paths if path in paths]

        def init(params: Params) -> CompressionState:
            return self._init(own, flatten(params)[0], state)

        def view(params: Params, state: CompressionState) -> Params:
            leaves, rebuild = flatten(params)
            numbers = [self.paths.index(path) for path in own if path in leaves]
            found = self.views.run(numbers, self._inputs(leaves, state))
            viewed = {self.paths[i]: x for i, x in zip(numbers, found, strict=True)}
            return rebuild({**leaves, **viewed})

        def pointwise(params: Params, state: CompressionState) -> dict[str, Pointwise]:
            leaves = flatten(params)[0]
            return self._pointwise([path for path in own if path in leaves], leaves, state)

        return Compression(
            init, view, _whole, _whole, pointwise=pointwise, call=self.compression.call
        )

    def _traced_init(self, given: Sequence[Array]) -> tuple[Outputs, dict[int, str]]:
        """Trace `init`; tell of which one leaf it makes each array of the state."""
        structure = None

        def init(given: Sequence[jax.Array]) -> list[jax.Array]:
            nonlocal structure
            made, structure = jax.tree.flatten(self.compression.init(self._tree(given)))
            return made

        traced = Outputs(init, given)
        # A state that was made otherwise (by an update, by hand) is taken as it is.
        if structure != self.structure:
            return traced, {}
        names = self._names()
        owners = {}
        for i in range(len(self.values)):
            needed = {names[each] for each in traced.needed([i])}
            if len(needed) == 1:
                owners[i] = needed.pop()
        return traced, owners

    def _init(
        self, own: Collection[str], leaves: Leaves, state: CompressionState
    ) -> CompressionState:
        numbers = [i for i, path in self.owners.items() if path in own and path in leaves]
        values = jax.tree.leaves(state)
        made = self.inits.run(numbers, dict(enumerate(self._arrays(leaves))))
        for i, x in zip(numbers, made, strict=True):
            values[i] = x
        return jax.tree.unflatten(self.structure, values)

    def _pointwise(
        self, own: Sequence[str], leaves: Leaves, state: CompressionState
    ) -> dict[str, Pointwise]:
        places = {path: self.places[path] for path in own if path in self.places}
        numbers = [i for place in places.values() for i in place.outputs]
        found = iter(self.operands.run(numbers, self._inputs(leaves, state)))
        return {
            path: Pointwise(place.fn, tuple(next(found) for _ in place.outputs))
            for path, place in places.items()
        }

    # What is traced: functions of the arrays of all leaves, and of those of the state that belong
    # to leaves.

    def _view(self, given: Sequence[jax.Array], own: Sequence[jax.Array]) -> list[jax.Array]:
        viewed = flatten(self.compression.view(self._tree(given), self._state(own)))[0]
        return [viewed[path] for path in self.paths]

    def _operands(self, given: Sequence[jax.Array], own: Sequence[jax.Array]) -> list[jax.Array]:
        found: list[jax.Array] = []
        pointwise = self.compression.pointwise(self._tree(given), self._state(own))
        for path, (fn, operands) in pointwise.items():
            self.places[path] = Place(fn, range(len(found), len(found) + len(operands)))
            found += operands
        return found

    def _inputs(self, leaves: Leaves, state: CompressionState) -> dict[int, Array]:
        values = jax.tree.leaves(state)
        return dict(enumerate([*self._arrays(leaves), *(values[i] for i in self.variable)]))

    def _names(self) -> list[str]:
        """Return the path of each array of the leaves; a packed node has several."""
        return [path for path, leaf in self.leaves.items() for _ in jax.tree.leaves(leaf)]

    def _arrays(self, new: Leaves) -> list[Array]:
        """Return the arrays of all leaves, some of which are new."""
        leaves = [new.get(path, leaf) for path, leaf in self.leaves.items()]
        return [x for leaf in leaves for x in jax.tree.leaves(leaf)]

    def _tree(self, given: Sequence[Array]) -> Params:
        structure = jax.tree.structure(list(self.leaves.values()))
        leaves: list[Leaf] = jax.tree.unflatten(structure, given)
        return self.rebuild(dict(zip(self.leaves, leaves, strict=True)))

    def _state(self, own: Sequence[Array]) -> CompressionState:
        values = list(self.values)
        for i, x in zip(self.variable, own, strict=True):
            values[i] = x
        return jax.tree.unflatten(self.structure, values)


def _whole(params: Params, state: CompressionState, **_: PyTree) -> Never:
    raise ArgumentError(
        "while a block is solved its compression has no `update` and no `pack`: a solver takes "
        "`init`, `view` and `pointwise`"
    )
