"""Paths of leaves: ``{"dense": {"kernel": w}}`` holds ``dense/kernel``; globs choose some."""

import re
from collections.abc import Callable, Container, Iterable

import jax

from compress_jax.core.errors import ArgumentError, NoMatchError
from compress_jax.core.packed import is_packed
from compress_jax.core.types import Leaf, Leaves, PyTree

Patterns = str | tuple[str, ...]


def name(key_path: jax.tree_util.KeyPath) -> str:
    """Return the name of a JAX key path, keys joined by ``/``.

    The ``.value`` that ``flax.nnx`` variables add at the end is dropped, so that a Linen dict, an
    NNX state and a plain dict of the same model have the same names.

    Args:
      key_path: a key path as ``jax.tree_util.tree_flatten_with_path`` gives it.

    Returns:
      The name, such as ``"dense/kernel"``.

    Example:
      >>> name((jax.tree_util.DictKey("dense"), jax.tree_util.DictKey("kernel")))
      'dense/kernel'
    """
    if len(key_path) > 1 and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten(tree: PyTree) -> tuple[dict[str, Leaf], Callable[[Leaves], PyTree]]:
    """Flatten a tree to ``{path: leaf}``, and return the function that rebuilds the tree.

    Packed nodes count as leaves, as they stand where an array stood.

    Args:
      tree: any pytree of arrays or packed nodes.

    Returns:
      ``(leaves, rebuild)``: leaves by name in tree order; ``rebuild(leaves)`` gives back a tree of
        the same structure.

    Example:
      >>> leaves, rebuild = flatten({"dense": {"kernel": 1.0, "bias": 0.0}})
      >>> leaves
      {'dense/bias': 0.0, 'dense/kernel': 1.0}
      >>> rebuild({**leaves, "dense/bias": 5.0})
      {'dense': {'bias': 5.0, 'kernel': 1.0}}
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)
    leaves = {name(path): leaf for path, leaf in pairs}
    # {"a": {"b": x}, "a/b": y} has two leaves of one name.
    if len(leaves) != len(pairs):
        raise ArgumentError(
            "two leaves of this tree have the same name; rename a key that contains '/'"
        )

    def rebuild(new: Leaves) -> PyTree:
        return treedef.unflatten([new[key] for key in leaves])

    return leaves, rebuild


def owner(path: str, names: Container[str]) -> str | None:
    """Return the longest name that a path ends in: the param an optimizer-state leaf belongs to.

    Args:
      path: a name such as ``"0/mu/params/dense/kernel"``.
      names: of the params.

    Returns:
      The name, or None if the path ends in none of them.

    Example:
      >>> owner("0/mu/dense/kernel", ["kernel", "dense/kernel"]), owner("0/count", ["kernel"])
      ('dense/kernel', None)
    """
    # From the longest end: "kernel" must not take what belongs to "dense/kernel".
    keys = path.split("/")
    ends = ("/".join(keys[start:]) for start in range(len(keys)))
    return next((end for end in ends if end in names), None)


TOKENS = {"**/": "(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _regex(pattern: str) -> re.Pattern[str]:
    """Translate a glob: ``**`` crosses ``/``; ``*``, ``?``, ``[a-c]`` and ``[!a]`` do not."""
    # The alternatives are tried in order, hence "**/" before "**", and "**" before "*".
    parts = re.split(r"(\*\*/|/\*\*$|\*\*|\*|\?|\[!?[^\]!][^\]]*\])", pattern)
    return re.compile("".join(TOKENS.get(part) or _set(part) or re.escape(part) for part in parts))


def _set(part: str) -> str | None:
    """Translate ``[a-c]`` or ``[!a]``; return None for anything else."""
    if len(part) < 3 or (part[0], part[-1]) != ("[", "]"):
        return None
    # `escape` escapes the hyphens of ranges too. No set matches "/": it stays within one key.
    inside = re.escape(part[1:-1]).replace(r"\-", "-")
    return f"[^/{inside[1:]}]" if inside[0] == "!" else f"(?!/)[{inside}]"


def matches(pattern: Patterns, path: str) -> bool:
    """Tell whether a name matches a glob, or any of a tuple of globs.

    Args:
      pattern: a glob: ``*`` and ``?`` stay within one key, ``**`` spans any number of keys, none
        included.
      path: a name such as ``"block_0/dense/kernel"``.

    Returns:
      True if the whole name matches.

    Example:
      >>> matches("**/kernel", "kernel"), matches("*/kernel", "a/b/kernel")
      (True, False)
      >>> matches(("a/*", "b/**"), "b/c/d")
      True
    """
    patterns = (pattern,) if isinstance(pattern, str) else pattern
    return any(_regex(each).fullmatch(path) for each in patterns)


def match(pattern: Patterns, paths: Iterable[str]) -> list[str]:
    """Return the names that match a glob, in order; no match is an error that lists the names.

    Args:
      pattern: a glob or a tuple of globs, see `matches`.
      paths: the names to choose from.

    Returns:
      The matching names.

    Raises:
      NoMatchError: if no name matches.

    Example:
      >>> match("**/kernel", ["dense/bias", "dense/kernel"])
      ['dense/kernel']
    """
    paths = list(paths)
    found = [path for path in paths if matches(pattern, path)]
    if not found:
        listing = "\n  ".join(paths) or "(none: the tree has no leaves)"
        raise NoMatchError(f"pattern {pattern!r} matches no leaf. The leaves are:\n  {listing}")
    return found
