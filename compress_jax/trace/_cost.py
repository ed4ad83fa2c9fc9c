"""Count what a function costs, from its trace: FLOPs, bit-operations, parameters, bytes.

`cost` puts three things together: the multiply-accumulates of every site, how the weights in it
are `stored`, and the `operations` that are no contractions.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from compress_jax.core.bits import Bits
from compress_jax.core.compression import Compression, CompressionState, bound
from compress_jax.core.errors import ConfigError, ShapeError, StateError
from compress_jax.core.packed import Sparse, is_packed, to_dense
from compress_jax.core.paths import flatten, match
from compress_jax.core.table import aligned, units
from compress_jax.core.types import Leaf, ModelFn, Params, PyTree, Shape
from compress_jax.trace._jaxpr import primitives as p
from compress_jax.trace._jaxpr.find_sites import Traced, layouts_of, trace
from compress_jax.trace._jaxpr.origin import DATA, PARAMETER, Origin
from compress_jax.trace._jaxpr.primitives import Branches, Call, Scan, While, nested
from compress_jax.trace._jaxpr.site import Site


@dataclass(frozen=True)
class SiteCost:
    """What one contraction costs in one call, all runs of it counted.

    Attributes:
      site: the contraction.
      params: entries of the parameters in it; those of a shared parameter are at each of its sites.
      lhs_bits: bits of one number of the first operand; a mean where parameters of different widths
        are joined.
      rhs_bits: likewise for the second.
      density: share of the weights that are not zero; 1 without a compression.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> total = cj.trace.cost(fn, {"kernel": jnp.ones((3, 8))}, jnp.ones((4, 3)))
      >>> each = total.by_site["kernel"]
      >>> each.macs, each.params, each.weight_bits, each.bit_operations
      (96, 24, 32.0, 98304)
    """

    site: Site
    params: int
    lhs_bits: float
    rhs_bits: float
    density: float = 1.0

    @property
    def macs(self) -> int:
        """Multiply-accumulates, those with pruned weights too."""
        return self.site.macs

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate."""
        return 2 * self.site.macs

    @property
    def count(self) -> int:
        """How often the site runs."""
        return self.site.count

    @property
    def weight_bits(self) -> float | None:
        """Bits of the parameter; None if both operands are activations."""
        return {"lhs": self.lhs_bits, "rhs": self.rhs_bits}.get(self.site.operand or "")

    @property
    def activation_bits(self) -> float:
        """Bits of the other operand; those of the first if both are activations."""
        return self.rhs_bits if self.site.operand == "lhs" else self.lhs_bits

    @property
    def bit_operations(self) -> int:
        """``macs * lhs_bits * rhs_bits``."""
        return round(self.macs * self.lhs_bits * self.rhs_bits)

    @property
    def effective_macs(self) -> int:
        """``macs * density``: those whose weight is not zero."""
        return round(self.macs * self.density)

    @property
    def effective_bit_operations(self) -> int:
        """``macs * lhs_bits * rhs_bits * density``."""
        return round(self.macs * self.lhs_bits * self.rhs_bits * self.density)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the results."""
        bits = self.count * math.prod(self.site.out_shape) * dtype_bits(self.site.out_dtype)
        return -(-bits // 8)  # rounded up


@dataclass(frozen=True)
class Cost:
    """What one call of a function costs; prints as a table.

    Attributes:
      by_site: the contractions by name, in program order.
      params: number of parameters: entries under the ``"params"`` collection if there is one at the
        top (running statistics are no parameters), else all entries.
      other_flops: operations that are not contractions: one for each result of an operation on
        elements, ``n - 1`` for a sum of ``n``.
      transcendentals: results of exp, log, tanh, rsqrt, ...; not among the FLOPs.
      notes: what is not counted, or not exactly, and why.
      products: multiplications of products that sum over no axis: among the MACs, but no site's.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: jnp.tanh(x @ params["kernel"])
      >>> total = cj.trace.cost(fn, {"kernel": jnp.ones((3, 8))}, jnp.ones((4, 3)))
      >>> total.macs, total.flops, total.transcendentals, total.activation_bytes
      (96, 192, 32, 128)
    """

    by_site: dict[str, SiteCost]
    params: int
    other_flops: int
    transcendentals: int
    notes: dict[str, str] = field(default_factory=dict)
    products: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all contractions, those with pruned weights included."""
        return sum(each.macs for each in self.by_site.values()) + self.products

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate, and the other operations."""
        return 2 * self.macs + self.other_flops

    @property
    def bit_operations(self) -> int:
        """Sum of ``macs * lhs_bits * rhs_bits``, those with pruned weights included."""
        return sum(each.bit_operations for each in self.by_site.values())

    @property
    def effective_macs(self) -> int:
        """Multiply-accumulates whose weight is not zero: those left if hardware skips zeros."""
        return sum(each.effective_macs for each in self.by_site.values())

    @property
    def effective_bit_operations(self) -> int:
        """Bit-operations whose weight is not zero."""
        return sum(each.effective_bit_operations for each in self.by_site.values())

    @property
    def activation_bytes(self) -> int:
        """Bytes of the results of all contractions."""
        return sum(each.activation_bytes for each in self.by_site.values())

    def __str__(self) -> str:
        """Return a table of the sites, the total, the other operations and the notes."""
        sites = [_row(name, each, self.macs) for name, each in self.by_site.items()]
        rows = [HEAD, *sites, self._total()]
        # Without zeros density and effective bit-operations say nothing new: drop both columns.
        if all(each.density == 1 for each in self.by_site.values()):
            rows = [row[:DENSE] + row[DENSE + 2 :] for row in rows]
        work = (
            f"{units(self.flops)} FLOPs: {units(2 * self.macs)} in these products, "
            f"{units(self.other_flops)} in other operations; "
            f"{units(self.transcendentals)} transcendental functions"
        )
        notes = [f"{what}: {why}" for what, why in self.notes.items()]
        return "\n".join([aligned(rows, left=2), work, *notes])

    def _total(self) -> tuple[str, ...]:
        share = "100.0%" if self.macs else ""
        numbers = (
            self.macs,
            self.params,
            self.bit_operations,
            self.effective_bit_operations,
            self.activation_bytes,
        )
        macs, params, bits, effective, out = map(units, numbers)
        return "total", "", "", macs, share, params, "", bits, "", effective, out


# The columns of the table; `_row` and `Cost._total` have the same order.
HEAD = (
    "site",
    "product",  # shapes: lhs * rhs > result
    "runs",
    "MACs",
    "share",  # of all MACs
    "params",
    "bits",  # of lhs x of rhs
    "bit-ops",
    "density",
    "effective",  # bit-operations times density
    "bytes out",
)
DENSE = HEAD.index("density")


def _row(name: str, cost: SiteCost, macs: int) -> tuple[str, ...]:
    site = cost.site
    lhs = "x".join(map(str, site.lhs_shape))
    rhs = "x".join(map(str, site.rhs_shape))
    out = "x".join(map(str, site.out_shape))
    return (
        name,
        f"{lhs} * {rhs} > {out}",
        f"{cost.count}{'?' if site.conditional else ''}",
        units(cost.macs),
        f"{cost.macs / max(macs, 1):.1%}",
        units(cost.params),
        f"{cost.lhs_bits:.3g} x {cost.rhs_bits:.3g}",
        units(cost.bit_operations),
        f"{cost.density:.1%}",
        units(cost.effective_bit_operations),
        units(cost.activation_bytes),
    )


ActivationBits = int | Mapping[str, int] | None


def cost(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    compression: Compression | None = None,
    state: CompressionState | None = None,
    activation_bits: ActivationBits = None,
) -> Cost:
    r"""Count what ``fn(params, *inputs)`` costs, without running it.

    .. math::

       \text{bit-operations} =
       \sum_\text{sites} \text{MACs} \cdot b_\text{lhs} \cdot b_\text{rhs}

    where b is the number of bits of an operand's entries: the width of a code for a parameter that
    is stored as codes (scales and codebooks do not count; factors of low rank are multiplied out),
    ``activation_bits`` for data, else the width of the dtype. Products with pruned weights are
    counted, as in the papers; the ``effective`` numbers multiply each site by its density, the
    share of the weights that are not zero (a quantizer rounds some to zero too).

    Loops count as often as they run, a ``shard_map`` on every device. A ``while`` loop counts for
    one iteration and a choice with every branch; `Cost.notes` says so, and lists primitives whose
    insides are not counted. Results that are not used count too, though ``jit`` drops them.

    Args:
      fn: a pure function of params and inputs.
      params: tree of arrays, packed leaves or ``ShapeDtypeStruct``.
      inputs: trees of arrays or ``ShapeDtypeStruct``.
      compression: the weights count as it packs them; ``params`` must be arrays then.
      state: its state; by default that of `init` once the compression is bound to the layouts of
        the trace.
      activation_bits: bits of operands that are data: one number for all, or
        ``{glob over names of sites: bits}``, first match wins.

    Returns:
      The cost: ``.macs``, ``.flops``, ``.params``, ``.bit_operations``, ``.by_site``, ...;
      ``print`` shows a table, with the densities and effective bit-operations if a weight is zero,
      and ``?`` beside the runs of what may not run.

    Raises:
      ShapeError: if there is a compression and ``params`` are shapes.
      StateError: if there is a state without its compression.
      NoMatchError: if a glob matches no site.
      ConfigError: if bits are not a positive integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> def fn(params, x):
      ...     return jnp.maximum(x @ params["kernel"] + params["bias"], 0)
      >>> params = {"kernel": jnp.ones((3, 8)), "bias": jnp.ones((1, 8))}
      >>> total = cj.trace.cost(fn, params, jnp.ones((4, 3)))
      >>> total.macs, total.flops, total.params
      (96, 256, 32)
      >>> print(total)
      site    product          runs  MACs   share  params     bits  bit-ops  bytes out
      kernel  4x3 * 3x8 > 4x8     1    96  100.0%      24  32 x 32    98.3k        128
      total                            96  100.0%      32             98.3k        128
      256 FLOPs: 192 in these products, 64 in other operations; 0 transcendental functions

    References:
      Yao et al., HAWQ-V3: Dyadic Neural Network Quantization, 2021: bit-operations are MACs times
      both widths. Baskin et al., UNIQ: Uniform Noise Injection for Non-Uniform Quantization of
      Neural Networks, 2018, add the accumulator's bits.
    """
    # Packed leaves are traced as the dense arrays that the function sees.
    traced = trace(fn, shapes(params), *inputs)
    # A state that is given was made for its own layouts; a new one takes those of the trace.
    if compression is not None and state is None:
        compression = bound(compression, layouts_of(traced))
    leaves = stored(params, compression, state)
    names = [site.name for site in traced.sites.values()]
    by_site = _by_site(traced, leaves, _bits_by_site(activation_bits, names))
    counted = operations(traced.jaxpr.jaxpr)
    return Cost(
        by_site,
        _parameters(leaves),
        counted.flops,
        counted.transcendentals,
        _notes(traced, counted),
        counted.products,
    )


def _by_site(
    traced: Traced, leaves: dict[str, "Stored"], activations: dict[str, int]
) -> dict[str, SiteCost]:
    costs = {}
    for position, site in traced.sites.items():
        _, lhs, rhs, _ = traced.found.contractions[position]
        width = activations.get(site.name)
        # A weight that is zero removes the product, on whichever side it is.
        lhs_bits, lhs_density = _operand(lhs, leaves, dtype_bits(site.lhs_dtype), width)
        rhs_bits, rhs_density = _operand(rhs, leaves, dtype_bits(site.rhs_dtype), width)
        paths = [path for path in (site.param, *site.also) if path is not None]
        size = sum(leaves[path].size for path in paths)  # whole leaves, where slices are used too
        costs[site.name] = SiteCost(site, size, lhs_bits, rhs_bits, lhs_density * rhs_density)
    return costs


def _operand(
    origin: Origin, leaves: dict[str, "Stored"], own: int, activation: int | None
) -> tuple[float, float]:
    """Return bits and density of an operand; ``own`` are the bits of its dtype."""
    if origin.level == DATA:
        return activation or own, 1.0
    held = [leaves[path] for path in origin.paths if origin.level == PARAMETER]
    size = sum(each.size for each in held)
    # A constant (a rotation, a window) is no leaf of params: it has the bits of its dtype.
    if not size:
        return own, 1.0
    # Weighted by entries, where the operand joins leaves of several widths.
    bits = sum(each.size * (each.bits or own) for each in held) / size
    density = sum(each.nonzero for each in held) / size
    return bits, density


def _bits_by_site(bits: ActivationBits, names: Sequence[str]) -> dict[str, int]:
    """Return the bits of activations by site; sites that no glob matches are missing."""
    if bits is None:
        return {}
    patterns = bits if isinstance(bits, Mapping) else {"**": bits}
    chosen: dict[str, int] = {}
    for pattern, width in patterns.items():
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ConfigError(
                f"activation_bits: {width!r} for {pattern!r} is not a number of bits; give an "
                "integer from 1"
            )
        chosen = dict.fromkeys(match(pattern, names), width) | chosen  # the first match wins
    return chosen


def _parameters(leaves: dict[str, "Stored"]) -> int:
    # Linen variables hold collections such as batch_stats beside "params".
    inside = [leaf for path, leaf in leaves.items() if path.startswith("params/")]
    return sum(leaf.size for leaf in inside or leaves.values())


def _notes(traced: Traced, counted: "Operations") -> dict[str, str]:
    notes = {}
    for primitive, times in counted.uncounted.items():
        contracts = primitive in traced.found.hidden.values()  # products inside, as in a kernel
        missing = "products and operations" if contracts else "operations"
        notes[primitive] = f"its {missing} are not counted (runs: {times})"
    if counted.products:
        notes["dot_general"] = (
            f"products that sum over no axis are no sites, but {counted.products} of the MACs"
        )
    if counted.loops:
        notes["while"] = (
            f"a number of iterations that depends on data counts as one (loops: {counted.loops})"
        )
    if counted.choices:
        notes["cond"] = (
            f"every branch is counted, though only one is taken (choices: {counted.choices})"
        )
    return notes


@dataclass(frozen=True)
class Stored:
    """One leaf of params as it is stored.

    Attributes:
      size: number of entries.
      bits: width of the codes; None if it is stored as numbers (dense, sparse or low rank), used in
        the dtype they have.
      nonzero: entries that are not exactly zero; all of them where there is no compression.
    """

    size: int
    bits: int | None
    nonzero: int


def stored(
    params: Params, compression: Compression | None, state: CompressionState | None
) -> dict[str, Stored]:
    """Return how every leaf is stored: in how many bits, and how many of its entries are not zero.

    Args:
      params: tree of arrays, or of shapes if there is no compression; leaves may be packed already.
      compression: the method that packs them.
      state: its state; by default that of ``compression.init(params)``.

    Returns:
      The leaves by path.

    Raises:
      ShapeError: if there is a compression and a leaf is a shape, not an array.
      StateError: if there is a state without its compression.

    Example:
      >>> from compress_jax.core.packed import Clustered
      >>> codes = Clustered(Bits.pack(jnp.array([0, 1, 3]), 2), jnp.array([0.0, 1.0, 2.0, 3.0]))
      >>> stored({"kernel": codes, "bias": jnp.zeros(3)}, None, None)
      {'bias': Stored(size=3, bits=None, nonzero=3), 'kernel': Stored(size=3, bits=2, nonzero=2)}
    """
    if compression is None:
        if state is not None:
            raise StateError(
                "a state was given without the compression it belongs to; pass compression=... too"
            )
        return {path: _leaf(x, is_packed(x)) for path, x in flatten(params)[0].items()}
    # `pack` needs values: shapes are refused here, where the leaf can be named.
    for path, x in flatten(params)[0].items():
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ShapeError(
                f"{path!r} is only a shape: how a compression stores weights shows when arrays "
                "are packed; give arrays (model.init instead of jax.eval_shape), or leave "
                "compression out"
            )
    packed = compression.pack(params, compression.init(params) if state is None else state)
    return {path: _leaf(x, True) for path, x in flatten(packed)[0].items()}


def _leaf(x: Leaf, compressed: bool) -> Stored:
    """Return how one leaf is stored, an array or a packed node."""
    size = math.prod(getattr(x, "shape", ()))
    codes = getattr(x, "codes", None)  # of any class of packed node
    values = codes.values if isinstance(codes, Sparse) else codes  # quantized after pruning
    bits = values.bits if isinstance(values, Bits) else None
    # Counted in the values that the function sees: a code may stand for zero too.
    nonzero = int(jnp.count_nonzero(to_dense(x))) if compressed else size
    return Stored(size, bits, nonzero)


def shapes(params: Params) -> Params:
    """Return params with the shape and dtype of each packed leaf in place of it."""

    def dense(x: Leaf) -> Leaf:
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_packed(x) else x

    return jax.tree.map(dense, params, is_leaf=is_packed)


def dtype_bits(dtype: str) -> int:
    """Return the bits of one number of a dtype.

    Args:
      dtype: its name.

    Returns:
      Bits; a boolean takes 8, an int4 takes 4.

    Example:
      >>> dtype_bits("bfloat16"), dtype_bits("int4"), dtype_bits("bool")
      (16, 4, 8)
    """
    # iinfo and finfo know the types narrower than a byte; NumPy's itemsize of an int4 is 1.
    kind = jnp.dtype(dtype)
    if jnp.issubdtype(kind, jnp.integer):
        return jnp.iinfo(kind).bits
    return jnp.finfo(kind).bits if jnp.issubdtype(kind, jnp.floating) else 8 * kind.itemsize


# No operation: they move, cut, name or make numbers. Contractions are counted as sites.
MOVING = p.PASS_THROUGH | p.MOVES | p.JOINS | p.INDEXED | p.CREATION | p.DEBUG | p.CONTRACTIONS
FREE = MOVING | frozenset(
    """
    all_gather all_gather_invariant all_gather_reduced all_to_all bitcast_convert_type
    dynamic_update_slice ppermute ragged_all_to_all random_clone random_seed random_unwrap
    random_wrap scatter
    """.split()
)
# One transcendental function for each element of the result.
TRANSCENDENTAL = frozenset(
    """
    acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv
    erfc exp expm1 lgamma log log1p pow rsqrt sin sinh sqrt tan tanh
    """.split()
)
# A transcendental function and so many operations beside it.
MIXED = {
    "logistic": 3,  # 1 / (1 + exp(-x)): negation, addition, division
    "exp2": 1,  # exp(x log 2)
    "log2": 1,  # log(x) / log 2
    "cumlogsumexp": 1,
}
# One operation for each element of the result.
COUNTED = p.CASTS | p.SUMS | p.SIGNS | p.COMPARISONS | p.ARITHMETIC | p.COLLECTIVES | p.CUMULATIVE
PER_ELEMENT = (COUNTED | {"reduce_scatter"}) - FREE - MIXED.keys()
SCATTERS = p.UPDATES - FREE


@dataclass
class Operations:
    """Operations of a computation besides its contractions.

    Attributes:
      flops: one for each result of an operation on elements, and each element that a reduction
        adds.
      transcendentals: one for each result of exp, log, tanh, rsqrt, ...
      uncounted: primitives that have no rule, and how often they run.
      loops: number of while loops, which are counted for one iteration.
      choices: number of choices of branches, of which every branch is counted.
      products: multiplications of products that sum over no axis (``einsum("bd,dn->bdn")``), of
        which there is no site.
    """

    flops: int = 0
    transcendentals: int = 0
    uncounted: Counter[str] = field(default_factory=Counter)
    loops: int = 0
    choices: int = 0
    products: int = 0


def operations(jaxpr: Jaxpr) -> Operations:
    """Count the operations of a jaxpr that are no contractions, each as often as it runs.

    They are counted as XLA's cost analysis does: an addition, a comparison, a cast is one operation
    for each element of its result; a sum over ``n`` elements is ``n - 1``; a window of ``w``
    elements is ``w - 1``; moving numbers is free.

    Args:
      jaxpr: the computation.

    Returns:
      The counts.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jaxpr = jax.make_jaxpr(lambda x: jnp.exp(x).sum() + 1)(jnp.ones((2, 3))).jaxpr
      >>> counted = operations(jaxpr)
      >>> counted.flops, counted.transcendentals
      (6, 6)
    """
    total = Operations()
    _walk(jaxpr, 1, total)
    return total


def _walk(jaxpr: Jaxpr, times: int, total: Operations) -> None:
    for eqn in jaxpr.eqns:
        match nested(eqn):
            # Shapes inside a shard_map are those of one shard, and every device runs it.
            case Call(body, shards):
                _walk(body.jaxpr, times * (shards or 1), total)
            case Scan() as scan:
                _walk(scan.body.jaxpr, times * scan.length, total)
            # One iteration: how many there are is data.
            case While(condition, body):
                total.loops += 1
                _walk(condition.jaxpr, times, total)
                _walk(body.jaxpr, times, total)
            case Branches(bodies):
                total.choices += 1
                for body in bodies:
                    _walk(body.jaxpr, times, total)
            case _:
                _count(eqn, times, total)


def _count(eqn: JaxprEqn, times: int, total: Operations) -> None:
    name = eqn.primitive.name
    # Without a sum each result is one multiplication, and the product is no site.
    if name == "dot_general" and p.kind(eqn) is None:
        total.products += times * _out(eqn)
    if name in FREE and name not in RULES:
        return
    rule = RULES.get(name) or _class_rule(name)
    transcendental = name in TRANSCENDENTAL or name in MIXED
    if rule is None and not transcendental:
        total.uncounted[name] += times
    if rule is not None:
        total.flops += times * rule(eqn)
    if transcendental:
        total.transcendentals += times * _out(eqn)


def _class_rule(name: str) -> Callable[[JaxprEqn], int] | None:
    """Return the rule of a class of primitives."""
    if name in PER_ELEMENT:
        return _out
    if name.startswith("reduce_window") or name == "select_and_gather_add":
        return _window
    return _reduced if name.startswith(("reduce_", "argm")) or name == "reduce" else None


def _out(eqn: JaxprEqn) -> int:
    return math.prod(_shape(eqn.outvars[0]))


def _reduced(eqn: JaxprEqn) -> int:
    """Count all elements but the first of each result."""
    return max(0, math.prod(_shape(eqn.invars[0])) - _out(eqn))


def _window(eqn: JaxprEqn) -> int:
    return _out(eqn) * (math.prod(eqn.params["window_dimensions"]) - 1)  # w - 1 joins of w entries


def _spread(eqn: JaxprEqn) -> int:
    """Count the gradient of a window's maximum: the choice in each window, then an addition."""
    return math.prod(_shape(eqn.invars[0])) * math.prod(eqn.params["window_dimensions"])


def _power(eqn: JaxprEqn) -> int:
    """Count the products of repeated squaring, and a division if the exponent is negative."""
    # x**13 = x**8 x**4 x: a squaring for each bit after the first, a product for each further 1.
    exponent = abs(eqn.params["y"])
    products = exponent.bit_length() + exponent.bit_count() - 2 if exponent else 0
    return _out(eqn) * (products + (eqn.params["y"] < 0))


def _reduced_precision(eqn: JaxprEqn) -> int:
    """Count one for each element, none where the dtype has no more digits than it is reduced to."""
    info = jnp.finfo(getattr(eqn.invars[0].aval, "dtype", jnp.float32))
    exponent = eqn.params["exponent_bits"]
    mantissa = eqn.params["mantissa_bits"]
    return 0 if exponent >= info.nexp and mantissa >= info.nmant else _out(eqn)


def _convert(eqn: JaxprEqn) -> int:
    """Count one for each element, none for a cast to the same dtype: it drops the weak type."""
    before = getattr(eqn.invars[0].aval, "dtype", None)
    after = getattr(eqn.outvars[0].aval, "dtype", None)
    return _out(eqn) if before != after else 0


def _scattered(eqn: JaxprEqn) -> int:
    """Count one for each update, which is the third operand."""
    return math.prod(_shape(eqn.invars[2]))


def _mixed(eqn: JaxprEqn) -> int:
    return MIXED[eqn.primitive.name] * _out(eqn)


RULES: dict[str, Callable[[JaxprEqn], int]] = {
    "integer_pow": _power,
    "convert_element_type": _convert,
    "reduce_precision": _reduced_precision,
    "select_and_scatter_add": _spread,
    **dict.fromkeys(SCATTERS, _scattered),
    **dict.fromkeys(MIXED, _mixed),
}


def _shape(var: Var | Literal) -> Shape:
    return getattr(var.aval, "shape", ())
