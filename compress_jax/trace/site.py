"""A site: one contraction in a function's computation, with the parameter that feeds it."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax

from compress_jax.core.errors import ShapeError
from compress_jax.trace.strided import Piece, Shape

Axes = tuple[int, ...]
Position = tuple[int | str, ...]


@dataclass(frozen=True)
class Site:
    """One matrix product or convolution as the trace of a function holds it.

    Attributes:
      name: stable, readable and unique: the path of the parameter, or of the parameters that the operands come from, joined
        by ``@`` (attention scores are ``block/query@key``); a second use of the same parameter ends in ``#2``.
      kind: ``"dot"``, ``"conv"`` or ``"ragged_dot"``.
      param: path of the parameter that is an operand, or None if both operands are data.
      operand: which operand the parameter is, ``"lhs"`` or ``"rhs"``, or None.
      lhs_shape: of the first operand.
      rhs_shape: of the second operand: of a convolution, its kernel.
      out_shape: of the result.
      lhs_dtype: name of the first operand's dtype.
      rhs_dtype: name of the second operand's dtype.
      out_dtype: name of the result's dtype.
      contracting: axes summed over, ``(of lhs, of rhs)`` in the order they are paired; of a convolution the input channels,
        and in the kernel its window too.
      batch: axes that run along in both operands and the result, ``(of lhs, of rhs)``; for a grouped convolution, none.
      param_axes: axes of the parameter itself, as it is stored, that are summed over; None if there is no parameter, or if
        a reshape mixes an axis that is summed over with one that is not.
      batch_axes: axes of the stored parameter that are batch axes of the product (one kernel an expert); likewise.
      stack_axes: axes of the stored parameter of which the site sees one slice at a time (layers stacked for ``scan``).
      stack_loops: for each of them, which entry of ``loops`` runs along it; None if it is an index (``w[2]``).
      also: paths of further parameters in it: the other operand's, or those that a concatenation or a sum brings in.
      uses: how the same parameter is used elsewhere: other sites' names, and ``"gather"`` for an embedding table.
      loops: lengths of the loops around the site, outermost first: of scans, and of ``shard_map`` the number of devices.
        Statistics come back stacked with this leading shape.
      conditional: True inside a branch of ``cond`` or a ``while`` loop: it may run any number of times or never.
      params: the equation's own parameters (dimension numbers, strides, precision), for rules that replace it.
      position: where in the nested jaxprs it stands.
      pieces: which parts of which parameters lie where in the operand that is a parameter; empty if that cannot be told.
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
    contracting: tuple[Axes, Axes]
    batch: tuple[Axes, Axes] = ((), ())
    param_axes: Axes | None = None
    batch_axes: Axes | None = None
    stack_axes: Axes = ()
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

        ``|out| * prod(contracted sizes)``. A convolution counts positions that fall on padding, as the literature does. One
        that is transposed (a dilated input, or a result larger than the input) multiplies each input by each element of the
        kernel, those whose product is cropped included; so a gradient for an input costs what its convolution costs. A
        ragged product multiplies each row once, also where it sums over the ragged axis.
        """
        if self.kind == "conv":
            return self.count * self._convolved()
        numbers = self.params.get("ragged_dot_dimension_numbers")
        apart = numbers is not None and set(numbers.lhs_ragged_dimensions) <= set(self.contracting[0])
        results = self.out_shape[1:] if apart else self.out_shape  # a result for each group, of a row in just one of them
        return self.count * math.prod(results) * math.prod(self.rhs_shape[axis] for axis in self.contracting[1])

    def _convolved(self) -> int:
        shapes = zip((self.lhs_shape, self.rhs_shape, self.out_shape), self.params["dimension_numbers"], strict=True)
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

    def contract(self, lhs: jax.Array, rhs: jax.Array, preferred_element_type: Any = None) -> jax.Array:
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
            raise ShapeError(f"site {self.name!r} is a ragged product: its group sizes are data; return operands instead")
        keep = CONV if self.kind == "conv" else ("dimension_numbers", "precision")
        options = {key: self.params[key] for key in keep}
        run = jax.lax.conv_general_dilated if self.kind == "conv" else jax.lax.dot_general
        return run(lhs, rhs, **options, preferred_element_type=preferred_element_type)


def _products(image: int, window: int, out: int, dilation: int, stride: int) -> int:
    """Return how many pairs of a pixel and an element of the window a convolution multiplies along one axis."""
    if dilation == 1 and (stride > 1 or out <= image):
        return out * window
    return image * window // stride if window <= out else image * out  # the gradient for a kernel is as large as the kernel


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
