"""Deep Compression of LeNet-300-100: prune, then share weights through a trained codebook.

compress-jax run configs/deep_compression.py
"""

import optax

import compress_jax as cj
from compress_jax.data import load
from compress_jax.models import LeNet300100
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training


def config(
    data: str = "fashion_mnist",
    epochs: int = 30,
    candidate_epochs: int = 30,
    sparsity: tuple[float, ...] = (0.90, 0.92, 0.94),
    clusters: int = 32,
    temperature: float = 4.0,
    max_drop: float = 0.001,
    min_ratio: float = 25.0,
    seed: int = 0,
) -> Experiment:
    """Prune LeNet-300-100 ever more while it keeps its accuracy, its weights shared through a codebook in the last part.

    The compressed network learns from labels and from its own float32 self (no other teacher), which keeps it from
    fitting the training images more closely the longer it is trained.

    Args:
      data: ``fashion_mnist`` or ``mnist``.
      epochs: passes over the training images for the float32 network.
      candidate_epochs: passes under each compression.
      sparsity: shares of weights to prune, one candidate each, from mild to strong.
      clusters: values that the surviving weights of one layer share.
      temperature: of the float32 network's probabilities.
      max_drop: validation accuracy that may be lost below the float32 network's; 0.001 is a tenth of a point.
      min_ratio: how many times smaller than float32 the artifact must be.
      seed: of everything random.
    """
    images = load(data)

    def training(epochs: int, peak: float, batch_size: int) -> Training:
        steps = epochs * (len(images.train["label"]) // batch_size)
        weights = optax.adamw(optax.cosine_onecycle_schedule(steps, peak, pct_start=0.1), weight_decay=1e-4)
        return Training(weights, steps, batch_size, learned=optax.adam(1e-4), save_every=2000)

    def candidate(share: float) -> Candidate:
        retraining = training(candidate_epochs, 2e-3, batch_size=512)
        ramp = cj.prune.cubic(share, begin=0, end=int(0.4 * retraining.steps))
        prune = cj.every(20, cj.prune.magnitude(ramp, scope="global"))
        share_weights = cj.between(int(0.6 * retraining.steps), None, cj.cluster.kmeans(clusters))
        compression = cj.at("**/kernel", cj.chain(prune, share_weights))
        return Candidate(f"prune-{100 * share:g}-share-{clusters}", compression, retraining)

    return Experiment(
        name="deep_compression",
        data=images,
        student=Network(LeNet300100(), training(epochs, 2e-3, batch_size=128)),
        teacher="student",
        loss=cj.distill.hinton(alpha=0.1, temperature=temperature),
        candidates=tuple(candidate(share) for share in sparsity),
        requirement=Requirement(max_drop=max_drop, min_ratio=min_ratio),
        order="mild_first",
        seed=seed,
    )
