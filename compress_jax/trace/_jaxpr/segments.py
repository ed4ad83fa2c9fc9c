"""Cut a function where its blocks of layers begin, and run it block by block."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from compress_jax.core.errors import ConfigError
from compress_jax.core.paths import Patterns, matches
from compress_jax.core.types import Array, ModelFn, Params, PyTree
from compress_jax.trace._jaxpr.evaluate import bind
from compress_jax.trace._jaxpr.find_sites import trace

NUMBERED = re.compile(r"^(.*?\d+)(/|$)")


class Segment(NamedTuple):
    """One part of a function.

    Attributes:
      name: of its block of layers; empty for what comes before the first.
      paths: the leaves of params that it uses.
      run: ``({path: leaf}, *values) -> values``, from what the part before gives to what the part
        after takes; the first takes the function's inputs as leaves, the last gives its outputs.
    """

    name: str
    paths: tuple[str, ...]
    run: Callable[..., tuple[Array, ...]]


def segments(
    fn: ModelFn, params: Params, *inputs: PyTree, blocks: Sequence[Patterns] | None = None
) -> tuple[Segment, ...]:
    """Cut a function before the first use of each block's params.

    What crosses a cut (the residual stream, masks, positions) is found in the jaxpr, so any
    function can be cut whose blocks run one after the other.

    Args:
      fn: a pure function of params and inputs. It is traced, not run.
      params: a tree of arrays or shapes.
      inputs: trees of arrays or shapes.
      blocks: a glob, or several, over the leaves of each block; by default leaves that share a
        path up to its first number: ``layer_0/...``, ``layer_1/...``.

    Returns:
      The parts, in the order in which they run; together they are the function.

    Raises:
      ConfigError: if a block has no leaf that the function uses.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {f"layer_{i}": {"w": jnp.full((2, 2), i + 1.0)} for i in range(2)}
      >>> fn = lambda p, x: jnp.tanh(x @ p["layer_0"]["w"]) @ p["layer_1"]["w"]
      >>> parts = segments(fn, params, jnp.ones((1, 2)))
      >>> [part.name for part in parts], parts[2].paths
      (['', 'layer_0', 'layer_1'], ('layer_1/w',))
    """
    traced = trace(fn, params, *inputs)
    jaxpr = traced.jaxpr.jaxpr
    paths = list(traced.params)
    owners = dict(zip(jaxpr.invars, paths, strict=False))  # the leaves come first
    groups = named_blocks(paths, blocks)
    first: dict[str, int] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for var in eqn.invars:
            name = groups.get(owners.get(var, "")) if isinstance(var, Var) else None
            if name is not None:
                first.setdefault(name, number)
    unused = [name for name in dict.fromkeys(groups.values()) if name not in first]
    if unused:
        raise ConfigError(f"the function uses no leaf of the block {unused[0]!r}")
    names = sorted(first, key=first.__getitem__)
    cuts = [0, *(first[name] for name in names), len(jaxpr.eqns)]
    parts = zip(["", *names], cuts[:-1], cuts[1:], strict=True)
    return tuple(_segment(traced.jaxpr, owners, *part) for part in parts)


def named_blocks(paths: Sequence[str], blocks: Sequence[Patterns] | None) -> dict[str, str]:
    """Return the name of each leaf's block, where it has one."""
    if blocks is None:
        found = {path: NUMBERED.match(path) for path in paths}
        return {path: match[1] for path, match in found.items() if match}
    named = {}
    # One glob is one block, and not a block a letter.
    for globs in [blocks] if isinstance(blocks, str) else blocks:
        own = [path for path in paths if matches(globs, path)]
        if not own:
            raise ConfigError(f"the block {globs!r} matches no leaf")
        named |= dict.fromkeys(own, str(globs))
    return named


def _segment(
    closed: ClosedJaxpr, owners: Mapping[Var, str], name: str, begin: int, end: int
) -> Segment:
    """Return the equations from one cut to the next as a function of what crosses them."""
    jaxpr = closed.jaxpr
    leaves = [var for var in jaxpr.invars if var in owners]
    given = [var for var in jaxpr.invars if var not in owners]  # the function's inputs
    before = given if not begin else _crossing(jaxpr, owners, begin)
    is_last = end == len(jaxpr.eqns)
    after = list(jaxpr.outvars) if is_last else _crossing(jaxpr, owners, end)
    eqns = jaxpr.eqns[begin:end]
    used = {var for eqn in eqns for var in eqn.invars if isinstance(var, Var)}
    used |= {var for var in after if isinstance(var, Var)}
    own = [var for var in leaves if var in used]
    constants = {
        var: x for var, x in zip(jaxpr.constvars, closed.consts, strict=True) if var in used
    }
    paths = tuple(owners[var] for var in own)

    def run(leaves: Mapping[str, Array], *values: Array) -> tuple[Array, ...]:
        env: dict[Var, Array] = {**constants, **dict(zip(before, values, strict=True))}
        env |= {var: leaves[path] for var, path in zip(own, paths, strict=True)}

        def read(x: Var | Literal) -> Array:
            return x.val if isinstance(x, Literal) else env[x]

        for eqn in eqns:
            arguments: list[jax.Array] = [jnp.asarray(read(x)) for x in eqn.invars]
            results = bind(eqn, arguments)
            env |= dict(zip(eqn.outvars, results, strict=True))
        return tuple(read(x) for x in after)

    return Segment(name, paths, run)


def _crossing(jaxpr: Jaxpr, owners: Mapping[Var, str], at: int) -> list[Var]:
    """Return what is made before an equation, or given, and used from there on; no params."""
    constant = {*jaxpr.constvars, *owners}
    made = [*(var for var in jaxpr.invars if var not in owners)]
    made += [var for eqn in jaxpr.eqns[:at] for var in eqn.outvars if type(var) is Var]
    later = {var for eqn in jaxpr.eqns[at:] for var in eqn.invars if isinstance(var, Var)}
    later |= {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    return [var for var in made if var in later and var not in constant]
