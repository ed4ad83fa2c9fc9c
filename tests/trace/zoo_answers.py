"""What is known by hand of the models in `zoo_linen` and `zoo_nnx`: every contraction."""

from tests.trace.zoo_entry import Answer, answer

ROWS, BATCH, WORDS = 3, 2, 9  # of the zoo's vectors, of its images and texts, and words in a text
TOKENS = BATCH * WORDS
HEAD_BIAS = "bias, one row for each head"


def mlp() -> Answer:
    return answer(
        {
            "dense_0/kernel": ROWS * 12 * 20,
            "dense_1/kernel": ROWS * 20 * 28,
            "dense_2/kernel": ROWS * 28 * 10,
        }
    )


def lenet() -> Answer:
    convs = {"conv_0/kernel": 16**2 * 5**2 * 3 * 6, "conv_1/kernel": 4**2 * 5**2 * 6 * 11}
    dense = {"dense_0/kernel": 2 * 2 * 11 * 21, "dense_1/kernel": 21 * 17, "head/kernel": 17 * 10}
    return answer({path: BATCH * macs for path, macs in (convs | dense).items()})


def resnet() -> Answer:
    layers = {
        "stem/conv/kernel": 16**2 * 3**2 * 3 * 8,
        "block_0/first/conv/kernel": 16**2 * 3**2 * 8 * 8,
        "block_0/second/conv/kernel": 16**2 * 3**2 * 8 * 8,
        "block_1/first/conv/kernel": 8**2 * 3**2 * 8 * 12,
        "block_1/second/conv/kernel": 8**2 * 3**2 * 12 * 12,
        "block_1/shortcut/conv/kernel": 8**2 * 8 * 12,
        "head/kernel": 12 * 10,
    }
    return answer({path: BATCH * macs for path, macs in layers.items()})


def vit(
    batch: int = BATCH,
    image: int = 16,
    patch: int = 4,
    width: int = 16,
    hidden: int = 28,
    layers: int = 2,
    classes: int = 10,
) -> Answer:
    """The number of heads changes no count: together they have ``width`` products per pair."""
    patches = (image // patch) ** 2
    tokens = patches + 1
    macs = {"patches/kernel": patches * patch**2 * 3 * width, "head/kernel": width * classes}
    macs |= {
        f"block_{i}/{name}/kernel": tokens * width * hidden
        for i in range(layers)
        for name in ("up", "down")
    }
    blocks = [f"block_{i}/attention" for i in range(layers)]
    macs |= {
        f"{b}/{name}/kernel": tokens * width**2
        for b in blocks
        for name in ("query", "key", "value", "out")
    }
    uncontracted = {"first": "the class token", "positions": "added"}
    uncontracted |= {
        f"{b}/{name}/bias": HEAD_BIAS for b in blocks for name in ("query", "key", "value")
    }
    macs = {path: batch * each for path, each in macs.items()}
    return answer(
        macs, anonymous=[batch * tokens**2 * width] * 2 * layers, uncontracted=uncontracted
    )


def llama() -> Answer:
    layer = {
        "q": 16 * 16,
        "k": 16 * 8,
        "v": 16 * 8,
        "out": 16 * 16,
        "gate": 16 * 20,
        "up": 16 * 20,
        "down": 20 * 16,
    }
    scales = {
        f"layers/{name}/scale": "of a norm, stacked over layers"
        for name in ("attention_norm", "mlp_norm")
    }
    return answer(
        {"head/kernel": TOKENS * 16 * 23},
        {f"layers/{name}/kernel": TOKENS * size for name, size in layer.items()},
        loops=3,
        anonymous=[TOKENS * WORDS * 16] * 2 * 3,
        uncontracted={"embed/embedding": "looked up only", **scales},
    )


def recurrent_linen() -> Answer:
    """Linen keeps a kernel for each gate; the LSTM joins them, the GRU does not."""
    into, back = (tuple(f"lstm/{side}{gate}/kernel" for gate in "ifgo") for side in "ih")
    macs = dict.fromkeys(into, 6 * 10) | dict.fromkeys(back, 10 * 10)
    macs |= {f"gru/i{gate}/kernel": 10 * 7 for gate in "rzn"} | {
        f"gru/h{gate}/kernel": 7 * 7 for gate in "rzn"
    }
    return _recurrent(macs, joined=(into, back))


def recurrent_nnx() -> Answer:
    """NNX keeps one kernel for all gates."""
    macs = {"lstm/cell/dense_i/kernel": 6 * 40, "lstm/cell/dense_h/kernel": 10 * 40}
    return _recurrent(
        macs | {"gru/cell/dense_i/kernel": 10 * 21, "gru/cell/dense_h/kernel": 7 * 21}
    )


def _recurrent(macs: dict[str, int], joined: tuple[tuple[str, ...], ...] = ()) -> Answer:
    return answer(
        {"head/kernel": BATCH * 7 * 5},
        {path: BATCH * each for path, each in macs.items()},
        loops=WORDS,
        uncontracted={"embed/embedding": "looked up only"},
        joined=joined,
    )


def moe() -> Answer:
    dense = {
        "stem/kernel": ROWS * 12 * 16,
        "router/kernel": ROWS * 16 * 4,
        "head/kernel": ROWS * 16 * 10,
    }
    experts = {"up": ROWS * 4 * 16 * 20, "down": ROWS * 4 * 20 * 16}
    return answer(dense | experts, anonymous=[ROWS * 4 * 16])


def mobilenet() -> Answer:
    layers = {"stem/conv/kernel": 8**2 * 3**2 * 3 * 8, "head/kernel": 12 * 10}
    for block, hidden, width, size in [("block_0", 24, 8, 8), ("block_1", 20, 12, 4)]:
        layers[f"{block}/expand/conv/kernel"] = 8**2 * 8 * hidden
        layers[f"{block}/depthwise/conv/kernel"] = size**2 * 3**2 * hidden
        layers[f"{block}/gate/squeeze/kernel"] = layers[f"{block}/gate/excite/kernel"] = hidden * 6
        layers[f"{block}/project/conv/kernel"] = size**2 * hidden * width
    return answer({path: BATCH * macs for path, macs in layers.items()})


def unet() -> Answer:
    """Stride 2, window 2x2, transposed: each input times each element of its kernel, once."""
    layers = {
        "down_0": 16**2 * 3**2 * 3 * 6,
        "down_1": 8**2 * 3**2 * 6 * 10,
        "bottom": 4**2 * 3**2 * 10 * 14,
        "up_1": 4**2 * 2**2 * 14 * 9,
        "mix_1": 8**2 * 3**2 * (10 + 9) * 11,
        "up_0": 8**2 * 2**2 * 11 * 7,
        "mix_0": 16**2 * 3**2 * (6 + 7) * 8,
        "head": 16**2 * 8 * 2,
    }
    return answer({f"{name}/kernel": BATCH * macs for name, macs in layers.items()})


def tied_lm() -> Answer:
    layer = {"qkv": 16 * 48, "out": 16 * 16, "up": 16 * 30, "down": 30 * 16}
    macs = {f"block/{name}/kernel": TOKENS * size for name, size in layer.items()}
    macs["embed/embedding"] = TOKENS * 16 * 23  # looked up too, which is no contraction
    return answer(macs, anonymous=[TOKENS * WORDS * 16] * 2, uncontracted={"positions": "added"})
