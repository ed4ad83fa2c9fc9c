"""Evaluate a jaxpr as it stands, but for chosen contractions: they go through a hook, however deep they are nested."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from compress_jax.trace import rebuild
from compress_jax.trace.nested import Branches, Call, Scan, While, nested
from compress_jax.trace.site import Position, Site

Statistics = dict[str, Any]
Results = tuple[list[Any], Statistics]


@dataclass(frozen=True)
class Hooks:
    """What is done at the chosen sites.

    Attributes:
      sites: the chosen sites by position.
      apply: ``(site, eqn, operands, given) -> (results, statistics)``; statistics may be ``{}``.
      merge: ``(old, new) -> statistics`` of one site, from one turn of a ``while`` loop to the next.
      around: every position that has a chosen site inside.
    """

    sites: Mapping[Position, Site]
    apply: Callable[[Site, JaxprEqn, list[Any], Any], Results]
    merge: Callable[[Any, Any], Any] = lambda old, new: new
    around: frozenset[Position] = field(init=False)

    def __post_init__(self) -> None:
        """Gather the positions that lead to chosen sites."""
        inner = frozenset(position[:end] for position in self.sites for end in range(1, len(position)))
        object.__setattr__(self, "around", inner)


def evaluate(
    jaxpr: ClosedJaxpr, args: Sequence[Any], hooks: Hooks, given: Mapping[Position, Any], position: Position = ()
) -> Results:
    """Run a jaxpr with hooks.

    An equation without a chosen site inside is bound as it stands: custom derivative rules, random numbers, sharding
    constraints and effects are those of the original. One that leads to a chosen site is built again by the public
    transformation that made it.

    Args:
      jaxpr: the computation.
      args: an array for each of its inputs.
      hooks: what to do where.
      given: a tree for some of the chosen sites, handed to their hook; loops around a site run along its leading axes.
      position: where the computation stands, for nested ones.

    Returns:
      ``(results, statistics by site)``.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))
    statistics: Statistics = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        with ExitStack() as stack:
            stack.enter_context(eqn.ctx.manager)
            if scope := str(eqn.source_info.name_stack):
                stack.enter_context(jax.named_scope(scope))
            results, seen = _equation(eqn, [read(atom) for atom in eqn.invars], hooks, given, (*position, index))
        env |= dict(zip(eqn.outvars, results, strict=True))
        statistics |= seen
    return [read(atom) for atom in jaxpr.jaxpr.outvars], statistics


def _equation(eqn: JaxprEqn, args: list[Any], hooks: Hooks, given: Mapping[Position, Any], position: Position) -> Results:
    if position in hooks.sites:
        return hooks.apply(hooks.sites[position], eqn, args, given.get(position))
    if position not in hooks.around:
        return rebuild.bind(eqn, args), {}

    inside = {place: tree for place, tree in given.items() if place[: len(position)] == position}

    def body(jaxpr: ClosedJaxpr, where: int | str = "body") -> Callable[..., Results]:
        return lambda *operands, given=inside: evaluate(jaxpr, operands, hooks, given, (*position, where))

    match nested(eqn):
        case Call(jaxpr, shards) if shards is None:
            return rebuild.call(eqn, args, body(jaxpr))
        case Call(jaxpr):
            return rebuild.shard_map(eqn.params, args, body(jaxpr), inside)
        case Scan() as scan:
            return rebuild.scan(eqn, args, scan, body(scan.body), inside)
        case While() as loop:
            condition = (*position, "cond") in hooks.around
            return rebuild.while_loop(args, loop, body(loop.condition, "cond"), body(loop.body), hooks.merge, condition)
        case Branches(bodies):
            return rebuild.branches(eqn, args, [body(jaxpr, index) for index, jaxpr in enumerate(bodies)])
        case _:
            raise AssertionError(f"{eqn.primitive.name} has sites inside but no form")
