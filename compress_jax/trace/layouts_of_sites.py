"""What each axis of a parameter is for, from the sites that use it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from compress_jax.core.axes import Axes
from compress_jax.trace.site import Site
from compress_jax.trace.strided import Piece

STACK, WINDOW, INPUT, OUTPUT = "s", "w", "i", "o"
Roles = dict[int, set[str]]


def layouts_of_sites(
    sites: Iterable[Site], leaves: Mapping[str, Any], stacked: Mapping[str, set[int]] | None = None
) -> dict[str, Axes]:
    """Return `layouts` of some leaves from the sites that use them.

    Args:
      sites: from a trace, or those of a calibration.
      leaves: arrays or shapes by path.
      stacked: axes that loops take one slice of at a time, by path, for leaves that no site uses.

    Returns:
      ``{path: Axes}``.
    """
    uses: dict[str, list[tuple[int, Roles]]] = {}
    lost: dict[str, str] = {}
    for site in sites:
        for path, roles in _uses(site, leaves):
            uses.setdefault(path, []).append((site.macs, roles))
        if site.param is not None and site.param not in uses:
            lost[site.param] = site.lost or "a reshape mixes the axes that are summed over with others"
    found = {}
    for path, x in leaves.items():
        own = (stacked or {}).get(path, set())
        found[path] = _axes(tuple(x.shape), uses.get(path, []), own, lost.get(path, ""))
    return found


def _uses(site: Site, params: Mapping[str, Any]) -> list[tuple[str, Roles]]:
    """Return the parameters that a site multiplies by, each with the roles of its axes there."""
    if site.param is None:
        return []
    if site.pieces:
        return [(piece.path, _roles_of_piece(site, piece)) for piece in site.pieces]
    if site.param_axes is None or site.batch_axes is None or site.also:
        return []
    shape = tuple(params[site.param].shape)
    summed = dict.fromkeys(site.param_axes, INPUT)
    apart = dict.fromkeys((*site.batch_axes, *site.stack_axes), STACK)
    return [(site.param, {a: {(summed | apart).get(a, OUTPUT)} for a, n in enumerate(shape) if n > 1})]


def _roles_of_piece(site: Site, piece: Piece) -> Roles:
    """Return the roles of the stored axes of a parameter that lies in a site's operand, by its strides there."""
    own = _operand_roles(site)
    roles: Roles = {}
    for role, digits in zip(own, piece.axes, strict=True):
        for size, stride in digits:
            if size > 1 and stride:
                roles.setdefault(_stored_axis(piece, stride), set()).add(role)
    for turn in piece.turns:
        if turn.size > 1 and turn.stride:
            roles.setdefault(_stored_axis(piece, turn.stride), set()).add(STACK)
    for axis, n in enumerate(piece.shape):
        if n > 1 and axis not in roles:  # one index of it is used, as in w[0]
            roles[axis] = {STACK}
    return roles


def _operand_roles(site: Site) -> list[str]:
    """Return the role of each axis of the operand that is the parameter."""
    side = int(site.operand == "rhs")
    rank = len((site.lhs_shape, site.rhs_shape)[side])
    roles = dict.fromkeys(site.contracting[side], INPUT) | dict.fromkeys(site.batch[side], STACK)
    if site.kind == "conv" and side == 1:
        roles |= dict.fromkeys(site.params["dimension_numbers"].rhs_spec[2:], WINDOW)
    if site.kind == "ragged_dot" and side == 1:
        numbers = site.params.get("ragged_dot_dimension_numbers")
        groups = (0,) if numbers is None else tuple(numbers.rhs_group_dimensions)
        roles |= dict.fromkeys(groups, STACK)
    return [roles.get(axis, OUTPUT) for axis in range(rank)]


def _stored_axis(piece: Piece, stride: int) -> int:
    """Return the stored axis along which entries are so far apart."""
    for axis in range(len(piece.shape)):
        if piece.shape[axis] > 1 and abs(stride) >= math.prod(piece.shape[axis + 1 :]):
            return axis
    return len(piece.shape) - 1


def _axes(shape: tuple[int, ...], uses: list[tuple[int, Roles]], stacked: set[int], lost: str) -> Axes:
    """Join what the uses of a parameter say of its axes; where they disagree, the use with most products decides."""
    if not uses:
        axes = Axes.convention(shape)
        if not stacked:
            return axes._replace(note=lost and f"outputs taken to be last: {lost}")
        left = [a for a in range(len(shape)) if a not in stacked]
        return axes._replace(stack=tuple(sorted(stacked)), outputs=tuple(left[-1:]) if len(left) > 1 else (), source="trace")
    products: Counter[str] = Counter()
    for macs, roles in uses:
        products[_letters(shape, roles)] += macs
    chosen = max(products, key=lambda letters: products[letters])
    others = sorted(products.keys() - {chosen})
    note = f"its uses disagree: {chosen} here, {', '.join(others)} elsewhere" if others else ""
    places = {role: tuple(a for a, letter in enumerate(chosen) if letter == role) for role in "swo"}
    return Axes(shape, places["o"], places["s"], places["w"], "trace", note)


def _letters(shape: tuple[int, ...], roles: Roles) -> str:
    """Return one letter an axis. An axis that a loop takes in chunks is no stack; one of size 1 is what is missing."""
    letters = []
    for axis in range(len(shape)):
        own = roles.get(axis, set())
        plain = own - {STACK} or own
        letters.append(next((role for role in (INPUT, WINDOW, OUTPUT, STACK) if role in plain), "1"))
    if "o" not in letters and "1" in letters:
        letters[len(letters) - 1 - letters[::-1].index("1")] = OUTPUT
    return "".join(letters).replace("1", INPUT)
