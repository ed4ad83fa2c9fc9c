"""The blocks of a function, and the function without some of them."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var, jaxpr_as_fun

from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import Patterns, flatten
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree, Shape
from compress_jax.trace._jaxpr.block_spans import Block, Plan, planned, variables
from compress_jax.trace._jaxpr.evaluate import Statistics, bind, scan
from compress_jax.trace._jaxpr.primitives import Scan, nested

DIGITS = re.compile(r"\d+")
Values: TypeAlias = list[jax.Array]
"""The operands or the results of an equation."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a function, from `blocks`.

    Attributes:
      found: the blocks, in the order in which they run.
      fn: the function.
      full: its params, as shapes.
      patterns: as of `blocks`.
    """

    found: tuple[Block, ...]
    fn: ModelFn
    full: Params
    patterns: Sequence[Patterns] | None

    def masked(self, kept: jax.Array, params: Params, *inputs: PyTree) -> tuple[PyTree, jax.Array]:
        r"""Run the function with some blocks skipped: one program for all choices of blocks.

        Args:
          kept: bool ``[blocks]``, which run.
          params: as of the function.
          inputs: as of the function.

        Returns:
          ``(outputs, influence)``: the influence ``[blocks]`` of a block is
          :math:`1 - \cos(x, y)` of what goes in and comes out, the mean over vectors along the
          last axis; 0 where it cannot be skipped.
        """
        plan = planned(self.fn, params, inputs, self.patterns)
        leaves = list(flatten(params)[0].values())
        influence: list[jax.Array] = [jnp.float32(0)] * len(plan.found)
        # By the value after a block its number, and the value before.
        ends = {span.ends[1]: (i, span.ends[0]) for i, span in enumerate(plan.spans) if span.ends}

        def loop(at: int, eqn: JaxprEqn, args: Values) -> Values:
            own = [i for i, span in enumerate(plan.spans) if span.loop == at]
            # In the order of the stacked leaves: a reversed scan begins at its end.
            own.sort(key=lambda i: plan.found[i].iteration or 0)
            results, moved = _masked_scan(eqn, args, kept[np.array(own)])
            for order, i in enumerate(own):
                influence[i] = moved[order]
            return results

        def ended(var: Var, value: jax.Array, read: Callable[[Var], jax.Array]) -> jax.Array:
            i, begin = ends[var]
            before = read(begin)
            influence[i] = _turned(before, value)
            return jnp.where(kept[i], value, before)

        flat = _run(plan, [*leaves, *jax.tree.leaves(inputs)], loop, {var: ended for var in ends})
        return _rebuilt(plan.out, flat), jnp.stack(influence)

    def without(self, params: Params, gone: Collection[str]) -> tuple[Params, ModelFn]:
        """Return params and function without some blocks.

        Args:
          params: tree of arrays.
          gone: names of blocks.

        Returns:
          ``(smaller params, smaller function)``. Stacked leaves are shorter along their first axis;
          other leaves leave the tree: keys of dicts, and None in place of what is in lists.

        Raises:
          ShapeError: if a block cannot be skipped; when it is called, if the params are others.
        """
        lost = [block for block in self.found if block.name in gone]
        for block in lost:
            if block.reason:
                raise ShapeError(f"block {block.name!r} cannot be skipped: {block.reason}")
        cut: dict[str, list[int]] = {}
        removed: set[str] = set()
        for block in lost:
            if block.iteration is None:
                removed.update(block.paths)
            for path in block.paths if block.iteration is not None else ():
                cut.setdefault(path, []).append(block.iteration or 0)
        leaves, rebuild = flatten(params)
        short = {
            path: jnp.delete(x, np.array(cut[path]), axis=0) if path in cut else x
            for path, x in leaves.items()
        }
        smaller = _removed(rebuild(short), removed)
        expected = {path: np.shape(x) for path, x in flatten(smaller)[0].items()}
        names = frozenset(gone)

        def run(params: Params, *inputs: PyTree) -> PyTree:
            given = flatten(params)[0]
            _check(given, expected)
            return self._shorter(given, inputs, names)

        return smaller, jax.jit(run)

    def _shorter(self, given: Leaves, inputs: Sequence[PyTree], gone: frozenset[str]) -> PyTree:
        """Trace the whole function, and run what is left of it on the leaves that are left."""
        old, rebuild = flatten(self.full)
        # The old shapes with the present dtypes: params may have been cast since. What is gone has
        # the dtypes of its like in other blocks.
        like = {DIGITS.sub("", path): x.dtype for path, x in given.items()}
        full = {}
        for path, x in old.items():
            dtype = given[path].dtype if path in given else like.get(DIGITS.sub("", path), x.dtype)
            full[path] = jax.ShapeDtypeStruct(x.shape, dtype)
        plan = planned(self.fn, rebuild(full), inputs, self.patterns)
        skipped = {
            span.ends[1]: span.ends[0]
            for block, span in zip(plan.found, plan.spans, strict=True)
            if block.name in gone and span.ends is not None
        }

        def loop(at: int, eqn: JaxprEqn, args: Values) -> Values:
            own = zip(plan.found, plan.spans, strict=True)
            left = [b.iteration for b, span in own if span.loop == at and b.name not in gone]
            return _short_scan(eqn, args, np.array(left, int))

        values = [given.get(path) for path in old]
        return _rebuilt(
            plan.out, _run(plan, [*values, *jax.tree.leaves(inputs)], loop, {}, skipped)
        )


def blocks(
    fn: ModelFn, params: Params, *inputs: PyTree, patterns: Sequence[Patterns] | None = None
) -> Blocks:
    """Find the blocks of layers that a function can do without.

    Outside loops a block ends at the one value through which everything goes that its leaves have
    a part in, and begins at the value of the same shape and dtype that it is made from. In a scan
    whose leaves are stacked each iteration is a block.

    Args:
      fn: a pure function of params and inputs. It is traced, not run.
      params: a tree of arrays or shapes.
      inputs: trees of arrays or shapes.
      patterns: a glob, or several, over the leaves of each block outside loops; by default leaves
        that share a path up to its first number, where several have leaves of the same names and
        shapes.

    Returns:
      The blocks, with why some cannot be skipped.

    Raises:
      ConfigError: if a pattern matches no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {f"layer_{i}": {"w": jnp.full((2, 2), i + 1.0)} for i in range(2)}
      >>> def fn(p, x):
      ...     for i in range(2):
      ...         x = x + x @ p[f"layer_{i}"]["w"]
      ...     return x
      >>> found = cj.trace.blocks(fn, params, jnp.ones((1, 2)))
      >>> [block.name for block in found.found]
      ['layer_0', 'layer_1']
      >>> small, run = found.without(params, ["layer_0"])
      >>> sorted(small), run(small, jnp.ones((1, 2))).tolist()
      (['layer_1'], [[5.0, 5.0]])
    """
    full = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), params)
    return Blocks(planned(fn, params, inputs, patterns).found, fn, full, patterns)


# Running what is left.

Loop = Callable[[int, JaxprEqn, Values], Values]
Ended = Callable[[Var, jax.Array, Callable[[Var], jax.Array]], jax.Array]


def _run(
    plan: Plan,
    args: Sequence[jax.Array | None],
    loop: Loop,
    ended: Mapping[Var, Ended],
    skipped: Mapping[Var, Var] | None = None,
) -> Values:
    """Run a trace, with loops and ends of blocks as told, and some values in place of others."""
    jaxpr = plan.jaxpr.jaxpr
    loops = {span.loop for span in plan.spans}
    env: dict[Var, jax.Array | None] = dict(zip(jaxpr.invars, args, strict=True))
    env |= dict(zip(jaxpr.constvars, plan.jaxpr.consts, strict=True))
    instead = dict(skipped or {})

    def variable(var: Var) -> Var:
        while var in instead:
            var = instead[var]
        return var

    def read(x: Var | Literal) -> jax.Array:
        if isinstance(x, Literal):
            return x.val
        value = env[variable(x)]
        if value is None:
            raise ShapeError(f"{plan.owners.get(x, 'a value')!r} is used outside its block")
        return value

    # Backwards from the outputs: what only skipped blocks need is not run.
    needed = {variable(var) for var in variables(jaxpr.outvars)}
    wanted = set()
    for at in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[at]
        if not needed.isdisjoint(eqn.outvars):
            wanted.add(at)
            needed |= {variable(var) for var in variables(eqn.invars)}
    for at, eqn in enumerate(jaxpr.eqns):
        if at not in wanted:
            continue
        values: Values = [jnp.asarray(read(x)) for x in eqn.invars]
        results = loop(at, eqn, values) if at in loops else bind(eqn, values)
        for var, value in zip(eqn.outvars, results, strict=True):
            env[var] = ended[var](var, value, read) if var in ended else value
    return [read(x) for x in jaxpr.outvars]


def _masked_scan(eqn: JaxprEqn, args: Values, kept: jax.Array) -> tuple[Values, jax.Array]:
    """Run a scan in which some iterations change nothing; return how far each turns its value."""
    loop = nested(eqn)
    assert isinstance(loop, Scan)
    run = jaxpr_as_fun(loop.body)

    def body(*operands: jax.Array, given: jax.Array) -> tuple[Values, Statistics]:
        results = run(*operands)
        old = operands[loop.consts :][: loop.carry]
        new = results[: loop.carry]
        # The residual stream is the largest value that is carried.
        floats = [i for i, x in enumerate(old) if jnp.issubdtype(x.dtype, jnp.floating)]
        stream = max(floats, key=lambda i: old[i].size, default=None)
        turned = jnp.float32(0) if stream is None else _turned(old[stream], new[stream])
        carry = [jnp.where(given, y, x) for x, y in zip(old, new, strict=True)]
        return [*carry, *results[loop.carry :]], {"turned": turned}

    results, found = scan(eqn, args, loop, body, kept)
    return results, found["turned"]


def _short_scan(eqn: JaxprEqn, args: Values, left: np.ndarray) -> Values:
    """Run the iterations of a scan that are left; its leaves are short already."""
    loop = nested(eqn)
    assert isinstance(loop, Scan)
    run = jaxpr_as_fun(loop.body)
    own = loop.consts + loop.carry
    # Other stacked operands (flags, keys) are those of all iterations.
    order = np.sort(left)
    xs = [x if x.shape[0] == len(order) else x[order] for x in args[own:]]
    short = replace(loop, length=len(order))

    def body(*operands: jax.Array, given: None) -> tuple[Values, Statistics]:
        return list(run(*operands)), {}

    return scan(eqn, [*args[:own], *xs], short, body, None)[0]


def _turned(before: jax.Array, after: jax.Array) -> jax.Array:
    """Return 1 minus the cosine between vectors along the last axis, the mean."""
    x = before.astype(jnp.float32)
    y = after.astype(jnp.float32)
    if not x.ndim:
        return jnp.float32(0)
    lengths = jnp.sqrt(jnp.square(x).sum(-1) * jnp.square(y).sum(-1))
    return 1 - ((x * y).sum(-1) / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)).mean()


def _rebuilt(out: PyTree, flat: Values) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(out), flat)


def _check(given: Leaves, expected: Mapping[str, Shape]) -> None:
    """Raise ShapeError if params are not those that are left."""
    found = {path: np.shape(x) for path, x in given.items()}
    if found != expected:
        odd = sorted(path for path in {*found, *expected} if found.get(path) != expected.get(path))
        raise ShapeError(
            f"these params are not those without the blocks: {odd[0]!r} has shape "
            f"{found.get(odd[0])}, not {expected.get(odd[0])}"
        )


def _removed(tree: PyTree, gone: Collection[str], prefix: str = "") -> PyTree:
    """Return a tree without some leaves: keys leave dicts, None takes places elsewhere."""
    if not isinstance(tree, Mapping):
        leaves, rebuild = flatten(tree)
        return rebuild({path: None if prefix + path in gone else x for path, x in leaves.items()})
    left: dict[str, PyTree] = {}
    for key, each in tree.items():
        path = f"{prefix}{key}"
        inside = [name for name in gone if name == path or name.startswith(f"{path}/")]
        if not inside:
            left[key] = each
        elif path not in gone:
            rest = _removed(each, gone, f"{path}/")
            if jax.tree.leaves(rest):
                left[key] = rest
    make: Any = type(tree)  # a dict, an NNX state
    return make(left)
