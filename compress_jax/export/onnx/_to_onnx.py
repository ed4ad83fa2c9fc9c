"""Any JAX function as an ONNX file that ONNX Runtime runs in integers."""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from compress_jax.export.agreement import agree
from compress_jax.export.artifact import write_atomically
from compress_jax.export.exported import Exported, Row
from compress_jax.export.onnx import check, graph, store
from compress_jax.export.onnx.places import Placed
from compress_jax.export.onnx.plan import Asked, plan
from compress_jax.export.onnx.runtime import run
from compress_jax.export.onnx.weights import Weight

EXACT, ROUNDED = 1e-3, 0.02  # the difference from JAX that is allowed without and with rounded activations


def to_onnx(
    fn: Callable[..., Any],
    params: Any,
    example: Any,
    path: str | PathLike[str],
    *,
    how: Any = None,
    ranges: Mapping[str, Any] | None = None,
    batches: Iterable[Any] = (),
    where: str | tuple[str, ...] | None = None,
    batch: Literal["any", "example"] = "any",
    weights: Literal["int8", "uint8"] = "int8",
    accuracy_level: int = 4,
    tolerance: float | None = None,
) -> Exported:
    r"""Write a function and its params as an ONNX file, and see that ONNX Runtime computes the same.

    What ``params`` holds decides what is written. Arrays stay float32. With a static quantizer ``how`` the contractions run
    in integers: activations as uint8, :math:`x = s (q - z)` with the very scales of the simulation
    ``activations(fn, how).apply(unpack(params), ranges, x)``; weights as their codes, a scale for each output channel.
    Batch norm is folded into the scales, which leaves the codes what they are. Weights that are still arrays there are
    quantized by ``uniform(8, granularity="channel")`` along the axes that no site sums over. A site that the runtime has no
    integer kernel for stays in floats and is listed with the reason; if none has one, that is an error. Without
    ``how``, packed integers become weight-only 4- or 8-bit blocks (``MatMulNBits``) in matrix products, and elsewhere small
    constants that are unfolded when the file is loaded.

    Args:
      fn: a pure function of params and inputs, such as ``model.apply``; only what it computes in inference.
      params: its params, packed or not; pruned and shrunk ones too.
      example: an input, or a tuple of inputs; the first axis is the batch.
      path: the file.
      how: ``static(bits=8, symmetric=False)``, or pairs of a glob over sites and such a quantizer or None, as for
        `quantize.activations`.
      ranges: ``activations(fn, how).init(unpack(params), batches)``; made from ``batches`` if not given.
      batches: calibration inputs, each as ``example``: for ranges, and for results that no site takes (residual sums).
      where: as for `quantize.activations`.
      batch: ``"any"`` for batches of any size, or ``"example"`` for exactly the shapes of the example.
      weights: the type of weights beside uint8 activations; the codes are the same. ``"int8"`` has the fastest kernels, but
        on x86 processors without VNNI they saturate sums of two products at 16 bits; ``"uint8"`` is exact everywhere.
      accuracy_level: of ``MatMulNBits``: 4 rounds activations to int8 in blocks, 0 multiplies in float32.
      tolerance: the root mean square difference from the simulation that is allowed on the example, relative to the
        result's: by default 1e-3, and 0.02 where activations are rounded. Every channel of every result is held to it, see
        `agreement.agree`.

    Returns:
      ``Exported(path, target, nbytes, rows, difference, simulation, notes)``; ``print`` shows what became of every site.

    Raises:
      ExportError: if the packages are not installed, the function cannot be converted, no site can be computed in integers
        although ``how`` is given, or results are not those of JAX. No file is written then.

    Example:
      >>> import jax.numpy as jnp
      >>> fn, x = lambda p, x: jax.nn.relu(x @ p["kernel"]), jnp.ones((1, 4))
      >>> to_onnx(fn, {"kernel": jnp.eye(4)}, x, "model.onnx").rows[0]  # doctest: +SKIP
      Row(name='kernel', form='float32', reason='not quantized')

    References:
      ONNX Runtime, "Quantize ONNX models" (the QDQ format), https://onnxruntime.ai/docs/performance/model-optimizations.
    """
    inputs = [np.asarray(x) for x in (example if isinstance(example, tuple) else (example,))]
    batches = [tuple(np.asarray(x) for x in (each if isinstance(each, tuple) else (each,))) for each in batches]
    asked = Asked(how, ranges, batches, where, batch == "any", weights == "uint8")
    planned = plan(fn, params, inputs, asked)
    model, simulated = planned.model, planned.simulated
    rows = {site.name: Row(site.name, "float32", simulated.left.get(site.name, "not quantized")) for site in simulated.sites}
    form = "uint8 x uint8" if weights == "uint8" else "uint8 x int8"
    rows |= {name: Row(name, form, "") for name in simulated.grids}
    floats = {name: each for name, each in planned.places.items() if name not in simulated.grids}
    rows |= _weights_only(model, planned.weights, floats, rows, accuracy_level)
    check.valid(model)
    rounds = bool(simulated.grids) or any("MatMulNBits" in row.form for row in rows.values())
    allowed = tolerance if tolerance is not None else ROUNDED if rounds else EXACT
    ours, floating = jax.jit(simulated.apply)(*inputs), planned.floating if simulated.grids and tolerance is None else None
    difference = agree(ours, run(model, inputs), allowed, "ONNX Runtime against the simulation in JAX", floating)
    data = model.SerializeToString()
    write_atomically(Path(path), data)
    return Exported(Path(path), "onnx", len(data), tuple(rows.values()), difference, simulated.apply, planned.notes)


def _weights_only(
    model: Any, weights: Mapping[str, Weight], places: Mapping[str, Placed], rows: Mapping[str, Row], accuracy_level: int
) -> dict[str, Row]:
    """Keep packed integers small where they are multiplied, or else where they are stored."""
    done: dict[str, Row] = {}
    for name, each in places.items():
        if form := store.multiply(model, each, accuracy_level):
            done[name] = Row(name, form, _kept(rows[name]))
    gone = store.unused(weights, model)
    for name, weight in weights.items():
        if name in gone or weight.codes is None:
            continue
        row = name if name in rows else weight.path
        form = store.unfold(model, name, weight)
        kept = _kept(rows[row]) if row in rows else ""
        reason = kept if form else "its scales would take as much as its codes save"
        done[row] = Row(row, form or "float32", reason)
    graph.prune(model)  # the dense weights that were exchanged
    return done


def _kept(row: Row) -> str:
    """Return why a site is not computed in integers, if it was asked to be."""
    return "" if row.reason == "not quantized" else row.reason
