"""The factored Hessian of a layer's squared output error: what solvers that compensate for errors start from."""

import jax
import jax.numpy as jnp


def upper_factor(h: jax.Array) -> jax.Array:
    r"""Return the upper triangular A with :math:`A A^\top = H`: the Cholesky factor of H read backwards.

    Its inverse is the upper Cholesky factor of :math:`H^{-1}`.

    Args:
      h: symmetric positive definite ``[k, k]``.

    Returns:
      ``[k, k]``; NaN if ``h`` is not positive definite.

    Example:
      >>> a = upper_factor(jnp.array([[5.0, 2.0], [2.0, 1.0]]))
      >>> a.tolist(), (a @ a.T).tolist()
      ([[1.0, 2.0], [0.0, 1.0]], [[5.0, 2.0], [2.0, 1.0]])
    """
    return jax.lax.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]


def damped_hessian(gram: jax.Array, damping: jax.Array, inputs: int) -> tuple[jax.Array, jax.Array]:
    r"""Return :math:`H = 2 G + \lambda I`, and which inputs were always zero; these stand alone, with 1 on the diagonal.

    Args:
      gram: ``[k, k]``, the mean of x x^T over calibration rows.
      damping: :math:`\lambda` as a share of the mean of the diagonal of ``2 G``.
      inputs: how many of the k there are; others are padding, which is always zero.

    Returns:
      ``([k, k], bool [k])``.

    Example:
      >>> h, dead = damped_hessian(jnp.diag(jnp.array([1.0, 0.0])), jnp.float32(0.5), 2)
      >>> h.tolist(), dead.tolist()
      ([[2.5, 0.0], [0.0, 1.0]], [False, True])
    """
    diagonal = 2 * jnp.diagonal(gram)
    dead = diagonal == 0
    added = jnp.where(dead, 1.0, damping * diagonal.sum() / inputs)
    return jnp.where(jnp.eye(len(gram), dtype=bool), 2 * gram + added[None], 2 * gram), dead
