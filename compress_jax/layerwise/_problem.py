"""Stored parameters as the matrices that their sites multiply by: what the layer-wise solvers work on."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import NonFiniteError
from compress_jax.core.types import Leaves
from compress_jax.trace._jaxpr.site import AxisIndices, Shape, Site
from compress_jax.trace._jaxpr.strided import Box, Piece, placed
from compress_jax.trace._statistics.calibration import Calibration, require
from compress_jax.trace._statistics.moments import Gram

Span = tuple[int, int]


@dataclass(frozen=True)
class MatrixForm:
    """How an array becomes ``[batch, k, n]``: k entries are summed over for each of n outputs.

    Attributes:
      shape: of the array.
      order: its axes in the order stacked, batch, summed over, kept.
      batch: product of the sizes of stacked and batch axes.
      k: product of the sizes that are summed over.
      groups: feature groups of a convolution; the outputs of each are matrices of their own.
    """

    shape: Shape
    order: AxisIndices
    batch: int
    k: int
    groups: int = 1

    def matrices(self, x: jax.Array) -> jax.Array:
        """Return an array of this shape as ``[batch * groups, k, n]``."""
        flat = jnp.transpose(x, self.order).reshape(self.batch, self.k, self.groups, -1)
        return jnp.swapaxes(flat, 1, 2).reshape(self.batch * self.groups, self.k, -1)

    def stored(self, matrices: jax.Array) -> jax.Array:
        """Undo `matrices`."""
        flat = jnp.swapaxes(matrices.reshape(self.batch, self.groups, self.k, -1), 1, 2)
        back = tuple(self.order.index(axis) for axis in range(len(self.order)))
        return jnp.transpose(flat.reshape(tuple(self.shape[axis] for axis in self.order)), back)


@dataclass(frozen=True)
class Problem:
    """A part of one parameter (nearly always all of it), the form it is solved in, and what it is fed.

    Attributes:
      box: which part; its arrays are what ``form`` makes matrices of.
      form: how they become matrices.
      gram: float32 ``[batch, k, k]``, the mean of x x^T over the rows that met each matrix.
      rows: int32 ``[batch]``, how many rows that were; 0 where a branch never ran.
      changed: the operations that change the parameter on its way, entry by entry.
    """

    box: Box
    form: MatrixForm
    gram: jax.Array
    rows: jax.Array
    changed: tuple[str, ...] = ()

    @cached_property
    def dead(self) -> jax.Array:
        """Which inputs were zero in every row, bool ``[batch, k]``: of what their weights do nothing is known."""
        return jnp.diagonal(self.gram, axis1=1, axis2=2) == 0

    @cached_property
    def filled(self) -> jax.Array:
        """The Gram matrices in which inputs that were never seen count as an average one, independent of the others.

        The average is that of the matrix, of all matrices where one has seen nothing, and 1 if none
        has.
        """
        diagonal = jnp.diagonal(self.gram, axis1=1, axis2=2)
        live = (~self.dead).sum(1).astype(jnp.float32)
        means, seen = diagonal.sum(1) / jnp.maximum(live, 1), (live > 0).sum().astype(jnp.float32)
        average = jnp.where(seen > 0, means.sum() / jnp.maximum(seen, 1), 1.0)
        added = jnp.where(self.dead, jnp.where(live > 0, means, average)[:, None], 0.0)
        return self.gram + added[:, :, None] * jnp.eye(self.form.k)[None]

    def names(self, path: str) -> list[str]:
        """Return a name for each matrix: the parameter's, with the indices of layers, experts and groups."""
        lead = _lead(self.form)
        sizes = [self.form.shape[axis] for axis in lead]
        found = []
        for place in np.ndindex(*sizes, self.form.groups):
            index = self.box.index(dict(zip(lead, place, strict=False)))
            group = f" (group {place[-1]})" if self.form.groups > 1 else ""
            found.append(path + index + group)
        return found


def _lead(form: MatrixForm) -> AxisIndices:
    """Return the first axes of the order, as many as make the batch, those of size 1 in front of it included."""
    count = next(
        i
        for i in range(len(form.order) + 1)
        if math.prod(form.shape[a] for a in form.order[:i]) == form.batch
    )
    return form.order[:count]


def why_not(site: Site) -> str | None:
    """Say why what enters a site cannot be laid out as matrices of parameters; None if it can."""
    if site.param is None:
        return "no parameter feeds it"
    own = {piece.path for piece in site.pieces}
    if own and (other := [path for path in (site.param, *site.also) if path not in own]):
        return "several parameters enter one product: " + ", ".join((*sorted(own), *other))
    if site.kind == "conv" and site.params["batch_group_count"] > 1:
        return "a convolution with groups of examples"
    return None if own else site.lost or "it cannot be told which entries of the parameter are used"


def problems(
    calibration: Any, leaves: Leaves
) -> tuple[dict[str, tuple[Problem, ...]], dict[str, str]]:
    """Return the layer-wise problems of a calibration with `gram`, and why some parameters have none.

    A parameter used as a whole has one problem. One of which slices are used at constant indices
    has one for each, and parameters that are joined in one product have theirs, as the columns of
    weights do not depend on each other, and rows answer for themselves.

    Args:
      calibration: from ``calibrate(fn, gram(), ...)``.
      leaves: arrays or shapes by path.

    Returns:
      ``({path: problems}, {path: reason})``; the problems of a parameter share no entry, and what
      several sites share is fed by all of them.

    Raises:
      StateError: if these are other statistics.
    """
    require(calibration, Gram, "gram()")
    sums: dict[str, dict[tuple[Box, MatrixForm], tuple[Any, Any, tuple[str, ...]]]] = {}
    reasons: dict[str, str] = {}
    for name, site in calibration.sites.items():
        if reason := why_not(site):
            reasons |= {path: reason for path in (site.param, *site.also) if path in leaves}
            continue
        for piece in site.pieces:
            answer = laid(site, piece)
            if isinstance(answer, str):
                reasons[piece.path] = answer
            if isinstance(answer, str) or piece.path not in leaves:
                continue
            box, form, place = answer
            total, rows = _fed(*calibration[name]["input"], place)
            own = sums.setdefault(piece.path, {})
            if (box, form) in own:
                old = own[box, form]
                total, rows = total + old[0], rows + old[1]
            own[box, form] = total, rows, piece.changed
    found = {path: own for path, own in sums.items() if path not in reasons}
    reasons |= {
        path: why for path, own in found.items() if (why := _overlap([box for box, _ in own]))
    }
    return {path: _problems(own) for path, own in found.items() if path not in reasons}, reasons


def _problems(
    sums: Mapping[tuple[Box, MatrixForm], tuple[Any, Any, tuple[str, ...]]],
) -> tuple[Problem, ...]:
    return tuple(
        Problem(box, form, _mean(total, rows), rows, changed)
        for (box, form), (total, rows, changed) in sums.items()
    )


def _overlap(boxes: list[Box]) -> str | None:
    """Say that several problems would share entries."""
    if len(boxes) == 1:
        return None
    if len(set(boxes)) < len(boxes):
        return "it is used at several sites that sum over different axes of it"
    times = np.zeros(boxes[0].shape, np.uint8)
    for box in boxes:
        times.reshape(box.fine)[box.slices] += 1
    return (
        "it is used at several sites that see different parts of it, which overlap"
        if times.max() > 1
        else None
    )


@dataclass(frozen=True)
class Place:
    """Where a piece's matrices are among the statistics of its site.

    Attributes:
      added: loops that do not run along it.
      turns: for each of the others, which turns are its own.
      batch: for each batch axis, which indices are; None where all meet the same entries.
      summed: for each contracted axis its size, and which indices are its own.
      groups: of a convolution.
    """

    added: AxisIndices
    turns: tuple[Span, ...]
    batch: tuple[Span | None, ...]
    summed: tuple[tuple[int, Span], ...]
    groups: int


def laid(site: Site, piece: Piece) -> tuple[Box, MatrixForm, Place] | str:
    """Return which part of its parameter a piece at a site is, its form, and its place in the statistics; or why not.

    Args:
      site: where it is used; `why_not` has nothing against it.
      piece: one of its pieces.

    Returns:
      ``(box, form, place)``, or a reason.

    Example:
      >>> from compress_jax.trace import sites
      >>> (site,) = sites(lambda p, x: x @ p["w"][1], {"w": jnp.ones((2, 3, 4))}, jnp.ones((5, 3)))
      >>> box, form, _ = laid(site, site.pieces[0])
      >>> box.starts, box.sizes, form
      ((1, 0, 0), (1, 3, 4), MatrixForm(shape=(1, 3, 4), order=(0, 1, 2), batch=1, k=3, groups=1))
    """
    side = int(site.operand == "rhs")
    shape, summed, batch = (
        (site.lhs_shape, site.rhs_shape)[side],
        site.contracting[side],
        site.batch[side],
    )
    kept = [axis for axis in range(len(shape)) if axis not in (*summed, *batch)]
    turns = sorted(piece.iterations, key=lambda turn: turn.loop)
    spans = [(start, start + size) for start, size in zip(piece.starts, piece.sizes, strict=True)]
    if site.groups > 1 and any(spans[axis] != (0, shape[axis]) for axis in range(len(shape))):
        return "a part of the kernel of a grouped convolution is used"
    repeated = [any(stride == 0 for _, stride in digits) for digits in piece.axes]
    if any(repeated[axis] for axis in (*summed, *kept)):
        return "its entries are repeated (broadcast) before they are multiplied"
    lead = [(turn.size, turn.stride) for turn in turns]
    lead += [digit for axis in batch if not repeated[axis] for digit in piece.axes[axis]]
    outputs = [digit for axis in kept for digit in piece.axes[axis]]
    if site.groups == 1:  # else the outputs of each group are next to each other
        outputs.sort(key=lambda digit: -abs(digit[1]))
    answer = placed(piece, lead, [digit for axis in summed for digit in piece.axes[axis]], outputs)
    if isinstance(answer, str):
        return answer
    box, order, counts = answer
    form = MatrixForm(box.sizes, order, *counts, site.groups)
    place = Place(
        tuple(loop for loop in range(len(site.loops)) if loop not in {turn.loop for turn in turns}),
        tuple((turn.start, turn.start + turn.size) for turn in turns),
        tuple(None if repeated[axis] else spans[axis] for axis in batch),
        tuple((shape[axis], spans[axis]) for axis in summed),
        site.groups,
    )
    return box, form, place


@partial(jax.jit, static_argnames=("place",))
def _fed(gram: jax.Array, count: jax.Array, place: Place) -> tuple[jax.Array, jax.Array]:
    """Return the sums of outer products ``[batch, k, k]`` and the rows of each, loops over time and devices added up."""
    ran = count.reshape(count.shape + (1,) * (gram.ndim - count.ndim)) > 0
    total, rows = jnp.where(ran, gram, 0).sum(place.added), count.sum(place.added)
    turns = tuple(slice(*span) for span in place.turns)
    total, rows = total[turns], rows[turns]
    lead, start = rows.shape, len(place.turns)
    repeated = tuple(start + i for i, span in enumerate(place.batch) if span is None)
    spans = tuple(slice(None) if span is None else slice(*span) for span in place.batch)
    rows = rows * math.prod(total.shape[axis] for axis in repeated)
    total = total[(*(slice(None),) * start, *spans)].sum(repeated)
    sizes = tuple(size for size, _ in place.summed)
    own = tuple(slice(*span) for _, span in place.summed)
    k = math.prod(span[1] - span[0] for _, span in place.summed)
    total = total.reshape(-1, *sizes, *sizes)[(slice(None), *own, *own)].reshape(-1, k, k)
    return total, jnp.broadcast_to(
        rows[..., None], (*lead, total.shape[0] // math.prod(lead))
    ).reshape(-1)


@jax.jit
def _mean(total: jax.Array, rows: jax.Array) -> jax.Array:
    return total / jnp.maximum(rows, 1)[:, None, None].astype(jnp.float32)


def column_errors(delta: jax.Array, gram: jax.Array) -> jax.Array:
    r"""Return the output error of every column of weights, :math:`\delta^\top G \delta`: ``[batch, k, n] -> [batch, n]``."""
    fed = jnp.einsum("bkl,bln->bkn", gram, delta, precision=jax.lax.Precision.HIGHEST)
    return (fed * delta).sum(1)


# What calibration says nothing about, in words: matrices that it never reached, inputs that were
# always zero.


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
      >>> from compress_jax.layerwise._problem import problems
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
    return found + (
        [f"it is changed on its way ({how}) and was solved as if it were not"] if changed else []
    )


def not_better(names: Sequence[str], won: jax.Array, same: jax.Array) -> str:
    """Say which matrices a solver did not make better than plain rounding or magnitude does; empty if none."""
    worse = [
        name
        for name, won, same in zip(names, won.tolist(), same.tolist(), strict=True)
        if not (won or same)
    ]
    return f"solved no better than that, {listed(worse)}" if worse else ""


def judge(problem: Problem, others: Sequence[Problem], filled: bool = False) -> jax.Array:
    """Return the Gram matrices that solutions are judged by.

    Args:
      problem: what was solved.
      others: held-out problems of the same parameter; the same one among them counts where it has
        seen anything.
      filled: whether inputs that were never seen count as average ones.

    Returns:
      float32 ``[batch, k, k]``, in units of their own.
    """
    own = problem.filled if filled else problem.gram
    for other in others:
        if (other.box, other.form) == (problem.box, problem.form):
            return unit(
                jnp.where(
                    other.dead.all(1)[:, None, None], own, other.filled if filled else other.gram
                )
            )
    return unit(own)


def check_finite(path: str, problems: Iterable[Problem]) -> None:
    """Refuse statistics that hold NaN or infinity, naming the parameter."""
    for problem in problems:
        if not bool(jnp.isfinite(problem.gram).all()):
            raise NonFiniteError(
                f"the calibration statistics of {path!r} hold NaN or infinity; look at the "
                "calibration batches"
            )


# Statistics of a site's input channels, laid out as the parameter that they meet.


def met(
    site: Site, piece: Piece, channels: jax.Array, fold: Callable[..., jax.Array]
) -> tuple[Box, MatrixForm, jax.Array] | str:
    """Return what each entry of a part of a parameter meets, by a statistic of the site's input channels.

    Args:
      site: where the parameter is used.
      piece: the part, one of ``site.pieces``.
      channels: ``[*loops, *batch, channels]``, as the reducers of channels keep it.
      fold: ``(x, axes) -> x`` over what does not run along the parameter, such as ``jnp.max``.

    Returns:
      ``(box, form, array)``: which part it is, its matrices, and the statistic ``[matrices, k]``;
        or why it cannot be told.

    Example:
      >>> from compress_jax.trace import sites
      >>> (site,) = sites(lambda p, x: x[:, 1:] @ p["w"][:2], {"w": jnp.ones((3, 4))}, jnp.ones((5, 3)))
      >>> box, _, values = met(site, site.pieces[0], jnp.array([7.0, 8.0]), jnp.max)
      >>> box.starts, box.sizes, values.tolist()
      ((0, 0), (2, 4), [[7.0, 8.0]])
    """
    if reason := why_not(site):
        return reason
    answer = laid(site, piece)
    if isinstance(answer, str):
        return answer
    if site.kind == "conv" and site.operand == "lhs":
        return "it is what a convolution's kernel slides over"
    box, form, place = answer
    x = fold(channels, place.added) if place.added else channels
    x = x[tuple(slice(*span) for span in place.turns)]
    lead = len(place.turns)
    repeated = tuple(lead + i for i, span in enumerate(place.batch) if span is None)
    x = x[
        (
            *(slice(None),) * lead,
            *(slice(None) if span is None else slice(*span) for span in place.batch),
        )
    ]
    x = fold(x, repeated) if repeated else x
    x = _windows(site, x) if site.kind == "conv" else x
    sizes, own = [size for size, _ in place.summed], [slice(*span) for _, span in place.summed]
    x = x.reshape(-1, *sizes)[(slice(None), *own)]
    return box, form, x.reshape(x.shape[0], -1)


def _windows(site: Site, x: jax.Array) -> jax.Array:
    """Repeat the channels of a convolution's input along its window, ``[..., groups, *(window and channels)]``."""
    contracting, into = site.contracting[1], site.params["dimension_numbers"].rhs_spec[1]
    x = x.reshape(*x.shape[:-1], site.groups, x.shape[-1] // site.groups)
    shape = [site.rhs_shape[axis] for axis in contracting]
    x = x.reshape(
        *x.shape[:-1],
        *(n if axis == into else 1 for axis, n in zip(contracting, shape, strict=True)),
    )
    return jnp.broadcast_to(x, (*x.shape[: x.ndim - len(shape)], *shape))


def beside(box: Box, form: MatrixForm, values: jax.Array) -> jax.Array:
    """Return a statistic ``[matrices, k]`` in an array that broadcasts against the parameter; 0 beside the box.

    Args:
      box: the part of the parameter.
      form: its matrices.
      values: the statistic.

    Returns:
      float32, axes of size 1 where nothing varies.
    """
    if form.groups == 1 and box.whole:
        kept = kept_axes(form)
        small = replace(
            form, shape=tuple(1 if axis in kept else n for axis, n in enumerate(form.shape))
        )
        return small.stored(values[..., None])
    n = math.prod(form.shape) // values.size
    every = form.stored(jnp.broadcast_to(values[..., None], (*values.shape, n)))
    return box.put(jnp.zeros(box.shape, every.dtype), every)


def kept_axes(form: MatrixForm) -> AxisIndices:
    """Return the axes of an array that are neither stacked nor summed over: those of its outputs."""
    return form.order[_ends(form)[1] :]


def summed_axes(form: MatrixForm) -> AxisIndices:
    """Return the axes of an array that are summed over."""
    start, end = _ends(form)
    return form.order[start:end]


def _ends(form: MatrixForm) -> tuple[int, int]:
    """Return where in the order the axes that are summed over begin and end; those of size 1 count to what they follow."""
    sizes = [
        math.prod(form.shape[axis] for axis in form.order[:i]) for i in range(len(form.order) + 1)
    ]
    last = len(sizes) - 1
    start = last - sizes[::-1].index(form.batch)
    return start, max(start, sizes.index(form.batch * form.k))


# The factored Hessian of a layer's squared output error: what solvers that compensate for errors
# start from.


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


def fed(calibration: Calibration, leaves: Leaves) -> Iterator[tuple[Site, Any]]:
    """Yield ``(site, statistics of its input)`` of every calibrated site that a parameter feeds."""
    for name, site in calibration.sites.items():
        if site.param is not None and site.param in leaves:
            yield site, calibration[name]["input"]
