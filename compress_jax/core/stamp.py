"""A stamp on states: the compression that made them, its options, and its leaves.

The stamp is static (part of the tree's structure, not an array), so the check runs while a function
is traced and costs nothing under `jit`.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

import jax

from compress_jax.core.axes import Axes
from compress_jax.core.errors import StateError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Params, PyTree

Signature = tuple[tuple[str, tuple[int, ...], str], ...]
SHOWN = 240  # characters of a call in an error message


class Stamp(NamedTuple):
    """What a state belongs to.

    Attributes:
      call: the compression with its options, as text.
      params: path, shape and dtype of every floating-point leaf it was made for.
      axes: ``(path, letters)`` of the leaves whose axes a trace tells to be other than by
        convention.
      learned: path, shape and dtype of the state's own learned arrays.
      fixed: likewise of its fixed arrays.
    """

    call: str
    params: Signature
    axes: tuple[tuple[str, str], ...]
    learned: Signature
    fixed: Signature


class Stamped(dict[str, PyTree]):
    """The ``fixed`` dict of a state with the stamp of the compression that made it.

    Example:
      >>> Stamped({"kernel": 1}, None) == {"kernel": 1}
      True
    """

    def __init__(self, items: Mapping[str, PyTree], stamp: Stamp | None):
        """Hold items as a dict does, and the stamp beside them."""
        super().__init__(items)
        self.stamp = stamp


Static = tuple[tuple[str, ...], Stamp | None]
"""What of a `Stamped` is part of the structure of a tree: its keys and its stamp."""


def _flatten(x: Stamped) -> tuple[list[tuple[Hashable, PyTree]], Static]:
    # Sorted, as JAX sorts the keys of any dict: equal states have equal structures.
    keys = tuple(sorted(x))
    return [(jax.tree_util.DictKey(key), x[key]) for key in keys], (keys, x.stamp)


def _unflatten(static: Static, children: Iterable[PyTree]) -> Stamped:
    keys, stamp = static
    return Stamped(dict(zip(keys, children, strict=True)), stamp)


jax.tree_util.register_pytree_with_keys(Stamped, _flatten, _unflatten)


def signature(tree: PyTree, floats: bool = False) -> Signature:
    """Return path, shape and dtype of the arrays of a tree; of floating-point ones only, if asked.

    Args:
      tree: any tree; leaves that are no arrays are left out.
      floats: leave out all that is not floating point.

    Returns:
      One entry an array, in tree order.

    Example:
      >>> import jax.numpy as jnp
      >>> signature({"w": jnp.ones((2, 3)), "n": 1})
      (('w', (2, 3), 'float32'),)
    """
    found = []
    for path, x in flatten(tree)[0].items():
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            continue
        if not floats or jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
            found.append((path, tuple(x.shape), str(x.dtype)))
    return tuple(found)


def calls(tree: PyTree) -> list[str]:
    """Return the compressions that made the states in a tree, as text, in order.

    Example:
      >>> calls([Stamped({}, Stamp("uniform(bits=4)", (), (), (), ())), {"w": 1.0}])
      ['uniform(bits=4)']
    """
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Stamped))
    return [
        each.stamp.call for each in found if isinstance(each, Stamped) and each.stamp is not None
    ]


def seal(call: str, axes: dict[str, Axes] | None, params: Params, state: PyTree) -> PyTree:
    """Return a state with a stamp."""
    known = tuple(sorted(_unusual(axes).items()))
    stamp = Stamp(
        call,
        signature(params, floats=True),
        known,
        signature(state.learned),
        signature(state.fixed),
    )
    return state._replace(fixed=Stamped(state.fixed, stamp))


def unseal(call: str, axes: dict[str, Axes] | None, params: Params, state: PyTree) -> PyTree:
    """Check the stamp of a state and return the state without it; one without a stamp passes.

    Raises:
      StateError: if the state is of another method, other options, other axes, or of leaves of
        other shapes or dtypes.
    """
    stamp = getattr(state.fixed, "stamp", None)
    # A state made by hand has none; its shapes are checked where it is used.
    if stamp is None:
        return state
    if stamp.call != call:
        raise StateError(
            f"this state was made by\n  {_short(stamp.call, call)}\nand is used by\n  "
            f"{_short(call, stamp.call)}\n"
            "Make a state with this compression's own `init`."
        )
    _same_axes(stamp, axes or {}, params)
    # Inside shard_map arrays are one device's pieces of what `init` saw.
    if not jax.sharding.get_abstract_mesh().manual_axes:
        _same_leaves(stamp, params)
        _same_arrays("learned", stamp.learned, state.learned)
        _same_arrays("fixed", stamp.fixed, state.fixed)
    return state._replace(fixed=dict(state.fixed))


def _short(text: str, other: str) -> str:
    """Cut a long text around the first character in which it differs from the other."""
    if len(text) <= SHOWN:
        return text
    differ = next(
        (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b),
        min(len(text), len(other)),
    )
    start = max(0, differ - SHOWN // 2)
    end = start + SHOWN
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")


def _unusual(axes: Mapping[str, Axes] | None) -> dict[str, str]:
    """Return the letters of the leaves whose axes differ from the convention."""
    # Only these are in the stamp: a trace that confirms the convention changes nothing in a state.
    usual = {path: Axes.convention(each.shape) for path, each in (axes or {}).items()}
    return {
        path: each.letters
        for path, each in (axes or {}).items()
        if each.stack or each.outputs != usual[path].outputs
    }


def _same_axes(stamp: Stamp, axes: Mapping[str, Axes], params: Params) -> None:
    made, wanted = dict(stamp.axes), _unusual(axes)
    for path in flatten(params)[0]:
        if made.get(path) == wanted.get(path):
            continue
        has, wants = (each.get(path, "outputs last, no stack") for each in (made, wanted))
        raise StateError(
            f"leaf {path!r}: the state was made for the axes {has!r}, and this compression takes "
            f"{wants!r}; use the "
            "compression that `bind` (or the solver) returned throughout, or make the state anew "
            "with `init`"
        )


def _same_leaves(stamp: Stamp, params: Params) -> None:
    leaves = flatten(params)[0]
    for path, shape, dtype in stamp.params:
        if path not in leaves:
            raise StateError(
                f"these params (with {', '.join(map(repr, leaves)) or 'no leaves'}) lack leaf "
                f"{path!r}, which the state was "
                f"made for; it has: {', '.join(name for name, *_ in stamp.params)}"
            )
        x = leaves[path]
        if tuple(x.shape) != shape or str(x.dtype) != dtype:
            raise StateError(
                f"leaf {path!r} is {x.dtype}{list(x.shape)}, and the state was made for "
                f"{dtype}{list(shape)}; "
                "make a state for these params with `init`"
            )


def _same_arrays(kind: str, made: Signature, tree: PyTree) -> None:
    found = signature(tree)
    if found == made:
        return
    was, now = (
        {path: f"{dtype}{list(shape)}" for path, shape, dtype in each} for each in (made, found)
    )
    path = next(path for path in {**was, **now} if was.get(path) != now.get(path))
    raise StateError(
        f"the state's {kind} array {path!r} is {now.get(path, 'missing')}, and it was "
        f"{was.get(path, 'not there')} when "
        "the state was made; do not change shapes or dtypes of a state, make it anew with `init`"
    )
