"""The result of every rewrite: new params, what was changed, what was not and why."""

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Never

from compress_jax.core.compression import Compression, CompressionState, identity
from compress_jax.core.types import Params

# Read-only, as a default is shared by all results; without values it is a mapping to any type.
NOTHING: Mapping[str, Never] = MappingProxyType({})


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


def _warn(old: str) -> None:
    text = f"Rewritten.{old} is now Rewritten.changed; the old name goes in the next version"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
