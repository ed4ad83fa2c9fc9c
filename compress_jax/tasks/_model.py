"""A model as pure functions of its variables, whatever framework it is written in."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ConfigError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaf, Model, ModelFn, Params, PyTree, Variables
from compress_jax.distill import capture

Features: TypeAlias = dict[str, jax.Array]
"""Outputs of submodules by path."""

Inputs: TypeAlias = tuple[PyTree, ...]
"""What a model is given of a batch."""

TrainFn: TypeAlias = Callable[
    [Params, PyTree, Inputs, jax.Array, jax.Array | None], tuple[PyTree, Features, PyTree]
]
"""``(params, state, inputs, key, counts) -> (outputs, features, state)`` in training mode."""

EvaluateFn: TypeAlias = Callable[[Params, PyTree, Inputs], tuple[PyTree, Features]]
"""``(params, state, inputs) -> (outputs, features)`` in eval mode."""

# What a call's argument for the mode is called, and its value in training.
MODES = {"train": True, "training": True, "is_training": True, "deterministic": False}


@dataclass(frozen=True)
class PureModel:
    """A model as pure functions; `pure` makes one of any model.

    ``params`` is what is trained and compressed, ``state`` what else a call reads and writes (batch
    statistics). Both are nested dicts of arrays, so that they are stored like any other.

    Attributes:
      init: ``(key, *inputs) -> {"params": params, **state}``.
      apply: ``(variables, *inputs) -> outputs`` in eval mode: what is measured and exported.
      train: ``(params, state, inputs, key, counts) -> (outputs, features, state)`` in training
        mode; inputs is a tuple, counts the batch's mask or None.
      evaluate: ``(params, state, inputs) -> (outputs, features)`` in eval mode.
      source: the model it was made of.

    Example:
      >>> import compress_jax as cj
      >>> model = cj.tasks.pure(cj.models.LeNet300100(hidden=(8,)))
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> model.apply(variables, jnp.ones((2, 4))).shape
      (2, 10)
    """

    init: Callable[..., Variables]
    apply: ModelFn
    train: TrainFn
    evaluate: EvaluateFn
    source: Model


def pure(model: Model, patterns: tuple[str, ...] = ()) -> PureModel:
    """Return a model as pure functions of its variables.

    Args:
      model: one of

        * a Linen module; its call may have a parameter ``train``, ``training``, ``is_training`` or
          ``deterministic`` for the mode;
        * an NNX module, whose weights are then where training starts whatever the seed; or a
          function ``rngs -> module``, for weights drawn from the seed; or a graphdef;
        * an Equinox module, called on one example and vectorized over the batch; or a function
          ``key -> module``. One that keeps state (batch norm) comes with it: the pair ``(module,
          state)`` of ``eqx.nn.make_with_state``, or a function ``key -> (module, state)``; it is
          called as ``module(x, state)``;
        * a Keras 3 model that is built and runs on JAX; training starts at its weights, whatever
          the seed;
        * what ``haiku.transform`` or ``haiku.transform_with_state`` returned;
        * a pair ``(init, apply)`` of pure functions, ``(key, *inputs) -> params`` and
          ``(params, *inputs) -> outputs``;
        * a `PureModel`.
      patterns: globs of submodules whose outputs `train` and `evaluate` return as features, see
        `compress_jax.distill.capture`; Linen and NNX only.

    Returns:
      A `PureModel`.

    Raises:
      ConfigError: if the model is of another kind, or cannot give features.

    Example:
      >>> import compress_jax as cj
      >>> linear = cj.tasks.pure((lambda key, x: jnp.ones(x.shape[-1]), lambda w, x: x @ w))
      >>> linear.apply(linear.init(jax.random.key(0), jnp.ones((1, 3))), jnp.ones((2, 3))).tolist()
      [3.0, 3.0]
    """
    made = _made(model, patterns)
    if made is None:
        raise ConfigError(
            "model must be a Linen, NNX or Equinox module, a function rngs -> NNX module or key -> "
            "Equinox module, a Keras model, a Haiku transform, or a pair (init, apply) of pure "
            "functions; got "
            f"{_brief(model)}"
        )
    return made


def _made(model: Model, patterns: tuple[str, ...]) -> PureModel | None:
    """Return a model as pure functions, or None if it is of no kind that is known."""
    from flax import linen, nnx  # Flax takes seconds to load

    if isinstance(model, PureModel):
        return _with_features(model, patterns)
    if isinstance(model, type):
        return None
    if isinstance(model, linen.Module) or _is_linen_like(model):
        return _linen(model, patterns)
    if isinstance(model, nnx.Module | nnx.GraphDef):
        return _nnx(model, patterns)
    parameters = _parameters(model)
    if "rngs" in parameters and not hasattr(model, "apply"):
        return _nnx(model, patterns)
    if _is_equinox(model) or _is_with_state(model) or list(parameters) == ["key"]:
        return _no_features(_equinox(model), patterns)
    if _is_of(model, "keras") and hasattr(model, "stateless_call"):
        return _no_features(_keras(model), patterns)
    if type(model).__name__ in ("Transformed", "TransformedWithState"):
        return _no_features(_haiku(model), patterns)
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        return _no_features(_pair(model), patterns)
    return None


def _with_features(model: PureModel, patterns: tuple[str, ...]) -> PureModel:
    """Return a model with other features; one that somebody made by hand gives none."""
    if not patterns or model.source is None:
        return _no_features(model, patterns)
    return pure(model.source, patterns)


def _no_features(model: PureModel, patterns: tuple[str, ...]) -> PureModel:
    if patterns:
        raise ConfigError(
            f"features {list(patterns)} are captured in Linen and NNX modules; this model is "
            f"{_brief(model.source)}. Return them as outputs, and compare those"
        )
    return model


def _brief(model: Model) -> str:
    name = getattr(model, "__qualname__", type(model).__qualname__)
    return f"the class {name}; call it" if isinstance(model, type) else f"a {name}"


def _parameters(function: Model) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function; none of what has no signature."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


# Linen, and what is called like it (`train.QuantizedModel`).


def _is_linen_like(model: Model) -> bool:
    # Haiku's transforms and optimizers are tuples with the same two names.
    has = all(callable(getattr(model, name, None)) for name in ("init", "apply"))
    return has and not isinstance(model, tuple)


def _linen(model: Model, patterns: tuple[str, ...]) -> PureModel:
    from flax import linen

    forward = capture(model, patterns) if patterns else None
    # `train.QuantizedModel` passes on what the module inside takes.
    inner = model if isinstance(model, linen.Module) else getattr(model, "model", model)
    parameters = _parameters(inner if callable(inner) else None)
    mode = next((name for name in MODES if name in parameters), None)
    takes_counts = "counts" in _parameters(model.apply)

    def init(key: jax.Array, *inputs: PyTree) -> Variables:
        # A mode without a default must be given; eval mode asks for no dropout key.
        options = {}
        if mode is not None and parameters[mode].default is inspect.Parameter.empty:
            options[mode] = not MODES[mode]
        return model.init(key, *inputs, **options)

    def run(
        variables: Variables, inputs: Inputs, training: bool, **options: Any
    ) -> tuple[PyTree, Features]:
        if mode is not None:
            options[mode] = MODES[mode] == training
        if forward is not None:
            return forward(variables, *inputs, **options)
        return model.apply(variables, *inputs, **options), {}

    def train(
        params: Params, state: PyTree, inputs: Inputs, key: jax.Array, counts: jax.Array | None
    ) -> tuple[PyTree, Features, PyTree]:
        options: dict[str, object] = {"mutable": list(state), "rngs": {"dropout": key}}
        if counts is not None and takes_counts:
            options["counts"] = counts  # ranges must not move with padding
        (out, new), features = run({"params": params, **state}, inputs, True, **options)
        return out, features, {**state, **new}

    def evaluate(params: Params, state: PyTree, inputs: Inputs) -> tuple[PyTree, Features]:
        return run({"params": params, **state}, inputs, False)

    def apply(variables: Variables, *inputs: PyTree) -> PyTree:
        return run(variables, inputs, False)[0]

    return PureModel(init, apply, train, evaluate, model)


# NNX: params and other state as nested dicts; random streams start anew in each call.


def _nnx(model: Model, patterns: tuple[str, ...]) -> PureModel:
    from flax import nnx

    if isinstance(model, nnx.GraphDef):
        return _graphdef(model, patterns)
    is_module = isinstance(model, nnx.Module)
    # The structure alone; a function of rngs draws its weights in `init`.
    template = model if is_module else nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0)))
    graphdef, params, streams, rest = nnx.split(template, nnx.Param, nnx.RngState, ...)
    _, as_params = flatten(params)
    _, as_rest = flatten(rest)
    still = jax.tree.map(_first_of_a_stream, streams)

    def init(key: jax.Array, *inputs: PyTree) -> Variables:
        module = model if is_module else model(rngs=nnx.Rngs(key))
        _, params, _, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
        state = {"state": _nested(rest)} if jax.tree.leaves(rest) else {}
        return {"params": _nested(params), **state}

    def merge(params: Params, state: PyTree, training: bool) -> Model:
        own_params = as_params(flatten(params)[0])
        own_rest = as_rest(flatten(state.get("state", {}))[0])
        # A copy: a call changes its module, and must not reach the arrays it was merged from.
        module = nnx.merge(graphdef, own_params, still, own_rest, copy=True)
        module.train() if training else module.eval()
        return module

    def forward(module: Model, inputs: Inputs) -> tuple[PyTree, Features]:
        return capture(module, patterns)(*inputs) if patterns else (module(*inputs), {})

    def train(
        params: Params, state: PyTree, inputs: Inputs, key: jax.Array, counts: jax.Array | None
    ) -> tuple[PyTree, Features, PyTree]:
        module = merge(params, state, training=True)
        nnx.reseed(module, default=key, dropout=key)
        out, features = forward(module, inputs)
        new = nnx.split(module, nnx.Param, nnx.RngState, ...)[3]
        # A capture adds intermediates to the module; they are no state.
        kept = {path: flatten(new)[0][path] for path in flatten(rest)[0]}
        return out, features, {**state, "state": _nested(kept)} if kept else state

    def evaluate(params: Params, state: PyTree, inputs: Inputs) -> tuple[PyTree, Features]:
        return forward(merge(params, state, training=False), inputs)

    return PureModel(init, _apply_of(evaluate), train, evaluate, model)


def _first_of_a_stream(x: Leaf) -> jax.Array:
    """Return a key, or a count of keys, in place of one that may be abstract."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return jnp.zeros(x.shape, x.dtype)


def _graphdef(graphdef: Model, patterns: tuple[str, ...]) -> PureModel:
    """Return an NNX module that the caller has split by ``nnx.split(module, nnx.Param, ...)``."""
    from flax import nnx

    def merge(params: Params, state: PyTree, training: bool) -> Model:
        module = nnx.merge(graphdef, params, state.get("rest", nnx.State({})), copy=True)
        module.train() if training else module.eval()
        return module

    def forward(module: Model, inputs: Inputs) -> tuple[PyTree, Features]:
        return capture(module, patterns)(*inputs) if patterns else (module(*inputs), {})

    def train(
        params: Params, state: PyTree, inputs: Inputs, key: jax.Array, counts: jax.Array | None
    ) -> tuple[PyTree, Features, PyTree]:
        module = merge(params, state, training=True)
        nnx.reseed(module, dropout=key)
        out, features = forward(module, inputs)
        rest = nnx.split(module, nnx.Param, ...)[2]
        # A capture adds nothing to the state: it must keep the structure that it came with.
        structure = jax.tree.structure(state.get("rest", rest))
        return out, features, {"rest": jax.tree.unflatten(structure, jax.tree.leaves(rest))}

    def evaluate(params: Params, state: PyTree, inputs: Inputs) -> tuple[PyTree, Features]:
        return forward(merge(params, state, training=False), inputs)

    def init(key: jax.Array, *inputs: PyTree) -> Variables:
        raise ConfigError("a graphdef has no weights of its own; give the NNX module itself")

    return PureModel(init, _apply_of(evaluate), train, evaluate, graphdef)


# Equinox: the module's floating-point arrays are the params; a call is of one example.


def _is_of(model: Model, package: str) -> bool:
    return any(kind.__module__.split(".")[0] == package for kind in type(model).__mro__)


def _is_equinox(model: Model) -> bool:
    return _is_of(model, "equinox") and callable(model)


def _is_with_state(model: Model) -> bool:
    """Return whether a model is what ``eqx.nn.make_with_state`` gives."""
    is_pair = isinstance(model, tuple) and len(model) == 2 and _is_equinox(model[0])
    return is_pair and _is_of(model[1], "equinox") and type(model[1]).__name__ == "State"


def _equinox(model: Model) -> PureModel:
    import equinox as eqx

    is_made = _is_equinox(model) or _is_with_state(model)
    template = model if is_made else eqx.filter_eval_shape(model, jax.random.key(0))
    module, memory = template if _is_with_state(template) else (template, None)
    axis = _axis_of(module, memory is not None)
    params, static = eqx.partition(module, _is_weight)
    _, as_params = flatten(params)
    _, as_memory = flatten(memory)
    # Modules with dropout take a key; others would refuse it.
    takes_key = "key" in _parameters(type(module).__call__)

    def init(key: jax.Array, *inputs: PyTree) -> Variables:
        made = model if is_made else model(key)
        module, memory = made if _is_with_state(made) else (made, None)
        state = {} if memory is None else {"state": _nested(memory)}
        return {"params": _nested(eqx.filter(module, _is_weight)), **state}

    def run(
        params: Params, state: PyTree, inputs: Inputs, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        module = eqx.combine(as_params(flatten(params)[0]), static)
        module = eqx.nn.inference_mode(module, key is None)
        # A call is of one example, so each has a key of its own.
        size = jax.tree.leaves(inputs)[0].shape[0]
        keys = None if key is None else jax.random.split(key, size)

        def call(key: jax.Array | None, *example: PyTree) -> PyTree:
            options = {} if key is None or not takes_key else {"key": key}
            if memory is not None:
                options["state"] = as_memory(flatten(state["state"])[0])
            return module(*example, **options)

        if memory is None:
            return jax.vmap(call)(keys, *inputs), state
        # The state is one for the whole batch, over which batch norms average by the axis's name.
        mapped = jax.vmap(call, out_axes=(0, None), axis_name=axis)
        out, new = mapped(keys, *inputs)
        return out, {**state, "state": _nested(new)}

    return _of_run(init, run, model)


def _axis_of(module: Model, has_state: bool) -> str | None:
    """Return the name of the batch's axis in an Equinox module that keeps state."""
    import equinox as eqx

    def kept(kind: type) -> list[Any]:
        leaves = jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, kind))
        return [x for x in leaves if isinstance(x, kind)]

    if kept(eqx.nn.StateIndex) and not has_state:
        raise ConfigError(
            "the Equinox module keeps state, such as that of batch norm; give it with its state: "
            "the pair eqx.nn.make_with_state(Net)(key), or lambda key: "
            "eqx.nn.make_with_state(Net)(key)"
        )
    given = [norm.axis_name for norm in kept(eqx.nn.BatchNorm)]
    names = {name for each in given for name in ([each] if isinstance(each, str) else each)}
    if len(names) > 1:
        raise ConfigError(
            f"batch norms of the Equinox module average over the axes {sorted(names)}, and a batch "
            "has one: give all of them the same axis_name"
        )
    return next(iter(names), None)


def _is_weight(x: Leaf) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


# Keras 3 on JAX: a model that is built has its variables, which a stateless call takes and gives.


def _keras(model: Model) -> PureModel:
    _require_ready(model)
    weights, others = model.trainable_variables, model.non_trainable_variables
    names, more = ([_path_in(model, x) for x in group] for group in (weights, others))
    mode = "training" in _parameters(model.call)
    # Seeds of dropout are no state: each call draws from the step's key.
    seeds = [path for path in more if path.endswith("seed_generator_state")]

    def split(values: Sequence[Leaf]) -> dict[str, PyTree]:
        """Return the state of the values of all variables that are not trained."""
        named = dict(zip(more, values, strict=True))
        kept = _nested({path: x for path, x in named.items() if path not in seeds})
        return {"state": kept} if kept else {}

    def init(key: jax.Array, *inputs: PyTree) -> Variables:
        params = {path: each.value for path, each in zip(names, weights, strict=True)}
        return {"params": _nested(params), **split([each.value for each in others])}

    def run(
        params: Params, state: PyTree, inputs: Inputs, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        own, rest = flatten(params)[0], flatten(state.get("state", {}))[0]
        for number, path in enumerate(seeds):
            seed = jax.random.fold_in(jax.random.key(0) if key is None else key, number)
            rest[path] = jax.random.bits(seed, others[more.index(path)].shape, "uint32")
        values = [own[path] for path in names], [rest[path] for path in more]
        options = {"training": key is not None} if mode else {}
        out, new = model.stateless_call(*values, *inputs, **options)
        return out, {**state, **split(new)}

    return _of_run(init, run, model)


def _require_ready(model: Model) -> None:
    """Raise a ConfigError unless a Keras model is built, on JAX, and can be told the mode."""
    if not model.built:
        raise ConfigError(
            "the Keras model has no weights yet; call it once on an example, or give its first "
            "layer an Input"
        )
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    if not all(isinstance(each.value, jax.Array) for each in variables):
        raise ConfigError(
            "the Keras model does not run on JAX; set the environment variable KERAS_BACKEND=jax "
            "before keras is imported"
        )
    if model.non_trainable_variables and "training" not in _parameters(model.call):
        raise ConfigError(
            "the Keras model has batch norms or dropout, or layers that are not trained, so its "
            "call needs an argument training, which it passes on to its layers"
        )
    paths = [_path_in(model, each) for each in variables]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise ConfigError(
            f"two weights of the Keras model are called {twice[0]!r}; name its layers"
        )


def _path_in(model: Model, variable: Any) -> str:
    """Return the path of a Keras variable within its model, whose own name is counted up."""
    return variable.path.removeprefix(f"{model.name}/")


# Haiku, and pairs of pure functions.


def _haiku(model: Model) -> PureModel:
    has_state = type(model).__name__ == "TransformedWithState"
    parameters = _parameters(model.apply)
    mode = next((name for name in MODES if name in parameters), None)

    def options(training: bool) -> dict[str, bool]:
        return {} if mode is None else {mode: MODES[mode] == training}

    def init(key: jax.Array, *inputs: PyTree) -> Variables:
        made = model.init(key, *inputs, **options(True))
        params, state = made if has_state else (made, {})
        return {"params": params, **({"state": state} if state else {})}

    def run(
        params: Params, state: PyTree, inputs: Inputs, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        rng = (key,) if "rng" in parameters else ()  # not after `without_apply_rng`
        own = options(key is not None)
        if not has_state:
            return model.apply(params, *rng, *inputs, **own), state
        out, new = model.apply(params, state.get("state", {}), *rng, *inputs, **own)
        return out, {**state, "state": new} if new else state

    return _of_run(init, run, model)


def _pair(functions: tuple[Callable[..., Params], ModelFn]) -> PureModel:
    make, call = functions

    def init(key: jax.Array, *inputs: PyTree) -> Variables:
        return {"params": make(key, *inputs)}

    def run(
        params: Params, state: PyTree, inputs: Inputs, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        return call(params, *inputs), state

    return _of_run(init, run, functions)


def _of_run(
    init: Callable[..., Variables],
    run: Callable[[Params, PyTree, Inputs, jax.Array | None], tuple[PyTree, PyTree]],
    model: Model,
) -> PureModel:
    """Return the model whose call is ``(params, state, inputs, key) -> (outputs, state)``.

    The key is None in eval mode.
    """

    def train(
        params: Params, state: PyTree, inputs: Inputs, key: jax.Array, counts: jax.Array | None
    ) -> tuple[PyTree, Features, PyTree]:
        out, new = run(params, state, inputs, key)
        return out, {}, new

    def evaluate(params: Params, state: PyTree, inputs: Inputs) -> tuple[PyTree, Features]:
        return run(params, state, inputs, None)[0], {}

    return PureModel(init, _apply_of(evaluate), train, evaluate, model)


def _apply_of(evaluate: EvaluateFn) -> ModelFn:
    """Return the eval-mode call on variables, of that on params and state."""

    @functools.wraps(evaluate)
    def apply(variables: Variables, *inputs: PyTree) -> PyTree:
        state = {name: each for name, each in variables.items() if name != "params"}
        return evaluate(variables["params"], state, inputs)[0]

    return apply


def _nested(tree: PyTree) -> dict[str, PyTree]:
    """Return a tree's arrays as nested dicts by the keys of their paths."""
    leaves = tree if isinstance(tree, dict) and _is_flat(tree) else flatten(tree)[0]
    nested: dict[str, PyTree] = {}
    for path, leaf in leaves.items():
        *folders, last = path.split("/")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = leaf
    return nested


def _is_flat(tree: dict[str, Leaf]) -> bool:
    return all(hasattr(leaf, "dtype") for leaf in tree.values())
