"""Sensitivity and cost of every option for every leaf, in one table.

Sensitivity is measured in the outputs or in the curvature of the loss.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression
from compress_jax.core.errors import ConfigError, DataError, NonFiniteError, ShapeError
from compress_jax.core.packed import to_dense
from compress_jax.core.paths import Patterns, flatten
from compress_jax.core.table import aligned, units
from compress_jax.core.types import Batch, Leaf, ModelFn, Params, PyTree
from compress_jax.distill import kl
from compress_jax.prune.importance import squared_gradients
from compress_jax.search._amounts import Leaves, Variants, amounts

T = TypeVar("T")


Scores = dict[str, dict[str, float]]  # {path: {option: score}}
Model = Callable[..., PyTree]  # (leaves by path, *inputs) -> outputs
Measure = Literal["fisher", "kl", "mse", "hutchinson"]


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
    batches: Iterable[tuple[PyTree, ...]],
    variants: Variants,
    distance: Callable[[jax.Array, jax.Array], jax.Array],
) -> Scores:
    """Score each variant of each leaf by how far the outputs move under it alone.

    Args:
      model: ``(leaves, *inputs) -> array``; compiled once.
      leaves: all leaves by path.
      batches: the inputs.
      variants: the candidates' variants.
      distance: ``(expected outputs, outputs) -> float32 scalar``.

    Returns:
      The mean distance over batches.

    Raises:
      DataError: if there is no batch.
      ShapeError: if the model returns anything but one array.

    Example:
      >>> model = lambda leaves, x: x * leaves["w"]
      >>> leaves, variants = {"w": jnp.ones(2)}, {"w": {"zero": jnp.zeros(2)}}
      >>> by_outputs(model, leaves, [(jnp.ones(2),)], variants, squared_error)
      {'w': {'zero': 1.0}}
    """
    run = jax.jit(model)
    moved = jax.jit(lambda leaves, expected, inputs: distance(expected, model(leaves, *inputs)))
    totals = {path: dict.fromkeys(options, 0.0) for path, options in variants.items()}
    count = 0
    for inputs in batches:
        count += 1
        expected = run(leaves, *inputs)
        if not isinstance(expected, jax.Array):
            raise ShapeError(
                f"fn must return one array of outputs to compare, not a {type(expected).__name__}"
            )
        for path, option, variant in _each(variants):
            # An option that leaves the leaf alone moves nothing: its distance is 0 without a run.
            if variant is not leaves[path]:
                changed = {**leaves, path: to_dense(variant)}
                totals[path][option] += float(moved(changed, expected, inputs))
    return _means(totals, count)


def by_fisher(
    model: Model, leaves: Leaves, batches: Iterable[tuple[PyTree, ...]], variants: Variants
) -> Scores:
    r"""Score by the empirical Fisher, :math:`E[\sum_i (g_i \Delta w_i)^2]`.

    Here g is the gradient of a batch's loss.

    Args:
      model: ``(leaves, *inputs) -> loss``, a scalar.
      leaves: all leaves by path.
      batches: the inputs.
      variants: the candidates' variants.

    Returns:
      The scores.

    Raises:
      DataError: if there is no batch.
      ShapeError: if the loss is no scalar.

    Example:
      >>> loss = lambda leaves, x: (x * leaves["w"]).sum()
      >>> leaves, variants = {"w": jnp.ones(2)}, {"w": {"zero": jnp.zeros(2)}}
      >>> by_fisher(loss, leaves, [(jnp.array([1.0, 3.0]),)], variants)
      {'w': {'zero': 10.0}}
    """
    loss = _scalar(model)
    chosen, rest = _divided(leaves, variants)
    # {path: E[g^2]}, of the shape of the leaf: one backward pass serves all options.
    squares = squared_gradients(
        lambda chosen, rest, *inputs: loss({**rest, **chosen}, *inputs),
        chosen,
        ((rest, *inputs) for inputs in batches),
    )
    scores: Scores = {path: {} for path in variants}
    for path, option, variant in _each(variants):
        scores[path][option] = float((squares[path] * _change(leaves[path], variant)).sum())
    return scores


def by_curvature(
    model: Model,
    leaves: Leaves,
    batches: Iterable[tuple[PyTree, ...]],
    variants: Variants,
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
      variants: the candidates' variants.
      key: typed PRNG key of the probes.
      probes: how many a batch.

    Returns:
      The scores.

    Raises:
      DataError: if there is no batch.
      ShapeError: if the loss is no scalar.

    Example:
      >>> loss = lambda leaves, x: (x * leaves["w"] ** 2).sum()  # diagonal Hessian: exact
      >>> w, zero, batches = jnp.ones(2), {"zero": jnp.zeros(2)}, [(jnp.array([1.0, 3.0]),)]
      >>> by_curvature(loss, {"w": w}, batches, {"w": zero}, jax.random.key(0), 1)
      {'w': {'zero': 8.0}}
    """
    loss = _scalar(model)

    @jax.jit
    def traces(chosen: Leaves, rest: Leaves, inputs: tuple[PyTree, ...], key: jax.Array) -> Leaves:
        # A Hessian-vector product is the derivative of the gradient along v.
        gradient = jax.grad(lambda chosen: loss({**rest, **chosen}, *inputs))

        def probe(key: jax.Array) -> Leaves:
            keys = jax.random.split(key, len(chosen))  # signs are independent between leaves
            signs = {
                path: jax.random.rademacher(own, x.shape, x.dtype)
                for own, (path, x) in zip(keys, chosen.items(), strict=True)
            }
            _, products = jax.jvp(gradient, (chosen,), (signs,))  # H v, without H
            signs = {path: x.astype(jnp.float32) for path, x in signs.items()}
            # v_p . (H v)_p: off-diagonal blocks vanish in the mean, as signs are independent.
            return {p: jnp.vdot(signs[p], products[p].astype(jnp.float32)) for p in chosen}

        # One probe after the other, so that memory does not grow with their number.
        return jax.tree.map(jnp.mean, jax.lax.map(probe, jax.random.split(key, probes)))

    chosen, rest = _divided(leaves, variants)
    totals = dict.fromkeys(chosen, 0.0)
    count = 0
    for inputs in batches:
        count += 1
        # Other probes for each batch, and Python floats (float64) for their sum.
        found = traces(chosen, rest, inputs, jax.random.fold_in(key, count))
        totals = {path: total + float(found[path]) for path, total in totals.items()}
    if not count:
        raise _no_batch()
    scores: Scores = {path: {} for path in variants}
    for path, option, variant in _each(variants):
        # tr(H) / n * |dw|^2, as the mean over the leaf's n entries.
        mean_trace = max(totals[path], 0.0) / count
        scores[path][option] = mean_trace * float(_change(leaves[path], variant).mean())
    return scores


def unreached(scores: Scores, leaves: Leaves, variants: Variants) -> tuple[Scores, list[str]]:
    """Give unreached leaves the scores of average ones, for as large a change.

    A leaf whose variants all score exactly 0 though they change the leaf (in a branch that never
    ran, an expert without tokens) was not reached by the batches. It may matter all the same.

    Args:
      scores: of all leaves.
      leaves: all leaves by path.
      variants: the candidates' variants.

    Returns:
      ``(scores, the leaves that were not reached)``. Where no leaf was, the scores stay.

    Example:
      >>> w, variants = jnp.ones(2), {"w": {"a": jnp.zeros(2)}, "unused": {"a": jnp.full(2, -1.0)}}
      >>> unreached({"w": {"a": 3.0}, "unused": {"a": 0.0}}, {"w": w, "unused": w}, variants)
      ({'w': {'a': 3.0}, 'unused': {'a': 12.0}}, ['unused'])
    """
    changes: Scores = {path: {} for path in variants}
    for path, option, variant in _each(variants):
        changes[path][option] = float(_change(leaves[path], variant).sum())
    # A score of 0 is right for an option that changes nothing, and for no other.
    dead = [p for p in scores if not any(scores[p].values()) and any(changes[p].values())]
    # Score per squared change, over what was reached.
    rates = []
    for path, option, score in _each(scores):
        if path not in dead and changes[path][option] > 0:
            rates.append(score / changes[path][option])
    if not rates:
        return scores, dead
    mean = sum(rates) / len(rates)
    filled = {p: {option: mean * x for option, x in changes[p].items()} for p in dead}
    return scores | filled, dead


def _scalar(model: Model) -> Model:
    def loss(leaves: Leaves, *inputs: PyTree) -> jax.Array:
        value = model(leaves, *inputs)
        if jnp.shape(value) != ():
            raise ShapeError(
                "this measure differentiates a loss: fn(params, *batch) must return a scalar, the "
                f"mean over the batch, but it returns {jax.tree.map(jnp.shape, value)}"
            )
        return value.astype(jnp.float32)

    return loss


def _divided(leaves: Leaves, variants: Variants) -> tuple[Leaves, Leaves]:
    """Return the leaves that have variants, and the others."""
    rest = {path: x for path, x in leaves.items() if path not in variants}
    return {path: leaves[path] for path in variants}, rest


def _each(table: Mapping[str, Mapping[str, T]]) -> Iterator[tuple[str, str, T]]:
    """Yield ``(path, option, entry)`` of a table ``{path: {option: entry}}``."""
    for path, options in table.items():
        for option, entry in options.items():
            yield path, option, entry


def _change(x: Leaf, variant: Leaf) -> jax.Array:
    """Return the squared change of each entry, float32."""
    return jnp.square(to_dense(variant).astype(jnp.float32) - x.astype(jnp.float32))


def _means(totals: Scores, count: int) -> Scores:
    if not count:
        raise _no_batch()
    return {p: {option: x / count for option, x in own.items()} for p, own in totals.items()}


def _no_batch() -> DataError:
    return DataError("there is no batch to measure sensitivities with")


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
      notes: ``{path: remark}``: leaves that the batches never reached have the scores of average
        ones.

    Example:
      >>> import compress_jax as cj
      >>> scores, sizes = {"w": {"int4": 0.5, "int8": 0.01}}, {"w": {"int4": 40, "int8": 80}}
      >>> print(cj.search.Sensitivities("kl", scores, sizes, sizes, {"w": 640}, {}, {}, 0, 0))
      path  MACs  int4: kl  int4: bytes  int8: kl  int8: bytes
      w      640       0.5           40      0.01           80
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
        """Return the table as JSON, for a file beside the model.

        Example:
          >>> import compress_jax as cj
          >>> scores, sizes = {"w": {"a": 0.5}}, {"w": {"a": 3}}
          >>> table = cj.search.Sensitivities("kl", scores, sizes, sizes, {"w": 1}, {}, {}, 0, 0)
          >>> cj.search.Sensitivities.from_json(table.to_json()) == table
          True
        """
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Sensitivities":
        """Return the table that `to_json` wrote.

        Raises:
          DataError: if the text is no such table.
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
        head = ["path", "MACs"]
        for option in options:
            head += [f"{option}: {self.measure}", f"{option}: bytes"]
        rows = []
        for path in self.scores:
            cells = chain.from_iterable(self._cells(path, option) for option in options)
            rows.append([path, units(self.macs[path]), *cells])
        refused = [f"{path} cannot be {o}: {why}" for path, o, why in _each(self.refused)]
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
    batches: Iterable[Batch],
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

    Every other leaf stays as it is. With :math:`\Delta w` the option's change of the leaf, the
    score is one of

    * ``"fisher"``: :math:`E[\sum_i (\partial L / \partial w_i \, \Delta w_i)^2]`, L the loss of a
      batch. Batches of one example give the empirical Fisher; larger ones the same up to a factor,
      once the model is trained. One backward pass a batch.
    * ``"hutchinson"``: :math:`tr(H) / n \cdot \|\Delta w\|^2`, H the loss's Hessian in the n
      entries of the leaf.
    * ``"kl"``: the divergence of the output distributions, ``softmax`` over the last axis. One run
      for each leaf and option.
    * ``"mse"``: the mean squared change of the outputs.

    Args:
      fn: a pure function of params and one batch: for ``"kl"`` and ``"mse"`` it returns the outputs
        (logits), for ``"fisher"`` and ``"hutchinson"`` the loss, a scalar.
      params: tree of arrays.
      batches: the arguments of ``fn`` after params; a tuple is several arguments.
      options: compressions of one leaf, by name; `core.identity` leaves it as it is. They are bound
        to the layouts read from the function, as `cj.bind` does.
      measure: one of the above.
      where: a glob, or several, over the leaves that take an option; by default all that a product
        or a lookup uses.
      activation_bits: for the bit-operations, as `trace.cost` takes them.
      key: typed PRNG key of the probes for ``"hutchinson"``.
      probes: random vectors a batch for ``"hutchinson"``.
      max_bytes: a budget that `allocate` will be given, checked before anything is measured; None
        for none.
      max_bitops: likewise.

    Returns:
      The table, from which `allocate` shares out any number of budgets.

    Raises:
      ConfigError: if there is no option, the measure is none of these, a key is missing, or no
        choice meets a budget.
      DataError: if there is no batch.
      NoMatchError: if ``where`` matches no leaf.
      NonFiniteError: if a score is NaN or infinite.
      ShapeError: if ``fn`` returns what the measure cannot use.

    Example:
      >>> import compress_jax as cj
      >>> params = {"head": jnp.linspace(-1, 1, 12).reshape(4, 3), "bias": jnp.zeros((1, 3))}
      >>> fn = lambda params, x: x @ params["head"] + params["bias"]
      >>> options = {"int2": cj.quantize.uniform(2), "float32": cj.identity()}
      >>> table = cj.search.sensitivities(fn, params, [jnp.ones((2, 4))], options, "mse")
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
    first = next(inputs, None)  # traced for sites, layouts and costs; measured with the others
    if first is None:
        raise _no_batch()
    leaves, rebuild = flatten(params)
    found = amounts(fn, params, first, options, where, activation_bits)
    variants = found.variants
    # A budget that cannot be met is refused before anything slow is run.
    found.check(max_bytes, max_bitops)

    def model(leaves: Leaves, *x: PyTree) -> PyTree:
        return fn(rebuild(leaves), *x)

    scores = _scorer(measure, key, probes)(model, leaves, chain([first], inputs), variants)
    scores, dead = unreached(_finite(scores), leaves, variants)
    note = "every option scores 0: the batches say nothing of it, so it counts as an average leaf"
    return Sensitivities(
        measure,
        scores,
        nbytes=found.nbytes,
        bitops=found.bitops,
        macs=found.macs,
        refused=found.refused,
        left={path: found.left[path] for path in leaves if path in found.left},
        left_nbytes=found.left_nbytes,
        left_bitops=found.left_bitops,
        notes=dict.fromkeys(dead, note),
    )


def _scorer(measure: str, key: jax.Array | None, probes: int) -> Callable[..., Scores]:
    """Return ``(model, leaves, batches, variants) -> scores``."""
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


def _finite(scores: Scores) -> Scores:
    for path, option, score in _each(scores):
        if not math.isfinite(score):
            raise NonFiniteError(
                f"the sensitivity of {path!r} to {option!r} is {score}; look at the outputs or "
                "the loss"
            )
    return scores
