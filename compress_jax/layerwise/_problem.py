"""The least-squares problem of each parameter: its matrices, and the statistics of their inputs.

A parameter of any layout is solved as matrices ``[k, n]`` (`MatrixForm`), and a `Problem` adds the
Gram matrix ``[k, k]`` of what they are multiplied by. Notes for the user say where calibration
knows nothing.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import NonFiniteError
from compress_jax.core.types import Leaves, PyTree
from compress_jax.trace._jaxpr.site import AxisIndices, Shape, Site
from compress_jax.trace._jaxpr.strided import Box, Digit, Piece, placed
from compress_jax.trace._statistics.calibration import Calibration, Gram, require

Span = tuple[int, int]  # [start, end)
MAX_NAMES = 6  # in one sentence


@dataclass(frozen=True)
class MatrixForm:
    """How an array becomes ``[batch, k, n]``: k entries are summed over for each of n outputs.

    Attributes:
      shape: the array's shape.
      order: its axes in the order stacked, batch, summed over, outputs.
      batch: the product of the sizes of stacked and batch axes.
      k: the product of the sizes that are summed over.
      groups: feature groups of a convolution, each with matrices of its own.
    """

    shape: Shape
    order: AxisIndices
    batch: int
    k: int
    groups: int = 1

    def matrices(self, x: jax.Array) -> jax.Array:
        """Return an array of this shape as ``[batch * groups, k, n]``."""
        flat = jnp.transpose(x, self.order).reshape(self.batch, self.k, self.groups, -1)
        # [batch, k, groups, n / groups] -> [batch * groups, k, n / groups]
        return jnp.swapaxes(flat, 1, 2).reshape(self.batch * self.groups, self.k, -1)

    def stored(self, matrices: jax.Array) -> jax.Array:
        """Undo `matrices`."""
        # [batch * groups, k, n / groups] -> [batch, k, groups, n / groups]
        flat = jnp.swapaxes(matrices.reshape(self.batch, self.groups, self.k, -1), 1, 2)
        back = tuple(self.order.index(axis) for axis in range(len(self.order)))
        return jnp.transpose(flat.reshape(tuple(self.shape[axis] for axis in self.order)), back)


@dataclass(frozen=True)
class Problem:
    """The least-squares problem of one parameter, or of a part of it.

    Attributes:
      box: which part, nearly always all of it.
      form: how that part becomes matrices.
      gram: float32 ``[batch, k, k]``, the mean of x x^T over the inputs x of each matrix.
      rows: int32 ``[batch]``, the number of inputs; 0 where a branch never ran.
      changed: the operations that change the parameter before it is multiplied, entry by entry.
    """

    box: Box
    form: MatrixForm
    gram: jax.Array
    rows: jax.Array
    changed: tuple[str, ...] = ()

    @cached_property
    def dead(self) -> jax.Array:
        """Which inputs were always zero, bool ``[batch, k]``: nothing is known of their weights."""
        return jnp.diagonal(self.gram, axis1=1, axis2=2) == 0

    @cached_property
    def filled(self) -> jax.Array:
        """The Gram matrices with dead inputs counted as average ones, independent of the others.

        The average is that of the matrix; of all matrices for one without any input; 1 if none has
        any.
        """
        diagonal = jnp.diagonal(self.gram, axis1=1, axis2=2)  # [batch, k]
        live = (~self.dead).sum(1).astype(jnp.float32)  # [batch]
        means = diagonal.sum(1) / jnp.maximum(live, 1)  # [batch], 0 without any live input
        reached = (live > 0).sum().astype(jnp.float32)
        average = jnp.where(reached > 0, means.sum() / jnp.maximum(reached, 1), 1.0)
        fill = jnp.where(live > 0, means, average)  # [batch]
        added = jnp.where(self.dead, fill[:, None], 0.0)  # [batch, k]
        return self.gram + added[:, :, None] * jnp.eye(self.form.k)[None]

    def names(self, path: str) -> list[str]:
        """Return a name for each matrix: the path with indices of layers, experts and groups."""
        lead = _lead(self.form)
        sizes = [self.form.shape[axis] for axis in lead]
        names = []
        for place in np.ndindex(*sizes, self.form.groups):
            index = self.box.index(dict(zip(lead, place, strict=False)))
            group = f" (group {place[-1]})" if self.form.groups > 1 else ""
            names.append(path + index + group)
        return names


def _lead(form: MatrixForm) -> AxisIndices:
    """Return the stacked and batch axes: as few of the first ones as make the batch."""
    return form.order[: _sizes(form).index(form.batch)]


def _sizes(form: MatrixForm) -> list[int]:
    """Return the products of the sizes of the first 0, 1, ... axes of the order."""
    return [math.prod(form.shape[a] for a in form.order[:i]) for i in range(len(form.order) + 1)]


def why_not(site: Site) -> str | None:
    """Say why a site's operand cannot be split into matrices of parameters; None if it can."""
    if site.param is None:
        return "no parameter feeds it"
    own = {piece.path for piece in site.pieces}
    # Parameters side by side have a piece each; one without is added to them, or multiplies them.
    if own and (other := [path for path in (site.param, *site.also) if path not in own]):
        return "several parameters enter one product: " + ", ".join((*sorted(own), *other))
    if site.kind == "conv" and site.params["batch_group_count"] > 1:
        return "a convolution with groups of examples"
    return None if own else site.lost or "it is unknown which entries of the parameter are used"


Sums = dict[tuple[Box, MatrixForm], tuple[jax.Array, jax.Array, tuple[str, ...]]]


def problems(
    calibration: Calibration, leaves: Leaves
) -> tuple[dict[str, tuple[Problem, ...]], dict[str, str]]:
    """Return the problems of all calibrated parameters, and why some have none.

    A parameter used as a whole has one problem. A parameter whose slices are used at constant
    indices has one for each slice. Parameters that are joined in one product each have their own:
    their columns are independent, and their rows are solved with their own part of the Gram matrix.

    Args:
      calibration: from ``calibrate(fn, gram(), ...)``.
      leaves: arrays or shapes by path.

    Returns:
      ``({path: problems}, {path: reason})``. The problems of a parameter share no entry; statistics
      of sites that share a parameter are added.

    Raises:
      StateError: if these are other statistics.
    """
    require(calibration, Gram, "gram()")
    sums: dict[str, Sums] = {}
    reasons: dict[str, str] = {}
    for name, site in calibration.sites.items():
        if reason := why_not(site):
            paths = (str(site.param), *site.also)
            reasons |= {path: reason for path in paths if path in leaves}
            continue
        for piece in site.pieces:
            answer = lay_out(site, piece)
            if isinstance(answer, str):
                reasons[piece.path] = answer
            if isinstance(answer, str) or piece.path not in leaves:
                continue
            box, form, place = answer
            total, rows = _gram_of_part(*calibration[name]["input"], place)
            own = sums.setdefault(piece.path, {})
            # The errors of several sites add up, and so do sums of outer products.
            if (box, form) in own:
                earlier, earlier_rows, _ = own[box, form]
                total = total + earlier
                rows = rows + earlier_rows
            own[box, form] = total, rows, piece.changed
    # A use that cannot be solved for rules the parameter out: its inputs would not count.
    found = {path: own for path, own in sums.items() if path not in reasons}
    for path, own in found.items():
        if overlap := _overlap([box for box, _ in own]):
            reasons[path] = overlap
    return {path: _problems(own) for path, own in found.items() if path not in reasons}, reasons


def _problems(sums: Sums) -> tuple[Problem, ...]:
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
    # How many problems hold each entry; the reshaped array is a view.
    for box in boxes:
        times.reshape(box.fine)[box.slices] += 1
    if times.max() > 1:
        return "it is used at several sites as different parts, which overlap"
    return None


@dataclass(frozen=True)
class Place:
    """Which of a site's statistics belong to the matrices of one piece.

    Attributes:
      added: loops whose iterations all use the same entries, so that statistics are added.
      iterations: for each other loop, its iterations that use the piece.
      batch: for each batch axis, the indices that use the piece; None where all use the same
        entries.
      summed: for each contracted axis its size, and the indices that the piece covers.
      groups: of a convolution.
    """

    added: AxisIndices
    iterations: tuple[Span, ...]
    batch: tuple[Span | None, ...]
    summed: tuple[tuple[int, Span], ...]
    groups: int


def lay_out(site: Site, piece: Piece) -> tuple[Box, MatrixForm, Place] | str:
    """Return which part of its parameter a piece is, its form, and its place in the statistics.

    Args:
      site: where the piece is used; its `why_not` is None.
      piece: one of the site's pieces.

    Returns:
      ``(box, form, place)``, or the reason why there is none.

    Example:
      >>> from compress_jax.trace import sites
      >>> (site,) = sites(lambda p, x: x @ p["w"][1], {"w": jnp.ones((2, 3, 4))}, jnp.ones((5, 3)))
      >>> box, form, _ = lay_out(site, site.pieces[0])
      >>> box.starts, box.sizes, form
      ((1, 0, 0), (1, 3, 4), MatrixForm(shape=(1, 3, 4), order=(0, 1, 2), batch=1, k=3, groups=1))
    """
    # The axes of the operand by what they are for, and the loops that slice the parameter.
    side = int(site.operand == "rhs")
    shape = (site.lhs_shape, site.rhs_shape)[side]
    summed = site.contracting[side]
    batch = site.batch[side]
    free = [axis for axis in range(len(shape)) if axis not in (*summed, *batch)]
    iterations = sorted(piece.iterations, key=lambda each: each.loop)
    # Where the piece lies in the operand, axis by axis.
    spans = [(start, start + size) for start, size in zip(piece.starts, piece.sizes, strict=True)]
    if site.groups > 1 and any(spans[axis] != (0, shape[axis]) for axis in range(len(shape))):
        return "a part of the kernel of a grouped convolution is used"
    repeated = [any(stride == 0 for _, stride in digits) for digits in piece.axes]
    # Batch axes may repeat entries: experts that share a kernel only have more inputs.
    if any(repeated[axis] for axis in (*summed, *free)):
        return "its entries are repeated (broadcast) before they are multiplied"
    # In the order of the matrices: layers and batch, then inputs, then outputs.
    lead = [(each.size, each.stride) for each in iterations]
    lead += _digits(piece, (axis for axis in batch if not repeated[axis]))
    outputs = _digits(piece, free)
    if site.groups == 1:  # else the outputs of each group are next to each other
        outputs.sort(key=lambda digit: -abs(digit[1]))
    answer = placed(piece, lead, _digits(piece, summed), outputs)
    if isinstance(answer, str):
        return answer
    box, order, counts = answer
    form = MatrixForm(box.sizes, order, *counts, site.groups)
    along = {each.loop for each in iterations}
    place = Place(
        added=tuple(loop for loop in range(len(site.loops)) if loop not in along),
        iterations=tuple((each.start, each.start + each.size) for each in iterations),
        batch=tuple(None if repeated[axis] else spans[axis] for axis in batch),
        summed=tuple((shape[axis], spans[axis]) for axis in summed),
        groups=site.groups,
    )
    return box, form, place


def _digits(piece: Piece, axes: Iterable[int]) -> list[Digit]:
    return list(itertools.chain.from_iterable(piece.axes[axis] for axis in axes))


@partial(jax.jit, static_argnames=("place",))
def _gram_of_part(gram: jax.Array, count: jax.Array, place: Place) -> tuple[jax.Array, jax.Array]:
    """Return the sums of outer products ``[batch, k, k]``, and the number of rows in each."""
    # Where a branch never ran the statistics are NaN, with count 0.
    ran = count.reshape(count.shape + (1,) * (gram.ndim - count.ndim)) > 0
    total = jnp.where(ran, gram, 0).sum(place.added)  # [*loops, *batch, *summed, *summed]
    rows = count.sum(place.added)  # [*loops]
    iterations = tuple(slice(*span) for span in place.iterations)
    total = total[iterations]
    rows = rows[iterations]
    lead = rows.shape  # iterations of the loops that run along the piece
    start = len(place.iterations)
    repeated = tuple(start + i for i, span in enumerate(place.batch) if span is None)
    spans = tuple(slice(None) if span is None else slice(*span) for span in place.batch)
    # A kernel that several batch indices share sees the inputs of all of them.
    rows = rows * math.prod(total.shape[axis] for axis in repeated)
    total = total[(*(slice(None),) * start, *spans)].sum(repeated)
    sizes = tuple(size for size, _ in place.summed)
    own = tuple(slice(*span) for _, span in place.summed)
    k = math.prod(span[1] - span[0] for _, span in place.summed)
    # [batch, *summed, *summed] -> the rows and columns that the piece covers, [batch, k, k]
    total = total.reshape(-1, *sizes, *sizes)[(slice(None), *own, *own)].reshape(-1, k, k)
    per_iteration = total.shape[0] // math.prod(lead)
    return total, jnp.broadcast_to(rows[..., None], (*lead, per_iteration)).reshape(-1)


@jax.jit
def _mean(total: jax.Array, rows: jax.Array) -> jax.Array:
    return total / jnp.maximum(rows, 1)[:, None, None].astype(jnp.float32)


def column_errors(delta: jax.Array, gram: jax.Array) -> jax.Array:
    r"""Return the output error of every column of weights, :math:`\delta^\top G \delta`.

    Args:
      delta: ``[batch, k, n]``, the change of the weights.
      gram: ``[batch, k, k]``.

    Returns:
      ``[batch, n]``.
    """
    product = jnp.einsum("bkl,bln->bkn", gram, delta, precision=jax.lax.Precision.HIGHEST)
    return (product * delta).sum(1)


def unit(gram: jax.Array) -> jax.Array:
    """Return Gram matrices scaled by powers of two, so that the largest entry is in [1/2, 1).

    The best solution does not depend on the scale, and sums neither overflow nor underflow.

    Args:
      gram: float32 ``[batch, k, k]``.

    Returns:
      ``[batch, k, k]``; matrices of zeros are unchanged.

    Example:
      >>> unit(jnp.array([[[2.0**120]], [[2.0**-110]], [[0.0]]])).ravel().tolist()
      [0.5, 0.5, 0.0]
    """
    # The largest entry of a positive semidefinite matrix is on its diagonal.
    largest = jnp.diagonal(gram, axis1=1, axis2=2).max(1)  # [batch]
    exponent = jnp.frexp(largest)[1]
    return jnp.ldexp(gram, -exponent[:, None, None])


def notes(problem: Problem, path: str, instead: str) -> list[str]:
    r"""Say which matrices calibration never reached, and how many inputs were always zero.

    Args:
      problem: one of the parameter's problems.
      path: the parameter's.
      instead: what was done with the weights of such inputs.

    Returns:
      Sentences; none if there are no such inputs.

    Example:
      >>> from compress_jax.trace import calibrate, gram
      >>> from compress_jax.layerwise._problem import problems
      >>> params, x = {"w": jnp.ones((2, 3, 4))}, jnp.array([[[1.0, 2.0, 0.0]], [[0.0, 0.0, 0.0]]])
      >>> seen = calibrate(lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"]), gram(), params, [x])
      >>> print("\n".join(notes(problems(seen, params)[0]["w"][0], "w", "not solved")))
      calibration never reached w[1]: not solved
      inputs that were always zero, 1 of 3 of w[0]: not solved
    """
    dead = np.asarray(problem.dead.sum(1))
    if not dead.any():
        return []
    names = problem.names(path)
    k = problem.form.k
    never = [name for name, n in zip(names, dead, strict=True) if n == k]
    some = [f"{n} of {k} of {name}" for name, n in zip(names, dead, strict=True) if 0 < n < k]
    found = [f"calibration never reached {listed(never)}: {instead}"] if never else []
    return found + ([f"inputs that were always zero, {listed(some)}: {instead}"] if some else [])


def listed(names: Sequence[str]) -> str:
    """Return names as a list in words, with the number of those beyond the first few.

    Example:
      >>> listed(["a", "b"]), listed([str(i) for i in range(9)])
      ('a, b', '0, 1, 2, 3, 4, 5 and 3 more')
    """
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def unused(problems: Sequence[Problem]) -> int:
    """Return how many entries of a parameter are in none of its problems."""
    return math.prod(problems[0].box.shape) - sum(math.prod(each.box.sizes) for each in problems)


def asides(problems: Sequence[Problem], instead: str) -> list[str]:
    """Say what a parameter's problems leave out: entries in no product, operations on it."""
    found = []
    if left := unused(problems):
        found.append(f"{left} of its entries are in no calibrated product: {instead}")
    changed: set[str] = set()
    for each in problems:
        changed.update(each.changed)
    if changed:
        how = ", ".join(sorted(changed))
        found.append(f"it is changed on its way ({how}) and was solved as if it were not")
    return found


def not_better(names: Sequence[str], won: jax.Array, same: jax.Array) -> str:
    """Say for which matrices plain rounding or magnitude is as good as the solver; or ""."""
    fine = np.asarray(won | same)
    worse = [name for name, good in zip(names, fine, strict=True) if not good]
    return f"solved no better than that, {listed(worse)}" if worse else ""


def judge(problem: Problem, others: Sequence[Problem], filled: bool = False) -> jax.Array:
    """Return the Gram matrices that solutions are judged by.

    Args:
      problem: the problem that was solved.
      others: held-out problems of the same parameter. That of the same part is used for matrices
        that its batches reached.
      filled: whether inputs that were always zero count as average ones.

    Returns:
      float32 ``[batch, k, k]``, each scaled by `unit`.
    """
    own = problem.filled if filled else problem.gram
    # Matrices that the held-out batches did not reach are judged by the calibration's own.
    for other in others:
        if (other.box, other.form) == (problem.box, problem.form):
            gram = other.filled if filled else other.gram
            return unit(jnp.where(other.dead.all(1)[:, None, None], own, gram))
    return unit(own)


def check_finite(path: str, problems: Iterable[Problem]) -> None:
    """Refuse statistics that hold NaN or infinity, naming the parameter."""
    for problem in problems:
        if not bool(jnp.isfinite(problem.gram).all()):
            raise NonFiniteError(
                f"the calibration statistics of {path!r} hold NaN or infinity; look at the "
                "calibration batches"
            )


def fed_sites(calibration: Calibration, leaves: Leaves) -> Iterator[tuple[Site, PyTree]]:
    """Yield ``(site, statistics of its input)`` of the calibrated sites that use a parameter."""
    for name, site in calibration.sites.items():
        if site.param is not None and site.param in leaves:
            yield site, calibration[name]["input"]


def channel_statistic(
    site: Site, piece: Piece, channels: jax.Array, fold: Callable[..., jax.Array]
) -> tuple[Box, MatrixForm, jax.Array] | str:
    """Return a statistic of a site's input channels for each row of a parameter's matrices.

    Args:
      site: where the parameter is used.
      piece: one of ``site.pieces``.
      channels: ``[*loops, *batch, channels]``, as the reducers of channels return it.
      fold: reduces axes that do not run along the parameter, such as ``jnp.max``.

    Returns:
      ``(box, form, statistic)``: the part of the parameter, its form, and ``[batch, k]``; or the
      reason why there is none.

    Example:
      >>> from compress_jax.trace import sites
      >>> fn = lambda p, x: x[:, 1:] @ p["w"][:2]
      >>> (site,) = sites(fn, {"w": jnp.ones((3, 4))}, jnp.ones((5, 3)))
      >>> box, _, values = channel_statistic(site, site.pieces[0], jnp.array([7.0, 8.0]), jnp.max)
      >>> box.starts, box.sizes, values.tolist()
      ((0, 0), (2, 4), [[7.0, 8.0]])
    """
    if reason := why_not(site):
        return reason
    answer = lay_out(site, piece)
    if isinstance(answer, str):
        return answer
    if site.kind == "conv" and site.operand == "lhs":
        return "it is what a convolution's kernel slides over"
    box, form, place = answer
    x = fold(channels, place.added) if place.added else channels  # [*loops, *batch, channels]
    x = x[tuple(slice(*span) for span in place.iterations)]
    lead = len(place.iterations)
    repeated = tuple(lead + i for i, span in enumerate(place.batch) if span is None)
    batch = [slice(None) if span is None else slice(*span) for span in place.batch]
    x = x[(*(slice(None),) * lead, *batch)]
    # One statistic for a kernel that several batch indices share.
    if repeated:
        x = fold(x, repeated)
    if site.kind == "conv":
        x = _windows(site, x)
    sizes = [size for size, _ in place.summed]
    own = [slice(*span) for _, span in place.summed]
    x = x.reshape(-1, *sizes)[(slice(None), *own)]  # [matrices, *summed]
    return box, form, x.reshape(x.shape[0], -1)


def _windows(site: Site, x: jax.Array) -> jax.Array:
    """Repeat the channels of a convolution's input along its window.

    ``[..., channels] -> [..., groups, *summed]``, where summed axes are window and channels of a
    group, in the kernel's order.
    """
    contracting = site.contracting[1]
    into = site.params["dimension_numbers"].rhs_spec[1]
    x = x.reshape(*x.shape[:-1], site.groups, x.shape[-1] // site.groups)  # [..., groups, channels]
    shape = [site.rhs_shape[axis] for axis in contracting]
    # Channels go to their axis in the kernel's order; every place of the window has the same.
    placed = [site.rhs_shape[axis] if axis == into else 1 for axis in contracting]
    x = x.reshape(*x.shape[:-1], *placed)
    return jnp.broadcast_to(x, (*x.shape[: x.ndim - len(shape)], *shape))


def parameter_shaped(box: Box, form: MatrixForm, values: jax.Array) -> jax.Array:
    """Return a statistic ``[batch, k]`` so that it broadcasts against the parameter.

    Args:
      box: the part of the parameter.
      form: its matrices.
      values: the statistic.

    Returns:
      float32, of size 1 along the outputs if the box is whole; 0 outside the box.
    """
    if form.groups == 1 and box.whole:
        outputs = output_axes(form)
        shape = tuple(1 if axis in outputs else n for axis, n in enumerate(form.shape))
        return replace(form, shape=shape).stored(values[..., None])
    n = math.prod(form.shape) // values.size  # outputs of each matrix
    every = form.stored(jnp.broadcast_to(values[..., None], (*values.shape, n)))
    return box.put(jnp.zeros(box.shape, every.dtype), every)


def output_axes(form: MatrixForm) -> AxisIndices:
    """Return the axes of an array that are neither stacked nor summed over."""
    return form.order[_ends(form)[1] :]


def summed_axes(form: MatrixForm) -> AxisIndices:
    """Return the axes of an array that are summed over."""
    start, end = _ends(form)
    return form.order[start:end]


def _ends(form: MatrixForm) -> tuple[int, int]:
    """Return where in the order the axes that are summed over begin and end.

    Axes of size 1 count to those before them.
    """
    # Products along the order grow to `batch`, then to `batch * k` after the last summed axis.
    sizes = _sizes(form)
    last = len(sizes) - 1
    start = last - sizes[::-1].index(form.batch)
    return start, max(start, sizes.index(form.batch * form.k))
