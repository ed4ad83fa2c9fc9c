"""Lottery tickets: train, prune, go back to the weights of an early step, again; as pure transitions of a training state."""

from collections.abc import Callable
from typing import Any, NamedTuple

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

BACK = 2  # steps that going back takes: p + (s - p) is rounded, but then s - p is exact (Sterbenz), and so is the second sum


def rounds(share: float, steps: int = 1) -> optax.Schedule:
    """Return the sparsity of iterative pruning: every round prunes the same share of what is left.

    ``s(step) = 1 - (1 - share)**k`` in round ``k = step // steps``; nothing is pruned in round 0.

    Args:
      share: of the weights that are left, pruned at the end of each round.
      steps: of a round; 1 to count in rounds.

    Returns:
      An optax schedule, ``step -> float32``.

    Raises:
      ArgumentError: unless ``0 < share < 1`` and ``steps`` is at least 1.

    Example:
      >>> [round(float(rounds(0.2)(k)), 3) for k in range(4)]
      [0.0, 0.2, 0.36, 0.488]

    References:
      Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019, section 1, strategy of iterative
      pruning.
    """
    share, steps = number("share", share), whole("steps", steps)
    if not 0 < share < 1 or steps < 1:
        raise ArgumentError(
            f"a share between 0 and 1 is pruned each round of at least one step, got {share} and "
            f"{steps}"
        )
    return lambda step: (
        1 - jnp.float32(1 - share) ** (jnp.asarray(step) // steps).astype(jnp.float32)
    )


def nested(compression: Compression) -> Compression:
    """Let a pruning method choose among what it has kept so far: weights that were pruned never come back.

    `update` is given the weights as the masks show them, so a pruned one counts as zero, which
    methods that score by size (`magnitude`, `fisher`, `saliency` without a decay) prune first.
    Needed wherever pruned weights do not stay at zero: after rewinding, and in gradual pruning by
    `saliency`, where they would come and go with the noise of a batch's gradient.

    Args:
      compression: from `magnitude` or the like, with a sparsity that does not fall.

    Returns:
      The Compression; its state is that of the one given.

    Example:
      >>> from compress_jax.prune import magnitude
      >>> c = nested(magnitude(rounds(0.5)))
      >>> trained, rewound = {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}, {"w": jnp.array([9.0, 8.0, 1.0, 2.0])}
      >>> state = c.update(trained, c.init(trained), step=1)
      >>> c.view(rewound, c.update(rewound, state, step=2))["w"].tolist()
      [0.0, 0.0, 0.0, 2.0]
    """
    checked("compression", compression)

    def nesting(update: Callable[..., CompressionState]) -> Callable[..., CompressionState]:
        return lambda params, state, **inputs: update(
            compression.view(params, state), state, **inputs
        )

    update = Scheduled(
        nesting(compression.update), schedules_of(compression), nesting(at_once(compression))
    )
    return compression._replace(
        update=update,
        call=f"nested({describe(compression)})",
        bind=lambda known: nested(bound(compression, known)),
    )


def rewind(state: PyTree, saved: Any, masks: CompressionState, *, weights: bool = True) -> Any:
    """Return a training state that starts the next round: early weights (or only the early learning rate), new masks.

    Weight rewinding continues from ``saved`` in all but the masks. Learning-rate rewinding keeps
    the trained weights and the model's other state, and takes the step, the optimizer's state and
    thus the schedule of ``saved``.

    Args:
      state: NamedTuple with fields ``step, params, learned, fixed, opt_state``, such as
        ``train.TrainState``: trained.
      saved: the like, of an early step; a copy, if steps donate their state.
      masks: state of the compression for the next round: ``compression.update(state.params, ...)``
        of a `nested` one.
      weights: whether weights go back; else only the learning rate.

    Returns:
      The like.

    Raises:
      StateError: if a field is missing.

    Example:
      >>> from compress_jax.prune import magnitude
      >>> class State(NamedTuple):
      ...     step: int
      ...     params: Any
      ...     learned: Any
      ...     fixed: Any
      ...     opt_state: Any
      >>> c, early = nested(magnitude(rounds(0.5))), {"w": jnp.array([1.0, -1.0])}
      >>> saved = State(10, early, *c.init(early), opt_state=())
      >>> state = saved._replace(step=99, params={"w": jnp.array([5.0, -0.1])})
      >>> masks = c.update(state.params, CompressionState(state.learned, state.fixed), step=1)
      >>> after = rewind(state, saved, masks)
      >>> after.step, c.view(after.params, CompressionState(after.learned, after.fixed))["w"].tolist()
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
    if weights:
        return saved._replace(learned=masks.learned, fixed=masks.fixed)
    return state._replace(
        step=saved.step, opt_state=saved.opt_state, learned=masks.learned, fixed=masks.fixed
    )


class Rewound(NamedTuple):
    """State of a `rewinding` optimizer.

    Attributes:
      count: int32 ``[]``, steps taken, those that went back included.
      inner: of the optimizer inside.
      saved: ``(params, inner)`` to go back to; empty if it never does.
    """

    count: jax.Array
    inner: Any
    saved: Any


def rewinding(
    optimizer: optax.GradientTransformation,
    every: int | None = None,
    to: int = 0,
    *,
    weights: bool = True,
    start: Params | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that one ordinary training loop goes through all rounds of iterative pruning.

    Rounds end at the steps divisible by ``every``, where
    ``every(every, nested(magnitude(rounds(share, every))))`` prunes. The next two steps take
    weights and optimizer (its schedule, too) back to what they were after ``to`` steps, exactly;
    gradients of these two are ignored. A run that is stopped and restored goes on as if nothing had
    happened, because all is in the state. What a model keeps beside its params (batch statistics)
    stays as trained.

    Args:
      optimizer: any; its schedules see the steps of a round.
      every: steps of a round; None to never go back.
      to: after how many steps the weights are saved.
      weights: whether weights go back; else only the optimizer (learning-rate rewinding).
      start: weights to begin from, whatever the loop begins with; the first two steps set them.

    Returns:
      The optimizer; its state is `Rewound`.

    Raises:
      ArgumentError: if a round is too short to come back to ``to``.
      ConfigError: in `init`, if ``start`` lacks one of the params.

    Example:
      >>> optimizer = rewinding(optax.sgd(1.0), every=4)
      >>> params = {"w": jnp.array(5.0)}
      >>> state = optimizer.init(params)
      >>> seen = []
      >>> for step in range(8):
      ...     updates, state = optimizer.update({"w": jnp.array(1.0)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     seen.append(float(params["w"]))
      >>> seen
      [4.0, 3.0, 2.0, 1.0, 0.0, 5.0, 5.0, 4.0]

    References:
      Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, section 4.
    """
    begin = 0 if start is None else BACK
    if every is not None and (to < 0 or every <= begin + to + BACK):
        raise ArgumentError(
            f"a round of {every} steps is too short to come back to step {to}; rounds need "
            f"{begin + to + BACK + 1}"
        )

    wrapped = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> Rewound:
        _chosen(params, start)
        inner = optimizer.init(params)
        return Rewound(jnp.zeros((), jnp.int32), inner, () if every is None else (params, inner))

    def update(
        updates: Any, state: PyTree, params: Params = None, **extra: Any
    ) -> tuple[Any, Rewound]:
        now, saved = state.count, state.saved
        if every is not None:
            saved = jax.lax.cond(now == begin + to, lambda: (params, state.inner), lambda: saved)

        def back_to(target: Params) -> Any:
            return jax.tree.map(lambda s, p, g: (s - p).astype(g.dtype), target, params, updates)

        def train() -> tuple[Any, Any]:
            return wrapped.update(updates, state.inner, params, **extra)

        def begun() -> tuple[Any, Any]:
            return back_to(_chosen(params, start)), state.inner

        def again() -> tuple[Any, Any]:
            return back_to(saved[0] if weights else params), saved[1]

        branches: list[Callable[[], tuple[Any, Any]]] = [
            train,
            begun if begin else train,
            again if every else train,
        ]
        going_back = (
            (now > every) & (now % every > 0) & (now % every <= BACK) if every else jnp.bool(False)
        )
        index = jnp.where(now < begin, 1, jnp.where(going_back, 2, 0))
        moves, inner = jax.lax.switch(index, branches)
        return moves, Rewound(now + 1, inner, saved)

    return optax.GradientTransformationExtraArgs(init, update)


def _chosen(params: Params, start: Params | None) -> Params:
    """Return the start in the structure of what the optimizer sees, which may hold the params under a name of its own."""
    if start is None:
        return params
    leaves, rebuild = flatten(params)
    given = flatten(start)[0]
    names = {path: owner(path, given) for path in leaves}
    if missing := [path for path, name in names.items() if name is None]:
        raise ConfigError(f"start has no weights for {missing[0]!r}; it has: {', '.join(given)}")
    return rebuild({path: given[name] for path, name in names.items() if name is not None})
