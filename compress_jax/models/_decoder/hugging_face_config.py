"""The ``config.json`` of a decoder, of which `hugging_face.decoder_config` makes it again."""

from compress_jax.core.types import JsonObject
from compress_jax.models._decoder.config import DecoderConfig, published_family
from compress_jax.models._decoder.hugging_face import ACTIVATIONS, GPT2_KEYS, KEYS
from compress_jax.models._decoder.rope import Rope

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# Of Llama 3.1 and later: only the factor differs between them.
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_json(config: DecoderConfig, context: int) -> JsonObject:
    """Return the ``config.json`` of the family that a decoder fits best.

    Args:
      config: the shape.
      context: tokens of a context, for a decoder without a table of positions.

    Returns:
      The config; whether it says all of the shape, the reader tells.

    Example:
      >>> import compress_jax as cj
      >>> config = cj.models.DecoderConfig(9, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=16)
      >>> config_json(config, 64)["architectures"]
      ['LlamaForCausalLM']
    """
    family = published_family(config)
    if family == "gpt2":
        own = _gpt2(config)
    else:
        family = {"gemma3": "gemma3_text"}.get(family, family)
        family = "mistral" if family == "llama" and any(config.sliding) else family
        own = _llama(config, family) | {"max_position_embeddings": context}
    return {"architectures": [CLASSES[family]], "model_type": family, **own}


def _gpt2(config: DecoderConfig) -> JsonObject:
    return {
        **{key: getattr(config, name) for name, key in GPT2_KEYS.items()},
        "n_inner": config.hidden,
        "layer_norm_epsilon": config.epsilon,
        "activation_function": _activation(config),
        "tie_word_embeddings": config.tied,
    }


def _llama(config: DecoderConfig, family: str) -> JsonObject:
    own: JsonObject = {
        **{key: getattr(config, name) for name, key in KEYS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.epsilon,
        "hidden_act": _activation(config),
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied,
        **_scaling(config.rope),
        **_sliding(config, family),
    }
    if family.startswith("gemma"):
        own["hidden_activation"] = own["hidden_act"]
    if family == "gemma3_text":
        scale = config.query_scale
        own["query_pre_attn_scalar"] = config.head_width if scale is None else round(scale**-2)
        own["rope_local_base_freq"] = (config.local_rope or config.rope).theta
    return own


def _sliding(config: DecoderConfig, family: str) -> JsonObject:
    """Return which layers see a window alone."""
    slides = any(config.sliding)
    own: JsonObject = {"sliding_window": config.window if slides else None}
    if slides and family != "mistral":
        kinds = {True: "sliding_attention", False: "full_attention"}
        own |= {"use_sliding_window": True, "layer_types": [kinds[x] for x in config.sliding]}
    return own


def _scaling(rope: Rope) -> JsonObject:
    """Return how contexts were extended; factors of their own are taken for those of Llama 3."""
    if not rope.factors:
        return {}
    if len(set(rope.factors)) == 1:
        return {"rope_scaling": {"rope_type": "linear", "factor": rope.factors[0]}}
    return {"rope_scaling": {**LLAMA3, "factor": max(rope.factors)}}


def _activation(config: DecoderConfig) -> str:
    # Of two names of one function the last is that of newer files.
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return names[config.activation]
