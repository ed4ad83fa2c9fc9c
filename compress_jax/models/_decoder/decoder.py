"""A causal transformer of any published shape, with or without a cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import DType
from compress_jax.models._decoder.cache import Cache, Past, empty_cache
from compress_jax.models._decoder.config import DecoderConfig
from compress_jax.models._decoder.layers import DecoderLayer, View, norm_of
from compress_jax.models._decoder.rope import angles
from compress_jax.quantize import KVGrid


class Decoder(nn.Module):
    """The causal transformer of Llama, Mistral, Qwen, Gemma or GPT-2, as its config says.

    With ``scan`` the layers are one `jax.lax.scan` over stacked parameters, ``layers/...`` with a
    leading axis of layers. Without it they are ``layer_0/...``, ``layer_1/...``, and so on; the
    numbers are the same.

    Attributes:
      config: the shape.
      scan: whether layers are stacked.
      remat: whether the activations of a layer are recomputed for its gradient instead of stored.
      dtype: the dtype of the layers' computation; logits are float32.
      scatter: whether a cache is written in place. False chooses each of its entries from old and
        new instead, which moves the whole cache once more, and is what ONNX converters know.

    Example:
      >>> import compress_jax as cj
      >>> config = cj.models.DecoderConfig(100, 8, 2, heads=4, kv_heads=2, head_width=2, hidden=16)
      >>> model = cj.models.Decoder(config)
      >>> tokens = jnp.array([[5, 17, 9, 0]])
      >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
      >>> logits, cache = model.apply(variables, tokens, cache=model.cache(1, capacity=8))
      >>> logits.shape, cache.length.tolist()
      ((1, 4, 100), [4])

    References:
      Touvron et al., "Llama 2", 2023; Gemma Team, "Gemma 3 Technical Report", 2025; Yang et al.,
      "Qwen3 Technical Report", 2025; Ainslie et al., "GQA", EMNLP 2023.
    """

    config: DecoderConfig
    scan: bool = False
    remat: bool = False
    dtype: DType = jnp.float32
    scatter: bool = True

    def cache(
        self,
        batch: int,
        capacity: int,
        dtype: DType | None = None,
        grid: KVGrid | None = None,
    ) -> Cache:
        """Return a cache without tokens, for ``apply(..., cache=...)``.

        Args:
          batch: rows.
          capacity: tokens that a row may have in all.
          dtype: of keys and values in floats; by default that of the layers.
          grid: of keys and values in few bits; None for floats.
        """
        return empty_cache(self.config, batch, capacity, self.scan, dtype or self.dtype, grid)

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        train: bool = False,
        *,
        cache: Cache | None = None,
        at: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> Any:
        """Return the logits of each next token, ``[batch, length, vocabulary]``.

        Args:
          tokens: int32 ``[batch, length]``; with a cache those that come next.
          train: has no effect.
          cache: keys and values of the tokens before.
          at: which place's logits are returned, int32 ``[batch]``, as ``[batch, 1, vocabulary]``;
            None for all.
          lengths: how many of each row's tokens go into the cache, int32 ``[batch]``; those behind
            are padding. None for all.

        Returns:
          The logits; with a cache ``(logits, cache with these tokens)``.
        """
        c = self.config
        begin = jnp.zeros(1, jnp.int32) if cache is None else cache.length
        positions = begin[:, None] + jnp.arange(tokens.shape[1])[None]  # [batch or 1, length]
        self._check(tokens, cache)
        init = nn.initializers.normal(0.02)
        kinds: dict[str, Any] = {"dtype": self.dtype, "embedding_init": init}
        table = nn.Embed(c.vocabulary, c.width, name="tokens", **kinds)
        x = table(tokens)  # [batch, length, width]
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.positions is not None:
            x = x + nn.Embed(c.positions, c.width, name="positions", **kinds)(positions)
        count = tokens.shape[1] if lengths is None else lengths
        x, layers = self._layers(x, positions, cache, count)
        if at is not None:
            x = jnp.take_along_axis(x, at[:, None, None], axis=1)
        logits = self._head(norm_of(c, self.dtype, "norm")(x), table)
        if cache is None:
            return logits
        return logits, Cache(layers, cache.length + count)

    def _check(self, tokens: jax.Array, cache: Cache | None) -> None:
        length = tokens.shape[1]
        most = self.config.positions
        if most is not None and length > most:
            raise ArgumentError(
                f"sequences of {length} tokens are longer than positions={most}: give a shorter "
                "context"
            )
        if cache is not None:
            if length > cache.capacity:
                raise ArgumentError(f"{length} tokens do not fit into a cache of {cache.capacity}")
            # Under jit the length is not known; there the caller counts.
            known = not isinstance(cache.length, Tracer)
            if known and int(cache.length.max()) + length > cache.capacity:
                raise ArgumentError(
                    f"{length} more tokens do not fit into a cache of {cache.capacity}, which has "
                    f"{int(cache.length.max())}"
                )

    def _head(self, x: jax.Array, table: nn.Embed) -> jax.Array:
        if not self.config.tied:
            dense = nn.Dense(
                self.config.vocabulary,
                use_bias=False,
                dtype=self.dtype,
                dot_general=_wide,
                name="head",
            )
            return dense(x)
        kernel = table.embedding.astype(x.dtype).T
        return jnp.matmul(x, kernel, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))

    def _views(self, positions: jax.Array, cache: Cache | None) -> tuple[View, View]:
        """Return what layers see that see everything, and what those with a window see."""
        c = self.config
        number = positions.shape[1]
        if cache is not None:
            number = cache.capacity
        keys = jnp.arange(number)[None, None]
        behind = positions[..., None] - keys  # [batch or 1, length, keys]
        causal = behind >= 0
        near = causal if c.window is None else causal & (behind < c.window)
        wide = narrow = None
        if c.positions is None:
            wide = angles(c.rope, c.head_width, positions)
            narrow = angles(c.local_rope or c.rope, c.head_width, positions)
        return View(causal[:, None, None], wide), View(near[:, None, None], narrow)

    def _layers(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None, count: jax.Array | int
    ) -> tuple[jax.Array, Any]:
        full, local = self._views(positions, cache)
        # Within a scan XLA cannot merge the recomputation with the first pass: it needs no barrier.
        layer = nn.remat(DecoderLayer, prevent_cse=not self.scan) if self.remat else DecoderLayer
        c = self.config
        if not self.scan:
            seen = []
            for i in range(c.depth):
                view = local if c.is_local(i) else full
                past = None if cache is None else Past(cache.layers[i], cache.length, count)
                x, pair = layer(c, self.dtype, self.scatter, name=f"layer_{i}")(x, view, past)
                seen.append(pair)
            return x, tuple(seen)
        flags = jnp.asarray(np.array([c.is_local(i) for i in range(c.depth)]))
        alike = len(set(map(c.is_local, range(c.depth)))) == 1
        one = local if c.is_local(0) else full

        def step(layer: nn.Module, x: jax.Array, own: Any) -> tuple[jax.Array, Any]:
            is_local, pair = own
            view = one
            if not alike:
                view = jax.tree.map(lambda a, b: jnp.where(is_local, a, b), local, full)
            past = None if cache is None else Past(pair, cache.length, count)
            x, pair = layer(x, view, past)
            return x, pair if cache is not None else None

        # Params get a leading axis of layers, and each layer is initialized from a key of its own.
        axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        scanned = nn.scan(step, length=c.depth, **axes)
        pairs = None if cache is None else cache.layers
        return scanned(layer(c, self.dtype, self.scatter, name="layers"), x, (flags, pairs))


def _wide(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """Return a product in float32 at least: logits in bfloat16 would cost accuracy."""
    options["preferred_element_type"] = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, kernel, *args, **options)
