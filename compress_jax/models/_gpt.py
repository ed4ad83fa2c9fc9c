"""GPT, the causal transformer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import DType
from compress_jax.models._attention import Gelu, PreNorm


class GPT(nn.Module):
    """Pre-norm causal transformer whose head is its table of tokens.

    The defaults are GPT-2 small: 124,439,808 parameters. With ``scan`` the layers are one
    `jax.lax.scan` over stacked parameters, ``layers/...`` with a leading axis of ``depth``, and
    compile as fast as one layer. Without it they are ``layer_0/...``, ``layer_1/...``, and so on.
    There is no dropout.

    Attributes:
      vocabulary: the number of different tokens, and of logits.
      width: the size of a token's vector.
      depth: the number of layers.
      heads: the number of attention heads.
      hidden: the number of hidden units of the perceptrons; None for 4 times the width.
      positions: the length of the longest sequence.
      scan: whether layers are stacked.
      remat: whether the activations of a layer are recomputed for its gradient instead of stored.
      gelu: ``"tanh"`` as published, or ``"exact"``.
      epsilon: the epsilon of the layer norms.
      dtype: the dtype of the layers' computation; logits are float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.GPT(vocabulary=100, width=8, depth=2, heads=2, positions=16, scan=True)
      >>> tokens = jnp.array([[5, 17, 9, 0]])
      >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
      >>> jax.jit(model.apply)(variables, tokens).shape
      (1, 4, 100)

    References:
      Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
    """

    vocabulary: int = 50_257
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    positions: int = 1024
    scan: bool = False
    remat: bool = False
    gelu: Gelu = "tanh"
    epsilon: float = 1e-5
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Return the logits of each next token, ``[batch, length, vocabulary]``.

        Args:
          tokens: int32 ``[batch, length]``.
          train: has no effect.
        """
        length = tokens.shape[1]
        if length > self.positions:
            raise ArgumentError(
                f"sequences of {length} tokens are longer than positions={self.positions}"
            )
        init = nn.initializers.normal(0.02)
        table = nn.Embed(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=init, name="tokens"
        )
        places = nn.Embed(
            self.positions, self.width, dtype=self.dtype, embedding_init=init, name="positions"
        )
        # [batch, length, width]
        x = table(tokens) + places(jnp.arange(length)[None])
        # Causal: query i attends to keys 0 to i. Broadcast over batch and heads.
        x = self._layers(x, jnp.tril(jnp.ones((1, 1, length, length), bool)))
        x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(x)
        # Logits in bfloat16 would cost accuracy of the gradient, see `head`. A table that is stored
        # in bfloat16 stays so: its products with bfloat16 are exact in float32.
        dtype = jnp.promote_types(x.dtype, table.embedding.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        kernel = table.embedding.astype(dtype).T
        return jnp.matmul(x.astype(dtype), kernel, preferred_element_type=wide)

    def _layers(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        # Within a scan XLA cannot merge the recomputation with the first pass: it needs no barrier.
        layer = nn.remat(PreNorm, prevent_cse=not self.scan) if self.remat else PreNorm
        arguments = (self.heads, self.hidden or 4 * self.width, self.gelu, self.epsilon, self.dtype)
        if not self.scan:
            for i in range(self.depth):
                x = layer(*arguments, name=f"layer_{i}")(x, mask)
            return x
        # Params get a leading axis of layers, and each layer is initialized from a key of its own.
        axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        step = nn.scan(lambda layer, x, _: (layer(x, mask), None), length=self.depth, **axes)
        return step(layer(*arguments, name="layers"), x, None)[0]
