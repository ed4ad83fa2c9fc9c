"""Features of Linen and NNX modules by path, without changes to the modules."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

import jax

from compress_jax.core.errors import ConfigError, NoMatchError
from compress_jax.core.paths import match, matches, name
from compress_jax.core.types import Model, PyTree, Variables

CALL = "__call__"

Captured: TypeAlias = Callable[..., tuple[PyTree, dict[str, jax.Array]]]
"""A function that returns a model's output, and the captured features by name."""


def capture(model: Model, patterns: str | tuple[str, ...]) -> Captured:
    """Return a function that runs a model and also returns the outputs of chosen submodules.

    A feature is named by its module, ``"block_0/conv_1"``; the output of a method other than
    ``__call__`` by module and method, ``"encoder/attend"``; what the model itself sows (Linen: in
    "intermediates", NNX: as ``nnx.Intermediate``) by module and name. A second call's are named
    ``"dense:1"``, a third's ``"dense:2"``; the arrays of an output that is no array ``"lstm/0"``,
    ``"lstm/1"``. The model is not changed, and no other feature is stored.

    Args:
      model: a Linen module, to be called as its ``apply``; or, in NNX, a module, a method of one or
        a function whose first argument is one (under ``jax.jit`` make it inside, by ``nnx.merge``).
      patterns: a glob of names or a tuple of them, each of which must match; see `core.match`.

    Returns:
      For Linen ``(variables, *args, mutable=False, **kwargs) -> (what apply returns, features)``,
      for NNX ``(*args, **kwargs) -> (output, features)``; features are ``{name: array}``.

    Raises:
      NoMatchError: when called, if a pattern matches nothing; it lists what there is.
      ConfigError: if the model is neither, or Flax is older than 0.12.6 and has no ``nnx.capture``.

    Example:
      >>> import compress_jax as cj
      >>> model, images = cj.models.ResNet(depth=8, width=4), jax.numpy.zeros((2, 28, 28, 1))
      >>> variables = jax.jit(model.init)(jax.random.key(0), images)
      >>> see = cj.distill.capture(model, ("stem", "block_*"))
      >>> logits, features = jax.jit(see)(variables, images)
      >>> {path: feature.shape for path, feature in features.items()}["block_1_0"]
      (2, 14, 14, 8)
    """
    from flax import linen, nnx  # Flax takes seconds to load

    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if isinstance(model, linen.Module):
        return _linen(model, patterns)
    if not callable(model) or isinstance(model, type):
        raise ConfigError(
            f"capture takes a Linen module or an NNX module, method or function, got {model!r}"
        )
    if not hasattr(nnx, "capture"):
        raise ConfigError(
            "features of NNX modules need flax >= 0.12.6, which has nnx.capture: upgrade flax"
        )
    return _nnx(model, patterns)


def _linen(model: Model, patterns: tuple[str, ...]) -> Captured:
    from flax import linen
    from flax.core.scope import union_filters
    from flax.traverse_util import flatten_dict

    def run(
        variables: Variables,
        *args: PyTree,
        mutable: bool | str | Collection[str] = False,
        **kwargs: Any,
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        called = []

        def chosen(module: linen.Module, method: str) -> bool:
            if not method.isidentifier():  # Flax's own wrapper around a lifted module
                return False
            called.append(_path((*module.path, method)))
            return matches(patterns, called[-1])

        # Intermediates are collected beside what the caller wants mutable, and taken out again.
        both = union_filters(mutable, "intermediates")
        out, state = model.apply(
            variables, *args, mutable=both, capture_intermediates=chosen, **kwargs
        )
        kept = dict(state)
        stored = flatten_dict(kept.pop("intermediates", {}))
        return (out if mutable is False else (out, kept)), _features(patterns, stored, called)

    return run


def _nnx(model: Model, patterns: tuple[str, ...]) -> Captured:
    from flax import nnx

    run_all = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)

    def run(*args: PyTree, **kwargs: Any) -> tuple[PyTree, dict[str, jax.Array]]:
        # The module: the model itself, the owner of a bound method, or a function's first argument.
        first = model if isinstance(model, nnx.Module) else next(iter(args), None)
        owner = getattr(model, "__self__", first)
        if not isinstance(owner, nnx.Module):
            raise ConfigError(
                f"{model} is not called on an NNX module; trace.observe sees inside any function"
            )
        out, state = run_all(*args, **kwargs)
        return out, _features(
            patterns, {keys: each.get_value() for keys, each in nnx.to_flat_state(state)}
        )

    return run


def _path(keys: Iterable[object]) -> str:
    """Return the name of a method's output: module and method, without ``__call__``.

    The whole model's output is "".
    """
    return "/".join(str(key) for key in keys if key != CALL)


def _features(
    patterns: tuple[str, ...], stored: Mapping[Any, PyTree], called: Iterable[str] = ()
) -> dict[str, jax.Array]:
    """Return the arrays that any pattern matches, of ``{keys: tuple of outputs, one a call}``."""
    outputs = {_path(keys): value for keys, value in stored.items()}
    paths = dict.fromkeys(path for path in (*called, *outputs) if path)
    # `match` refuses what matches no module at all; this finds what ran but left no output.
    lost = [pattern for pattern in patterns if not set(match(pattern, paths)) & set(outputs)]
    if lost:
        add = "give its nn.scan or nn.vmap variable_axes={'intermediates': 0, ...}"
        raise NoMatchError(
            f"{lost} match only what ran in a lifted transformation that keeps no intermediates: "
            f"{add}"
        )
    features: dict[str, jax.Array] = {}
    for path, value in outputs.items():
        if not path or not matches(patterns, path):
            continue
        # A tuple has one output for each call; what is sown in another way is one value.
        for i, out in enumerate(value if isinstance(value, tuple) else (value,)):
            features.update(_leaves(f"{path}:{i}", out))
    return features


def _leaves(path: str, out: PyTree) -> list[tuple[str, jax.Array]]:
    """Return the arrays of one output by name."""
    pairs = jax.tree_util.tree_flatten_with_path(out)[0]
    # The first call has no number, and an output that is an array no keys.
    return [
        ("/".join([path.removesuffix(":0"), *([name(keys)] if keys else [])]), leaf)
        for keys, leaf in pairs
    ]
