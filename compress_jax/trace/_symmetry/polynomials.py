"""Elementwise expressions of parameters as polynomials: sums of products of powers.

All spellings of one scale and shift (a folded norm, a norm by division, by rsqrt) become the same
`Polynomial`. The functions at the end say what primitives do to polynomials.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.core.types import Aval
from compress_jax.trace._jaxpr.interpret import ConstantValue

Dims = tuple[tuple[int, ...], ...]
Step = tuple[str, float]
MOST = 24  # terms: a norm has a handful
MANY = 2**12  # entries of a result that is computed


@dataclass(frozen=True)
class Atom:
    """An elementwise function of one parameter, with the layout of a value.

    Attributes:
      path: of the parameter.
      steps: operations on its entries, in order: ``("add" | "mul" | "pow" | "max", number)`` or
        ``("exp", 0)``.
      dims: for each axis of the value, the axes of the stored parameter in it; none where it is
        broadcast.
      sliced: stored axes that loops run along, each with the loop, counted from the outermost.
    """

    path: str
    steps: tuple[Step, ...] = ()
    dims: Dims = ()
    sliced: tuple[tuple[int, int], ...] = ()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the function of the parameter's entries."""
        for kind, number in self.steps:
            x = APPLY[kind](x, number)
        return x

    def inverse(self, y: np.ndarray | float) -> np.ndarray | None:
        """Return the parameter's entries for which the function is y; None if there are none."""
        y = np.asarray(y, np.float64)
        # The last step is undone first.
        for kind, number in self.steps[::-1]:
            # exp and powers are inverted for positive numbers only, max from its floor on.
            if kind in ("pow", "exp") and not (y > 0).all():
                return None
            if kind == "max" and not (y >= number).all():
                return None
            y = INVERT[kind](y, number)
        return y


Operation = Callable[[np.ndarray, float], np.ndarray]
APPLY: dict[str, Operation] = {
    "add": lambda x, k: x + k,
    "mul": lambda x, k: x * k,
    "pow": lambda x, k: np.power(x, k),
    "max": lambda x, k: np.maximum(x, k),
    "exp": lambda x, _: np.exp(x),
}
INVERT: dict[str, Operation] = {
    "add": lambda y, k: y - k,
    "mul": lambda y, k: y / k,
    "pow": lambda y, k: np.power(y, 1 / k),
    "max": lambda y, _: y,
    "exp": lambda y, _: np.log(y),
}
Factors = tuple[tuple[Atom, float], ...]


@dataclass(frozen=True)
class Polynomial:
    """A sum of terms, each a number times powers of atoms.

    Attributes:
      terms: ``((atom, power), ...)`` and the number, for each term; no two of the same powers, no
        number 0.

    Example:
      >>> variance, gain = parameter("variance", 1), parameter("gain", 1)
      >>> one = multiply(gain, power(add(variance, number(1e-3)), -0.5))
      >>> two = power(multiply(power(add(number(1e-3), variance), 0.5), power(gain, -1.0)), -1.0)
      >>> one == two
      True
    """

    terms: tuple[tuple[Factors, float], ...]

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """The atoms of all terms, once each."""
        found: dict[Atom, None] = {}
        for factors, _ in self.terms:
            found |= dict.fromkeys(atom for atom, _ in factors)
        return tuple(found)

    @property
    def paths(self) -> frozenset[str]:
        """The parameters it is made of."""
        return frozenset(atom.path for atom in self.atoms)

    def moved(self, move: Callable[[Atom], Atom | None]) -> "Polynomial | None":
        """Return the polynomial with other layouts of its atoms; None if one has none."""
        new: dict[Atom, Atom] = {}
        for atom in self.atoms:
            moved = move(atom)
            if moved is None:
                return None
            new[atom] = moved
        terms: list[tuple[Factors, float]] = []
        for factors, k in self.terms:
            terms.append((tuple((new[atom], p) for atom, p in factors), k))
        # Atoms that the move has made equal come together.
        return _sum(terms)


def number(x: float) -> Polynomial:
    """Return a number."""
    return _sum([((), float(x))])


def parameter(path: str, rank: int) -> Polynomial:
    """Return a parameter as it is stored."""
    atom = Atom(path, (), tuple((axis,) for axis in range(rank)))
    return _single(atom)


def add(a: Polynomial, b: Polynomial, sign: float = 1.0) -> Polynomial | None:
    """Return ``a + sign * b``, or None if that is too long."""
    return _limited(_sum([*a.terms, *((factors, sign * k) for factors, k in b.terms)]))


def multiply(a: Polynomial, b: Polynomial) -> Polynomial | None:
    """Return the product, or None if it is too long."""
    # (v + eps) as one atom: its powers cancel, where powers of a sum would not.
    a = _joined(a)
    b = _joined(b)
    if len(a.terms) * len(b.terms) > MOST:
        return None
    pairs = itertools.product(a.terms, b.terms)
    return _limited(_sum([(_product(f, g), k * m) for (f, k), (g, m) in pairs]))


def power(a: Polynomial, exponent: float) -> Polynomial | None:
    """Return a power of a single term, or of one atom plus a number; None of anything else."""
    a = _joined(a)
    if len(a.terms) != 1:
        return None
    ((factors, k),) = a.terms
    if k < 0 and exponent != int(exponent):
        return None  # no real root
    powers = tuple((atom, p * exponent) for atom, p in factors)
    return _sum([(_product((), powers), float(k) ** exponent)])


def stepped(a: Polynomial, kind: str, k: float = 0.0) -> Polynomial | None:
    """Return a step applied to a term that is a power of one atom; None of anything else."""
    a = _joined(a)
    if len(a.terms) != 1 or len(a.terms[0][0]) != 1:
        return None
    (((atom, p),), scale) = a.terms[0]
    return _single(_after(atom, p, scale, (kind, k)))


def as_number(a: Polynomial) -> float | None:
    """Return the number that a polynomial equals, or None if it contains atoms."""
    if not a.terms:
        return 0.0
    return a.terms[0][1] if len(a.terms) == 1 and not a.terms[0][0] else None


def evaluate(a: Polynomial, of: Callable[[Atom], np.ndarray]) -> np.ndarray:
    """Return the value of a polynomial, given the array of each atom; these are broadcast."""
    values: Mapping[Atom, np.ndarray] = {atom: of(atom) for atom in a.atoms}
    total = np.zeros(())
    for factors, k in a.terms:
        term = np.asarray(k)
        for atom, p in factors:
            term = term * (values[atom] if p == 1 else np.power(values[atom], p))
        total = total + term
    return total


def _single(atom: Atom) -> Polynomial:
    # One term: the atom to the power 1, times 1.
    return Polynomial(((((atom, 1.0),), 1.0),))


def _after(atom: Atom, p: float, scale: float, step: Step) -> Atom:
    """Return the atom ``step(scale * atom**p)``."""
    steps = list(atom.steps)
    if p != 1:
        steps.append(("pow", p))
    if scale != 1:
        steps.append(("mul", scale))
    return replace(atom, steps=(*steps, step))


def _joined(a: Polynomial) -> Polynomial:
    """Return a power of one atom plus a number as one atom; any other polynomial unchanged."""
    if len(a.terms) != 2:
        return a
    constants = [k for factors, k in a.terms if not factors]
    others = [(factors, k) for factors, k in a.terms if len(factors) == 1]
    if len(constants) != 1 or len(others) != 1:
        return a
    (((atom, p),), scale) = others[0]
    return _single(_after(atom, p, scale, ("add", constants[0])))


def _product(f: Factors, g: Factors) -> Factors:
    powers: dict[Atom, float] = {}
    for atom, p in (*f, *g):
        powers[atom] = powers.get(atom, 0.0) + p
    # In one order, whichever way they were multiplied: equal products are equal tuples.
    return tuple(sorted(((atom, p) for atom, p in powers.items() if p), key=repr))


def _sum(terms: Iterable[tuple[Factors, float]]) -> Polynomial:
    """Return the polynomial of some terms, equal ones added, in a canonical order."""
    total: dict[Factors, float] = {}
    for factors, k in terms:
        key = _product(factors, ())
        total[key] = total.get(key, 0.0) + k
    return Polynomial(tuple(sorted(((f, k) for f, k in total.items() if k), key=repr)))


def _limited(a: Polynomial) -> Polynomial | None:
    return a if len(a.terms) <= MOST else None


# What primitives do to polynomials, and to scales and shifts by them.


def itself(kernel: Polynomial | None, path: str | None) -> Atom | None:
    """Return the atom of a parameter, if a value is that times factors without the parameter."""
    if kernel is None or len(kernel.terms) != 1:
        return None
    own = [(atom, p) for atom, p in kernel.terms[0][0] if atom.path == path]
    return own[0][0] if len(own) == 1 and own[0][1] == 1 and not own[0][0].steps else None


def combined(name: str, a: Polynomial, b: Polynomial) -> Polynomial | None:
    """Return the result of a binary primitive on polynomials, or None if it is not one."""
    if name in ("add", "add_any", "sub"):
        return add(a, b, -1.0 if name == "sub" else 1.0)
    if name == "mul":
        return multiply(a, b)
    if name == "div":
        inverse = power(b, -1.0)
        return inverse and multiply(a, inverse)
    if name == "pow":
        exponent = as_number(b)
        return None if exponent is None else power(a, exponent)
    # max with a number on either side, as guards against zero are written.
    for one, other in ((a, b), (b, a)):
        if (floor := as_number(other)) is not None:
            return stepped(one, "max", floor) if one.terms else None
    return None


def scaled_and_shifted(
    name: str, scale: Polynomial, shift: Polynomial, other: Polynomial, *, first: bool
) -> tuple[Polynomial | None, Polynomial | None]:
    """Return the scale and shift after a binary primitive, or ``(None, None)`` for others.

    Args:
      name: of the primitive.
      scale: before it.
      shift: before it.
      other: its other operand.
      first: whether the scaled and shifted value is its first operand.
    """
    if name in ("add", "add_any"):
        return scale, add(shift, other)
    if name == "sub" and first:
        return scale, add(shift, other, -1.0)
    if name == "sub":  # other - (y a + b)
        return multiply(scale, number(-1)), add(other, shift, -1.0)
    if name == "mul" or (name == "div" and first):
        factor = other if name == "mul" else power(other, -1.0)
        # A factor without terms is 0, after which nothing of the site is left.
        if factor is not None and factor.terms:
            return multiply(scale, factor), multiply(shift, factor)
    return None, None


def lifted(p: Polynomial, rank: int) -> Polynomial | None:
    """Return a scalar's polynomial laid out for more axes."""

    def lift(atom: Atom) -> Atom | None:
        if len(atom.dims) == rank:
            return atom
        return replace(atom, dims=((),) * rank) if not atom.dims else None  # [] -> [1, ..., 1]

    return p.moved(lift)


def laid_out(atom: Atom, dims: Dims | None) -> Atom | None:
    """Return the atom in another layout, if there is one."""
    return None if dims is None else replace(atom, dims=dims)


def sliced(atom: Atom, loop: int) -> Atom | None:
    """Return a loop's slice along the first axis; None if several stored axes lie in it."""
    if not atom.dims or len(atom.dims[0]) > 1:
        return None
    own = tuple((axis, loop) for axis in atom.dims[0])  # none where the value is broadcast
    return replace(atom, dims=atom.dims[1:], sliced=(*atom.sliced, *own))


def scalar(x: object) -> float | None:
    """Return the number in an array of one entry, if it is known."""
    entries = ConstantValue(x).entries if math.prod(getattr(x, "shape", ())) == 1 else None
    if entries is None or jnp.iscomplexobj(entries):
        return None
    return float(entries.reshape(()))


def uniform_result(eqn: JaxprEqn, values: Sequence[float | None]) -> float | None:
    """Return the number that all entries of an equation's result have, given those of operands.

    Args:
      eqn: the equation, without a jaxpr inside.
      values: for each operand, the number that all its entries have, or None.

    Returns:
      The number; None if it is not known or the entries differ.
    """
    avals: list[Aval] = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    simple = all(
        hasattr(a, "shape") and math.prod(a.shape) <= MANY and a.dtype.kind in "fiub" for a in avals
    )
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    if len(eqn.outvars) != 1 or not simple or eqn.effects:
        return None
    # The primitive itself is run on small arrays, even inside a trace: it needs no second rule.
    with jax.ensure_compile_time_eval():
        pairs = zip(avals[: len(known)], known, strict=True)
        operands = [jnp.full(aval.shape, value, aval.dtype) for aval, value in pairs]
        made = eqn.primitive.bind(*operands, **eqn.params)
        result = np.asarray(made).astype(np.float64).reshape(-1)
    return float(result[0]) if result.size and (result == result[0]).all() else None
