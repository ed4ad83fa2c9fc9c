"""BiT's ResNet-152x2 teaches ResNet-50 by function matching, which is then pruned and in 8 bits.

compress-jax run configs/resnet152x2_resnet50.py --tfds imagenet2012 --teacher R152x2_T_224.npz
  --distributed
compress-jax plan configs/resnet152x2_resnet50.py --devices 256 --mesh data=256 --chip v5e

The recipe of Beyer et al., "Knowledge Distillation: A Good Teacher is Patient and Consistent", CVPR
2022, as big_vision publishes it (configs/proj/distill/bit_i1k.py): student and teacher see the same
crops, each mixed with another image by a share that is drawn uniformly, and the student follows the
teacher's answers alone, by the KL divergence at temperature 1, for very long. Both networks are
BiT's: group norms and standardized kernels. The optimizer is AdamW with big_vision's settings of
Adam; the paper's best numbers are with Shampoo, which is not here. Its weight decay of 0.0003 is
not multiplied by the learning rate of 0.03, and AdamW's is: hence 0.01.

Published for this pair at 224 pixels: the teacher 83.0 % of ImageNet's validation images, the
student 82.8 % (big_vision's table). The teacher's file is that of the same table,
gs://bit_models/distill/R152x2_T_224.npz; BiT-M-R152x2-ILSVRC2012.npz fits too.

An image costs 117 GFLOP: 92 for the teacher's answer, 25 for the student's step. 1,200 epochs are
1.8e20, that is 2.5 hours on a v5e-256 at 40 % of its peak: an estimate, as no such machine was at
hand. big_vision's 15 hours for 300 epochs on a v3-32 are the like of it. What was run is this
config on a CPU with images of 32 pixels (tests/test_imagenet_configs.py); what was planned is in
experiments/scaling/README.md. Without images they are blank, for plans only.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

import compress_jax as cj
from compress_jax.core.types import Batch, PyTree
from compress_jax.data import Data
from compress_jax.models import BiT, pretrained, standardized_kernels
from compress_jax.search import (
    Candidate,
    Experiment,
    Network,
    Requirement,
    Rewrite,
    Subject,
    Training,
)
from compress_jax.tasks import Task, pure

# Kernels [rows, columns, in, out].
RULES = (("block_*/*/kernel", PartitionSpec(None, None, None, "fsdp")),)


def config(
    images: str = "",
    tfds: str = "",
    teacher: str = "",
    size: int = 224,
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3),
    width: int = 64,
    teacher_blocks: tuple[int, int, int, int] = (3, 8, 36, 3),
    teacher_width: int = 128,
    teacher_epochs: float = 0.0,
    epochs: float = 1200.0,
    candidate_epochs: float = 60.0,
    batch_size: int = 4096,
    microbatches: int = 1,
    sparsity: float = 0.8,
    bits: int = 8,
    max_drop: float = 0.01,
    fsdp: int = 1,
    seed: int = 0,
) -> Experiment:
    """Compress a ResNet-50 that a ResNet-152x2 teaches.

    Args:
      images: folder of images by class.
      tfds: name of a data set of TFDS, where there is no folder.
      teacher: ``.npz`` file with BiT's weights; empty for random ones.
      size: height and width of the images.
      blocks: of the student's stages.
      width: channels of the student's first stage.
      teacher_blocks: of the teacher's stages.
      teacher_width: channels of the teacher's first stage.
      teacher_epochs: of fine-tuning the teacher with a new last layer, for classes of your own.
      epochs: of the float32 student.
      candidate_epochs: under each compression.
      batch_size: examples a step, over all devices.
      microbatches: parts of a batch that are computed one after the other, to need less memory.
      sparsity: share of zeros in the pruned student's kernels.
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

    large = BiT(teacher_blocks, teacher_width, classes, dtype=jnp.bfloat16)
    weights = None
    if teacher:
        drawn = jax.jit(large.init)(jax.random.key(seed), jnp.zeros((1, size, size, 3)))
        weights = published(teacher, drawn, teacher_epochs > 0)

    later = training(candidate_epochs, 3e-3)
    ramp = cj.prune.cubic(sparsity, begin=0, end=max(later.steps // 2, 1))
    small = cj.at("**/kernel", cj.quantize.uniform(bits, granularity="channel"))
    pruned = cj.chain(cj.at("block_*/**/kernel", cj.prune.magnitude(ramp)), small)
    student = BiT(blocks, width, classes, dtype=jnp.bfloat16)
    task = cj.tasks.classification(metrics=(cj.tasks.accuracy(), cj.tasks.accuracy(5)))
    return Experiment(
        name="resnet152x2-resnet50",
        data=data,
        task=task if classes > 5 else cj.tasks.classification(),
        teacher=Network(large, training(teacher_epochs, 3e-4), variables=weights, rules=RULES),
        teacher_dtype=jnp.bfloat16,
        student=Network(student, training(epochs, 0.03), rules=RULES),
        loss=task.distillation(alpha=0.0),
        candidates=(
            Candidate(f"int{bits}", small, later),
            Candidate(f"prune-{100 * sparsity:g}-int{bits}", (folded(student), pruned), later),
        ),
        requirement=Requirement(max_drop=max_drop, reference="student"),
        order="all",
        mesh=cj.train.make_mesh(fsdp=fsdp),
        longer_student=False,
        seed=seed,
    )


def folded(student: BiT) -> Rewrite:
    """Return a rewrite that stores standardized kernels, so that pruned weights stay zeros."""
    plain = pure(student.clone(standardize=False))

    def run(subject: Subject, task: Task, split: Batch) -> Subject:
        params = standardized_kernels(subject.variables["params"])
        record = {"rewrite": "fold_standardization"}
        return subject._replace(
            model=plain, variables={"params": params}, records=(*subject.records, record)
        )

    return Rewrite("fold_standardization", run, lambda model, record, example: plain)


def published(teacher: str, drawn: PyTree, tuned: bool) -> PyTree:
    """Return the teacher's weights of a file; with a head of its own if it is tuned."""
    fresh, ignore = ("params/head/*", ("head.*",)) if tuned else ((), ())
    return pretrained.bit(drawn, pretrained.read(teacher), ignore=ignore, fresh=fresh)


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
    warmup = min(5_000, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, 1))

    def kernels(params: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.01, mask=kernels, mu_dtype=jnp.bfloat16),
    )
