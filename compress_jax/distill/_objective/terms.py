"""The terms of a training objective: what each looks at, weighs at each step, learns and keeps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ConfigError, NoMatchError
from compress_jax.core.types import Batch, Params, PyTree, Step
from compress_jax.distill._adapters.adapter import Part
from compress_jax.distill._adapters.heads import embedding
from compress_jax.distill._losses.contrastive import Bank, crd, crd_bank, crd_negatives, crd_update
from compress_jax.distill._losses.logits import cross_entropy
from compress_jax.distill._losses.temperature import bounded
from compress_jax.distill._losses.tokens import Total, takes_mask
from compress_jax.distill._masks import has_positions, of_examples
from compress_jax.distill._objective.totals import masked, of_features, of_logits, shown, total_of
from compress_jax.distill._objective.weights import l2_sp

Schedule: TypeAlias = float | jax.Array | Callable[[Any], Any]
"""A number, or an optax schedule: its value at a step."""

Paths: TypeAlias = str | Sequence[str]


class Seen(NamedTuple):
    """What a term may look at, all of one batch.

    Attributes:
      student_logits: ``[..., classes]``.
      teacher_logits: same shape; ``[teachers, ..., classes]`` of several; a `TopK` from a cache;
        None without a teacher.
      labels: integers ``[...]``, or probabilities ``[..., classes]`` after a mixup.
      student: features by path.
      teacher: features by path.
      params: the student's, as its compression shows them.
      teacher_variables: of the teacher, or None.
      batch: all entries of the batch, augmented.
      key: typed PRNG key of the step and the term.
      step: int32 scalar, counts from 0.
      mask: of the term: which examples or tokens count, see `masks`; None where the batch has none.
        What does not count is zero already in logits, labels and features, so that nothing computed
        of them is NaN or inf by padding.
    """

    student_logits: Any
    teacher_logits: Any
    labels: Any
    student: Mapping[str, Any]
    teacher: Mapping[str, Any]
    params: Params
    teacher_variables: Any
    batch: Batch
    key: Any
    step: Any
    mask: Any = None


def _nothing(key: jax.Array, seen: Seen) -> tuple[Any, Any]:
    return {}, {}


class Term(NamedTuple):
    """One loss of a training objective, as pure functions; the objective is the sum over terms of weight times mean loss.

    Attributes:
      name: of its metric, its parts and its memory; each term of an objective has another.
      loss: ``(seen, parts, memory) -> (loss, memory)``. The loss is of each example or token, in
        the shape that the mask fits; or a `Total`, of a loss that has looked at ``seen.mask``
        itself. A scalar is refused where there is a mask, as nobody knows what of the padding is in
        it.
      weight: a number or an optax schedule.
      student: globs of the student's features that it looks at, see `capture`.
      teacher: globs of the teacher's.
      init: ``(key, seen) -> (parts, memory)``, given a `Seen` of shapes: parts are trained beside
        the student by an optimizer of their own, the memory is rewritten by each step; neither is
        exported.
      mask: the batch's entry that says what of this term counts; None for that of the objective.
      whole: whether it looks at no example, but at the model (`on_weights`): no mask concerns it,
        and it returns a scalar.
    """

    name: str
    loss: Callable[[Seen, Any, Any], tuple[jax.Array | Total, Any]]
    weight: Schedule = 1.0
    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    init: Callable[[jax.Array, Seen], tuple[Any, Any]] = _nothing
    mask: str | None = None
    whole: bool = False


def value_at(schedule: Schedule, step: Step) -> jax.Array:
    """Return the value of a number or of an optax schedule at a step, float32.

    Example:
      >>> import optax
      >>> [float(value_at(each, jnp.array(5))) for each in (0.25, optax.linear_schedule(0.0, 1.0, 10))]
      [0.25, 0.5]
    """
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts and floats
        return jnp.asarray(schedule(step) if callable(schedule) else schedule, jnp.float32)


def _name(loss: Callable[..., Any]) -> str:
    return getattr(loss, "__name__", getattr(getattr(loss, "func", None), "__name__", "loss"))


def on_labels(
    weight: Schedule = 1.0,
    *,
    label_smoothing: float = 0.0,
    name: str = "labels",
    mask: str | None = None,
) -> Term:
    """Return the term of the labels: `cross_entropy`, also with the probabilities that a mixup makes of labels.

    Args:
      weight: a number or an optax schedule.
      label_smoothing: see `cross_entropy`; not for probabilities.
      name: of the term.
      mask: the batch's entry of what counts, see `Term`.

    Returns:
      A `Term`.

    Example:
      >>> on_labels(0.1).name
      'labels'
    """

    def loss(seen: Seen, parts: PyTree, memory: PyTree) -> tuple[jax.Array | Total, Any]:
        if jnp.issubdtype(seen.labels.dtype, jnp.integer):
            each = cross_entropy(seen.student_logits, seen.labels, label_smoothing)
        else:
            each = -(seen.labels * jax.nn.log_softmax(bounded(seen.student_logits))).sum(axis=-1)
        return of_logits(name, each, seen.student_logits, seen.mask, False), memory

    return Term(name, loss, weight, mask=mask)


def on_logits(
    loss: Callable[..., jax.Array],
    weight: Schedule = 1.0,
    *,
    temperature: Schedule | None = None,
    labels: bool = False,
    name: str | None = None,
    mask: str | None = None,
) -> Term:
    """Return the term of a loss of the student's and the teacher's logits.

    Args:
      loss: ``(student_logits, teacher_logits) -> [...]``, such as `kl`, `dist` or `top_k_kl` with a
        cache; options by ``functools.partial``. Of several teachers it gets the stacked logits: see
        `averaged` and `ensembled`. A loss that couples examples or tokens must have a parameter
        ``mask``, as `dist` does, and is given it by name; one that does not is tried on random
        logits, and refused if what it says of one entry depends on another.
      weight: a number or an optax schedule.
      temperature: given to the loss by name; a number or an optax schedule. None gives none.
      labels: whether the loss takes the labels third, as `dkd` and what `hinton` returns do.
      name: of the term; by default that of the loss.
      mask: the batch's entry of what counts, see `Term`.

    Returns:
      A `Term`.

    Example:
      >>> import optax
      >>> from compress_jax.distill import kl
      >>> term = on_logits(kl, 0.9, temperature=optax.linear_schedule(8.0, 1.0, 1000))
      >>> term.name, term.student
      ('kl', ())
    """

    def of(seen: Seen, parts: PyTree, memory: PyTree) -> tuple[jax.Array | Total, Any]:
        options = {} if temperature is None else {"temperature": value_at(temperature, seen.step)}
        rest = (seen.labels,) if labels else ()
        given = (seen.student_logits, seen.teacher_logits, *rest)
        each = masked(
            f"the term {own!r}", loss, given, seen.mask, seen.student_logits.ndim - 1, **options
        )
        return of_logits(own, each, seen.student_logits, seen.mask, takes_mask(loss)), memory

    own = name or _name(loss)
    return Term(own, of, weight, mask=mask)


def on_features(
    loss: Callable[..., jax.Array],
    student: Paths,
    teacher: Paths,
    weight: Schedule = 1.0,
    *,
    part: Part | None = None,
    of_student: Callable[[Any], Any] | None = None,
    of_teacher: Callable[[Any], Any] | None = None,
    name: str | None = None,
    mask: str | None = None,
) -> Term:
    """Return the term of a loss of features: a hint, attention, a relation, a statistic.

    ``loss(part(of_student(f_s)), of_teacher(f_t))``; what a part returns beside its features (the
    variances of `gaussian`) goes to the loss after the teacher's, as `vid` takes it.

    Args:
      loss: ``(student, teacher) -> [batch]`` or a scalar; options by ``functools.partial``. It is
        given the mask by name if it has a parameter ``mask``, as all losses here do; else it must
        return one number for each entry of the mask, and is tried on random features, and refused
        if what it says of one entry depends on another.
      student: path of the student's feature; with several, part and loss get lists.
      teacher: path of the teacher's.
      weight: a number or an optax schedule.
      part: what brings the student's features to the teacher's; trained with the student.
      of_student: ``feature -> feature``, applied to each before, such as `pool`, the mean over
        positions. If it has a parameter ``mask`` it is given the mask; if not, it must leave the
        positions that the mask is of where they are.
      of_teacher: likewise, such as ``partial(resize, size=(8, 8))``, or a `paraphraser` that was
        trained before.
      name: of the term; by default that of the loss.
      mask: the batch's entry of what counts, see `Term`: ``[batch, *positions]`` of these features,
        where it is not the objective's.

    Returns:
      A `Term`. Its ``init`` and its ``loss`` raise a NoMatchError if no feature of that path was
      captured, and a ShapeError if the mask fits neither the features' ``[batch, *positions]`` nor,
      in features without positions, their batch.

    Example:
      >>> from compress_jax.distill import hint, linear
      >>> term = on_features(hint, "conv_1", "block_1_0", 100.0, part=linear())
      >>> seen = Seen(*[None] * 3, {"conv_1": jnp.ones((8, 4))}, {"block_1_0": jnp.ones((8, 6))}, *[None] * 5)
      >>> parts, memory = term.init(jax.random.key(0), seen)
      >>> parts["kernel"].shape, term.loss(seen, parts, memory)[0].shape
      ((4, 6), (8,))
    """
    named = name or _name(loss)

    def both(seen: Seen) -> tuple[Any, Any]:
        own = _each(student, seen.student, of_student, "student", named, seen.mask)
        return own, _each(teacher, seen.teacher, of_teacher, "teacher", named, seen.mask)

    def init(key: jax.Array, seen: Seen) -> tuple[Any, Any]:
        shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(both, _arrays(seen)))
        return ({} if part is None else part.init(key, *shapes)), {}

    def of(seen: Seen, parts: PyTree, memory: PyTree) -> tuple[jax.Array | Total, Any]:
        own, other = both(seen)
        out = own if part is None else part.apply(parts, own)
        first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        entries = jax.tree.leaves(first)[0]
        units = 2 if seen.mask is not None and has_positions(seen.mask) and entries.ndim > 2 else 1
        each = masked(f"the term {named!r}", loss, (first, other, *rest), seen.mask, units)
        return of_features(named, each, entries, seen.mask, takes_mask(loss)), memory

    return Term(named, of, weight, _tuple(student), _tuple(teacher), init, mask)


def on_weights(
    weight: Schedule = 0.01, *, pattern: str | tuple[str, ...] = "**", name: str = "l2_sp"
) -> Term:
    """Return the term of `l2_sp`: the student's weights, as its compression shows them, near the teacher's.

    Args:
      weight: a number or an optax schedule.
      pattern: globs of the leaves, see `l2_sp`.
      name: of the term.

    Returns:
      A `Term`, for a teacher whose ``variables`` are ``{"params": ...}`` of the student's own
      shapes.

    Example:
      >>> on_weights(0.01).name
      'l2_sp'
    """

    def loss(seen: Seen, parts: PyTree, memory: PyTree) -> tuple[jax.Array | Total, Any]:
        return l2_sp(seen.params, seen.teacher_variables["params"], pattern), memory

    return Term(name, loss, weight, whole=True)


def _tuple(paths: Paths) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths)


def _arrays(seen: Seen) -> Seen:
    """Return only the features, which is all that shapes are made of."""
    return Seen(None, None, None, seen.student, seen.teacher, None, None, None, None, None)


def _each(
    paths: Paths,
    features: Mapping[str, Any],
    of: Callable[..., Any] | None,
    whose: str,
    term: str,
    mask: Any,
) -> Any:
    """Return the feature of one path, or the list of those of several, zero where the mask says so."""
    missing = [path for path in _tuple(paths) if path not in features]
    if missing:
        how = (
            "give it apply=capture(model, patterns)"
            if whose == "teacher"
            else "its model captures what terms ask for"
        )
        raise NoMatchError(
            f"the {whose} has no feature {missing[0]!r}, only {sorted(features)}; {how}"
        )
    found = [
        shown(features[path], of, f"the {whose}'s {path!r} in term {term!r}", mask)
        for path in _tuple(paths)
    ]
    return found[0] if isinstance(paths, str) else found


# The term of contrastive representation distillation: embeddings that are trained, and a bank that
# is kept.


def contrast(
    student: str,
    teacher: str,
    labels: Any,
    weight: Schedule = 0.8,
    *,
    dim: int = 128,
    negatives: int = 1024,
    temperature: float = 0.07,
    momentum: float = 0.5,
    index: str = "index",
    name: str = "crd",
    mask: str | None = None,
) -> Term:
    """Return the term of `crd`, its two embeddings as parts and its bank as memory.

    The bank is written where the loss is made, so that negatives of a step are those of the steps
    before. It takes the whole batch: train by ``jit`` (a mesh is fine), not by ``pmap``.

    Args:
      student: path of the student's feature, usually the last before the head.
      teacher: path of the teacher's.
      labels: integers ``[examples]``, of all training examples; ``arange(examples)`` to exclude
        only the anchor itself.
      weight: a number or an optax schedule.
      dim: of the embeddings.
      negatives: of each anchor; the paper has 16384.
      temperature: see `crd`.
      momentum: see `crd_update`.
      index: the batch's entry with the examples' numbers, ``0 .. examples - 1``.
      name: of the term.
      mask: the batch's entry of what counts, see `Term`; examples that do not count leave the bank
        as it is.

    Returns:
      A `Term`. Its loss raises a ConfigError if the batch has no such entry.

    Example:
      >>> term = contrast("conv_1", "block_2_0", jnp.arange(50), dim=8)
      >>> features = {"conv_1": jnp.ones((4, 2, 2, 3))}, {"block_2_0": jnp.ones((4, 5))}
      >>> parts, memory = term.init(jax.random.key(0), Seen(*[None] * 3, *features, *[None] * 5))
      >>> sorted(parts), memory["bank"].student.shape
      (['student', 'teacher'], (50, 8))

    References:
      Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020.
    """
    part = embedding(dim)

    def init(key: jax.Array, seen: Seen) -> tuple[Any, Any]:
        first, second, third = jax.random.split(key, 3)
        own, other = seen.student[student].shape, seen.teacher[teacher].shape
        parts = {"student": part.init(first, own, own), "teacher": part.init(second, other, other)}
        return parts, {"bank": crd_bank(third, len(labels), dim), "labels": jnp.asarray(labels)}

    def loss(seen: Seen, parts: PyTree, memory: PyTree) -> tuple[jax.Array | Total, Any]:
        if index not in seen.batch:
            raise ConfigError(
                f"crd keeps a bank by example: the batch needs their numbers as {index!r}, has "
                f"{[*seen.batch]}"
            )
        at = seen.batch[index]
        own = part.apply(parts["student"], seen.student[student])
        other = part.apply(parts["teacher"], jax.lax.stop_gradient(seen.teacher[teacher]))
        bank = Bank(*memory["bank"])
        drawn = crd_negatives(seen.key, at, memory["labels"], negatives)
        counts = None if seen.mask is None else of_examples(seen.mask, len(own))
        value = total_of(
            name, crd(own, other, bank, at, drawn, temperature, mask=counts), counts, True
        )
        return value, {**memory, "bank": crd_update(bank, own, other, at, momentum, mask=counts)}

    return Term(name, loss, weight, (student,), (teacher,), init, mask)
