"""Lottery tickets on UCI digits.

LeNet-300-100 by iterative magnitude pruning with rewinding, beside its controls.

compress-jax run configs/lottery.py
compress-jax run configs/lottery.py --rounds 5 --seed 1

Every network ends equally sparse, in its three kernels; all begin from fresh weights, so the
float32 student is only what they are held against. A ticket is pruned by a share after each round,
and its weights go back to what they were after ``rewind_to`` steps. The controls: the same rounds
with only the learning rate going back, and masks drawn by lot from the start. Validation accuracy
is in the table of the run; the test split is measured for the student and the chosen network.
"""

import jax
import jax.numpy as jnp
import optax

import compress_jax as cj
from compress_jax.data import load, random_crop_flip
from compress_jax.models import LeNet300100
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training


def config(
    share: float = 0.5,
    rounds: int = 4,
    round_steps: int = 500,
    rewind_to: int = 20,
    max_drop: float = 0.01,
    seed: int = 0,
) -> Experiment:
    """Find winning tickets in LeNet-300-100 for 8x8 digits.

    Args:
      share: of the weights that are left, pruned at the end of each round.
      rounds: how often; at the defaults 93.75 % are pruned in the end.
      round_steps: training steps of a round, and of the float32 student.
      rewind_to: after how many steps the weights are saved that rounds go back to; 0 for the
        initial weights.
      max_drop: validation accuracy that may be lost below the student's; 0.01 is one point.
      seed: seed for all randomness.
    """
    data, model, steps = load("digits"), LeNet300100(), (rounds + 1) * round_steps
    black = jnp.asarray(-data.mean / data.std)
    fresh = jax.jit(model.init)(
        jax.random.fold_in(jax.random.key(seed), 1), data.train["image"][:1]
    )["params"]
    sparsity = 1 - (1 - share) ** rounds

    def augment(key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            **batch,
            "image": random_crop_flip(key, batch["image"], pad=1, fill=black, flip=False),
        }

    def training(optimizer: optax.GradientTransformation, steps: int) -> Training:
        return Training(optimizer, steps, 64, augment)

    adam = optax.adam(optax.cosine_decay_schedule(3e-3, round_steps + rewind_to))
    magnitude = cj.prune.magnitude(cj.prune.rounds(share, round_steps))
    tickets = cj.at("**/kernel", cj.every(round_steps, cj.prune.nested(magnitude)))
    by_lot = cj.at("**/kernel", cj.prune.random(sparsity, jax.random.key(seed)))

    def rewound(weights: bool) -> Training:
        return training(
            cj.prune.rewinding(adam, round_steps, rewind_to, weights=weights, start=fresh), steps
        )

    return Experiment(
        name="lottery",
        data=data,
        student=Network(model, training(adam, round_steps)),
        candidates=(
            Candidate("ticket", tickets, rewound(weights=True)),
            Candidate("learning-rate-rewinding", tickets, rewound(weights=False)),
            Candidate(
                "random-ticket",
                by_lot,
                training(cj.prune.rewinding(adam, start=fresh), round_steps),
            ),
        ),
        requirement=Requirement(max_drop=max_drop, reference="student"),
        order="all",
        seed=seed,
    )
