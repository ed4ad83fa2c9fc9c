"""What numbers become when the axes that they count, or seem to count, get shorter: decided, and listed with the reason."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, JaxprEqn

from compress_jax.core.paths import matches
from compress_jax.trace._analyse import Analysis
from compress_jax.trace.counts import Count, counted
from compress_jax.trace.group import Groups
from compress_jax.trace.kept import leaves_of
from compress_jax.trace.nested import bodies, nested
from compress_jax.trace.numbers import numbers
from compress_jax.trace.own_width import differences
from compress_jax.trace.resize_run import Plan
from compress_jax.trace.site import Position

Numbers = Mapping[str, bool]
CODE = "as in the same code at the new width"
MEAN = "it makes a mean of a sum over {}; the code does not run at the new width, so this is by its value"
SCALE = "it may be a scale: it stands beside a product that is summed over {}, not a mean"
SAID = "as was said"


class Number(NamedTuple):
    """A number in a computation of which an axis was shortened.

    Attributes:
      name: the scope it stands in and its operation, numbered where there are several: ``"block/norm/div"``, ``"mul#2"``.
      old: its value at the old width.
      new: its value now.
      follows: whether it is another number now.
      counts: names of the groups that it counts or seems to count; empty if only the code shows that it depends on a width.
      reason: why.
    """

    name: str
    old: float
    new: float
    follows: bool
    counts: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        """Return a line of text."""
        if self.follows:
            return f"{self.name}: {self.old:.6g} -> {self.new:.6g} ({self.reason})"
        return f"{self.name}: {self.old:.6g} stays, though it looks like a count of {', '.join(self.counts)} ({self.reason})"


def decided(
    analysis: Analysis, plan: Plan, code: ClosedJaxpr | None, groups: Groups, said: Numbers
) -> tuple[tuple[Number, ...], dict[Position, dict[int, float]], bool]:
    """Decide what becomes of numbers.

    Args:
      analysis: of the function at its old width.
      plan: how it is run, with the counts that were noted.
      code: the jaxpr of its own code at the new width, if that does the same.
      groups: of its parameters.
      said: what the user says, by globs over names.

    Returns:
      The numbers; what they become, by position and operand; whether that differs from the code.
    """
    jaxpr = analysis.traced.jaxpr
    by_code = {} if code is None else differences(jaxpr, code)
    before, counts = numbers(jaxpr), plan.followed.counts
    places = {(at, which) for at, each in by_code.items() for which in each} | {(at, c.which) for at, c in counts.items()}
    named = _named(jaxpr, places)
    found, changed, differ = [], {}, False
    for (at, which), name in named.items():
        old, count = before[at][which] or 0.0, counts.get(at)
        count = count if count is not None and count.which == which else None
        own = by_code.get(at, {}).get(which) if code is not None else count.now if count and count.proven else None
        follows = next((answer for glob, answer in said.items() if matches(glob, name)), None)
        new = own if follows is None else _new(own, count) if follows else None
        over = () if count is None else _over(analysis, plan, groups, count)
        reason = SAID if follows is not None else CODE if code is not None else _why(count, over)
        found.append(Number(name, old, old if new is None else new, new is not None, over, reason))
        differ |= new != own
        if new is not None:
            changed.setdefault(at, {})[which] = new
    return tuple(found), changed, differ


def _new(own: float | None, count: Count | None) -> float | None:
    return own if own is not None else count and count.now


def _why(count: Count | None, over: tuple[str, ...]) -> str:
    return (MEAN if count and count.proven else SCALE).format(", ".join(over))


def _over(analysis: Analysis, plan: Plan, groups: Groups, count: Count) -> tuple[str, ...]:
    """Return the names of the groups that a number counts."""
    axes = set(counted(plan.kept, count))
    return tuple(group.name for group in groups if axes & set(leaves_of(analysis, group)))


def _named(jaxpr: ClosedJaxpr, places: set[tuple[Position, int]]) -> dict[tuple[Position, int], str]:
    """Return a name for each operand, in program order."""
    seen: Counter[str] = Counter()
    named = {}
    for position, eqn in _equations(jaxpr):
        for which in range(len(eqn.invars)):
            if (position, which) in places:
                base = "/".join(filter(None, (str(eqn.source_info.name_stack), eqn.primitive.name)))
                seen[base] += 1
                named[position, which] = base if seen[base] == 1 else f"{base}#{seen[base]}"
    return named


def _equations(jaxpr: ClosedJaxpr, position: Position = ()) -> Iterator[tuple[Position, JaxprEqn]]:
    for index, eqn in enumerate(jaxpr.eqns):
        at = (*position, index)
        yield at, eqn
        for step, body in bodies(nested(eqn)).items():
            yield from _equations(body, (*at, step))
