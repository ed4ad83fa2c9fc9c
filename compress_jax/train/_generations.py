"""Students that become teachers: born again, by assistants, or of each other. Each is a pure function of states."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression
from compress_jax.core.errors import ConfigError
from compress_jax.core.types import Batch
from compress_jax.distill import Teacher, Teachers
from compress_jax.train._state import TrainState
from compress_jax.train._step import Metrics, Step

Apply = Callable[..., Any]


def as_teacher(state: TrainState, apply: Apply, compression: Compression | None = None) -> Teacher:
    """Return a trained student as the frozen teacher of the next: the transition between two stages of training.

    Born-again networks: ``teacher = as_teacher(train(teacher), model.apply)``, again and again, and
    all of them together are `compress_jax.distill.Teachers`. Teacher assistants: the same with a
    smaller model at each stage. A stage that is trained in a directory of its own is not trained
    again when the chain is resumed, and `require_same` tells if the teacher before it has changed.

    Args:
      state: after the last step.
      apply: of its model, in eval mode; see `Teacher`.
      compression: the teacher is what it shows; None for the dense params.

    Returns:
      A `Teacher` with arrays of its own, so that the next stage may donate the state.

    Example:
      >>> import optax
      >>> from compress_jax.core.compression import identity
      >>> from compress_jax.train import create
      >>> state = create({"params": {"w": jnp.eye(2)}}, identity(), optax.sgd(0.1), jax.random.key(0))
      >>> as_teacher(state, lambda variables, x: x @ variables["params"]["w"])(jnp.ones((1, 2))).tolist()
      [[1.0, 1.0]]

    References:
      Furlanello et al., "Born-Again Neural Networks", ICML 2018, section 3. Mirzadeh et al.,
      "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020, section 3.
    """
    return Teacher(
        apply, jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state.variables(compression))
    )


def mutual_step(
    steps: Sequence[Step],
    applies: Sequence[Apply],
    compressions: Sequence[Compression | None] | None = None,
) -> Callable[[tuple[TrainState, ...], Any], tuple[tuple[TrainState, ...], tuple[Metrics, ...]]]:
    """Return the step of students that teach each other, all at once: deep mutual learning.

    Each takes its own step with the others, as they were before it, as frozen teachers in eval
    mode. (The paper moves them one after the other and in train mode; here no order counts.)

    Args:
      steps: one a student, from `make_step` with a loss such as `distillation`, of any model and
        compression.
      applies: their models' ``apply``, in eval mode.
      compressions: what each is seen through as a teacher; None for the dense params of all.

    Returns:
      ``(states, batch) -> (states, metrics)``, tuples of one a student; the others come as a
      `Teacher` where there is one, as `Teachers` where there are several.

    Raises:
      ConfigError: if there are fewer than two students, or not one ``apply`` each.

    Example:
      >>> import optax
      >>> from compress_jax.core.compression import identity
      >>> from compress_jax.train import create, make_step
      >>> def loss(params, model_state, batch, key, teacher, train=True):
      ...     return 0.5 * jnp.square(params["w"] - teacher(batch)).sum(), (model_state, {})
      >>> make = lambda w: create({"params": {"w": jnp.full(1, w)}}, identity(), optax.sgd(0.5), jax.random.key(0))
      >>> step = make_step(loss, optax.sgd(0.5), identity())
      >>> both = mutual_step([step, step], [lambda variables, x: variables["params"]["w"]] * 2)
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
    seen_through = compressions or [None] * len(steps)

    def step(
        states: tuple[TrainState, ...], batch: Batch
    ) -> tuple[tuple[TrainState, ...], tuple[Metrics, ...]]:
        each = zip(applies, states, seen_through, strict=True)
        teachers = [
            Teacher(apply, state.variables(compression)) for apply, state, compression in each
        ]
        out = []
        for i, (own, state) in enumerate(zip(steps, states, strict=True)):
            others = tuple(teachers[:i] + teachers[i + 1 :])
            out.append(
                own(state, batch, teacher=others[0] if len(others) == 1 else Teachers(others))
            )
        return tuple(state for state, _ in out), tuple(metrics for _, metrics in out)

    return step
