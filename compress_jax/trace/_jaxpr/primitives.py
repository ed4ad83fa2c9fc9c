"""The table of primitives: what each of them does to values, in one place.

Every rule table of the package (interpret, origin, padding, cost, groups, resize, symmetry) is made
of the classes here, so that no two of them disagree; ``tests/trace/test_primitives.py`` holds them
against it. A primitive is in exactly one class. Operands of `PASS_THROUGH` are its results: the
interpreter passes them on and asks no domain.

After the classes: `nested`, the jaxprs inside an equation, and `kind` and `axes`, the dimensions of
the equations that contract.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from compress_jax.trace._jaxpr.site import AxisIndices, EqnParams


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Each operand is a result, entry for entry: they name, place, order or hide values.
PASS_THROUGH = _names("""
    copy copy_p device_put layout_constraint name optimization_barrier pbroadcast pcast pvary
    reshard shard_alike sharding_constraint stop_gradient xla_metadata_value
""")
# The same numbers in another dtype, or with fewer digits.
CASTS = _names("convert_element_type reduce_precision")
# Entries of one value are moved, left out or repeated; none is changed.
MOVES = _names("""
    broadcast_in_dim expand_dims reshape rev slice split squeeze tile transpose unstack
""")
# Several values are put side by side.
JOINS = _names("concatenate pad stack")
# Indices choose the entries.
INDEXED = _names("dynamic_slice gather")
# Indices choose the entries that are overwritten or added to.
UPDATES = _names("""
    dynamic_update_slice scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub
""")

# Entry by entry.
SUMS = _names("add add_any sub")
SIGNS = _names("neg real")  # linear in their one operand
COMPARISONS = _names("eq eq_to ge gt le le_to lt lt_to ne")
ARITHMETIC = _names("""
    abs and bitcast_convert_type ceil clamp clz complex conj div floor imag integer_pow is_finite
    max min mul nextafter not one_minus_square or population_count rem round select_n shift_left
    shift_right_arithmetic shift_right_logical sign square xor
""")
TRANSCENDENTAL = _names("""
    acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv
    erfc exp exp2 expm1 igamma igamma_grad_a igammac lgamma log log1p log2 logistic polygamma pow
    regularized_incomplete_beta rsqrt sin sinh sqrt tan tanh zeta
""")
ELEMENTWISE = CASTS | SUMS | SIGNS | COMPARISONS | ARITHMETIC | TRANSCENDENTAL

# Along axes.
REDUCTIONS = _names("""
    reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
""")
INDEX_REDUCTIONS = _names("argmax argmin")
CUMULATIVE = _names("cumlogsumexp cummax cummin cumprod cumsum")
WINDOWS = _names("reduce_window_max reduce_window_min reduce_window_sum")
ORDERED = _names("sort top_k")
CONTRACTIONS = _names("conv_general_dilated dot_general ragged_dot ragged_dot_general")

# Values made from none.
CREATION = _names("axis_index create_token empty empty2 iota zeros_like")
RANDOM = _names("""
    random_bits random_clone random_fold_in random_seed random_split random_unwrap random_wrap
    rng_bit_generator rng_uniform threefry2x32
""")

# Over the devices of a mesh, entry by entry.
COLLECTIVES = _names("pmax pmin ppermute psum psum2 psum_invariant")
# No result.
DEBUG = _names("debug_callback debug_print")

# Primitives that run a body once, on the operands as they stand: the parameter that holds it.
CALLS: Mapping[str, str] = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "call": "call_jaxpr",
    "composite": "jaxpr",
    "custom_vmap_call": "call",
    "closed_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "shard_map": "jaxpr",
}
JITS = ("jit", "pjit")
REMATS = ("remat", "remat2", "checkpoint")
# Calls that are nothing but their body (a `jit` that asks for no shardings).
PLAIN_CALLS = (*JITS, "closed_call", "core_closed_call")
CONTROL = frozenset(CALLS) | _names("cond scan while")

# Without a rule: every analysis gives up on what they touch. They are listed so that a primitive
# that is new in JAX is noticed.
OPAQUE = _names("""
    after_all all_gather all_gather_invariant all_gather_reduced all_to_all approx_top_k cholesky
    custom_lin custom_linear_solve eig eigh fft get hessenberg householder_product lu qr
    ragged_all_to_all random_gamma reduce reduce_scatter reduce_window schur select_and_gather_add
    select_and_scatter select_and_scatter_add svd swap triangular_solve tridiagonal
    tridiagonal_solve
""")

CLASSES: Mapping[str, frozenset[str]] = {
    "pass-through": PASS_THROUGH,
    "casts": CASTS,
    "moves": MOVES,
    "joins": JOINS,
    "indexed": INDEXED,
    "updates": UPDATES,
    "sums": SUMS,
    "signs": SIGNS,
    "comparisons": COMPARISONS,
    "arithmetic": ARITHMETIC,
    "transcendental": TRANSCENDENTAL,
    "reductions": REDUCTIONS,
    "index reductions": INDEX_REDUCTIONS,
    "cumulative": CUMULATIVE,
    "windows": WINDOWS,
    "ordered": ORDERED,
    "contractions": CONTRACTIONS,
    "creation": CREATION,
    "random": RANDOM,
    "collectives": COLLECTIVES,
    "debug": DEBUG,
    "control": CONTROL,
    "opaque": OPAQUE,
}


def class_of(name: str) -> str | None:
    """Return the class of a primitive, or None if the table does not have it.

    Example:
      >>> class_of("name"), class_of("tanh"), class_of("a primitive of tomorrow")
      ('pass-through', 'transcendental', None)
    """
    return next((each for each, names in CLASSES.items() if name in names), None)


@dataclass(frozen=True)
class Call:
    """A body that is run once on the operands.

    Attributes:
      body: the jaxpr.
      shards: how many devices run it side by side; None outside ``shard_map``.
    """

    body: ClosedJaxpr
    shards: int | None = None


@dataclass(frozen=True)
class Scan:
    """A body that is run ``length`` times.

    Attributes:
      body: ``(consts, carry, slices of xs) -> (carry, slices of ys)``.
      consts: how many of the operands are constants of the loop.
      carry: how many of the operands after them are carried.
      length: number of iterations.
    """

    body: ClosedJaxpr
    consts: int
    carry: int
    length: int


@dataclass(frozen=True)
class While:
    """A body that is run while a condition holds.

    The operands are ``(condition's consts, body's consts, carry)``.

    Attributes:
      condition: ``(consts, carry) -> bool``.
      body: ``(consts, carry) -> carry``.
      condition_consts: how many operands are the condition's own.
      body_consts: how many operands after them are the body's own.
    """

    condition: ClosedJaxpr
    body: ClosedJaxpr
    condition_consts: int
    body_consts: int


@dataclass(frozen=True)
class Branches:
    """Several bodies, of which the first operand chooses one; it is run on the other operands.

    Attributes:
      bodies: the jaxprs.
    """

    bodies: tuple[ClosedJaxpr, ...]


Nested = Call | Scan | While | Branches


def nested(eqn: JaxprEqn) -> Nested | None:
    """Return the jaxprs inside an equation, or None if it has none that the package knows of.

    Args:
      eqn: an equation of a jaxpr.

    Returns:
      Its bodies and how its operands reach them.

    Example:
      >>> import jax
      >>> eqn = jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0).jaxpr.eqns[0]
      >>> nested(eqn).body.jaxpr.eqns[0].primitive.name
      'add'
    """
    name = eqn.primitive.name
    p = eqn.params
    if name == "scan":
        return Scan(p["jaxpr"], *_scan_sizes(p), p["length"])
    if name == "while":
        return While(p["cond_jaxpr"], p["body_jaxpr"], p["cond_nconsts"], p["body_nconsts"])
    if name == "cond":
        return Branches(tuple(p["branches"]))
    body = p.get(CALLS.get(name, ""))
    if body is None:
        return None
    return Call(closed(body), _shards(p) if name == "shard_map" else None)


def bodies(inner: Nested | None) -> dict[int | str, ClosedJaxpr]:
    """Return the jaxprs inside an equation, each by its word in a `Position`.

    Example:
      >>> import jax
      >>> fn = lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x)
      >>> list(bodies(nested(jax.make_jaxpr(fn)(1).jaxpr.eqns[0])))
      ['cond', 'body']
    """
    match inner:
        case Call(body) | Scan(body):
            return {"body": body}
        case While(condition, body):
            return {"cond": condition, "body": body}
        case Branches(every):
            return dict(enumerate(every))
    return {}


def _scan_sizes(params: EqnParams) -> tuple[int, int]:
    """Return how many operands of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # newer JAX has trees instead
    return len(consts), len(carry)


def _shards(params: EqnParams) -> int:
    return math.prod(params["mesh"].shape[axis] for axis in manual_axes(params))


def manual_axes(params: EqnParams) -> tuple[str, ...]:
    """Return the mesh axes a shard_map equation makes manual, in the order of the mesh."""
    manual = params.get("newly_manual_axes", params.get("manual_axes", frozenset()))
    return tuple(axis for axis in params["mesh"].axis_names if axis in manual)


def closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """Return a jaxpr with its constants; some primitives hold an open one, which has none."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, [])


def opened(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Return a jaxpr that takes its constants as its first arguments."""
    inner = jaxpr.jaxpr
    return ClosedJaxpr(inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars]), [])


KINDS: Mapping[str, str] = {
    "dot_general": "dot",
    "conv_general_dilated": "conv",
    "ragged_dot": "ragged_dot",
    "ragged_dot_general": "ragged_dot",
}


def kind(eqn: JaxprEqn) -> str | None:
    """Return ``"dot"``, ``"conv"`` or ``"ragged_dot"``, or None if an equation does not contract.

    A product that sums over no axis (``einsum("bd,dn->bdn")``) multiplies entry by entry: it is no
    layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> kind(jax.make_jaxpr(jnp.outer)(jnp.ones(2), jnp.ones(3)).jaxpr.eqns[0]) is None
      True
    """
    found = KINDS.get(eqn.primitive.name)
    if found == "dot":
        (contracting, _), _ = eqn.params["dimension_numbers"]
        return found if contracting else None
    return found


def axes(eqn: JaxprEqn) -> tuple[tuple[AxisIndices, AxisIndices], tuple[AxisIndices, AxisIndices]]:
    """Return the contracting and the batch axes of a contraction, each of lhs and of rhs.

    Args:
      eqn: an equation that contracts.

    Returns:
      ``(contracting, batch)``. A convolution contracts the kernel's input channels and window, in
      the order of the kernel's own axes, with the image's channels; a ragged product contracts as a
      product does and has no batch axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> axes(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 4))).jaxpr.eqns[0])
      (((1,), (0,)), ((), ()))
    """
    if kind(eqn) == "conv":
        numbers = eqn.params["dimension_numbers"]
        return ((numbers.lhs_spec[1],), tuple(sorted(numbers.rhs_spec[1:]))), ((), ())
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    pairs = eqn.params["dimension_numbers"] if numbers is None else numbers.dot_dimension_numbers
    (left, right), (left_batch, right_batch) = pairs
    return (tuple(left), tuple(right)), (tuple(left_batch), tuple(right_batch))


def contracts_inside(eqn: JaxprEqn) -> bool:
    """Tell whether an equation with jaxprs that `nested` does not know contracts inside.

    A Pallas kernel or a custom solver may.
    """
    return any(_contracts(value) for value in eqn.params.values())


def _contracts(value: object) -> bool:
    if isinstance(value, (Jaxpr, ClosedJaxpr)):  # one class in newer JAX
        return any(kind(eqn) is not None or contracts_inside(eqn) for eqn in value.eqns)
    return isinstance(value, (tuple, list)) and any(map(_contracts, value))
