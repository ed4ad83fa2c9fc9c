"""The permutation check: whether groups are what they claim to be, by running the function."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import flatten
from compress_jax.trace._analyse import returned
from compress_jax.trace._groups import groups as find_groups
from compress_jax.trace.group import Group, Groups, Member, permuted, show

Leaves = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """What permuting one group did.

    Attributes:
      name: of the group.
      size: of the group.
      error: largest change of an output, relative to that output's largest entry.
      ok: whether the error is within the tolerance.
      undetected: members that can be left out of the permutation without any output changing: parameters that have no
        effect, whose entries are all equal (a bias of zeros), or that are the only member.
    """

    name: str
    size: int
    error: float
    ok: bool
    undetected: tuple[Member, ...]


@dataclass(frozen=True)
class Verification:
    """What permuting every group did.

    Attributes:
      checks: one for each group.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no group's permutation changes the function."""
        return all(check.ok for check in self.checks)

    @property
    def undetected(self) -> dict[str, tuple[Member, ...]]:
        """By name of the group, the members of which the check cannot tell that they belong to it."""
        return {check.name: check.undetected for check in self.checks if check.undetected}

    def __str__(self) -> str:
        """Return a table: a line for each group."""
        width = max([len(check.name) for check in self.checks], default=5)
        rows = [f"{'group':<{width}}   size    error  check"]
        for check in self.checks:
            missed = f", undetected: {', '.join(map(show, check.undetected))}" if check.undetected else ""
            result = ("ok" if check.ok else "FAILS") + missed
            rows.append(f"{check.name:<{width}}  {check.size:>5}  {check.error:7.1e}  {result}")
        return "\n".join(rows)


def verify_groups(
    fn: Callable[..., Any],
    variables: Any,
    *inputs: Any,
    groups: Groups | None = None,
    key: jax.Array | None = None,
    tolerance: float = 1e-4,
) -> Verification:
    """Check groups by running the function on permuted variables.

    Each group is permuted by a random cycle through all its coordinates, all members alike: the outputs must not change,
    except that parameters returned anew come back permuted. Then each member in turn is left out, which must change an
    output. Freshly initialised variables hide errors, since zeros permute to zeros: give them random content before.

    Args:
      fn: a pure function of ``(variables, *inputs)``; compiled once. Random numbers that it draws are not permuted, so turn
        dropout off.
      variables: tree of arrays.
      inputs: trees of arrays.
      groups: what to check; by default what `compress_jax.trace.groups` finds.
      key: typed key for the permutations; by default that of seed 0.
      tolerance: the largest change that counts as none, relative to the largest entry of an output.

    Returns:
      The report; ``ok`` if no permutation of a whole group changes anything.

    Raises:
      ShapeError: if a variable or an input is not an array.

    Example:
      >>> params = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.zeros(2), "v": jnp.array([[3.0], [4.0]])}
      >>> report = verify_groups(lambda p, x: (x @ p["w"] + p["b"][None]) @ p["v"], params, jnp.ones((1, 1)))
      >>> report.ok, report.undetected
      (True, {'w:1': (('b', 0),)})
    """
    found = find_groups(fn, variables, *inputs) if groups is None else groups
    leaves, rebuild = flatten(variables)
    for path, leaf in {**leaves, **flatten({"inputs": list(inputs)})[0]}.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ShapeError(f"{path!r} is only a shape; the permutation check runs the function and needs arrays")
    compiled = jax.jit(lambda leaves, inputs: flatten(fn(rebuild(leaves), *inputs))[0])
    rng = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.key(0) if key is None else key)))
    expected = compiled(leaves, inputs)

    def change(group: Group, permutation: np.ndarray, members: Iterable[Member]) -> float:
        got = compiled(permuted(leaves, group, permutation, members), inputs)
        return _change(got, _returned_alike(leaves, expected, group, permutation))

    return Verification(tuple(_check(group, partial(change, group, _cycle(rng, group.size)), tolerance) for group in found))


def _check(group: Group, change: Callable[[Iterable[Member]], float], tolerance: float) -> Check:
    """Permute a group, whole and with each member left out."""
    error = change(group.members)
    without = {member: [other for other in group.members if other != member] for member in group.members}
    undetected = tuple(member for member, others in without.items() if change(others) <= tolerance)
    return Check(group.name, group.size, error, error <= tolerance, undetected)


def _returned_alike(leaves: Leaves, expected: Leaves, group: Group, permutation: np.ndarray) -> Leaves:
    """Permute those outputs that are members returned anew."""
    expected = dict(expected)
    for output, path in returned(expected, leaves).items():
        for member in group.members:
            if member[0] == path:
                expected[output] = jnp.take(expected[output], group.order(member, permutation), axis=member[1])
    return expected


def _cycle(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a random permutation of one cycle: nothing stays where it is."""
    order, cycle = rng.permutation(size), np.empty(size, int)
    cycle[order] = np.roll(order, 1)
    return cycle


def _change(got: Leaves, expected: Leaves) -> float:
    """Return the largest difference, each output's relative to its largest entry; NaN if there is a NaN."""
    return float(np.max([0.0, *(_difference(_numbers(got[path]), _numbers(expected[path])) for path in expected)]))


def _numbers(x: Any) -> np.ndarray:
    """Return an output in double precision; of random keys, their data."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x = jax.random.key_data(x)
    return np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    same = got == expected  # infinities too
    finite = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    return float(np.abs(np.where(same, 0, got) - np.where(same, 0, expected)).max(initial=0) / (finite or 1))
