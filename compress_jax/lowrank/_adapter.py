"""Low-rank adapters: thin factors that are trained beside a frozen base."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core import (
    ArgumentError,
    Compression,
    CompressionState,
    LowRank,
    Sum,
    arguments,
    chain,
    leafwise,
    unpack,
)
from compress_jax.core.axes import Axes
from compress_jax.core.compression import Pointwise, bound, parts_of
from compress_jax.core.describe import call_of
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import begin
from compress_jax.core.types import Key, Leaf, Params, Step
from compress_jax.lowrank._factors import Factors, matrix, product, sides, too_thin


def adapter(
    rank: int,
    *,
    alpha: float | None = None,
    base: Compression | None = None,
    init: Literal["zero", "error"] = "zero",
    key: jax.Array | None = None,
) -> Compression:
    """Freeze each kernel, and train two thin factors whose product is added to it.

    With W the kernel as a matrix ``[inputs, outputs]`` and q the view of ``base``, the view is
    ``q(W) + left @ right * (alpha / rank)``, computed as an array of W's shape: what the model is
    trained with is one merged kernel, so merging changes not one bit. The params, and what the
    base has learned, get zero gradients (an optimizer with weight decay moves them all the same:
    give them `optax.set_to_zero`); what the adapter skips is left to be trained as it is.

    Three ways to use it, for which `pack` gives three forms:

    * ``adapter(16)``: LoRA. The `Sum` of kernel and factors; the merged kernels are the view.
    * ``adapter(16, base=uniform(4, granularity=64))``, or as a chain
      ``chain(uniform(4, granularity=64), adapter(16))``: QLoRA. The `Sum` of the quantized kernel
      and the factors.
    * ``chain(adapter(16), uniform(4, granularity=64))``: the merged kernel is quantized in every
      step. `pack` gives its codes; no factor is left.

    To hold no float kernel while training, pack the base once and unpack it inside the step, as
    below: `view`, `pack` and `init` take packed leaves.

    Args:
      rank: r, the same for every leaf.
      alpha: the product counts ``alpha / rank`` times; None for once.
      base: what the kernels are seen through before the factors are added; None for nothing.
      init: how the factors start. ``"zero"``: right is zero, and the view equals the base's (but
        for -0.0, which becomes 0.0). ``"error"``: the best approximation of rank r of
        ``W - q(W)``, what the base has lost; it needs ``base``.
      key: typed PRNG key for a normal left factor with variance ``1 / inputs``. None: the first r
        left singular vectors, of the kernel or of the error.

    Returns:
      The Compression; ``learned[path]`` is ``{"left": float32 [m, r], "right": float32 [r, n]}``,
      with a ``base`` under ``"1"``, as in a chain. Leaves with one axis, and those whose factors
      would hold as many numbers as the leaf, are left alone; `skipped` says so.

    Raises:
      ArgumentError: if an argument is out of range, or ``init="error"`` comes without a base or
        with a key.

    Example:
      >>> import compress_jax as cj
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> int4, lora = cj.quantize.uniform(4, granularity=32), cj.lowrank.adapter(2)
      >>> base = int4.pack(params, int4.init(params))  # the float params may go
      >>> state = lora.init(base)
      >>> @jax.jit
      ... def step(learned, base, x):  # a packed base goes in, gradients of the factors come out
      ...     def loss(learned):
      ...         seen = lora.view(base, state._replace(learned=learned))
      ...         return jnp.square(x @ seen["kernel"] - 1.0).mean()
      ...     return jax.tree.map(lambda w, g: w - g, learned, jax.grad(loss)(learned))
      >>> state = state._replace(learned=step(state.learned, base, jnp.ones((4, 64))))
      >>> packed = lora.pack(base, state)
      >>> type(packed["kernel"].base).__name__, type(packed["kernel"].delta).__name__
      ('Quantized', 'LowRank')
      >>> bool((cj.unpack(packed)["kernel"] == lora.view(base, state)["kernel"]).all())
      True

    References:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. Dettmers et al.,
      "QLoRA", NeurIPS 2023. Li et al., "LoftQ", ICLR 2024. Liu et al., "EoRA", 2024.
    """
    rank = arguments.whole("rank", rank, 1)
    if alpha is not None:
        alpha = arguments.number("alpha", alpha, 0, above=True)
    arguments.one_of("init", init, ("zero", "error"))
    if key is not None:
        arguments.random_key("key", key)
    if init == "error" and (base is None or key is not None):
        raise ArgumentError(
            "init='error' starts from what a base loses, and nothing is drawn: give base=, such as "
            "quantize.uniform(4), and no key"
        )
    made = _Options(rank, 1.0 if alpha is None else alpha / rank, init, key)
    if base is None:
        return made.compression()
    arguments.compression("base", base)
    if init == "zero":
        return chain(base, made.compression())
    return _FromError(base, made.compression(), made.of_leaf()).compression()


class _Options(NamedTuple):
    """What an adapter is, and its functions of one array."""

    rank: int
    scale: float
    init: str
    key: jax.Array | None

    def compression(self) -> Compression:
        """Return the adapter of what it sees, whose factors make nothing at first."""
        return self._lifted(self.at_zero)

    def of_leaf(self) -> Compression:
        """Return an adapter whose factors start as the best approximation of the leaf itself."""
        return self._lifted(self.at_leaf)

    def _lifted(self, start: Callable[..., tuple[Factors, None]]) -> Compression:
        return leafwise(
            self.view,
            init=start,
            pack=self.pack,
            why_not=self.why_not,
            key=self.key,
            pointwise=self.pointwise,
            layout=True,
            call=call_of("adapter", rank=self.rank, scale=self.scale, init=self.init, key=self.key),
        )

    def why_not(self, path: str, x: Leaf, axes: Axes) -> str | None:
        if why := too_thin(axes.layer):
            return why
        rows, columns = sides(axes)
        size = self.rank * (rows + columns)
        if size < rows * columns:
            return None
        return (
            f"factors of rank {self.rank} hold {size:,} numbers, the {rows}x{columns} array itself "
            f"{rows * columns:,}"
        )

    def at_zero(self, x: jax.Array, key: Key, axes: Axes) -> tuple[Factors, None]:
        rows, columns = sides(axes)
        if self.init == "error":  # `_FromError` puts its own in place of these
            left = jnp.zeros((rows, self.rank))
        elif key is None:
            left = jnp.linalg.svd(matrix(x, axes), full_matrices=False)[0][:, : self.rank]
        else:
            left = jax.random.normal(key, (rows, self.rank)) / math.sqrt(rows)
        return {"left": left, "right": jnp.zeros((self.rank, columns))}, None

    def at_leaf(self, x: jax.Array, key: None, axes: Axes) -> tuple[Factors, None]:
        u, s, v = jnp.linalg.svd(matrix(x, axes), full_matrices=False)  # [m, k], [k], [k, n]
        # The left factor is orthonormal: where nothing is lost, the right one is zero and learns.
        right = s[: self.rank, None] * v[: self.rank] / self.scale
        return {"left": u[:, : self.rank], "right": right}, None

    def delta(self, factors: Factors, axes: Axes) -> LowRank:
        # Scaled before the product, so that `pack` stores the factors as they are multiplied.
        return product({**factors, "left": factors["left"] * self.scale}, axes, jnp.float32)

    def view(self, x: jax.Array, factors: Factors, _: None, axes: Axes) -> jax.Array:
        return _added(x, self.delta(factors, axes).unpack())

    def pack(self, x: jax.Array, factors: Factors, _: None, axes: Axes) -> Sum:
        return Sum(x, self.delta(factors, axes), x.dtype)

    def pointwise(self, x: jax.Array, factors: Factors, _: None, axes: Axes) -> Pointwise:
        return Pointwise(_added, (self.delta(factors, axes).unpack(),))


def _added(x: jax.Array, delta: jax.Array) -> jax.Array:
    """Return the sum of a frozen array and what is trained beside it."""
    return Sum(jax.lax.stop_gradient(x), delta, x.dtype).unpack()


class _FromError(NamedTuple):
    """An adapter behind a base, whose factors start from what the base loses.

    Attributes:
      base: the base.
      adapter: the adapter of what the base shows.
      of_error: the same adapter; its `init` returns the factors of the leaves that it is given.
    """

    base: Compression
    adapter: Compression
    of_error: Compression

    def compression(self) -> Compression:
        # Only the start differs from the chain: it sees the params on both sides of the base.
        return chain(self.base, self.adapter)._replace(init=self.init, bind=self.bind)

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return _FromError(*(bound(c, known) for c in self)).compression()

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        params = unpack(params)
        state = begin(chain(self.base, self.adapter), params, step)
        stored = flatten(params)[0]
        seen = flatten(self.base.view(params, parts_of(state, 2)[0]))[0]
        error = {
            path: stored[path].astype(jnp.float32) - seen[path].astype(jnp.float32)
            for path in self.adapter.axes(params)
        }
        learned = {**state.learned, "1": self.of_error.init(error).learned}
        return state._replace(learned=learned)
