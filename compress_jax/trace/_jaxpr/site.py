"""A site: one contraction in a function's computation, with the parameter that feeds it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from compress_jax.core.axes import Axes
from compress_jax.core.errors import ShapeError
from compress_jax.core.types import Leaves
from compress_jax.trace._jaxpr.strided import Piece, Shape

AxisIndices = tuple[int, ...]
Position = tuple[int | str, ...]


@dataclass(frozen=True)
class Site:
    """One matrix product or convolution as the trace of a function holds it.

    Attributes:
      name: stable, readable and unique: the path of the parameter, or of the parameters that the
        operands come from, joined by ``@`` (attention scores are ``block/query@key``); a second use
        of the same parameter ends in ``#2``.
      kind: ``"dot"``, ``"conv"`` or ``"ragged_dot"``.
      param: path of the parameter that is an operand, or None if both operands are data.
      operand: which operand the parameter is, ``"lhs"`` or ``"rhs"``, or None.
      lhs_shape: of the first operand.
      rhs_shape: of the second operand: of a convolution, its kernel.
      out_shape: of the result.
      lhs_dtype: name of the first operand's dtype.
      rhs_dtype: name of the second operand's dtype.
      out_dtype: name of the result's dtype.
      contracting: axes summed over, ``(of lhs, of rhs)`` in the order they are paired; of a
        convolution the input channels, and in the kernel its window too.
      batch: axes that run along in both operands and the result, ``(of lhs, of rhs)``; for a
        grouped convolution, none.
      param_axes: axes of the parameter itself, as it is stored, that are summed over; None if there
        is no parameter, or if a reshape mixes an axis that is summed over with one that is not.
      batch_axes: axes of the stored parameter that are batch axes of the product (one kernel an
        expert); likewise.
      stack_axes: axes of the stored parameter of which the site sees one slice at a time (layers
        stacked for ``scan``).
      stack_loops: for each of them, which entry of ``loops`` runs along it; None if it is an index
        (``w[2]``).
      also: paths of further parameters in it: the other operand's, or those that a concatenation or
        a sum brings in.
      uses: how the same parameter is used elsewhere: other sites' names, and ``"gather"`` for an
        embedding table.
      loops: lengths of the loops around the site, outermost first: of scans, and of ``shard_map``
        the number of devices. Statistics come back stacked with this leading shape.
      conditional: True inside a branch of ``cond`` or a ``while`` loop: it may run any number of
        times or never.
      params: the equation's own parameters (dimension numbers, strides, precision), for rules that
        replace it.
      position: where in the nested jaxprs it stands.
      pieces: which parts of which parameters lie where in the operand that is a parameter; empty if
        that cannot be told.
      lost: why it cannot.
    """

    name: str
    kind: str
    param: str | None
    operand: str | None
    lhs_shape: Shape
    rhs_shape: Shape
    out_shape: Shape
    lhs_dtype: str
    rhs_dtype: str
    out_dtype: str
    contracting: tuple[AxisIndices, AxisIndices]
    batch: tuple[AxisIndices, AxisIndices] = ((), ())
    param_axes: AxisIndices | None = None
    batch_axes: AxisIndices | None = None
    stack_axes: AxisIndices = ()
    stack_loops: tuple[int | None, ...] = ()
    also: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    loops: tuple[int, ...] = ()
    conditional: bool = False
    params: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    position: Position = field(default=(), repr=False, compare=False)
    pieces: tuple[Piece, ...] = field(default=(), repr=False, compare=False)
    lost: str = field(default="", repr=False, compare=False)

    @property
    def count(self) -> int:
        """How often it runs in one call: the product of the loops around it."""
        return math.prod(self.loops)

    @property
    def groups(self) -> int:
        """Feature groups of a convolution; 1 for anything else."""
        return self.params.get("feature_group_count", 1)

    @property
    def macs(self) -> int:
        r"""Multiply-accumulate operations of one call, all runs counted.

        ``|out| * prod(contracted sizes)``. A convolution counts positions that fall on padding, as
        the literature does. One that is transposed (a dilated input, or a result larger than the
        input) multiplies each input by each element of the kernel, those whose product is cropped
        included; so a gradient for an input costs what its convolution costs. A ragged product
        multiplies each row once, also where it sums over the ragged axis.
        """
        if self.kind == "conv":
            return self.count * self._convolved()
        numbers = self.params.get("ragged_dot_dimension_numbers")
        apart = numbers is not None and set(numbers.lhs_ragged_dimensions) <= set(
            self.contracting[0]
        )
        results = (
            self.out_shape[1:] if apart else self.out_shape
        )  # a result for each group, of a row in just one of them
        return (
            self.count
            * math.prod(results)
            * math.prod(self.rhs_shape[axis] for axis in self.contracting[1])
        )

    def _convolved(self) -> int:
        shapes = zip(
            (self.lhs_shape, self.rhs_shape, self.out_shape),
            self.params["dimension_numbers"],
            strict=True,
        )
        image, kernel, out = ([shape[axis] for axis in axes] for shape, axes in shapes)
        steps = (self.params["lhs_dilation"], self.params["window_strides"])
        along = zip(image[2:], kernel[2:], out[2:], *steps, strict=True)
        return out[0] * out[1] * kernel[1] * math.prod(_products(*axis) for axis in along)

    @property
    def inputs(self) -> dict[str, int]:
        """Which operands are activations: ``{"input": index}`` beside a parameter, else ``{"lhs": 0, "rhs": 1}``."""
        if self.operand is None:
            return {"lhs": 0, "rhs": 1}
        return {"input": 1 if self.operand == "lhs" else 0}

    def contract(
        self, lhs: jax.Array, rhs: jax.Array, preferred_element_type: Any = None
    ) -> jax.Array:
        """Run this very contraction on other operands, of any dtype.

        Args:
          lhs: array of shape ``lhs_shape`` (int8 codes, say).
          rhs: array of shape ``rhs_shape``.
          preferred_element_type: dtype to accumulate in and return, such as ``jnp.int32``.

        Returns:
          The contraction, of shape ``out_shape``.

        Raises:
          ShapeError: for a ragged product, whose group sizes the site does not know.
        """
        if self.kind == "ragged_dot":
            raise ShapeError(
                f"site {self.name!r} is a ragged product: its group sizes are data; return "
                "operands instead"
            )
        keep = CONV if self.kind == "conv" else ("dimension_numbers", "precision")
        options = {key: self.params[key] for key in keep}
        run = jax.lax.conv_general_dilated if self.kind == "conv" else jax.lax.dot_general
        return run(lhs, rhs, **options, preferred_element_type=preferred_element_type)


def _products(image: int, window: int, out: int, dilation: int, stride: int) -> int:
    """Return how many pairs of a pixel and an element of the window a convolution multiplies along one axis."""
    if dilation == 1 and (stride > 1 or out <= image):
        return out * window
    return (
        image * window // stride if window <= out else image * out
    )  # the gradient for a kernel is as large as the kernel


CONV = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
)


# What each axis of a parameter is for, from the sites that use it.


STACK, WINDOW, INPUT, OUTPUT = "s", "w", "i", "o"
Roles = dict[int, set[str]]


def layouts_of_sites(
    sites: Iterable[Site], leaves: Leaves, stacked: Mapping[str, set[int]] | None = None
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
            lost[site.param] = (
                site.lost or "a reshape mixes the axes that are summed over with others"
            )
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
    return [
        (site.param, {a: {(summed | apart).get(a, OUTPUT)} for a, n in enumerate(shape) if n > 1})
    ]


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


def _axes(
    shape: tuple[int, ...], uses: list[tuple[int, Roles]], stacked: set[int], lost: str
) -> Axes:
    """Join what the uses of a parameter say of its axes; where they disagree, the use with most products decides."""
    if not uses:
        axes = Axes.convention(shape)
        if not stacked:
            return axes._replace(note=lost and f"outputs taken to be last: {lost}")
        left = [a for a in range(len(shape)) if a not in stacked]
        return axes._replace(
            stack=tuple(sorted(stacked)),
            outputs=tuple(left[-1:]) if len(left) > 1 else (),
            source="trace",
        )
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
        letters.append(
            next((role for role in (INPUT, WINDOW, OUTPUT, STACK) if role in plain), "1")
        )
    if "o" not in letters and "1" in letters:
        letters[len(letters) - 1 - letters[::-1].index("1")] = OUTPUT
    return "".join(letters).replace("1", INPUT)
