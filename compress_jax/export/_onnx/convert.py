"""The float graph of a function, every parameter a constant under its own path."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun

from compress_jax.core.errors import ExportError
from compress_jax.core.types import Model, ModelFn
from compress_jax.export._extras import extra
from compress_jax.export._onnx import graph as g
from compress_jax.export._onnx.plain import live, plain
from compress_jax.export._onnx.runtime import evaluate

OPSET = 21  # the first with 4-bit integers
Way = Literal["layers", "operations"]
WAYS: tuple[Way, ...] = ("layers", "operations")
FIRST = [0, 3, 1, 2]  # the axes from channels last to channels first
LAST = [0, 2, 3, 1]  # and back
MOST = 3  # axes of an image that the runtime pools over


def pools(model: Model, inputs: Sequence[np.ndarray]) -> None:
    """Replace ``x.reshape(b, h, p, w, q, c).max((2, 4))`` by a ``MaxPool``.

    Args:
      model: changed.
      inputs: an example, to learn the shapes of tensors.
    """
    found = _pooled_reshapes(model.graph)
    if not found:
        return
    images = evaluate(model, list({image for image, _ in found.values()}), inputs)
    nodes: list[Any] = []
    for each in model.graph.node:
        image, shape = found.get(each.output[0], ("", None))
        if shape is not None and _tiles(images[image].shape, shape):
            nodes += _pool(image, each.output[0], [int(shape[2]), int(shape[4])])
        else:
            nodes.append(each)
    g.replace_nodes(model.graph, nodes)


def _pooled_reshapes(graph: Any) -> dict[str, tuple[str, np.ndarray]]:
    """Return ``{result: (x, shape)}`` of every ``x.reshape(shape).max((2, 4))``."""
    constants = g.initializers(graph)
    made = g.producers(graph)
    taken = g.consumers(graph)
    found: dict[str, tuple[str, np.ndarray]] = {}
    for each in graph.node:
        before = made.get(each.input[0]) if each.op_type == "ReduceMax" else None
        if before is None or before.op_type != "Reshape" or len(taken[before.output[0]]) > 1:
            continue
        shape = constants.get(before.input[1])
        axes = constants.get(each.input[1]) if len(each.input) > 1 else None
        if shape is None or axes is None or g.attribute(each, "keepdims", 1):
            continue
        if shape.size == 6 and sorted(axes % 6) == [2, 4]:
            found[each.output[0]] = (before.input[0], shape)
    return found


def _tiles(image: tuple[int, ...], shape: np.ndarray) -> bool:
    """Return whether a reshape splits the rows and columns of images, and nothing else."""
    cut = (shape[1] * shape[2], shape[3] * shape[4], shape[5])
    return len(image) == 4 and tuple(image[1:]) == tuple(int(n) for n in cut)


def _pool(name: str, out: str, window: list[int]) -> list[Any]:
    return [
        g.node("Transpose", [name], f"{out}:first", perm=FIRST),
        g.node("MaxPool", [f"{out}:first"], f"{out}:pooled", kernel_shape=window, strides=window),
        g.node("Transpose", [f"{out}:pooled"], out, perm=LAST),
    ]


def windows(model: Model) -> None:
    """Replace ``Unsqueeze - Unsqueeze - MaxPool or Conv - Squeeze`` by one window node.

    The converter turns any window into a pool, or a convolution with ones, over all axes of
    ``x[None, None]``. The runtime has kernels for fewer axes: this pools only the axes that have a
    window.

    Args:
      model: changed.
    """
    graph = model.graph
    constants = g.initializers(graph)
    made = g.producers(graph)
    taken = g.consumers(graph)
    nodes: list[Any] = []
    for each in graph.node:
        new: list[Any] = []
        after = taken.get(each.output[0], [])
        squeeze: Any = after[0] if len(after) == 1 else None
        if squeeze is not None and squeeze.op_type == "Squeeze":
            pool = each.op_type in ("MaxPool", "Conv")
            source = _unsqueezed(each, constants, made) if pool else ""
            window = _window(each, constants)
            if source and window:
                new = list(_exchanged(each, source, squeeze.output[0], window, graph))
        if new:
            after[0].output[0] = f"{after[0].output[0]}:unused"
        nodes += new or [each]
    g.replace_nodes(graph, nodes)
    g.prune(model)


def _unsqueezed(each: Any, constants: Any, made: Any) -> str:
    """Return the name of x where a node takes ``x[None, None]``, else nothing."""
    name = each.input[0]
    for _ in range(2):
        before: Any = made.get(name)
        if before is None or before.op_type != "Unsqueeze":
            return ""
        axes = constants.get(before.input[1])
        if axes is None or axes.tolist() not in ([0], [1], [0, 1]):
            return ""
        name = before.input[0]
        if axes.tolist() == [0, 1]:
            break
    return name


def _window(each: Any, constants: Any) -> list[int]:
    """Return the window of a pool or of a convolution with ones; empty if it is neither."""
    if each.op_type == "MaxPool":
        return [int(n) for n in g.attribute(each, "kernel_shape", [])]
    kernel = constants.get(each.input[1]) if len(each.input) == 2 else None
    if kernel is None or kernel.ndim <= 2 or kernel.shape[:2] != (1, 1):
        return []
    return list(kernel.shape[2:]) if (kernel == 1).all() else []


def _exchanged(each: Any, source: str, out: str, window: list[int], graph: Any) -> Iterator[Any]:
    """Yield the nodes of a pool over those axes that have a window; none if there are too many."""
    rank = len(window)
    strides = g.attribute(each, "strides", [1] * rank)
    pads = g.attribute(each, "pads", [0] * 2 * rank)
    dilations = g.attribute(each, "dilations", [1] * rank)
    padded = [pads[a] != 0 or pads[a + rank] != 0 for a in range(rank)]
    pooled = [a for a in range(rank) if window[a] > 1 or strides[a] > 1 or padded[a]]
    others = [a for a in range(rank) if a not in pooled]
    while len(others) > 2 and len(pooled) < MOST:
        pooled.insert(0, others.pop())
    if len(pooled) > MOST or len(others) > 2 or not pooled:
        return
    # Batch and channel come first, so two axes must be before the pooled ones.
    order = [*others, *pooled]
    name = f"{out}:{source}"
    if order != list(range(rank)):
        yield g.node("Transpose", [source], f"{name}:moved", perm=order)
        source = f"{name}:moved"
    missing = list(range(2 - len(others)))
    if missing:
        axes = g.add(graph, f"{name}:axes", np.asarray(missing, np.int64))
        yield g.node("Unsqueeze", [source, axes], f"{name}:image")
        source = f"{name}:image"
    options = {
        "kernel_shape": [window[a] for a in pooled],
        "strides": [strides[a] for a in pooled],
        "pads": [pads[a] for a in pooled] + [pads[a + rank] for a in pooled],
    }
    if any(dilations[a] > 1 for a in pooled):
        options["dilations"] = [dilations[a] for a in pooled]
    last = f"{name}:pooled"
    if each.op_type == "MaxPool":
        yield g.node("MaxPool", [source], last, **options)
    else:
        # A convolution with ones is a sum: the mean times the number of entries.
        yield g.node("AveragePool", [source], f"{name}:mean", count_include_pad=1, **options)
        dtype = g.initializers(graph)[each.input[1]].dtype
        count = g.add(graph, f"{name}:count", np.asarray(np.prod(window), dtype))
        yield g.node("Mul", [f"{name}:mean", count], last)
    yield from _moved_back(last, out, name, order, missing, graph)


def _moved_back(
    last: str, out: str, name: str, order: list[int], missing: list[int], graph: Any
) -> Iterator[Any]:
    """Yield the nodes that undo the transposition and the new axes before a pool."""
    back = [order.index(a) for a in range(len(order))]
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if missing:
        axes = g.add(graph, f"{name}:axes_back", np.asarray(missing, np.int64))
        steps.append(("Squeeze", [axes], {}))
    if back != list(range(len(order))):
        steps.append(("Transpose", [], {"perm": back}))
    steps = steps or [("Identity", [], {})]
    for i, (kind, rest, attributes) in enumerate(steps):
        result = out if i == len(steps) - 1 else f"{name}:{kind}"
        yield g.node(kind, [last, *rest], result, **attributes)
        last = result


def convert(
    fn: ModelFn,
    leaves: Mapping[str, np.ndarray],
    rebuild: Callable[[Mapping[str, Any]], Any],
    inputs: Sequence[np.ndarray],
    dynamic: bool,
    way: Way = "layers",
) -> Any:
    """Convert a function of params and inputs.

    There are two ways. ``"layers"``: the converter recognizes whole layers and functions by name
    and has nodes of its own for them, the faster graph, if it knows the way in which they are
    called. ``"operations"``: JAX traces the function, and the converter sees JAX's primitives alone
    (see `plain`), so that no spelling matters.

    The parameters are inputs to the converter, so whatever it does to one (a transpose to the
    target's layout, a reshape) is a node of the graph; afterwards they are constants under their
    paths. What is quantized is found by name, not by value.

    Args:
      fn: the function.
      leaves: dense parameters by path.
      rebuild: from leaves to params.
      inputs: an example.
      dynamic: whether the first axis of every input is a batch of any size.
      way: see above.

    Returns:
      The ``ModelProto``, its inputs ``x`` (or ``x0``, ``x1``, ...) and its outputs ``y`` (or
      ``y0``, ...).

    Raises:
      ExportError: if the converter cannot.
    """
    with _quiet():
        jax2onnx = extra("jax2onnx", "onnx")
    names = ["x"] if len(inputs) == 1 else [f"x{i}" for i in range(len(inputs))]
    specs = _specs(inputs, dynamic)
    weights = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves.values()]

    def flat(*arrays: Any) -> Any:
        weights = dict(zip(leaves, arrays[len(inputs) :], strict=True))
        return fn(rebuild(weights), *arrays[: len(inputs)])

    try:
        example = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
        outs = len(jax.tree.leaves(jax.eval_shape(flat, *example, *weights)))
        call = flat if way == "layers" else _operations(flat, specs, weights)
        with _quiet():
            model = jax2onnx.to_onnx(
                call,
                [*specs, *weights],
                opset=OPSET,
                input_names=[*names, *leaves],
                output_names=["y"] if outs == 1 else [f"y{i}" for i in range(outs)],
                normalization_mode="prefer_native",
            )
    except Exception as error:
        advice = "; pass batch='example' for exactly its size" if dynamic else ""
        raise ExportError(
            f"jax2onnx cannot convert this function: {type(error).__name__}: {error}{advice}"
        ) from error
    _bake(model, leaves)
    windows(model)
    _constant_shapes(model, inputs, dynamic)
    _without_zero_bias(model.graph)
    pools(model, inputs)
    return g.prune(model)


def _specs(inputs: Sequence[np.ndarray], dynamic: bool) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of inputs, with one symbol for the batch of all of them."""
    (size,) = jax.export.symbolic_shape("B")
    return [
        jax.ShapeDtypeStruct((size, *x.shape[1:]) if dynamic and x.ndim else x.shape, x.dtype)
        for x in inputs
    ]


def _operations(
    flat: Callable[..., Any], specs: Sequence[Any], weights: Sequence[Any]
) -> Callable[..., Any]:
    """Return a function whose jaxpr has no named calls that the converter would recognize."""
    traced = jax.make_jaxpr(flat)(*specs, *weights)
    is_data = [True] * len(specs) + [False] * len(weights)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        made = jax.make_jaxpr(plain(traced, is_data))(*specs, *weights)
    return jaxpr_as_fun(live(made))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter's warnings, and let its own layers promote ranks and dtypes."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def baked(model: Model, leaves: Mapping[str, np.ndarray]) -> Any:
    """Return a copy of a converted graph with other values for its parameters.

    Args:
      model: from `convert`.
      leaves: dense parameters by path.

    Returns:
      The copy.
    """
    copy = extra("onnx", "onnx").ModelProto()
    copy.CopyFrom(model)
    there = [each.name for each in copy.graph.initializer if each.name in leaves]
    others = [each for each in model.graph.initializer if each.name not in leaves]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(others)
    for name in there:
        g.add(copy.graph, name, leaves[name])
    return copy


def _bake(model: Model, leaves: Mapping[str, np.ndarray]) -> None:
    """Turn the parameters among the inputs into constants.

    Inputs that the function does not use are gone already.
    """
    left = [each for each in model.graph.input if each.name not in leaves]
    for each in model.graph.input:
        if each.name in leaves:
            g.add(model.graph, each.name, leaves[each.name])
    del model.graph.input[:]
    model.graph.input.extend(left)


def _constant_shapes(model: Model, inputs: Sequence[np.ndarray], dynamic: bool) -> None:
    """Write the shapes of reshapes as constants, with -1 for the batch axis.

    This removes a chain of small nodes for each.
    """
    known = {each.name for each in model.graph.initializer}
    reshapes = [n for n in model.graph.node if n.op_type == "Reshape" and n.input[1] not in known]
    if not reshapes:
        return
    names = list(dict.fromkeys(each.input[1] for each in reshapes))
    # The entry that differs between two batch sizes is that of the batch.
    batches = [list(inputs)]
    if dynamic:
        batches = [[np.resize(x, (n, *x.shape[1:])) for x in inputs] for n in (2, 3)]
    shapes = [evaluate(model, names, batch) for batch in batches]
    for name in names:
        first = shapes[0][name]
        last = shapes[-1][name]
        if (first != last).sum() > 1:
            continue
        constant = g.add(model.graph, f"{name}:constant", np.where(first == last, first, -1))
        for each in reshapes:
            if each.input[1] == name:
                each.input[1] = constant


def _without_zero_bias(graph: Any) -> None:
    """Drop the third operand of products that is multiplied by 0, or is 0."""
    constants = g.initializers(graph)
    for each in graph.node:
        if each.op_type != "Gemm" or len(each.input) < 3:
            continue
        bias = constants.get(each.input[2])
        is_zero = bias is not None and bias.ndim == 0 and not bias
        if is_zero or g.attribute(each, "beta", 1.0) == 0:
            del each.input[2]
            for option in [a for a in each.attribute if a.name == "beta"]:
                each.attribute.remove(option)
