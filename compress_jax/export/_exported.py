"""What an export takes and returns: inputs as arrays; the file, its bytes, a row for each site."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.packed import unpack
from compress_jax.core.table import aligned
from compress_jax.core.types import ModelFn, Params, PyTree

FOURIER = (
    "the function takes a Fourier transform, which other runtimes have no operator for that can be "
    "relied on: use compress_jax.data.power_spectrum, which multiplies with constants"
)


def as_inputs(example: PyTree) -> tuple[np.ndarray, ...]:
    """Return an input, or a tuple of inputs, as a tuple of NumPy arrays.

    Raises:
      ExportError: if an input is a tree of several arrays.

    Example:
      >>> [x.shape for x in as_inputs(np.ones((2, 3)))]
      [(2, 3)]
    """
    # Only a tuple is several inputs: a list is an array's rows.
    several = example if isinstance(example, tuple) else (example,)
    for number, x in enumerate(several):
        # NumPy would stack a tuple of arrays, or wrap a dict as one object.
        if isinstance(x, tuple | Mapping):
            raise ExportError(
                f"input {number} is a {type(x).__name__}, and a file takes arrays: export a "
                "function that takes each array as an argument of its own"
            )
    return tuple(np.asarray(x) for x in several)


@contextlib.contextmanager
def advised(fn: ModelFn, params: Params, inputs: tuple[np.ndarray, ...]) -> Iterator[None]:
    """Add advice to the errors of a converter where the function takes a Fourier transform.

    Converters and runtimes fail at it in many ways, and their errors seldom name it.
    """
    try:
        yield
    except ExportError as error:
        if not _takes_fourier(fn, params, inputs):
            raise
        raise ExportError(f"{error}; {FOURIER}") from error


def _takes_fourier(fn: ModelFn, params: Params, inputs: tuple[np.ndarray, ...]) -> bool:
    try:
        return " fft[" in str(jax.make_jaxpr(fn)(unpack(params), *inputs))
    except Exception:  # the function itself is wrong, as the error to be raised says
        return False


class Row(NamedTuple):
    """How one site is computed, or one parameter stored.

    Attributes:
      name: of the site, or path of the parameter.
      form: how it is computed or stored.
      reason: why it is not smaller, if it is not.

    Example:
      >>> import compress_jax as cj
      >>> cj.export.Row("head/kernel", "float32", reason="not quantized").reason
      'not quantized'
    """

    name: str
    form: str
    reason: str = ""


class Exported(NamedTuple):
    """A model in a file of another runtime.

    Attributes:
      path: the file.
      target: ``"stablehlo"``, ``"onnx"``, ``"litert"``, ``"gguf"`` or ``"hugging face"``.
      nbytes: of the file.
      rows: one for each site.
      difference: root mean square difference of the example's result from the simulation in JAX,
        relative to its size; of files that hold weights alone that of the weights.
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
