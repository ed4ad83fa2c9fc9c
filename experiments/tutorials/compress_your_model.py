# %% [markdown]
# # Compress your own model
#
# Any JAX function `fn(params, x)` can be compressed: Flax Linen, Flax NNX, Equinox, Haiku or plain
# JAX. This tutorial takes a small plain-JAX classifier, so that nothing is hidden.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import compress_jax as cj

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.25, random_state=0)


def init(key):
    """Return the params of a perceptron with two hidden layers, 64 -> 128 -> 128 -> 10."""
    params = {}
    for i, (n_in, n_out) in enumerate([(64, 128), (128, 128), (128, 10)]):
        key, own = jax.random.split(key)
        kernel = jax.random.normal(own, (n_in, n_out)) * (2 / n_in) ** 0.5
        params[f"dense_{i}"] = {"kernel": kernel, "bias": jnp.zeros(n_out)}
    return params


def fn(params, x):
    """Return the logits [batch, 10]."""
    for i in range(2):
        x = jax.nn.relu(x @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"]["bias"])
    return x @ params["dense_2"]["kernel"] + params["dense_2"]["bias"]


def accuracy(fn, params):
    """Return the accuracy on the test images."""
    return float((fn(params, test_x).argmax(-1) == test_y).mean())


# %% [markdown]
# Train it. This is an ordinary loop: the library is not involved yet.

# %%
optimizer = optax.adam(3e-3)


@jax.jit
def train_step(params, opt_state):
    """Return params and optimizer state after one step on all training images."""

    def loss(params):
        logits = fn(params, train_x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, train_y).mean()

    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state


params = init(jax.random.key(0))
opt_state = optimizer.init(params)
for _ in range(150):
    params, opt_state = train_step(params, opt_state)
print(f"float32: accuracy {accuracy(fn, params):.3f}, {cj.nbytes(params):,} bytes")

# %% [markdown]
# ## See inside
#
# The library traces the function. It finds every product, the parameter that feeds it, and what
# each axis of that parameter is for.

# %%
for site in cj.trace.sites(fn, params, train_x[:1]):
    print(site.name, site.lhs_shape, site.rhs_shape, f"{site.macs:,} multiply-adds")
print(cj.trace.cost(fn, params, train_x[:1]))

# %% [markdown]
# ## Quantize
#
# A compression is a differentiable view of the params plus a state. `bind` reads the layout of each
# leaf from the function; `coverage` lists what happens to every leaf, and why.

# %%
int4 = cj.at("**/kernel", cj.quantize.uniform(bits=4, granularity="channel"))
int4 = cj.bind(int4, fn, params, train_x)
state = int4.init(params)
print(cj.coverage(int4, params, state))
print(f"4 bits, rounded to nearest: accuracy {accuracy(fn, int4.view(params, state)):.3f}")

# %% [markdown]
# GPTQ chooses the roundings by the layers' outputs on calibration data. Here at 2 bits, where it
# matters.

# %%
int2 = cj.at("**/kernel", cj.quantize.uniform(bits=2, granularity="channel", scale="mse"))
gram = cj.trace.calibrate(fn, cj.trace.gram(), params, [train_x])
solved = cj.quantize.gptq(params, gram, int2)
nearest = cj.bind(int2, fn, params, train_x)
print(f"2 bits, nearest: {accuracy(fn, nearest.view(params, nearest.init(params))):.3f}")
print(f"2 bits, GPTQ:    {accuracy(fn, solved.compression.view(solved.params, solved.state)):.3f}")

# %% [markdown]
# ## Remove channels
#
# `shrink` removes whole channels and returns a smaller function: no mask, no special kernel.

# %%
shrunk = cj.prune.shrink(fn, params, train_x[:1], ratio=0.5)
print(shrunk.table)
print(f"half of the channels, not fine-tuned: {accuracy(shrunk.fn, shrunk.params):.3f}")

# %% [markdown]
# ## Ship
#
# What is packed equals the view bit for bit, and the file is as small as it says.

# %%
packed = int4.pack(params, state)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.safetensors"
    written = cj.save(path, packed, {"model": "perceptron"})
    loaded, metadata = cj.load(path)
exact = all(
    jax.tree.leaves(
        jax.tree.map(lambda a, b: bool((a == b).all()), cj.unpack(loaded), int4.view(params, state))
    )
)
print(f"{written:,} bytes on disk, equal to what was evaluated: {exact}")
