"""Integer inference: run a traced function on packed params, its contractions in int8.

`plan_sites` decides how each contraction is computed, in integers or in floats and why.
`contractions` lists these plans as a table, and `integer` carries them out.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.errors import NoMatchError, ShapeError, StateError
from compress_jax.core.packed import Quantized, is_packed, to_dense
from compress_jax.core.paths import flatten
from compress_jax.core.table import aligned, units
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree
from compress_jax.quantize._activations.quantizer import (
    ActivationQuantizer,
    OperandState,
    require_finite,
)
from compress_jax.quantize._activations.site_patterns import (
    QuantizerRules,
    SitePatterns,
    match_site,
    match_sites,
)
from compress_jax.quantize._integer.integer_dot import (
    Coded,
    encode,
    fits,
    operand_axes,
    product,
)
from compress_jax.quantize._integer.packed_operand import (
    Captured,
    Lost,
    PackedOperand,
    Route,
    Stored,
    Value,
    routes,
)
from compress_jax.trace import rewrite
from compress_jax.trace._jaxpr.find_sites import Traced, trace
from compress_jax.trace._jaxpr.site import Site


@dataclass(frozen=True)
class Contraction:
    """One contraction.

    Attributes:
      name: the site's name.
      kind: ``"dot"``, ``"conv"`` or ``"ragged_dot"``.
      weight: the format of the parameter, such as ``"int4 channel"`` or ``"float32"``; empty if
        there is none.
      activation: the format of the activations, such as ``"int8 token dynamic"`` or ``"float32"``.
      compute: what is multiplied and added, such as ``"int8 x int8 -> int32"``.
      macs: multiply-accumulate operations of one call.
      reason: why it is not computed in integers; empty if it is.
    """

    name: str
    kind: str
    weight: str
    activation: str
    compute: str
    macs: int
    reason: str = ""


@dataclass(frozen=True)
class Contractions:
    """The table of all contractions; prints as text.

    Attributes:
      rows: one for each contraction, in program order.

    Example:
      >>> import compress_jax as cj
      >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((3, 2))}
      >>> table = cj.quantize.contractions(fn, params, jnp.ones((4, 3)))
      >>> table.integer, table["kernel"].reason
      (0.0, 'its parameter is not quantized')
    """

    rows: tuple[Contraction, ...]

    @property
    def integer(self) -> float:
        """The share of multiply-accumulate operations that are of integers, 0 to 1."""
        in_integers = sum(row.macs for row in self.rows if not row.reason)
        return in_integers / max(sum(row.macs for row in self.rows), 1)

    def __getitem__(self, name: str) -> Contraction:
        """Return the row of a site by name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise NoMatchError(
            f"no contraction is named {name!r}; there are: "
            f"{', '.join(row.name for row in self.rows)}"
        )

    def __str__(self) -> str:
        """Return the table as aligned text."""
        head = ("contraction", "kind", "weight", "activation", "compute", "why in floats", "MACs")
        body = [
            (r.name, r.kind, r.weight, r.activation, r.compute, r.reason, units(r.macs))
            for r in self.rows
        ]
        total = (
            "total",
            "",
            "",
            "",
            f"{self.integer:.1%} in integers",
            "",
            units(sum(row.macs for row in self.rows)),
        )
        return aligned([head, *body, total], left=6)


NOT_QUANTIZED = "its activations are not quantized"


@dataclass(frozen=True)
class SitePlan:
    """How one site is computed.

    Attributes:
      site: the site.
      quantizer: its activations' quantizer, or None.
      operand: its packed parameter, or None.
      weight: the parameter's format in words.
      activation: the activations' format.
      packed: whether the parameter is packed.
      reason: why it is not computed in integers; empty if it is.
    """

    site: Site
    quantizer: ActivationQuantizer | None
    operand: PackedOperand | None
    weight: str
    activation: str
    packed: bool
    reason: str

    @property
    def compute(self) -> str:
        """What is multiplied and added, in words."""
        if not self.reason:
            names = [each.split()[0] for each in (self.activation, self.weight or self.activation)]
            if self.site.operand == "lhs":
                names.reverse()
            return " x ".join(names) + " -> int32"
        parts = [self.site.out_dtype]
        if self.packed:
            parts.append("weights unpacked")
        if self.quantizer is not None:
            parts.append("activations rounded")
        return ", ".join(parts)


def plan_sites(
    traced: Traced, leaves: Leaves, how: QuantizerRules | None, where: SitePatterns
) -> tuple[dict[str, Stored], dict[str, SitePlan]]:
    """Plan how every site is computed.

    Args:
      traced: the function's trace.
      leaves: arrays and packed nodes by path.
      how: the quantizers of activations, or None.
      where: which sites' activations are quantized.

    Returns:
      How each quantized parameter is stored, by path, and the plan of each site by name, in program
      order.

    Raises:
      NoMatchError: if a glob matches no site.
    """
    found = routes(traced)
    # How many first axes of each parameter loops slice, at the site with the most. Bytes join codes
    # along a later axis where there is one, so that an iteration unpacks its own slice only.
    stacked: dict[str, int] = {}
    for value in itertools.chain.from_iterable(found.values()):
        if isinstance(value, Route):
            stacked[value.path] = max(value.stacked, stacked.get(value.path, 0))
    stored = {
        path: Stored.of(leaf, stacked.get(path, 0))
        for path, leaf in leaves.items()
        if isinstance(leaf, Quantized)
    }
    if how is not None:
        match_sites(traced.sites.values(), how, where)  # a glob that matches nothing is an error
    plans = {
        site.name: _plan_site(site, found[position], leaves, stored, how, where)
        for position, site in traced.sites.items()
    }
    return stored, plans


def _plan_site(
    site: Site,
    operands: Sequence[Value],
    leaves: Leaves,
    stored: Mapping[str, Stored],
    how: QuantizerRules | None,
    where: SitePatterns,
) -> SitePlan:
    answer = NOT_QUANTIZED if how is None else match_site(site, how, where)
    operand, weight, reason = _weight(site, operands, leaves, stored)
    # What keeps the parameter out comes first: a quantizer could not change it.
    if isinstance(answer, str):
        quantizer = None
        reason = reason or answer
    else:
        quantizer = answer
        reason = reason or _not_exact(site, quantizer, operand)
    packed = is_packed(leaves.get(site.param or ""))
    activation = _activation(site, quantizer)
    return SitePlan(site, quantizer, operand, weight, activation, packed, reason)


def _weight(
    site: Site, operands: Sequence[Value], leaves: Leaves, stored: Mapping[str, Stored]
) -> tuple[PackedOperand | None, str, str]:
    """Return a site's packed parameter, its format, and why its codes cannot be used."""
    # A dot of two activations (attention scores) can be computed on the codes of both.
    if site.param is None:
        return None, "", "" if site.kind == "dot" else "both operands are activations"
    leaf = leaves[site.param]
    value = operands[site.operand == "rhs"]
    if not is_packed(leaf):
        return None, str(leaf.dtype), "its parameter is not quantized"
    if site.param not in stored:
        name = type(leaf).__name__
        return None, name, f"its parameter is packed as {name}, not as integers with a scale"
    parameter = stored[site.param]
    if isinstance(value, Lost):
        return None, parameter.format, value.reason
    if not isinstance(value, Route):
        return None, parameter.format, "no parameter feeds it"
    axes = operand_axes(site, int(site.operand == "rhs"))
    operand = PackedOperand.of(parameter, value, axes)
    # One scale for each summed entry: every product would be scaled by itself, in floats.
    if operand.groups == axes.products > 1:
        reason = "the parameter's scale varies along the axes that are summed over"
        return None, parameter.format, reason
    return operand, parameter.format, ""


def _not_exact(site: Site, quantizer: ActivationQuantizer, operand: PackedOperand | None) -> str:
    """Say why a site's products cannot be summed exactly in int32; "" if they can."""
    # Contractions that `integer_dot` does not compute.
    if site.kind == "ragged_dot":
        return "a ragged product: the sizes of its groups are data"
    if site.kind == "conv" and site.params["batch_group_count"] > 1:
        return "a convolution with groups of examples"
    if site.kind == "conv" and operand is not None and operand.groups > 1:
        return "scales of groups along what a convolution sums over"
    # A scale can be taken out of the sum only where all summed entries share it.
    sharing = [_sharing(site, index, quantizer) for index in site.inputs.values()]
    if "channel" in sharing:
        return "the activations' scale varies along the axes that are summed over"
    # The largest magnitude of code - zero_point; the zero point of a range is one of the codes.
    largest = 2 ** (quantizer.grid.bits - 1) if quantizer.grid.symmetric else quantizer.grid.top
    other = largest  # of the second operand, if both are activations
    products = operand_axes(site, 1).products
    if operand is not None:
        # code - zero_point reaches from -2^bits to 2^bits where the zero point may be anything.
        other = operand.stored.middle * (1 if operand.stored.symmetric else 2)
        products = products // operand.groups  # int32 holds the sum of one group at a time
    if fits(products, (largest, other)):
        return ""
    return f"sums of {products} products may not fit in int32"


def _sharing(site: Site, index: int, quantizer: ActivationQuantizer) -> str:
    """Return which entries of an activation share a scale: tensor, token or channel."""

    def place(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        key = next(key for key, each in site.inputs.items() if each == index)
        reducer = quantizer.reducer
        own = {}
        # Only shapes matter, so the operands themselves stand for calibration data.
        if reducer is not None:
            own = quantizer.ranges(site, reducer.finish(reducer(site, lhs, rhs))[key])
        return quantizer.scale_fn(site, index, (lhs, rhs)[index], own)[0]

    lhs = jax.ShapeDtypeStruct(site.lhs_shape, site.lhs_dtype)
    rhs = jax.ShapeDtypeStruct(site.rhs_shape, site.rhs_dtype)
    shape = jax.eval_shape(place, lhs, rhs).shape
    if math.prod(shape) == 1:
        return "tensor"
    summed = operand_axes(site, index).summed
    return "channel" if any(shape[axis] > 1 for axis in summed) else "token"


def _activation(site: Site, quantizer: ActivationQuantizer | None) -> str:
    """Return the format of a site's activations in words."""
    if quantizer is None:
        return (site.lhs_dtype, site.rhs_dtype)[next(iter(site.inputs.values()))]
    kind = quantizer.call.partition("(")[0]
    sharing = _sharing(site, next(iter(site.inputs.values())), quantizer)
    asymmetric = "" if quantizer.grid.symmetric else " asymmetric"
    return f"int{quantizer.grid.bits} {sharing} {kind}{asymmetric}"


def contractions(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    how: QuantizerRules | None = None,
    where: SitePatterns = None,
) -> Contractions:
    """List every contraction with its operands' formats, as `integer` would compute it.

    Args:
      fn: a pure function of params and inputs.
      params: packed params, or plain ones.
      inputs: trees of arrays or ``ShapeDtypeStruct``.
      how: the quantizers of activations, as in `activations`; None for none.
      where: as in `activations`.

    Returns:
      The table. ``print`` shows it.

    Raises:
      NoMatchError: if a glob matches no site.

    Example:
      >>> import compress_jax as cj, jax.numpy as jnp
      >>> params = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 2))}
      >>> c = cj.quantize.uniform(bits=4, granularity="channel")
      >>> packed = c.pack(params, c.init(params))
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ (2 * p["down"])
      >>> how = cj.quantize.dynamic()
      >>> for row in cj.quantize.contractions(fn, packed, jnp.ones((4, 2)), how=how).rows:
      ...     print(row.compute, "|", row.reason or "nothing")
      int8 x int4 -> int32 | nothing
      float32, weights unpacked, activations rounded | the parameter is changed on its way (mul)
    """
    leaves, rebuild = flatten(params)
    traced = trace(fn, rebuild({path: shape_of(x) for path, x in leaves.items()}), *inputs)
    return tabulated(plan_sites(traced, leaves, how, where)[1])


def shape_of(x: PyTree) -> PyTree:
    """Return a leaf as a shape, a packed one as that of its array; other objects unchanged."""
    if is_packed(x):
        return jax.eval_shape(lambda: x.unpack())
    return (
        jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") and hasattr(x, "dtype") else x
    )


def tabulated(plans: dict[str, SitePlan]) -> Contractions:
    """Return the table of the plans."""
    return Contractions(
        tuple(
            Contraction(name, s.site.kind, s.weight, s.activation, s.compute, s.site.macs, s.reason)
            for name, s in plans.items()
        )
    )


class Integer(NamedTuple):
    """A function that computes in integers.

    Attributes:
      params: a plain tree with two entries. ``"weights"`` is the tree of params, each quantized one
        replaced by a dict of small arrays (int8 codes in its own shape, or uint8 that hold two of 4
        bits; scales); ``"ranges"`` are those of the activations.
      apply: ``(params, *inputs) -> out``, compiled once for each shape of inputs.
      table: every contraction with its operands' formats, or why it stayed in floats. ``print``
        shows it.

    Example:
      >>> import compress_jax as cj
      >>> c, params = cj.quantize.uniform(bits=4), {"kernel": jnp.eye(2)}
      >>> packed = c.pack(params, c.init(params))
      >>> quantized = cj.quantize.integer(lambda p, x: x @ p["kernel"], packed, jnp.ones((1, 2)))
      >>> sorted(quantized.params["weights"]["kernel"])  # two codes a byte, and their scale
      ['bits4', 'scale']
      >>> quantized.table["kernel"].reason
      'its activations are not quantized'
    """

    params: dict[str, PyTree]
    apply: ModelFn
    table: Contractions


def integer(
    fn: ModelFn,
    packed: PyTree,
    *inputs: PyTree,
    how: QuantizerRules | None = None,
    ranges: Mapping[str, dict[str, OperandState]] | None = None,
    where: SitePatterns = None,
) -> Integer:
    r"""Turn a function of packed params into integer inference.

    Where both operands have integer codes the contraction is
    :math:`s_x s_w \sum (q_x - z_x) (q_w - z_w)`: int8 by int8, summed exactly in int32, scaled once
    in float32. Activations are encoded when they are used, by their own range (dynamic) or a
    calibrated one (static). Weights of fewer than 8 bits stay packed in memory and are unpacked
    where they are used, in loops layer by layer. Everything else is computed as the function does.
    Contractions that cannot be exact in integers are computed in floats with rounded activations.
    The outputs equal ``activations(fn, how).apply(unpack(packed), ranges, *inputs)`` up to float
    rounding.

    Args:
      fn: the pure function of params and inputs that the params were trained for: Linen, NNX,
        Equinox or plain.
      packed: the result of ``Compression.pack``.
      inputs: trees of arrays or ``ShapeDtypeStruct`` of the shapes it will be called with; another
        batch size is another compilation.
      how: a quantizer of activations, or pairs of a glob over sites and one, as for `activations`.
        None: weights only.
      ranges: ``activations(fn, how).init(params, batches)``, if any of the quantizers is static.
      where: as for `activations`.

    Returns:
      ``Integer(params, apply, table)``.

    Raises:
      NoMatchError: if a glob matches no site.
      StateError: if a static quantizer has no range for its site.
      NonFiniteError: if that range is not finite.

    Example:
      >>> import compress_jax as cj
      >>> params, x = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])}, jnp.array([[1.0, 3.0]])
      >>> c = cj.quantize.uniform(bits=8, granularity="channel")
      >>> packed = c.pack(params, c.init(params))
      >>> fn = lambda p, x: x @ p["kernel"]
      >>> out = cj.quantize.integer(fn, packed, x, how=cj.quantize.dynamic())
      >>> out.table["kernel"].compute, out.params["weights"]["kernel"]["codes"].dtype
      ('int8 x int8 -> int32', dtype('int8'))
      >>> out.apply(out.params, x).round(1).tolist()
      [[2.5, 7.0]]

    References:
      Jacob et al., "Quantization and Training of Neural Networks", 2018, arXiv:1712.05877, section
      2.
    """
    leaves, rebuild = flatten(packed)
    # `apply` gets a dict of arrays in the place of each quantized leaf; this structure stops there.
    treedef = jax.tree.structure(packed, is_leaf=is_packed)
    traced = trace(fn, rebuild({path: shape_of(x) for path, x in leaves.items()}), *inputs)
    stored, plans = plan_sites(traced, leaves, how, where)
    weights = {path: stored[path].arrays(x) if path in stored else x for path, x in leaves.items()}
    ranges = ranges or {}
    _require(plans, ranges)
    # Ranges of sites without a quantizer would be dead arguments of `apply`.
    used = [name for name, plan in plans.items() if plan.quantizer and name in ranges]
    kept = {name: ranges[name] for name in used}

    @jax.jit
    def apply(params: dict[str, PyTree], *inputs: PyTree) -> PyTree:
        arrays = dict(zip(leaves, treedef.flatten_up_to(params["weights"]), strict=True))
        # Sites in integers do not read these arrays, and XLA removes what nothing reads.
        dense = {
            path: stored[path].dense(x) if path in stored else to_dense(x)
            for path, x in arrays.items()
        }
        given = {name: _given(plan, params["ranges"]) for name, plan in plans.items()}
        return rewrite(fn, _rule(plans, arrays), given=given)(rebuild(dense), *inputs)

    return Integer({"weights": rebuild(weights), "ranges": kept}, apply, tabulated(plans))


def _require(plans: Mapping[str, SitePlan], ranges: Mapping[str, dict[str, OperandState]]) -> None:
    """Refuse ranges that are missing or not finite."""
    for name, plan in plans.items():
        if plan.quantizer is None:
            continue
        if plan.quantizer.reducer is not None and name not in ranges:
            raise StateError(
                f"there are no ranges for site {name!r}, only for: {', '.join(ranges) or 'none'}; "
                "pass ranges=activations(fn, how).init(params, batches), or a dynamic quantizer"
            )
        require_finite(name, ranges.get(name, {}))


def _given(plan: SitePlan, ranges: Mapping[str, dict[str, OperandState]]) -> dict[str, PyTree]:
    """Return the data that a site gets: its ranges, and the current iteration of each loop."""
    loops = plan.site.loops
    # A site in loops gets slices of arrays with leading axes ``loops``: of the first loop's index,
    # of the second's, and so on.
    iterations = [jax.lax.broadcasted_iota(jnp.int32, loops, i) for i in range(len(loops))]
    return {"own": ranges.get(plan.site.name, {}), "iterations": iterations}


def _coded(
    plan: SitePlan,
    index: int,
    x: jax.Array,
    own: dict[int, OperandState],
    captured: Captured | None,
    iterations: Sequence[jax.Array],
) -> Coded:
    """Return an operand in integers: an activation by its range, or the packed parameter."""
    if index in own:
        assert plan.quantizer is not None
        return encode(plan.quantizer, plan.site, index, x, own[index])
    assert plan.operand is not None and captured is not None
    return plan.operand.coded(captured, iterations)


def _rule(plans: Mapping[str, SitePlan], arrays: Leaves) -> Callable[..., PyTree]:
    """Return the rule that computes every site by its plan."""
    # Indexed outside the loops: their bodies only pick the scales of an iteration.
    captured = {
        name: plan.operand.captured(arrays[plan.operand.route.path])
        for name, plan in plans.items()
        if plan.operand
    }

    def rule(site: Site, lhs: jax.Array, rhs: jax.Array, given: dict[str, PyTree]) -> PyTree:
        plan = plans[site.name]
        operands = [lhs, rhs]
        own = {index: given["own"].get(key, {}) for key, index in site.inputs.items()}
        loops = plan.operand.route.loops if plan.operand else ()
        iterations = [given["iterations"][loop] for loop in loops]
        _check_shape(plan, site)
        # In integers: the codes replace the operands, and the result is the contraction's.
        if not plan.reason:
            parameter = captured.get(site.name)
            left = _coded(plan, 0, lhs, own, parameter, iterations)
            right = _coded(plan, 1, rhs, own, parameter, iterations)
            return product(site, left, right).astype(site.out_dtype)
        # In floats, on the rounded operands that the integers stand for.
        if plan.operand is not None and iterations:  # unpacked in the loop, one layer at a time
            operands[site.operand == "rhs"] = plan.operand.dense(captured[site.name], iterations)
        if plan.quantizer is not None:
            for index in own:
                x = operands[index]
                operands[index] = plan.quantizer.quantize_fn(site, index, x, own[index])
        return operands[0], operands[1]

    return rule


def _check_shape(plan: SitePlan, site: Site) -> None:
    """Refuse inputs with which the parameter has another shape at the site than was planned for."""
    shape = (site.lhs_shape, site.rhs_shape)[site.operand == "rhs"]
    if plan.operand is not None and plan.operand.axes.shape != shape:
        raise ShapeError(
            f"at site {site.name!r} the parameter has the shape {plan.operand.axes.shape} for the "
            "inputs that `integer` was "
            "given, but another for these; convert it with inputs of this shape"
        )
