"""Dynamic sparse training: the smallest kept weights are dropped, others grown; the builder of `set` and `rigl`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from compress_jax.core.amount import amount
from compress_jax.core.arguments import number, random_key, refused, whole
from compress_jax.core.axes import Axes, over_layers
from compress_jax.core.compression import Compression, CompressionState, stamped
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ArgumentError
from compress_jax.core.exact import choose, less
from compress_jax.core.leafwise import fold_path, why_not_float
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import Scheduled, arrival
from compress_jax.core.types import Params, PyTree, Step
from compress_jax.prune._masks.choose import chosen, gradients_of, kept, unless_broken
from compress_jax.prune._masks.score import Leaves, Seen, fixed_of, measured, of_masks
from compress_jax.prune._masks.select import magnitude_bits, smallest_by
from compress_jax.prune._masks.target import Sparsity, Target


class Growth(NamedTuple):
    """Where weights are grown.

    Attributes:
      measure: ``(Seen) -> scores``, floating point, compared by magnitude: the largest are grown.
      needs_grads: it looks at gradients.
    """

    measure: Callable[[Seen], jax.Array]
    needs_grads: bool = False


def regrowing(
    growth: Growth,
    sparsity: Sparsity,
    steps: int,
    key: jax.Array,
    *,
    drop: float | optax.Schedule = 0.3,
    every: int = 100,
    until: float = 0.75,
) -> Compression:
    r"""Start from a mask drawn by lot; now and then drop the smallest kept weights and grow as many others.

    At every update step t, of n weights :math:`k = n - \lfloor s n + 1/2 \rfloor` shall be kept. Of
    the kept ones the :math:`(1 - f(t))\,k` of largest magnitude survive, with the drop fraction
    :math:`f(t) = \frac{drop}{2} (1 + \cos(\pi t / T))` up to :math:`T = until \cdot steps`; of all
    others, those of largest growth score join them until there are k. A sparsity that rises drops
    more than it grows (gradual pruning with regrowth).

    Grown weights must restart from zero, as must the optimizer's moments of them: `make_step` does
    so; in a loop of one's own, call `restart`.

    Args:
      growth: the score of weights that may be grown.
      sparsity: as of `magnitude`: a number, a schedule, or a map such as `erk` returns.
      steps: length of the training.
      key: typed PRNG key of the first mask, and of random growth.
      drop: the first drop fraction, 0 to 1, or a schedule of it.
      every: updates are at steps divisible by it, 0 not among them, and when a schedule of the
        sparsity reaches its last value.
      until: share of the training after which nothing is replaced: the mask stays, but for a
        sparsity that still rises.

    Returns:
      The Compression. ``fixed[path]`` is
      ``{"mask": mask, "grown": bool, true where the last update grew a weight}``.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if gradients are needed and missing.
      NonFiniteError: outside ``jit``, if such gradients are not finite; under it the masks stay in
        such a step.

    Example:
      >>> c = regrowing(Growth(lambda seen: seen.grad, True), 0.5, 10, jax.random.key(0), drop=0.5, every=1)
      >>> params, grads = {"w": jnp.array([4.0, 3.0, 2.0, 1.0])}, {"w": jnp.array([0.0, 0.0, 0.0, 9.0])}
      >>> state = c.update(params, c.init(params), step=1, grads=grads)
      >>> int(state.fixed["w"]["mask"].sum()), bool(state.fixed["w"]["mask"][3])
      (2, True)
    """
    every, steps, until = whole("every", every), whole("steps", steps), number("until", until)
    if every < 1 or steps < 1 or not 0 <= until <= 1:
        raise ArgumentError(
            f"give every >= 1, steps >= 1 and until from 0 to 1, got {every}, {steps} and {until}"
        )
    if (
        not callable(drop)
        and not 0 <= number("drop (a number or a schedule of the step)", drop) <= 1
    ):
        raise ArgumentError(
            f"drop is the share of kept weights to replace, between 0 and 1, got {drop}"
        )
    random_key("key", key)
    if not isinstance(growth, Growth):
        refused(
            "growth", growth, "a prune.Growth: wrap a function of what is seen, prune.Growth(fn)"
        )
    stop = int(until * steps)
    fall: Any = drop if callable(drop) else lambda step: _cosine(drop, step, stop)
    return _Regrow(growth, Target.of(sparsity), key, fall, every, stop).compression()


def _cosine(drop: float, step: jax.Array, stop: int) -> jax.Array:
    return (
        0.5
        * drop
        * (1 + jnp.cos(jnp.pi * jnp.clip(step.astype(jnp.float32) / max(stop, 1), 0.0, 1.0)))
    )


class _Regrow(NamedTuple):
    growth: Growth
    target: Target
    key: jax.Array
    drop: Callable[[Any], Any]
    every: int
    stop: int
    known: Mapping[str, Axes] | None = None

    @property
    def leaves(self) -> Leaves:
        return Leaves(self.target.why_not, self.known)

    def compression(self) -> Compression:
        update = Scheduled(self.update, self.target.schedules, partial(self.update, last=True))
        made = of_masks(self.leaves)._replace(init=self.init, update=update, bind=self.bind)
        options = {
            "growth": self.growth,
            "sparsity": self.target,
            "key": self.key,
            "drop": self.drop,
        }
        return stamped(
            made, call_of("regrowing", every=self.every, stop=self.stop, **options), self.known
        )

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return self._replace(known=known).compression()

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        self.target.check(
            path for path, x in flatten(params)[0].items() if why_not_float(path, x) is None
        )
        draws = {
            path: jax.random.uniform(self.own(path), x.shape)
            for path, x in self.leaves.of(params).items()
        }
        masks = kept(draws, self.target, step, axes=self.leaves.axes(params))
        return _state(masks, masks)

    def own(self, path: str) -> Any:
        return fold_path(self.key, path)

    def update(
        self,
        params: Params,
        state: CompressionState,
        *,
        step: Step,
        grads: PyTree = None,
        stats: PyTree = None,
        key: Any = None,
        last: bool = False,
    ) -> CompressionState:
        leaves, axes = self.leaves.of(params), self.leaves.axes(params)
        gradients = gradients_of(leaves, params, grads, self.growth.needs_grads)
        old = {path: fixed_of(state, path)["mask"] for path in leaves}
        step = jnp.asarray(step)
        arriving, at = (False, step) if self.every == 1 else arrival(self.target.schedules, step)
        replacing = (step % self.every == 0) & (step > 0) & (step <= self.stop)

        def turn() -> dict[str, jax.Array]:
            drop = jnp.where(replacing & (not last), jnp.asarray(self.drop(step), jnp.float32), 0.0)
            new = {}
            for path, x in leaves.items():
                new[path] = self.turned(
                    path, x, old[path], gradients.get(path), at, drop, axes[path]
                )
            return new

        new = _state(
            chosen(jnp.asarray(last) | replacing | arriving | self.rising(step), turn, lambda: old),
            old,
        )
        return unless_broken(gradients if self.growth.needs_grads else {}, new, _state(old, old))

    def rising(self, step: jax.Array) -> jax.Array:
        """Tell whether the mask stays by now but for a schedule that goes on pruning, at its steps."""
        moving = [
            schedule(step) != schedule(step - self.every) for schedule in self.target.schedules
        ]
        late = (step % self.every == 0) & (step > self.stop)
        return late & jnp.stack([jnp.zeros((), bool), *moving]).any()

    def turned(
        self,
        path: str,
        x: jax.Array,
        live: jax.Array,
        grad: Any,
        step: jax.Array,
        drop: jax.Array,
        axes: Axes,
    ) -> jax.Array:
        seen = Seen(path, x, step, grad, key=jax.random.fold_in(self.own(path), step + 1))
        growth, share = measured(self.growth, seen, axes), self.target.share(path, step)

        def change(x: jax.Array, growth: jax.Array, live: jax.Array) -> jax.Array:
            return turnover(x, growth, live, share, drop)

        return over_layers(change, axes, ("leaf", "leaf", "leaf"), "leaf")(x, growth, live)


def turnover(
    x: jax.Array, growth: jax.Array, live: jax.Array, sparsity: Any, drop: jax.Array
) -> jax.Array:
    """Return the mask after the smallest kept weights were dropped and those of largest growth score grown.

    Args:
      x: the weights.
      growth: floating point, in the shape of ``x``, compared by magnitude.
      live: bool, the mask before.
      sparsity: share of pruned weights afterwards, exactly as `amount` counts them.
      drop: share of the weights kept afterwards that are to be new.

    Returns:
      bool, the mask afterwards. Of equal ones, the later entry is kept or grown.

    Example:
      >>> w, g = jnp.array([1.0, 5.0, 9.0, 9.0]), jnp.array([0.0, 0.0, 2.0, 1.0])
      >>> turnover(w, g, jnp.array([True, True, False, False]), 0.5, jnp.float32(0.5)).tolist()
      [False, True, True, False]
    """
    absent = amount(sparsity, x.size)
    weak = amount(1 - (1 - jnp.asarray(sparsity, jnp.float32)) * (1 - drop), x.size)
    (low,) = smallest_by(_survival, [(x, live)], choose(less(weak, absent), absent, weak))
    survivors = live & ~low
    (out,) = smallest_by(_growth, [(growth, survivors)], absent)
    return ~out


def _survival(x: jax.Array, live: jax.Array) -> jax.Array:
    bits = magnitude_bits(x)
    return jnp.where(live, bits + jnp.ones((), bits.dtype), jnp.zeros((), bits.dtype))


def _growth(score: jax.Array, survivors: jax.Array) -> jax.Array:
    bits = magnitude_bits(score)
    return jnp.where(survivors, jnp.asarray(jnp.iinfo(bits.dtype).max, bits.dtype), bits)


def _state(masks: dict[str, jax.Array], old: dict[str, jax.Array]) -> CompressionState:
    return CompressionState(
        {}, {path: {"mask": mask, "grown": mask & ~old[path]} for path, mask in masks.items()}
    )


# SET: sparse evolutionary training, whose weights are grown at random.


def set(  # noqa: A001
    sparsity: Sparsity,
    steps: int,
    key: jax.Array,
    *,
    drop: float | optax.Schedule = 0.3,
    every: int = 100,
    until: float = 0.75,
) -> Compression:
    """Train sparse from the start: the smallest kept weights are replaced by others, drawn by lot.

    See `regrowing` for the rule. With ``drop=0`` the first mask stays: static sparse training.

    Args:
      sparsity: as of `magnitude`: a number, a schedule, or a map such as `erk` returns.
      steps: length of the training.
      key: typed PRNG key.
      drop: the first drop fraction, falling by a cosine; or a schedule of it.
      every: weights are replaced at steps divisible by it.
      until: share of the training after which the mask stays.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "grown": what the last update grew}``.

    Raises:
      ValueError: for impossible arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> c, params = set(0.9, 1000, jax.random.key(0)), {"w": jnp.ones((10, 10))}
      >>> int(c.view(params, c.init(params))["w"].sum())
      10

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", 2018, algorithm 1.
    """
    return regrowing(Growth(_draw), sparsity, steps, key, drop=drop, every=every, until=until)


def _draw(seen: Seen) -> jax.Array:
    return jax.random.uniform(seen.key, seen.x.shape)


# RigL: sparse training whose weights are grown where the gradient is largest.


def rigl(
    sparsity: Sparsity,
    steps: int,
    key: jax.Array,
    *,
    drop: float | optax.Schedule = 0.3,
    every: int = 100,
    until: float = 0.75,
) -> Compression:
    """Train sparse from the start: the smallest kept weights are replaced by those of largest gradient.

    See `regrowing` for the rule. `update` needs ``grads``, the gradient at the weights the model
    used, dense where a mask is on. A weight that was just dropped may be grown again. With a rising
    schedule it prunes gradually and regrows (GraNet).

    Args:
      sparsity: as of `magnitude`: a number, a schedule, or a map such as `erk` returns.
      steps: length of the training.
      key: typed PRNG key of the first mask.
      drop: the first drop fraction, falling by a cosine; or a schedule of it.
      every: weights are replaced at steps divisible by it.
      until: share of the training after which the mask stays.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "grown": what the last update grew}``.

    Raises:
      ValueError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> c, params = rigl(0.75, 100, jax.random.key(0), every=1), {"w": jnp.ones(4)}
      >>> state = c.update(params, c.init(params), step=1, grads={"w": jnp.ones(4)})
      >>> int(c.view(params, state)["w"].sum())
      1

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, algorithm 1. Liu et al.,
      "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", 2021 (GraNet).
    """
    return regrowing(
        Growth(_slope, needs_grads=True), sparsity, steps, key, drop=drop, every=every, until=until
    )


def _slope(seen: Seen) -> jax.Array:
    return seen.grad
