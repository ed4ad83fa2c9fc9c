"""Run flatbuffers in LiteRT's interpreter."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.types import JsonObject, Model
from compress_jax.export._extras import extra


def interpreter(model: bytes | str | Path, threads: int = 1, preserve: bool = False) -> Model:
    """Return an interpreter of a flatbuffer, ready to run.

    Args:
      model: its bytes or its file.
      threads: how many.
      preserve: keep every tensor readable; the fast kernels are off then.

    Returns:
      The interpreter.

    Raises:
      ExportError: if the runtime refuses the model.
    """
    lite = extra("ai_edge_litert.interpreter", "litert")
    source = {"model_content": model} if isinstance(model, bytes) else {"model_path": str(model)}
    options: dict[str, object] = {"num_threads": threads}
    if preserve:
        # A delegate (XNNPACK) replaces operators, and their tensors would never be written.
        kinds = lite.OpResolverType
        options |= {
            "experimental_preserve_all_tensors": True,
            "experimental_op_resolver_type": kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        }
    try:
        made = lite.Interpreter(**source, **options)
        made.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"LiteRT refuses the exported model: {error}") from error
    return made


def run(made: Model, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the first result for inputs of the model's own batch size.

    Args:
      made: from `interpreter`.
      inputs: in the order of the function's.

    Returns:
      The result.
    """
    # Details come in any order; the names have the inputs' numbers, x0, x1, ...
    details = sorted(made.get_input_details(), key=_by_number)
    for each, x in zip(details, inputs, strict=True):
        made.set_tensor(each["index"], x)
    made.invoke()
    first = min(made.get_output_details(), key=_by_number)
    return made.get_tensor(first["index"])


def _by_number(detail: JsonObject) -> list[str | int]:
    """Return a key that sorts names by their numbers: x2 before x10."""
    parts = re.split(r"(\d+)", detail["name"])  # texts and numbers in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def results(
    made: Model, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
) -> list[np.ndarray]:
    """Return all results, by the names of the model's signature.

    Args:
      made: from `interpreter`.
      inputs: by name; those that the model does not take are left out.
      outputs: the names of results, in order.

    Returns:
      The results.
    """
    # The converter writes one signature, with the names that it was given.
    signature = next(iter(made.get_signature_list()))
    call = made.get_signature_runner(signature)
    found = call(**{name: x for name, x in inputs.items() if name in call.get_input_details()})
    return [found[name] for name in outputs]


def tensors(made: Model, inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return every tensor that can be read after a run, by name."""
    run(made, inputs)
    found = {}
    for each in made.get_tensor_details():
        try:
            found[each["name"]] = made.get_tensor(each["index"])
        except ValueError:  # an intermediate that was never allocated
            continue
    return found
