"""How much it matters that one leaf changes: seen in the outputs, or in the curvature of the loss."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.errors import DataError, ShapeError
from compress_jax.core.packed import to_dense
from compress_jax.distill import kl
from compress_jax.prune.importance import squared_gradients

Leaves = dict[str, Any]
Forms = Mapping[str, Mapping[str, Any]]  # path -> option -> what the leaf is then, packed or an array
Scores = dict[str, dict[str, float]]
Model = Callable[..., Any]  # (leaves by path, *inputs) -> outputs


def divergence(expected: jax.Array, got: jax.Array) -> jax.Array:
    r"""Return :math:`KL(softmax(expected) \| softmax(got))`, float32, in nats: over the last axis, a mean over the others.

    Example:
      >>> float(divergence(jnp.zeros((2, 3)), jnp.zeros((2, 3))))
      0.0
    """
    return kl(got, expected).mean()


def squared_error(expected: jax.Array, got: jax.Array) -> jax.Array:
    """Return the mean squared difference of outputs, float32.

    Example:
      >>> float(squared_error(jnp.zeros(2), jnp.array([1.0, 3.0])))
      5.0
    """
    return jnp.square(got.astype(jnp.float32) - expected.astype(jnp.float32)).mean()


def by_outputs(
    model: Model, leaves: Leaves, batches: Iterable[tuple[Any, ...]], forms: Forms, distance: Callable[..., jax.Array]
) -> Scores:
    """Score each form of each leaf by how far the outputs move when only that leaf takes that form.

    Args:
      model: ``(leaves, *inputs) -> array``; compiled once.
      leaves: all leaves by path.
      batches: the inputs.
      forms: the candidates' forms.
      distance: ``(expected outputs, outputs) -> float32 scalar``.

    Returns:
      The mean distance over batches.

    Raises:
      DataError: if there is no batch.
      ShapeError: if the model returns anything but one array.

    Example:
      >>> model = lambda leaves, x: x * leaves["w"]
      >>> by_outputs(model, {"w": jnp.ones(2)}, [(jnp.ones(2),)], {"w": {"zero": jnp.zeros(2)}}, squared_error)
      {'w': {'zero': 1.0}}
    """
    run, moved = jax.jit(model), jax.jit(lambda leaves, expected, inputs: distance(expected, model(leaves, *inputs)))
    totals, count = {path: dict.fromkeys(options, 0.0) for path, options in forms.items()}, 0
    for inputs in batches:
        count += 1
        expected = run(leaves, *inputs)
        if not isinstance(expected, jax.Array):
            raise ShapeError(f"fn must return one array of outputs to compare, not a {type(expected).__name__}")
        for path, option, form in _each(forms):
            if form is not leaves[path]:
                totals[path][option] += float(moved({**leaves, path: to_dense(form)}, expected, inputs))
    return _means(totals, count)


def by_fisher(model: Model, leaves: Leaves, batches: Iterable[tuple[Any, ...]], forms: Forms) -> Scores:
    r"""Score by the empirical Fisher, :math:`E[\sum_i (g_i \Delta w_i)^2]`, where g is the gradient of a batch's loss.

    Args:
      model: ``(leaves, *inputs) -> loss``, a scalar.
      leaves: all leaves by path.
      batches: the inputs.
      forms: the candidates' forms.

    Returns:
      The scores.

    Raises:
      DataError: if there is no batch.
      ShapeError: if the loss is no scalar.

    Example:
      >>> loss = lambda leaves, x: (x * leaves["w"]).sum()
      >>> by_fisher(loss, {"w": jnp.ones(2)}, [(jnp.array([1.0, 3.0]),)], {"w": {"zero": jnp.zeros(2)}})
      {'w': {'zero': 10.0}}
    """
    loss, (chosen, rest) = _scalar(model), _divided(leaves, forms)
    squares = squared_gradients(
        lambda chosen, rest, *inputs: loss({**rest, **chosen}, *inputs), chosen, ((rest, *inputs) for inputs in batches)
    )
    return {
        path: {option: float((squares[path] * _change(leaves[path], form)).sum()) for option, form in options.items()}
        for path, options in forms.items()
    }


def by_curvature(
    model: Model, leaves: Leaves, batches: Iterable[tuple[Any, ...]], forms: Forms, key: jax.Array, probes: int
) -> Scores:
    r"""Score by the mean eigenvalue of the loss's Hessian, :math:`tr(H_p) / n_p \cdot \|\Delta w_p\|^2`, as HAWQ-V2 does.

    The traces of the diagonal blocks are estimated with Rademacher probes, :math:`E[v_p^\top (H v)_p]`, by derivatives
    of the gradient; a trace that comes out negative counts as zero.

    Args:
      model: ``(leaves, *inputs) -> loss``, a scalar.
      leaves: all leaves by path.
      batches: the inputs.
      forms: the candidates' forms.
      key: typed PRNG key of the probes.
      probes: how many a batch.

    Returns:
      The scores.

    Raises:
      DataError: if there is no batch.
      ShapeError: if the loss is no scalar.

    Example:
      >>> loss = lambda leaves, x: (x * leaves["w"] ** 2).sum()  # its Hessian is diagonal: the estimate is exact
      >>> w, zero, batches = jnp.ones(2), {"zero": jnp.zeros(2)}, [(jnp.array([1.0, 3.0]),)]
      >>> by_curvature(loss, {"w": w}, batches, {"w": zero}, jax.random.key(0), 1)
      {'w': {'zero': 8.0}}
    """
    loss = _scalar(model)

    @jax.jit
    def traces(chosen: Leaves, rest: Leaves, inputs: tuple[Any, ...], key: jax.Array) -> Leaves:
        gradient = jax.grad(lambda chosen: loss({**rest, **chosen}, *inputs))

        def probe(key: jax.Array) -> Leaves:
            keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))
            signs = {path: jax.random.rademacher(keys[path], x.shape, x.dtype) for path, x in chosen.items()}
            turned = jax.jvp(gradient, (chosen,), (signs,))[1]
            return {path: jnp.vdot(signs[path].astype(jnp.float32), turned[path].astype(jnp.float32)) for path in chosen}

        return jax.tree.map(jnp.mean, jax.lax.map(probe, jax.random.split(key, probes)))

    chosen, rest = _divided(leaves, forms)
    totals, count = dict.fromkeys(chosen, 0.0), 0
    for inputs in batches:
        count += 1
        found = traces(chosen, rest, inputs, jax.random.fold_in(key, count))
        totals = {path: total + float(found[path]) for path, total in totals.items()}
    if not count:
        raise _no_batch()
    return {
        path: {o: max(totals[path], 0.0) / count * float(_change(leaves[path], form).mean()) for o, form in options.items()}
        for path, options in forms.items()
    }


def unreached(scores: Scores, leaves: Leaves, forms: Forms) -> tuple[Scores, list[str]]:
    """Give leaves that the batches say nothing about the scores of average ones, for as large a change.

    A leaf whose every form scores exactly 0 though it changes the leaf (a branch that never ran, an expert without tokens)
    was not reached: that is not to say that it does not matter.

    Args:
      scores: of all leaves.
      leaves: all leaves by path.
      forms: the candidates' forms.

    Returns:
      ``(scores, the leaves that were not reached)``. Where no leaf was, the scores stay.

    Example:
      >>> w, forms = jnp.ones(2), {"w": {"a": jnp.zeros(2)}, "unused": {"a": jnp.full(2, -1.0)}}
      >>> unreached({"w": {"a": 3.0}, "unused": {"a": 0.0}}, {"w": w, "unused": w}, forms)
      ({'w': {'a': 3.0}, 'unused': {'a': 12.0}}, ['unused'])
    """
    changes = {path: {o: float(_change(leaves[path], form).sum()) for o, form in own.items()} for path, own in forms.items()}
    dead = [path for path in scores if not any(scores[path].values()) and any(changes[path].values())]
    pairs = [(scores[path][o], changes[path][o]) for path in scores if path not in dead for o in scores[path]]
    rates = [score / change for score, change in pairs if change > 0]
    if not rates:
        return scores, dead
    mean = sum(rates) / len(rates)
    return scores | {path: {o: mean * change for o, change in changes[path].items()} for path in dead}, dead


def _scalar(model: Model) -> Model:
    def loss(leaves: Leaves, *inputs: Any) -> jax.Array:
        value = model(leaves, *inputs)
        if jnp.shape(value) != ():
            raise ShapeError(
                "this measure differentiates a loss: fn(params, *batch) must return a scalar, the mean over the batch, but "
                f"it returns {jax.tree.map(jnp.shape, value)}"
            )
        return value.astype(jnp.float32)

    return loss


def _divided(leaves: Leaves, forms: Forms) -> tuple[Leaves, Leaves]:
    """Return the leaves that have other forms, and the others."""
    return {path: leaves[path] for path in forms}, {path: x for path, x in leaves.items() if path not in forms}


def _each(forms: Forms) -> Iterator[tuple[str, str, Any]]:
    for path, options in forms.items():
        for option, form in options.items():
            yield path, option, form


def _change(x: Any, form: Any) -> jax.Array:
    return jnp.square(to_dense(form).astype(jnp.float32) - x.astype(jnp.float32))


def _means(totals: Scores, count: int) -> Scores:
    if not count:
        raise _no_batch()
    return {path: {option: total / count for option, total in options.items()} for path, options in totals.items()}


def _no_batch() -> DataError:
    return DataError("there is no batch to measure sensitivities with")
