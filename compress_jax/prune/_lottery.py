"""Lottery tickets: train, prune, rewind to early weights, repeat, as pure functions of states."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from compress_jax.core.arguments import compression as checked
from compress_jax.core.arguments import number, whole
from compress_jax.core.compression import Compression, CompressionState, bound
from compress_jax.core.describe import describe
from compress_jax.core.errors import ArgumentError, ConfigError, StateError
from compress_jax.core.paths import flatten, owner
from compress_jax.core.schedules import Scheduled, at_once, schedules_of
from compress_jax.core.types import Params, PyTree

# An optimizer can only add to the params, and p + (s - p) is rounded. After it s - p is exact
# (Sterbenz), so a second step arrives at s exactly.
BACK = 2


def rounds(share: float, steps: int = 1) -> optax.Schedule:
    """Return the schedule of iterative pruning: each round prunes the same share of what is left.

    ``s(step) = 1 - (1 - share)**k`` in round ``k = step // steps``; nothing is pruned in round 0.

    Args:
      share: the share of the remaining weights that is pruned at the end of each round.
      steps: the number of steps in a round; 1 to count in rounds.

    Returns:
      An optax schedule, ``step -> float32``.

    Raises:
      ArgumentError: unless ``0 < share < 1`` and ``steps`` is at least 1.

    Example:
      >>> import compress_jax as cj
      >>> [round(float(cj.prune.rounds(0.2)(k)), 3) for k in range(4)]
      [0.0, 0.2, 0.36, 0.488]

    References:
      Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019, section 1, strategy of iterative
      pruning.
    """
    share = number("share", share)
    steps = whole("steps", steps)
    if not 0 < share < 1 or steps < 1:
        raise ArgumentError(
            f"give a share between 0 and 1 and rounds of at least one step, got {share} and {steps}"
        )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        # Whole rounds: within a round the sparsity is constant.
        done = (jnp.asarray(step) // steps).astype(jnp.float32)
        return 1 - jnp.float32(1 - share) ** done

    return schedule


def nested(compression: Compression) -> Compression:
    """Let a pruning method choose only among the weights that are left: none comes back.

    `update` is given the masked weights. A pruned weight is then zero, and methods that score by
    size (`magnitude`, `fisher`, `saliency` without a decay) prune zeros first. This is needed where
    pruned weights have values: after rewinding, and in gradual pruning by `saliency`, where the
    noise of the gradient would bring them back.

    Args:
      compression: from `magnitude` or the like, with a sparsity that does not fall.

    Returns:
      The Compression; its state is that of the given one.

    Raises:
      ArgumentError: if the argument is no Compression.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.nested(cj.prune.magnitude(cj.prune.rounds(0.5)))
      >>> trained = {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}
      >>> rewound = {"w": jnp.array([9.0, 8.0, 1.0, 2.0])}
      >>> state = c.update(trained, c.init(trained), step=1)
      >>> c.view(rewound, c.update(rewound, state, step=2))["w"].tolist()
      [0.0, 0.0, 0.0, 2.0]
    """
    checked("compression", compression)

    def on_view(update: Callable[..., CompressionState]) -> Callable[..., CompressionState]:
        return lambda params, state, **inputs: update(
            compression.view(params, state), state, **inputs
        )

    update = Scheduled(
        on_view(compression.update), schedules_of(compression), on_view(at_once(compression))
    )
    return compression._replace(
        update=update,
        call=f"nested({describe(compression)})",
        bind=lambda known: nested(bound(compression, known)),
    )


def rewind(
    state: PyTree, saved: PyTree, masks: CompressionState, *, weights: bool = True
) -> PyTree:
    """Return the training state that starts the next round: early weights under new masks.

    Weight rewinding continues from ``saved`` in everything but the masks. Learning-rate rewinding
    keeps the trained weights and the model's other state, and takes the step and the optimizer's
    state (hence the schedule) of ``saved``.

    Args:
      state: the trained state, a NamedTuple with fields ``step, params, learned, fixed, opt_state``
        such as ``train.TrainState``.
      saved: the state of an early step; a copy, if steps donate their state.
      masks: the compression's state for the next round, from ``update(state.params, ...)`` of a
        `nested` compression.
      weights: whether weights are rewound; else only the learning rate.

    Returns:
      A state of the same type.

    Raises:
      StateError: if a field is missing.

    Example:
      >>> from typing import Any, NamedTuple
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> class State(NamedTuple):
      ...     step: int
      ...     params: Any
      ...     learned: Any
      ...     fixed: Any
      ...     opt_state: Any
      >>> c = cj.prune.nested(cj.prune.magnitude(cj.prune.rounds(0.5)))
      >>> early = {"w": jnp.array([1.0, -1.0])}
      >>> saved = State(10, early, *c.init(early), opt_state=())
      >>> state = saved._replace(step=99, params={"w": jnp.array([5.0, -0.1])})
      >>> masks = c.update(state.params, cj.CompressionState(state.learned, state.fixed), step=1)
      >>> after = cj.prune.rewind(state, saved, masks)
      >>> view = c.view(after.params, cj.CompressionState(after.learned, after.fixed))
      >>> after.step, view["w"].tolist()
      (10, [1.0, 0.0])

    References:
      Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, algorithm
      2 (rewinding). Renda, Frankle and Carbin, "Comparing Rewinding and Fine-tuning in Neural
      Network Pruning", 2020, section 2.
    """
    needed = ("step", "params", "learned", "fixed", "opt_state")
    for tree in (state, saved):
        if missing := [name for name in needed if not hasattr(tree, name)]:
            raise StateError(
                f"a training state is a NamedTuple with {', '.join(needed)}; "
                f"{type(tree).__name__} lacks {missing}"
            )
    # The masks are those of the next round in both cases.
    if weights:
        return saved._replace(learned=masks.learned, fixed=masks.fixed)
    return state._replace(
        step=saved.step, opt_state=saved.opt_state, learned=masks.learned, fixed=masks.fixed
    )


class Rewound(NamedTuple):
    """The state of a `rewinding` optimizer.

    Attributes:
      count: int32 ``[]``, the number of steps, including those that rewind.
      inner: the state of the wrapped optimizer.
      saved: the ``(params, inner)`` to rewind to; empty without rewinding.
    """

    count: jax.Array
    inner: optax.OptState
    saved: tuple[Params, optax.OptState] | tuple[()]


def rewinding(
    optimizer: optax.GradientTransformation,
    every: int | None = None,
    to: int = 0,
    *,
    weights: bool = True,
    start: Params | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that one training loop runs all rounds of iterative pruning.

    Rounds end at the steps divisible by ``every``, where
    ``every(every, nested(magnitude(rounds(share, every))))`` prunes. The next two steps set the
    weights and the optimizer's state (its schedule, too) to what they were after ``to`` steps,
    exactly; they ignore their gradients. Everything is in the state, so a restored run continues
    unchanged. Batch statistics and other variables of the model are not rewound.

    Args:
      optimizer: any optimizer; its schedules count the steps of a round.
      every: the number of steps in a round; None for no rewinding.
      to: the number of steps after which the weights are saved.
      weights: whether weights are rewound; else only the optimizer (learning-rate rewinding).
      start: the weights to begin from instead of those of the loop; the first two steps set them.

    Returns:
      The optimizer; its state is `Rewound`.

    Raises:
      ArgumentError: if a round has too few steps to rewind to ``to``.
      ConfigError: in `init`, if ``start`` lacks one of the params.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import compress_jax as cj
      >>> optimizer = cj.prune.rewinding(optax.sgd(1.0), every=4)
      >>> params = {"w": jnp.array(5.0)}
      >>> state = optimizer.init(params)
      >>> values = []
      >>> for step in range(8):
      ...     updates, state = optimizer.update({"w": jnp.array(1.0)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     values.append(float(params["w"]))
      >>> values
      [4.0, 3.0, 2.0, 1.0, 0.0, 5.0, 5.0, 4.0]

    References:
      Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, section 4.
    """
    # The first BACK steps go to ``start``; a round needs BACK more to come back, and one to train.
    begin = 0 if start is None else BACK
    if every is not None and (to < 0 or every <= begin + to + BACK):
        raise ArgumentError(
            f"a round of {every} steps is too short to come back to step {to}; rounds need "
            f"{begin + to + BACK + 1}"
        )

    # Extra arguments of `update` are for the wrapped optimizer, whether it takes any or not.
    wrapped = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> Rewound:
        _start_of(params, start)
        inner = optimizer.init(params)
        return Rewound(jnp.zeros((), jnp.int32), inner, () if every is None else (params, inner))

    def update(
        updates: PyTree, state: PyTree, params: Params = None, **extra: PyTree
    ) -> tuple[optax.Updates, Rewound]:
        now = state.count
        saved = state.saved
        if every is not None:
            # Save the params and the optimizer's state after ``to`` steps of the first round.
            saved = jax.lax.cond(now == begin + to, lambda: (params, state.inner), lambda: saved)

        def towards(target: Params) -> optax.Updates:
            # In the dtype of the gradients, as that is what `train` returns: branches must agree.
            return jax.tree.map(lambda s, p, g: (s - p).astype(g.dtype), target, params, updates)

        def train() -> tuple[optax.Updates, optax.OptState]:
            return wrapped.update(updates, state.inner, params, **extra)

        def to_start() -> tuple[optax.Updates, optax.OptState]:
            return towards(_start_of(params, start)), state.inner

        def to_saved() -> tuple[optax.Updates, optax.OptState]:
            return towards(saved[0] if weights else params), saved[1]

        # The first BACK steps after the end of a round.
        rewinds = jnp.bool(False)
        if every:
            rewinds = (now > every) & (now % every > 0) & (now % every <= BACK)
        index = jnp.where(now < begin, 1, jnp.where(rewinds, 2, 0))
        branches = [train, to_start if begin else train, to_saved if every else train]
        moves, inner = jax.lax.switch(index, branches)
        return moves, Rewound(now + 1, inner, saved)

    return optax.GradientTransformationExtraArgs(init, update)


def _start_of(params: Params, start: Params | None) -> Params:
    """Return ``start`` in the structure of the optimizer's params, which may nest it deeper."""
    if start is None:
        return params
    leaves, rebuild = flatten(params)
    given = flatten(start)[0]
    found = {}
    for path in leaves:
        name = owner(path, given)
        if name is None:
            raise ConfigError(f"start has no weights for {path!r}; it has: {', '.join(given)}")
        found[path] = given[name]
    return rebuild(found)
