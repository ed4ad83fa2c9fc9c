"""A student as the training objective runs it: logits, features and new model state, of a Linen or an NNX model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from compress_jax.core.errors import ConfigError
from compress_jax.distill import capture


class Student(NamedTuple):
    """A model as two pure functions.

    Attributes:
      train: ``(params, model_state, x, key) -> (logits, features, model_state)``.
      evaluate: ``(params, model_state, x) -> (logits, features)``, in eval mode.
    """

    train: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, Any]]
    evaluate: Callable[[Any, Any, Any], tuple[Any, Any]]


def student(model: Any, patterns: tuple[str, ...]) -> Student:
    """Return a student whose features of some paths are captured.

    Args:
      model: a Linen module called as ``model(x, train=...)``; or the graphdef of an NNX module, from
        ``nnx.split(module, nnx.Param, ...)``, whose state is ``{"params": params, "rest": rest}``.
      patterns: globs of paths, see `compress_jax.distill.capture`; none captures nothing.

    Returns:
      A `Student`.

    Raises:
      ConfigError: if it is neither.
    """
    from flax import nnx

    if isinstance(model, nn.Module):
        return _linen(model, patterns)
    if isinstance(model, nnx.GraphDef):
        return _nnx(model, patterns)
    raise ConfigError(f"the student is a Linen module or the graphdef of nnx.split(module, nnx.Param, ...), got {model!r}")


def _linen(model: nn.Module, patterns: tuple[str, ...]) -> Student:
    see = capture(model, patterns) if patterns else lambda *args, **options: (model.apply(*args, **options), {})

    def train(params: Any, model_state: Any, x: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        variables = {"params": params, **model_state}
        (logits, new), features = see(variables, x, train=True, mutable=list(model_state), rngs={"dropout": key})
        return logits, features, {**model_state, **new}

    def evaluate(params: Any, model_state: Any, x: Any) -> tuple[Any, Any]:
        return see({"params": params, **model_state}, x, train=False)

    return Student(train, evaluate)


def _nnx(graphdef: Any, patterns: tuple[str, ...]) -> Student:
    from flax import nnx

    def merged(params: Any, model_state: Any, training: bool) -> Any:
        module = nnx.merge(graphdef, params, model_state.get("rest", nnx.State({})), copy=True)
        (module.train if training else module.eval)()
        return module

    def run(module: Any, x: Any) -> tuple[Any, Any]:
        return capture(module, patterns)(x) if patterns else (module(x), {})

    def train(params: Any, model_state: Any, x: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        module = merged(params, model_state, True)
        nnx.reseed(module, dropout=key)
        logits, features = run(module, x)
        rest = nnx.split(module, nnx.Param, ...)[2]
        like = jax.tree.leaves(rest), jax.tree.structure(model_state.get("rest", rest))
        return logits, features, {"rest": jax.tree.unflatten(like[1], like[0])}

    def evaluate(params: Any, model_state: Any, x: Any) -> tuple[Any, Any]:
        return run(merged(params, model_state, False), x)

    return Student(train, evaluate)
