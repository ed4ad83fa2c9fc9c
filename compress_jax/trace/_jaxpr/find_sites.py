"""Find the sites of a jaxpr: one walk over origins, then one over names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn

from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, bound
from compress_jax.core.errors import CompressError, ShapeError
from compress_jax.core.paths import flatten, match
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.interpret import Where, interpret, uniform_operands
from compress_jax.trace._jaxpr.origin import (
    CONSTANT,
    DATA,
    PARAMETER,
    Laid,
    Lost,
    Origin,
    data,
    join,
    parameter,
    pieces,
    transfer,
)
from compress_jax.trace._jaxpr.site import AxisIndices, Position, Site, layouts_of_sites

LEAVES = (
    "kernel",
    "embedding",
    "weight",
    "w",
)  # what the parameter of a layer is called: left out where names are joined
CONSTANT_ROWS = "rows of it are read at constant indices"
NO_SUM = "its products are summed over no axis: it scales entry by entry"


@dataclass
class Found:
    """What a walk over a jaxpr saw; the domain of origins for the interpreter.

    Attributes:
      contractions: by position, the equation, the origins of its operands, and its place.
      lookups: by position, the table that rows were gathered from.
      otherwise: by path of a parameter, how it is used where no contraction and no lookup is.
      sums: positions of contractions of which an operand is one number throughout (``ones``): sums,
        not layers.
      hidden: by position, the primitive that contracts where nobody looks.
      stacked: by path, the axes of a parameter that loops take one slice of at a time.
    """

    contractions: dict[Position, tuple[JaxprEqn, Origin, Origin, Where]] = field(
        default_factory=dict
    )
    lookups: dict[Position, str] = field(default_factory=dict)
    otherwise: dict[str, str] = field(default_factory=dict)
    hidden: dict[Position, str] = field(default_factory=dict)
    stacked: dict[str, set[int]] = field(default_factory=dict)
    sums: frozenset[Position] = frozenset()

    def constant(self, aval: Any, value: Any) -> Origin:
        """Return the origin of a literal or a captured array."""
        return Origin()

    def join(self, a: Origin, b: Origin) -> Origin:
        """Return the origin of what may be either."""
        return join((a, b))

    def same(self, a: Origin, b: Origin) -> bool:
        """Tell whether two origins are equal."""
        return a == b

    def unstack(self, a: Origin, loop: int) -> Origin:
        """Return the origin of one slice along the first axis, and which loop it is that slices."""
        if a.dims is None:
            return a
        sliced = (*a.sliced, *((axis, loop) for axis in a.dims[0]))
        if a.level == PARAMETER and len(a.paths) == 1:
            self.stacked.setdefault(a.paths[0], set()).update(a.dims[0])
        return Origin(a.level, a.paths, a.dims[1:], sliced, a.maker, a.label)

    def stack(self, a: Origin, length: int) -> Origin:
        """Return the origin of slices put together."""
        return (
            a
            if a.dims is None
            else Origin(a.level, a.paths, ((), *a.dims), a.sliced, a.maker, a.label)
        )

    def reshard(self, a: Origin, aval: Any) -> Origin:
        """Return the origin itself: a device's piece comes from where the whole does."""
        return a

    def equation(self, eqn: JaxprEqn, args: list[Origin], where: Where) -> Sequence[Origin]:
        """Return the origins of an equation's results; note it if it contracts or looks up."""
        if primitives.kind(eqn) is not None:
            if where.position in self.sums:
                args = [replace(arg, paths=()) for arg in args]
            self.contractions[where.position] = (eqn, args[0], args[1], where)
            return [_product(args, where.position)]
        if primitives.contracts_inside(eqn):
            self.hidden[where.position] = eqn.primitive.name
        result = transfer(eqn, args)
        if eqn.primitive.name == "gather" and args[0].paths:
            if result.level == DATA:
                self.lookups[where.position] = args[0].paths[0]
            elif args[0].level == PARAMETER:
                self.otherwise.setdefault(args[0].paths[0], CONSTANT_ROWS)
        if eqn.primitive.name == "dot_general":
            self.otherwise |= {
                arg.paths[0]: NO_SUM for arg in args if arg.level == PARAMETER and arg.paths
            }
        return [result] * len(eqn.outvars)


def _product(args: list[Origin], position: Position) -> Origin:
    """A product with data is data; of a parameter with constants (a rotation) it is still that parameter."""
    level = max(arg.level for arg in args)
    if level == DATA:
        return Origin(DATA, maker=position)
    views = [arg for arg in args if arg.level == PARAMETER]
    return Origin(level, views[0].paths if len(views) == 1 else ())


def find(closed: ClosedJaxpr, params: dict[str, Any], inputs: Sequence[str]) -> Found:
    """Walk over a jaxpr whose first inputs are the parameters.

    Args:
      closed: the jaxpr.
      params: shapes by path, ``{path: array or ShapeDtypeStruct}``.
      inputs: a label for each further input.

    Returns:
      What was seen.
    """
    found = Found(sums=frozenset(uniform_operands(closed)))
    interpret(
        found,
        closed,
        [*(parameter(path, x.shape) for path, x in params.items()), *map(data, inputs)],
    )
    return found


def name(found: Found) -> dict[Position, Site]:
    """Return the sites of a walk by position, in program order, with unique names."""
    names: dict[Position, str] = {}
    seen: Counter[str] = Counter()
    for position, (eqn, lhs, rhs, _) in found.contractions.items():
        paths = _paths(eqn, lhs, rhs)
        base = paths[0] if paths else _pair(_label(lhs, names), _label(rhs, names))
        seen[base] += 1
        names[position] = base if seen[base] == 1 else f"{base}#{seen[base]}"
    uses: dict[str, list[str]] = {}
    for position, (eqn, lhs, rhs, _) in found.contractions.items():
        for path in _paths(eqn, lhs, rhs)[:1]:
            uses.setdefault(path, []).append(names[position])
    for path in found.lookups.values():
        uses.setdefault(path, []).append("gather")
    return {
        position: _site(names[position], *found.contractions[position], uses) for position in names
    }


def _paths(eqn: JaxprEqn, lhs: Origin, rhs: Origin) -> tuple[str, ...]:
    """Return the parameters of a contraction, the main one first: of two operands the one that is not also data's."""
    order = (lhs, rhs) if _operand(eqn, lhs, rhs) == "lhs" else (rhs, lhs)
    return tuple(
        dict.fromkeys(
            path for origin in order if origin.level == PARAMETER for path in origin.paths
        )
    )


def _operand(eqn: JaxprEqn, lhs: Origin, rhs: Origin) -> str | None:
    """Return which operand is the parameter; of two, the one that looks more like a kernel, then the second."""
    if not (rhs.paths or lhs.paths):
        return None
    if not (rhs.paths and lhs.paths):
        return "rhs" if rhs.paths else "lhs"
    left, right = (
        _kernel(origin, var.aval) for origin, var in zip((lhs, rhs), eqn.invars, strict=False)
    )
    return "lhs" if left > right else "rhs"


def _kernel(origin: Origin, aval: Any) -> tuple[bool, bool, int]:
    """Return how much a value looks like a kernel: one parameter, not repeated along an axis, of many axes longer than 1.

    Learned queries, positions or tokens that are fed to a kernel are sums of parameters, or
    repeated for every example.
    """
    if origin.dims is None:
        return False, False, 0
    long = [axes for axes, size in zip(origin.dims, aval.shape, strict=True) if size > 1]
    return len(origin.paths) == 1, all(long), sum(map(bool, long))


def _label(origin: Origin, names: dict[Position, str]) -> str:
    if origin.level == CONSTANT:
        return "constant"
    if origin.level == PARAMETER:
        return "parameters"
    return origin.label or names.get(origin.maker, "carry")


def _pair(a: str, b: str) -> str:
    """Join two names: what they share in front once, then the rest by ``@``, without the leaf names of layers."""
    first, second = (_short(each).split("/") for each in (a, b))
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return "/".join(
        [*first[:shared], "@".join(("/".join(first[shared:]), "/".join(second[shared:])))]
    )


def _short(label: str) -> str:
    head, _, leaf = label.rpartition("/")
    return head if head and leaf.partition("#")[0] in LEAVES else label


def _site(
    name: str, eqn: JaxprEqn, lhs: Origin, rhs: Origin, where: Where, uses: dict[str, list[str]]
) -> Site:
    contracting, batch = primitives.axes(eqn)
    operand, paths = _operand(eqn, lhs, rhs), _paths(eqn, lhs, rhs)
    side = 0 if operand == "lhs" else 1
    origin = (lhs, rhs)[side]
    left, right, out = (
        cast(jax.ShapeDtypeStruct, var.aval) for var in (*eqn.invars[:2], eqn.outvars[0])
    )
    return Site(
        name=name,
        kind=primitives.kind(eqn) or "",
        param=paths[0] if paths else None,
        operand=operand,
        lhs_shape=left.shape,
        rhs_shape=right.shape,
        out_shape=out.shape,
        lhs_dtype=str(left.dtype),
        rhs_dtype=str(right.dtype),
        out_dtype=str(out.dtype),
        contracting=contracting,
        batch=batch,
        param_axes=_stored(origin, contracting[side]) if paths else None,
        batch_axes=_stored(origin, batch[side]) if paths else None,
        stack_axes=tuple(axis for axis, _ in origin.sliced) if paths else (),
        stack_loops=tuple(loop for _, loop in origin.sliced) if paths else (),
        also=paths[1:],
        uses=tuple(use for use in uses.get(paths[0], ()) if use != name) if paths else (),
        loops=where.loops,
        conditional=where.conditional,
        params=dict(eqn.params),
        position=where.position,
    )


def _stored(origin: Origin, contracting: AxisIndices) -> AxisIndices | None:
    """Return the stored axes that are summed over, or None if one of them also lies in an axis that is not."""
    if origin.dims is None or len(origin.paths) != 1:
        return None
    summed = tuple(dict.fromkeys(axis for i in contracting for axis in origin.dims[i]))
    kept = {axis for i, axes in enumerate(origin.dims) if i not in contracting for axis in axes}
    return None if kept & set(summed) else summed


# Trace a function once for the shapes it is called with: its jaxpr, its sites and how to call it.


@dataclass(frozen=True)
class Traced:
    """A function's trace for certain shapes.

    Attributes:
      jaxpr: its jaxpr; the inputs are the leaves of params, then those of the inputs.
      params: the leaves of params by path: arrays or shapes.
      labels: a name for each other input.
      out: the tree of what it returns, as shapes.
    """

    jaxpr: ClosedJaxpr
    params: dict[str, Any]
    labels: Sequence[str]
    out: PyTree

    @cached_property
    def found(self) -> Found:
        """What the walk over origins saw."""
        return find(self.jaxpr, self.params, self.labels)

    @cached_property
    def sites(self) -> dict[Position, Site]:
        """The sites by position, in program order."""
        laid = pieces(self.jaxpr, self.params)
        return {
            position: _with_pieces(site, laid[position])
            for position, site in name(self.found).items()
        }

    def choose(self, where: str | tuple[str, ...] | None) -> dict[Position, Site]:
        """Return the sites whose names match a glob; matching none is an error that lists the names."""
        if where is None:
            return self.sites
        names = set(match(where, [site.name for site in self.sites.values()]))
        return {position: site for position, site in self.sites.items() if site.name in names}


def _with_pieces(site: Site, operands: Sequence[Any]) -> Site:
    """Return a site with the parts of parameters that lie in its operand, or why they cannot be told."""
    if site.operand is None:
        return site
    operand = operands[site.operand == "rhs"]
    if isinstance(operand, Laid):
        return replace(site, pieces=operand.pieces)
    return replace(site, lost=operand.reason if isinstance(operand, Lost) else "")


def trace(fn: ModelFn, params: Params, *inputs: PyTree) -> Traced:
    """Trace ``fn(params, *inputs)`` without running it.

    Args:
      fn: a pure function. What is not an array (a flag, a module) is bound before:
        ``functools.partial``, a closure.
      params: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of arrays or ``ShapeDtypeStruct``.

    Returns:
      The trace.

    Raises:
      ShapeError: if an argument has a leaf that is not an array, or the function does not take such
        arrays.
    """
    leaves = flatten(params)[0]
    labels = flatten({"inputs": list(inputs)})[0]
    for path, leaf in {**leaves, **labels}.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(
            leaf, (bool, int, float, complex)
        ):
            raise ShapeError(
                f"{path!r} is a {type(leaf).__name__}, not an array: bind what is not an array "
                "before, as in "
                "lambda params, x: fn(params, x, train=False)"
            )
    try:
        jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
    except CompressError:
        raise
    except (TypeError, ValueError) as error:
        shapes = (
            ", ".join(f"{path} {jax.typeof(leaf)}" for path, leaf in labels.items()) or "no inputs"
        )
        raise ShapeError(
            f"the function cannot be traced on these params with {shapes}: {error}"
        ) from error
    return Traced(jaxpr, leaves, list(labels), out)


# List every contraction of a function and the parameter that feeds it.


def sites(fn: ModelFn, params: Params, *inputs: PyTree) -> list[Site]:
    """List every contraction in ``fn(params, *inputs)``: matrix products, convolutions, ragged products.

    The function is traced, not run. A parameter is followed through transposes, reshapes, casts,
    slices, gathers of stacked layers, masks and fake quantization, and into jit, remat, scan,
    while, cond, custom derivatives and shard_map.

    Args:
      fn: a pure function of params and inputs.
      params: tree of arrays or ``ShapeDtypeStruct``: Linen variables, an NNX state, any pytree.
      inputs: trees of arrays or ``ShapeDtypeStruct``.

    Returns:
      The sites in program order. `unseen` lists what they do not show.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"up": {"kernel": jnp.ones((3, 8))}, "down": {"kernel": jnp.ones((8, 2))}}
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
      >>> [(site.name, site.operand, site.param_axes, site.macs) for site in sites(fn, params, jnp.ones((4, 3)))]
      [('up/kernel', 'rhs', (0,), 96), ('down/kernel', 'rhs', (0,), 64)]
    """
    return list(trace(fn, params, *inputs).sites.values())


def unseen(fn: ModelFn, params: Params, *inputs: PyTree) -> dict[str, str]:
    """Say what `sites` does not show: parameters of rank 2 or more that nothing contracts, and code nobody looks into.

    Args:
      fn: as for `sites`.
      params: as for `sites`.
      inputs: as for `sites`.

    Returns:
      ``{path or primitive: reason}``; empty if every such parameter has a site.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"table": jnp.ones((10, 4)), "kernel": jnp.ones((4, 2))}
      >>> unseen(lambda params, tokens: params["table"][tokens] @ params["kernel"], params, jnp.array([1, 2]))
      {'table': 'rows of it are looked up (gather); no product uses it'}
    """
    traced = trace(fn, params, *inputs)
    contracted = {path for site in traced.sites.values() for path in (site.param, *site.also)}
    tables = set(traced.found.lookups.values())
    left = [
        path
        for path, x in flatten(params)[0].items()
        if len(x.shape) > 1 and path not in contracted
    ]
    looked_up = "rows of it are looked up (gather); no product uses it"
    other = {path: f"{how}; no contraction uses it" for path, how in traced.found.otherwise.items()}
    hidden = {
        f"{primitive} at {'/'.join(map(str, position))}": "it contracts inside, where the "
        "interpreter does not look"
        for position, primitive in traced.found.hidden.items()
    }
    return {
        path: looked_up if path in tables else other.get(path, "no contraction uses it")
        for path in left
    } | hidden


# What each axis of each parameter is for, read from the products it enters: the layouts that
# compressions work by.


def bind(compression: Compression, fn: ModelFn, params: Params, *inputs: PyTree) -> Compression:
    """Return the same compression with the layout of every leaf read from the function that uses it.

    Scales by channel then follow the outputs of each product, whichever axis they are stored on;
    groups and ``n_m`` run along what is summed over; a leaf that holds several layers or experts is
    compressed as each of them alone would be.

    Args:
      compression: any method, or methods combined.
      fn: a pure function of params and inputs. It is traced, not run.
      params: the tree the compression is used on: arrays or ``ShapeDtypeStruct``.
      inputs: trees of arrays or ``ShapeDtypeStruct``.

    Returns:
      The Compression; use it, not the unbound one, for `init` and everything after. ``cj.coverage``
      prints the axes.

    Raises:
      ArgumentError: if a function of the compression was replaced after it was made.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"weight": jnp.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])}  # stored [out, in]
      >>> int8 = cj.quantize.uniform(8, granularity="channel")
      >>> int8.init(params).fixed["weight"]["scale"].shape
      (1, 2)
      >>> int8 = cj.bind(int8, lambda params, x: x @ params["weight"].T, params, jnp.ones((5, 2)))
      >>> int8.init(params).fixed["weight"]["scale"].shape
      (3, 1)
    """
    return bound(compression, layouts(fn, params, *inputs))


def layouts(fn: ModelFn, params: Params, *inputs: PyTree) -> dict[str, Axes]:
    """Return what each axis of each parameter is for, as the products that it enters tell.

    Args:
      fn: a pure function of params and inputs. It is traced, not run.
      params: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of arrays or ``ShapeDtypeStruct``.

    Returns:
      ``{path: Axes}`` of every leaf. Where no product uses a leaf, or what is done to it on its way
      cannot be followed, its ``source`` is ``"convention"``: outputs last. ``note`` says why, or
      that its uses disagree.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"layers": jnp.ones((12, 4, 4)), "bias": jnp.ones((12, 4)), "table": jnp.ones((9, 4))}
      >>> def fn(params, tokens):
      ...     step = lambda x, layer: (x @ layer["layers"] + layer["bias"], None)
      ...     x, _ = jax.lax.scan(step, params["table"][tokens], {k: params[k] for k in ("layers", "bias")})
      ...     return x @ params["table"].T
      >>> {path: axes.letters for path, axes in layouts(fn, params, jnp.array([1, 2])).items()}
      {'bias': 'si', 'layers': 'sio', 'table': 'oi'}
    """
    return layouts_of(trace(fn, params, *inputs))


def layouts_of(traced: Traced) -> dict[str, Axes]:
    """Return `layouts` of a function that is traced already."""
    return layouts_of_sites(traced.sites.values(), traced.params, traced.found.stacked)
