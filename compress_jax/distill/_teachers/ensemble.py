"""More about teachers: several of them, who they are, and how far a smaller copy of one is from itself."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ShapeError, StateError
from compress_jax.core.packed import unpack
from compress_jax.core.paths import flatten
from compress_jax.core.types import PyTree
from compress_jax.distill._losses.logits import kl
from compress_jax.distill._losses.tokens import masked_mean
from compress_jax.distill._masks import fitted, kept
from compress_jax.distill._teachers.fidelity import agreement
from compress_jax.distill._teachers.teacher import Teacher


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Teachers:
    """Several frozen models, each with its own dtype and view; losses get their stacked logits.

    `ensembled` makes of a loss one of the mean of their probabilities, `averaged` the mean of the
    losses of each.

    Attributes:
      members: the teachers.

    Example:
      >>> def linear(variables, x):
      ...     return x @ variables["params"]["kernel"]
      >>> both = Teachers((Teacher(linear, {"params": {"kernel": jnp.eye(2)}}),) * 2)
      >>> both(jnp.ones((3, 2))).shape
      (2, 3, 2)
    """

    members: tuple[Teacher, ...]

    @property
    def variables(self) -> tuple[Any, ...]:
        """Of each."""
        return tuple(member.variables for member in self.members)

    def __call__(self, inputs: PyTree) -> jax.Array:
        """Return the logits, float32 ``[teachers, ..., classes]``."""
        return self.see(inputs)[0]

    def see(self, inputs: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the logits, and the features as ``"0/path"`` of the first, ``"1/path"`` of the second."""
        seen = [member.see(inputs) for member in self.members]
        shapes = [logits.shape for logits, _ in seen]
        if len(set(shapes)) > 1:
            raise ShapeError(
                "teachers of one student must have its classes, and give logits of one shape; "
                f"got {shapes}"
            )
        features = {
            f"{i}/{path}": x for i, (_, found) in enumerate(seen) for path, x in found.items()
        }
        return jnp.stack([logits for logits, _ in seen]), features


def fingerprint(teacher: Any) -> jax.Array:
    """Return who a teacher is: the SHA-256 of its arrays, by path, dtype, shape and content.

    Two teachers with the same hash give the same logits under the same ``apply``. Arrays that are
    packed are hashed as what they unpack to, so that a file's teacher is the one that was saved.

    Args:
      teacher: a `Teacher`, `Teachers` or a tree of variables; concrete arrays.

    Returns:
      uint8 ``[32]``, an array so that it is kept in a checkpoint. `hexadecimal` makes text of it.

    Example:
      >>> hexadecimal(fingerprint({"kernel": jnp.arange(3.0)}))[:12]
      '3b5366a2e32a'
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(unpack(getattr(teacher, "variables", teacher)))[0].items()):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return jnp.asarray(np.frombuffer(digest.digest(), np.uint8))


def hexadecimal(fingerprint: Any) -> str:
    """Return a hash as 64 hexadecimal digits.

    Args:
      fingerprint: uint8 ``[32]``.

    Returns:
      Text.

    Example:
      >>> hexadecimal(np.zeros(32, np.uint8))[:4]
      '0000'
    """
    return bytes(np.asarray(fingerprint, np.uint8)).hex()


def require_same(memory: Mapping[str, Any], teacher: Any) -> None:
    """Raise unless a run's teacher is the one that it began with: to be called when one is resumed.

    Args:
      memory: of a state whose loss is `compress_jax.train.distillation`.
      teacher: the one at hand.

    Raises:
      StateError: if it is another, with both hashes.

    Example:
      >>> require_same({"teacher": fingerprint({"w": jnp.ones(1)})}, {"w": jnp.ones(1)})
    """
    began, now = hexadecimal(memory["teacher"]), hexadecimal(fingerprint(teacher))
    if began != now:
        raise StateError(
            f"this run began with teacher {began[:16]}, and is given {now[:16]}: restore the "
            "first one"
        )


class Drift(NamedTuple):
    """How far one model's predictions are from another's.

    Attributes:
      largest: the largest difference of logits.
      kl: mean divergence of the predictions, in nats.
      agreement: share of equal predictions.
    """

    largest: jax.Array
    kl: jax.Array
    agreement: jax.Array


def drift(teacher: Teacher, reference: Teacher, inputs: PyTree, mask: Any = None) -> Drift:
    """Return how far a teacher in a smaller dtype, or with packed weights, is from the original.

    Args:
      teacher: the smaller one.
      reference: in float32.
      inputs: a batch.
      mask: which examples or tokens of it count, see `masks`.

    Returns:
      A `Drift` of float32 scalars.

    Example:
      >>> def linear(variables, x):
      ...     return x @ variables["params"]["kernel"].astype(x.dtype)
      >>> full = Teacher(linear, {"params": {"kernel": jnp.eye(3)}})
      >>> drift(full.cast(jnp.bfloat16), full, jnp.eye(3)).agreement.tolist()
      1.0
    """
    own, other = teacher(inputs), reference(inputs)
    counts = (
        jnp.ones(own.shape[:-1])
        if mask is None
        else fitted(mask, own.shape[:-1], "the logits", examples=True)
    )
    own, other = kept(own, counts), kept(other, counts)
    means = (masked_mean(each(own, other), counts) for each in (kl, agreement))
    return Drift(jnp.abs(own - other).max(), *means)
