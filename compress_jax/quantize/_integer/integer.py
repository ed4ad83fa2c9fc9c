"""Integer inference: any traced function on packed params, its contractions in int8 with int32 sums."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.errors import NoMatchError, ShapeError, StateError
from compress_jax.core.packed import is_packed, to_dense
from compress_jax.core.paths import flatten
from compress_jax.core.table import aligned, units
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.quantize._activations.quantizer import OperandState, require_finite
from compress_jax.quantize._activations.site_patterns import QuantizerRules, SitePatterns
from compress_jax.quantize._integer.integer_dot import Coded, encode, product
from compress_jax.quantize._integer.plan import Step, decide
from compress_jax.trace import rewrite
from compress_jax.trace._jaxpr.find_sites import trace
from compress_jax.trace._jaxpr.site import Site

# Every contraction of a function with the formats of its operands, or the reason why it computes in
# floats.


@dataclass(frozen=True)
class Contraction:
    """One contraction.

    Attributes:
      name: of its site.
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
    """

    rows: tuple[Contraction, ...]

    @property
    def integer(self) -> float:
        """The share of multiply-accumulate operations that are of integers, 0 to 1."""
        return sum(row.macs for row in self.rows if not row.reason) / max(
            sum(row.macs for row in self.rows), 1
        )

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


def contractions(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    how: QuantizerRules | None = None,
    where: SitePatterns = None,
) -> Contractions:
    """List every contraction with its operands' formats, as `integer` would compute it, or the reason why in floats.

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
      >>> import jax.numpy as jnp
      >>> from compress_jax.quantize import uniform
      >>> from compress_jax.quantize._activations.dynamic import dynamic
      >>> c, params = uniform(bits=4, granularity="channel"), {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 2))}
      >>> packed = c.pack(params, c.init(params))
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ (2 * p["down"])
      >>> for row in contractions(fn, packed, jnp.ones((4, 2)), how=dynamic()).rows:
      ...     print(row.compute, "|", row.reason or "nothing")
      int8 x int4 -> int32 | nothing
      float32, weights unpacked, activations rounded | the parameter is changed on its way (mul)
    """
    leaves, rebuild = flatten(params)
    traced = trace(fn, rebuild({path: shape_of(x) for path, x in leaves.items()}), *inputs)
    return tabulated(decide(traced, leaves, how, where)[1])


def shape_of(x: Any) -> Any:
    """Return a leaf as a shape, packed ones as the array they stand for; what is no array stays."""
    if is_packed(x):
        return jax.eval_shape(lambda: x.unpack())
    return (
        jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") and hasattr(x, "dtype") else x
    )


def tabulated(steps: dict[str, Step]) -> Contractions:
    """Return the table of what was decided for each site."""
    return Contractions(
        tuple(
            Contraction(name, s.site.kind, s.weight, s.activation, s.compute, s.site.macs, s.reason)
            for name, s in steps.items()
        )
    )


class Integer(NamedTuple):
    """A function that computes in integers.

    Attributes:
      params: a plain tree: ``"weights"``, the tree of params with a dict of small arrays in the
        place of each quantized one (int8 codes in its own shape, or uint8 that hold two of 4 bits;
        scales), and ``"ranges"`` of the activations.
      apply: ``(params, *inputs) -> out``, compiled once for each shape of inputs.
      table: every contraction with its operands' formats, or why it stayed in floats. ``print``
        shows it.
    """

    params: dict[str, Any]
    apply: Callable[..., Any]
    table: Contractions


def integer(
    fn: ModelFn,
    packed: PyTree,
    *inputs: PyTree,
    how: QuantizerRules | None = None,
    ranges: Mapping[str, Any] | None = None,
    where: SitePatterns = None,
) -> Integer:
    r"""Turn a function of packed params into integer inference.

    Where both operands have integer codes the contraction is
    :math:`s_x s_w \sum (q_x - z_x) (q_w - z_w)`: int8 by int8, summed exactly in int32, scaled once
    in float32. Activations are coded on the way, by their own range (dynamic) or a calibrated one
    (static); weights of fewer than 8 bits stay packed in memory and are unpacked where they are
    used, in loops layer by layer. Everything else is computed as the function says, and what cannot
    be exact in integers in floats, its activations rounded all the same: scores are those of
    ``activations(fn, how).apply(unpack(packed), ranges, *inputs)`` to rounding.

    Args:
      fn: the pure function of params and inputs that the params were trained for: Linen, NNX,
        Equinox or plain.
      packed: what ``Compression.pack`` returned.
      inputs: trees of arrays or ``ShapeDtypeStruct`` as it will be called with; another batch size
        is another compilation.
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
      >>> from compress_jax.quantize import uniform
      >>> from compress_jax.quantize._activations.dynamic import dynamic
      >>> params, x = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])}, jnp.array([[1.0, 3.0]])
      >>> c = uniform(bits=8, granularity="channel")
      >>> out = integer(lambda p, x: x @ p["kernel"], c.pack(params, c.init(params)), x, how=dynamic())
      >>> out.table["kernel"].compute, out.params["weights"]["kernel"]["codes"].dtype
      ('int8 x int8 -> int32', dtype('int8'))
      >>> out.apply(out.params, x).round(1).tolist()
      [[2.5, 7.0]]

    References:
      Jacob et al., "Quantization and Training of Neural Networks", 2018, arXiv:1712.05877, section
      2.
    """
    leaves, rebuild = flatten(packed)
    treedef = jax.tree.structure(packed, is_leaf=is_packed)
    traced = trace(fn, rebuild({path: shape_of(x) for path, x in leaves.items()}), *inputs)
    stored, steps = decide(traced, leaves, how, where)
    weights = {path: stored[path].arrays(x) if path in stored else x for path, x in leaves.items()}
    given = ranges or {}
    _require(steps, given)
    kept = {name: given[name] for name, step in steps.items() if step.quantizer and name in given}

    @jax.jit
    def apply(params: dict[str, Any], *inputs: PyTree) -> Any:
        arrays = dict(zip(leaves, treedef.flatten_up_to(params["weights"]), strict=True))
        dense = {
            path: stored[path].dense(x) if path in stored else to_dense(x)
            for path, x in arrays.items()
        }
        rule, given = (
            _rule(steps, arrays),
            {name: _given(step, params["ranges"]) for name, step in steps.items()},
        )
        return rewrite(fn, rule, given=given)(rebuild(dense), *inputs)

    return Integer({"weights": rebuild(weights), "ranges": kept}, apply, tabulated(steps))


def _require(steps: Mapping[str, Step], ranges: Mapping[str, Any]) -> None:
    for name, step in steps.items():
        if step.quantizer is not None and step.quantizer.reducer is not None and name not in ranges:
            raise StateError(
                f"there are no ranges for site {name!r}, only for: {', '.join(ranges) or 'none'}; "
                "pass "
                "ranges=activations(fn, how).init(params, batches), or a dynamic quantizer"
            )
        if step.quantizer is not None:
            require_finite(name, ranges.get(name, {}))


def _given(step: Step, ranges: Mapping[str, dict[str, OperandState]]) -> dict[str, Any]:
    """Return what a site is handed: its ranges, and which turn of its loops it is in."""
    loops = step.site.loops
    turns = [
        jnp.broadcast_to(
            jnp.expand_dims(jnp.arange(n), [*range(i), *range(i + 1, len(loops))]), loops
        )
        for i, n in enumerate(loops)
    ]
    return {"own": ranges.get(step.site.name, {}), "turns": turns}


def _coded(
    step: Step,
    index: int,
    x: jax.Array,
    own: dict[int, OperandState],
    captured: Any,
    turns: list[Any],
) -> Coded:
    """Return an operand in integers: an activation by its range, or the parameter as it is packed."""
    if index in own:
        assert step.quantizer is not None
        return encode(step.quantizer, step.site, index, x, own[index])
    assert step.feed is not None
    return step.feed.coded(captured, turns)


def _rule(steps: Mapping[str, Step], arrays: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the rule that computes every site as was decided."""
    captured = {
        name: step.feed.captured(arrays[step.feed.route.path])
        for name, step in steps.items()
        if step.feed
    }

    def rule(site: Site, lhs: jax.Array, rhs: jax.Array, given: dict[str, Any]) -> Any:
        step, operands = steps[site.name], [lhs, rhs]
        own = {index: given["own"].get(key, {}) for key, index in site.inputs.items()}
        turns = [given["turns"][loop] for loop in step.feed.route.loops] if step.feed else []
        _same(step, site)
        if not step.reason:
            left, right = (
                _coded(step, i, x, own, captured.get(site.name), turns)
                for i, x in enumerate(operands)
            )
            return product(site, left, right).astype(site.out_dtype)
        if step.feed is not None and turns:  # unpacked in the loop, one layer at a time
            operands[site.operand == "rhs"] = step.feed.dense(captured[site.name], turns)
        if step.quantizer is not None:
            for index in own:
                operands[index] = step.quantizer.quantize_fn(
                    site, index, operands[index], own[index]
                )
        return operands[0], operands[1]

    return rule


def _same(step: Step, site: Site) -> None:
    if (
        step.feed is not None
        and step.feed.side.shape != (site.lhs_shape, site.rhs_shape)[site.operand == "rhs"]
    ):
        raise ShapeError(
            f"at site {site.name!r} the parameter has the shape {step.feed.side.shape} for the "
            "inputs that `integer` was "
            "given, but another for these; convert it with inputs of this shape"
        )
