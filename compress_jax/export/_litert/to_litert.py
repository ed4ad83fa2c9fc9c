"""Any JAX function as a LiteRT flatbuffer, float or quantized."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.files import write_atomically
from compress_jax.core.packed import Quantized, is_packed, unpack
from compress_jax.core.paths import flatten
from compress_jax.core.sparse import width
from compress_jax.core.types import Batch, JsonObject, ModelFn, Params, PyTree
from compress_jax.export._exported import Exported, Row, advised, as_inputs
from compress_jax.export._extras import extra
from compress_jax.export._simulate import Simulation, simulation
from compress_jax.export._verify.agreement import agree
from compress_jax.quantize._activations.activations import Ranges
from compress_jax.quantize._activations.site_patterns import QuantizerRules
from compress_jax.trace import Site, observe

EXACT = 1e-3  # relative difference from JAX that is allowed without rounded activations
ROUNDED = 0.05  # and with them


def to_litert(
    fn: ModelFn,
    params: Params,
    example: PyTree,
    path: str | PathLike[str],
    *,
    how: QuantizerRules | None = None,
    ranges: Ranges | None = None,
    batches: Iterable[Batch] = (),
    where: str | tuple[str, ...] | None = None,
    weights: Literal["dynamic", "stored"] = "dynamic",
    tolerance: float | None = None,
) -> Exported:
    """Write a function and its params as a LiteRT flatbuffer, and verify it in LiteRT.

    With a static quantizer ``how`` the model computes in int8: activations on our grids wherever a
    tensor of the flatbuffer is the activation of a site, on grids of the same calibration batches
    elsewhere; what the function computes of its inputs before any parameter enters, such as a
    spectrum, stays in floats. Packed weights without ``how`` become int8, or int4 where none has
    more than 4 bits, and activations are quantized dynamically. Nothing else is quantized then: no
    weights that are arrays, and no constants of the function itself. A packed leaf that no product
    takes whole is float32 in the file, and ``rows`` says so.

    LiteRT's quantizer takes each channel's largest weight for its scale: codes of ``uniform(bits,
    granularity="channel")`` stay, those of clipped or grouped scales are rounded again, which
    ``difference`` includes. If a channel is nearly zero, its scale is too small for its bias in
    int32: one of its weights is made larger, and ``notes`` has the number of such channels.

    Args:
      fn: a pure function of params and inputs.
      params: its params, packed or not.
      example: an input, or a tuple of inputs; the file runs batches of exactly this size.
      path: the file.
      how: ``static(bits=8, symmetric=False)``, or pairs, as for `quantize.activations`.
      ranges: ``activations(fn, how).init(unpack(params), batches)``; made from ``batches`` if not
        given.
      batches: calibration inputs of the example's shape; needed with ``how``.
      where: as for `quantize.activations`.
      weights: what packed weights without ``how`` are for: ``"dynamic"`` integer products, or to be
        ``"stored"`` small and multiplied in float32.
      tolerance: as for `to_onnx`, but 0.05 by default where values are rounded: LiteRT rounds sums
        and other functions too.

    Returns:
      ``Exported(path, target, nbytes, rows, difference, simulation, notes)``.

    Raises:
      ExportError: if the packages are not installed, the converter fails or crashes, or results are
        not those of JAX. No file is written then.

    Example:
      >>> import jax.numpy as jnp
      >>> fn, x = lambda p, x: jax.nn.relu(x @ p["kernel"]), jnp.ones((1, 4))
      >>> to_litert(fn, {"kernel": jnp.eye(4)}, x, "model.tflite").rows[0]  # doctest: +SKIP
      Row(name='kernel', form='float32', reason='not quantized')
    """
    extra("litert_converter", "litert")
    inputs = as_inputs(example)
    batches = [as_inputs(each) for each in batches]
    if how is not None and not batches:
        raise ExportError(
            "LiteRT has an integer kernel only between tensors that all have ranges: pass batches="
        )
    simulated = simulation(fn, params, inputs, how, ranges, batches, where)
    # The quantizer's names of schemes: wi8 is int8 weights, ai8 and afp32 are activations.
    recipe = "static_wi8_ai8" if simulated.grids else _recipe(params, weights)
    with advised(fn, params, inputs):
        data, answer, theirs = _in_a_child(simulated, inputs, batches, recipe)
    ours = jax.jit(simulated.apply)(*inputs)
    # LiteRT rounds more than the simulation does; what rounding explains is known from the floats.
    floating = None
    if simulated.grids and tolerance is None:
        floating = jax.jit(fn)(unpack(params), *inputs)
    if tolerance is None:
        tolerance = ROUNDED if recipe else EXACT
    difference = agree(ours, theirs, tolerance, "LiteRT against the simulation in JAX", floating)
    write_atomically(Path(path), data)
    rows = tuple(_rows(simulated, recipe, answer["missing"]))
    apply = simulated.apply
    return Exported(Path(path), "litert", len(data), rows, difference, apply, _notes(answer))


def _notes(answer: JsonObject) -> tuple[str, ...]:
    notes = []
    if answer["widened"]:
        notes.append(
            f"{answer['widened']} channels got one larger weight, so that their bias fits in int32 "
            "beside LiteRT's scales"
        )
    if answer["floats"]:
        kinds = ", ".join(answer["floats"])
        notes.append(f"LiteRT's quantizer leaves weights of these operators in float32: {kinds}")
    return tuple(notes)


def _recipe(params: Params, weights: str) -> str:
    """Return the name of LiteRT's recipe for packed weights; empty if none is packed."""
    leaves = jax.tree.leaves(params, is_leaf=is_packed)
    widths = [width(leaf.codes) for leaf in leaves if isinstance(leaf, Quantized)]
    if not widths:
        return ""
    bits = 4 if max(widths) <= 4 else 8
    return f"{'dynamic' if weights == 'dynamic' else 'weight_only'}_wi{bits}_afp32"


def _in_a_child(
    simulated: Simulation,
    inputs: Sequence[np.ndarray],
    batches: Sequence[tuple[np.ndarray, ...]],
    recipe: str,
) -> tuple[bytes, JsonObject, list[np.ndarray]]:
    """Return the flatbuffer, the result for each site, and the runtime's outputs."""
    names = ["x"] if len(inputs) == 1 else [f"x{i}" for i in range(len(inputs))]
    fn = simulated.fn
    dense = simulated.dense
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    # Unused inputs stay, so that the names belong to the inputs one by one.
    lowered = jax.jit(lambda *x: fn(dense, *x), keep_unused=True).lower(*specs)
    modules = {"module": lowered}
    if recipe:
        changed = _changed(simulated)
        modules["changed"] = jax.jit(lambda *x: fn(changed, *x), keep_unused=True).lower(*specs)
    arrays = {f"{name}:example": x for name, x in zip(names, inputs, strict=True)}
    for i, batch in enumerate(batches):
        arrays |= {f"{name}:{i}": x for name, x in zip(names, batch, strict=True)}
    # Tensors of the flatbuffer are found by their values: those of the sites go along.
    if simulated.grids:
        arrays |= _activations(simulated, inputs)
    ranges = {name: _range(*grid) for name, grid in simulated.grids.items()}
    outputs = [f"y{i}" for i in range(len(jax.tree.leaves(lowered.out_info)))]
    job = {
        "inputs": names,
        "outputs": outputs,
        "recipe": recipe,
        "batches": len(batches),
        "sites": ranges,
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, module in modules.items():
            (folder / f"{name}.mlir").write_text(str(module.compiler_ir("stablehlo")))
        (folder / "job.json").write_text(json.dumps(job))
        np.savez(folder / "arrays.npz", **arrays)  # pyright: ignore[reportArgumentType]
        command = [sys.executable, "-W", "ignore", "-m", "compress_jax.export._litert.child", place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # A crash of native code shows as a signal, and how far the child came as its files.
        if done.returncode or not (folder / "results.npz").exists():
            lines = done.stderr.strip().splitlines() or ["nothing"]
            how = f"crashed (signal {-done.returncode})" if done.returncode < 0 else "failed"
            converted = (folder / "model.tflite").exists()
            part = "runtime, on the converted model," if converted else "converter"
            raise ExportError(f"the LiteRT {part} {how}; its last line of output: {lines[-1]}")
        answer = json.loads((folder / "answer.json").read_text())
        results = np.load(folder / "results.npz")
        return (folder / "model.tflite").read_bytes(), answer, [results[name] for name in outputs]


def _changed(simulated: Simulation) -> Params:
    """Return params that tell what is made of which: other values for those to be quantized.

    With activations these are all parameters, without them the packed ones.
    """

    def other(leaf: PyTree) -> PyTree:
        dense = unpack(leaf)
        taken = bool(simulated.grids) or isinstance(leaf, Quantized)
        if not taken or not jnp.issubdtype(jnp.result_type(dense), jnp.floating):
            return dense
        # Zeros stay zeros, and no constant that is the same for all multiples of it is missed.
        factors = 1 + jnp.arange(dense.size).reshape(dense.shape) % 3 / 4
        return (dense * factors).astype(dense.dtype)

    return jax.tree.map(other, simulated.packed, is_leaf=is_packed)


def _range(scale: np.float32, zero_point: np.uint8) -> list[float]:
    """Return the lowest and the highest value of a uint8 grid."""
    return [-float(scale) * int(zero_point), float(scale) * (255 - int(zero_point))]


def _activations(simulated: Simulation, inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the activations that enter the quantized sites, of the function on dense weights."""

    def activation(site: Site, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return (lhs, rhs)[next(iter(site.inputs.values()))]

    _, found = observe(simulated.fn, activation)(simulated.dense, *inputs)
    return {f"site:{name}": np.asarray(found[name]) for name in simulated.grids}


def _rows(simulated: Simulation, recipe: str, missing: Sequence[str]) -> Iterator[Row]:
    """Yield how each site is computed, and the packed leaves that no site shows."""
    packed = {name: leaf for name, leaf in flatten(simulated.packed)[0].items() if is_packed(leaf)}
    shown = {site.param for site in simulated.sites}
    for site in simulated.sites:
        rounded = isinstance(packed.get(site.param or ""), Quantized)
        yield _row(site, simulated, recipe if rounded or simulated.grids else "", missing)
    for name in packed:
        if name not in shown:
            yield Row(name, "float32", "no product takes it whole; its parts are constants")


def _row(site: Site, simulated: Simulation, recipe: str, missing: Sequence[str]) -> Row:
    """Return how a site is computed."""
    if site.name in missing:
        reason = "no tensor of the flatbuffer is its activation: LiteRT's own range"
        return Row(site.name, "int8", reason)
    if site.name in simulated.left:
        return Row(site.name, "as LiteRT's quantizer does", simulated.left[site.name])
    if not recipe:
        return Row(site.name, "float32", "not quantized")
    return Row(site.name, "int8 x int8" if simulated.grids else recipe.removesuffix("_afp32"))
