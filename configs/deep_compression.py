"""Deep Compression of LeNet-300-100: prune, then share weights through a trained codebook.

compress-jax run configs/deep_compression.py

NUMBERS
"""

import jax
import optax

import compress_jax as cj
from compress_jax.data import load, random_crop_flip
from compress_jax.models import LeNet5, LeNet300100
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training


def config(
    data: str = "fashion_mnist",
    epochs: int = 30,
    teacher_epochs: int = 10,
    candidate_epochs: int = 30,
    sparsity: tuple[float, ...] = (0.88, 0.90),
    clusters: int = 16,
    temperature: float = 4.0,
    max_drop: float = 0.002,
    min_ratio: float = 25.0,
    seed: int = 0,
) -> Experiment:
    """Prune LeNet-300-100 while it keeps its accuracy, and share its weights through codebooks in the last two fifths.

    The reference is LeNet-300-100 in float32 as it learns from the labels. The compressed network starts from it and also
    learns from a LeNet-5, whose answers make up for what pruning and sharing take away.

    Args:
      data: ``fashion_mnist`` or ``mnist``.
      epochs: passes over the training images for the float32 network.
      teacher_epochs: passes for the teacher, over shifted images, mirrored unless they are digits.
      candidate_epochs: passes under each compression.
      sparsity: shares of weights to prune, one candidate each, from mild to strong.
      clusters: values that the surviving weights of one layer share.
      temperature: of the teacher's probabilities.
      max_drop: validation accuracy that may be lost below the float32 network's; 0.002 is a fifth of a point.
      min_ratio: how many times smaller than float32 the artifact must be.
      seed: of everything random.
    """
    images = load(data)

    def training(epochs: int, batch_size: int, shift: int | None = None) -> Training:
        def moved(key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return {**batch, "image": random_crop_flip(key, batch["image"], shift or 0, flip=data == "fashion_mnist")}

        steps = epochs * (len(images.train["label"]) // batch_size)
        weights = optax.adamw(optax.cosine_onecycle_schedule(steps, 2e-3, pct_start=0.1), weight_decay=1e-4)
        augment = None if shift is None else moved
        return Training(weights, steps, batch_size, augment, learned=optax.adam(1e-4), save_every=2000)

    def candidate(share: float) -> Candidate:
        train = training(candidate_epochs, batch_size=256)
        ramp = cj.prune.cubic(share, begin=0, end=train.steps * 2 // 5)
        prune = cj.every(max(train.steps // 200, 1), cj.prune.magnitude(ramp, scope="global"))
        share_weights = cj.between(train.steps * 3 // 5, None, cj.cluster.kmeans(clusters))
        compression = cj.at("**/kernel", cj.chain(prune, share_weights))
        return Candidate(f"prune-{100 * share:g}-share-{clusters}", compression, train)

    return Experiment(
        name="deep_compression",
        data=images,
        student=Network(LeNet300100(), training(epochs, batch_size=128)),
        teacher=Network(LeNet5(features=(20, 50), hidden=(500,)), training(teacher_epochs, batch_size=128, shift=1)),
        float32_student="labels",
        loss=cj.distill.hinton(alpha=0.1, temperature=temperature),
        candidates=tuple(candidate(share) for share in sparsity),
        requirement=Requirement(max_drop=max_drop, min_ratio=min_ratio, reference="student"),
        order="mild_first",
        seed=seed,
    )
