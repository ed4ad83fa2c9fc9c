"""Find the sites of a function: `sites`, `unseen`, the layouts they give, and `bind`.

`trace` makes the jaxpr; `find` runs it over origins and notes every contraction; `name` gives the
contractions their names.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn

from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, bound
from compress_jax.core.errors import ArgumentError, CompressError, ShapeError
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.types import Aval, Leaves, ModelFn, Params, PyTree
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.interpret import ConstantValue, Where, interpret, uniform_operands
from compress_jax.trace._jaxpr.origin import (
    CONSTANT,
    DATA,
    PARAMETER,
    Origin,
    Strided,
    Unknown,
    Value,
    data,
    join,
    parameter,
    pieces,
    transfer,
)
from compress_jax.trace._jaxpr.site import AxisIndices, Position, Site, layouts_of_sites

# What the parameter of a layer is called: left out where two names are joined.
LEAF_NAMES = ("kernel", "embedding", "weight", "w")
LOOKED_UP = "rows of it are looked up (gather); no product uses it"
CONSTANT_ROWS = "rows of it are read at constant indices"
NO_SUM = "its products are summed over no axis: it scales entry by entry"
CONTRACTS_INSIDE = "it contracts inside, where the interpreter does not look"

MERGE_COPIES = (
    "It changes a variable that it closes over (random keys, say): in Flax NNX, merge a copy, "
    "nnx.merge(graph, params, rest, copy=True)"
)


def sites(fn: ModelFn, params: Params, *inputs: PyTree) -> list[Site]:
    """List the contractions of a function: matrix products, convolutions, ragged products.

    ``fn(params, *inputs)`` is traced, not run. A parameter is followed through transposes,
    reshapes, casts, slices, gathers of stacked layers, masks and fake quantization, and into jit,
    remat, scan, while, cond, custom derivatives and shard_map.

    Args:
      fn: a pure function of params and inputs.
      params: tree of arrays or ``ShapeDtypeStruct``: Linen variables, an NNX state, any pytree.
      inputs: trees of arrays or ``ShapeDtypeStruct``.

    Returns:
      The sites in program order. `unseen` lists the parameters that none of them uses.

    Raises:
      ShapeError: if an argument has a leaf that is not an array, or the function does not take such
        arrays.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"up": {"kernel": jnp.ones((3, 8))}, "down": {"kernel": jnp.ones((8, 2))}}
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
      >>> found = cj.trace.sites(fn, params, jnp.ones((4, 3)))
      >>> [(site.name, site.operand, site.param_axes, site.macs) for site in found]
      [('up/kernel', 'rhs', (0,), 96), ('down/kernel', 'rhs', (0,), 64)]
    """
    return list(trace(fn, params, *inputs).sites.values())


def unseen(fn: ModelFn, params: Params, *inputs: PyTree) -> dict[str, str]:
    """List what `sites` does not show, with the reason.

    That is parameters of rank 2 or more that no contraction uses, and primitives with a contraction
    inside that the interpreter does not enter.

    Args:
      fn: as for `sites`.
      params: as for `sites`.
      inputs: as for `sites`.

    Returns:
      ``{path or primitive: reason}``; empty if every such parameter has a site.

    Raises:
      ShapeError: as for `sites`.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"table": jnp.ones((10, 4)), "kernel": jnp.ones((4, 2))}
      >>> fn = lambda params, tokens: params["table"][tokens] @ params["kernel"]
      >>> cj.trace.unseen(fn, params, jnp.array([1, 2]))
      {'table': 'rows of it are looked up (gather); no product uses it'}
    """
    traced = trace(fn, params, *inputs)
    found = traced.found
    contracted: set[str | None] = set()
    for site in traced.sites.values():
        contracted.update((site.param, *site.also))
    # A table may have other uses too; the lookup says most.
    reasons = {path: f"{how}; no contraction uses it" for path, how in found.otherwise.items()}
    reasons |= dict.fromkeys(found.lookups.values(), LOOKED_UP)
    # Vectors (biases, scales of norms) are no kernels: they need no reason.
    unused = {
        path: reasons.get(path, "no contraction uses it")
        for path, x in flatten(params)[0].items()
        if len(x.shape) > 1 and path not in contracted
    }
    for position, primitive in found.hidden.items():
        unused[f"{primitive} at {'/'.join(map(str, position))}"] = CONTRACTS_INSIDE
    return unused


def bind(compression: Compression, fn: ModelFn, params: Params, *inputs: PyTree) -> Compression:
    """Return the same compression with every leaf's layout read from the function that uses it.

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
      >>> params = {"weight": jnp.array([[1.0, 2.0], [10.0, 20.0], [9.0, 8.0]])}  # [out, in]
      >>> int8 = cj.quantize.uniform(8, granularity="channel")
      >>> int8.init(params).fixed["weight"]["scale"].shape
      (1, 2)
      >>> fn = lambda params, x: x @ params["weight"].T
      >>> int8 = cj.bind(int8, fn, params, jnp.ones((5, 2)))
      >>> int8.init(params).fixed["weight"]["scale"].shape
      (3, 1)
    """
    return bound(compression, layouts(fn, params, *inputs))


def layouts(fn: ModelFn, params: Params, *inputs: PyTree) -> dict[str, Axes]:
    """Return what each axis of each parameter is for, read from the products that it enters.

    Args:
      fn: a pure function of params and inputs. It is traced, not run.
      params: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of arrays or ``ShapeDtypeStruct``.

    Returns:
      ``{path: Axes}`` of every leaf. Where no product uses a leaf, or an operation before the
      product cannot be followed, its ``source`` is ``"convention"``: outputs last. ``note`` says
      why, or that its uses disagree.

    Raises:
      ShapeError: as for `sites`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import compress_jax as cj
      >>> layers = {"kernel": jnp.ones((12, 4, 4)), "bias": jnp.ones((12, 4))}
      >>> params = {"layers": layers, "table": jnp.ones((9, 4))}
      >>> def fn(params, tokens):
      ...     step = lambda x, layer: (x @ layer["kernel"] + layer["bias"], None)
      ...     x, _ = jax.lax.scan(step, params["table"][tokens], params["layers"])
      ...     return x @ params["table"].T
      >>> found = cj.trace.layouts(fn, params, jnp.array([1, 2]))
      >>> {path: axes.letters for path, axes in found.items()}
      {'layers/bias': 'si', 'layers/kernel': 'sio', 'table': 'oi'}
    """
    return layouts_of(trace(fn, params, *inputs))


def layouts_of(traced: "Traced") -> dict[str, Axes]:
    """Return `layouts` of a function that is traced already."""
    return layouts_of_sites(traced.sites.values(), traced.params, traced.found.stacked)


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
    params: Leaves
    labels: Sequence[str]
    out: PyTree

    @cached_property
    def found(self) -> "Found":
        """The contractions and further uses of parameters."""
        return find(self.jaxpr, self.params, self.labels)

    @cached_property
    def sites(self) -> dict[Position, Site]:
        """The sites by position, in program order."""
        operands = pieces(self.jaxpr, self.params)
        named = name(self.found)
        return {
            position: _with_pieces(site, *operands[position]) for position, site in named.items()
        }

    def choose(self, where: Patterns | None) -> dict[Position, Site]:
        """Return the sites whose names match a glob; no match is an error that lists the names."""
        if where is None:
            return self.sites
        names = set(match(where, [site.name for site in self.sites.values()]))
        return {position: site for position, site in self.sites.items() if site.name in names}


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
    labels = flatten({"inputs": list(inputs)})[0]  # "inputs/0/tokens"
    for path, leaf in {**leaves, **labels}.items():
        _require_array(path, leaf)
    try:
        jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
    except CompressError:
        raise  # some are a ValueError too
    except (TypeError, ValueError) as error:
        shown = [f"{path} {jax.typeof(leaf)}" for path, leaf in labels.items()]
        shapes = ", ".join([*shown[:8], *(["..."] if len(shown) > 8 else [])])
        raise ShapeError(
            f"the function cannot be traced on these params with {shapes or 'no inputs'}: {error}"
        ) from error
    except Exception as error:
        # Flax's own class is not imported: core and trace know no framework.
        if type(error).__name__ == "TraceContextError":
            raise ArgumentError(
                f"the function cannot be traced: {error}. {MERGE_COPIES}"
            ) from error
        raise
    return Traced(jaxpr, leaves, list(labels), out)


def _require_array(path: str, leaf: object) -> None:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return
    # JAX traces Python's numbers as arrays of rank 0.
    if not isinstance(leaf, (bool, int, float, complex)):
        raise ShapeError(
            f"{path!r} is a {type(leaf).__name__}, not an array: bind what is not an array "
            "before, as in lambda params, x: fn(params, x, train=False)"
        )


def _with_pieces(site: Site, lhs: Value, rhs: Value) -> Site:
    """Return a site with the pieces in its operand, or the reason they are unknown."""
    if site.operand is None:
        return site
    operand = rhs if site.operand == "rhs" else lhs
    if isinstance(operand, Strided):
        return replace(site, pieces=operand.pieces)
    return replace(site, lost=operand.reason if isinstance(operand, Unknown) else "")


Contraction = tuple[JaxprEqn, Origin, Origin, Where]


@dataclass
class Found:
    """The domain of origins; notes every contraction, and how else parameters are used.

    Attributes:
      contractions: by position, the equation, the origins of its operands, and its place.
      lookups: by position, the table that rows were gathered from.
      otherwise: by path of a parameter, how it is used without a contraction or a lookup.
      sums: positions of contractions of which an operand is one number throughout (``ones``): sums,
        not layers.
      hidden: by position, a primitive with a contraction inside that the interpreter does not
        enter.
      stacked: by path, the axes of a parameter that loops take one slice of at a time.
    """

    contractions: dict[Position, Contraction] = field(default_factory=dict)
    lookups: dict[Position, str] = field(default_factory=dict)
    otherwise: dict[str, str] = field(default_factory=dict)
    hidden: dict[Position, str] = field(default_factory=dict)
    stacked: dict[str, set[int]] = field(default_factory=dict)
    sums: frozenset[Position] = frozenset()

    def constant(self, aval: Aval, value: ConstantValue) -> Origin:
        """Return the origin of a literal or a captured array."""
        return Origin()

    def join(self, a: Origin, b: Origin) -> Origin:
        """Join two abstract values."""
        return join((a, b))

    def same(self, a: Origin, b: Origin) -> bool:
        """Tell whether two abstract values are equal."""
        return a == b

    def unstack(self, a: Origin, loop: int) -> Origin:
        """Return the origin of one slice along the first axis; note the loop that slices it."""
        if a.dims is None:
            return a
        # A reshape may have joined several stored axes in the first axis: the loop runs along all.
        sliced = (*a.sliced, *((axis, loop) for axis in a.dims[0]))
        if a.level == PARAMETER and len(a.paths) == 1:
            self.stacked.setdefault(a.paths[0], set()).update(a.dims[0])
        return replace(a, dims=a.dims[1:], sliced=sliced)

    def stack(self, a: Origin, length: int) -> Origin:
        """Return the origin of slices put together."""
        return a if a.dims is None else replace(a, dims=((), *a.dims))

    def reshard(self, a: Origin, aval: Aval) -> Origin:
        """Return the origin itself: a device's shard comes from where the whole does."""
        return a

    def equation(self, eqn: JaxprEqn, args: list[Origin], where: Where) -> Sequence[Origin]:
        """Return the origins of an equation's results; note it if it contracts or looks up."""
        if primitives.kind(eqn) is not None:
            # A product with ones is a sum: its other operand is no weight.
            if where.position in self.sums:
                args = [replace(arg, paths=()) for arg in args]
            self.contractions[where.position] = (eqn, args[0], args[1], where)
            return [_product(args, where.position)]
        if primitives.contracts_inside(eqn):
            self.hidden[where.position] = eqn.primitive.name
        result = transfer(eqn, args)
        # Rows that data choose are an embedding; any other slice is still the parameter.
        if eqn.primitive.name == "gather" and args[0].paths:
            if result.level == DATA:
                self.lookups[where.position] = args[0].paths[0]
            elif args[0].level == PARAMETER:
                self.otherwise.setdefault(args[0].paths[0], CONSTANT_ROWS)
        # A product that `kind` does not count sums over no axis (einsum("bd,dn->bdn")).
        if eqn.primitive.name == "dot_general":
            scales = [arg.paths[0] for arg in args if arg.level == PARAMETER and arg.paths]
            self.otherwise |= dict.fromkeys(scales, NO_SUM)
        return [result] * len(eqn.outvars)


def _product(args: list[Origin], position: Position) -> Origin:
    """Return the origin of a product.

    With data it is data; a parameter times constants (a rotation) is still that parameter.
    """
    level = max(arg.level for arg in args)
    if level == DATA:
        return Origin(DATA, maker=position)
    # Of two parameters (a low-rank product A @ B) the result is a view of neither.
    views = [arg for arg in args if arg.level == PARAMETER]
    return Origin(level, views[0].paths if len(views) == 1 else ())


def find(closed: ClosedJaxpr, params: Leaves, inputs: Sequence[str]) -> Found:
    """Run a jaxpr whose first inputs are the parameters over origins.

    Args:
      closed: the jaxpr.
      params: shapes by path, ``{path: array or ShapeDtypeStruct}``.
      inputs: a label for each further input.

    Returns:
      The domain after the run.
    """
    # `equation` looks up the positions of contractions only, so those of other equations may stay.
    found = Found(sums=frozenset(uniform_operands(closed)))
    origins = [parameter(path, x.shape) for path, x in params.items()]
    interpret(found, closed, [*origins, *map(data, inputs)])
    return found


def name(found: Found) -> dict[Position, Site]:
    """Return the sites of a jaxpr by position, in program order, with unique names."""
    names: dict[Position, str] = {}
    counts: Counter[str] = Counter()
    # In program order: what an operand was made by has its name before the operand is used.
    for position, contraction in found.contractions.items():
        base = _base_name(contraction, names)
        counts[base] += 1
        names[position] = base if counts[base] == 1 else f"{base}#{counts[base]}"
    # How each parameter is used: names of sites, and lookups.
    uses: dict[str, list[str]] = {}
    for position, contraction in found.contractions.items():
        for path in _paths(contraction)[:1]:
            uses.setdefault(path, []).append(names[position])
    for path in found.lookups.values():
        uses.setdefault(path, []).append("gather")
    return {
        position: _site(names[position], contraction, uses)
        for position, contraction in found.contractions.items()
    }


def _base_name(contraction: Contraction, names: dict[Position, str]) -> str:
    """Return the path of the parameter, else the names of both operands."""
    paths = _paths(contraction)
    if paths:
        return paths[0]
    _, lhs, rhs, _ = contraction
    return _pair(_label(lhs, names), _label(rhs, names))


def _paths(contraction: Contraction) -> tuple[str, ...]:
    """Return the parameters of a contraction: those of the operand that is the parameter first."""
    _, lhs, rhs, _ = contraction
    order = (lhs, rhs) if _operand(contraction) == "lhs" else (rhs, lhs)
    views = [origin for origin in order if origin.level == PARAMETER]
    return tuple(dict.fromkeys(itertools.chain.from_iterable(view.paths for view in views)))


def _operand(contraction: Contraction) -> str | None:
    """Return the operand that is the parameter; of two, the one more like a kernel, then rhs."""
    eqn, lhs, rhs, _ = contraction
    if not lhs.paths:
        return "rhs" if rhs.paths else None
    if not rhs.paths:
        return "lhs"
    # Both are parameters, as where learned queries are fed to a kernel.
    left = _likeness(lhs, eqn.invars[0].aval)
    right = _likeness(rhs, eqn.invars[1].aval)
    return "lhs" if left > right else "rhs"


def _likeness(origin: Origin, aval: Aval) -> tuple[bool, bool, int]:
    """Return how much a value is like a kernel.

    A kernel is one parameter, not repeated along an axis, with many axes longer than 1. Learned
    queries, positions or tokens that are fed to a kernel are sums of parameters, or repeated for
    every example.
    """
    if origin.dims is None:
        return False, False, 0
    # Compared from left to right. A repeated axis holds no stored axis: its entry is empty.
    long = [axes for axes, size in zip(origin.dims, aval.shape, strict=True) if size > 1]
    return len(origin.paths) == 1, all(long), sum(map(bool, long))


def _label(origin: Origin, names: dict[Position, str]) -> str:
    """Return a name for an operand that is no view of a parameter."""
    if origin.level == CONSTANT:
        return "constant"
    if origin.level == PARAMETER:
        return "parameters"
    # The carry of a loop may come from a contraction further down, which has no name yet.
    return origin.label or names.get(origin.maker, "carry")


def _pair(a: str, b: str) -> str:
    """Join two names: what they share in front once, then the rest by ``@``."""
    first = _short(a).split("/")
    second = _short(b).split("/")
    # block/query/kernel and block/key/kernel make block/query@key. The last part of each is kept,
    # also where the two are equal.
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    rest = "@".join(("/".join(first[shared:]), "/".join(second[shared:])))
    return "/".join([*first[:shared], rest])


def _short(label: str) -> str:
    """Return a name without the leaf name of a layer's parameter."""
    head, _, leaf = label.rpartition("/")
    # A second use is called kernel#2. A path of one part has nothing else to be called by.
    return head if head and leaf.partition("#")[0] in LEAF_NAMES else label


def _site(name: str, contraction: Contraction, uses: dict[str, list[str]]) -> Site:
    eqn, lhs, rhs, where = contraction
    left: Aval = eqn.invars[0].aval
    right: Aval = eqn.invars[1].aval
    out: Aval = eqn.outvars[0].aval
    contracting, batch = primitives.axes(eqn)
    site = Site(
        name=name,
        kind=primitives.kind(eqn) or "",
        param=None,
        operand=_operand(contraction),
        lhs_shape=left.shape,
        rhs_shape=right.shape,
        out_shape=out.shape,
        lhs_dtype=str(left.dtype),
        rhs_dtype=str(right.dtype),
        out_dtype=str(out.dtype),
        contracting=contracting,
        batch=batch,
        loops=where.loops,
        conditional=where.conditional,
        params=dict(eqn.params),
        position=where.position,
    )
    paths = _paths(contraction)
    if not paths:
        return site
    # What the trace knows of the parameter: which of its stored axes lie in the operand's axes.
    side = 0 if site.operand == "lhs" else 1
    origin = (lhs, rhs)[side]
    return replace(
        site,
        param=paths[0],
        param_axes=_stored_axes(origin, contracting[side]),
        batch_axes=_stored_axes(origin, batch[side]),
        stack_axes=tuple(axis for axis, _ in origin.sliced),
        stack_loops=tuple(loop for _, loop in origin.sliced),
        also=paths[1:],
        uses=tuple(use for use in uses.get(paths[0], ()) if use != name),
    )


def _stored_axes(origin: Origin, own: AxisIndices) -> AxisIndices | None:
    """Return the stored axes that lie in some axes of a value; None if one lies in others too."""
    if origin.dims is None or len(origin.paths) != 1:
        return None
    inside = tuple(dict.fromkeys(itertools.chain.from_iterable(origin.dims[i] for i in own)))
    rest = (axes for i, axes in enumerate(origin.dims) if i not in own)
    others = set(itertools.chain.from_iterable(rest))
    # A reshape that mixes axes puts a stored axis in several: it is not summed over as a whole.
    return None if others & set(inside) else inside
