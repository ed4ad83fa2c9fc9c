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
from compress_jax.export.extras import extra
from compress_jax.export.onnx import graph as g
from compress_jax.export.onnx.plain import live, plain
from compress_jax.export.onnx.pooling import pools, windows
from compress_jax.export.onnx.runtime import evaluate

OPSET = 21  # the first with 4-bit integers
Way = Literal["layers", "operations"]
WAYS: tuple[Way, ...] = ("layers", "operations")


def convert(
    fn: Callable[..., Any],
    leaves: Mapping[str, np.ndarray],
    rebuild: Callable[[Mapping[str, Any]], Any],
    inputs: Sequence[np.ndarray],
    dynamic: bool,
    way: Way = "layers",
) -> Any:
    """Convert a function of params and inputs.

    There are two ways. ``"layers"``: the converter recognizes whole layers and functions by name and has nodes of its own
    for them, the faster graph, if it knows the way in which they are called. ``"operations"``: JAX traces the function, and
    the converter sees JAX's primitives alone (see `plain`), so that no spelling matters.

    The parameters are inputs to the converter, so whatever it does to one (a transpose to the target's layout, a reshape) is
    a node of the graph; afterwards they are constants under their paths. What is quantized is found by name, not by value.

    Args:
      fn: the function.
      leaves: dense parameters by path.
      rebuild: from leaves to params.
      inputs: an example.
      dynamic: whether the first axis of every input is a batch of any size.
      way: see above.

    Returns:
      The ``ModelProto``, its inputs ``x`` (or ``x0``, ``x1``, ...) and its outputs ``y`` (or ``y0``, ...).

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
        raise ExportError(f"jax2onnx cannot convert this function: {type(error).__name__}: {error}{advice}") from error
    _bake(model, leaves)
    windows(model)
    _constant_shapes(model, inputs, dynamic)
    _without_nothing(model.graph)
    pools(model, inputs)
    return g.prune(model)


def _specs(inputs: Sequence[np.ndarray], dynamic: bool) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of inputs, with one symbol for the batch of all of them."""
    (size,) = jax.export.symbolic_shape("B")
    return [jax.ShapeDtypeStruct((size, *x.shape[1:]) if dynamic and x.ndim else x.shape, x.dtype) for x in inputs]


def _operations(flat: Callable[..., Any], specs: Sequence[Any], weights: Sequence[Any]) -> Callable[..., Any]:
    """Return a function that the converter sees as JAX's primitives: nothing in it has a name that it would recognise."""
    traced = jax.make_jaxpr(flat)(*specs, *weights)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        made = jax.make_jaxpr(plain(traced, [True] * len(specs) + [False] * len(weights)))(*specs, *weights)
    return jaxpr_as_fun(live(made))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter's remarks about itself off the terminal, and let its own layers broadcast as they do."""
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


def baked(model: Any, leaves: Mapping[str, np.ndarray]) -> Any:
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


def _bake(model: Any, leaves: Mapping[str, np.ndarray]) -> None:
    """Turn the inputs that are parameters into constants; one that the function does not use has gone already."""
    left = [each for each in model.graph.input if each.name not in leaves]
    for each in model.graph.input:
        if each.name in leaves:
            g.add(model.graph, each.name, leaves[each.name])
    del model.graph.input[:]
    model.graph.input.extend(left)


def _constant_shapes(model: Any, inputs: Sequence[np.ndarray], dynamic: bool) -> None:
    """Write the shapes of reshapes as constants, -1 where the batch decides: a chain of small nodes less for each."""
    known = {each.name for each in model.graph.initializer}
    reshapes = [each for each in model.graph.node if each.op_type == "Reshape" and each.input[1] not in known]
    if not reshapes:
        return
    names = list(dict.fromkeys(each.input[1] for each in reshapes))
    sizes = (2, 3) if dynamic else (len(inputs[0]),)
    seen = [evaluate(model, names, [np.resize(x, (n, *x.shape[1:])) if dynamic else x for x in inputs]) for n in sizes]
    for name in names:
        first, last = seen[0][name], seen[-1][name]
        if (first != last).sum() > 1:
            continue
        constant = g.add(model.graph, f"{name}:constant", np.where(first == last, first, -1))
        for each in reshapes:
            if each.input[1] == name:
                each.input[1] = constant


def _without_nothing(graph: Any) -> None:
    """Drop the third operand of products that is multiplied by 0, or is 0."""
    constants = g.initializers(graph)
    for each in graph.node:
        if each.op_type != "Gemm" or len(each.input) < 3:
            continue
        bias = constants.get(each.input[2])
        if g.attribute(each, "beta", 1.0) == 0 or (bias is not None and bias.ndim == 0 and not bias):
            del each.input[2]
            for option in [a for a in each.attribute if a.name == "beta"]:
                each.attribute.remove(option)
