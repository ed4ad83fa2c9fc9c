"""SmolLM2 trained on Brown's training documents in float32: the float model of the studies here.

The file's weights lie on a 4-bit grid, so rounding to another grid is judged against a rounded
model. Some hundred steps of training leave that grid. The result is kept in ``runs/language``.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from texts import row

import compress_jax as cj
from compress_jax.core.types import ModelFn, Params

FOLDER = Path("runs/language")
RATE = 2e-5
LENGTH = 256


def tuned(fn: ModelFn, params: Params, tokens: np.ndarray, steps: int) -> Params:
    """Return params after so many steps of next-token training, from the file if it is there.

    Args:
      fn: ``(params, tokens [1, length]) -> logits``.
      params: where training begins; they are returned as they are for 0 steps.
      tokens: of the training documents.
      steps: of Adam on rows of 256 tokens that begin anywhere, seed 0.

    Returns:
      The params.
    """
    file = FOLDER / f"tuned-{steps}.safetensors"
    if not steps:
        return params
    if not file.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        cj.save(file, _trained(fn, params, _rows(tokens), steps))
    return cj.load(file)[0]


def _trained(fn: ModelFn, params: Params, rows: Iterator[np.ndarray], steps: int) -> Params:
    optimizer = optax.adam(optax.cosine_onecycle_schedule(steps, RATE))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Params, opt_state: optax.OptState, tokens: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        def loss(params: Params) -> jax.Array:
            logits = fn(params, tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    params = jax.tree.map(jnp.copy, params)  # donated: the caller's arrays stay
    opt_state = optimizer.init(params)
    for number, tokens in zip(range(1, steps + 1), rows, strict=False):
        params, opt_state, value = step(params, opt_state, jnp.asarray(tokens))
        print(f"float32 {number}/{steps} {float(value):.4f}", file=sys.stderr, flush=True)
    return params


def _rows(tokens: np.ndarray) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    while True:
        yield row(tokens, LENGTH, rng)
