"""The ways to solve a leaf that `solve` chooses from, and how they are judged."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState
from compress_jax.core.types import Leaf, Params
from compress_jax.layerwise._clip import clip
from compress_jax.layerwise._gptq import gptq
from compress_jax.layerwise._problem import MatrixForm, Problem, column_errors
from compress_jax.layerwise._result import Rewritten
from compress_jax.trace import Calibration, Reducer, gram

Method: TypeAlias = Callable[..., Rewritten]
"""``(params, calibration, compression, state, held_out=...) -> Rewritten``: `quantize.gptq`."""

NEAREST = "nearest"
HIGHEST = jax.lax.Precision.HIGHEST
REDUCERS: dict[str, Reducer] = {"alike": gram(normalize=True), "plain": gram()}


class Candidate(NamedTuple):
    """A way to solve leaves.

    Attributes:
      name: what notes and tables call it.
      method: the solver.
      rows: the name of the statistics that it sees.
      compensated: whether it rounds weights that make up for errors of earlier blocks.
    """

    name: str
    method: Method
    rows: str
    compensated: bool = False

    @property
    def damping(self) -> float | None:
        """The damping that the method starts from, if it has one."""
        known = inspect.signature(self.method).parameters.get("damping")
        return None if known is None else known.default


def clipped_gptq(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState,
    *,
    damping: float = 0.01,
    held_out: Calibration | None = None,
) -> Rewritten:
    """Solve by GPTQ in activation order, under scales whose ranges `clip` has cut."""
    cut = clip(params, calibration, compression).state
    return ORDERED(params, calibration, compression, cut, damping=damping, held_out=held_out)


ORDERED = partial(gptq, act_order=True)
BY_DEFAULT = (
    Candidate("gptq, alike", ORDERED, "alike"),
    Candidate("gptq, plain", ORDERED, "plain"),
    Candidate("clip + gptq", clipped_gptq, "alike"),
)


def candidates(
    method: Method | Mapping[str, Method] | None, rows: Sequence[str], compensate: bool
) -> list[Candidate]:
    """Return the candidates beside rounding to nearest, the compensated ones last."""
    if method is None:
        found = [each for each in BY_DEFAULT if each.rows in rows]
    else:
        methods = method if isinstance(method, Mapping) else {"": method}
        found = []
        for name, own in methods.items():
            for row in rows:
                words = [word for word in (name, row if len(rows) > 1 else "") if word]
                found.append(Candidate(", ".join(words) or "solved", own, row))
    if not compensate:
        return found
    return found + [each._replace(name=f"{each.name}, comp.", compensated=True) for each in found]


class Judged(NamedTuple):
    r"""By what a problem's solutions are judged: an input x, and the exact one :math:`x_f`.

    Attributes:
      problem: of the leaf.
      gram: ``[batch, k, k]``, the mean of :math:`x x^\top` over held-out rows.
      cross: likewise of :math:`x (x - x_f)^\top`; None if earlier blocks count as exact.
      residual: likewise of :math:`(x - x_f) (x - x_f)^\top`.
    """

    problem: Problem
    gram: jax.Array
    cross: jax.Array | None = None
    residual: jax.Array | None = None


def judged(
    own: Sequence[Problem],
    held_out: Sequence[Problem],
    cross: Sequence[Problem] = (),
    residual: Sequence[Problem] = (),
) -> list[Judged]:
    """Return by what each problem of a leaf is judged.

    Matrices that held-out batches did not reach are judged by the calibration's own inputs.
    """
    found = []
    for problem in own:
        other = _same_part(problem, held_out)
        grams = problem.gram
        if other is not None:
            grams = jnp.where(other.dead.all(1)[:, None, None], grams, other.gram)
        parts = [_same_part(problem, each) for each in (cross, residual)]
        known = [None if each is None else each.gram for each in parts]
        found.append(Judged(problem, grams, *known))
    return found


def _same_part(problem: Problem, others: Sequence[Problem]) -> Problem | None:
    for other in others:
        if (other.box, other.form) == (problem.box, problem.form):
            return other
    return None


def relative_error(old: Leaf, new: Leaf, judges: Sequence[Judged]) -> float:
    r"""Return the mean squared error of a leaf's outputs, as a share of their mean square.

    It is :math:`E |x^\top \hat W - x_f^\top W|^2 / E |x^\top W|^2` over the held-out rows.

    Args:
      old: the weights W.
      new: their replacement.
      judges: of the leaf's problems.

    Returns:
      The share; 0 for outputs that are always zero.
    """
    error = energy = 0.0
    for each in judges:
        take = each.problem.box.take
        found = _squares(
            take(new), take(old), each.gram, each.cross, each.residual, each.problem.form
        )
        error += float(found[0])
        energy += float(found[1])
    return error / energy if energy else 0.0


@partial(jax.jit, static_argnames="form")
def _squares(
    new: jax.Array,
    old: jax.Array,
    gram: jax.Array,
    cross: jax.Array | None,
    residual: jax.Array | None,
    form: MatrixForm,
) -> tuple[jax.Array, jax.Array]:
    """Return the squared error of a leaf's outputs, and their square."""
    w = form.matrices(old.astype(jnp.float32))  # [batch, k, n]
    delta = form.matrices(new.astype(jnp.float32)) - w
    error = column_errors(delta, gram).sum()
    # x W' - x_f W = x (W' - W) + (x - x_f) W
    if cross is not None and residual is not None:
        missing = jnp.einsum("bkl,bln->bkn", cross, w, precision=HIGHEST)
        error += 2 * (missing * delta).sum() + column_errors(w, residual).sum()
    return error, column_errors(w, gram).sum()


def compensated(
    x: Leaf, own: Sequence[Problem], cross: Sequence[Problem], alpha: float, damping: float = 0.01
) -> Leaf:
    r"""Return the weights that make up for errors of earlier blocks, before any rounding.

    The outputs :math:`X_f W` of the exact inputs are closest to those of the inputs X at
    :math:`W' = (X^\top X + \lambda I)^{-1} X^\top X_f W`; returned is
    :math:`W + \alpha (W' - W)`, but for the damping that only pulls towards zero:
    :math:`W - \alpha (X^\top X + \lambda I)^{-1} X^\top (X - X_f) W`.

    Args:
      x: the weights W.
      own: their problems, with the means of :math:`x x^\top`.
      cross: likewise with those of :math:`x (x - x_f)^\top`.
      alpha: how much of the correction is made.
      damping: :math:`\lambda` as a share of the mean of the diagonal of :math:`X^\top X`.

    Returns:
      Weights of the same shape and dtype. Matrices that cannot be corrected stay.

    References:
      Arai and Ichikawa, "Quantization Error Propagation", 2025, arXiv:2504.09629. Li et al.,
      "GPTAQ", 2025, arXiv:2504.02692.
    """
    for problem in own:
        missing = _same_part(problem, cross)
        if missing is not None:
            part = problem.box.take(x)
            new = _corrected(part, problem.gram, missing.gram, alpha, damping, problem.form)
            x = problem.box.put(x, new)
    return x


@partial(jax.jit, static_argnames="form")
def _corrected(
    x: jax.Array, gram: jax.Array, cross: jax.Array, alpha: float, damping: float, form: MatrixForm
) -> jax.Array:
    w = form.matrices(x.astype(jnp.float32))  # [batch, k, n]
    mean = jnp.trace(gram, axis1=1, axis2=2) / form.k  # [batch]
    eye = jnp.eye(form.k, dtype=jnp.float32)[None]
    added = jnp.where(mean > 0, damping * mean, 1.0)  # any will do for matrices without inputs
    missing = jnp.einsum("bkl,bln->bkn", cross, w, precision=HIGHEST)
    factor = jax.scipy.linalg.cho_factor(gram + added[:, None, None] * eye)
    correction = jax.scipy.linalg.cho_solve(factor, missing)
    new = w - alpha * correction
    return form.stored(jnp.where(jnp.isfinite(new), new, w)).astype(x.dtype)
