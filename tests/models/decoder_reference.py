"""Published decoders in NumPy's float64, from Hugging Face's names, written from their papers.

Loops over layers, heads and positions: nothing is shared with what is tested.
"""

import math

import numpy as np


def weights(config, rng):
    """Return random weights with Hugging Face's names and shapes."""
    if config["model_type"] == "gpt2":
        return _gpt2_weights(config, rng)
    width, hidden = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv = config.get("num_key_value_heads", heads)
    d = config.get("head_dim") or width // heads
    family = config["model_type"]
    gemma = family.startswith("gemma")

    def norm(n):
        return 0.3 * rng.normal(size=n) + (0.0 if gemma else 1.0)

    found = {"model.embed_tokens.weight": rng.normal(size=(config["vocab_size"], width))}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        sizes = {"q": (heads * d, width), "k": (kv * d, width), "v": (kv * d, width)}
        sizes["o"] = (width, heads * d)
        for name, size in sizes.items():
            found[f"{at}.self_attn.{name}_proj.weight"] = 0.3 * rng.normal(size=size)
            if config.get("attention_bias") or (family == "qwen2" and name != "o"):
                found[f"{at}.self_attn.{name}_proj.bias"] = 0.3 * rng.normal(size=size[0])
        sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
        for name, size in sizes.items():
            found[f"{at}.mlp.{name}_proj.weight"] = 0.3 * rng.normal(size=size)
            if config.get("mlp_bias"):
                found[f"{at}.mlp.{name}_proj.bias"] = 0.3 * rng.normal(size=size[0])
        norms = ["input_layernorm", "post_attention_layernorm"]
        if family == "gemma3_text":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        found |= {f"{at}.{name}.weight": norm(width) for name in norms}
        if family in ("qwen3", "gemma3_text"):
            found[f"{at}.self_attn.q_norm.weight"] = norm(d)
            found[f"{at}.self_attn.k_norm.weight"] = norm(d)
    found["model.norm.weight"] = norm(width)
    if not config.get("tie_word_embeddings", gemma):
        found["lm_head.weight"] = 0.3 * rng.normal(size=(config["vocab_size"], width))
    return {name: x.astype(np.float32) for name, x in found.items()}


def _gpt2_weights(config, rng):
    width = config["n_embd"]
    found = {"wte.weight": rng.normal(size=(config["vocab_size"], width))}
    found["wpe.weight"] = rng.normal(size=(config["n_positions"], width))
    norms = ["ln_f"]
    for i in range(config["n_layer"]):
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
        sizes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        sizes |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
        for name, size in sizes.items():
            found[f"h.{i}.{name}.weight"] = 0.3 * rng.normal(size=size)
            found[f"h.{i}.{name}.bias"] = 0.3 * rng.normal(size=size[1])
        found[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 8, 8)))  # what old files keep
    for name in norms:
        found[f"{name}.weight"] = 1 + 0.3 * rng.normal(size=width)
        found[f"{name}.bias"] = 0.3 * rng.normal(size=width)
    return {f"transformer.{name}": x.astype(np.float32) for name, x in found.items()}


def logits(config, w, tokens):
    """Return float64 ``[length, vocabulary]`` of one row of tokens."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    return _gpt2(config, w, tokens) if config["model_type"] == "gpt2" else _llama(config, w, tokens)


def _softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _attend(q, k, v, scale, window):
    """Return what each position of one head sees: loops over positions."""
    out = []
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        shares = _softmax(scale * (k[first : t + 1] @ q[t]))
        out.append(shares @ v[first : t + 1])
    return np.array(out)


def _turned(x, theta, how):
    """Turn each position's features; frequencies as Llama 3.1's, divided, or plain."""
    half = x.shape[1] // 2
    out = np.empty_like(x)
    for i in range(half):
        frequency = theta ** (-2 * i / (2 * half))
        if how.get("rope_type") == "linear":
            frequency /= how["factor"]
        if how.get("rope_type") == "llama3":
            length = how["original_max_position_embeddings"]
            wavelength = 2 * math.pi / frequency
            low, high = length / how["low_freq_factor"], length / how["high_freq_factor"]
            if wavelength > low:
                frequency /= how["factor"]
            elif wavelength > high:
                part = (length / wavelength - how["low_freq_factor"]) / (
                    how["high_freq_factor"] - how["low_freq_factor"]
                )
                frequency = (1 - part) * frequency / how["factor"] + part * frequency
        for t in range(len(x)):
            c, s = math.cos(t * frequency), math.sin(t * frequency)
            a, b = x[t, i], x[t, i + half]
            out[t, i], out[t, i + half] = a * c - b * s, b * c + a * s
    return out


def _llama(config, w, tokens):
    family = config["model_type"]
    gemma = family.startswith("gemma")
    heads = config["num_attention_heads"]
    kv = config.get("num_key_value_heads", heads)
    width = config["hidden_size"]
    d = config.get("head_dim") or width // heads
    scale = config.get("query_pre_attn_scalar", d) ** -0.5
    how = config.get("rope_scaling") or {}

    def norm(x, name):
        mean = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(mean + config["rms_norm_eps"]) * (w[name] + (1.0 if gemma else 0.0))

    def product(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    x = w["model.embed_tokens.weight"][tokens]
    if gemma:
        x = x * math.sqrt(width)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        window = config.get("sliding_window") if _slides(config, i) else None
        theta = config["rope_theta"]
        scaling = how
        if family == "gemma3_text" and window is not None:
            theta, scaling = config["rope_local_base_freq"], {}
        y = norm(x, f"{at}.input_layernorm.weight")
        q = product(y, f"{at}.self_attn.q_proj").reshape(-1, heads, d)
        k = product(y, f"{at}.self_attn.k_proj").reshape(-1, kv, d)
        v = product(y, f"{at}.self_attn.v_proj").reshape(-1, kv, d)
        if f"{at}.self_attn.q_norm.weight" in w:
            q = norm(q, f"{at}.self_attn.q_norm.weight")
            k = norm(k, f"{at}.self_attn.k_norm.weight")
        seen = []
        for h in range(heads):
            g = h // (heads // kv)
            turned = _turned(q[:, h], theta, scaling), _turned(k[:, g], theta, scaling)
            seen.append(_attend(*turned, v[:, g], scale, window))
        y = product(np.concatenate(seen, -1), f"{at}.self_attn.o_proj")
        if family == "gemma3_text":
            x = x + norm(y, f"{at}.post_attention_layernorm.weight")
            y = norm(x, f"{at}.pre_feedforward_layernorm.weight")
        else:
            x = x + y
            y = norm(x, f"{at}.post_attention_layernorm.weight")
        gate = product(y, f"{at}.mlp.gate_proj")
        active = _gelu(gate) if gemma else gate / (1 + np.exp(-gate))
        y = product(active * product(y, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        if family == "gemma3_text":
            y = norm(y, f"{at}.post_feedforward_layernorm.weight")
        x = x + y
    return norm(x, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def _slides(config, i):
    family = config["model_type"]
    if family == "mistral":
        return config.get("sliding_window") is not None
    if family == "qwen2":
        return bool(config.get("use_sliding_window")) and i >= config["max_window_layers"]
    if family == "gemma3_text":
        return (i + 1) % config["sliding_window_pattern"] != 0
    return False


def _gpt2(config, w, tokens):
    w = {name.removeprefix("transformer."): x for name, x in w.items()}
    heads = config["n_head"]
    d = config["n_embd"] // heads

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def product(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for i in range(config["n_layer"]):
        q, k, v = np.split(product(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        parts = [slice(h * d, (h + 1) * d) for h in range(heads)]
        seen = [_attend(q[:, p], k[:, p], v[:, p], d**-0.5, None) for p in parts]
        x = x + product(np.concatenate(seen, -1), f"h.{i}.attn.c_proj")
        hidden = _gelu(product(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
        x = x + product(hidden, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T
