"""Distillation of weights, for students of the teacher's own shapes."""

import jax
import jax.numpy as jnp

from compress_jax.core import ShapeError, unpack
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.types import Params, PyTree
from compress_jax.distill._teachers.teacher import at_least_float32


def l2_sp(student_params: Params, teacher_params: Params, pattern: Patterns = "**") -> jax.Array:
    """Return half the squared distance of the student's weights from the teacher's, in float32.

    ``sum over leaves of 1/2 * ||theta_s - theta_t||**2``: weight decay towards the teacher instead
      of towards zero.

    Args:
      student_params: tree of arrays, such as what a compression's ``view`` returns.
      teacher_params: tree of arrays or packed nodes; no gradient goes here.
      pattern: glob or globs of the leaves to compare, in both trees. Leaves that are not
        floating-point do not count.

    Returns:
      A scalar: one number for the model, to be added to the mean over examples of other losses,
      times a weight (0.01 in the paper, and there a second weight for the leaves that have no
      counterpart).

    Raises:
      ShapeError: if a leaf is in one tree only or its shapes differ; the message lists all of
        these.
      NoMatchError: if the pattern matches nothing.

    Example:
      >>> l2_sp({"kernel": jnp.array([1.0, 3.0])}, {"kernel": jnp.array([1.0, 1.0])}).tolist()
      2.0

    References:
      Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
      Networks", ICML 2018, section 3 (L2-SP).
    """
    student, teacher = (_floating(tree) for tree in (student_params, teacher_params))
    paths = match(pattern, [*student, *(path for path in teacher if path not in student)])
    # All differences are listed at once; leaves of one tree only are among them.
    unmatched = [_difference(path, student, teacher) for path in paths]
    if any(unmatched):
        listing = "\n  ".join(line for line in unmatched if line)
        raise ShapeError(
            "leaves of student and teacher do not match; choose those that do by `pattern`:\n  "
            f"{listing}"
        )
    return jnp.stack([_half_square(student[path], teacher[path]) for path in paths]).sum()


def _floating(tree: PyTree) -> dict[str, jax.Array]:
    leaves, _ = flatten(unpack(tree))
    # Integers, such as a step counter, have no distance that training could shrink.
    return {
        path: leaf
        for path, leaf in leaves.items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }


def _difference(path: str, student: dict[str, jax.Array], teacher: dict[str, jax.Array]) -> str:
    shapes = [
        str(jnp.shape(leaves[path])) if path in leaves else "missing"
        for leaves in (student, teacher)
    ]
    return "" if shapes[0] == shapes[1] else f"{path}: student {shapes[0]}, teacher {shapes[1]}"


def _half_square(student: jax.Array, teacher: jax.Array) -> jax.Array:
    target = jax.lax.stop_gradient(at_least_float32(teacher))
    return 0.5 * jnp.square(at_least_float32(student) - target).sum()
