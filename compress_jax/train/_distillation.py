"""The training loss: a weighted sum of objective terms, from one forward of student and teacher."""

import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.errors import ConfigError
from compress_jax.core.types import Batch, Model, Params, PyTree, Step, Variables
from compress_jax.distill import (
    LossContext,
    Teacher,
    Teachers,
    Term,
    TopK,
    Total,
    ensemble,
    fingerprint,
    on_labels,
    on_logits,
)
from compress_jax.distill._chunked import Head
from compress_jax.distill._masks import Mask, fits, fitted, kept
from compress_jax.distill._objective.terms import Predicted, value_at
from compress_jax.distill._objective.totals import total_of
from compress_jax.tasks import PureModel, Task, classification, pure
from compress_jax.tasks._model import Features, Inputs
from compress_jax.trace._jaxpr.last_product import with_last_product
from compress_jax.train._objective import (
    Aux,
    LossMetrics,
    Objective,
    averaged,
    chosen,
    everything,
    total,
)
from compress_jax.train._step import StatefulLoss

Augment: TypeAlias = Callable[[jax.Array, Batch], Batch]
"""``(key, batch) -> batch``, random and the same for student and teacher."""

Resample: TypeAlias = Callable[[jax.Array, Batch, Callable[[PyTree], jax.Array]], Batch]
"""``(key, batch, logits) -> batch``, with the student's logits function."""

TEACHER = "teacher/"
"""Batch entries of this prefix hold cached teacher features by path."""


def distillation(
    model: Model,
    terms: Sequence[Term],
    *,
    task: Task | None = None,
    augment: Augment | None = None,
    average: float | None = None,
    resample: Resample | None = None,
    inputs: str | tuple[str, ...] = "image",
    labels: str = "label",
    mask: str = "mask",
) -> StatefulLoss:
    """Return the training loss: a weighted sum of objective terms.

    ``sum_k weight_k(step) * mean(loss_k)``, means over the examples or tokens that the mask counts.

    The batch is augmented once, before both forwards; the teacher may have a view of its own
    (`Teacher.view`). Features are captured for terms that ask for them. Adapters are trained under
    ``state.parts``, memories kept under ``state.memory``, both by the term's name. Metrics: each
    term's mean loss and ``accuracy``; with a teacher also ``teacher_accuracy`` and ``agreement`` on
    this batch, and ``teacher_id``, the first 24 bits of its hash (the whole hash is in the memory).

    Args:
      model: the student: a Linen, NNX or Equinox module, one from `quantized`, a pair of pure
        functions, or the graphdef of an NNX module; see `compress_jax.tasks.pure`.
      terms: `on_labels`, `on_logits`, `on_features`, `contrast`, `on_weights` or your own `Term`.
      task: what a batch is, see `compress_jax.tasks.Task`; it names inputs, labels and mask. None
        for one class an example, or a token.
      augment: ``(key, batch) -> batch``, in training only; `compress_jax.data.mixup` makes labels
        probabilities.
      average: the decay of a moving average of the student, which is then its own teacher:
        ``a = average * a + (1 - average) * params``, of the params after the compression's view.
        The step is given no teacher then.
      resample: ``(key, batch, logits) -> batch``, given the current student's logits function:
        `compress_jax.distill.on_policy`.
      inputs: without a task, the batch entry that both models are given, or a tuple of several.
      labels: without a task, the batch entry with labels.
      mask: the batch entry with the mask over examples or tokens, if it is there; see
        `distill/_masks.py` for which shapes fit. Masked entries reach neither a value nor
        a gradient, in no term and no metric. A term may have its own mask
        (``on_features(..., mask="patches")``). How a model treats padding inside (batch statistics,
        attention) is up to the model: give it what it needs in its inputs.

    Returns:
      A `StatefulLoss`, whose means are over all devices and microbatches of a step (`make_step`):
      ``create(variables, compression, optimizer, key, loss.init(key, variables, batch, teacher))``.
      The teacher given to the step is a `Teacher` or `Teachers`; or None, if no term needs one or
      if the batch has its logits as ``"teacher"`` (see `compress_jax.distill.CachedFeed`). The loss
      raises a ShapeError that names the term if a mask does not fit, and a ConfigError if a mask
      asked for by name is missing.

    Raises:
      ConfigError: if there is no term, two terms share a name, or the model is of no known kind.

    Example:
      >>> import compress_jax as cj
      >>> small, large = cj.models.LeNet300100(hidden=(4,)), cj.models.LeNet300100(hidden=(8,))
      >>> batch = {"image": jnp.ones((2, 4)), "label": jnp.array([0, 1])}
      >>> forward = cj.distill.capture(large, ("dense_0",))
      >>> teacher = Teacher(forward, large.init(jax.random.key(0), batch["image"]))
      >>> terms = [on_labels(0.1), on_logits(cj.distill.kl, 0.9, temperature=4.0)]
      >>> layer, adapter = "dense_0", cj.distill.linear()
      >>> hint = cj.distill.on_features(cj.distill.hint, layer, layer, 100.0, adapter=adapter)
      >>> terms.append(hint)
      >>> loss = cj.train.distillation(small, terms)
      >>> variables = small.init(jax.random.key(1), batch["image"])
      >>> adapters, memory = loss.init(jax.random.key(2), variables, batch, teacher)
      >>> adapters["hint"]["kernel"].shape
      (4, 8)
    """
    names = [term.name for term in terms]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(
            f"an objective needs terms, each with a name of its own (name=...); got {names}"
        )
    # Each feature is captured once, however many terms read it.
    paths = tuple(dict.fromkeys(chain.from_iterable(term.student for term in terms)))
    task = task or classification(inputs, labels)._replace(mask=mask)
    own = _Distillation(pure(model, paths), tuple(terms), task, augment, average, resample)
    return StatefulLoss(own.init, averaged(own.totals), own.totals)


class _Distillation(NamedTuple):
    """The arguments of `distillation`, and the functions of its loss."""

    student: PureModel
    terms: tuple[Term, ...]
    task: Task
    augment: Augment | None
    average: float | None
    resample: Resample | None

    def context_of(
        self,
        params: Params,
        state: PyTree,
        memory: PyTree,
        batch: Batch,
        key: jax.Array,
        teacher: Teacher | Teachers | None,
        step: Step,
        train: bool = True,
    ) -> tuple[LossContext, PyTree]:
        """Run both models; return what the terms read and the new model state."""
        inputs = self.task.inputs_of(batch)
        heads = any(term.heads for term in self.terms)
        # Ranges of activations must not move with padding.
        counts = chosen(batch, self.task.mask)

        def run(
            params: Params, state: PyTree, inputs: Inputs, key: jax.Array, counts: Mask | None
        ) -> tuple[PyTree, Features, PyTree]:
            if train:
                return self.student.train(params, state, inputs, key, counts)
            return (*self.student.evaluate(params, state, inputs), state)

        args = (params, state, inputs, key, counts)
        with jax.named_scope("student"):
            (logits, features, state), own_head = _with_head(run, "the student", heads)(*args)
        if self.average is not None:
            teacher = _average_teacher(self.student, memory["average"])
        with jax.named_scope("teacher"):
            outputs, head = _teacher_outputs(batch, teacher, inputs, heads)
        teacher_logits, teacher_features = outputs
        # Without labels of its own, a task's labels are what the teacher says.
        labels = teacher_logits if self.task.labels is None else batch[self.task.labels]
        context = LossContext(
            student_logits=logits,
            teacher_logits=teacher_logits,
            labels=labels,
            student=features,
            teacher=teacher_features,
            params=params,
            teacher_variables=getattr(teacher, "variables", None),
            batch=batch,
            key=key,
            step=step,
            student_head=own_head,
            teacher_head=head,
        )
        return context, state

    def totals(
        self,
        params: Params,
        parts: PyTree,
        state: PyTree,
        memory: PyTree,
        batch: Batch,
        key: jax.Array,
        teacher: Teacher | Teachers | None,
        step: Step,
        train: bool = True,
    ) -> tuple[Objective, Aux]:
        # Four keys in any case: a run with augmentation has the dropout of one without.
        augment_key, dropout_key, term_key, resample_key = jax.random.split(key, 4)
        # Before both forwards, so that teacher and student are given the same inputs.
        if train and self.augment is not None:
            batch = self.augment(augment_key, batch)
        batch = self.task.prepare(batch)
        if train and self.resample is not None:
            # What the student samples is data: no gradient flows through how it was drawn.
            frozen = jax.lax.stop_gradient((params, state))
            with jax.named_scope("resample"):
                batch = self.resample(
                    resample_key, batch, lambda x: self.student.evaluate(*frozen, (x,))[0]
                )
        context, new_state = self.context_of(
            params, state, memory, batch, dropout_key, teacher, step, train
        )
        context = context._replace(key=term_key)
        with jax.named_scope("loss"):
            losses, new_memory, said = _term_losses(
                self.terms, context, parts, memory, self.task.mask
            )
            fidelity = _fidelity(context, memory, self.task, said)
        objective = tuple((value_at(term.weight, step), losses[term.name]) for term in self.terms)
        if self.average is not None:
            new_memory["average"] = _next_average(
                memory["average"], params, new_state, self.average
            )
        # The teacher's hash, which `init` put there, is carried from step to step.
        if "teacher" in memory:
            new_memory["teacher"] = memory["teacher"]
        metrics = {**losses, **fidelity}
        return objective, (new_state, jax.lax.stop_gradient(new_memory), metrics)

    def init(
        self,
        key: jax.Array,
        variables: Variables,
        batch: Batch,
        teacher: Teacher | Teachers | None,
    ) -> tuple[PyTree, PyTree]:
        params = variables["params"]
        state = {name: each for name, each in variables.items() if name != "params"}
        own_memory = {}
        if self.average is not None:
            own_memory["average"] = {"params": params, "state": state}
        if teacher is not None:
            own_memory["teacher"] = fingerprint(teacher)
        batch_key, term_key = jax.random.split(key)

        # Adapters need the shapes of features alone, so both models are traced and not run.
        def context_shapes(
            params: Params, batch: Batch, teacher: Teacher | Teachers | None
        ) -> LossContext:
            if self.augment is not None:
                batch = self.augment(batch_key, batch)
            batch = self.task.prepare(batch)
            start = jnp.zeros((), jnp.int32)
            context, _ = self.context_of(
                params, state, own_memory, batch, batch_key, teacher, start
            )
            return context._replace(key=None)  # a typed key is no output of eval_shape

        shapes = jax.eval_shape(context_shapes, params, batch, teacher)
        parts: dict[str, PyTree] = {}
        memory: dict[str, PyTree] = {}
        for i, term in enumerate(self.terms):
            # A term without adapters or memory gets no entry: empty parts stay out of the state.
            adapter_params, kept_arrays = term.init(jax.random.fold_in(term_key, i), shapes)
            if jax.tree.leaves(adapter_params):
                parts[term.name] = adapter_params
            if jax.tree.leaves(kept_arrays):
                memory[term.name] = kept_arrays
        return parts, {**memory, **own_memory}


@renamed_arguments(smoothing="label_smoothing")
def supervised(
    model: Model,
    *,
    label_smoothing: float = 0.0,
    augment: Augment | None = None,
    inputs: str | tuple[str, ...] = "image",
    labels: str = "label",
    mask: str = "mask",
) -> StatefulLoss:
    """Return the loss of a classifier: `distillation` with the one term `on_labels`.

    ``mean(cross_entropy(logits, labels))`` over the examples or tokens that the mask counts. It has
    no adapters and no memory, so `create` needs no ``aux``.

    Args:
      model: the student, see `distillation`; dropout gets the step's key.
      label_smoothing: see `compress_jax.distill.cross_entropy`.
      augment: ``(key, batch) -> batch``, applied in training only.
      inputs: the batch entry that is given to the model.
      labels: the batch entry with integer labels, ``[batch]`` or ``[batch, sequence]``, or with
        probabilities.
      mask: the batch entry with the mask over examples or tokens, if it is there.

    Returns:
      A `StatefulLoss` with metrics ``labels`` and ``accuracy``, for steps without a teacher.

    Example:
      >>> import compress_jax as cj
      >>> model = cj.models.LeNet300100()
      >>> batch = {"image": jnp.ones((2, 4)), "label": jnp.array([0, 1])}
      >>> params = model.init(jax.random.key(0), batch["image"])["params"]
      >>> loss = cj.train.supervised(model)
      >>> value, (model_state, metrics) = loss(params, {}, batch, jax.random.key(1))
      >>> value.shape, model_state, sorted(metrics)
      ((), {}, ['accuracy', 'labels'])
    """
    terms = [on_labels(label_smoothing=label_smoothing)]
    return distillation(model, terms, augment=augment, inputs=inputs, labels=labels, mask=mask)


def distilled(
    model: Model,
    teacher_apply: Callable[[Variables, PyTree], jax.Array],
    loss_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    augment: Augment | None = None,
    inputs: str | tuple[str, ...] = "image",
    labels: str = "label",
    mask: str = "mask",
) -> StatefulLoss:
    """Deprecated: use ``distillation(model, [on_logits(loss_fn, labels=True)])`` with a `Teacher`.

    Args:
      model: the student.
      teacher_apply: ``(teacher, x) -> logits``, in eval mode.
      loss_fn: ``(student_logits, teacher_logits, labels) -> loss of each example``.
      augment: ``(key, batch) -> batch``, applied in training only.
      inputs: the batch entry that is given to both models.
      labels: the batch entry with integer labels.
      mask: the batch entry with the mask.

    Returns:
      The loss; the teacher given to the step is the tree that ``teacher_apply`` takes.

    Example:
      >>> import compress_jax as cj
      >>> model = cj.models.LeNet300100()
      >>> batch = {"image": jnp.ones((2, 4)), "label": jnp.array([0, 1])}
      >>> variables = model.init(jax.random.key(0), batch["image"])
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     square = lambda s, t, y: jnp.square(s - t).mean(-1)
      ...     loss = cj.train.distilled(model, model.apply, square)
      >>> value, _ = loss(variables["params"], {}, batch, jax.random.key(1), variables)
      >>> float(value)
      0.0
    """
    text = (
        "train.distilled is now train.distillation(model, [distill.on_logits(loss, labels=True)])"
    )
    warnings.warn(
        f"{text} with a distill.Teacher; it goes in the next version",
        DeprecationWarning,
        stacklevel=2,
    )
    terms = [on_logits(loss_fn, labels=True)]
    loss = distillation(model, terms, augment=augment, inputs=inputs, labels=labels, mask=mask)

    def init(
        key: jax.Array, variables: Variables, batch: Batch, teacher: Variables
    ) -> tuple[PyTree, PyTree]:
        return loss.init(key, variables, batch, Teacher(teacher_apply, teacher))

    inner = loss.totals
    assert inner is not None  # `distillation` has them

    def totals(*args: PyTree, **options: bool) -> tuple[Objective, Aux]:
        *rest, teacher, step = args
        return inner(*rest, Teacher(teacher_apply, teacher), step, **options)

    return StatefulLoss(init, averaged(totals), totals)


def _with_head(
    fn: Callable[..., PyTree], who: str, heads: bool
) -> Callable[..., tuple[PyTree, Head | None]]:
    """Return a function's results with its head's operands, or None if no term asks for them."""
    if not heads:
        return lambda *args: (fn(*args), None)

    def run(*args: PyTree) -> tuple[PyTree, Head]:
        out, product = with_last_product(fn, who)(*args)
        return out, Head(*product)

    return run


def _teacher_outputs(
    batch: Batch, teacher: Teacher | Teachers | None, inputs: Inputs, heads: bool
) -> tuple[tuple[PyTree, dict[str, jax.Array]], Head | None]:
    """Return the teacher's logits and features, and its head if a term asks for it."""
    if not heads:
        return _cached_or_fresh(batch, teacher, inputs), None
    if "teacher" in batch or not isinstance(teacher, Teacher):
        raise ConfigError(
            "a loss over the vocabulary is computed from the teacher's hidden states: give the "
            "step one Teacher, and batches without cached logits (for those there is "
            "on_logits(top_k_kl))"
        )
    run = _with_head(lambda teacher, *inputs: teacher.forward(*inputs), "the teacher", True)
    return run(teacher, *inputs)


def _cached_or_fresh(
    batch: Batch, teacher: Teacher | Teachers | None, inputs: Inputs
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Return cached teacher logits and features, else those of a fresh forward pass."""
    if "teacher" in batch:
        features = {
            name.removeprefix(TEACHER): feature
            for name, feature in batch.items()
            if name.startswith(TEACHER)
        }
        return batch["teacher"], features
    return (None, {}) if teacher is None else teacher.forward(*inputs)


def _term_losses(
    terms: Sequence[Term], context: LossContext, parts: PyTree, memory: PyTree, mask: str
) -> tuple[dict[str, Total], dict[str, PyTree], Predicted | None]:
    """Return each term's total and new memory, and the predictions that one of them knows.

    Each draws from a key of its own.
    """
    totals: dict[str, Total] = {}
    said: Predicted | None = None
    new_memory: dict[str, PyTree] = {}
    for i, term in enumerate(terms):
        own_key = jax.random.fold_in(context.key, i)
        own = _masked_context(context._replace(key=own_key), term, mask)
        loss, new = term.loss(own, parts.get(term.name, {}), memory.get(term.name, {}))
        if isinstance(loss, Predicted):
            said = loss
            loss = loss.loss
        totals[term.name] = everything(total_of(term.name, loss, own.mask, masked=False))
        if jax.tree.leaves(new):
            new_memory[term.name] = new
    return totals, new_memory, said


def _masked_context(context: LossContext, term: Term, mask: str) -> LossContext:
    """Return the context of one term, with its mask, and zeros for everything masked."""
    if term.whole:
        return context
    default = chosen(context.batch, mask)
    own = default
    if term.mask is not None:
        own = chosen(context.batch, term.mask, f"the term {term.name!r}")
    if own is None:
        return context
    leading = context.student_logits.shape[:-1]  # [batch], or [batch, *positions]
    # A term's own mask may be of feature positions; the logits then take the objective's mask.
    candidates = [each for each in (own, default) if each is not None]
    fitting = [each for each in candidates if fits(each, leading, examples=True)]
    if not fitting and term.mask is None:
        shape = context.student_logits.shape
        what = f"the student's logits {shape}, for the term {term.name!r}"
        fitted(own, leading, what, examples=True)  # raises the ShapeError
    outputs = (context.student_logits, context.teacher_logits, context.labels)
    if fitting:
        counts = fitted(fitting[0], leading, examples=True)
        outputs = jax.tree.map(lambda x: _masked_outputs(x, counts), outputs)
    student_logits, teacher_logits, labels = outputs
    return context._replace(
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        labels=labels,
        student={path: _masked_feature(x, own) for path, x in context.student.items()},
        teacher={path: _masked_feature(x, own) for path, x in context.teacher.items()},
        mask=own,
    )


def _masked_feature(feature: jax.Array, mask: jax.Array) -> jax.Array:
    """Return a feature with zeros at masked positions, or at least in masked examples."""
    for leading in (feature.shape[:-1], feature.shape[:1]):
        if leading and fits(mask, leading, examples=True):
            return kept(feature, fitted(mask, leading, examples=True))
    return feature


def _masked_outputs(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Return logits or labels with zeros for masked entries."""
    if x.shape[: counts.ndim] == counts.shape:  # [*leading], or [*leading, classes]
        return kept(x, counts)
    return jax.vmap(lambda x: kept(x, counts))(x)  # [teachers, *leading, classes]


def _next_average(average: PyTree, params: Params, state: PyTree, decay: float) -> PyTree:
    """Return the moving average after this step; batch statistics are the current ones."""
    # optax takes the weight of the new params: step_size * new + (1 - step_size) * old.
    moved = optax.incremental_update(jax.lax.stop_gradient(params), average["params"], 1 - decay)
    return {"params": moved, "state": state}


def _fidelity(
    context: LossContext, memory: PyTree, task: Task, said: Predicted | None
) -> LossMetrics:
    """Return the accuracy of student and teacher on this batch, and their agreement."""
    hits = _hits(context, said) if task.logits else {}
    counts = chosen(context.batch, task.mask)
    metrics: dict[str, jax.Array | Total] = {}
    for name, hit in hits.items():
        own = None
        if counts is not None:
            own = fitted(counts, hit.shape, "the predictions", examples=True)
        metrics[name] = total(hit.astype(jnp.float32), own)
    if "teacher" in memory:
        # 24 bits are exact in float32.
        digits = memory["teacher"][:3].astype(jnp.float32)  # [3], bytes of the hash
        metrics["teacher_id"] = digits[0] * 65536.0 + digits[1] * 256.0 + digits[2]
    return metrics


def _hits(context: LossContext, said: Predicted | None) -> dict[str, jax.Array]:
    """Return where the largest logits of student, teacher and labels are the same."""
    labels = context.labels
    best = None
    if said is not None:  # a term that made no whole logits
        predicted, best = said.student, said.teacher
    else:
        predicted = context.student_logits.argmax(axis=-1)  # [*leading]
    if said is None and context.teacher_logits is not None:
        best = _predictions(context.teacher_logits, context.student_logits.ndim)
    # Labels may be what the teacher said, or probabilities from a mixup.
    if labels is context.teacher_logits:
        labels = best
    elif not jnp.issubdtype(labels.dtype, jnp.integer):
        labels = labels.argmax(axis=-1)
    hits = {}
    if labels is not None and labels.shape == predicted.shape:  # labels of frames are fewer
        hits["accuracy"] = predicted == labels
        if best is not None:
            hits["teacher_accuracy"] = best == labels
    if best is not None:
        hits["agreement"] = predicted == best
    return hits


def _predictions(teacher_logits: jax.Array | TopK, ndim: int) -> jax.Array:
    """Return the classes predicted by one teacher, several, or a top-k cache."""
    if isinstance(teacher_logits, TopK):
        return teacher_logits.ids[..., 0]  # the largest comes first
    if teacher_logits.ndim > ndim:  # [teachers, *leading, classes]
        teacher_logits = ensemble(teacher_logits)
    return teacher_logits.argmax(axis=-1)


def _average_teacher(student: PureModel, average: PyTree) -> Teacher:
    """Return the student's moving average as a teacher."""

    def apply(variables: Variables, *inputs: PyTree) -> PyTree:
        return student.evaluate(variables["params"], variables["state"], inputs)

    return Teacher(apply, average)
