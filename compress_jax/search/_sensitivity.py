"""Sensitivity and cost of every option for every leaf, in one table.

Sensitivity is measured in the outputs or in the curvature of the loss.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, bound
from compress_jax.core.errors import ConfigError, DataError, NonFiniteError, ShapeError
from compress_jax.core.packed import is_packed, nbytes, to_dense
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.table import aligned, units
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.distill import kl
from compress_jax.prune.importance import squared_gradients
from compress_jax.search._budget import byte_budget, work_budget
from compress_jax.trace import SiteCost, cost
from compress_jax.trace._cost import dtype_bits, stored
from compress_jax.trace._jaxpr.find_sites import Traced, layouts_of, trace

# How much it matters that one leaf changes: seen in the outputs, or in the curvature of the loss.


Leaves = dict[str, Any]
Forms = Mapping[
    str, Mapping[str, Any]
]  # path -> option -> what the leaf is then, packed or an array
Scores = dict[str, dict[str, float]]
Model = Callable[..., Any]  # (leaves by path, *inputs) -> outputs


def divergence(expected: jax.Array, got: jax.Array) -> jax.Array:
    r"""Return the mean :math:`KL(softmax(expected) \| softmax(got))` over the last axis.

    It is float32, in nats.

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
    model: Model,
    leaves: Leaves,
    batches: Iterable[tuple[Any, ...]],
    forms: Forms,
    distance: Callable[..., jax.Array],
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
    run, moved = (
        jax.jit(model),
        jax.jit(lambda leaves, expected, inputs: distance(expected, model(leaves, *inputs))),
    )
    totals, count = {path: dict.fromkeys(options, 0.0) for path, options in forms.items()}, 0
    for inputs in batches:
        count += 1
        expected = run(leaves, *inputs)
        if not isinstance(expected, jax.Array):
            raise ShapeError(
                f"fn must return one array of outputs to compare, not a {type(expected).__name__}"
            )
        for path, option, form in _each(forms):
            if form is not leaves[path]:
                totals[path][option] += float(
                    moved({**leaves, path: to_dense(form)}, expected, inputs)
                )
    return _means(totals, count)


def by_fisher(
    model: Model, leaves: Leaves, batches: Iterable[tuple[Any, ...]], forms: Forms
) -> Scores:
    r"""Score by the empirical Fisher, :math:`E[\sum_i (g_i \Delta w_i)^2]`.

    Here g is the gradient of a batch's loss.

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
        lambda chosen, rest, *inputs: loss({**rest, **chosen}, *inputs),
        chosen,
        ((rest, *inputs) for inputs in batches),
    )
    return {
        path: {
            option: float((squares[path] * _change(leaves[path], form)).sum())
            for option, form in options.items()
        }
        for path, options in forms.items()
    }


def by_curvature(
    model: Model,
    leaves: Leaves,
    batches: Iterable[tuple[Any, ...]],
    forms: Forms,
    key: jax.Array,
    probes: int,
) -> Scores:
    r"""Score by the mean Hessian eigenvalue, :math:`tr(H_p) / n_p \cdot \|\Delta w_p\|^2`.

    This is the metric of HAWQ-V2.

    The traces of the diagonal blocks are estimated with Rademacher probes,
    :math:`E[v_p^\top (H v)_p]`, by derivatives of the gradient; a trace that comes out negative
    counts as zero.

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
            signs = {
                path: jax.random.rademacher(keys[path], x.shape, x.dtype)
                for path, x in chosen.items()
            }
            turned = jax.jvp(gradient, (chosen,), (signs,))[1]
            return {
                path: jnp.vdot(signs[path].astype(jnp.float32), turned[path].astype(jnp.float32))
                for path in chosen
            }

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
        path: {
            o: max(totals[path], 0.0) / count * float(_change(leaves[path], form).mean())
            for o, form in options.items()
        }
        for path, options in forms.items()
    }


def unreached(scores: Scores, leaves: Leaves, forms: Forms) -> tuple[Scores, list[str]]:
    """Give unreached leaves the scores of average ones, for as large a change.

    A leaf whose every form scores exactly 0 though it changes the leaf (a branch that never ran, an
    expert without tokens) was not reached: that is not to say that it does not matter.

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
    changes = {
        path: {o: float(_change(leaves[path], form).sum()) for o, form in own.items()}
        for path, own in forms.items()
    }
    dead = [
        path for path in scores if not any(scores[path].values()) and any(changes[path].values())
    ]
    pairs = [
        (scores[path][o], changes[path][o])
        for path in scores
        if path not in dead
        for o in scores[path]
    ]
    rates = [score / change for score, change in pairs if change > 0]
    if not rates:
        return scores, dead
    mean = sum(rates) / len(rates)
    return scores | {
        path: {o: mean * change for o, change in changes[path].items()} for path in dead
    }, dead


def _scalar(model: Model) -> Model:
    def loss(leaves: Leaves, *inputs: PyTree) -> jax.Array:
        value = model(leaves, *inputs)
        if jnp.shape(value) != ():
            raise ShapeError(
                "this measure differentiates a loss: fn(params, *batch) must return a scalar, the "
                "mean over the batch, but "
                f"it returns {jax.tree.map(jnp.shape, value)}"
            )
        return value.astype(jnp.float32)

    return loss


def _divided(leaves: Leaves, forms: Forms) -> tuple[Leaves, Leaves]:
    """Return the leaves that have other forms, and the others."""
    return {path: leaves[path] for path in forms}, {
        path: x for path, x in leaves.items() if path not in forms
    }


def _each(forms: Forms) -> Iterator[tuple[str, str, Any]]:
    for path, options in forms.items():
        for option, form in options.items():
            yield path, option, form


def _change(x: Any, form: Any) -> jax.Array:
    return jnp.square(to_dense(form).astype(jnp.float32) - x.astype(jnp.float32))


def _means(totals: Scores, count: int) -> Scores:
    if not count:
        raise _no_batch()
    return {
        path: {option: total / count for option, total in options.items()}
        for path, options in totals.items()
    }


def _no_batch() -> DataError:
    return DataError("there is no batch to measure sensitivities with")


Measure = Literal["fisher", "kl", "mse", "hutchinson"]


@dataclass(frozen=True)
class Sensitivities:
    """Score, bytes and work of each leaf and option: what `allocate` shares a budget by.

    Attributes:
      measure: what the scores mean; smaller is better.
      scores: ``{path: {option: score}}``, of the leaves that have an option.
      nbytes: ``{path: {option: bytes}}``, stored, scales and all.
      bitops: ``{path: {option: bit-operations}}``, of one call on the first batch: MACs x weight
        bits x activation bits.
      macs: ``{path: multiply-accumulates}`` of that call.
      refused: ``{path: {option: why the leaf cannot take it}}``.
      left: ``{path: why}``, leaves that stay as they are.
      left_nbytes: bytes of those leaves.
      left_bitops: bit-operations of everything else: products of activations, and with those
        leaves.
      notes: ``{path: what was out of the ordinary}``: leaves that the batches never reached have
        the scores of average ones.
    """

    measure: str
    scores: dict[str, dict[str, float]]
    nbytes: dict[str, dict[str, int]]
    bitops: dict[str, dict[str, int]]
    macs: dict[str, int]
    refused: dict[str, dict[str, str]]
    left: dict[str, str]
    left_nbytes: int
    left_bitops: int
    notes: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the table as JSON, to be kept beside the model.

        Example:
          >>> table = Sensitivities("kl", {"w": {"a": 0.5}}, {"w": {"a": 3}}, {"w": {"a": 9}}, {"w": 1}, {}, {}, 0, 0)
          >>> Sensitivities.from_json(table.to_json()) == table
          True
        """
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Sensitivities":
        """Return the table that `to_json` wrote.

        Raises:
          DataError: if the text is none.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"this is not a table of sensitivities as Sensitivities.to_json writes it: {error}"
            ) from error

    def __str__(self) -> str:
        """Return a table: for each leaf its work, and for each option score and bytes."""
        options = list(dict.fromkeys(chain.from_iterable(self.scores.values())))
        head = (
            "path",
            "MACs",
            *(f"{option}: {what}" for option in options for what in (self.measure, "bytes")),
        )
        rows = [
            (
                path,
                units(self.macs[path]),
                *chain.from_iterable(self._cells(path, option) for option in options),
            )
            for path in self.scores
        ]
        refused = [
            f"{path} cannot be {o}: {why}"
            for path, reasons in self.refused.items()
            for o, why in reasons.items()
        ]
        stays = [f"{path} stays: {why}" for path, why in self.left.items()]
        notes = [f"{path}: {note}" for path, note in self.notes.items()]
        return "\n".join([aligned([head, *rows], left=1), *stays, *refused, *notes])

    def _cells(self, path: str, option: str) -> tuple[str, str]:
        if option not in self.scores[path]:
            return "-", "-"
        return f"{self.scores[path][option]:.3g}", f"{self.nbytes[path][option]:,}"


def sensitivities(
    fn: ModelFn,
    params: Params,
    batches: Iterable[Any],
    options: Mapping[str, Compression],
    measure: Measure = "fisher",
    *,
    where: Patterns | None = None,
    activation_bits: int | Mapping[str, int] | None = None,
    key: jax.Array | None = None,
    probes: int = 8,
    max_bytes: float | None = None,
    max_bitops: float | None = None,
) -> Sensitivities:
    r"""Measure what each option does to the model, one leaf at a time.

    With :math:`\Delta w` what the option changes in the leaf, the score is one of

    * ``"fisher"``: :math:`E[\sum_i (\partial L / \partial w_i \, \Delta w_i)^2]`, L the loss of a batch. Batches of one
      example give the empirical Fisher; larger ones the same up to a factor, once the model is
      trained. One backward pass a batch.
    * ``"hutchinson"``: :math:`tr(H) / n \cdot \|\Delta w\|^2`, H the loss's Hessian in the n entries of the leaf.
    * ``"kl"``: the divergence of the output distributions, ``softmax`` over the last axis. One run for each leaf and option.
    * ``"mse"``: the mean squared change of the outputs.

    Args:
      fn: a pure function of params and one batch: for ``"kl"`` and ``"mse"`` it returns the outputs
        (logits), for ``"fisher"`` and ``"hutchinson"`` the loss, a scalar.
      params: tree of arrays.
      batches: what ``fn`` takes after params, one after the other; a tuple is several arguments.
      options: by name, compressions that act on one leaf; `core.identity` leaves it as it is. They
        are bound to the layouts that the function tells, as `cj.bind` does.
      measure: one of the above.
      where: a glob, or several, over the leaves to decide about; by default all that a product or a
        lookup uses.
      activation_bits: for the bit-operations, as `trace.cost` takes them.
      key: typed PRNG key of the probes for ``"hutchinson"``.
      probes: random vectors a batch for ``"hutchinson"``.
      max_bytes: a budget that `allocate` will be given, checked before anything is measured; None
        for none.
      max_bitops: likewise.

    Returns:
      The table, which `allocate` reads for as many budgets as you like.

    Raises:
      ConfigError: if there is no option, the measure is none of these, a key is missing, or no
        choice meets a budget.
      DataError: if there is no batch.
      NoMatchError: if ``where`` matches no leaf.
      NonFiniteError: if a score is NaN or infinite.
      ShapeError: if ``fn`` returns what the measure cannot use.

    Example:
      >>> from compress_jax.core import identity
      >>> from compress_jax.quantize import uniform
      >>> params = {"head": jnp.linspace(-1, 1, 12).reshape(4, 3), "bias": jnp.zeros((1, 3))}
      >>> fn = lambda params, x: x @ params["head"] + params["bias"]
      >>> table = sensitivities(fn, params, [jnp.ones((2, 4))], {"int2": uniform(2), "float32": identity()}, "mse")
      >>> table.nbytes, table.left
      ({'head': {'int2': 8, 'float32': 48}}, {'bias': 'no product and no lookup uses it'})
      >>> table.scores["head"]["int2"] > table.scores["head"]["float32"] == 0
      True

    References:
      Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization, NeurIPS 2020, equations 2 to
      4. Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, equation 8
      (the Taylor term).
    """
    if not options:
        raise ConfigError(
            "there is no option to choose between; give {'int4': quantize.uniform(4), ...}"
        )
    inputs = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    first = next(inputs, None)
    if first is None:
        raise DataError("there is no batch to measure sensitivities with")
    leaves, rebuild = flatten(params)
    traced = trace(fn, params, *first)
    known = layouts_of(traced)
    options = {name: bound(option, known) for name, option in options.items()}
    chosen, left = _candidates(traced, leaves, where)
    forms, refused = _forms(leaves, chosen, options)
    left |= {path: "no option can take it" for path in chosen if not forms[path]}
    forms = {path: forms[path] for path in chosen if forms[path]}
    bitops, macs, rest = _work(
        cost(fn, params, *first, activation_bits=activation_bits).by_site, leaves, forms
    )
    sizes = {
        path: {option: _nbytes(form) for option, form in options.items()}
        for path, options in forms.items()
    }
    bytes_left = sum(_nbytes(leaves[path]) for path in left)
    byte_budget(max_bytes, sizes, bytes_left).check()
    work_budget(max_bitops, bitops, rest).check()
    scored = _scorer(measure, key, probes)(
        lambda leaves, *x: fn(rebuild(leaves), *x), leaves, chain([first], inputs), forms
    )
    scored, dead = unreached(_finite(scored), leaves, forms)
    notes = dict.fromkeys(
        dead,
        "every option scores 0: the batches say nothing of it, so it counts as an average leaf",
    )
    return Sensitivities(
        measure,
        scored,
        sizes,
        bitops,
        macs,
        refused,
        _ordered(left, leaves),
        bytes_left,
        rest,
        notes,
    )


def _scorer(measure: str, key: jax.Array | None, probes: int) -> Callable[..., Scores]:
    """Return ``(model, leaves, batches, forms) -> scores``."""
    if measure == "hutchinson":
        if key is None:
            raise ConfigError(
                'measure="hutchinson" draws random probes; give it a key, such as jax.random.key(0)'
            )
        return partial(by_curvature, key=key, probes=probes)
    scorers = {
        "fisher": by_fisher,
        "kl": partial(by_outputs, distance=divergence),
        "mse": partial(by_outputs, distance=squared_error),
    }
    if measure not in scorers:
        raise ConfigError(f"measure must be 'fisher', 'kl', 'mse' or 'hutchinson', got {measure!r}")
    return scorers[measure]


def _candidates(
    traced: Traced, leaves: Leaves, where: Patterns | None
) -> tuple[list[str], dict[str, str]]:
    """Return the leaves to decide about, and why the others are left alone."""
    if where is not None:
        found = match(where, leaves)
        return found, {path: "no pattern matches it" for path in leaves if path not in found}
    used = {path for site in traced.sites.values() for path in (site.param, *site.also)} | set(
        traced.found.lookups.values()
    )
    why = {
        path: f"{how}; name it in where to decide about it"
        for path, how in traced.found.otherwise.items()
    }
    return [path for path in leaves if path in used], {
        path: why.get(path, "no product and no lookup uses it")
        for path in leaves
        if path not in used
    }


def _forms(
    leaves: Leaves, chosen: list[str], options: Mapping[str, Compression]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """Return what each leaf is under each option, packed, and why it cannot take some."""
    forms: dict[str, dict[str, Any]] = {path: {} for path in chosen}
    refused: dict[str, dict[str, str]] = {}
    for path in chosen:
        for name, option in options.items():
            form, why = _form(path, leaves[path], option)
            if why is None:
                forms[path][name] = form
            else:
                refused.setdefault(path, {})[name] = why
    return forms, refused


def _form(path: str, x: Any, option: Compression) -> tuple[Any, str | None]:
    """Return one leaf under one option, or why it cannot take it.

    An option that leaves the leaf alone returns the leaf itself.
    """
    part = {path: x}
    try:
        state = option.init(part)
        if option.view(part, state) is part:
            return x, None
        why = option.skipped(part).get(path)
        return (None, why) if why else (option.pack(part, state)[path], None)
    except ShapeError as error:
        return None, str(error)


def _work(
    sites: Mapping[str, SiteCost], leaves: Leaves, forms: Forms
) -> tuple[dict[str, dict[str, int]], dict[str, int], int]:
    """Return bit-operations by leaf and option, MACs by leaf, and what no option changes.

    A product that several parameters enter is shared out among them by size.
    """
    work, macs, rest = (
        {path: dict.fromkeys(options, 0.0) for path, options in forms.items()},
        dict.fromkeys(forms, 0.0),
        0.0,
    )
    widths = {
        path: {o: stored({o: form}, None, None)[o].bits for o, form in opts.items()}
        for path, opts in forms.items()
    }
    for each in sites.values():
        paths = [path for path in (each.site.param, *each.site.also) if path is not None]
        held = sum(leaves[path].size for path in paths)
        rest += 0.0 if paths else each.bit_operations
        own = dtype_bits(each.site.lhs_dtype if each.site.operand == "lhs" else each.site.rhs_dtype)
        for path in paths:
            share = each.macs * leaves[path].size / held
            if path not in forms:
                rest += share * own * each.activation_bits
                continue
            macs[path] += share
            for option, bits in widths[path].items():
                work[path][option] += share * (bits or own) * each.activation_bits
    whole = {
        path: {option: round(amount) for option, amount in amounts.items()}
        for path, amounts in work.items()
    }
    return whole, {path: round(amount) for path, amount in macs.items()}, round(rest)


def _nbytes(form: Any) -> int:
    return nbytes(form) if is_packed(form) else jnp.asarray(form).nbytes


def _finite(scores: Scores) -> Scores:
    for path, options in scores.items():
        for option, score in options.items():
            if not math.isfinite(score):
                raise NonFiniteError(
                    f"the sensitivity of {path!r} to {option!r} is {score}; look at the outputs "
                    "or the loss"
                )
    return scores


def _ordered(left: dict[str, str], leaves: Leaves) -> dict[str, str]:
    return {path: left[path] for path in leaves if path in left}
