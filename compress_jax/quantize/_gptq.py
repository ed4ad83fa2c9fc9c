"""GPTQ: round one input at a time and let the inputs that are left make up for the error."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from compress_jax.core.compression import Compression, CompressionState, Params, Pointwise
from compress_jax.core.errors import NonFiniteError
from compress_jax.core.paths import flatten
from compress_jax.quantize.solved import Solved
from compress_jax.trace import Calibration
from compress_jax.trace.matrix import Problem, problems

HIGHEST = jax.lax.Precision.HIGHEST
TRIES, LEAST = 6, 1e-4
UNSPLIT = 1024  # so many inputs are solved without splitting them in halves
Solution = tuple[jax.Array, jax.Array]  # rounded weights; what each input's error is, divided by U's diagonal


def gptq(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState | None = None,
    *,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = False,
) -> Solved:
    r"""Round weights so that the layers' outputs, not the weights, stay close, by second-order error compensation.

    With :math:`H = 2 X^\top X / m + \lambda I` and the upper Cholesky factor U of its inverse, each input i in turn is
    rounded to :math:`q_i`, and :math:`w_{j} \mathrel{-}= U_{ij} (w_i - q_i) / U_{ii}` for all j > i. The scales (and masks,
    in a chain) are those of the compression's state; any grid, floating format or granularity that sees weights entry by
    entry will do. All sites that `calibrate` saw: dense, einsum, attention projections, convolutions, experts, scanned
    layers, which are solved side by side.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: what the weights are to be seen through.
      state: its state; by default ``compression.init(params)``.
      damping: :math:`\lambda` as a share of the mean of H's diagonal. If H cannot be factored it is raised tenfold, up to
        five times; a note says so.
      block: inputs after which the error is carried to all that are left.
      act_order: take inputs in the order of falling H's diagonal.

    Returns:
      ``Solved``: exact under the compression. Leaves without calibration are rounded to nearest and listed.

    Raises:
      NonFiniteError: if calibration or weights are not finite, or no damping makes H positive definite.

    Example:
      >>> from compress_jax.quantize import output_error, uniform
      >>> from compress_jax.trace import calibrate, gram
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(keys[0], (256, 8)) @ jax.random.normal(keys[1], (8, 8))
      >>> params = {"kernel": jax.random.normal(keys[2], (8, 4))}
      >>> seen = calibrate(lambda p, x: x @ p["kernel"], gram(), params, [x])
      >>> solved = gptq(params, seen, uniform(bits=3, granularity="channel"))
      >>> nearest = uniform(bits=3, granularity="channel").view(params, solved.state)
      >>> error = lambda p: output_error(params["kernel"], p["kernel"], x.T @ x / 256)
      >>> bool(error(solved.params) < 0.7 * error(nearest))
      True

    References:
      Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ", 2023, arXiv:2210.17323, algorithm 1.
    """
    state = compression.init(params) if state is None else state
    leaves, rebuild = flatten(params)
    tasks, skipped = problems(calibration, leaves)
    notes: dict[str, str] = {}
    new = dict(leaves)
    for path, see in compression.pointwise(params, state).items():
        if path not in tasks:
            skipped.setdefault(path, "no calibrated site uses it")
            continue
        new[path], used = _leaf(path, leaves[path], see, tasks[path], damping, block, act_order)
        if used != damping:
            notes[path] = f"damping was raised from {damping:g} to {used:g} to factor the Hessian"
    left = {path: why for path, why in compression.skipped(params).items()}
    return Solved(compression.view(rebuild(new), state), state, left | skipped, notes)


def _leaf(
    path: str, x: jax.Array, how: Pointwise, problem: Problem, damping: float, block: int, act_order: bool
) -> tuple[jax.Array, float]:
    """Solve one leaf, raising the damping until its Hessians can be factored."""
    matrices = [problem.form.matrices(each) for each in (x.astype(jnp.float32), *how.operands)]
    for attempt in range(TRIES):
        used = damping if attempt == 0 else max(damping, LEAST) * 10**attempt
        solved, factored = _solve(matrices[0], matrices[1:], problem.gram, used, how.see, block, act_order)
        if bool(factored.all()):
            return problem.form.stored(solved).astype(x.dtype), used
    raise NonFiniteError(
        f"GPTQ cannot solve {path!r}: its weights or calibration statistics are not finite, or its Hessian is not positive "
        f"definite even with damping {used:g}; look at the calibration batches, or raise `damping`"
    )


@partial(jax.jit, static_argnames=("see", "block", "act_order"))
def _solve(
    w: jax.Array,
    operands: list[jax.Array],
    gram: jax.Array,
    damping: Any,
    see: Callable[..., Any],
    block: int,
    act_order: bool,
) -> tuple[jax.Array, jax.Array]:
    """Solve all matrices of a leaf, one after the other; ``[batch, k, n]``, and ``[batch]`` whether it worked."""

    def one(each: Any) -> tuple[jax.Array, jax.Array]:
        return _matrix(each[0], each[1], each[2], damping, see, block, act_order)

    return jax.lax.map(one, (w, operands, gram))


def _matrix(
    w: jax.Array, operands: Any, gram: jax.Array, damping: Any, see: Callable[..., Any], block: int, act_order: bool
) -> tuple[jax.Array, jax.Array]:
    """Solve one matrix ``[k, n]``; a Hessian that is not positive definite, or NaN, has no finite factor."""
    hessian = 2 * gram
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0  # inputs that are always zero: their weights do not matter
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(len(w))
    hessian = hessian + jnp.diag(jnp.where(dead, 1.0, damping * diagonal.mean()))
    upper = inverse_factor(hessian[order][:, order])
    w = jnp.where(dead[:, None], 0.0, w)
    rounded, _ = _columns(w[order], [x[order] for x in operands], upper, see, min(block, len(w)))
    return jnp.zeros_like(rounded).at[order].set(rounded), jnp.isfinite(upper).all()


def inverse_factor(h: jax.Array) -> jax.Array:
    r"""Return the upper triangular U with :math:`U^\top U = H^{-1}`.

    By one factorisation of H read backwards, :math:`H = A A^\top` with A upper triangular, and :math:`U = A^{-1}`; H is
    never inverted as a whole.

    Args:
      h: symmetric positive definite ``[k, k]``.

    Returns:
      ``[k, k]``; NaN if ``h`` is not positive definite.

    Example:
      >>> u = inverse_factor(jnp.array([[4.0, 2.0], [2.0, 3.0]]))
      >>> (u.T @ u @ jnp.array([[4.0, 2.0], [2.0, 3.0]])).round(5).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    a = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(a, jnp.eye(len(h), dtype=h.dtype), lower=False)


def _columns(w: jax.Array, operands: list[jax.Array], upper: jax.Array, see: Callable[..., Any], block: int) -> Solution:
    """Round the inputs in order, the first half before the second, so that most of the work is in large products."""
    k = len(w)
    if k <= UNSPLIT:
        return _blocks(w, operands, upper, see, block)
    half = k // 2 // block * block
    first = _columns(w[:half], [x[:half] for x in operands], upper[:half, :half], see, block)
    left = w[half:] - jnp.matmul(upper[:half, half:].T, first[1], precision=HIGHEST)
    second = _columns(left, [x[half:] for x in operands], upper[half:, half:], see, block)
    return jnp.concatenate([first[0], second[0]]), jnp.concatenate([first[1], second[1]])


def _blocks(w: jax.Array, operands: list[jax.Array], upper: jax.Array, see: Callable[..., Any], block: int) -> Solution:
    """Round block by block; after each, carry its error to the inputs that are left. The last block may be padded."""
    k, n = w.shape
    size = k + -k % block
    w, *operands = (jnp.pad(x, ((0, size - k), (0, 0)), mode="edge") for x in (w, *operands))
    upper = jnp.pad(upper, (0, size - k)) + jnp.diag((jnp.arange(size) >= k).astype(upper.dtype))

    def turn(w: jax.Array, start: jax.Array) -> tuple[jax.Array, Solution]:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block)  # noqa: E731
        rows = cut(upper)
        inner = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        rounded, errors = _rows(cut(w), [cut(x) for x in operands], inner, see)
        later = jnp.where(jnp.arange(size)[None] >= start + block, rows, 0)
        return w - jnp.matmul(later.T, errors, precision=HIGHEST), (rounded, errors)

    _, solution = jax.lax.scan(turn, w, jnp.arange(0, size, block))
    rounded, errors = (x.reshape(-1, n)[:k] for x in solution)
    return rounded, errors


def _rows(w: jax.Array, operands: list[jax.Array], upper: jax.Array, see: Callable[..., Any]) -> Solution:
    """Round the rows of a block in turn; return what they became and their errors, divided by U's diagonal.

    Each row gathers what the rows before it owe it, which reads the errors; passing each row's error on at once would
    rewrite the whole block every time.
    """
    before = jnp.triu(upper, 1).T

    def turn(errors: jax.Array, row: Any) -> tuple[jax.Array, jax.Array]:
        i, w, coefficients, diagonal, operands = row
        w = w - jnp.matmul(coefficients, errors, precision=HIGHEST)
        rounded = see(w, *operands)
        return jax.lax.dynamic_update_index_in_dim(errors, (w - rounded) / diagonal, i, 0), rounded

    steps = (jnp.arange(len(w)), w, before, jnp.diagonal(upper), operands)
    errors, rounded = jax.lax.scan(turn, jnp.zeros_like(w), steps)
    return rounded, errors
