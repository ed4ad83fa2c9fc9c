"""Take the view of a parameter where the function uses it: inside loops and rematerialized parts.

Seen before the function runs, a stack of layers is held twice: as it is stored and as it is seen.
Seen inside the loop over its layers, and under the loop's `jax.checkpoint`, one layer at a time is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from compress_jax.core.compression import LeafView, ViewFn
from compress_jax.core.paths import flatten
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.trace._jaxpr.evaluate import Values, bind, call, replay, scan
from compress_jax.trace._jaxpr.find_sites import trace
from compress_jax.trace._jaxpr.primitives import PLAIN_CALLS, REMATS, Call, Scan, nested

FOLLOWED = "convert_element_type"  # a cast of the whole stack before the loop: it moves inside


def used_inside(fn: ModelFn, params: Params, *inputs: PyTree) -> list[str]:
    """Return the leaves that a loop takes in slices, or that a rematerialized part uses.

    Args:
      fn: a pure function of params and inputs. It is traced, not run.
      params: a tree of arrays or shapes.
      inputs: trees of arrays or shapes.

    Returns:
      Their paths.

    Raises:
      ShapeError: if the function does not take such arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"layers": jnp.ones((3, 4, 4)), "head": jnp.ones((4, 2))}
      >>> def fn(params, x):
      ...     x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])
      ...     return x @ params["head"]
      >>> cj.trace.used_inside(fn, params, jnp.ones((1, 4)))
      ['layers']
    """
    traced = trace(fn, params, *inputs)
    paths = list(traced.params)
    leaves = dict(zip(traced.jaxpr.jaxpr.invars, range(len(paths)), strict=False))
    return [paths[index] for index in sorted(_inside(traced.jaxpr.jaxpr, leaves))]


def _inside(jaxpr: Jaxpr, leaves: Mapping[Var, int]) -> set[int]:
    """Return the numbers of the leaves that loops or rematerialized parts of a jaxpr use."""
    follow = dict(leaves)
    found: set[int] = set()
    for eqn in jaxpr.eqns:
        own = {i: follow[v] for i, v in enumerate(eqn.invars) if isinstance(v, Var) and v in follow}
        if not own:
            continue
        match nested(eqn):
            case Call() if eqn.primitive.name in REMATS:
                found.update(own.values())
            case Call(body) if _is_plain(eqn):
                found |= _inside(
                    body.jaxpr, {body.jaxpr.invars[i]: leaf for i, leaf in own.items()}
                )
            case Scan() as loop:
                first = loop.consts + loop.carry
                found.update(leaf for i, leaf in own.items() if i >= first)
        if eqn.primitive.name == FOLLOWED:
            follow[eqn.outvars[0]] = own[0]
    return found


def view_inside(fn: ModelFn, views: Mapping[str, LeafView], *, at_view: bool = False) -> ModelFn:
    """Return a function that views some of its params itself, each where it is used.

    It returns what ``fn`` returns of the viewed params.

    Args:
      fn: a pure function of params and inputs.
      views: the views of leaves by path, such as `cj.core.leaf_views` returns.
      at_view: whether the gradient at such a leaf p is that at its view w, ``dL/dw``, with none to
        the arrays of the view; else it is ``dL/dp``, through the view.

    Returns:
      ``(params, *inputs) -> out``, where these leaves of params are as they are stored.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> half = cj.core.LeafView(lambda x, layers, shared: x * layers, jnp.full(3, 0.5), stacked=1)
      >>> loop = lambda params, x: jax.lax.scan(lambda x, w: (x * w, None), x, params["w"])[0]
      >>> params = {"w": jnp.array([2.0, 4.0, 6.0])}
      >>> seen = cj.trace.view_inside(loop, {"w": half})
      >>> seen(params, jnp.float32(1.0)).tolist()
      6.0
      >>> at_view = cj.trace.view_inside(loop, {"w": half}, at_view=True)
      >>> [jax.grad(fn)(params, 1.0)["w"].tolist() for fn in (seen, at_view)]
      [[3.0, 1.5, 1.0], [6.0, 3.0, 2.0]]
    """

    def run(params: Params, *inputs: PyTree) -> PyTree:
        traced = trace(fn, params, *inputs)
        leaves: list[_Value] = []
        for path, x in flatten(params)[0].items():
            if path in views:
                view = views[path]
                x = _Late(x, view._replace(fn=partial(_seen, view.fn)) if at_view else view)
            leaves.append(x)
        results = _run(traced.jaxpr, [*leaves, *jax.tree.leaves(inputs)])
        return jax.tree.unflatten(jax.tree.structure(traced.out), results)

    return run


@dataclass(frozen=True, eq=False)
class _Late:
    """A leaf, or a slice of it, that is not viewed yet.

    Attributes:
      x: as it is stored.
      view: its view, of whose layers this slice has its own.
      casts: the casts that come after the view.
    """

    x: jax.Array
    view: LeafView
    casts: tuple[JaxprEqn, ...] = ()

    def slice(self, x: jax.Array, layers: PyTree) -> "_Late":
        """Return a slice along the first axis."""
        view = self.view._replace(layers=layers, stacked=self.view.stacked - 1)
        return replace(self, x=x, view=view)

    def seen(self) -> jax.Array:
        """Return the view."""
        with jax.named_scope("view"):
            x = self.view.fn(self.x, self.view.layers, self.view.shared)
        for eqn in self.casts:
            (x,) = bind(eqn, [x])
        return x


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _seen(fn: ViewFn, x: jax.Array, layers: PyTree, shared: PyTree) -> jax.Array:
    """Return a view whose derivative is that of the identity: the caller has the view's own."""
    return fn(x, layers, shared)


@_seen.defjvp
def _(
    fn: ViewFn, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    return _seen(fn, *primals), tangents[0]


_Value = jax.Array | _Late


def _run(jaxpr: ClosedJaxpr, args: Sequence[_Value]) -> list[jax.Array]:
    """Run a jaxpr on values of which some are viewed late."""
    views: dict[int, jax.Array] = {}  # of this body alone: another one may be rematerialized

    def seen(value: _Value) -> jax.Array:
        if not isinstance(value, _Late):
            return value
        if id(value) not in views:
            views[id(value)] = value.seen()
        return views[id(value)]

    def run(index: int, eqn: JaxprEqn, args: list[_Value]) -> Sequence[_Value]:
        late, plain = _split(args)
        if not late:
            return bind(eqn, plain)
        match nested(eqn):
            case Call(body) if eqn.primitive.name in REMATS or _is_plain(eqn):
                return _call(eqn, body, args)
            case Scan() as loop:
                first = loop.consts + loop.carry
                return _scan(eqn, loop, [*map(seen, args[:first]), *args[first:]])
        if eqn.primitive.name == FOLLOWED:
            return [replace(late[0], casts=(*late[0].casts, eqn))]
        return bind(eqn, [seen(arg) for arg in args])

    return [seen(result) for result in replay(jaxpr, args, run)]


def _is_plain(eqn: JaxprEqn) -> bool:
    """Tell whether a call only runs its body: it asks for no shardings of its operands."""
    shardings = eqn.params.get("in_shardings", ())
    return eqn.primitive.name in PLAIN_CALLS and not any(
        isinstance(each, jax.sharding.Sharding) for each in shardings
    )


def _split(args: Sequence[_Value]) -> tuple[dict[int, _Late], list[jax.Array]]:
    """Return the late values by place, and the others."""
    late = {i: arg for i, arg in enumerate(args) if isinstance(arg, _Late)}
    return late, [arg for arg in args if not isinstance(arg, _Late)]


def _joined(late: Mapping[int, _Late], plain: Sequence[jax.Array]) -> list[_Value]:
    """Return all values in their order."""
    values: list[_Value] = list(plain)
    for i in sorted(late):
        values.insert(i, late[i])
    return values


def _call(eqn: JaxprEqn, body: ClosedJaxpr, args: Sequence[_Value]) -> list[jax.Array]:
    """Rebuild a call around a body that closes over the late values."""
    late, plain = _split(args)

    def run(*plain: jax.Array) -> Values:
        return _run(body, _joined(late, plain)), {}

    # Options that there are one of for each operand.
    options = dict(eqn.params)
    for name in ("in_shardings", "prevent_cse"):
        if isinstance(options.get(name), tuple):
            options[name] = tuple(each for i, each in enumerate(options[name]) if i not in late)
    return call(eqn.replace(params=options), plain, run)[0]


def _scan(eqn: JaxprEqn, loop: Scan, args: Sequence[_Value]) -> list[jax.Array]:
    """Rebuild a loop that takes slices of what is stored, and views each of them."""
    args = [arg.seen() if isinstance(arg, _Late) and not arg.view.stacked else arg for arg in args]
    late, plain = _split(args)
    slices = {i: (each.x, each.view.layers) for i, each in late.items()}

    def run(*plain: jax.Array, given: dict[int, tuple[jax.Array, PyTree]]) -> Values:
        own = {i: each.slice(*given[i]) for i, each in late.items()}
        return _run(loop.body, _joined(own, plain)), {}

    return scan(eqn, plain, loop, run, slices)[0]
