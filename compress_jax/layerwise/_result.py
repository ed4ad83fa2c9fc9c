"""The result of every rewrite: new params, what was changed, what was not and why."""

import textwrap
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Never

from compress_jax.core.compression import Compression, CompressionState, identity
from compress_jax.core.table import aligned, printable, units
from compress_jax.core.types import Params

# Read-only, as a default is shared by all results; without values it is a mapping to any type.
NOTHING: Mapping[str, Never] = MappingProxyType({})


LONGEST = 28  # characters of a path in a table


class Measured(NamedTuple):
    """What `solve` measured of one leaf.

    Attributes:
      method: what its values come from.
      error: the mean squared error of its outputs on held-out batches, as a share of their mean
        square.
      errors: that of every candidate, rounding to nearest among them, before it was solved again
        from all batches.
      tokens: the rows that the solution was made from: the fewest and the most of its matrices
        (experts, layers of a stack).
      inputs: how many inputs its matrices have together.
      dead: how many of these were always zero.
      damping: the method's, if it has one; notes say where it was raised.
    """

    method: str
    error: float
    errors: Mapping[str, float]
    tokens: tuple[int, int]
    inputs: int
    dead: int
    damping: float | None = None


class Rewritten(NamedTuple):
    """New params, plain arrays like the old ones, with a record of what was done.

    They are exact under their compression: ``compression.view(params, state) == params``, bit for
    bit. Rewrites that keep the model's function (`smooth`, `equalize`, `rotate`, batch norms)
    compress nothing: theirs is the `identity`.

    Attributes:
      params: plain arrays.
      state: of ``compression``.
      changed: ``{path: paths of other parameters that took part}``: the leaves that were solved or
        pruned, the kernels whose scale moved into others, the biases that take up a kernel's error.
        Of rotations the keys are names of groups of axes.
      skipped: ``{path: reason}``: what was left alone, or left to plain rounding.
      notes: ``{path: what was out of the ordinary}``, such as inputs that calibration never
        reached or a damping that had to be raised.
      compression: the one that was solved for, bound to the layouts of the calibrated sites, or
        one that holds the pruning masks. Fine-tune under it and pack with it.
      measured: ``{path: Measured}``, by `layerwise.solve` alone.

    Example:
      >>> import compress_jax as cj, jax.numpy as jnp
      >>> params = {"a": jnp.array([[8.0, 0.5]]), "b": jnp.array([[2.0], [2.0]])}
      >>> fn = lambda p, x: x @ p["a"] @ p["b"]
      >>> result = cj.quantize.equalize(fn, params, jnp.ones((1, 1)))
      >>> result.params["a"].tolist(), dict(result.changed)
      ([[4.0, 1.0]], {'a': ('b',), 'b': ('a',)})
    """

    params: Params
    state: CompressionState = CompressionState({}, {})
    changed: Mapping[str, tuple[str, ...]] = NOTHING
    skipped: Mapping[str, str] = NOTHING
    notes: Mapping[str, str] = NOTHING
    compression: Compression = identity()
    measured: Mapping[str, Measured] = NOTHING

    @property
    def table(self) -> str:
        """A line for each leaf that was solved or skipped, in 80 columns, for the terminal."""
        rows = [("leaf", "method", "tokens", "dead", "nearest", "held out")]
        rows += [_row(path, each) for path, each in self.measured.items()]
        others = [path for path in self.changed if path not in self.measured]
        rows += [(_short(path), "changed", "", "", "", "") for path in others]
        lines = [aligned(rows, left=2)]
        for path, why in [*self.skipped.items(), *self.notes.items()]:
            # The table itself has the method.
            if why != f"method: {self.measured[path].method}" if path in self.measured else True:
                lines += textwrap.wrap(printable(f"{path}: {why}"), 80, subsequent_indent="  ")
        return "\n".join(lines)

    @property
    def folded(self) -> Mapping[str, tuple[str, ...]]:
        """The old name of ``changed`` in results of rescalings and batch norms."""
        _warn("folded")
        return self.changed

    @property
    def rotated(self) -> Mapping[str, tuple[str, ...]]:
        """The old name of ``changed`` in results of `rotate`."""
        _warn("rotated")
        return self.changed

    @property
    def corrected(self) -> dict[str, str]:
        """The old ``{path of a bias: path of its kernel}`` in results of `correct_bias`."""
        _warn("corrected")
        return {bias: kernels[0] for bias, kernels in self.changed.items()}


def _row(path: str, each: Measured) -> tuple[str, ...]:
    least, most = each.tokens
    tokens = units(most) if least == most else f"{units(least)} to {units(most)}"
    nearest = each.errors.get("nearest")
    percents = ["" if error is None else f"{error:.2%}" for error in (nearest, each.error)]
    return _short(path), each.method, tokens, str(each.dead), *percents


def _short(path: str) -> str:
    """Return the end of a path, which tells leaves of one layer apart, behind its beginning."""
    if len(path) <= LONGEST:
        return path
    return f"{path[: LONGEST // 2 - 1]}..{path[-(LONGEST // 2 - 1) :]}"


def _warn(old: str) -> None:
    text = f"Rewritten.{old} is now Rewritten.changed; the old name goes in the next version"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
