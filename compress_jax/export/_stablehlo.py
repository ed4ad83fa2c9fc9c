"""A model as a StableHLO program that JAX runs without this package.

Weights stay packed in the file; the program unpacks them.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import safetensors.numpy
from jax import export

from compress_jax.core.bits import Bits
from compress_jax.core.errors import ExportError
from compress_jax.core.files import write_atomically
from compress_jax.core.packed import (
    Clustered,
    LowRank,
    Quantized,
    Sum,
    Tabled,
    is_packed,
    unpack,
)
from compress_jax.core.paths import flatten
from compress_jax.core.sparse import Sparse, nbytes, width
from compress_jax.core.types import Array, ModelFn, Params, PyTree
from compress_jax.export._artifact.seal import sealed
from compress_jax.export._artifact.structure import decode, encode
from compress_jax.export._exported import Exported, Row
from compress_jax.export._extras import extra
from compress_jax.export._verify.agreement import agree

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(
    fn: ModelFn,
    params: Params,
    example: PyTree,
    path: str | os.PathLike[str],
    *,
    weights: Literal["constants", "arguments"] = "constants",
    batch: Literal["any", "example"] = "any",
    platforms: Sequence[str] = PLATFORMS,
) -> Exported:
    """Write ``fn(params, *inputs)`` as one serialized StableHLO program.

    Whoever has JAX runs it, on any of the platforms, without this package and without the model's
    code::

        program = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
        logits = program.call(images)

    Packed params are stored packed, codes of 4 bits in 4 bits, and the program unpacks them. This
    makes files small and programs no faster: products are still of floats. With
    ``weights="arguments"`` the program holds no weights; they are uint8 and float tensors in
    ``path`` with the suffix ``.safetensors``, and go in first::

        weights = safetensors.numpy.load_file("model.safetensors")
        logits = program.call(weights, images)

    The file ends in a digest of its bytes, which JAX passes over and `verify` looks at. JAX
    promises to read such a program for six months after it was written, and old programs in
    practice for longer; `export.save` is for keeping.

    Args:
      fn: a pure function of params and inputs; ``lambda variables, x: model.apply(variables, x)``.
      params: packed or not.
      example: an input, or a tuple of inputs.
      path: the file to write.
      weights: where they are: in the program, or in a second file.
      batch: ``"any"`` for a program whose inputs may have any number of rows, the same for all of
        them, or ``"example"`` for exactly the shapes of the example.
      platforms: on which it may run.

    Returns:
      Path, bytes of all that was written, the form of every parameter, and the difference from
      ``fn`` on the example.

    Raises:
      ExportError: if ``fn`` cannot be exported, or the program, read back, does something else.
      ArtifactError: if a leaf of ``params`` is no array, or the disk is full or not writable.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> int4 = cj.quantize.uniform(bits=4)
      >>> packed = int4.pack(params, int4.init(params))
      >>> file = Path(tempfile.mkdtemp()) / "model.stablehlo"
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> exported = cj.export.to_stablehlo(fn, packed, jnp.ones((1, 64)), file)
      >>> exported.rows[0].form, 2048 < exported.nbytes < 16384
      ('Quantized, 4 bits, 2,053 bytes', True)
      >>> jax.export.deserialize(bytearray(file.read_bytes())).call(jnp.ones((3, 64))).shape
      (3, 64)
    """
    path = Path(path)
    several = example if isinstance(example, (tuple, list)) else (example,)
    inputs = tuple(jnp.asarray(x) for x in several)
    structure, tensors = encode(params)
    if weights not in ("constants", "arguments") or batch not in ("any", "example"):
        raise ExportError(
            f"weights={weights!r} is not 'constants' or 'arguments', or batch={batch!r} not 'any' "
            "or 'example'"
        )
    if path.suffix == ".safetensors":
        raise ExportError(
            f"{path} is the name the weights would have; call the program model.stablehlo instead"
        )

    def program(tensors: Mapping[str, Array], *inputs: PyTree) -> PyTree:
        return fn(unpack(decode(structure, tensors)), *inputs)

    # As JAX arrays: NumPy arrays would be unpacked while tracing.
    constants = {name: jnp.asarray(x) for name, x in tensors.items()}
    # Constants of the program, or its first argument.
    separate = weights == "arguments"
    arguments = (constants,) if separate else ()
    whole = program if separate else functools.partial(program, constants)
    specs = (*_specs(arguments), *_batched(inputs, batch))
    data = _serialized(whole, specs, platforms, batch)
    # Nothing is written before what was made has run and agreed.
    difference = _difference(fn, params, inputs, data, arguments)
    files = {path: sealed(data)}
    if separate:
        files[path.with_suffix(".safetensors")] = safetensors.numpy.save(tensors)
    for file, content in files.items():
        write_atomically(file, content)
    size = sum(len(content) for content in files.values())
    return Exported(path, "stablehlo", size, tuple(_rows(params)), difference)


def _specs(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _batched(inputs: tuple[jax.Array, ...], batch: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shapes of the inputs, their leading axis symbolic where any batch is wanted."""
    if batch == "example":
        return _specs(inputs)
    if flat := [x.shape for x in inputs if not x.ndim]:
        raise ExportError(
            f"an input of shape {flat[0]} has no axis of examples; pass batch='example'"
        )
    # One symbol for all inputs: they have the same number of rows.
    (size,) = export.symbolic_shape("batch")
    return tuple(jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in inputs)


def _serialized(
    fn: ModelFn, specs: tuple[PyTree, ...], platforms: Sequence[str], batch: str
) -> bytes:
    extra("flatbuffers", "stablehlo")  # jax.export needs it to serialize
    try:
        return bytes(export.export(jax.jit(fn), platforms=tuple(platforms))(*specs).serialize())
    except Exception as error:  # whatever the function raises while it is traced
        advice = ""
        if batch == "any":
            advice = "; if it needs to know the batch size, pass batch='example'"
        raise ExportError(
            f"the function cannot be exported{advice}: {type(error).__name__}: {error}"
        ) from error


def _difference(
    fn: ModelFn, params: Params, inputs: Sequence[Array], data: bytes, weights: Sequence[PyTree]
) -> float:
    """Run what was written; return the largest error relative to each result's size."""
    read = export.deserialize(bytearray(data))
    # JAX calls the backend "gpu" and the platforms of a program "cuda" and "rocm".
    here = jax.default_backend()
    platforms = {"cuda", "rocm"} if here == "gpu" else {here}
    if not platforms & set(read.platforms):
        return float("nan")  # it was made for other machines
    got = jax.jit(read.call)(*weights, *inputs)
    wanted = jax.jit(lambda p, *x: fn(unpack(p), *x))(params, *inputs)
    return agree(wanted, got, 1e-3, "the program against the function on the example")


def _rows(params: Params) -> list[Row]:
    leaves = flatten(params)[0]
    return [Row(path, f"{_form(leaf)}, {nbytes(leaf):,} bytes") for path, leaf in leaves.items()]


def _form(leaf: PyTree) -> str:
    if not is_packed(leaf):
        return str(jnp.asarray(leaf).dtype)
    name = type(leaf).__name__
    if isinstance(leaf, (Quantized, Tabled, Clustered)):
        sparse = ", some left out" if isinstance(leaf.codes, Sparse) else ""
        return f"{name}, {width(leaf.codes)} bits{sparse}"
    if isinstance(leaf, LowRank):
        return f"{name}, {_form(leaf.left)} and {_form(leaf.right)}"
    if isinstance(leaf, Sum):
        return f"{name}, {_form(leaf.base)} and {_form(leaf.delta)}"
    return (
        f"{name}, {leaf.values.bits} bits"
        if isinstance(leaf.values, Bits)
        else f"{name}, {leaf.values.dtype}"
    )
