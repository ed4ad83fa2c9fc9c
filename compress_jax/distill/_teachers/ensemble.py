"""Several teachers at once, the hash of a teacher, and the drift of a smaller copy of one."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from compress_jax.core.errors import ShapeError, StateError
from compress_jax.core.packed import unpack
from compress_jax.core.paths import flatten
from compress_jax.core.types import Array, PyTree, Variables
from compress_jax.distill._losses.logits import kl
from compress_jax.distill._losses.tokens import masked_mean
from compress_jax.distill._masks import Mask, fitted, kept
from compress_jax.distill._teachers.fidelity import agreement
from compress_jax.distill._teachers.teacher import Teacher


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Teachers:
    """Several frozen models, each with its own dtype and view; losses get their stacked logits.

    Wrap a loss by `ensembled` to use the mean of the teachers' probabilities, or by `averaged` to
    use the mean of the losses to each teacher.

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
    def variables(self) -> tuple[Variables, ...]:
        """The variables of each member."""
        return tuple(member.variables for member in self.members)

    def __call__(self, *inputs: PyTree) -> jax.Array:
        """Return the logits, float32 ``[teachers, ..., classes]``."""
        return self.forward(*inputs)[0]

    def forward(self, *inputs: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the stacked logits, and features by member and path, such as ``"0/conv_1"``."""
        outputs = [member.forward(*inputs) for member in self.members]
        shapes = [logits.shape for logits, _ in outputs]
        if len(set(shapes)) > 1:
            raise ShapeError(
                "teachers of one student must have its classes, and give logits of one shape; "
                f"got {shapes}"
            )
        # Members may have features of the same path: the member's number goes before it.
        features = {}
        for i, (_, own) in enumerate(outputs):
            features |= {f"{i}/{path}": feature for path, feature in own.items()}
        return jnp.stack([logits for logits, _ in outputs]), features

    def see(self, inputs: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Deprecated: the old name of `forward`."""
        text = "Teachers.see is now Teachers.forward; the old name goes in the next version"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return self.forward(inputs)


def fingerprint(teacher: PyTree) -> jax.Array:
    """Return the SHA-256 of a teacher's arrays: their paths, dtypes, shapes and contents.

    Two teachers with the same hash give the same logits under the same ``apply``. Packed arrays are
    hashed after unpacking, so a teacher read from a file has the hash of the one that was saved.

    Args:
      teacher: a `Teacher`, `Teachers` or a tree of variables; concrete arrays.

    Returns:
      uint8 ``[32]``, an array so that a checkpoint can hold it; zeros where arrays are only traced.
      `hexadecimal` formats it.

    Example:
      >>> hexadecimal(fingerprint({"kernel": jnp.arange(3.0)}))[:12]
      '3b5366a2e32a'
    """
    digest = hashlib.sha256()
    leaves, _ = flatten(unpack(getattr(teacher, "variables", teacher)))
    # Traced on shapes, as a plan is, there is nothing to hash.
    if any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in leaves.values()):
        return jnp.zeros(32, jnp.uint8)
    # Sorted, so that the hash does not depend on the order in which a tree lists its leaves.
    for path, leaf in sorted(leaves.items()):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return jnp.asarray(np.frombuffer(digest.digest(), np.uint8))


def hexadecimal(fingerprint: Array) -> str:
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


def require_same(memory: Mapping[str, PyTree], teacher: PyTree) -> None:
    """Raise unless a resumed run is given the teacher that it started with.

    Args:
      memory: the ``state.memory`` of a run whose loss is `compress_jax.train.distillation`.
      teacher: the teacher now at hand.

    Raises:
      StateError: if the hashes differ; the message has both.

    Example:
      >>> require_same({"teacher": fingerprint({"w": jnp.ones(1)})}, {"w": jnp.ones(1)})
    """
    expected = hexadecimal(memory["teacher"])
    actual = hexadecimal(fingerprint(teacher))
    if expected != actual:
        raise StateError(
            f"this run began with teacher {expected[:16]}, and is given {actual[:16]}: restore the "
            "first one"
        )


class Drift(NamedTuple):
    """The difference between the predictions of two models.

    Attributes:
      largest: the largest difference of logits.
      kl: mean divergence of the predictions, in nats.
      agreement: share of equal predictions.

    Example:
      >>> def linear(variables, x):
      ...     return x @ variables["params"]["kernel"]
      >>> full = Teacher(linear, {"params": {"kernel": jnp.eye(3)}})
      >>> change = drift(full, full, jnp.eye(3))
      >>> change.largest.tolist(), change.kl.tolist(), change.agreement.tolist()
      (0.0, 0.0, 1.0)
    """

    largest: jax.Array
    kl: jax.Array
    agreement: jax.Array


def drift(teacher: Teacher, reference: Teacher, inputs: PyTree, mask: Mask | None = None) -> Drift:
    """Return how far a teacher in a smaller dtype, or with packed weights, is from the original.

    Args:
      teacher: the smaller copy.
      reference: the original, in float32.
      inputs: a batch.
      mask: which examples or tokens count, see `masks`.

    Returns:
      A `Drift` of float32 scalars.

    Example:
      >>> def linear(variables, x):
      ...     return x @ variables["params"]["kernel"].astype(x.dtype)
      >>> full = Teacher(linear, {"params": {"kernel": jnp.eye(3)}})
      >>> drift(full.cast(jnp.bfloat16), full, jnp.eye(3)).agreement.tolist()
      1.0
    """
    own = teacher(inputs)  # [..., classes]
    other = reference(inputs)
    leading = own.shape[:-1]
    counts = jnp.ones(leading)
    if mask is not None:
        counts = fitted(mask, leading, "the logits", examples=True)
    # Logits of padding may be NaN, and neither maximum nor mean may see them.
    own = kept(own, counts)
    other = kept(other, counts)
    return Drift(
        largest=jnp.abs(own - other).max(),
        kl=masked_mean(kl(own, other), counts),
        agreement=masked_mean(agreement(own, other), counts),
    )
