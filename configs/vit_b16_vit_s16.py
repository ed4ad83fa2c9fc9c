"""ViT-B/16 teaches ViT-S/16, which is then sparse and in 8 bits: ImageNet on a TPU pod.

compress-jax run configs/vit_b16_vit_s16.py --tfds imagenet2012 --teacher model.safetensors
  --distributed
compress-jax plan configs/vit_b16_vit_s16.py --devices 64 --mesh data=32,fsdp=2 --chip v5e

``--images FOLDER`` in place of --tfds: train/ and test/ with a folder for each class, n01440764 and
so on. The teacher's weights are a file of Hugging Face's google/vit-base-patch16-224, or of timm's
vit_base_patch16_224. Student and teacher see the same crops, flipped and mixed, and the student
follows the teacher's answers alone ("function matching" of Beyer et al., CVPR 2022); the optimizer
is that of Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022.

Published, to compare with: this student has 79.9 % of ImageNet's validation images right after 300
epochs on labels, and 81.2 % taught by a RegNetY-16GF (DeiT-small, in its repository). No number is
known to us for this pair of networks.

An image costs 63 GFLOP: 35 for the teacher's answer, 28 for the student's step. 300 epochs are
2.4e19, that is 1.3 hours on a v5e-64 at 40 % of its peak, and 0.1 more for each candidate of 30:
an estimate, as no such machine was at hand, and 80,000 images a second must be decoded to keep up.
What was run is this config on a CPU with images of 32 pixels (tests/test_imagenet_configs.py); what
was planned is in experiments/scaling/README.md. Without images they are blank, for plans only.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

import compress_jax as cj
from compress_jax.core.types import PyTree
from compress_jax.data import Data
from compress_jax.models import ViT, pretrained
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training

RULES = (("layer_*/**/kernel", PartitionSpec("fsdp", None)),)


def config(
    images: str = "",
    tfds: str = "",
    teacher: str = "",
    size: int = 224,
    width: int = 384,
    depth: int = 12,
    teacher_width: int = 768,
    teacher_depth: int = 12,
    teacher_epochs: float = 0.0,
    epochs: float = 300.0,
    candidate_epochs: float = 30.0,
    batch_size: int = 1024,
    microbatches: int = 1,
    sparsity: float = 0.5,
    bits: int = 8,
    max_drop: float = 0.01,
    fsdp: int = 1,
    seed: int = 0,
) -> Experiment:
    """Compress a ViT-S/16 that a ViT-B/16 teaches.

    Args:
      images: folder of images by class.
      tfds: name of a data set of TFDS, where there is no folder.
      teacher: safetensors file with the weights of a ViT-B/16; empty for random ones.
      size: height and width of the images; the published weights want 224.
      width: of the student; it has 64 units a head.
      depth: layers of the student.
      teacher_width: of the teacher.
      teacher_depth: layers of the teacher.
      teacher_epochs: of fine-tuning the teacher with a new last layer, for classes of your own.
      epochs: of the float32 student.
      candidate_epochs: under each compression.
      batch_size: examples a step, over all devices.
      microbatches: parts of a batch that are computed one after the other, to need less memory.
      sparsity: share of zeros in the pruned student's layers.
      bits: of the weights that are left.
      max_drop: accuracy on validation data that may be lost below the student's; 0.01 is one point.
      fsdp: parts that params and moments are divided into; batches are divided over all devices.
      seed: seed for all randomness.
    """
    data = photos(images, tfds, size, batch_size)
    classes = data.classes or len(data.names)

    mixed = cj.data.mixup(classes, partner="next")

    def training(epochs: float, peak: float) -> Training:
        steps = round(epochs * len(data.train["image"]) / batch_size)
        steps = max(steps, 1) if epochs else 0
        return Training(optimizer(steps, peak), steps, batch_size, mixed, microbatches=microbatches)

    large = network(classes, teacher_width, teacher_depth)
    weights = None
    if teacher:
        drawn = jax.jit(large.init)(jax.random.key(seed), jnp.zeros((1, size, size, 3)))
        weights = published(teacher, drawn, teacher_epochs > 0)
    halved = cj.at("layer_*/**/kernel", cj.prune.magnitude(None, cj.prune.n_m(2, 4)))
    later = training(candidate_epochs, 1e-4)
    ramp = cj.prune.cubic(sparsity, begin=0, end=max(later.steps // 2, 1))
    pruned = cj.at("layer_*/**/kernel", cj.prune.magnitude(ramp))
    small = cj.at("**/kernel", cj.quantize.uniform(bits, granularity="channel"))
    task = cj.tasks.classification(metrics=(cj.tasks.accuracy(), cj.tasks.accuracy(5)))
    return Experiment(
        name="vit-b16-vit-s16",
        data=data,
        task=task if classes > 5 else cj.tasks.classification(),
        teacher=Network(large, training(teacher_epochs, 1e-4), variables=weights, rules=RULES),
        teacher_dtype=jnp.bfloat16,
        student=Network(network(classes, width, depth), training(epochs, 1e-3), rules=RULES),
        loss=task.distillation(alpha=0.0),
        candidates=(
            Candidate(f"int{bits}", small, later),
            Candidate(f"2-of-4-int{bits}", cj.chain(halved, small), later),
            Candidate(f"prune-{100 * sparsity:g}-int{bits}", cj.chain(pruned, small), later),
        ),
        requirement=Requirement(max_drop=max_drop, reference="student"),
        order="all",
        mesh=cj.train.make_mesh(fsdp=fsdp),
        longer_student=False,
        seed=seed,
    )


def network(classes: int, width: int, depth: int) -> ViT:
    """Return a ViT with patches of 16 pixels and heads of 64 channels."""
    heads = max(width // 64, 1)
    return ViT(classes, 16, width, depth, heads, pool="token", gelu="exact", dtype=jnp.bfloat16)


def published(teacher: str, drawn: PyTree, tuned: bool) -> PyTree:
    """Return the teacher's weights of a file; with a head of its own if it is tuned."""
    fresh = "params/head/*" if tuned else ()
    ignore = ("classifier.*", "pooler.*") if tuned else ("pooler.*",)
    return pretrained.vit(drawn, pretrained.read(teacher), ignore=ignore, fresh=fresh)


def photos(images: str, tfds: str, size: int, batch_size: int) -> Data:
    """Return crops with pixels from -1 to 1, as the published teacher wants them."""
    if not images and not tfds:
        return cj.data.blank_images(batch_size, size)
    half = (0.5, 0.5, 0.5)
    return cj.data.images_on_disk(
        images or tfds, size=size, mean=half, std=half, area=(0.05, 1.0), fraction=0.02
    )


def optimizer(steps: int, peak: float) -> optax.GradientTransformation:
    """Return AdamW of kernels, with gradients of norm 1 or less, a warm-up and a cosine."""
    warmup = min(10_000, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, 1))

    def kernels(params: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=kernels)
    )
