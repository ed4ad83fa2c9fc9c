"""What a decoder is called in a GGUF file: its family, its numbers, its arrays; both ways."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress_jax.core.errors import WeightsError
from compress_jax.models._decoder.config import DecoderConfig
from compress_jax.models._decoder.rope import Rope, linear
from compress_jax.models._decoder.tensors import Stored, Tensors
from compress_jax.models._published import WRONG_KIND, renamed

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma3", "gpt2")
NAMES = (
    (r"tokens", "token_embd"),
    (r"positions", "position_embd"),
    (r"norm", "output_norm"),
    (r"head", "output"),
    (r"layer_(\d+)/attention_norm", r"blk.\1.attn_norm"),
    (r"layer_(\d+)/attention_post_norm", r"blk.\1.post_attention_norm"),
    (r"layer_(\d+)/mlp_norm", r"blk.\1.ffn_norm"),
    (r"layer_(\d+)/mlp_post_norm", r"blk.\1.post_ffw_norm"),
    (r"layer_(\d+)/attention/query_norm", r"blk.\1.attn_q_norm"),
    (r"layer_(\d+)/attention/key_norm", r"blk.\1.attn_k_norm"),
    (r"layer_(\d+)/attention/query", r"blk.\1.attn_q"),
    (r"layer_(\d+)/attention/key", r"blk.\1.attn_k"),
    (r"layer_(\d+)/attention/value", r"blk.\1.attn_v"),
    (r"layer_(\d+)/attention/out", r"blk.\1.attn_output"),
    (r"layer_(\d+)/mlp/(gate|up|down)", r"blk.\1.ffn_\2"),
)

# Numbers of the config, behind the family's name.
KEYS = {
    "width": "embedding_length",
    "depth": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_width": "attention.key_length",
    "hidden": "feed_forward_length",
    "window": "attention.sliding_window",
    "positions": "context_length",
}
EPSILON = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
ARCHITECTURE = "general.architecture"
THETA = "rope.freq_base"
SCALING = "rope.scaling.type"
FACTOR = "rope.scaling.factor"
FACTORS = "rope_freqs.weight"  # an array: what Llama 3.1's frequencies are divided by


class Described(Tensors, Protocol):
    """A GGUF file, or what is to become one."""

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What it says of itself."""
        ...


def gguf_config(file: Described) -> tuple[str, DecoderConfig]:
    """Return a decoder's family and shape.

    Args:
      file: the file.

    Returns:
      ``(family, shape)``.

    Raises:
      WeightsError: if the family is unknown, or the file lacks a number.
    """
    family = file.metadata.get(ARCHITECTURE)
    if family not in FAMILIES:
        raise WeightsError(
            f"{file.path} is of a {family!r}, and decoders of {', '.join(FAMILIES)} are read"
        )
    try:
        return family, _shape(file, family)
    except WRONG_KIND as error:
        raise WeightsError(f"{file.path} has metadata that cannot be used: {error}") from error


def _shape(file: Described, family: str) -> DecoderConfig:
    def own(name: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{family}.{name}", default)
        if value is None:
            raise WeightsError(f"{file.path} does not say {family}.{name}")
        return value

    shapes = file.shapes()
    heads = own(KEYS["heads"])
    width = own(KEYS["width"])
    head_width = own(KEYS["head_width"], width // heads)
    depth = own(KEYS["depth"])
    vocabulary = shapes.get("token_embd.weight", (0,))[0]
    is_gpt2 = family == "gpt2"
    is_gemma = family.startswith("gemma")
    window = own(KEYS["window"], 0)
    sliding: tuple[bool, ...] = ()
    if window:  # five layers of a window, then one without
        every = 6 if family == "gemma3" else 1
        sliding = tuple((i + 1) % every != 0 or every == 1 for i in range(depth))
    norm = "layer" if is_gpt2 else "rms"
    epsilon = own(EPSILON[norm])
    return DecoderConfig(
        vocabulary,
        width,
        depth,
        heads=heads,
        kv_heads=own(KEYS["kv_heads"], heads),
        head_width=head_width,
        hidden=own(KEYS["hidden"]),
        norm=norm,
        # Stored as a float32 of a decimal number.
        epsilon=float(f"{epsilon:.6g}"),
        activation="gelu_tanh" if is_gpt2 or is_gemma else "silu",
        gated=not is_gpt2,
        qkv_bias="blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        post_norms="blk.0.post_ffw_norm.weight" in shapes,
        embedding_scale=width**0.5 if is_gemma else 1.0,
        positions=own(KEYS["positions"]) if is_gpt2 else None,
        rope=_rope(file, family, head_width),
        sliding=sliding,
        window=window or None,
        local_rope=Rope(10_000.0) if family == "gemma3" else None,
        tied="output.weight" not in shapes,
        stop=_stop(file, vocabulary),
    )


def _stop(file: Described, vocabulary: int) -> tuple[int, ...]:
    """Return the tokens that end a text, and a turn of a chat."""
    found = [file.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot")]
    # Some files name tokens that their vocabulary lacks.
    return tuple(dict.fromkeys(x for x in found if isinstance(x, int) and 0 <= x < vocabulary))


def _rope(file: Described, family: str, head_width: int) -> Rope:
    theta = float(file.metadata.get(f"{family}.{THETA}", 10_000.0))
    kind = file.metadata.get(f"{family}.{SCALING}", "none")
    if FACTORS in file.shapes():
        factors = file.read(FACTORS, (slice(None),))
        return Rope(theta, tuple(map(float, factors)))
    if kind == "none":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, linear(file.metadata[f"{family}.{FACTOR}"], head_width))
    raise WeightsError(f"{file.path} extends rotary positions by {kind!r}, which is unknown here")


def stored_in_gguf(family: str, config: DecoderConfig) -> Callable[[str], Stored]:
    """Return how each leaf of a family lies in its file: ``path -> Stored``.

    Example:
      >>> config = DecoderConfig(9, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=16)
      >>> stored_in_gguf("llama", config)("layer_0/attention/key/kernel")
      Stored(name='blk.0.attn_k.weight', transposed=True, part=None, plus=0.0, heads=1)
    """

    def stored(path: str) -> Stored:
        place, _, leaf = path.rpartition("/")
        end = "bias" if leaf == "bias" else "weight"
        kind = place.rpartition("/")[2]
        if family == "gpt2" and kind in ("query", "key", "value"):
            layer = place.split("/")[0].removeprefix("layer_")
            part = (("query", "key", "value").index(kind), 3)
            return Stored(f"blk.{layer}.attn_qkv.{end}", leaf == "kernel", part)
        # Of Llama alone: the converter lays the features that turn together side by side.
        heads = {"query": config.heads, "key": config.kv_heads}.get(kind, 0)
        return Stored(
            f"{_their_layer(place)}.{end}",
            transposed=leaf == "kernel",
            heads=heads if family == "llama" else 0,
        )

    return stored


def _their_layer(place: str) -> str:
    if (name := renamed(place, NAMES)) is None:
        raise WeightsError(f"{place!r} is no layer of a decoder")
    return name


def gguf_metadata(family: str, config: DecoderConfig, context: int) -> dict[str, Any]:
    """Return a file's numbers, of which `gguf_config` makes the config again.

    Args:
      family: of `published_family`.
      config: the shape.
      context: tokens of a context, for a decoder without a table of positions.

    Returns:
      The metadata but for the vocabulary.

    Example:
      >>> config = DecoderConfig(9, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=16)
      >>> gguf_metadata("llama", config, 64)["llama.attention.head_count_kv"]
      1
    """
    own: dict[str, Any] = {KEYS["positions"]: context, "vocab_size": config.vocabulary}
    own |= {KEYS[name]: x for name in KEYS if (x := getattr(config, name)) is not None}
    if not any(config.sliding):
        own.pop(KEYS["window"], None)
    own[EPSILON[config.norm]] = config.epsilon
    if config.positions is None:
        own["attention.value_length"] = own["rope.dimension_count"] = config.head_width
        own[THETA] = config.rope.theta
    if _is_linear(config.rope):
        own |= {SCALING: "linear", FACTOR: config.rope.factors[0]}
    return {ARCHITECTURE: family, **{f"{family}.{name}": x for name, x in own.items()}}


def gguf_factors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Return the array of a file that is in the config here, if the config has one."""
    if not config.rope.factors or _is_linear(config.rope):
        return {}
    return {FACTORS: np.array(config.rope.factors, np.float32)}


def _is_linear(rope: Rope) -> bool:
    return len(set(rope.factors)) == 1
