"""Objective terms: a loss, its weight at each step, and the adapters and memory it needs.

An objective is a list of terms, given to `train.distillation`. Each term reads one `LossContext`:
`on_labels`, `on_logits`, `on_vocabulary`, `on_features`, `on_weights` and `contrast` build the
usual ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.errors import ConfigError, NoMatchError
from compress_jax.core.paths import Patterns
from compress_jax.core.types import Array, Batch, Params, PyTree, Step, Variables
from compress_jax.distill._adapters.adapter import Adapter
from compress_jax.distill._adapters.heads import embedding
from compress_jax.distill._chunked import Direction, Head, checked_plan, vocabulary_losses
from compress_jax.distill._losses.contrastive import Bank, crd, crd_bank, crd_negatives, crd_update
from compress_jax.distill._losses.logits import cross_entropy
from compress_jax.distill._losses.temperature import bounded
from compress_jax.distill._losses.tokens import Total, takes_mask
from compress_jax.distill._masks import Mask, fitted, has_positions, of_examples
from compress_jax.distill._objective.totals import (
    evaluate,
    of_features,
    of_logits,
    total_of,
    transformed,
)
from compress_jax.distill._objective.weights import l2_sp

Schedule: TypeAlias = float | jax.Array | Callable[[Step], jax.typing.ArrayLike]
"""A number, or an optax schedule: its value at a step."""

Paths: TypeAlias = str | Sequence[str]
Transform: TypeAlias = Callable[..., jax.Array]


class LossContext(NamedTuple):
    """Everything a term may read about one batch.

    Attributes:
      student_logits: ``[..., classes]``.
      teacher_logits: same shape; ``[teachers, ..., classes]`` for several teachers; a `TopK` from a
        cache; None without a teacher.
      labels: integers ``[...]``, or probabilities ``[..., classes]`` after a mixup.
      student: the student's captured features by path.
      teacher: the teacher's captured features by path.
      params: the student's params after the compression's view.
      teacher_variables: the teacher's variables, or None.
      batch: all entries of the batch, augmented.
      key: typed PRNG key for this step and this term.
      step: int32 scalar, counts from 0.
      mask: the term's mask over examples or tokens, see `masks`; None where the batch has none.
        Logits, labels and features are already zero where it is 0, so that NaN in padding reaches
        no loss.
      student_head: hidden states and kernel whose product the student's logits are, for a term that
        asks for them (`Term.heads`); else None.
      teacher_head: likewise, of the teacher.

    Example:
      >>> logits = jnp.zeros((2, 3))
      >>> context = LossContext(logits, logits, jnp.array([0, 1]), {}, {}, {}, None, {}, None, 0)
      >>> loss, memory = on_labels().loss(context, {}, {})
      >>> loss.shape, context.mask is None
      ((2,), True)
    """

    student_logits: jax.Array
    teacher_logits: PyTree
    labels: jax.Array
    student: Mapping[str, jax.Array]
    teacher: Mapping[str, jax.Array]
    params: Params
    teacher_variables: Variables
    batch: Batch
    key: jax.Array
    step: Step
    mask: Mask | None = None
    student_head: Head | None = None
    teacher_head: Head | None = None


def _no_state(key: jax.Array, context: LossContext) -> tuple[PyTree, PyTree]:
    return {}, {}


class Term(NamedTuple):
    """One loss of a training objective, as pure functions.

    The objective is ``sum_k weight_k(step) * mean(loss_k)`` over its terms.

    Attributes:
      name: names the term's metric, adapters and memory; unique within an objective.
      loss: ``(context, adapter_params, memory) -> (loss, memory)``. The loss has one entry per
        example or token, in a shape that the mask fits; or it is a `Total`, if the function has
        applied ``context.mask`` itself. A scalar is refused where the batch has a mask, because
        padding may be part of it.
      weight: a number or an optax schedule.
      student: globs of the student's features to capture, see `capture`.
      teacher: globs of the teacher's features.
      init: ``(key, context) -> (adapter_params, memory)``, given a `LossContext` of shapes. Adapter
        params are trained with the student by an optimizer of their own, the memory is rewritten by
        each step; neither is exported.
      mask: the batch entry that holds this term's mask; None for that of the objective.
      whole: True for a loss of the model's weights (`on_weights`): it returns a scalar, and no mask
        applies.
      heads: True for a loss that is computed from hidden states and heads (`on_vocabulary`). The
        loss may then be a `Predicted`.

    Example:
      >>> def entropy(context, adapter_params, memory):
      ...     log_p = jax.nn.log_softmax(context.student_logits)
      ...     return -(jnp.exp(log_p) * log_p).sum(axis=-1), memory
      >>> Term("entropy", entropy, weight=-0.1).name
      'entropy'
    """

    name: str
    loss: "Callable[[LossContext, PyTree, PyTree], tuple[jax.Array | Total | Predicted, PyTree]]"
    weight: Schedule = 1.0
    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    init: Callable[[jax.Array, LossContext], tuple[PyTree, PyTree]] = _no_state
    mask: str | None = None
    whole: bool = False
    heads: bool = False


class Predicted(NamedTuple):
    """A loss, with what student and teacher predict: nobody else has to look for it.

    Attributes:
      loss: as a `Term` returns it.
      student: int32 ``[...]``, the class of the student's largest logit.
      teacher: likewise.
    """

    loss: jax.Array | Total
    student: jax.Array
    teacher: jax.Array


def value_at(schedule: Schedule, step: Step) -> jax.Array:
    """Return the value of a number or of an optax schedule at a step, float32.

    Example:
      >>> import optax
      >>> schedule = optax.linear_schedule(0.0, 1.0, 10)
      >>> float(value_at(0.25, jnp.array(5))), float(value_at(schedule, jnp.array(5)))
      (0.25, 0.5)
    """
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts and floats
        return jnp.asarray(schedule(step) if callable(schedule) else schedule, jnp.float32)


def on_labels(
    weight: Schedule = 1.0,
    *,
    label_smoothing: float = 0.0,
    name: str = "labels",
    mask: str | None = None,
) -> Term:
    """Return the cross entropy of the labels as a term.

    ``-sum_c q[c] * log softmax(s)[c]``; labels may be integers, or the probabilities q that a mixup
    makes of them.

    Args:
      weight: a number or an optax schedule.
      label_smoothing: see `cross_entropy`; not applied to probabilities.
      name: name of the term.
      mask: the batch entry with the mask, see `Term`.

    Returns:
      A `Term`.

    Example:
      >>> on_labels(0.1).name
      'labels'
    """

    def loss(
        context: LossContext, adapter_params: PyTree, memory: PyTree
    ) -> tuple[jax.Array | Total, PyTree]:
        if jnp.issubdtype(context.labels.dtype, jnp.integer):
            losses = cross_entropy(context.student_logits, context.labels, label_smoothing)
        else:
            # A mixup has made probabilities of the labels, [..., classes].
            log_probs = jax.nn.log_softmax(bounded(context.student_logits))
            losses = -(context.labels * log_probs).sum(axis=-1)
        return of_logits(name, losses, context.student_logits, context.mask, False), memory

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
    """Return a loss between the student's and the teacher's logits as a term.

    Args:
      loss: ``(student_logits, teacher_logits) -> [...]``, such as `kl`, `dist`, or `top_k_kl` with
        a cache; bind options by ``functools.partial``. With several teachers it gets the stacked
        logits: see `averaged` and `ensembled`. A loss that couples examples or tokens must have a
        parameter ``mask``, as `dist` does, and receives the mask by that name. A loss without one
        is tried on random logits, and refused if its value for one entry depends on another.
      weight: a number or an optax schedule.
      temperature: passed to the loss by name; a number or an optax schedule. None passes nothing.
      labels: True passes the labels as third argument, as `dkd` and what `hinton` returns need.
      name: name of the term; by default that of the loss.
      mask: the batch entry with the mask, see `Term`.

    Returns:
      A `Term`.

    Example:
      >>> import optax
      >>> import compress_jax as cj
      >>> temperature = optax.linear_schedule(8.0, 1.0, 1000)
      >>> term = cj.distill.on_logits(cj.distill.kl, 0.9, temperature=temperature)
      >>> term.name, term.student
      ('kl', ())
    """
    term_name = name or _name(loss)

    def term_loss(
        context: LossContext, adapter_params: PyTree, memory: PyTree
    ) -> tuple[jax.Array | Total, PyTree]:
        options = {}
        if temperature is not None:
            options["temperature"] = value_at(temperature, context.step)
        logits = context.student_logits
        args = (logits, context.teacher_logits)
        if labels:
            args = (*args, context.labels)
        what = f"the term {term_name!r}"
        # All axes but the classes index examples or tokens.
        losses = evaluate(what, loss, args, context.mask, logits.ndim - 1, **options)
        return of_logits(term_name, losses, logits, context.mask, takes_mask(loss)), memory

    return Term(term_name, term_loss, weight, mask=mask)


def on_vocabulary(
    weight: Schedule = 1.0,
    *,
    temperature: Schedule = 1.0,
    alpha: Schedule | None = None,
    direction: Direction = "forward",
    beta: float = 0.5,
    chunk: int = 4096,
    block: int | None = None,
    name: str = "vocabulary",
    mask: str | None = None,
) -> Term:
    r"""Return the divergence from a teacher over a large vocabulary, without whole logits.

    :math:`T^2 \mathrm{KL}(p_t \| p_s)` of each token, or
    :math:`\alpha \mathrm{CE} + (1 - \alpha) T^2 \mathrm{KL}` with labels, by `chunked_kl` from
    the hidden states and heads of both models, which are found in their traces: the last product of
    each. No array of ``[tokens, vocabulary]`` is made, neither for the loss nor for the accuracy of
    student and teacher and their agreement; where another term reads the logits, they are.

    Args:
      weight: a number or an optax schedule.
      temperature: T > 0; a number or an optax schedule.
      alpha: the weight of the labels, 0 to 1; a number or an optax schedule. None for a loss
        without labels.
      direction: "forward", "reverse" or "jsd", see `chunked_kl`.
      beta: the beta of `jsd`, for "jsd" only.
      chunk: columns of the vocabulary per slice.
      block: tokens per block; None takes all at once.
      name: name of the term.
      mask: the batch entry with the mask, see `Term`.

    Returns:
      A `Term`, for one teacher whose vocabulary is the student's. Its loss raises an ArgumentError
      if the logits of a model are more than a product (a bias, a cap), or come from a cache.

    Raises:
      ArgumentError: if ``chunk``, ``block``, ``direction`` or ``beta`` is out of range.

    Example:
      >>> import compress_jax as cj
      >>> model = cj.models.GPT(vocabulary=8, width=4, depth=1, heads=1, positions=3)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> variables = model.init(jax.random.key(0), tokens)
      >>> loss = cj.train.distillation(model, [on_vocabulary(chunk=4)], inputs="tokens")
      >>> batch = {"tokens": tokens, "label": tokens}
      >>> key, teacher = jax.random.key(1), cj.distill.Teacher(model.apply, variables)
      >>> value, _ = loss(variables["params"], {}, batch, key, teacher)
      >>> abs(float(value)) < 1e-6
      True

    References:
      As of `chunked_kl` and `chunked_hinton`.
    """
    checked_plan(direction, beta, chunk, block)

    def loss(
        context: LossContext, adapter_params: PyTree, memory: PyTree
    ) -> tuple[Predicted, PyTree]:
        assert context.student_head is not None and context.teacher_head is not None
        counts = context.mask
        if counts is not None:
            shape = context.student_logits.shape[:-1]
            counts = fitted(counts, shape, f"the logits of term {name!r}", examples=True)
        found = vocabulary_losses(
            context.student_head,
            context.teacher_head,
            None if alpha is None else context.labels,
            value_at(temperature, context.step),
            counts,
            chunk,
            direction,
            beta,
            block,
        )
        assert found.student is not None and found.teacher is not None
        losses = found.soft if alpha is None else found.mixed(value_at(alpha, context.step))
        total = total_of(name, losses, counts, True)
        return Predicted(total, found.student, found.teacher), memory

    return Term(name, loss, weight, mask=mask, heads=True)


@renamed_arguments(part="adapter", of_student="student_transform", of_teacher="teacher_transform")
def on_features(
    loss: Callable[..., jax.Array],
    student: Paths,
    teacher: Paths,
    weight: Schedule = 1.0,
    *,
    adapter: Adapter | None = None,
    student_transform: Transform | None = None,
    teacher_transform: Transform | None = None,
    name: str | None = None,
    mask: str | None = None,
) -> Term:
    """Return a loss between features as a term: a hint, attention, a relation, a statistic.

    ``loss(adapter(student_transform(f_s)), teacher_transform(f_t))``. An adapter may return a tuple
    of features and more (`gaussian` returns variances): the rest is passed to the loss after the
    teacher's features, as `vid` takes it.

    Args:
      loss: ``(student, teacher) -> [batch]`` or a scalar; bind options by ``functools.partial``. It
        receives the mask by name if it has a parameter ``mask``, as all losses here do. Otherwise
        it must return one number per entry of the mask; it is tried on random features, and refused
        if its value for one entry depends on another.
      student: path of the student's feature; with several paths, adapter and loss get lists.
      teacher: path of the teacher's feature.
      weight: a number or an optax schedule.
      adapter: maps the student's features to the teacher's shape; trained with the student.
      student_transform: ``feature -> feature``, applied to each feature before the adapter, such as
        `pool`, the mean over positions. It receives the mask if it has a parameter ``mask``; if
        not, it must keep the positions that the mask refers to.
      teacher_transform: likewise, such as ``partial(resize_features, size=(8, 8))``, or a
        `paraphraser` that was trained before.
      name: name of the term; by default that of the loss.
      mask: the batch entry with the mask, see `Term`: ``[batch, *positions]`` of these features,
        where it is not the objective's.

    Returns:
      A `Term`. Its ``init`` and its ``loss`` raise a NoMatchError if no feature of that path was
      captured. Its ``loss`` raises a ShapeError if the mask fits neither the features'
      ``[batch, *positions]`` nor, in features without positions, their batch.

    Example:
      >>> import compress_jax as cj
      >>> hint, linear = cj.distill.hint, cj.distill.linear()
      >>> term = cj.distill.on_features(hint, "conv_1", "block_1_0", 100.0, adapter=linear)
      >>> features = {"conv_1": jnp.ones((8, 4))}, {"block_1_0": jnp.ones((8, 6))}
      >>> context = LossContext(*[None] * 3, *features, *[None] * 5)
      >>> adapter_params, memory = term.init(jax.random.key(0), context)
      >>> adapter_params["kernel"].shape, term.loss(context, adapter_params, memory)[0].shape
      ((4, 6), (8,))
    """
    term_name = name or _name(loss)

    def both(context: LossContext) -> tuple[PyTree, PyTree]:
        mask = context.mask
        own = _transformed(student, context.student, student_transform, "student", term_name, mask)
        target = _transformed(
            teacher, context.teacher, teacher_transform, "teacher", term_name, mask
        )
        return own, target

    def init(key: jax.Array, context: LossContext) -> tuple[PyTree, PyTree]:
        # Shapes of what the adapter will be given: after the transforms, with the batch.
        features = jax.eval_shape(both, _only_features(context))
        student_shape, teacher_shape = jax.tree.map(lambda x: x.shape, features)
        if adapter is None:
            return {}, {}
        return adapter.init(key, student_shape, teacher_shape), {}

    def term_loss(
        context: LossContext, adapter_params: PyTree, memory: PyTree
    ) -> tuple[jax.Array | Total, PyTree]:
        own, target = both(context)
        if adapter is not None:
            own = adapter.apply(adapter_params, own)
        # An adapter may return more than features: the loss gets it after the teacher's.
        extra = ()
        if isinstance(own, tuple):
            own, *extra = own
        first = jax.tree.leaves(own)[0]
        # How many leading axes of the features the mask tells apart: the batch, or its positions.
        by_position = context.mask is not None and has_positions(context.mask) and first.ndim > 2
        what = f"the term {term_name!r}"
        losses = evaluate(what, loss, (own, target, *extra), context.mask, 2 if by_position else 1)
        return of_features(term_name, losses, first, context.mask, takes_mask(loss)), memory

    return Term(term_name, term_loss, weight, _tuple(student), _tuple(teacher), init, mask)


def on_weights(weight: Schedule = 0.01, *, pattern: Patterns = "**", name: str = "l2_sp") -> Term:
    """Return `l2_sp` as a term: the student's viewed weights are pulled towards the teacher's.

    Args:
      weight: a number or an optax schedule.
      pattern: globs of the leaves, see `l2_sp`.
      name: name of the term.

    Returns:
      A `Term`, for a teacher whose ``variables`` are ``{"params": ...}`` in the student's own
      shapes.

    Example:
      >>> on_weights(0.01).name
      'l2_sp'
    """

    def loss(
        context: LossContext, adapter_params: PyTree, memory: PyTree
    ) -> tuple[jax.Array | Total, PyTree]:
        return l2_sp(context.params, context.teacher_variables["params"], pattern), memory

    return Term(name, loss, weight, whole=True)


def _name(loss: Callable[..., object]) -> str:
    """Return the name of a function, also of one inside ``functools.partial``."""
    function = getattr(loss, "func", loss)
    return getattr(loss, "__name__", getattr(function, "__name__", "loss"))


def _tuple(paths: Paths) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths)


def _only_features(context: LossContext) -> LossContext:
    """Return a context with nothing but features, whose shapes decide those of the adapter."""
    names = set(LossContext._fields) - {"student", "teacher"}
    return context._replace(**dict.fromkeys(names))


def _transformed(
    paths: Paths,
    features: Mapping[str, jax.Array],
    transform: Transform | None,
    whose: str,
    term: str,
    mask: Mask | None,
) -> PyTree:
    """Return the feature of one path, or a list for several, masked and transformed."""
    missing = [path for path in _tuple(paths) if path not in features]
    if missing:
        advice = "its model captures what terms ask for"
        if whose == "teacher":
            advice = "give it apply=capture(model, patterns)"
        raise NoMatchError(
            f"the {whose} has no feature {missing[0]!r}, only {sorted(features)}; {advice}"
        )
    found = []
    for path in _tuple(paths):
        what = f"the {whose}'s {path!r} in term {term!r}"
        found.append(transformed(features[path], transform, what, mask))
    return found[0] if isinstance(paths, str) else found


def contrast(
    student: str,
    teacher: str,
    labels: Array,
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
    """Return `crd` as a term, with two embeddings as adapters and a bank as memory.

    The bank is updated after the loss is computed, so a step draws its negatives from the steps
    before. It needs the whole batch: train by ``jit`` (a mesh is fine), not by ``pmap``.

    Args:
      student: path of the student's feature, usually the last before the head.
      teacher: path of the teacher's.
      labels: integers ``[examples]``, the labels of all training examples; ``arange(examples)`` to
        exclude only the anchor itself.
      weight: a number or an optax schedule.
      dim: width of the embeddings.
      negatives: number per anchor; the paper has 16384.
      temperature: see `crd`.
      momentum: see `crd_update`.
      index: the batch entry with the examples' numbers, ``0 .. examples - 1``.
      name: name of the term.
      mask: the batch entry with the mask, see `Term`; masked examples leave the bank unchanged.

    Returns:
      A `Term`. Its loss raises a ConfigError if the batch has no such entry.

    Example:
      >>> term = contrast("conv_1", "block_2_0", jnp.arange(50), dim=8)
      >>> features = {"conv_1": jnp.ones((4, 2, 2, 3))}, {"block_2_0": jnp.ones((4, 5))}
      >>> context = LossContext(*[None] * 3, *features, *[None] * 5)
      >>> adapters, memory = term.init(jax.random.key(0), context)
      >>> sorted(adapters), memory["bank"].student.shape
      (['student', 'teacher'], (50, 8))

    References:
      Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020.
    """
    embed = embedding(dim)

    def init(key: jax.Array, context: LossContext) -> tuple[PyTree, PyTree]:
        student_key, teacher_key, bank_key = jax.random.split(key, 3)
        student_shape = context.student[student].shape
        teacher_shape = context.teacher[teacher].shape
        # Each embedding maps its own model's features, so it is given their shape twice.
        adapter_params = {
            "student": embed.init(student_key, student_shape, student_shape),
            "teacher": embed.init(teacher_key, teacher_shape, teacher_shape),
        }
        bank = crd_bank(bank_key, len(labels), dim)  # [examples, dim] of either model
        return adapter_params, {"bank": bank, "labels": jnp.asarray(labels)}

    def loss(
        context: LossContext, adapter_params: PyTree, memory: PyTree
    ) -> tuple[jax.Array | Total, PyTree]:
        if index not in context.batch:
            raise ConfigError(
                f"crd keeps a bank by example: the batch needs their numbers as {index!r}, has "
                f"{[*context.batch]}"
            )
        at = context.batch[index]
        own = embed.apply(adapter_params["student"], context.student[student])  # [batch, dim]
        # The teacher's embedding is trained; the teacher below it is not.
        target = jax.lax.stop_gradient(context.teacher[teacher])
        target = embed.apply(adapter_params["teacher"], target)  # [batch, dim]
        bank = Bank(*memory["bank"])
        drawn = crd_negatives(context.key, at, memory["labels"], negatives)  # [batch, negatives]
        # The bank is by example, so that a mask of tokens becomes one of examples.
        counts = None if context.mask is None else of_examples(context.mask, len(own))
        losses = crd(own, target, bank, at, drawn, temperature, mask=counts)
        # After the loss, whose bank must not yet hold this batch.
        bank = crd_update(bank, own, target, at, momentum, mask=counts)
        return total_of(name, losses, counts, True), {**memory, "bank": bank}

    return Term(name, loss, weight, (student,), (teacher,), init, mask)
