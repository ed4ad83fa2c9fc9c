"""Find where the blocks of a function lie in its trace: what goes into each, and what comes out.

A block takes a value (the residual stream) to one of the same shape. It is an iteration of a scan
over stacked leaves, or the leaves that a name has in common: ``layer_3/...``.
"""

import itertools
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, Var

from compress_jax.core.errors import ShapeError
from compress_jax.core.packed import is_packed
from compress_jax.core.paths import Patterns, flatten
from compress_jax.core.types import ModelFn, Params, PyTree, Shape
from compress_jax.trace._jaxpr.evaluate import bind
from compress_jax.trace._jaxpr.find_sites import trace
from compress_jax.trace._jaxpr.primitives import (
    CASTS,
    ELEMENTWISE,
    JITS,
    SUMS,
    Scan,
    kind,
    nested,
)
from compress_jax.trace._jaxpr.segments import named_blocks

ALONE = "no other block has leaves like its own"


class Block(NamedTuple):
    """A part of a function that may be skipped.

    Attributes:
      name: what its leaves have in common, with the number of the iteration in a scan.
      paths: its leaves; those of a scan are stacked.
      iteration: of a scan; None outside.
      reason: why it cannot be skipped; empty if it can.

    Example:
      >>> import compress_jax as cj
      >>> cj.trace.Block("layer_0", ("layer_0/w",), None).reason
      ''
    """

    name: str
    paths: tuple[str, ...]
    iteration: int | None
    reason: str = ""


class Span(NamedTuple):
    """Where a block lies.

    Attributes:
      ends: the values before and after it, outside loops.
      loop: the equation of its scan.
    """

    ends: tuple[Var, Var] | None = None
    loop: int | None = None


@dataclass(frozen=True)
class Plan:
    """A trace with its blocks.

    Attributes:
      jaxpr: without the jits that take leaves.
      owners: the path of each variable that is a leaf.
      found: the blocks.
      spans: where each lies, in the same order.
      out: the tree of what the function returns.
    """

    jaxpr: ClosedJaxpr
    owners: dict[Var, str]
    found: tuple[Block, ...]
    spans: tuple[Span, ...]
    out: PyTree


def planned(
    fn: ModelFn, params: Params, inputs: Sequence[PyTree], patterns: Sequence[Patterns] | None
) -> Plan:
    """Trace a function, and find its blocks."""
    packed = [path for path, x in flatten(params)[0].items() if is_packed(x)]
    if packed:
        raise ShapeError(f"{packed[0]} is packed: find blocks in unpack(params)")
    traced = trace(fn, params, *inputs)
    flat = [*traced.params.values(), *jax.tree.leaves(list(inputs))]
    count = len(traced.params)
    jaxpr = jax.make_jaxpr(lambda *flat: _inlined(traced.jaxpr, flat, range(count)))(*flat)
    owners = dict(zip(jaxpr.jaxpr.invars, traced.params, strict=False))
    shapes = {path: np.shape(x) for path, x in traced.params.items()}
    flow = _Flow(jaxpr, owners)
    loops = _iterations(flow)
    stacked = {path for _, block, _ in loops for path in block.paths}
    named = named_blocks(list(shapes), patterns)
    single = {path: name for path, name in named.items() if path not in stacked}
    pairs = [*loops, *_unrolled(flow, single, shapes, patterns is None)]
    pairs.sort(key=lambda pair: pair[0])
    found = [block for _, block, _ in pairs]
    spans = [span for _, _, span in pairs]
    return Plan(jaxpr, owners, tuple(found), tuple(spans), traced.out)


def _inlined(
    closed: ClosedJaxpr, args: Sequence[jax.Array], leaves: Collection[int]
) -> list[jax.Array]:
    """Run a jaxpr with the bodies of jits that take leaves in the place of the calls."""
    jaxpr = closed.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    own = {jaxpr.invars[i] for i in leaves}

    def read(x: Var | Literal) -> jax.Array:
        return x.val if isinstance(x, Literal) else env[x]

    for eqn in jaxpr.eqns:
        values = [read(x) for x in eqn.invars]
        inside = [i for i, x in enumerate(eqn.invars) if isinstance(x, Var) and x in own]
        if eqn.primitive.name in JITS and inside:
            results = _inlined(eqn.params["jaxpr"], values, inside)
        else:
            results = bind(eqn, [jnp.asarray(x) for x in values])
        env |= dict(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


class _Flow:
    """Who uses what in a jaxpr.

    Attributes:
      own: by variable the path of the leaf that it is, or that alone it is made from (a cast).
    """

    def __init__(self, closed: ClosedJaxpr, owners: Mapping[Var, str]) -> None:
        self.eqns = closed.jaxpr.eqns
        self.given = [var for var in closed.jaxpr.invars if var not in owners]
        self.own = dict(owners)
        self.uses: dict[Var, list[int]] = {}
        self.made: dict[Var, int] = {}
        for at, eqn in enumerate(self.eqns):
            operands = variables(eqn.invars)
            for var in operands:
                self.uses.setdefault(var, []).append(at)
            self.made |= dict.fromkeys(eqn.outvars, at)
            paths = {self.own.get(var) for var in operands}
            if len(paths) == 1 and (path := paths.pop()) is not None and nested(eqn) is None:
                self.own |= dict.fromkeys(eqn.outvars, path)
        for var in variables(closed.jaxpr.outvars):
            self.uses.setdefault(var, []).append(len(self.eqns))

    def leaves(self, paths: Collection[str]) -> tuple[set[Var], list[int]]:
        """Return the variables that are leaves, and which equations bring them to other values."""
        found = {var for var, path in self.own.items() if path in paths}
        uses = sorted(at for var in found for at in self.uses.get(var, ()))
        return found, [at for at in uses if not self.prepares(at)]

    def prepares(self, at: int) -> bool:
        """Return whether an equation makes a leaf from a leaf."""
        return at < len(self.eqns) and any(var in self.own for var in self.eqns[at].outvars)

    def multiplies(self, at: int) -> bool:
        """Return whether an equation is a product, or has jaxprs that may hold one."""
        if at == len(self.eqns):
            return False
        return kind(self.eqns[at]) is not None or nested(self.eqns[at]) is not None

    def descendants(self, roots: Collection[Var], until: int) -> set[Var]:
        """Return what is made from some variables by the equations before one."""
        found = set(roots)
        begin = min((self.made.get(var, -1) + 1 for var in roots), default=0)
        for eqn in self.eqns[begin:until]:
            if not found.isdisjoint(variables(eqn.invars)):
                found.update(eqn.outvars)
        return found

    def end(self, leaves: Collection[Var], uses: Sequence[int]) -> Var | None:
        """Return the first value through which everything goes that leaves have a part in."""
        found: set[Var] = set()
        for at in range(uses[0], len(self.eqns)):
            operands = set(variables(self.eqns[at].invars))
            if not operands.isdisjoint(found) or not operands.isdisjoint(leaves):
                found.update(var for var in self.eqns[at].outvars if var not in self.own)
            if at >= uses[-1]:
                live = [var for var in found if self.uses.get(var, [-1])[-1] > at]
                if len(live) == 1:
                    return live[0]
        return None

    def span(self, uses: Sequence[int], end: Var) -> tuple[Var, Var] | None:
        """Return the values before and after a block whose leaves' first single value is `end`.

        A branch that is added to what it is made from goes on to the sum. It is no block where it
        is made from other values on the way, such as a norm's of other leaves.
        """
        value = end
        while (summed := self._next(value)) is not None:
            eqn = self.eqns[self.made[summed]]
            others = [var for var in variables(eqn.invars) if var is not value]
            made = self.made[end] + 1
            if any(end in self.descendants([each], made) for each in others):
                before = self.begin(uses[0], summed)
                is_branch = eqn.primitive.name in SUMS and before in others
                return (before, summed) if before is not None and is_branch else None
            value = summed
        before = self.begin(uses[0], end)
        return None if before is None else (before, end)

    def _next(self, value: Var) -> Var | None:
        """Return the value that alone is made from a value, entry by entry."""
        uses = self.uses.get(value, [])
        if len(uses) != 1 or uses[0] == len(self.eqns):
            return None
        eqn = self.eqns[uses[0]]
        return eqn.outvars[0] if eqn.primitive.name in ELEMENTWISE else None

    def begin(self, first: int, after: Var) -> Var | None:
        """Return the value like `after` that everything before an equation comes through.

        The cut is moved back until nothing else that crosses it, and is used before the end, is
        made from that value: norms are computed before their scales are used. It is not moved
        behind another leaf's use, which is no part of this block.
        """
        end = self.made[after]
        for cut in range(first, -1, -1):
            operands = variables(self.eqns[cut].invars)
            if cut < first and any(v in self.own for v in operands) and not self.prepares(cut):
                return None
            made = itertools.chain(self.given, *(eqn.outvars for eqn in self.eqns[:cut]))
            inside = [v for v in made if any(cut <= at <= end for at in self.uses.get(v, ()))]
            inside = [v for v in inside if v not in self.own]
            alike = [v for v in inside if _kind(v) == _kind(after)]
            # What later blocks use as well (an encoder's output) only passes by.
            if len(alike) > 1:
                alike = [v for v in alike if self.uses[v][-1] <= end]
            if len(alike) == 1:
                others = set(inside) - set(alike)
                if others.isdisjoint(self.descendants(alike, cut)):
                    return alike[0]
        return None


def variables(atoms: Sequence[Var | Literal]) -> list[Var]:
    """Return the variables among atoms."""
    return [atom for atom in atoms if isinstance(atom, Var)]


def _kind(var: Var) -> tuple[Shape, str]:
    return getattr(var.aval, "shape", ()), str(getattr(var.aval, "dtype", ""))


def _unrolled(
    flow: _Flow, names: Mapping[str, str], shapes: Mapping[str, Shape], alike: bool
) -> list[tuple[int, Block, Span]]:
    """Return the blocks outside loops, each with the equation that it begins at."""
    own: dict[str, list[str]] = {}
    for path, name in names.items():
        own.setdefault(name, []).append(path)
    forms = {
        name: tuple((path.removeprefix(name), shapes[path]) for path in paths)
        for name, paths in own.items()
    }
    number = Counter(forms.values())
    found = []
    for name, paths in own.items():
        leaves, uses = flow.leaves(paths)
        if not uses:  # whether it is there or not makes no difference
            continue
        end = flow.end(leaves, uses)
        ends = None if end is None else flow.span(uses, end)
        reason = ""
        if alike and number[forms[name]] < 2:
            reason = ALONE
        elif alike and not any(flow.multiplies(at) for at in uses):
            reason = "it has no product"
        elif end is None:
            reason = "what it makes goes on in several values"
        elif ends is None:
            reason = "it is made from no single value of the shape that it makes"
        span = Span(None if reason else ends)
        found.append((uses[0], Block(name, tuple(paths), None, reason), span))
    return _apart(found)


def _apart(found: list[tuple[int, Block, Span]]) -> list[tuple[int, Block, Span]]:
    """Refuse blocks that end at the same value: they do not run one after the other."""
    number = Counter(span.ends[1] for _, _, span in found if span.ends)
    return [
        (at, block._replace(reason="it ends together with another block"), Span())
        if span.ends and number[span.ends[1]] > 1
        else (at, block, span)
        for at, block, span in found
    ]


def _iterations(flow: _Flow) -> list[tuple[int, Block, Span]]:
    """Return the iterations of scans over stacked leaves."""
    found = []
    number: Counter[str] = Counter()
    for at, eqn in enumerate(flow.eqns):
        loop = nested(eqn)
        if not isinstance(loop, Scan):
            continue
        xs = variables(eqn.invars[loop.consts + loop.carry :])
        paths = tuple(dict.fromkeys(flow.own[var] for var in xs if var in flow.own))
        if not paths:
            continue
        leaves, uses = flow.leaves(paths)
        ways = {flow.eqns[flow.made[var]].primitive.name for var in leaves if var in flow.made}
        reason = ""
        if any(var in flow.uses for var in eqn.outvars[loop.carry :]):
            reason = "what the loop stacks is used"
        elif set(uses) != {at}:
            reason = "its leaves are used outside the loop too"
        elif not ways <= CASTS:
            reason = f"its leaves are changed before the loop by {', '.join(sorted(ways - CASTS))}"
        common = os.path.commonprefix([path.split("/") for path in paths])
        prefix = "/".join(common) or "loop"
        number[prefix] += 1
        prefix = prefix if number[prefix] == 1 else f"{prefix}#{number[prefix]}"
        order = range(loop.length)
        for i in reversed(order) if eqn.params.get("reverse") else order:
            block = Block(f"{prefix}[{i}]", paths, i, reason)
            found.append((at, block, Span(loop=at)))
    return found
