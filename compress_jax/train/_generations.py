"""Students as teachers: of the next generation, or of each other in mutual learning."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression
from compress_jax.core.errors import ConfigError
from compress_jax.core.types import Batch, ModelFn
from compress_jax.distill import Teacher, Teachers
from compress_jax.train._state import TrainState
from compress_jax.train._step import Metrics, Step


def as_teacher(
    state: TrainState, apply: ModelFn, compression: Compression | None = None
) -> Teacher:
    """Return a trained student as the frozen teacher of the next stage of training.

    Born-again networks: ``teacher = as_teacher(train(teacher), model.apply)``, again and again, and
    all of them together are `compress_jax.distill.Teachers`. Teacher assistants: the same with a
    smaller model at each stage. A stage that is trained in a directory of its own is not trained
    again when the chain is resumed, and `require_same` tells if the teacher before it has changed.

    Args:
      state: the state after the last step.
      apply: the ``apply`` of its model, in eval mode; see `Teacher`.
      compression: the teacher's params are its view; None for the dense params.

    Returns:
      A `Teacher` with arrays of its own, so that the next stage may donate the state.

    Example:
      >>> import optax
      >>> import compress_jax as cj
      >>> variables = {"params": {"w": jnp.eye(2)}}
      >>> state = cj.train.create(variables, cj.identity(), optax.sgd(0.1), jax.random.key(0))
      >>> teacher = cj.train.as_teacher(state, lambda variables, x: x @ variables["params"]["w"])
      >>> teacher(jnp.ones((1, 2))).tolist()
      [[1.0, 1.0]]

    References:
      Furlanello et al., "Born-Again Neural Networks", ICML 2018, section 3. Mirzadeh et al.,
      "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020, section 3.
    """
    # Copies, as the next stage may donate the state's own arrays.
    variables = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state.variables(compression))
    return Teacher(apply, variables)


def mutual_step(
    steps: Sequence[Step],
    applies: Sequence[ModelFn],
    compressions: Sequence[Compression | None] | None = None,
) -> Callable[[tuple[TrainState, ...], Batch], tuple[tuple[TrainState, ...], tuple[Metrics, ...]]]:
    """Return the step of students that teach each other: deep mutual learning.

    Each takes its own step with the others, as they were before it, as frozen teachers in eval
    mode. (The paper moves them one after the other and in train mode; here no order counts.)

    Args:
      steps: one per student, from `make_step` with a loss such as `distillation`, of any model and
        compression.
      applies: their models' ``apply``, in eval mode.
      compressions: views through which the students teach; None for the dense params of all.

    Returns:
      ``(states, batch) -> (states, metrics)``, tuples with one entry per student. Each is given the
      others as a `Teacher`, or as `Teachers` if there are several.

    Raises:
      ConfigError: if there are fewer than two students, or not one ``apply`` each.

    Example:
      >>> import optax
      >>> import compress_jax as cj
      >>> def loss(params, model_state, batch, key, teacher, train=True):
      ...     return 0.5 * jnp.square(params["w"] - teacher(batch)).sum(), (model_state, {})
      >>> def make(w):
      ...     variables = {"params": {"w": jnp.full(1, w)}}
      ...     return cj.train.create(variables, cj.identity(), optax.sgd(0.5), jax.random.key(0))
      >>> step = cj.train.make_step(loss, optax.sgd(0.5), cj.identity())
      >>> logits = lambda variables, x: variables["params"]["w"]
      >>> both = cj.train.mutual_step([step, step], [logits, logits])
      >>> (a, b), _ = both((make(0.0), make(4.0)), jnp.ones(1))
      >>> a.params["w"].tolist(), b.params["w"].tolist()
      ([2.0], [2.0])

    References:
      Zhang, Xiang, Hospedales and Lu, "Deep Mutual Learning", CVPR 2018, section 3 (equations 3 to
      6, algorithm 1).
    """
    if len(steps) < 2 or len(applies) != len(steps):
        raise ConfigError(
            f"mutual learning takes two or more steps, and one apply each; got {len(steps)}, "
            f"{len(applies)}"
        )
    views = compressions or [None] * len(steps)

    def step(
        states: tuple[TrainState, ...], batch: Batch
    ) -> tuple[tuple[TrainState, ...], tuple[Metrics, ...]]:
        # All teachers are the students before this step, so that no order counts.
        teachers = [
            Teacher(apply, state.variables(view))
            for apply, state, view in zip(applies, states, views, strict=True)
        ]
        new_states = []
        all_metrics = []
        for i, (own_step, state) in enumerate(zip(steps, states, strict=True)):
            others = tuple(teachers[:i] + teachers[i + 1 :])
            # One alone gives logits without an axis of teachers, which losses on one expect.
            teacher = others[0] if len(others) == 1 else Teachers(others)
            new_state, metrics = own_step(state, batch, teacher=teacher)
            new_states.append(new_state)
            all_metrics.append(metrics)
        return tuple(new_states), tuple(all_metrics)

    return step
