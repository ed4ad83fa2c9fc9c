"""What an exported graph must pass before it is written: the checker, the runtime, its integer kernels, the numbers."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from compress_jax.core.errors import ExportError
from compress_jax.export.extras import extra
from compress_jax.export.onnx.runtime import optimised

KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")


def valid(model: Any) -> None:
    """Run the checker of ONNX.

    Raises:
      ExportError: if it objects.
    """
    try:
        extra("onnx", "onnx").checker.check_model(model, full_check=True)
    except Exception as error:  # its exceptions have no common root
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error


def fused(model: Any, wanted: Iterable[str]) -> Counter[str]:
    """See that the runtime has an integer kernel in the place of every quantized node.

    Args:
      model: with QDQ nodes.
      wanted: the names of the sites that are quantized.

    Returns:
      How many of each operator its optimised graph has.

    Raises:
      ExportError: if some stayed in floats.
    """
    wanted = list(wanted)
    graph = optimised(model, "EXTENDED").graph
    counts = Counter(each.op_type for each in graph.node)
    if (there := sum(counts[kind] for kind in KERNELS)) < len(wanted):
        left = {
            name.removesuffix(":int") for each in graph.node for name in each.input if each.op_type == "DequantizeLinear"
        }
        names = [name for name in wanted if name in left] or wanted
        raise ExportError(
            f"ONNX Runtime would compute {len(wanted) - there} of {len(wanted)} quantized sites in floats, slower than "
            f"without quantization: {', '.join(names)}. Leave them out of `how`, as in [({names[0]!r}, None), ('**', how)]"
        )
    return counts
