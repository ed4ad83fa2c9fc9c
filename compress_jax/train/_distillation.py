"""Distillation by any terms: one forward of the student, one of the teacher on the same view, and the weighted sum."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from compress_jax.core.errors import ConfigError
from compress_jax.core.types import Batch, Params, PyTree, Step, Variables
from compress_jax.distill import Seen, Teacher, Term, TopK, Total, capture, ensemble, fingerprint
from compress_jax.distill._masks import fits, fitted, kept
from compress_jax.distill._objective.terms import value_at
from compress_jax.distill._objective.totals import total_of
from compress_jax.train._losses import Augment
from compress_jax.train._objective import Objective, averaged, chosen, everything, total
from compress_jax.train._step import Metrics, StatefulLoss

# A student as the training objective runs it: logits, features and new model state, of a Linen or
# an NNX model.


class Student(NamedTuple):
    """A model as two pure functions.

    Attributes:
      train: ``(params, model_state, x, key) -> (logits, features, model_state)``.
      evaluate: ``(params, model_state, x) -> (logits, features)``, in eval mode.
    """

    train: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, Any]]
    evaluate: Callable[[Any, Any, Any], tuple[Any, Any]]


def student(model: Any, patterns: tuple[str, ...]) -> Student:
    """Return a student whose features of some paths are captured.

    Args:
      model: a Linen module called as ``model(x, train=...)``; or the graphdef of an NNX module,
        from ``nnx.split(module, nnx.Param, ...)``, whose state is
        ``{"params": params, "rest": rest}``.
      patterns: globs of paths, see `compress_jax.distill.capture`; none captures nothing.

    Returns:
      A `Student`.

    Raises:
      ConfigError: if it is neither.
    """
    from flax import nnx

    if isinstance(model, nn.Module):
        return _linen(model, patterns)
    if isinstance(model, nnx.GraphDef):
        return _nnx(model, patterns)
    raise ConfigError(
        "the student is a Linen module or the graphdef of nnx.split(module, nnx.Param, ...), got "
        f"{model!r}"
    )


def _linen(model: nn.Module, patterns: tuple[str, ...]) -> Student:
    see = (
        capture(model, patterns)
        if patterns
        else lambda *args, **options: (model.apply(*args, **options), {})
    )

    def train(params: Params, model_state: PyTree, x: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        variables = {"params": params, **model_state}
        (logits, new), features = see(
            variables, x, train=True, mutable=list(model_state), rngs={"dropout": key}
        )
        return logits, features, {**model_state, **new}

    def evaluate(params: Params, model_state: PyTree, x: Any) -> tuple[Any, Any]:
        return see({"params": params, **model_state}, x, train=False)

    return Student(train, evaluate)


def _nnx(graphdef: Any, patterns: tuple[str, ...]) -> Student:
    from flax import nnx

    def merged(params: Params, model_state: PyTree, training: bool) -> Any:
        module = nnx.merge(graphdef, params, model_state.get("rest", nnx.State({})), copy=True)
        (module.train if training else module.eval)()
        return module

    def run(module: Any, x: Any) -> tuple[Any, Any]:
        return capture(module, patterns)(x) if patterns else (module(x), {})

    def train(params: Params, model_state: PyTree, x: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        module = merged(params, model_state, True)
        nnx.reseed(module, dropout=key)
        logits, features = run(module, x)
        rest = nnx.split(module, nnx.Param, ...)[2]
        like = jax.tree.leaves(rest), jax.tree.structure(model_state.get("rest", rest))
        return logits, features, {"rest": jax.tree.unflatten(like[1], like[0])}

    def evaluate(params: Params, model_state: PyTree, x: Any) -> tuple[Any, Any]:
        return run(merged(params, model_state, False), x)

    return Student(train, evaluate)


TEACHER = "teacher/"


def distillation(
    model: Any,
    terms: Sequence[Term],
    *,
    augment: Augment | None = None,
    average: float | None = None,
    resample: Callable[[jax.Array, Any, Callable[[Any], Any]], Any] | None = None,
    inputs: str = "image",
    labels: str = "label",
    mask: str = "mask",
) -> StatefulLoss:
    """Return the loss that is a weighted sum of terms: ``sum_k weight_k(step) * mean(loss_k)``, means over what counts.

    The batch is augmented once, before both forwards; the teacher may have a view of its own
    (`Teacher.view`). Features are captured for terms that ask for them. What terms learn comes
    under ``state.parts``, what they keep under ``state.memory``, both by the term's name. Metrics:
    each term's mean loss, ``accuracy``, ``teacher_accuracy`` and ``agreement`` on this batch, and
    ``teacher_id``, the first 24 bits of its hash; the whole hash is in the memory.

    Args:
      model: the student: a Linen module called as ``model(x, train=...)``, or the graphdef of an
        NNX module, see `compress_jax.distill.capture`.
      terms: `on_labels`, `on_logits`, `on_features`, `contrast`, `on_weights` or your own `Term`.
      augment: ``(key, batch) -> batch``; `compress_jax.data.mixup` makes labels probabilities.
      average: the teacher is the student's own moving average, of this decay:
        ``a = average * a + (1 - average) * params`` of the params as the compression shows them.
        The step is given no teacher then.
      resample: ``(key, batch, logits) -> batch``, given the student as it is:
        `compress_jax.distill.on_policy`.
      inputs: the batch's entry that both models are given.
      labels: the batch's entry with labels.
      mask: the batch's entry of which examples or tokens count, if it is there; see
        `compress_jax.distill.masks` for what fits what. What does not count reaches neither a value
        nor a gradient, in no term and no metric. A term may have one of its own
        (``on_features(..., mask="patches")``). What a model makes of padding inside (batch
        statistics, attention to padding) is the model's affair: give it what it needs in its
        inputs.

    Returns:
      A `StatefulLoss`, whose means are over all devices and microbatches of a step (`make_step`):
      ``create(variables, compression, optimizer, key, loss.init(key, variables, batch, teacher))``.
      The teacher given to the step is a `Teacher` or `Teachers`; or None, if the batch has its
      logits as ``"teacher"`` (see `compress_jax.distill.CachedFeed`), which then count. Raises a
      ConfigError if two terms share a name; its loss raises a ShapeError that names the term if a
      mask does not fit, and a ConfigError if a mask asked for by name is missing.

    Example:
      >>> from compress_jax.distill import capture, hint, kl, linear, on_features, on_labels, on_logits
      >>> from compress_jax.models import LeNet300100
      >>> small, large = LeNet300100(hidden=(4,)), LeNet300100(hidden=(8,))
      >>> batch = {"image": jnp.ones((2, 4)), "label": jnp.array([0, 1])}
      >>> see = capture(large, ("dense_0",))
      >>> teacher = Teacher(see, large.init(jax.random.key(0), batch["image"]))
      >>> terms = [on_labels(0.1), on_logits(kl, 0.9, temperature=4.0)]
      >>> terms.append(on_features(hint, "dense_0", "dense_0", 100.0, part=linear()))
      >>> loss, variables = distillation(small, terms), small.init(jax.random.key(1), batch["image"])
      >>> parts, memory = loss.init(jax.random.key(2), variables, batch, teacher)
      >>> parts["hint"]["kernel"].shape
      (4, 8)
    """
    names = [term.name for term in terms]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(
            f"an objective needs terms, each with a name of its own (name=...); got {names}"
        )
    runs = student(model, tuple(dict.fromkeys(path for term in terms for path in term.student)))

    def see(
        params: Params,
        state: PyTree,
        memory: PyTree,
        batch: Batch,
        key: jax.Array,
        teacher: Any,
        step: Step,
    ) -> tuple[Seen, Any]:
        logits, features, state = runs.train(params, state, batch[inputs], key)
        if average is not None:
            teacher = _averaged(runs, memory["average"])
        given, others = _told(batch, teacher, inputs)
        variables = getattr(teacher, "variables", None)
        return Seen(
            logits, given, batch[labels], features, others, params, variables, batch, key, step
        ), state

    def totals(
        params: Params,
        parts: PyTree,
        state: PyTree,
        memory: PyTree,
        batch: Batch,
        key: jax.Array,
        teacher: Any,
        step: Step,
    ) -> tuple[Objective, tuple[Any, Any, Metrics]]:
        first, second, third, fourth = jax.random.split(key, 4)
        batch = batch if augment is None else augment(first, batch)
        if resample is not None:
            frozen = jax.lax.stop_gradient((params, state))
            batch = resample(fourth, batch, lambda x: runs.evaluate(*frozen, x)[0])
        seen, state = see(params, state, memory, batch, second, teacher, step)
        metrics, kept = _each_term(terms, seen._replace(key=third), parts, memory, mask)
        objective = tuple((value_at(term.weight, step), metrics[term.name]) for term in terms)
        if average is not None:
            kept["average"] = _moved(memory["average"], params, state, average)
        kept |= {"teacher": memory["teacher"]} if "teacher" in memory else {}
        return objective, (
            state,
            jax.lax.stop_gradient(kept),
            {**metrics, **_fidelity(seen, memory, mask)},
        )

    def init(key: jax.Array, variables: Variables, batch: Batch, teacher: Any) -> tuple[Any, Any]:
        params, state = (
            variables["params"],
            {name: each for name, each in variables.items() if name != "params"},
        )
        own = {"average": {"params": params, "state": state}} if average is not None else {}
        own |= {} if teacher is None else {"teacher": fingerprint(teacher)}
        first, second = jax.random.split(key)

        def shown(params: Params, batch: Batch, teacher: Any) -> Seen:
            batch = batch if augment is None else augment(first, batch)
            seen, _ = see(params, state, own, batch, first, teacher, jnp.zeros((), jnp.int32))
            return seen._replace(key=None)

        shapes = jax.eval_shape(shown, params, batch, teacher)
        begun = {
            term.name: term.init(jax.random.fold_in(second, i), shapes)
            for i, term in enumerate(terms)
        }
        parts, memory = (
            {name: each[i] for name, each in begun.items() if jax.tree.leaves(each[i])}
            for i in (0, 1)
        )
        return parts, {**memory, **own}

    return StatefulLoss(init, averaged(totals), totals)


def _told(batch: Batch, teacher: Any, inputs: str) -> tuple[Any, Any]:
    """Return the teacher's logits and features: those that came with the batch, or what it says now."""
    if "teacher" in batch:
        return batch["teacher"], {
            n.removeprefix(TEACHER): f for n, f in batch.items() if n.startswith(TEACHER)
        }
    return (None, {}) if teacher is None else teacher.see(batch[inputs])


def _each_term(
    terms: Sequence[Term], seen: Seen, parts: PyTree, memory: PyTree, mask: str
) -> tuple[dict[str, Total], Any]:
    """Return the total of each term, which draws from a key of its own, and what it keeps."""
    totals, kept = {}, {}
    for i, term in enumerate(terms):
        own = _masked(seen._replace(key=jax.random.fold_in(seen.key, i)), term, mask)
        each, new = term.loss(own, parts.get(term.name, {}), memory.get(term.name, {}))
        totals[term.name] = everything(total_of(term.name, each, own.mask, told=False))
        kept |= {term.name: new} if jax.tree.leaves(new) else {}
    return totals, kept


def _masked(seen: Seen, term: Term, mask: str) -> Seen:
    """Return what a term may look at: nothing of what does not count."""
    if term.whole:
        return seen
    default = chosen(seen.batch, mask)
    own = default if term.mask is None else chosen(seen.batch, term.mask, f"the term {term.name!r}")
    if own is None:
        return seen
    leading = seen.student_logits.shape[:-1]
    of_logits = next(
        (
            each
            for each in (own, default)
            if each is not None and fits(each, leading, examples=True)
        ),
        None,
    )
    if of_logits is None and term.mask is None:
        fitted(
            own,
            leading,
            f"the student's logits {seen.student_logits.shape}, for the term {term.name!r}",
            examples=True,
        )
    student, teacher = (
        {p: _shown(f, own) for p, f in each.items()} for each in (seen.student, seen.teacher)
    )
    logits = seen.student_logits, seen.teacher_logits, seen.labels
    if of_logits is not None:
        counts = fitted(of_logits, leading, examples=True)
        logits = jax.tree.map(lambda x: _kept(x, counts), logits)
    return seen._replace(
        student_logits=logits[0],
        teacher_logits=logits[1],
        labels=logits[2],
        student=student,
        teacher=teacher,
        mask=own,
    )


def _shown(feature: jax.Array, mask: Any) -> jax.Array:
    """Return a feature with zeros where its positions, or at least its examples, do not count."""
    for leading in (feature.shape[:-1], feature.shape[:1]):
        if leading and fits(mask, leading, examples=True):
            return kept(feature, fitted(mask, leading, examples=True))
    return feature


def _kept(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Return logits or labels with zeros for what does not count; those of several teachers have an axis in front."""
    several = x.shape[: counts.ndim] != counts.shape
    return jax.vmap(lambda x: kept(x, counts))(x) if several else kept(x, counts)


def _averaged(runs: Student, average: Any) -> Teacher:
    """Return the moving average as a teacher."""

    def apply(variables: Variables, x: Any) -> Any:
        return runs.evaluate(variables["params"], variables["state"], x)

    return Teacher(apply, average)


def _moved(average: Any, params: Params, state: PyTree, decay: float) -> Any:
    """Return the average after this step: params move slowly, the model's state (batch statistics) is what it is."""
    moved = optax.incremental_update(jax.lax.stop_gradient(params), average["params"], 1 - decay)
    return {"params": moved, "state": state}


def _fidelity(seen: Seen, memory: PyTree, mask: str) -> Metrics:
    """Return how right student and teacher are on what counts of this batch, and how much they agree."""
    labels = (
        seen.labels
        if jnp.issubdtype(seen.labels.dtype, jnp.integer)
        else seen.labels.argmax(axis=-1)
    )
    own, given = seen.student_logits.argmax(axis=-1), seen.teacher_logits
    hits = {"accuracy": own == labels}
    if given is not None:
        best = _best(given, seen.student_logits.ndim)
        hits |= {"teacher_accuracy": best == labels, "agreement": own == best}
    counts = chosen(seen.batch, mask)
    if counts is not None:
        counts = fitted(counts, own.shape, "the predictions", examples=True)
    metrics: Metrics = {name: total(hit.astype(jnp.float32), counts) for name, hit in hits.items()}
    if "teacher" in memory:
        digits = memory["teacher"][:3].astype(jnp.float32)
        metrics["teacher_id"] = digits[0] * 65536.0 + digits[1] * 256.0 + digits[2]
    return metrics


def _best(given: Any, ndim: int) -> jax.Array:
    """Return what a teacher, several or a cached one predicts."""
    if isinstance(given, TopK):
        return given.ids[..., 0]
    return (ensemble(given) if given.ndim > ndim else given).argmax(axis=-1)
