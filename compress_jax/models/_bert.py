"""BERT, the post-norm text encoder, and a classifier on it."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import DType
from compress_jax.models._attention import Attention, Gelu, Perceptron
from compress_jax.models._head import head

PAD = 0  # the padding token of every BERT vocabulary


class Bert(nn.Module):
    """Bidirectional post-norm transformer over tokens.

    Each layer is ``norm(x + attention(x))``, then ``norm(x + perceptron(x))``. The defaults are
    BERT-base. BERT-tiny is ``width=128, depth=2, heads=2`` (4,369,408 parameters), BERT-mini
    ``256, 4, 4``, MiniLM-L6 ``384, 6, 12``. `pretrained.bert` loads published weights. There is no
    dropout.

    Attributes:
      vocabulary: the number of different tokens.
      width: the size of a token's vector.
      depth: the number of layers.
      heads: the number of attention heads.
      hidden: the number of hidden units of the perceptrons; None for 4 times the width.
      positions: the length of the longest sequence.
      segments: the number of different segments.
      gelu: ``"exact"`` as published, or ``"tanh"``, which some exporters need.
      epsilon: the epsilon of the layer norms.
      dtype: the dtype of the layers' computation.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.Bert(vocabulary=100, width=8, depth=1, heads=2)
      >>> tokens = jnp.array([[5, 17, 9, 0]])
      >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
      >>> jax.jit(model.apply)(variables, tokens).shape
      (1, 4, 8)

    References:
      Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019, section 3;
      Turc et al., "Well-Read Students Learn Better", 2019, table 1, for the smaller ones.
    """

    vocabulary: int = 30_522
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    positions: int = 512
    segments: int = 2
    gelu: Gelu = "exact"
    epsilon: float = 1e-12
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Return the output of the last layer, ``[batch, length, width]``.

        Args:
          tokens: int32 ``[batch, length]``.
          mask: ``[batch, length]``, true for text and false for padding; by default true where the
            token is not 0.
          segments: int32 ``[batch, length]``, the sentence of each token; by default the first.
          train: has no effect.
        """
        length = tokens.shape[1]
        if length > self.positions:
            raise ArgumentError(
                f"sequences of {length} tokens are longer than positions={self.positions}"
            )

        def embed(size: int, name: str) -> nn.Embed:
            return nn.Embed(
                size,
                self.width,
                dtype=self.dtype,
                embedding_init=nn.initializers.normal(0.02),
                name=name,
            )

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(self.epsilon, dtype=self.dtype, name=name)

        if segments is None:
            segments = jnp.zeros_like(tokens)
        mask = tokens != PAD if mask is None else mask.astype(bool)
        mask = mask[:, None, None, :]  # [batch, heads, queries, keys]
        x = embed(self.vocabulary, "tokens")(tokens)  # [batch, length, width]
        x = x + embed(self.positions, "positions")(jnp.arange(length)[None])
        x = x + embed(self.segments, "segments")(segments)
        x = norm("norm")(x)
        hidden = self.hidden or 4 * self.width
        for i in range(self.depth):
            # Post-norm: the norm follows the sum, unlike in `PreNorm`.
            attention = Attention(self.heads, self.dtype, name=f"layer_{i}_attention")
            x = norm(f"layer_{i}_attention_norm")(x + attention(x, mask))
            mlp = Perceptron(hidden, self.gelu, self.dtype, name=f"layer_{i}_mlp")
            x = norm(f"layer_{i}_mlp_norm")(x + mlp(x))
        return x


class BertClassifier(nn.Module):
    """BERT, a pooler over its first token, and a linear layer.

    Attributes:
      encoder: the `Bert`.
      classes: the number of logits.
      dtype: the dtype of the pooler's computation; logits are float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> encoder = cj.models.Bert(vocabulary=100, width=8, depth=1, heads=2)
      >>> model = cj.models.BertClassifier(encoder, classes=3)
      >>> tokens = jnp.array([[5, 17, 9, 0]])
      >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
      >>> sorted(variables["params"]), jax.jit(model.apply)(variables, tokens).shape
      (['encoder', 'head', 'pooler'], (1, 3))
    """

    encoder: Bert
    classes: int = 2
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Return logits ``[batch, classes]``; arguments as of `Bert`."""
        # The first token, [CLS], stands for the text: [batch, width].
        first = self.encoder(tokens, mask, segments, train)[:, 0]
        pooled = jnp.tanh(nn.Dense(first.shape[-1], dtype=self.dtype, name="pooler")(first))
        return head(self.classes, self.dtype)(pooled)
