"""A site: one contraction in a function's computation, with the parameter that feeds it.

Below it, `layouts_of_sites`: what each axis of a parameter is for, from the sites that use it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from compress_jax.core.axes import Axes
from compress_jax.core.errors import ShapeError
from compress_jax.core.types import DType, Leaves
from compress_jax.trace._jaxpr.strided import Piece, Shape

AxisIndices = tuple[int, ...]
Position = tuple[int | str, ...]
"""Index of an equation, then the body inside it, then the index there: ``(3, "body", 1)``."""
EqnParams = dict[str, Any]
"""The parameters of an equation by name, such as ``dimension_numbers``."""


@dataclass(frozen=True)
class Site:
    """One matrix product or convolution in the trace of a function.

    Attributes:
      name: stable, readable and unique: the path of the parameter, or of the parameters that the
        operands come from, joined by ``@`` (attention scores are ``block/query@key``); a second use
        of the same parameter ends in ``#2``.
      kind: ``"dot"``, ``"conv"`` or ``"ragged_dot"``.
      param: path of the parameter that is an operand, or None if both operands are data.
      operand: which operand the parameter is, ``"lhs"`` or ``"rhs"``, or None.
      lhs_shape: shape of the first operand.
      rhs_shape: shape of the second operand; in a convolution that is the kernel.
      out_shape: shape of the result.
      lhs_dtype: name of the first operand's dtype.
      rhs_dtype: name of the second operand's dtype.
      out_dtype: name of the result's dtype.
      contracting: axes summed over, ``(axes of lhs, axes of rhs)`` in the order they are paired; in
        a convolution the input channels, and in the kernel its window too.
      batch: axes that run along in both operands and the result, ``(axes of lhs, axes of rhs)``; a
        grouped convolution has none.
      param_axes: axes of the parameter itself, as it is stored, that are summed over; None if there
        is no parameter, or if a reshape mixes an axis that is summed over with one that is not.
      batch_axes: axes of the stored parameter that are batch axes of the product (one kernel an
        expert); likewise.
      stack_axes: axes of the stored parameter of which the site uses one slice at a time (layers
        stacked for ``scan``).
      stack_loops: for each of them, which entry of ``loops`` runs along it; None if it is an index
        (``w[2]``).
      also: paths of further parameters in it: those of the other operand, or of a concatenation or
        a sum.
      uses: how the same parameter is used elsewhere: other sites' names, and ``"gather"`` for an
        embedding table.
      loops: lengths of the loops around the site, outermost first: the iterations of a scan, the
        devices of a ``shard_map``. Statistics come back stacked with this leading shape.
      conditional: True inside a branch of ``cond`` or a ``while`` loop: it may run any number of
        times or never.
      params: the equation's own parameters (dimension numbers, strides, precision), for rules that
        replace it.
      position: where in the nested jaxprs it stands.
      pieces: which parts of which parameters lie where in the operand that is a parameter; empty if
        that is unknown.
      lost: why the pieces are unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["up"]["kernel"]
      >>> params = {"up": {"kernel": jnp.ones((3, 8))}}
      >>> (site,) = cj.trace.sites(fn, params, jnp.ones((4, 3)))
      >>> site.param, site.operand, site.contracting, site.out_shape
      ('up/kernel', 'rhs', ((1,), (0,)), (4, 8))
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
    params: EqnParams = field(default_factory=dict, repr=False, compare=False)
    position: Position = field(default=(), repr=False, compare=False)
    pieces: tuple[Piece, ...] = field(default=(), repr=False, compare=False)
    lost: str = field(default="", repr=False, compare=False)

    @property
    def count(self) -> int:
        """How often the site runs in one call: the product of the loops around it."""
        return math.prod(self.loops)

    @property
    def groups(self) -> int:
        """Feature groups of a convolution; 1 for anything else."""
        return self.params.get("feature_group_count", 1)

    @property
    def macs(self) -> int:
        r"""Multiply-accumulate operations of one call, all runs counted.

        ``|out| * prod(contracted sizes)``. A convolution counts positions that fall on padding, as
        the literature does. A transposed convolution (a dilated input, or a result larger than the
        input) multiplies each input by each element of the kernel, those whose product is cropped
        included; so a gradient for an input costs what its convolution costs. A ragged product
        multiplies each row once, also where it sums over the ragged axis.
        """
        if self.kind == "conv":
            return self.count * self._convolution_macs()
        results = self.out_shape
        numbers = self.params.get("ragged_dot_dimension_numbers")
        if numbers is not None and set(numbers.lhs_ragged_dimensions) <= set(self.contracting[0]):
            results = results[1:]  # one result for each group, and each row is in just one of them
        contracted = math.prod(self.rhs_shape[axis] for axis in self.contracting[1])
        return self.count * math.prod(results) * contracted

    def _convolution_macs(self) -> int:
        numbers = self.params["dimension_numbers"]
        image = [self.lhs_shape[axis] for axis in numbers.lhs_spec]  # [batch, in, *space]
        kernel = [self.rhs_shape[axis] for axis in numbers.rhs_spec]  # [out, in, *window]
        out = [self.out_shape[axis] for axis in numbers.out_spec]  # [batch, out, *space]
        steps = (self.params["lhs_dilation"], self.params["window_strides"])
        along = zip(image[2:], kernel[2:], out[2:], *steps, strict=True)
        # A result sums over the input channels of its own group, which kernel[1] counts.
        return out[0] * out[1] * kernel[1] * math.prod(_window_macs(*axis) for axis in along)

    @property
    def inputs(self) -> dict[str, int]:
        """Which operands are activations, by name.

        ``{"input": index}`` beside a parameter, else ``{"lhs": 0, "rhs": 1}``.
        """
        if self.operand is None:
            return {"lhs": 0, "rhs": 1}
        return {"input": 1 if self.operand == "lhs" else 0}

    def contract(
        self, lhs: jax.Array, rhs: jax.Array, preferred_element_type: DType | None = None
    ) -> jax.Array:
        """Run the same contraction on other operands, of any dtype.

        Args:
          lhs: array of shape ``lhs_shape`` (int8 codes, say).
          rhs: array of shape ``rhs_shape``.
          preferred_element_type: dtype to accumulate in and return, such as ``jnp.int32``.

        Returns:
          The contraction, of shape ``out_shape``.

        Raises:
          ShapeError: if it is a ragged product, whose group sizes the site does not know.
        """
        if self.kind == "ragged_dot":
            raise ShapeError(
                f"site {self.name!r} is a ragged product: its group sizes are data; return "
                "operands instead"
            )
        if self.kind == "conv":
            run = jax.lax.conv_general_dilated
            names = CONVOLUTION_OPTIONS
        else:
            run = jax.lax.dot_general
            names = ("dimension_numbers", "precision")
        options = {name: self.params[name] for name in names}
        return run(lhs, rhs, **options, preferred_element_type=preferred_element_type)


def _window_macs(image: int, window: int, out: int, dilation: int, stride: int) -> int:
    """Return the products of a pixel and an element of the window along one axis."""
    # A convolution: each result reads one window.
    if dilation == 1 and (stride > 1 or out <= image):
        return out * window
    # A transposed convolution: each pixel is multiplied by the window, and a stride drops results.
    if window <= out:
        return image * window // stride
    return image * out  # the gradient for a kernel, which is as large as the kernel


CONVOLUTION_OPTIONS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
)


STACK = "s"
WINDOW = "w"
INPUT = "i"
OUTPUT = "o"
Roles = dict[int, set[str]]


def layouts_of_sites(
    sites: Iterable[Site], leaves: Leaves, stacked: Mapping[str, set[int]] | None = None
) -> dict[str, Axes]:
    """Return the layouts of some leaves from the sites that use them.

    Args:
      sites: from a trace, or those of a calibration.
      leaves: arrays or shapes by path.
      stacked: axes that loops take one slice of at a time, by path, for leaves that no site uses.

    Returns:
      ``{path: Axes}``, see `layouts`.
    """
    uses: dict[str, list[tuple[int, Roles]]] = {}
    unknown: dict[str, str] = {}
    for site in sites:
        for path, roles in _uses(site, leaves):
            uses.setdefault(path, []).append((site.macs, roles))
        # Noted in case no other site knows; a known use outweighs it below.
        if site.param is not None and site.param not in uses:
            mixed = "a reshape mixes the axes that are summed over with others"
            unknown[site.param] = site.lost or mixed
    stacked = stacked or {}
    return {
        path: _axes(
            tuple(x.shape), uses.get(path, []), stacked.get(path, set()), unknown.get(path, "")
        )
        for path, x in leaves.items()
    }


def _uses(site: Site, params: Leaves) -> list[tuple[str, Roles]]:
    """Return the parameters that a site multiplies by, each with the roles of its axes there."""
    if site.param is None:
        return []
    # Pieces are exact, and of every parameter in a joined operand.
    if site.pieces:
        return [(piece.path, _roles_of_piece(site, piece)) for piece in site.pieces]
    # Without them the axes are known of a single parameter that no reshape has mixed.
    if site.param_axes is None or site.batch_axes is None or site.also:
        return []
    known = dict.fromkeys(site.param_axes, INPUT)
    known |= dict.fromkeys((*site.batch_axes, *site.stack_axes), STACK)
    shape = params[site.param].shape
    return [(site.param, {a: {known.get(a, OUTPUT)} for a, n in enumerate(shape) if n > 1})]


def _roles_of_piece(site: Site, piece: Piece) -> Roles:
    """Return the roles of a parameter's stored axes, by their strides in a site's operand."""
    roles: Roles = {}
    for role, digits in zip(_operand_roles(site), piece.axes, strict=True):
        for size, stride in digits:
            if size > 1 and stride:  # a stride of 0 repeats entries along no stored axis
                roles.setdefault(_stored_axis(piece, stride), set()).add(role)
    # Each iteration of a loop uses a slice of its own: the axis stacks layers.
    for iteration in piece.iterations:
        if iteration.size > 1 and iteration.stride:
            roles.setdefault(_stored_axis(piece, iteration.stride), set()).add(STACK)
    for axis, n in enumerate(piece.shape):
        if n > 1 and axis not in roles:  # one index of it is used, as in w[0]
            roles[axis] = {STACK}
    return roles


def _operand_roles(site: Site) -> list[str]:
    """Return the role of each axis of the operand that is the parameter."""
    side = int(site.operand == "rhs")
    roles = dict.fromkeys(site.contracting[side], INPUT) | dict.fromkeys(site.batch[side], STACK)
    # The window is contracted too, but has a role of its own.
    if site.kind == "conv" and side == 1:
        roles |= dict.fromkeys(site.params["dimension_numbers"].rhs_spec[2:], WINDOW)
    # A ragged product has one matrix for each group of rows, such as one for each expert.
    if site.kind == "ragged_dot" and side == 1:
        numbers = site.params.get("ragged_dot_dimension_numbers")
        groups = (0,) if numbers is None else tuple(numbers.rhs_group_dimensions)
        roles |= dict.fromkeys(groups, STACK)
    rank = len((site.lhs_shape, site.rhs_shape)[side])
    return [roles.get(axis, OUTPUT) for axis in range(rank)]


def _stored_axis(piece: Piece, stride: int) -> int:
    """Return the stored axis along which neighbours are so far apart."""
    # Row-major: the strides of the stored axes fall from the first axis to the last.
    for axis in range(len(piece.shape)):
        if piece.shape[axis] > 1 and abs(stride) >= math.prod(piece.shape[axis + 1 :]):
            return axis
    return len(piece.shape) - 1


def _axes(shape: Shape, uses: list[tuple[int, Roles]], stacked: set[int], unknown: str) -> Axes:
    """Return the layout of a parameter; if its uses disagree, the one with most products decides.

    Args:
      shape: of the parameter.
      uses: multiply-accumulates and roles of each use.
      stacked: the axes that loops run along, where no site uses the parameter.
      unknown: why its uses are not known.

    Returns:
      The layout.
    """
    if not uses:
        return _unused(shape, stacked, unknown)
    # Multiply-accumulates for each way to use the axes.
    products: Counter[str] = Counter()
    for macs, roles in uses:
        products[_letters(shape, roles)] += macs
    chosen = max(products, key=lambda letters: products[letters])
    others = sorted(products.keys() - {chosen})
    note = f"its uses disagree: {chosen} here, {', '.join(others)} elsewhere" if others else ""
    outputs = _indices(chosen, OUTPUT)
    return Axes(shape, outputs, _indices(chosen, STACK), _indices(chosen, WINDOW), "trace", note)


def _indices(letters: str, role: str) -> AxisIndices:
    """Return the axes whose letter is that of a role."""
    return tuple(axis for axis, letter in enumerate(letters) if letter == role)


def _unused(shape: Shape, stacked: set[int], unknown: str) -> Axes:
    """Return the layout of a parameter that no site is known to use."""
    axes = Axes.convention(shape)
    if not stacked:
        return axes._replace(note=unknown and f"outputs taken to be last: {unknown}")
    # Each layer alone as the convention has it: outputs last, and a vector (a bias) has none.
    left = [axis for axis in range(len(shape)) if axis not in stacked]
    outputs = tuple(left[-1:]) if len(left) > 1 else ()
    return axes._replace(stack=tuple(sorted(stacked)), outputs=outputs, source="trace")


def _letters(shape: Shape, roles: Roles) -> str:
    """Return one letter for each axis.

    An axis that a loop takes in chunks is no stack; an axis of size 1 is an output if no other is.
    """
    letters = []  # "1" for an axis of size 1, to which no use gives a role
    for axis in range(len(shape)):
        own = roles.get(axis, set())
        plain = own - {STACK} or own  # a stack only if it is nothing else
        # Part of an axis that a reshape has split may be summed over and the rest kept: an input.
        known = [role for role in (INPUT, WINDOW, OUTPUT, STACK) if role in plain]
        letters.append(known[0] if known else "1")
    # A kernel [in, 1] has its one output on the axis of size 1.
    if OUTPUT not in letters and "1" in letters:
        last = len(letters) - 1 - letters[::-1].index("1")
        letters[last] = OUTPUT
    return "".join(letters).replace("1", INPUT)
