"""Compressions in sequence."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from compress_jax.core import arguments
from compress_jax.core.axes import Axes
from compress_jax.core.compression import (
    ByLeaf,
    Compression,
    CompressionState,
    LeafView,
    Pointwise,
    bound,
    joined,
    leaf_views,
    parts_of,
    stamped,
)
from compress_jax.core.describe import describe
from compress_jax.core.packed import Clustered, Quantized, Sum, Tabled, is_packed, nbytes, to_dense
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import Scheduled, awake, begin, schedules_of
from compress_jax.core.types import Leaf, Params, PyTree, Step

T = TypeVar("T")


def chain(*compressions: Compression) -> Compression:
    """Apply compressions one after the other, each on the view of the one before.

    ``view = view_n(... view_1(params))``, so in ``chain(prune, quantize)`` the quantizer sees
    pruned weights, and gradients flow through both. `pack` stores each leaf in the smallest form
    that reproduces the view bit for bit: for pruned and quantized weights, the codes of the
    surviving ones.

    Args:
      *compressions: in order of application.

    Returns:
      The Compression; its state holds theirs under ``"0"``, ``"1"``, ...

    Example:
      >>> import compress_jax as cj
      >>> import jax.numpy as jnp
      >>> halve, negate = cj.leafwise(lambda x, l, f: x / 2), cj.leafwise(lambda x, l, f: -x)
      >>> both = cj.chain(halve, negate)
      >>> params = {"w": jnp.array([2.0])}
      >>> both.view(params, both.init(params))["w"].tolist()
      [-1.0]
    """
    for c in compressions:
        arguments.compression("each part of a chain", c)
    return _Chain(compressions).compression()


class _Chain(NamedTuple):
    """The arguments of `chain`, and the functions of its Compression."""

    compressions: tuple[Compression, ...]

    def compression(self) -> Compression:
        update = Scheduled(self.update, schedules_of(*self.compressions), self.at_once)
        made = Compression(
            self.init,
            ByLeaf(self.view, self.leaf_views),
            update,
            self.pack,
            self.skipped,
            self.pointwise,
            bind=self.bind,
            axes=self.axes,
        )
        return stamped(made, f"chain({', '.join(map(describe, self.compressions))})")

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return _Chain(tuple(bound(c, known) for c in self.compressions)).compression()

    def states(self, state: CompressionState) -> list[CompressionState]:
        """Return the states of the compressions."""
        return parts_of(state, len(self.compressions))

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        # Each part starts from the view of those before it, which is what it sees in training.
        states = []
        for c in self.compressions:
            states.append(begin(c, params, step))
            params = c.view(params, states[-1])
        return joined(states)

    def view(self, params: Params, state: CompressionState) -> Params:
        for c, own in zip(self.compressions, self.states(state), strict=True):
            params = c.view(params, own)
        return params

    def update(self, params: Params, state: CompressionState, **inputs: PyTree) -> CompressionState:
        states = []
        for c, own in zip(self.compressions, self.states(state), strict=True):
            states.append(c.update(params, own, **inputs))
            # The view of the new state: the next part sees the masks and scales of this step.
            params = c.view(params, states[-1])
        return joined(states)

    def at_once(
        self, params: Params, state: CompressionState, **inputs: PyTree
    ) -> CompressionState:
        return _Chain(tuple(map(awake, self.compressions))).update(params, state, **inputs)

    def pack(self, params: Params, state: CompressionState) -> Params:
        # Every part packs the leaf as it sees it; what is stored must give the last part's view.
        forms = []
        for c, own in zip(self.compressions, self.states(state), strict=True):
            form = flatten(c.pack(params, own))[0]
            # What a part adds to a leaf stands beside the leaf as the parts before have packed it.
            for path, x in flatten(params)[0].items():
                if isinstance(node := form[path], Sum):
                    form[path] = node.on(_smallest(x, [each[path] for each in forms]))
            forms.append(form)
            params = c.view(params, own)
        leaves, rebuild = flatten(params)
        packed = {path: _smallest(x, [form[path] for form in forms]) for path, x in leaves.items()}
        return rebuild(packed)

    def skipped(self, params: Params) -> dict[str, str]:
        # A leaf is left alone only if every part leaves it alone.
        reasons = [c.skipped(params) for c in self.compressions]
        found = {}
        for path in flatten(params)[0]:
            if all(path in each for each in reasons):
                found[path] = "; ".join(dict.fromkeys(each[path] for each in reasons))
        return found

    def pointwise(self, params: Params, state: CompressionState) -> dict[str, Pointwise]:
        found = []
        for c, own in zip(self.compressions, self.states(state), strict=True):
            found.append((c.pointwise(params, own), c.skipped(params)))
            params = c.view(params, own)
        return {path: _in_sequence(steps) for path, steps in _of_all(params, found)}

    def leaf_views(self, params: Params, state: CompressionState) -> dict[str, LeafView]:
        found = [
            (leaf_views(c, params, own), c.skipped(params))
            for c, own in zip(self.compressions, self.states(state), strict=True)
        ]
        return {path: _views_in_sequence(steps) for path, steps in _of_all(params, found)}

    def axes(self, params: Params) -> dict[str, Axes]:
        found: dict[str, Axes] = {}
        for c in reversed(self.compressions):  # the first one that knows a leaf decides
            found |= c.axes(params)
        return found


def _of_all(
    params: Params, found: Sequence[tuple[Mapping[str, T], Mapping[str, str]]]
) -> Iterator[tuple[str, list[T]]]:
    """Yield the leaves for which every part has something, or leaves them alone.

    ``found`` holds what each part has by path, and why it skips leaves. A part that changes a leaf
    and has nothing for it takes the leaf from the whole.
    """
    for path in flatten(params)[0]:
        steps = [own[path] for own, _ in found if path in own]
        if steps and all(path in own or path in left for own, left in found):
            yield path, steps


def _in_sequence(steps: Sequence[Pointwise]) -> Pointwise:
    """Return one entry-by-entry view after the other as one."""
    fn = _InSequence(tuple((step.fn, len(step.operands)) for step in steps))
    return Pointwise(fn, tuple(operand for step in steps for operand in step.operands))


def _views_in_sequence(steps: Sequence[LeafView]) -> LeafView:
    """Return views of one leaf, each of what the one before sees, as one."""

    def fn(x: jax.Array, layers: Sequence[PyTree], shared: Sequence[PyTree]) -> jax.Array:
        for step, *own in zip(steps, layers, shared, strict=True):
            x = step.fn(x, *own)
        return x

    layers, shared = [step.layers for step in steps], [step.shared for step in steps]
    return LeafView(fn, layers, shared, min(step.stacked for step in steps))


@dataclass(frozen=True)
class _InSequence:
    """Functions in sequence; equal if they are, so that `jit` compiles once for all leaves."""

    steps: tuple[tuple[Callable[..., jax.Array], int], ...]

    def __call__(self, x: jax.Array, *operands: jax.Array) -> jax.Array:
        # The operands of all steps follow one another; each step takes the next n.
        for fn, n in self.steps:
            x = fn(x, *operands[:n])
            operands = operands[n:]
        return x


def _smallest(dense: jax.Array, forms: Sequence[Leaf]) -> Leaf:
    """Return the smallest packed form, or its nonzeros, that equals ``dense`` exactly."""
    nodes = [form for form in forms if is_packed(form)]
    # A node that a later part has masked equals the view only with those codes left out.
    sparse = [
        node.keep(dense != 0) for node in nodes if isinstance(node, (Quantized, Tabled, Clustered))
    ]
    # Bits are compared, not values: they tell -0.0 from 0.0.
    bits = np.asarray(dense).tobytes() if nodes else b""
    exact = [node for node in [*nodes, *sparse] if np.asarray(to_dense(node)).tobytes() == bits]
    return min([*exact, dense], key=nbytes)
