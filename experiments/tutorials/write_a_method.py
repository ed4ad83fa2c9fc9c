# %% [markdown]
# # Write your own method
#
# A `Compression` is four pure functions: `init`, `view`, `update`, `pack`. `cj.leafwise` lifts
# functions over one array to a Compression over a tree, so that your file holds only mathematics.
#
# The example is a quantizer to powers of two: every weight becomes `0` or `+-2^e` with `e` among
# the `levels` largest exponents of its leaf.

# %%
import jax
import jax.numpy as jnp

import compress_jax as cj


def powers_of_two(levels: int) -> cj.Compression:
    """Round weights to zero or a signed power of two."""

    def init(x, key):
        # The largest exponent is the state; it is not learned, so it goes into the fixed half.
        largest = jnp.round(jnp.log2(jnp.maximum(jnp.abs(x).max(), 1e-30)))
        return None, {"exponent": largest}

    def nearest(x, exponent):
        magnitude = jnp.abs(x)
        lowest = exponent - levels + 1
        e = jnp.clip(jnp.round(jnp.log2(jnp.maximum(magnitude, 1e-30))), lowest, exponent)
        small = magnitude < 2.0 ** (lowest - 1)
        return jnp.where(small, 0.0, jnp.sign(x) * 2.0**e).astype(x.dtype)

    def view(x, learned, fixed):
        # The gradient passes as if nothing were rounded.
        return cj.straight_through(nearest)(x, fixed["exponent"])

    return cj.leafwise(view, init=init, call=f"powers_of_two({levels})")


# %% [markdown]
# It is used like every other one: on chosen leaves, in a chain, in a training step.

# %%
params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (8, 4)), "bias": jnp.zeros(4)}}
compression = cj.at("**/kernel", powers_of_two(4))
state = compression.init(params)
view = compression.view(params, state)
print(view["dense"]["kernel"])

pruned = cj.at("**/kernel", cj.chain(cj.prune.magnitude(0.5), powers_of_two(4)))
print(cj.coverage(pruned, params))

# %% [markdown]
# ## The laws
#
# The contract in `tests/test_contract.py` checks them for every method of the library. Add a row
# there for yours; here are three of them by hand.

# %%
again = compression.view(view, compression.init(view))
assert jnp.array_equal(view["dense"]["kernel"], again["dense"]["kernel"]), "a view is idempotent"

packed = compression.pack(params, state)
assert jnp.array_equal(cj.unpack(packed)["dense"]["kernel"], view["dense"]["kernel"]), (
    "train = ship"
)

gradient = jax.grad(lambda p: compression.view(p, state)["dense"]["kernel"].sum())(params)
assert jnp.array_equal(gradient["dense"]["kernel"], jnp.ones((8, 4))), "straight through"
print("three laws hold")

# %% [markdown]
# ## One layer at a time
#
# A leaf may hold several layers, as `nn.scan` makes them. Bound to the function, your method is
# called on one layer and vectorized over all: each layer gets its own exponent, with no code of
# yours.

# %%
stack = {"kernel": jnp.stack([jnp.eye(4) * 0.01, jnp.eye(4) * 3.0])}


def fn(params, x):
    """Apply two layers."""
    return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, params["kernel"])[0]


method = powers_of_two(4)
bound = cj.bind(method, fn, stack, jnp.ones((1, 4)))
print("unbound, one exponent:", method.init(stack).fixed["kernel"]["exponent"])
print("bound, one a layer:   ", bound.init(stack).fixed["kernel"]["exponent"])
print("first layer, unbound: ", method.view(stack, method.init(stack))["kernel"][0, 0, 0])
print("first layer, bound:   ", bound.view(stack, bound.init(stack))["kernel"][0, 0, 0])
