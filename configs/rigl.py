"""RigL on UCI digits: LeNet-300-100 trained sparse from the start.

Beside SET, a static mask and pruning while it trains.

compress-jax run configs/rigl.py
compress-jax run configs/rigl.py --sparsity 0.98 --seed 1

Kernels are pruned to the same total, spread over layers by Erdos-Renyi-kernel; every network trains
for the same steps from the same fresh weights, so the float32 student is only what they are held
against. Validation accuracy is in the table of the run; the test split is measured for the student
and the chosen network.
"""

import jax
import jax.numpy as jnp
import optax

import compress_jax as cj
from compress_jax.core.paths import flatten
from compress_jax.data import load, random_crop_flip
from compress_jax.models import LeNet300100
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training


def config(
    sparsity: float = 0.95,
    steps: int = 2000,
    every: int = 50,
    drop: float = 0.3,
    max_drop: float = 0.01,
    seed: int = 0,
) -> Experiment:
    """Train LeNet-300-100 for 8x8 digits sparse from the start.

    Args:
      sparsity: share of all kernels' weights that are zero.
      steps: training steps of every network.
      every: steps between two rewirings.
      drop: share of a layer's weights that the first rewiring replaces; it falls by a cosine.
      max_drop: validation accuracy that may be lost below the student's; 0.01 is one point.
      seed: seed for all randomness.
    """
    data, model, key = load("digits"), LeNet300100(), jax.random.key(seed)
    black = jnp.asarray(-data.mean / data.std)
    fresh = jax.jit(model.init)(jax.random.fold_in(key, 1), data.train["image"][:1])["params"]
    shares = cj.prune.erk(
        {path: x for path, x in flatten(fresh)[0].items() if path.endswith("kernel")}, sparsity
    )

    def augment(key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            **batch,
            "image": random_crop_flip(key, batch["image"], pad=1, fill=black, flip=False),
        }

    adam = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    training = Training(cj.prune.rewinding(adam, start=fresh), steps, 64, augment)
    ramp = cj.prune.cubic(sparsity, begin=0, end=steps // 2)

    def candidate(name: str, compression: cj.Compression) -> Candidate:
        return Candidate(name, cj.at("**/kernel", compression), training)

    return Experiment(
        name="rigl",
        data=data,
        student=Network(model, Training(adam, steps, 64, augment)),
        candidates=(
            candidate("rigl", cj.prune.rigl(shares, steps, key, every=every, drop=drop)),
            candidate("set", cj.prune.sparse_evolution(shares, steps, key, every=every, drop=drop)),
            candidate("static", cj.prune.random(shares, key)),
            candidate("gradual", cj.every(10, cj.prune.magnitude(ramp, scope="global"))),
        ),
        requirement=Requirement(max_drop=max_drop, reference="student"),
        order="all",
        seed=seed,
    )
