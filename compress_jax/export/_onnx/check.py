"""Checks of an exported graph: the ONNX checker, the runtime, integer kernels, numbers."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain

from compress_jax.core.errors import ExportError
from compress_jax.core.types import Model
from compress_jax.export._extras import extra
from compress_jax.export._onnx.runtime import optimized

KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")


def valid(model: Model) -> None:
    """Run the checker of ONNX.

    Raises:
      ExportError: if it objects.
    """
    try:
        extra("onnx", "onnx").checker.check_model(model, full_check=True)
    except Exception as error:  # its exceptions have no common base
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error


def unfused(model: Model, wanted: Iterable[str]) -> dict[str, str]:
    """Return the quantized sites that the runtime would compute in floats.

    They would be slower than without quantization.

    Args:
      model: with QDQ nodes.
      wanted: the names of the sites that are quantized.

    Returns:
      The reason, by site; empty if there is an integer kernel in the place of every site.

    Raises:
      ExportError: if some stay in floats and it is not known which.
    """
    wanted = list(wanted)
    graph = optimized(model, "EXTENDED").graph
    # One integer kernel a site: each stands for its product and the quantizing nodes around it.
    counts = Counter(each.op_type for each in graph.node)
    there = sum(counts[kind] for kind in KERNELS)
    if there >= len(wanted):
        return {}
    # A weight that the runtime still dequantizes belongs to a site that it computes in floats.
    dequantized = [each for each in graph.node if each.op_type == "DequantizeLinear"]
    taken = chain.from_iterable(each.input for each in dequantized)
    left = {name.removesuffix(":int") for name in taken}
    names = [name for name in wanted if name in left]
    if not names:
        raise ExportError(
            f"ONNX Runtime would compute {len(wanted) - there} of {len(wanted)} quantized sites "
            "in floats, slower than without quantization, and does not say which; leave some of "
            f"them out of `how`: {', '.join(wanted)}"
        )
    reason = "ONNX Runtime would compute it in floats, slower than without quantization"
    return dict.fromkeys(names, reason)
