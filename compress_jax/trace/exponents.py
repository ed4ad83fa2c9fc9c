"""How values scale with the parameters: the powers of a factor along an axis that every value of a computation takes up.

If coordinate j of an axis of parameter p is multiplied by :math:`s_j^{e_p}`, a value is multiplied by :math:`s_j^f` along
the same axis, f being a linear form in the unknown exponents e: products add forms, sums demand equal ones, and what is
neither (tanh, the function's output) demands zero. Solutions of all demands leave the function as it is, for every s > 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from compress_jax.trace.axes import Axes, Leaf
from compress_jax.trace.axis_moves import Dims


class Unknown(NamedTuple):
    """The exponent of a parameter along one leaf of one of its axes."""

    path: str
    axis: int
    leaf: Leaf


Form = dict[Unknown, Fraction]
Field = dict[Leaf, Form]


@dataclass(frozen=True)
class Scaled:
    """How a value scales.

    Attributes:
      dims: its axes.
      fields: for each axis, the forms of the leaves along it; those that are left out are zero.
      zero: whether it is known to be zero, which stays zero however it is scaled.
      param: the parameter that it is, untouched so far.
      why: why it does not scale, where that is known.
    """

    dims: Dims
    fields: tuple[Field, ...]
    zero: bool = False
    param: str | None = None
    why: str = ""

    def along(self, leaf: Leaf) -> list[Form]:
        """Return the forms along a leaf, one for each axis on which one was noted."""
        return [own[leaf] for own in self.fields if leaf in own]


class Fixed(NamedTuple):
    """A demand that a form be zero, and what makes it."""

    form: Form
    why: str


def plus(a: Form, b: Form, times: int | Fraction = 1) -> Form:
    """Return ``a + times * b``, zeros left out.

    Example:
      >>> u = Unknown("w", 0, Leaf(2, 1))
      >>> plus({u: Fraction(1)}, {u: Fraction(1)}, -1)
      {}
    """
    total = {name: a.get(name, Fraction(0)) + times * b.get(name, Fraction(0)) for name in {**a, **b}}
    return {name: x for name, x in total.items() if x}


PARTS = ("slice", "split", "unstack")  # they leave out whole leaves; of those they cut, the axes say that they are frozen


@dataclass
class Demands:
    """What is demanded of the unknown exponents so far.

    Attributes:
      axes: what is known of axes.
      fixed: demands, in the order of the computation.
    """

    axes: Axes
    fixed: list[Fixed] = field(default_factory=list)

    def still(self, dims: Dims, why: str = "", zero: bool = False) -> Scaled:
        """Return a value that does not scale."""
        return Scaled(dims, tuple({} for _ in dims), zero, why=why)

    def fix(self, value: Scaled, why: str, axes: Sequence[int] | None = None) -> None:
        """Demand that a value does not scale, along some axes or all."""
        if not value.zero:
            for own in value.fields if axes is None else [value.fields[i] for i in axes]:
                self.fixed += [Fixed(form, why) for form in own.values() if form]

    def equal(self, forms: Sequence[Form], why: str) -> None:
        """Demand that forms be equal."""
        self.fixed += [Fixed(rest, why) for form in forms[1:] if (rest := plus(form, forms[0], -1))]

    def alike(self, values: Sequence[tuple[Field, ...]], why: str) -> None:
        """Demand that values scale alike along every axis."""
        for along in zip(*values, strict=True):
            for leaf in {leaf for own in along for leaf in own}:
                self.equal([own.get(leaf, {}) for own in along], why)

    def moved(self, value: Scaled, dims: Dims, why: str) -> Scaled:
        """Return a value in another shape: leaves keep their order; what cannot be followed must not scale."""
        leaves = self.axes.leaves
        fields: tuple[Field, ...] = tuple({} for _ in dims)
        places: dict[Leaf, list[int]] = {}
        for i, axis in enumerate(dims):
            for leaf in leaves(axis):
                places.setdefault(leaf, []).append(i)
        for leaf in {leaf for own in value.fields for leaf in own}:
            forms = value.along(leaf)
            if len(forms) == len(places.get(leaf, ())):
                for i, form in zip(places[leaf], forms, strict=True):
                    fields[i][leaf] = form
            elif why not in PARTS or leaf in places or self.axes.reason(leaf) is not None:
                self.equal([{}, *forms], f"{why} takes it apart")
        return Scaled(dims, fields, value.zero, why=value.why)
