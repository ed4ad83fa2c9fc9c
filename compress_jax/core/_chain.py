"""Compressions in sequence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from compress_jax.core import arguments
from compress_jax.core.axes import Axes
from compress_jax.core.compression import (
    Compression,
    CompressionState,
    Pointwise,
    bound,
    joined,
    parts_of,
    stamped,
)
from compress_jax.core.describe import describe
from compress_jax.core.packed import Clustered, Quantized, Tabled, is_packed, nbytes, to_dense
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import Scheduled, awake, begin, schedules_of
from compress_jax.core.types import Params, PyTree, Step


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

    def init(params: Params, *, step: Step = 0) -> CompressionState:
        states = []
        for c in compressions:
            states.append(begin(c, params, step))
            params = c.view(params, states[-1])
        return joined(states)

    def views(params: Params, state: CompressionState) -> list[Params]:
        seen = [params]
        for c, s in zip(compressions, parts_of(state, len(compressions)), strict=True):
            seen.append(c.view(seen[-1], s))
        return seen

    def update(params: Params, state: CompressionState, **inputs: PyTree) -> CompressionState:
        states = []
        for c, s in zip(compressions, parts_of(state, len(compressions)), strict=True):
            states.append(c.update(params, s, **inputs))
            params = c.view(params, states[-1])
        return joined(states)

    def pack(params: Params, state: CompressionState) -> Params:
        *inputs, final = views(params, state)
        stages = zip(compressions, inputs, parts_of(state, len(compressions)), strict=True)
        forms = [flatten(c.pack(seen, s))[0] for c, seen, s in stages]
        leaves, rebuild = flatten(final)
        return rebuild(
            {path: _smallest(x, [form[path] for form in forms]) for path, x in leaves.items()}
        )

    def skipped(params: Params) -> dict[str, str]:
        reasons = [c.skipped(params) for c in compressions]
        everywhere = [path for path in flatten(params)[0] if all(path in r for r in reasons)]
        return {path: "; ".join(dict.fromkeys(r[path] for r in reasons)) for path in everywhere}

    def pointwise(params: Params, state: CompressionState) -> dict[str, Pointwise]:
        stages = zip(
            compressions, views(params, state), parts_of(state, len(compressions)), strict=False
        )
        found = [(c.pointwise(seen, s), c.skipped(params)) for c, seen, s in stages]
        leaves = [
            path
            for path in flatten(params)[0]
            if all(path in own or path in left for own, left in found)
        ]
        through = {path: [own[path] for own, _ in found if path in own] for path in leaves}
        return {path: _in_sequence(steps) for path, steps in through.items() if steps}

    def axes(params: Params) -> dict[str, Axes]:
        return {path: each for c in reversed(compressions) for path, each in c.axes(params).items()}

    def bind(known: Mapping[str, Axes]) -> Compression:
        return chain(*(bound(c, known) for c in compressions))

    def at_once(params: Params, state: CompressionState, **inputs: PyTree) -> CompressionState:
        return chain(*map(awake, compressions)).update(params, state, **inputs)

    last = lambda params, state: views(params, state)[-1]  # noqa: E731
    scheduled = Scheduled(update, schedules_of(*compressions), at_once)
    call = f"chain({', '.join(map(describe, compressions))})"
    return stamped(
        Compression(init, last, scheduled, pack, skipped, pointwise, bind=bind, axes=axes), call
    )


def _in_sequence(steps: Sequence[Pointwise]) -> Pointwise:
    """Return one entry-by-entry view after the other as one."""
    fn = _InSequence(tuple((step.fn, len(step.operands)) for step in steps))
    return Pointwise(fn, tuple(operand for step in steps for operand in step.operands))


@dataclass(frozen=True)
class _InSequence:
    """Functions in sequence; equal if they are, so that `jit` compiles once for all leaves."""

    steps: tuple[tuple[Callable[..., Any], int], ...]

    def __call__(self, x: Any, *operands: Any) -> Any:
        for fn, n in self.steps:
            x = fn(x, *operands[:n])
            operands = operands[n:]
        return x


def _smallest(dense: jax.Array, forms: Sequence[Any]) -> Any:
    """Return the smallest packed form, or its nonzeros, that equals ``dense`` exactly."""
    nodes = [form for form in forms if is_packed(form)]
    sparse = [
        node.keep(dense != 0) for node in nodes if isinstance(node, (Quantized, Tabled, Clustered))
    ]
    bits = np.asarray(dense).tobytes() if nodes else b""  # comparing bits tells -0.0 from 0.0
    exact = [node for node in [*nodes, *sparse] if np.asarray(to_dense(node)).tobytes() == bits]
    return min([*exact, dense], key=nbytes)
