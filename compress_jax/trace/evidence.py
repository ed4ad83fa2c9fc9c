"""What calibration says nothing about, in words: matrices that it never reached, inputs that were always zero."""

import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import NonFiniteError
from compress_jax.trace.matrix import Problem

MOST = 6  # names in one sentence


def unit(gram: jax.Array) -> jax.Array:
    """Return Gram matrices, each divided by the power of two that brings its largest entry into [1/2, 1).

    Which solution is best does not depend on it, and nothing overflows or underflows that need not.

    Args:
      gram: float32 ``[batch, k, k]``.

    Returns:
      The like; matrices of zeros stay as they are.

    Example:
      >>> unit(jnp.array([[[2.0**120]], [[2.0**-110]], [[0.0]]])).ravel().tolist()
      [0.5, 0.5, 0.0]
    """
    largest = jnp.diagonal(gram, axis1=1, axis2=2).max(1)
    exponent = jnp.frexp(largest)[1]
    return jnp.ldexp(gram, -exponent[:, None, None])


def notes(problem: Problem, path: str, instead: str) -> list[str]:
    """Say which matrices of a problem calibration never reached, and how many inputs of the others were always zero.

    Args:
      problem: of the parameter.
      path: of the parameter.
      instead: what was done to weights that nothing is known of.

    Returns:
      Sentences; none where all was seen.

    Example:
      >>> from compress_jax.trace import calibrate, gram
      >>> from compress_jax.trace.matrix import problems
      >>> params, x = {"w": jnp.ones((2, 3, 4))}, jnp.array([[[1.0, 2.0, 0.0]], [[0.0, 0.0, 0.0]]])
      >>> seen = calibrate(lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"]), gram(), params, [x])
      >>> for note in notes(problems(seen, params)[0]["w"][0], "w", "rounded to nearest"): print(note)
      calibration never reached w[1]: rounded to nearest
      inputs that were always zero, 1 of 3 of w[0]: rounded to nearest
    """
    dead = np.asarray(problem.dead.sum(1))
    if not dead.any():
        return []
    names, k = problem.names(path), problem.form.k
    never = [name for name, n in zip(names, dead, strict=True) if n == k]
    some = [f"{n} of {k} of {name}" for name, n in zip(names, dead, strict=True) if 0 < n < k]
    found = [f"calibration never reached {listed(never)}: {instead}"] if never else []
    return found + ([f"inputs that were always zero, {listed(some)}: {instead}"] if some else [])


def listed(names: Sequence[str]) -> str:
    """Return names as a list in words, a number in the place of those beyond the first few.

    Example:
      >>> listed(["a", "b"]), listed([str(i) for i in range(9)])
      ('a, b', '0, 1, 2, 3, 4, 5 and 3 more')
    """
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def unused(problems: Sequence[Problem]) -> int:
    """Return how many entries of a parameter are in none of its problems."""
    return math.prod(problems[0].box.shape) - sum(math.prod(each.box.sizes) for each in problems)


def asides(problems: Sequence[Problem], instead: str) -> list[str]:
    """Say what the problems of a parameter leave out: entries in no product, operations on its way."""
    left, changed = unused(problems), sorted({name for each in problems for name in each.changed})
    found = [f"{left} of its entries are in no calibrated product: {instead}"] if left else []
    how = ", ".join(changed)
    return found + ([f"it is changed on its way ({how}) and was solved as if it were not"] if changed else [])


def not_better(names: Sequence[str], won: jax.Array, same: jax.Array) -> str:
    """Say which matrices a solver did not make better than plain rounding or magnitude does; empty if none."""
    worse = [name for name, won, same in zip(names, won.tolist(), same.tolist(), strict=True) if not (won or same)]
    return f"solved no better than that, {listed(worse)}" if worse else ""


def judge(problem: Problem, others: Sequence[Problem], filled: bool = False) -> jax.Array:
    """Return the Gram matrices that solutions are judged by.

    Args:
      problem: what was solved.
      others: held-out problems of the same parameter; the same one among them counts where it has seen anything.
      filled: whether inputs that were never seen count as average ones.

    Returns:
      float32 ``[batch, k, k]``, in units of their own.
    """
    own = problem.filled if filled else problem.gram
    for other in others:
        if (other.box, other.form) == (problem.box, problem.form):
            return unit(jnp.where(other.dead.all(1)[:, None, None], own, other.filled if filled else other.gram))
    return unit(own)


def check_finite(path: str, problems: Iterable[Problem]) -> None:
    """Refuse statistics that hold NaN or infinity, naming the parameter."""
    for problem in problems:
        if not bool(jnp.isfinite(problem.gram).all()):
            raise NonFiniteError(
                f"the calibration statistics of {path!r} hold NaN or infinity; look at the calibration batches"
            )
