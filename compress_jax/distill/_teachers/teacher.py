"""The frozen teacher: a function and its variables, which are an argument of the training step."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from compress_jax.core.packed import unpack
from compress_jax.core.types import DType, ModelFn, PyTree, Variables


def cast(variables: Variables, dtype: DType) -> Variables:
    """Return a tree with its floating-point arrays in another dtype; others stay as they are.

    Args:
      variables: any tree of arrays.
      dtype: a floating dtype such as ``jnp.bfloat16``.

    Returns:
      The tree.

    Example:
      >>> tree = cast({"kernel": jnp.ones(2), "count": jnp.array(3)}, jnp.bfloat16)
      >>> tree["kernel"].dtype.name, tree["count"].dtype.name
      ('bfloat16', 'int32')
    """

    def one(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

    return jax.tree.map(one, variables)


def at_least_float32(logits: jax.Array) -> jax.Array:
    """Return logits in float32; float64 ones stay as they are.

    Example:
      >>> at_least_float32(jnp.ones(1, jnp.bfloat16)).dtype.name
      'float32'
    """
    return logits if logits.dtype.itemsize > 4 else logits.astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Teacher:
    """A frozen model: call it on inputs, get float32 logits without gradient.

    It is a pytree whose leaves are the variables, so it goes into a jitted step as an argument: its
    arrays are neither compiled into the program nor donated, and take whatever sharding they are
    placed with. Two teachers of the same ``apply`` share one compiled step.

    Attributes:
      apply: ``(variables, *inputs) -> logits`` in eval mode: Linen's ``model.apply`` for modules
        whose ``train`` is False by default; or ``-> (logits, features by path)``, as `capture`
        returns it. Define it once; a new lambda for each call would compile the step anew.
      variables: what ``apply`` takes first, such as ``{"params": ..., "batch_stats": ...}``. Leaves
        may be packed: 8-bit weights stay so in memory, and what ``load`` reads of a file is a
        teacher as it is.
      view: ``(*inputs) -> inputs``, applied to the student's inputs first, such as a resize to the
        teacher's resolution; None for the inputs as they are.

    Example:
      >>> def linear(variables, x):
      ...     return x @ variables["params"]["kernel"]
      >>> teacher = Teacher(linear, {"params": {"kernel": jnp.eye(2)}})
      >>> jax.jit(lambda teacher, x: teacher(x))(teacher, jnp.array([[1.0, 2.0]])).tolist()
      [[1.0, 2.0]]
    """

    # Static fields are compared when a step is called: equal functions share one compiled program.
    apply: ModelFn = field(metadata={"static": True})
    variables: Variables
    view: Callable[[PyTree], PyTree] | None = field(default=None, metadata={"static": True})

    def __call__(self, *inputs: PyTree) -> jax.Array:
        """Return the logits of some inputs, float32 ``[..., classes]``."""
        return self.forward(*inputs)[0]

    def forward(self, *inputs: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the logits, float32 ``[..., classes]``, and the captured features by path."""
        if self.view is not None:
            seen = self.view(*inputs)
            inputs = seen if isinstance(seen, tuple) else (seen,)
        # Cut off twice: at the variables, so that no activations are kept for a backward pass, and
        # at the outputs, as the inputs may carry gradients.
        variables = unpack(jax.lax.stop_gradient(self.variables))
        out = jax.lax.stop_gradient(self.apply(variables, *inputs))
        logits, features = out if isinstance(out, tuple) else (out, {})
        return at_least_float32(logits), features

    def see(self, inputs: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Deprecated: the old name of `forward`."""
        text = "Teacher.see is now Teacher.forward; the old name goes in the next version"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return self.forward(inputs)

    def cast(self, dtype: DType) -> "Teacher":
        """Return the teacher with its ``"params"`` stored in another dtype.

        Half the memory for bfloat16; batch statistics stay. The dtype of the computation is the
        model's own option (Linen's ``dtype``).

        Args:
          dtype: a floating dtype such as ``jnp.bfloat16``.

        Returns:
          A new Teacher; if its variables have no ``"params"``, all of them are cast.
        """
        if not isinstance(self.variables, dict) or "params" not in self.variables:
            return replace(self, variables=cast(self.variables, dtype))
        params = cast(self.variables["params"], dtype)
        return replace(self, variables={**self.variables, "params": params})
