"""What tells one published decoder from another."""

from dataclasses import dataclass
from typing import Literal

from compress_jax.core.arguments import one_of, whole
from compress_jax.core.errors import ArgumentError
from compress_jax.models._decoder.rope import Rope

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a causal transformer: one value for Llama, Qwen, Gemma, Mistral and GPT-2.

    Attributes:
      vocabulary: the number of different tokens, and of logits.
      width: the size of a token's vector.
      depth: the number of layers.
      heads: attention heads of queries.
      kv_heads: attention heads of keys and values, a divisor of ``heads``.
      head_width: features of a head.
      hidden: hidden units of the perceptrons.
      norm: ``"rms"``, or ``"layer"`` with means and biases.
      epsilon: of the norms.
      activation: of the perceptrons: ``"silu"``, ``"gelu"`` (exact) or ``"gelu_tanh"``.
      gated: whether a perceptron is ``down(activation(gate(x)) * up(x))``.
      qkv_bias: whether queries, keys and values have biases.
      out_bias: whether what attention gives has one.
      mlp_bias: whether perceptrons have them.
      qk_norm: whether each head's query and key are normalized.
      post_norms: whether what attention and perceptron give is normalized too, as in Gemma.
      embedding_scale: what the tokens' vectors are multiplied by.
      query_scale: what queries are multiplied by; None for one over the root of ``head_width``.
      positions: how many learned positions there are; None for rotary ones.
      rope: rotary positions.
      sliding: which layers see ``window`` tokens back alone; empty for none.
      window: how many tokens those layers see, the own one included.
      local_rope: rotary positions of those layers; None for ``rope``.
      tied: whether the head is the table of tokens.
      stop: tokens that end a text, where `generate` stops.

    Example:
      >>> import compress_jax as cj
      >>> cj.models.DecoderConfig(100, 8, 2, heads=4, kv_heads=2, head_width=2, hidden=16).groups
      2
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    norm: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-5
    activation: Activation = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    positions: int | None = None
    rope: Rope = Rope()
    sliding: tuple[bool, ...] = ()
    window: int | None = None
    local_rope: Rope | None = None
    tied: bool = True
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges, and that sizes fit together."""
        for name in ("vocabulary", "width", "depth", "heads", "kv_heads", "head_width", "hidden"):
            whole(name, getattr(self, name), 1)
        one_of("norm", self.norm, ("rms", "layer"))
        one_of("activation", self.activation, ("silu", "gelu", "gelu_tanh"))
        if self.heads % self.kv_heads:
            raise ArgumentError(f"kv_heads={self.kv_heads} do not divide heads={self.heads}")
        if self.positions is None and self.head_width % 2:
            raise ArgumentError(f"rotary positions need an even head_width, got {self.head_width}")
        if len(self.sliding) not in (0, self.depth):
            raise ArgumentError(
                f"sliding has {len(self.sliding)} entries; give one for each of {self.depth} layers"
            )
        for token in self.stop:
            whole("stop", token, 0, self.vocabulary - 1)
        if any(self.sliding) and self.window is None:
            raise ArgumentError("sliding layers need a window: how many tokens they see")

    @property
    def groups(self) -> int:
        """Heads of queries that share a head of keys and values."""
        return self.heads // self.kv_heads

    def is_local(self, layer: int) -> bool:
        """Return whether a layer sees a window alone."""
        return bool(self.sliding) and self.sliding[layer]


def published_family(config: DecoderConfig) -> str:
    """Return the family whose files a decoder of a shape fits best.

    Whether it fits, the reader of such files says: what is written is read again.

    Example:
      >>> import compress_jax as cj
      >>> config = cj.models.DecoderConfig(9, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=16)
      >>> published_family(config)
      'llama'
    """
    signs = (
        ("gpt2", config.norm == "layer"),
        ("gemma3", config.post_norms),
        ("gemma", config.embedding_scale != 1.0),
        ("qwen3", config.qk_norm),
        ("qwen2", config.qkv_bias and not config.out_bias),
    )
    return next((family for family, fits in signs if fits), "llama")
