"""What an export takes and returns: inputs as arrays; the file, its bytes, a row for each site."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress_jax.core.table import aligned
from compress_jax.core.types import PyTree


def as_inputs(example: PyTree) -> tuple[np.ndarray, ...]:
    """Return an input, or a tuple of inputs, as a tuple of NumPy arrays.

    Example:
      >>> [x.shape for x in as_inputs(np.ones((2, 3)))]
      [(2, 3)]
    """
    several = example if isinstance(example, tuple) else (example,)
    return tuple(np.asarray(x) for x in several)


class Row(NamedTuple):
    """How one site is computed, or one parameter stored.

    Attributes:
      name: of the site, or path of the parameter.
      form: how it is computed or stored.
      reason: why it is not smaller, if it is not.
    """

    name: str
    form: str
    reason: str = ""


class Exported(NamedTuple):
    """A model in a file of another runtime.

    Attributes:
      path: the file.
      target: ``"stablehlo"``, ``"onnx"`` or ``"litert"``.
      nbytes: of the file.
      rows: one for each site.
      difference: root mean square difference of the example's result from the simulation in JAX,
        relative to its size.
      simulation: ``(*inputs) -> out`` in JAX, what the file must compute; None if that is the
        function itself.
      notes: what was done otherwise than asked for, and why.

    Example:
      >>> rows = Row("dense/kernel", "uint8 x int8"), Row("head/kernel", "float32", "not quantized")
      >>> print(Exported(Path("model.onnx"), "onnx", 2048, rows, 2e-4))
      dense/kernel  uint8 x int8
      head/kernel   float32       not quantized
      model.onnx: 2,048 bytes, 2.0e-04 from the simulation in JAX
    """

    path: Path
    target: str
    nbytes: int
    rows: tuple[Row, ...]
    difference: float
    simulation: Callable[..., PyTree] | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a line for each site and each note, and one for the file."""
        table = [aligned(self.rows, left=3)] if self.rows else []
        size = f"{self.path}: {self.nbytes:,} bytes"
        total = f"{size}, {self.difference:.1e} from the simulation in JAX"
        return "\n".join([*table, *self.notes, total])
