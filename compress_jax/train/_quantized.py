"""Quantization-aware training: a Linen module on quantized activations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import CollectionFilter, in_filter
from jax.core import Tracer

from compress_jax.core.arguments import whole
from compress_jax.core.errors import ConfigError, StateError
from compress_jax.core.types import Batch, PyTree
from compress_jax.quantize._activations.activations import Ranges, activations
from compress_jax.quantize._activations.quantizer import (
    ActivationQuantizer,
    OperandState,
    require_finite,
)
from compress_jax.quantize._activations.site_patterns import (
    QuantizerRules,
    SitePatterns,
    pattern_pairs,
)
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._statistics.calibrate import Masks

# Of variables: {"steps": int32, "ranges": {site: ...}, "broken": {site: int32}}. Names of sites
# have "|" in place of "/", which separates the parts of a path.
COLLECTION = "quantization"
LEARNED = "quantization"  # the same within params

T = TypeVar("T")

Variables = dict[str, PyTree]
"""Collections of arrays by name, ``"params"`` among them."""


def quantized(
    model: nn.Module,
    how: QuantizerRules,
    where: SitePatterns = None,
    *,
    start: int = 0,
    freeze: int | None = None,
    freeze_batch_norm: int | None = None,
    example: PyTree = None,
) -> "QuantizedModel":
    """Return a model with quantized activations, for quantization-aware training.

    It is called as the model is, ``apply(variables, x, train=..., mutable=..., rngs=...)``. Moving
    ranges are a collection of variables of their own, ``"quantization"``, which training updates as
    it does batch statistics; what is learned (steps, offsets, bounds) is the subtree
    ``"quantization"`` of params, so the optimizer trains it, and weight compressions that address
    ``"**/kernel"`` leave it alone. Batches whose activations are not finite move no range: they are
    counted, by site (`QuantizedModel.broken`).

    Args:
      model: a Linen module.
      how: as in `quantize.activations`.
      where: as in `quantize.activations`.
      start: training steps before activations are quantized; until then ranges are only observed.
      freeze: training step from which ranges stay as they are.
      freeze_batch_norm: training step from which the model runs in eval mode even in training:
        normalised by the averages it has, which stay. Dropout then stops too.
      example: calibration batch for `init`, what the model takes after variables. What is learned
        needs it, or `QuantizedModel.calibrate`; ranges without it are set by the first training
        step, before which nothing is quantized.

    Returns:
      The model.

    Raises:
      ConfigError: in ``init``, if something is to be learned and there is no example.

    Example:
      >>> import optax
      >>> import compress_jax as cj
      >>> int4 = cj.quantize.static(bits=4, range="ema")
      >>> model = cj.train.quantized(cj.models.LeNet300100(), int4, start=1)
      >>> batch = {"image": jnp.ones((2, 4)), "label": jnp.array([0, 1])}
      >>> variables = jax.jit(model.init)(jax.random.key(0), batch["image"])
      >>> optimizer = optax.sgd(0.1)
      >>> state = cj.train.create(variables, cj.identity(), optimizer, jax.random.key(1))
      >>> step = cj.train.make_step(cj.train.supervised(model), optimizer, cj.identity())
      >>> state, _ = jax.jit(step)(state, batch)
      >>> found = state.model_state["quantization"]
      >>> int(found["steps"]), float(next(iter(found["ranges"].values()))["input"]["high"])
      (1, 1.0)

    References:
      Jacob et al., "Quantization and Training of Neural Networks", 2018, arXiv:1712.05877, section
      3. Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018,
      section 3.2.3 (batch norm).
    """
    start = whole("start", start, 0)
    freeze = None if freeze is None else whole("freeze", freeze, 0)
    freeze_batch_norm = (
        None if freeze_batch_norm is None else whole("freeze_batch_norm", freeze_batch_norm, 0)
    )
    frozen = how if isinstance(how, ActivationQuantizer) else tuple(how)
    return QuantizedModel(model, frozen, where, start, freeze, freeze_batch_norm, example)


@dataclass(frozen=True)
class QuantizedModel:
    """A Linen module on quantized activations, with ``init`` and ``apply``; see `quantized`.

    Attributes:
      model: the module.
      how: the quantizers.
      where: which sites.
      start: when quantization begins.
      freeze: when ranges stop moving.
      freeze_batch_norm: when the model goes on in eval mode.
      example: a batch to calibrate with; not part of the model's identity.

    Example:
      >>> import compress_jax as cj
      >>> model = cj.train.quantized(cj.models.LeNet300100(hidden=(4,)), cj.quantize.dynamic())
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> sorted(variables), model.apply(variables, jnp.ones((2, 3))).shape
      (['params', 'quantization'], (2, 10))
    """

    model: nn.Module
    how: QuantizerRules
    where: SitePatterns = None
    start: int = 0
    freeze: int | None = None
    freeze_batch_norm: int | None = None
    example: PyTree = field(default=None, compare=False, repr=False)

    def init(
        self, rngs: jax.Array | dict[str, jax.Array], *inputs: PyTree, **options: Any
    ) -> Variables:
        """Return the module's own variables and those of quantization.

        Args:
          rngs: of the module's ``init``.
          inputs: likewise.
          options: likewise.

        Returns:
          Variables: calibrated with ``example`` if there is one.

        Raises:
          ConfigError: if something is to be learned and there is no example.
        """
        variables = dict(self.model.init(rngs, *inputs, **options))
        if self.example is not None:
            return self.calibrate(variables, [self.example])
        learned = [
            str(each) for _, each in pattern_pairs(self.how) if each is not None and each.learned
        ]
        if learned:
            raise ConfigError(
                f"{learned[0]} starts from data: give quantized(..., example=a batch of real "
                "inputs), or start from trained "
                "variables with .calibrate(variables, batches)"
            )
        # NaN stands for a range that the first training step will set.
        of = activations(self.model.apply, self.how, self.where)
        shapes = jax.eval_shape(
            lambda variables, *inputs: of.update(variables, None, *inputs)[1], variables, *inputs
        )
        return self._joined(
            variables, jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)
        )

    def calibrate(
        self, variables: Mapping[str, PyTree], batches: Iterable[Batch], mask: Masks | None = None
    ) -> Variables:
        """Return variables with ranges from calibration batches: post-training quantization.

        Args:
          variables: of the module, trained, with or without those of quantization.
          batches: what the module takes after variables, one after the other; a tuple is several
            arguments.
          mask: which examples or tokens of them count, see `trace.calibrate`.

        Returns:
          Variables that `apply` takes.

        Raises:
          NonFiniteError: naming the site, if its activations were not finite or it never ran.
        """
        plain = _plain(variables)
        return self._joined(
            plain, activations(self.model.apply, self.how, self.where).init(plain, batches, mask)
        )

    def parts(self, variables: Mapping[str, PyTree]) -> tuple[Variables, Ranges]:
        """Return the module's own variables, and ranges for integer inference.

        Args:
          variables: of this model.

        Returns:
          ``(variables of the module, {site name: {"input": own}})``.

        Raises:
          StateError: if these are not variables of a quantized model.
          NonFiniteError: naming the site, if a range is not finite: it never ran in training, say.
        """
        plain, ranges = self._parts(variables)
        for name, operands in ranges.items():
            require_finite(name, operands)
        return plain, ranges

    def broken(self, variables: Mapping[str, PyTree]) -> dict[str, int]:
        """Return how often training had activations that were not finite, by site.

        Args:
          variables: of this model.

        Returns:
          ``{site name: number of statistics that were left out of its ranges}``.
        """
        counts = variables[COLLECTION].get("broken", {})
        return {name.replace("|", "/"): int(n) for name, n in counts.items() if int(n)}

    def _parts(self, variables: Mapping[str, PyTree]) -> tuple[Variables, Ranges]:
        if COLLECTION not in variables:
            raise StateError(
                f"variables hold no {COLLECTION!r}, only {sorted(variables)}: take them from "
                "`init`, or make them of "
                "trained ones with `calibrate(variables, batches)`"
            )
        learned = variables["params"].get(LEARNED, {})
        ranges = variables[COLLECTION]["ranges"]
        # The state of an operand is divided among the two, by what is learned.
        found: Ranges = {}
        for tree in (ranges, learned):
            for key, operands in tree.items():
                site = found.setdefault(key.replace("|", "/"), {})
                for operand, own in operands.items():
                    site[operand] = {**site.get(operand, {}), **own}
        return _plain(variables), found

    def apply(
        self,
        variables: Mapping[str, PyTree],
        *inputs: PyTree,
        mutable: CollectionFilter = False,
        counts: jax.Array | None = None,
        **options: Any,
    ) -> PyTree:
        """Run the model on quantized activations; called as the module's own ``apply``.

        Args:
          variables: from `init` or `calibrate`.
          inputs: of the module.
          mutable: collections that may change; with ``"quantization"`` among them and
            ``train=True``, ranges move.
          counts: which examples or tokens count where ranges move, see `trace.calibrate`; the
            module does not see it.
          options: anything else the module's ``apply`` takes.

        Returns:
          What the module returns, with the changed collections if any are mutable.

        Raises:
          StateError: if these are not variables of a quantized model.
          NonFiniteError: naming the site, if these are trained and known, not traced, and a range
            is not finite.
        """
        plain, ranges = self._parts(variables)
        steps = variables[COLLECTION]["steps"]
        train = bool(options.get("train", False))
        moving = train and in_filter(mutable, COLLECTION)
        # Past the start every range is known; outside jit a missing one can be an error.
        trained = not isinstance(steps, Tracer) and not train and int(steps) > self.start
        how = _delayed(
            self.how,
            trained,
            on=steps >= self.start,
            frozen=None if self.freeze is None else steps >= self.freeze,
        )

        def run(**options: Any) -> tuple[PyTree, Ranges, dict[str, jax.Array]]:
            def forward(variables: Variables, *inputs: PyTree) -> PyTree:
                return self.model.apply(variables, *inputs, mutable=_without(mutable), **options)

            of = activations(forward, how, self.where)
            if not moving:
                return of.apply(plain, ranges, *inputs), ranges, {}
            return of.watch(plain, ranges, *inputs, mask=counts)

        if train and self.freeze_batch_norm is not None:
            # The step is traced, so both modes are compiled, and one is run.
            evaluating = {**options, "train": False}
            out, new, broken = jax.lax.cond(
                steps >= self.freeze_batch_norm, lambda: run(**evaluating), lambda: run(**options)
            )
        else:
            out, new, broken = run(**options)
        if mutable is False:
            return out
        if not in_filter(mutable, COLLECTION):
            return out
        # The collection keeps its structure: sites that are counted already, and no others.
        new_broken = {name.replace("/", "|"): n for name, n in broken.items()}
        numbers = {
            name: n + new_broken.get(name, 0)
            for name, n in variables[COLLECTION].get("broken", new_broken).items()
        }
        # Learned ranges are params: the optimizer moves them, not this.
        kept = {"steps": steps + int(moving), "ranges": self._split(new)[0], "broken": numbers}
        return out[0], {**out[1], COLLECTION: kept}

    def _joined(self, variables: Variables, ranges: Ranges) -> Variables:
        """Return variables with ranges in them."""
        fixed, learned = self._split(ranges)
        params = {**variables["params"], **({LEARNED: learned} if learned else {})}
        none = jnp.zeros((), jnp.int32)
        own = {
            "steps": none,
            "ranges": fixed,
            "broken": {name.replace("/", "|"): none for name in ranges},
        }
        return {**variables, "params": params, COLLECTION: own}

    def _split(self, ranges: Ranges) -> tuple[Ranges, Ranges]:
        """Return fixed and learned ranges, by site names without slashes."""
        quantizers = [each for _, each in pattern_pairs(self.how) if each is not None]
        names = set(chain.from_iterable(each.learned for each in quantizers))
        fixed: Ranges = {}
        learned: Ranges = {}
        for site, operands in ranges.items():
            # Each operand's state is split by name; what is empty on one side is left out there.
            for kept, inside in ((fixed, False), (learned, True)):
                own = {
                    key: {n: x for n, x in own.items() if (n in names) == inside}
                    for key, own in operands.items()
                }
                kept[site.replace("/", "|")] = _filled(own)
        return _filled(fixed), _filled(learned)


def _filled(tree: dict[str, T]) -> dict[str, T]:
    """Return a dict without its empty entries."""
    return {key: value for key, value in tree.items() if value}


def _plain(variables: Mapping[str, PyTree]) -> Variables:
    """Return the module's own variables."""
    params = {name: each for name, each in variables["params"].items() if name != LEARNED}
    return {
        **{name: each for name, each in variables.items() if name != COLLECTION},
        "params": params,
    }


def _without(mutable: CollectionFilter) -> CollectionFilter:
    """Return which of the module's own collections are mutable."""
    if isinstance(mutable, str):
        return [] if mutable == COLLECTION else mutable
    if isinstance(mutable, Iterable):
        return [name for name in mutable if name != COLLECTION]
    return mutable  # True, False or a DenyList


def _delayed(
    how: QuantizerRules, trained: bool, on: jax.Array, frozen: jax.Array | None
) -> QuantizerRules:
    """Return quantizers that start late and whose ranges can be frozen.

    They pass activations through before the start and while there is no range; after training a
    missing range is an error.
    """

    def delayed(each: ActivationQuantizer) -> ActivationQuantizer:
        def quantize_fn(site: Site, index: int, x: jax.Array, own: OperandState) -> jax.Array:
            # NaN is a range that no batch has set yet.
            ready = jnp.stack([on, *(~jnp.isnan(value).any() for value in own.values())]).all()
            return jnp.where(ready, each.quantize_fn(site, index, x, own), x)

        def merge(old: OperandState, new: OperandState) -> OperandState:
            moved = each.merge(old, new)
            return (
                moved
                if frozen is None
                else {name: jnp.where(frozen, old[name], moved[name]) for name in old}
            )

        return each._replace(quantize_fn=quantize_fn, merge=merge, allow_unknown=not trained)

    if isinstance(how, ActivationQuantizer):
        return delayed(how)
    return [(glob, each if each is None else delayed(each)) for glob, each in how]
