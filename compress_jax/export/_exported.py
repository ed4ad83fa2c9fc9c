"""What an export returns: the file, its bytes, and what became of every site."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """What became of one site or parameter.

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
      rows: what became of every site.
      difference: root mean square difference of the example's result from the simulation in JAX,
        relative to its size.
      simulation: ``(*inputs) -> out`` in JAX, what the file must compute; None if that is the
        function itself.
      notes: what was done otherwise than asked for, and why.
    """

    path: Path
    target: str
    nbytes: int
    rows: tuple[Row, ...]
    difference: float
    simulation: Callable[..., Any] | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a line for each site and each note, and one for the file."""
        wide = [max((len(row[i]) for row in self.rows), default=0) for i in (0, 1)]
        lines = [
            f"{row.name:<{wide[0]}}  {row.form:<{wide[1]}}  {row.reason}".rstrip()
            for row in self.rows
        ]
        return "\n".join(
            [
                *lines,
                *self.notes,
                f"{self.path}: {self.nbytes:,} bytes, {self.difference:.1e} from the simulation "
                "in JAX",
            ]
        )
