"""Run flatbuffers in LiteRT's interpreter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.export._extras import extra


def interpreter(model: bytes | str | Path, threads: int = 1, preserve: bool = False) -> Any:
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
    options: dict[str, Any] = {"num_threads": threads}
    if preserve:
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


def run(made: Any, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the first result for inputs of the model's own batch size.

    Args:
      made: from `interpreter`.
      inputs: in the order of the function's.

    Returns:
      The result.
    """
    details = sorted(made.get_input_details(), key=lambda each: each["name"])
    for each, x in zip(details, inputs, strict=True):
        made.set_tensor(each["index"], x)
    made.invoke()
    first = min(made.get_output_details(), key=lambda each: each["name"])
    return made.get_tensor(first["index"])


def results(
    made: Any, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
) -> list[np.ndarray]:
    """Return all results, by the names of the model's signature.

    Args:
      made: from `interpreter`.
      inputs: by name; those that the model does not take are left out.
      outputs: the names of results, in order.

    Returns:
      The results.
    """
    signature = next(iter(made.get_signature_list()))
    call = made.get_signature_runner(signature)
    found = call(**{name: x for name, x in inputs.items() if name in call.get_input_details()})
    return [found[name] for name in outputs]


def tensors(made: Any, inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return every tensor that can be read after a run, by name."""
    run(made, inputs)
    found = {}
    for each in made.get_tensor_details():
        try:
            found[each["name"]] = made.get_tensor(each["index"])
        except ValueError:  # an intermediate that was never allocated
            continue
    return found
