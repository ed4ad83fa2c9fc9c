"""GPTQ: round one input at a time and let the inputs that are left make up for the error."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.compression import Compression, CompressionState, Pointwise
from compress_jax.core.types import Params
from compress_jax.layerwise._problem import MatrixForm, Problem, listed, upper_factor
from compress_jax.layerwise._solve import HIGHEST, Solved, layerwise
from compress_jax.trace import Calibration

TRIES, LEAST = 6, 1e-4
UNSPLIT = 1024  # at most so many earlier inputs make up for their errors in one product


def gptq(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState | None = None,
    *,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    held_out: Calibration | None = None,
) -> Solved:
    r"""Round weights so that the layers' outputs, not the weights, stay close, by second-order error compensation.

    With :math:`H = 2 X^\top X / m + \lambda I` and the upper Cholesky factor U of its inverse, each
    input i in turn is rounded to :math:`q_i`, and
    :math:`w_{j} \mathrel{-}= U_{ij} (w_i - q_i) / U_{ii}` for all j > i. This is computed as what
    it comes to with :math:`A = U^{-1}`, hence :math:`A A^\top = H`: input j is rounded at
    :math:`w_j + \sum_{i < j} A_{ij} (w_i - q_i) / A_{jj}`, w being the weights as they were; so
    nothing is ever inverted.

    The scales (and masks, in a chain) are those of the compression's state; any grid, floating
    format or granularity that sees weights entry by entry will do. All sites that `calibrate` saw:
    dense, einsum, attention projections, convolutions, experts, scanned layers, which are solved
    one after the other by one compiled program.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: what the weights are to be seen through.
      state: its state; by default that of `init` once the compression is bound to the layouts the
        calibrated sites tell.
      damping: :math:`\lambda` as a share of the mean of H's diagonal. If H cannot be factored it is
        raised tenfold, up to five times; a note says so.
      block: inputs after which the error is carried to all that are left.
      act_order: take inputs in the order of falling H's diagonal.
      held_out: statistics of other batches: a layer that rounding to nearest serves better there is
        rounded to nearest; by default the calibration decides.

    Returns:
      ``Solved``: exact under the compression. Leaves without calibration are rounded to nearest and
      listed. So are, with a note, weights of inputs that were always zero, experts and branches
      that calibration did not reach, and layers that are not solved better.

    Raises:
      NonFiniteError: if calibration or weights are not finite.

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
      Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ", 2023, arXiv:2210.17323, algorithm 1. Chen et
      al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025,
      arXiv:2507.18553.
    """

    def solve(
        path: str, x: jax.Array, how: Pointwise, problem: Problem
    ) -> tuple[jax.Array, str | None]:
        return _leaf(problem.names(path), x, how, problem, damping, block, act_order)

    return layerwise(params, calibration, compression, state, solve, held_out)


def _leaf(
    names: list[str],
    x: jax.Array,
    how: Pointwise,
    problem: Problem,
    damping: float,
    block: int,
    act_order: bool,
) -> tuple[jax.Array, str | None]:
    """Solve one leaf, raising the damping of the matrices that cannot be factored; what remains is not solved."""
    form = problem.form
    solved = form.matrices(x.astype(jnp.float32))
    left, said = jnp.ones(len(solved), bool), []
    for attempt in range(TRIES):
        used = damping if attempt == 0 else max(damping, LEAST) * 10**attempt
        new, factored = _solve(x, how.operands, problem.gram, used, form, how.see, block, act_order)
        solved, left = jnp.where((left & factored)[:, None, None], new, solved), left & ~factored
        if not left.any():
            break
    failed = np.flatnonzero(left)
    if attempt:
        said.append(f"damping was raised from {damping:g} to {used:g} to factor the Hessian")
    if len(failed):
        said.append(
            "no damping makes the Hessian positive definite of "
            + listed([names[i] for i in failed])
        )
    return form.stored(solved).astype(x.dtype), "; ".join(said) or None


@partial(jax.jit, static_argnames=("form", "see", "block", "act_order"))
def _solve(
    x: jax.Array,
    operands: Sequence[jax.Array],
    gram: jax.Array,
    damping: Any,
    form: MatrixForm,
    see: Callable[..., Any],
    block: int,
    act_order: bool,
) -> tuple[jax.Array, jax.Array]:
    """Solve all matrices of a leaf, one after the other; return them, and which could be factored."""

    def one(each: Any) -> tuple[jax.Array, jax.Array]:
        w, seen_with, moment = each
        return _matrix(w, seen_with, moment, damping, see, block, act_order)

    every = form.matrices(x.astype(jnp.float32)), [form.matrices(each) for each in operands], gram
    if len(gram) == 1:
        return jax.tree.map(lambda y: y[None], one(jax.tree.map(lambda y: y[0], every)))
    return jax.lax.map(one, every)


def _matrix(
    w: jax.Array,
    operands: Any,
    gram: jax.Array,
    damping: Any,
    see: Callable[..., Any],
    block: int,
    act_order: bool,
) -> tuple[jax.Array, jax.Array]:
    """Solve one matrix ``[k, n]``; a Hessian that is not positive definite, or NaN, has no finite factor."""
    diagonal = 2 * jnp.diagonal(gram)
    dead = (
        diagonal == 0
    )  # inputs that were always zero: nothing makes up for them, so they are rounded to nearest
    hessian = _plus_diagonal(2 * gram, jnp.where(dead, 1.0, damping * diagonal.mean()))
    if not act_order:
        factor = upper_factor(hessian)
        return _columns(w, operands, factor, see, block), jnp.isfinite(jnp.diagonal(factor)).all()
    order = jnp.argsort(-diagonal, stable=True)
    factor = upper_factor(hessian[order][:, order])
    rounded = _columns(w[order], [x[order] for x in operands], factor, see, block)
    return jnp.zeros_like(rounded).at[order].set(rounded), jnp.isfinite(jnp.diagonal(factor)).all()


def _plus_diagonal(x: jax.Array, diagonal: jax.Array) -> jax.Array:
    i = jnp.arange(len(x))
    return jnp.where(
        i[:, None] == i[None], x + diagonal[None], x
    )  # in one pass with whatever reads it


def _columns(
    w: jax.Array, operands: list[jax.Array], factor: jax.Array, see: Callable[..., Any], block: int
) -> jax.Array:
    """Round block by block; before each, add up what the inputs before it owe it. What is missing in the end is padded."""
    (k, n), block = w.shape, min(block, len(w))
    tiles = -(-k // max(block, UNSPLIT))
    tile = -(-k // (tiles * block)) * block
    missing = tiles * tile - k
    w, *operands = (jnp.pad(x, ((0, missing), (0, 0)), mode="edge") for x in (w, *operands))
    factor = jnp.pad(factor, (0, missing))

    def cut(x: jax.Array, start: Any, size: int = block) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    def turn(missed: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        columns = jax.lax.dynamic_slice_in_dim(factor, start, block, axis=1)

        def gather(
            i: Any, owed: jax.Array
        ) -> jax.Array:  # what is yet to be rounded has missed nothing
            earlier = cut(columns, i * tile, tile), cut(missed, i * tile, tile)
            return owed + jnp.matmul(earlier[0].T, earlier[1], precision=HIGHEST)

        owed = jax.lax.fori_loop(0, -(-start // tile), gather, jnp.zeros((block, n)))
        rounded, missed_here = _rows(
            cut(w, start), [cut(x, start) for x in operands], owed, cut(columns, start), see
        )
        return jax.lax.dynamic_update_slice_in_dim(missed, missed_here, start, 0), rounded

    _, rounded = jax.lax.scan(turn, jnp.zeros_like(w), jnp.arange(0, len(w), block))
    return rounded.reshape(-1, n)[:k]


def _rows(
    w: jax.Array,
    operands: list[jax.Array],
    owed: jax.Array,
    factor: jax.Array,
    see: Callable[..., Any],
) -> tuple[jax.Array, jax.Array]:
    """Round the rows of a block in turn; return what they became and what they missed.

    Each row gathers what the rows before it owe it, which reads them; passing each row's error on
    at once would rewrite the whole block every time.
    """
    diagonal = jnp.diagonal(factor)
    inverse = 1 / jnp.where(diagonal == 0, 1, diagonal)  # padded inputs have none

    def turn(missed: jax.Array, row: Any) -> tuple[jax.Array, jax.Array]:
        i, w, owed, coefficients, inverse, operands = row
        owed = owed + jnp.matmul(coefficients, missed, precision=HIGHEST)
        rounded = see(w + owed * inverse, *operands)
        return jax.lax.dynamic_update_index_in_dim(missed, w - rounded, i, 0), rounded

    steps = (jnp.arange(len(w)), w, owed, factor.T, inverse, operands)
    missed, rounded = jax.lax.scan(turn, jnp.zeros_like(w), steps)
    return rounded, missed
