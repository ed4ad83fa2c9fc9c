"""What every primitive does to values, in one place: each rule table names its classes here, so that no two disagree.

A primitive is in one class. What passes a value on is known to the interpreter, which asks no
domain about it.
"""

import math
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from compress_jax.trace._jaxpr.site import AxisIndices

# Jaxprs inside equations, in four forms: a call, a scan, a while loop, a choice of branches.


CALLS = {  # primitive -> the parameter that holds the body, which takes the equation's operands as they stand
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
    """A body that is run ``length`` times: ``(consts, carry, slices of xs) -> (carry, slices of ys)``.

    Attributes:
      body: the jaxpr.
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
    """A body that is run while a condition holds, on ``(condition's consts, body's consts, carry)``.

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
    """One of several bodies, chosen by the first operand, is run on the others.

    Attributes:
      bodies: the jaxprs.
    """

    bodies: tuple[ClosedJaxpr, ...]


Nested = Call | Scan | While | Branches


def closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """Return a jaxpr with its constants; those that have none are kept open by some primitives."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, [])


def opened(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Return a jaxpr that takes what it captured as its first arguments."""
    inner = jaxpr.jaxpr
    return ClosedJaxpr(inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars]), [])


def nested(eqn: JaxprEqn) -> Nested | None:
    """Return what an equation runs inside, or None if it runs nothing or nothing that is known here.

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
    name, p = eqn.primitive.name, eqn.params
    if name == "scan":
        return Scan(p["jaxpr"], *_scan_sizes(p), p["length"])
    if name == "while":
        return While(p["cond_jaxpr"], p["body_jaxpr"], p["cond_nconsts"], p["body_nconsts"])
    if name == "cond":
        return Branches(tuple(p["branches"]))
    body = p.get(CALLS.get(name, ""))
    return None if body is None else Call(closed(body), _shards(p) if name == "shard_map" else None)


def bodies(form: Nested | None) -> dict[int | str, ClosedJaxpr]:
    """Return the jaxprs of a form by the step of a position that leads into them.

    Example:
      >>> import jax
      >>> loop = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x))(1)
      >>> list(bodies(nested(loop.jaxpr.eqns[0])))
      ['cond', 'body']
    """
    match form:
        case Call(body) | Scan(body):
            return {"body": body}
        case While(condition, body):
            return {"cond": condition, "body": body}
        case Branches(every):
            return dict(enumerate(every))
    return {}


def _scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many operands of a scan are constants and how many are carried; newer JAX keeps them as trees."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _shards(params: dict[str, Any]) -> int:
    """Return how many devices a shard_map runs its body on: the product of the mesh axes it makes manual."""
    return math.prod(params["mesh"].shape[axis] for axis in manual_axes(params))


def manual_axes(params: dict[str, Any]) -> tuple[str, ...]:
    """Return the mesh axes a shard_map equation makes manual, in the order of the mesh."""
    manual = params.get("newly_manual_axes", params.get("manual_axes", frozenset()))
    return tuple(axis for axis in params["mesh"].axis_names if axis in manual)


PASSED = frozenset(  # each operand is a result, number for number: they name, place, order or hide values
    "copy copy_p device_put layout_constraint name optimization_barrier pbroadcast pcast pvary "
    "reshard"
    " shard_alike sharding_constraint stop_gradient xla_metadata_value".split()
)
CASTS = frozenset(
    "convert_element_type reduce_precision".split()
)  # the same numbers, in a dtype or with digits of its own
MOVES = frozenset(  # of one value: entries elsewhere, left out or repeated, none changed
    "broadcast_in_dim expand_dims reshape rev slice split squeeze tile transpose unstack".split()
)
JOINS = frozenset("concatenate pad stack".split())  # several values side by side
INDEXED = frozenset("dynamic_slice gather".split())  # entries that indices pick
UPDATES = frozenset(
    "dynamic_update_slice scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub".split()
)

SUMS = frozenset("add add_any sub".split())
SIGNS = frozenset("neg real".split())  # linear, entry by entry
COMPARISONS = frozenset("eq eq_to ge gt le le_to lt lt_to ne".split())
ARITHMETIC = frozenset(  # one operation an entry, besides those above
    "abs and bitcast_convert_type ceil clamp clz complex conj div floor imag integer_pow "
    "is_finite max min mul nextafter not"
    " one_minus_square or population_count rem round select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign"
    " square xor".split()
)
TRANSCENDENTAL = frozenset(
    "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf "
    "erf_inv erfc exp exp2 expm1"
    " igamma igamma_grad_a igammac lgamma log log1p log2 logistic polygamma pow "
    "regularized_incomplete_beta rsqrt sin sinh"
    " sqrt tan tanh zeta".split()
)
ELEMENTWISE = CASTS | SUMS | SIGNS | COMPARISONS | ARITHMETIC | TRANSCENDENTAL

REDUCTIONS = frozenset(
    f"reduce_{kind}" for kind in ("sum", "max", "min", "prod", "and", "or", "xor")
)
INDEX_REDUCTIONS = frozenset("argmax argmin".split())
RUNNING = frozenset("cumlogsumexp cummax cummin cumprod cumsum".split())
WINDOWS = frozenset("reduce_window_max reduce_window_min reduce_window_sum".split())
ORDERED = frozenset("sort top_k".split())
CONTRACTIONS = frozenset("conv_general_dilated dot_general ragged_dot ragged_dot_general".split())

NUMBERS = frozenset("axis_index create_token empty empty2 iota zeros_like".split())  # from nothing
RANDOM = frozenset(
    "random_bits random_clone random_fold_in random_seed random_split random_unwrap random_wrap "
    "rng_bit_generator"
    " rng_uniform threefry2x32".split()
)
COLLECTIVES = frozenset(  # over the devices of a mesh, entry by entry
    "pmax pmin ppermute psum psum2 psum_invariant".split()
)
SILENT = frozenset("debug_callback debug_print".split())  # they look only

CONTROL = frozenset(CALLS) | frozenset("cond scan while".split())  # they run other jaxprs inside

OPAQUE = frozenset(  # whatever they touch is frozen, still and uncounted: named here so that a new one is noticed
    "after_all all_gather all_gather_invariant all_gather_reduced all_to_all approx_top_k "
    "cholesky custom_lin"
    " custom_linear_solve eig eigh fft get hessenberg householder_product lu qr ragged_all_to_all "
    "random_gamma reduce"
    " reduce_scatter reduce_window schur select_and_gather_add select_and_scatter "
    "select_and_scatter_add svd swap"
    " triangular_solve tridiagonal tridiagonal_solve".split()
)

CLASSES: dict[str, frozenset[str]] = {
    "passed": PASSED,
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
    "running": RUNNING,
    "windows": WINDOWS,
    "ordered": ORDERED,
    "contractions": CONTRACTIONS,
    "numbers": NUMBERS,
    "random": RANDOM,
    "collectives": COLLECTIVES,
    "silent": SILENT,
    "control": CONTROL,
    "opaque": OPAQUE,
}


def class_of(name: str) -> str | None:
    """Return the class of a primitive, or None if it is not known here.

    Example:
      >>> class_of("name"), class_of("tanh"), class_of("a primitive of tomorrow")
      ('passed', 'transcendental', None)
    """
    return next((each for each, names in CLASSES.items() if name in names), None)


# The equations that contract, and their axes in one form for products, convolutions and ragged
# products.


KINDS = {
    "dot_general": "dot",
    "conv_general_dilated": "conv",
    "ragged_dot": "ragged_dot",
    "ragged_dot_general": "ragged_dot",
}


def kind(eqn: JaxprEqn) -> str | None:
    """Return ``"dot"``, ``"conv"`` or ``"ragged_dot"``, or None for an equation that does not contract.

    A product that sums over no axis (``einsum("bd,dn->bdn")``) multiplies entry by entry: it is no
    layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> kind(jax.make_jaxpr(jnp.outer)(jnp.ones(2), jnp.ones(3)).jaxpr.eqns[0]) is None
      True
    """
    found = KINDS.get(eqn.primitive.name)
    return None if found == "dot" and not eqn.params["dimension_numbers"][0][0] else found


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


def hidden(eqn: JaxprEqn) -> bool:
    """Tell whether an equation that nobody looks into (a Pallas kernel, a custom solver) contracts somewhere inside."""
    return any(_contracts(value) for value in eqn.params.values())


def _contracts(value: Any) -> bool:
    if isinstance(value, (Jaxpr, ClosedJaxpr)):  # one class in newer JAX
        return any(kind(eqn) is not None or hidden(eqn) for eqn in value.eqns)
    return isinstance(value, (tuple, list)) and any(map(_contracts, value))
