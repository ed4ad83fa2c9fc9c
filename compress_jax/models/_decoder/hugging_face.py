"""Decoders as Hugging Face stores them: config.json and safetensors, in one file or several."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from compress_jax.core.errors import WeightsError
from compress_jax.core.types import JsonObject
from compress_jax.models._decoder.config import Activation, DecoderConfig
from compress_jax.models._decoder.rope import Rope, linear, llama3
from compress_jax.models._decoder.tensors import Index, Stored
from compress_jax.models._published import WRONG_KIND, renamed

INDEX = "model.safetensors.index.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gpt2")
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Numbers of a config that every config.json has, and of GPT-2's.
KEYS = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
}
GPT2_KEYS = {
    "vocabulary": "vocab_size",
    "width": "n_embd",
    "depth": "n_layer",
    "heads": "n_head",
    "positions": "n_positions",
}
# What a config.json of a family leaves out where it is so.
DEFAULTS: dict[str, JsonObject] = {
    "mistral": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
}
# Our layers and theirs; layers of GPT-2 have names of their own.
NAMES = (
    (r"tokens", "embed_tokens"),
    (r"norm", "norm"),
    (r"layer_(\d+)/attention_norm", r"layers.\1.input_layernorm"),
    (r"layer_(\d+)/mlp_norm", r"layers.\1.post_attention_layernorm"),
    (r"layer_(\d+)/attention/(query|key)_norm", r"layers.\1.self_attn.\2_norm"),
    (r"layer_(\d+)/attention/(query|key|value|out)", r"layers.\1.self_attn.\2_proj"),
    (r"layer_(\d+)/mlp/(gate|up|down)", r"layers.\1.mlp.\2_proj"),
)
SANDWICH = (
    (r"layer_(\d+)/attention_post_norm", r"layers.\1.post_attention_layernorm"),
    (r"layer_(\d+)/mlp_norm", r"layers.\1.pre_feedforward_layernorm"),
    (r"layer_(\d+)/mlp_post_norm", r"layers.\1.post_feedforward_layernorm"),
)
GPT2 = (
    (r"tokens", "wte"),
    (r"positions", "wpe"),
    (r"norm", "ln_f"),
    (r"layer_(\d+)/attention_norm", r"h.\1.ln_1"),
    (r"layer_(\d+)/mlp_norm", r"h.\1.ln_2"),
    (r"layer_(\d+)/attention/(?:query|key|value)", r"h.\1.attn.c_attn"),
    (r"layer_(\d+)/attention/out", r"h.\1.attn.c_proj"),
    (r"layer_(\d+)/mlp/up", r"h.\1.mlp.c_fc"),
    (r"layer_(\d+)/mlp/down", r"h.\1.mlp.c_proj"),
)
SHORT = {"query": "q", "key": "k", "value": "v", "out": "o"}
# Tables that files keep though they are computed.
COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")


def decoder_config(config: JsonObject) -> tuple[str, DecoderConfig]:
    """Return a decoder's family and shape.

    Args:
      config: of ``config.json``.

    Returns:
      ``(family, shape)``.

    Raises:
      WeightsError: if the family is unknown, or the config asks for what a `Decoder` cannot do.

    Example:
      >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
      >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "rms_norm_eps": 1e-6}
      >>> decoder_config({"model_type": "llama", **sizes})[1].head_width
      4
    """
    family = config.get("model_type")
    if family == "gemma3" and "text_config" in config:
        config = {**config["text_config"], "model_type": "gemma3_text"}
        family = "gemma3_text"
    if family not in FAMILIES:
        raise WeightsError(
            f"config.json is of a {family!r}, and decoders of {', '.join(FAMILIES)} are read; any "
            "other model can be compressed as a function of its own"
        )
    config = {**DEFAULTS.get(family, {}), **config}
    try:
        made = _gpt2(config) if family == "gpt2" else _llama(family, config)
    except KeyError as error:
        raise WeightsError(f"config.json lacks {error}") from error
    except WRONG_KIND as error:
        raise WeightsError(f"config.json cannot be used: {error}") from error
    return family, dataclasses.replace(made, stop=stop_tokens(config, made.vocabulary))


def stop_tokens(config: JsonObject, vocabulary: int) -> tuple[int, ...]:
    """Return the tokens that end a text, as ``config.json`` or ``generation_config.json`` has them.

    Example:
      >>> stop_tokens({"eos_token_id": [2, 7]}, 9), stop_tokens({"eos_token_id": None}, 9)
      ((2, 7), ())
    """
    found = config.get("eos_token_id")
    several = found if isinstance(found, list) else [found]
    # Some files name tokens that their vocabulary lacks.
    return tuple(x for x in several if isinstance(x, int) and 0 <= x < vocabulary)


def _gpt2(config: JsonObject) -> DecoderConfig:
    width = config["n_embd"]
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise WeightsError("config.json scales attention as no decoder here does")
    return DecoderConfig(
        **{name: config[key] for name, key in GPT2_KEYS.items()},
        kv_heads=config["n_head"],
        head_width=width // config["n_head"],
        hidden=config.get("n_inner") or 4 * width,
        norm="layer",
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        activation=_activation(config.get("activation_function", "gelu_new")),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _llama(family: str, config: JsonObject) -> DecoderConfig:
    heads = config["num_attention_heads"]
    width = config["hidden_size"]
    head_width = config.get("head_dim") or width // heads
    depth = config["num_hidden_layers"]
    is_gemma = family.startswith("gemma")
    bias = bool(config.get("attention_bias", False))
    sliding = _sliding(family, config, depth)
    ropes = _ropes(config, head_width)
    scalar = config.get("query_pre_attn_scalar")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            raise WeightsError(f"config.json has {name}, which no decoder here does")
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    # Gemma's first config says gelu, and its code takes the approximation.
    activation = "gelu_tanh" if family == "gemma" else _activation(name)
    return DecoderConfig(
        **{name: config[key] for name, key in KEYS.items()},
        kv_heads=config.get("num_key_value_heads") or heads,
        head_width=head_width,
        epsilon=config.get("rms_norm_eps", 1e-6),
        activation=activation,
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "gemma3_text"),
        post_norms=family == "gemma3_text",
        embedding_scale=width**0.5 if is_gemma else 1.0,
        query_scale=scalar**-0.5 if scalar else None,
        rope=ropes["full_attention"],
        sliding=sliding,
        window=config.get("sliding_window") if any(sliding) else None,
        local_rope=ropes.get("sliding_attention"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise WeightsError(f"config.json wants the activation {name!r}; known: {[*ACTIVATIONS]}")
    return ACTIVATIONS[name]


def _sliding(family: str, config: JsonObject, depth: int) -> tuple[bool, ...]:
    """Return which layers see a window alone."""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return ()
    if "layer_types" in config:
        return tuple(kind == "sliding_attention" for kind in config["layer_types"])
    if family == "mistral":
        return (True,) * depth
    if family == "gemma3_text":
        every = config.get("sliding_window_pattern", 6)
        return tuple((i + 1) % every != 0 for i in range(depth))
    first = config.get("max_window_layers", depth)
    return tuple(i >= first for i in range(depth))


def _ropes(config: JsonObject, head_width: int) -> dict[str, Rope]:
    """Return the rotary positions of each kind of layer."""
    given = config.get("rope_parameters") or {}
    if given and all(isinstance(each, dict) for each in given.values()):
        return {kind: _rope(config, each, head_width) for kind, each in given.items()}
    found = {"full_attention": _rope(config, given or config.get("rope_scaling") or {}, head_width)}
    if "rope_local_base_freq" in config:
        found["sliding_attention"] = Rope(config["rope_local_base_freq"])
    return found


def _rope(config: JsonObject, how: JsonObject, head_width: int) -> Rope:
    theta = float(how.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    share = how.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise WeightsError(f"config.json turns {share} of a head's features, and here all turn")
    kind = how.get("rope_type") or how.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, linear(how["factor"], head_width))
    if kind == "llama3":
        low, high = how["low_freq_factor"], how["high_freq_factor"]
        length = how["original_max_position_embeddings"]
        return Rope(theta, llama3(theta, head_width, how["factor"], low, high, length))
    raise WeightsError(
        f"config.json extends rotary positions by {kind!r}; default, linear and llama3 are known"
    )


def stored_as(family: str, names: Mapping[str, object]) -> Callable[[str], Stored]:
    """Return how each leaf of a family lies in its files.

    Args:
      family: of `decoder_config`.
      names: the arrays of the files, some of which have prefixes.

    Returns:
      ``path -> Stored``.

    Example:
      >>> stored_as("llama", {"model.norm.weight": 0})("layer_3/attention/query/kernel").name
      'model.layers.3.self_attn.q_proj.weight'
    """
    prefix = _prefix(names)
    plus = 1.0 if family.startswith("gemma") else 0.0

    def stored(path: str) -> Stored:
        place, _, leaf = path.rpartition("/")
        end = "bias" if leaf == "bias" else "weight"
        if place == "head":
            return Stored("lm_head.weight", transposed=True)
        name = f"{prefix}{_their_layer(family, place)}.{end}"
        if family == "gpt2":
            kinds = ("query", "key", "value")
            kind = place.rpartition("/")[2]
            return Stored(name, part=(kinds.index(kind), 3) if kind in kinds else None)
        is_norm = leaf == "scale"
        return Stored(name, transposed=leaf == "kernel", plus=plus if is_norm else 0.0)

    return stored


def _prefix(names: Mapping[str, object]) -> str:
    known = ("model.language_model.", "language_model.model.", "model.", "transformer.", "")
    return next(each for each in known if any(name.startswith(each) for name in names))


def _their_layer(family: str, place: str) -> str:
    sandwich = SANDWICH if family == "gemma3_text" else ()
    name = renamed(place, GPT2 if family == "gpt2" else (*sandwich, *NAMES))
    if name is None:
        raise WeightsError(f"{place!r} is no layer of a decoder")
    return re.sub(r"\.(query|key|value|out)_", lambda m: f".{SHORT[m[1]]}_", name)


def is_unused(name: str, tied: bool) -> bool:
    """Return whether an array of a file is computed, repeated, or of another modality.

    Example:
      >>> is_unused("lm_head.weight", tied=True), is_unused("lm_head.weight", tied=False)
      (True, False)
    """
    other = name.startswith(("vision_tower.", "model.vision_tower.", "multi_modal_projector."))
    other |= name.startswith("model.multi_modal_projector.")
    return other or bool(COMPUTED.fullmatch(name)) or (tied and name == "lm_head.weight")


class Safetensors:
    """The arrays of one safetensors file or several, of which parts are read."""

    def __init__(self, opened: dict[str, Any]) -> None:
        self._opened = opened  # the open file of each array

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array."""
        return {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._opened.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        """Return a part of an array."""
        return self._opened[name].get_slice(name)[index]


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Safetensors]:
    """Open the safetensors files of a folder.

    Args:
      folder: with ``model.safetensors``, or with several and their index.

    Yields:
      Their arrays.

    Raises:
      WeightsError: if there is no such file, or one is damaged or missing.
    """
    files = weight_files(folder)
    with contextlib.ExitStack() as stack:
        arrays: dict[str, Any] = {}
        for file in files:
            try:
                each = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                raise WeightsError(f"cannot read {file} as safetensors: {error}") from error
            arrays |= dict.fromkeys(each.keys(), each)
        yield Safetensors(arrays)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a model."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{index} is no index of safetensors files: {error}") from error
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise WeightsError(f"{index} names {outside[0]!r}, which is not in its folder")
        return [folder / name for name in names]
    whole = folder / "model.safetensors"
    if whole.is_file():  # beside which adapters may lie, or the same weights by other names
        return [whole]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise WeightsError(f"{folder} has no safetensors file")
    return found
