"""Dynamic sparse training: the smallest weights are dropped and others are grown (SET, RigL)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from compress_jax.core._leafwise import fold_path
from compress_jax.core.amount import amount
from compress_jax.core.arguments import number, random_key, refused, whole
from compress_jax.core.axes import Axes, over_layers
from compress_jax.core.compression import Compression, CompressionState, stamped
from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ArgumentError
from compress_jax.core.exact import choose, less
from compress_jax.core.schedules import Scheduled, arrival
from compress_jax.core.types import Key, Params, PyTree, Scalar, Schedule, Step
from compress_jax.prune._masks.choose import (
    Masks,
    checked_gradients,
    keep_masks,
    skip_nonfinite,
    update_if,
)
from compress_jax.prune._masks.score import (
    Leaves,
    ScoreInputs,
    fixed_of,
    mask_compression,
    measure,
)
from compress_jax.prune._masks.select import magnitude_bits, smallest_by
from compress_jax.prune._masks.target import Sparsity, Target


class Growth(NamedTuple):
    """The score of pruned weights by which `regrowing` grows them.

    Attributes:
      measure: ``(ScoreInputs) -> scores``, floating point, compared by magnitude: the weights of
        largest score are grown.
      needs_grads: the score needs gradients.

    Example:
      >>> import compress_jax as cj
      >>> cj.prune.Growth(lambda inputs: inputs.grad, needs_grads=True).needs_grads
      True
    """

    measure: Callable[[ScoreInputs], jax.Array]
    needs_grads: bool = False


@renamed_arguments(until="end_fraction")
def regrowing(
    growth: Growth,
    sparsity: Sparsity,
    steps: int,
    key: jax.Array,
    *,
    drop: float | optax.Schedule = 0.3,
    every: int = 100,
    end_fraction: float = 0.75,
) -> Compression:
    r"""Start from a random mask; at some steps drop the smallest weights and grow as many others.

    At an update step t, :math:`k = n - \lfloor s n + 1/2 \rfloor` of n weights shall be kept. The
    :math:`(1 - f(t))\,k` largest of the kept weights survive, with the drop fraction
    :math:`f(t) = \frac{drop}{2} (1 + \cos(\pi t / T))` up to step
    :math:`T = \text{end\_fraction} \cdot \text{steps}`. Of all other weights, those of largest
    growth score join them until there are k. A sparsity that rises drops more than it grows
    (gradual pruning with regrowth).

    Grown weights must restart from zero, and so must their moments in the optimizer. `make_step`
    does so; in your own loop, call `restart`.

    Args:
      growth: the score of the weights that may be grown.
      sparsity: as of `magnitude`: a number, a schedule, or a map such as `erk` returns.
      steps: the number of training steps.
      key: typed PRNG key of the first mask, and of random growth.
      drop: the first drop fraction, 0 to 1, or a schedule of the step.
      every: updates are at steps divisible by it, except step 0, and when a schedule of the
        sparsity reaches its last value.
      end_fraction: the fraction of the training after which no weight is replaced. Then the mask is
        constant, unless the sparsity still rises.

    Returns:
      The Compression. ``fixed[path]`` is
      ``{"mask": mask, "grown": bool, true where the last update grew a weight}``.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if gradients are needed and missing.
      NonFiniteError: outside ``jit``, if such gradients are not finite. Under ``jit`` they leave
        the masks unchanged for that step.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> growth = cj.prune.Growth(lambda inputs: inputs.grad, needs_grads=True)
      >>> c = cj.prune.regrowing(growth, 0.5, 10, jax.random.key(0), drop=0.5, every=1)
      >>> params = {"w": jnp.array([4.0, 3.0, 2.0, 1.0])}
      >>> grads = {"w": jnp.array([0.0, 0.0, 0.0, 9.0])}
      >>> state = c.update(params, c.init(params), step=1, grads=grads)
      >>> int(state.fixed["w"]["mask"].sum()), bool(state.fixed["w"]["mask"][3])
      (2, True)
    """
    every = whole("every", every)
    steps = whole("steps", steps)
    end_fraction = number("end_fraction", end_fraction)
    if every < 1 or steps < 1 or not 0 <= end_fraction <= 1:
        raise ArgumentError(
            "give every >= 1, steps >= 1 and end_fraction from 0 to 1, got "
            f"{every}, {steps} and {end_fraction}"
        )
    what = "drop (a number or a schedule of the step)"
    if not callable(drop) and not 0 <= number(what, drop) <= 1:
        raise ArgumentError(
            f"drop is the share of kept weights to replace, between 0 and 1, got {drop}"
        )
    random_key("key", key)
    if not isinstance(growth, Growth):
        refused(
            "growth", growth, "a prune.Growth: wrap a function of ScoreInputs, prune.Growth(fn)"
        )
    stop = int(end_fraction * steps)  # the last step at which weights are replaced
    schedule: Any = drop if callable(drop) else lambda step: _cosine(drop, step, stop)
    return _Regrow(growth, Target.of(sparsity), key, schedule, every, stop).compression()


def _cosine(drop: float, step: jax.Array, stop: int) -> jax.Array:
    """Return the drop fraction f(t), which falls from drop to 0 at step ``stop``."""
    t = jnp.clip(step.astype(jnp.float32) / max(stop, 1), 0.0, 1.0)
    return 0.5 * drop * (1 + jnp.cos(jnp.pi * t))


class _Regrow(NamedTuple):
    """The arguments of `regrowing`, and the functions of its Compression."""

    growth: Growth
    target: Target
    key: jax.Array
    drop: Schedule
    every: int
    stop: int
    known: Mapping[str, Axes] | None = None

    @property
    def leaves(self) -> Leaves:
        return Leaves(self.target.why_not, self.known)

    def compression(self) -> Compression:
        # The last update of a `between` lets the sparsity arrive and replaces nothing.
        update = Scheduled(self.update, self.target.schedules, partial(self.update, last=True))
        made = mask_compression(self.leaves)
        made = made._replace(init=self.init, update=update, bind=self.bind)
        call = call_of(
            "regrowing",
            growth=self.growth,
            sparsity=self.target,
            key=self.key,
            drop=self.drop,
            every=self.every,
            stop=self.stop,
        )
        return stamped(made, call, self.known)

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return self._replace(known=known).compression()

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        self.target.check_leaves(params)
        # The mask of the lowest random scores is a random mask of exactly the target's count.
        draws = {}
        for path, x in self.leaves.of(params).items():
            draws[path] = jax.random.uniform(self.leaf_key(path), x.shape)
        masks = keep_masks(draws, self.target, step, axes=self.leaves.axes(params))
        return _state(masks, masks)

    def update(
        self,
        params: Params,
        state: CompressionState,
        *,
        step: Step,
        grads: PyTree = None,
        stats: PyTree = None,
        key: Key = None,
        last: bool = False,
    ) -> CompressionState:
        leaves = self.leaves.of(params)
        axes = self.leaves.axes(params)
        gradients = checked_gradients(leaves, params, grads, self.growth.needs_grads)
        old = {path: fixed_of(state, path)["mask"] for path in leaves}
        step = jnp.asarray(step)
        # A schedule may reach its last value between updates; then there is one more update.
        arriving: Any = False
        at = step
        if self.every > 1:
            arriving, at = arrival(self.target.schedules, step)
        replacing = (step % self.every == 0) & (step > 0) & (step <= self.stop)

        def replaced() -> Masks:
            drop = jnp.asarray(self.drop(step), jnp.float32)
            drop = jnp.where(replacing & (not last), drop, 0.0)
            masks = {}
            for path, x in leaves.items():
                # Derived from the step, so that a run that is restored grows the same weights.
                own = jax.random.fold_in(self.leaf_key(path), at + 1)
                inputs = ScoreInputs(path, x, at, gradients.get(path), key=own)
                masks[path] = self.replace(inputs, old[path], drop, axes[path])
            return masks

        is_due = jnp.asarray(last) | replacing | arriving | self.rising(step)
        # Thinned here and not by `every`: between updates nothing counts as grown.
        new = _state(update_if(is_due, replaced, lambda: old), old)
        # A step that is skipped grows nothing: the mask before and after are the same.
        needed = gradients if self.growth.needs_grads else {}
        return skip_nonfinite(needed, new, _state(old, old))

    def rising(self, step: jax.Array) -> jax.Array:
        """Return whether the sparsity still changes at an update step after `stop`."""
        schedules = self.target.schedules
        changes = [schedule(step) != schedule(step - self.every) for schedule in schedules]
        # Up to `stop` every update step replaces weights and reaches the sparsity on the way.
        late = (step % self.every == 0) & (step > self.stop)
        return late & jnp.stack([jnp.zeros((), bool), *changes]).any()

    def leaf_key(self, path: str) -> Any:
        """Return the key of a leaf; its first mask is drawn from it."""
        return fold_path(self.key, path)

    def replace(
        self, inputs: ScoreInputs, mask: jax.Array, drop: jax.Array, axes: Axes
    ) -> jax.Array:
        """Return the new mask of one leaf, each layer of a stack by itself."""
        scores = measure(self.growth.measure, inputs, axes)
        sparsity = self.target.share(inputs.path, inputs.step)

        def replace_layer(x: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
            return turnover(x, scores, mask, sparsity, drop)

        by_layer = over_layers(replace_layer, axes, ("leaf", "leaf", "leaf"), "leaf")
        return by_layer(inputs.x, scores, mask)


def turnover(
    x: jax.Array, growth: jax.Array, mask: jax.Array, sparsity: Scalar, drop: jax.Array
) -> jax.Array:
    """Return the mask after the smallest weights were dropped and those of largest score grown.

    Args:
      x: the weights.
      growth: the scores of growth, floating point, in the shape of ``x``, compared by magnitude.
      mask: bool, the mask before.
      sparsity: the share of pruned weights afterwards, exactly as `amount` counts them.
      drop: the share of the weights kept afterwards that are new.

    Returns:
      bool, the mask afterwards. Of equal entries, the later one is kept or grown.

    Example:
      >>> w = jnp.array([1.0, 5.0, 9.0, 9.0])
      >>> scores = jnp.array([0.0, 0.0, 2.0, 1.0])
      >>> mask = jnp.array([True, True, False, False])
      >>> turnover(w, scores, mask, 0.5, jnp.float32(0.5)).tolist()
      [False, True, True, False]
    """
    pruned = amount(sparsity, x.size)
    # The share (1 - drop) of those kept afterwards survive; everything else is a candidate to grow.
    candidates = amount(1 - (1 - jnp.asarray(sparsity, jnp.float32)) * (1 - drop), x.size)
    # Rounding in float32 must not leave fewer candidates than there are weights to prune.
    candidates = choose(less(candidates, pruned), pruned, candidates)
    # Drop: pruned weights have the lowest key, so they are candidates too.
    (low,) = smallest_by(_survival_bits, [(x, mask)], candidates)
    survivors = mask & ~low
    # Grow: all but the ``pruned`` candidates of lowest growth score join the survivors.
    (out,) = smallest_by(_growth_bits, [(growth, survivors)], pruned)
    return ~out


def _survival_bits(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the order of survival: magnitudes of kept weights, above 0 for pruned ones."""
    bits = magnitude_bits(x)
    return jnp.where(mask, bits + jnp.ones((), bits.dtype), jnp.zeros((), bits.dtype))


def _growth_bits(growth: jax.Array, survivors: jax.Array) -> jax.Array:
    """Return the order of growth: magnitudes of scores, below the maximum for survivors."""
    bits = magnitude_bits(growth)
    return jnp.where(survivors, jnp.asarray(jnp.iinfo(bits.dtype).max, bits.dtype), bits)


def _state(masks: Masks, old: Masks) -> CompressionState:
    fixed = {path: {"mask": mask, "grown": mask & ~old[path]} for path, mask in masks.items()}
    return CompressionState({}, fixed)


@renamed_arguments(until="end_fraction")
def sparse_evolution(
    sparsity: Sparsity,
    steps: int,
    key: jax.Array,
    *,
    drop: float | optax.Schedule = 0.3,
    every: int = 100,
    end_fraction: float = 0.75,
) -> Compression:
    """Train sparse from the start: the smallest weights are replaced by random others (SET).

    See `regrowing` for the rule. With ``drop=0`` the first mask stays: static sparse training.

    Args:
      sparsity: as of `magnitude`: a number, a schedule, or a map such as `erk` returns.
      steps: the number of training steps.
      key: typed PRNG key.
      drop: the first drop fraction, which falls by a cosine; or a schedule of the step.
      every: weights are replaced at steps divisible by it.
      end_fraction: the fraction of the training after which the mask stays.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "grown": mask}``; the second is
      true where the last update grew a weight.

    Raises:
      ArgumentError: for impossible arguments.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.sparse_evolution(0.9, 1000, jax.random.key(0))
      >>> params = {"w": jnp.ones((10, 10))}
      >>> int(c.view(params, c.init(params))["w"].sum())
      10

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", 2018, algorithm 1.
    """
    return regrowing(
        Growth(_draw), sparsity, steps, key, drop=drop, every=every, end_fraction=end_fraction
    )


def _draw(inputs: ScoreInputs) -> jax.Array:
    return jax.random.uniform(inputs.key, inputs.x.shape)


@renamed_arguments(until="end_fraction")
def rigl(
    sparsity: Sparsity,
    steps: int,
    key: jax.Array,
    *,
    drop: float | optax.Schedule = 0.3,
    every: int = 100,
    end_fraction: float = 0.75,
) -> Compression:
    """Train sparse from the start: the smallest weights are replaced by those of largest gradient.

    See `regrowing` for the rule. `update` needs ``grads``, the gradient at the weights the model
    used, dense under the mask. A weight that was just dropped may be grown again. With a rising
    schedule it prunes gradually and regrows (GraNet).

    Args:
      sparsity: as of `magnitude`: a number, a schedule, or a map such as `erk` returns.
      steps: the number of training steps.
      key: typed PRNG key of the first mask.
      drop: the first drop fraction, which falls by a cosine; or a schedule of the step.
      every: weights are replaced at steps divisible by it.
      end_fraction: the fraction of the training after which the mask stays.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "grown": mask}``; the second is
      true where the last update grew a weight.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.rigl(0.75, 100, jax.random.key(0), every=1)
      >>> params = {"w": jnp.ones(4)}
      >>> state = c.update(params, c.init(params), step=1, grads={"w": jnp.ones(4)})
      >>> int(c.view(params, state)["w"].sum())
      1

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, algorithm 1. Liu et al.,
      "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", 2021 (GraNet).
    """
    growth = Growth(_slope, needs_grads=True)
    return regrowing(
        growth, sparsity, steps, key, drop=drop, every=every, end_fraction=end_fraction
    )


def _slope(inputs: ScoreInputs) -> jax.Array:
    return inputs.grad  # compared by magnitude
