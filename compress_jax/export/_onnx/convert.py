"""From a function to a graph: converted in each way, the one with most sites in integers kept.

`plan` chooses, and reports the sites that stay in floats. `convert` makes the float graph, every
parameter a constant under its own path. From `plain` on: the function's jaxpr in the layouts that
the converter has rules for. Its rules for whole layers, which it recognizes by the names of
functions, know some of the ways to call them. JAX's own trace has one primitive for each operation;
only its layouts are left to change.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var, jaxpr_as_fun
from jax.extend.core import Literal as Constant

from compress_jax.core.errors import ExportError
from compress_jax.core.packed import to_dense, unpack
from compress_jax.core.paths import flatten
from compress_jax.core.types import Array, Model, ModelFn, Params, PyTree
from compress_jax.export._artifact.structure import is_key
from compress_jax.export._extras import extra
from compress_jax.export._onnx import check
from compress_jax.export._onnx import graph as g
from compress_jax.export._onnx.places import Ends, Placed, place, why_not, write
from compress_jax.export._onnx.runtime import extremes, optimized, run
from compress_jax.export._onnx.weights import Weight, settle
from compress_jax.export._simulate import Simulation, simulation
from compress_jax.export._verify.agreement import agree
from compress_jax.quantize._activations.activations import Ranges
from compress_jax.quantize._activations.site_patterns import QuantizerRules, SitePatterns
from compress_jax.trace._jaxpr import evaluate
from compress_jax.trace._jaxpr.primitives import Branches, Call, Nested, Scan, While, nested

OPSET = 21  # the first with 4-bit integers
Way = Literal["layers", "operations"]
WAYS: tuple[Way, ...] = ("layers", "operations")
FLOAT = 1e-3  # relative difference between the float graph and the function that is allowed


@dataclass(frozen=True)
class Asked:
    """What is asked of an export.

    Attributes:
      how: the static quantizer, pairs, or None.
      ranges: of the activations, or None to calibrate.
      batches: to calibrate with.
      where: which sites.
      dynamic: whether a batch may have any size.
      unsigned: whether weights are written as uint8.
    """

    how: QuantizerRules | None
    ranges: Ranges | None
    batches: Sequence[tuple[np.ndarray, ...]]
    where: SitePatterns
    dynamic: bool
    unsigned: bool


@dataclass(frozen=True)
class Plan:
    """A graph and what is known about it.

    Attributes:
      model: the graph, its quantized sites in integers.
      weights: by the names of constants.
      places: of the sites that one node computes.
      simulated: what it must compute.
      floating: what the function itself returns for the example.
      notes: what was done otherwise than asked for.
    """

    model: Model
    weights: dict[str, Weight]
    places: dict[str, Placed]
    simulated: Simulation
    floating: PyTree
    notes: tuple[str, ...]


def plan(fn: ModelFn, params: Params, inputs: Sequence[np.ndarray], asked: Asked) -> Plan:
    """Convert a function in each way until one computes every site that is asked for in integers.

    Args:
      fn: the function.
      params: packed or not.
      inputs: an example.
      asked: the options.

    Returns:
      The plan with most sites in integers.

    Raises:
      ExportError: if no way succeeds, or none has a site in integers although ``how`` is given.
    """
    best = None
    failures: list[str] = []
    for way in WAYS:
        try:
            made = _planned(fn, params, inputs, asked, way)
        except ExportError as error:
            failures.append(str(error))
            continue
        if best is None or len(made.simulated.grids) > len(best.simulated.grids):
            best = made
        if asked.how is None or not _lost(best):
            break
    if best is None:
        raise ExportError("; operation by operation: ".join(dict.fromkeys(failures)))
    if asked.how is not None and not best.simulated.grids:
        reasons = [f"{name!r}: {reason}" for name, reason in best.simulated.left.items()]
        raise ExportError(
            f"no site can be computed in integers: {'; '.join(reasons) or '`how` names none'}"
        )
    if failures:
        note = f"converted operation by operation, as layers could not be: {failures[0]}"
        best = replace(best, notes=(note, *best.notes))
    return best


def _lost(made: Plan) -> bool:
    """Return whether another graph might compute more sites in integers."""
    return any(
        name not in made.places or reason.startswith("ONNX Runtime")
        for name, reason in made.simulated.left.items()
    )


def _planned(
    fn: ModelFn, params: Params, inputs: Sequence[np.ndarray], asked: Asked, way: Way
) -> Plan:
    """Convert in one way; leave out sites until the runtime computes the rest in integers."""
    # Typed random keys are no constants of a graph; they stay in the traced function.
    leaves, rebuild = flatten(params)
    keys = {path: x for path, x in leaves.items() if is_key(x)}
    arrays = {path: np.asarray(to_dense(x)) for path, x in leaves.items() if path not in keys}
    converted = convert(
        fn, arrays, lambda arrays: rebuild({**arrays, **keys}), inputs, asked.dynamic, way
    )
    floating = jax.jit(fn)(unpack(params), *inputs)
    what = "the float graph in ONNX Runtime against the function in JAX"
    agree(floating, run(converted, inputs), FLOAT, what)
    # Each round leaves out at least one more site, so there are no more rounds than sites.
    left: dict[str, str] = {}
    ranges = asked.ranges
    while True:
        simulated = simulation(
            fn, params, inputs, asked.how, ranges, asked.batches, asked.where, left
        )
        left = dict(simulated.left)
        ranges = simulated.ranges  # calibrated once
        model, weights = _settled(converted, simulated.packed)
        places = place(model, weights, simulated.sites)
        sites = {site.name: site for site in simulated.sites}
        lost = {name: why_not(sites[name], places.get(name)) for name in simulated.grids}
        lost = {name: reason for name, reason in lost.items() if reason}
        # Only the optimized graph tells whether the runtime fused every site.
        notes: tuple[str, ...] = ()
        if not lost and simulated.grids:
            notes = _integers(model, places, simulated, asked)
            lost = check.unfused(model, simulated.grids)
        if not lost:
            return Plan(model, weights, places, simulated, floating, notes)
        left |= lost


def _settled(converted: Model, packed: Params) -> tuple[Model, dict[str, Weight]]:
    """Return the optimized float graph with other parameters, and its weights' names."""
    leaves = {path: x for path, x in flatten(packed)[0].items() if not is_key(x)}
    model = baked(converted, {path: np.asarray(to_dense(x)) for path, x in leaves.items()})
    weights = settle(model, {path: Weight.of(path, x) for path, x in leaves.items()})
    # Basic optimization keeps standard operators, so that sites' nodes are still found by kind.
    model = optimized(model, "BASIC")
    del model.graph.value_info[:]
    there = {each.name for each in model.graph.initializer}
    return model, {name: weight for name, weight in weights.items() if name in there}


def _integers(
    model: Model, places: Mapping[str, Placed], simulated: Simulation, asked: Asked
) -> tuple[str, ...]:
    """Quantize what the simulation quantizes; return notes."""

    def measured(names: Sequence[str]) -> Mapping[str, Ends]:
        if not asked.batches:
            raise ExportError(
                f"{len(names)} results of convolutions go into residual sums and need ranges: "
                "pass batches="
            )
        return extremes(model, names, asked.batches)

    chosen = {name: each for name, each in places.items() if name in simulated.grids}
    return write(model, chosen, simulated.grids, measured, asked.unsigned)


# The float graph, converted in one way.


def convert(
    fn: ModelFn,
    leaves: Mapping[str, np.ndarray],
    rebuild: Callable[[Mapping[str, Array]], Params],
    inputs: Sequence[np.ndarray],
    dynamic: bool,
    way: Way = "layers",
) -> Model:
    """Convert a function of params and inputs.

    There are two ways. ``"layers"``: the converter recognizes whole layers and functions by name
    and has nodes of its own for them, the faster graph, if it knows the way in which they are
    called. ``"operations"``: JAX traces the function, and the converter sees JAX's primitives alone
    (see `plain`), so that no spelling matters.

    The parameters are inputs to the converter, so whatever it does to one (a transpose to the
    target's layout, a reshape) is a node of the graph; afterwards they are constants under their
    paths. What is quantized is found by name, not by value.

    Args:
      fn: the function.
      leaves: dense parameters by path.
      rebuild: from leaves to params.
      inputs: an example.
      dynamic: whether the first axis of every input is a batch of any size.
      way: see above.

    Returns:
      The ``ModelProto``, its inputs ``x`` (or ``x0``, ``x1``, ...) and its outputs ``y`` (or
      ``y0``, ...).

    Raises:
      ExportError: if the converter cannot.
    """
    with _quiet():
        jax2onnx = extra("jax2onnx", "onnx")
    names = ["x"] if len(inputs) == 1 else [f"x{i}" for i in range(len(inputs))]
    specs = _specs(inputs, dynamic)
    weights = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves.values()]

    # The converter takes a function of arrays: first the inputs, then every parameter.
    def flat(*arrays: jax.Array) -> PyTree:
        weights = dict(zip(leaves, arrays[len(inputs) :], strict=True))
        return fn(rebuild(weights), *arrays[: len(inputs)])

    try:
        example = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
        outs = len(jax.tree.leaves(jax.eval_shape(flat, *example, *weights)))
        call = flat if way == "layers" else _operations(flat, specs, weights)
        with _quiet():
            model = jax2onnx.to_onnx(
                call,
                [*specs, *weights],
                opset=OPSET,
                input_names=[*names, *leaves],
                output_names=["y"] if outs == 1 else [f"y{i}" for i in range(outs)],
                normalization_mode="prefer_native",
            )
    except Exception as error:  # whatever the converter, or the function itself, raises
        advice = "; pass batch='example' for exactly its size" if dynamic else ""
        raise ExportError(
            f"jax2onnx cannot convert this function: {type(error).__name__}: {error}{advice}"
        ) from error
    _bake(model, leaves)
    # Shapes are constants before pools are looked for, which compares them.
    g.windows(model)
    g.constant_shapes(model, inputs, dynamic)
    g.without_zero_bias(model.graph)
    g.pools(model, inputs)
    return g.prune(model)


def _specs(inputs: Sequence[np.ndarray], dynamic: bool) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of inputs, with one symbol for the batch of all of them."""
    (size,) = jax.export.symbolic_shape("B")
    return [
        jax.ShapeDtypeStruct((size, *x.shape[1:]) if dynamic and x.ndim else x.shape, x.dtype)
        for x in inputs
    ]


def _operations(
    flat: ModelFn, specs: Sequence[jax.ShapeDtypeStruct], weights: Sequence[jax.ShapeDtypeStruct]
) -> ModelFn:
    """Return a function whose jaxpr has no named calls that the converter would recognize."""
    traced = jax.make_jaxpr(flat)(*specs, *weights)
    is_data = [True] * len(specs) + [False] * len(weights)
    # The rules use jnp, whatever promotion the caller's own code is held to.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        made = jax.make_jaxpr(plain(traced, is_data))(*specs, *weights)
    return jaxpr_as_fun(live(made))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter's warnings, and let its own layers promote ranks and dtypes."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def baked(model: Model, leaves: Mapping[str, np.ndarray]) -> Model:
    """Return a copy of a converted graph with other values for its parameters.

    Args:
      model: from `convert`.
      leaves: dense parameters by path.

    Returns:
      The copy.
    """
    copy = extra("onnx", "onnx").ModelProto()
    copy.CopyFrom(model)
    there = [each.name for each in copy.graph.initializer if each.name in leaves]
    others = [each for each in model.graph.initializer if each.name not in leaves]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(others)
    for name in there:
        g.add(copy.graph, name, leaves[name])
    return copy


def _bake(model: Model, leaves: Mapping[str, np.ndarray]) -> None:
    """Turn the parameters among the inputs into constants.

    Inputs that the function does not use are gone already.
    """
    left = [each for each in model.graph.input if each.name not in leaves]
    for each in model.graph.input:
        if each.name in leaves:
            g.add(model.graph, each.name, leaves[each.name])
    del model.graph.input[:]
    model.graph.input.extend(left)


# The jaxpr in the converter's layouts.


def plain(jaxpr: ClosedJaxpr, data: Sequence[bool]) -> Callable[..., list[jax.Array]]:
    """Return a jaxpr as a function with inlined calls, in the converter's layouts.

    Args:
      jaxpr: of the function.
      data: whether each of its arguments is an input, not a parameter: a product has its parameter
        on the right.

    Returns:
      ``(*arrays) -> results``.

    Example:
      >>> import jax
      >>> arrays = jnp.ones((5, 3)), jnp.ones((3, 2))
      >>> made = jax.make_jaxpr(lambda w, x: w @ x)(*arrays)
      >>> rewritten = jax.make_jaxpr(plain(made, [False, True]))(*arrays)
      >>> print(rewritten.jaxpr.eqns[2].primitive)
      dot_general
    """
    return lambda *arrays: _run(jaxpr, list(arrays), list(data))[0]


def live(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Return a jaxpr without unused equations and captured arrays.

    Random keys of an initial state are an example.

    Args:
      jaxpr: any.

    Returns:
      The same function of the same arguments.

    Example:
      >>> import jax
      >>> made = jax.make_jaxpr(lambda x: (jnp.sin(x), x + 1)[1])(1.0)
      >>> len(made.jaxpr.eqns), len(live(made).jaxpr.eqns)
      (2, 1)
    """
    inner = jaxpr.jaxpr
    needed = {atom for atom in inner.outvars if not isinstance(atom, Constant)}
    eqns = []
    # From the results back: an equation is kept if a kept one takes what it makes.
    for eqn in reversed(inner.eqns):
        if eqn.effects or needed.intersection(eqn.outvars):
            eqns.append(eqn)
            needed.update(atom for atom in eqn.invars if not isinstance(atom, Constant))
    consts = {v: x for v, x in zip(inner.constvars, jaxpr.consts, strict=True) if v in needed}
    inner = inner.replace(eqns=eqns[::-1], constvars=list(consts))
    return ClosedJaxpr(inner, list(consts.values()))


def _run(
    jaxpr: ClosedJaxpr, arrays: list[jax.Array], data: list[bool]
) -> tuple[list[jax.Array], list[bool]]:
    """Run a jaxpr; with each value goes whether it depends on an input, not on parameters alone."""
    env: dict[Var, tuple[jax.Array, bool]] = {}

    def read(atom: Var | Constant) -> tuple[jax.Array, bool]:
        return (atom.val, False) if isinstance(atom, Constant) else env[atom]

    env |= {var: (x, False) for var, x in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)}
    env |= dict(zip(jaxpr.jaxpr.invars, zip(arrays, data, strict=True), strict=True))
    for eqn in jaxpr.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        # The context holds the original equation's mesh.
        with eqn.ctx.manager:
            results, flags = _equation(eqn, [x for x, _ in values], [flag for _, flag in values])
        env |= dict(zip(eqn.outvars, zip(results, flags, strict=True), strict=True))
    read_out = [read(atom) for atom in jaxpr.jaxpr.outvars]
    return [x for x, _ in read_out], [flag for _, flag in read_out]


def _equation(
    eqn: JaxprEqn, arrays: list[jax.Array], data: list[bool]
) -> tuple[list[jax.Array], list[bool]]:
    inside = nested(eqn)
    flag = any(data)
    # Calls are inlined: the converter would recognize some by name.
    if isinstance(inside, Call) and inside.shards is None:
        return _run(inside.body, arrays, data)
    results = _bodies(eqn, inside, arrays, data)
    if results is None:
        rule = RULES.get(eqn.primitive.name)
        made = rule(eqn, arrays, data) if rule else None
        results = evaluate.bind(eqn, arrays) if made is None else [made]
    return results, [flag] * len(results)


def _bodies(
    eqn: JaxprEqn, inside: Nested | None, arrays: list[jax.Array], data: list[bool]
) -> list[jax.Array] | None:
    """Rebuild a loop or a choice around plain bodies; None for anything else."""
    match inside:
        case Scan() as scan:
            # Operands: constants, carried values, and what the loop takes slices of.
            start = scan.consts
            end = start + scan.carry

            # What is carried depends on the inputs after an iteration, if not before the first.
            def iteration(
                carry: list[jax.Array], xs: list[jax.Array]
            ) -> tuple[list[jax.Array], list[jax.Array]]:
                flags = [*data[:start], *[True] * scan.carry, *data[end:]]
                results = _run(scan.body, [*arrays[:start], *carry, *xs], flags)[0]
                return results[: scan.carry], results[scan.carry :]

            options = {key: eqn.params[key] for key in ("reverse", "unroll")}
            carried, ys = lax.scan(
                iteration, arrays[start:end], arrays[end:], length=scan.length, **options
            )
            return [*carried, *ys]
        case While() as loop:
            # Operands: constants of the condition, constants of the body, carried values.
            start = loop.condition_consts
            end = start + loop.body_consts
            head = arrays[:start]
            consts = arrays[start:end]
            carried_data = [True] * (len(arrays) - end)

            def condition(carry: list[jax.Array]) -> jax.Array:
                flags = [*data[:start], *carried_data]
                results, _ = _run(loop.condition, [*head, *carry], flags)
                return results[0]

            def body(carry: list[jax.Array]) -> list[jax.Array]:
                flags = [*data[start:end], *carried_data]
                return _run(loop.body, [*consts, *carry], flags)[0]

            return list(lax.while_loop(condition, body, arrays[end:]))
        case Branches(bodies):
            # The first operand is the index of the branch.
            made = [
                lambda *operands, body=body: _run(body, list(operands), data[1:])[0]
                for body in bodies
            ]
            return list(lax.switch(arrays[0], made, *arrays[1:]))
    return None


def _dot(eqn: JaxprEqn, arrays: list[jax.Array], data: list[bool]) -> jax.Array | None:
    """Write a product without batch axes as ``[..., k] @ [k, n]``, its parameter on the right."""
    contracting, batch = eqn.params["dimension_numbers"]
    if batch[0]:
        return None
    swapped = data[1] and not data[0]
    x, w = reversed(arrays) if swapped else arrays
    xs, ws = reversed(contracting) if swapped else contracting  # the axes summed over, in pairs
    rows = [axis for axis in range(x.ndim) if axis not in xs]
    columns = [axis for axis in range(w.ndim) if axis not in ws]
    lead = [x.shape[axis] for axis in rows]
    tail = [w.shape[axis] for axis in columns]
    size = math.prod(w.shape[axis] for axis in ws)
    left = jnp.transpose(x, (*rows, *xs)).reshape(*(lead or [1]), size)  # [..., k]
    right = jnp.transpose(w, (*ws, *columns)).reshape(size, -1)  # [k, n]
    numbers = (((left.ndim - 1,), (0,)), ((), ()))
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}
    y = lax.dot_general(left, right, numbers, **options).reshape(*lead, *tail)
    # y is [*lead, *tail]; where w is the left operand, its axes come first.
    if not swapped:
        return y
    return jnp.transpose(y, (*range(len(lead), y.ndim), *range(len(lead))))


def _conv(eqn: JaxprEqn, arrays: list[jax.Array], data: list[bool]) -> jax.Array | None:
    """Write a convolution with channels last, unless the converter supports its layout."""
    # Where the axes are: (batch, channels, *space) of the image, (out, in, *window) of the kernel,
    # (batch, channels, *space) of the result.
    numbers = eqn.params["dimension_numbers"]
    rank = arrays[0].ndim
    window = tuple(range(2, rank))
    first = (0, 1, *window)  # channels first
    last = (0, rank - 1, *range(1, rank - 1))  # channels last
    kernels = ((0, 1, *window), (rank - 1, rank - 2, *range(rank - 2)))  # OIHW and HWIO
    if numbers[0] in (first, last) and numbers[1] in kernels and numbers[2] in (first, last):
        return None
    # [batch, *space, channels] and [*window, in, out]
    image = jnp.transpose(arrays[0], (numbers[0][0], *numbers[0][2:], numbers[0][1]))
    kernel = jnp.transpose(arrays[1], (*numbers[1][2:], numbers[1][1], numbers[1][0]))
    skipped = ("dimension_numbers", "lhs_shape", "rhs_shape")
    options = {name: value for name, value in eqn.params.items() if name not in skipped}
    new = lax.ConvDimensionNumbers(last, kernels[1], last)
    y = lax.conv_general_dilated(image, kernel, dimension_numbers=new, **options)
    places = (numbers[2][0], *numbers[2][2:], numbers[2][1])  # where each axis of y belongs
    return jnp.transpose(y, [places.index(axis) for axis in range(rank)])


def _window_min(eqn: JaxprEqn, arrays: list[jax.Array], data: list[bool]) -> jax.Array:
    """Write the minimum of windows as a maximum."""
    return _mirrored(_window_max(_mirrored(arrays[0]), eqn.params))


def _mirrored(x: jax.Array) -> jax.Array:
    """Return numbers in the opposite order: negative ones, or what is missing to the largest."""
    # The negative of an unsigned number is no mirror image, and an int8 has none of -128.
    if jnp.issubdtype(x.dtype, jnp.integer):
        low, high = (int(end) for end in (jnp.iinfo(x.dtype).min, jnp.iinfo(x.dtype).max))
        return jnp.asarray(low + high, x.dtype) - x
    return -x


def _window(eqn: JaxprEqn, arrays: list[jax.Array], data: list[bool]) -> jax.Array | None:
    """Write a window reduction with any initial value as one that starts from the identity."""
    kind = _reducer(eqn)
    if len(arrays) != 2 or kind not in ("max", "min"):
        return None
    # max(start, window) = max(start, max(-inf, window)), likewise for min.
    x, start = arrays
    if kind == "max":
        return jnp.maximum(_window_max(x, eqn.params), start)
    return jnp.minimum(_mirrored(_window_max(_mirrored(x), eqn.params)), start)


def _reducer(eqn: JaxprEqn) -> str:
    body = eqn.params["jaxpr"]  # closed or open
    eqns = getattr(body, "jaxpr", body).eqns
    return eqns[0].primitive.name if len(eqns) == 1 else ""


def _window_max(x: jax.Array, params: Mapping[str, PyTree]) -> jax.Array:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    low = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    # With this constant JAX uses reduce_window_max, a primitive that the converter knows.
    start = np.asarray(low, x.dtype)
    return lax.reduce_window(x, start, lax.max, **{name: params[name] for name in names})


# A rule returns None where the equation can stay as it is.
RULES: dict[str, Callable[[JaxprEqn, list[jax.Array], list[bool]], jax.Array | None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "reduce_window_min": _window_min,
    "reduce_window": _window,
}
