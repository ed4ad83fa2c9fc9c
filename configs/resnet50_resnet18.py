"""ResNet-50 teaches ResNet-18, which is then pruned and quantized: images of your own, or of TFDS.

    compress-jax run configs/resnet50_resnet18.py --images FOLDER --teacher resnet50.safetensors

FOLDER has a folder for each class, two or more, or train/ and test/ with such folders; ``--tfds
imagenet2012`` takes a data set of TFDS in its place. Images stay on disk, and each process decodes
those of its own devices; they are normalized as torchvision's networks want them, and training sees
crops of all sizes, flipped. The teacher starts from torchvision's weights, if their safetensors
file is given, and is fine-tuned on your classes, so that it really teaches; student and teacher see
the same images, and their logits are of the same classes.

A run needs a GPU or TPU; a CPU needs hours. On a CPU only data, teacher and student were run, with
90 images of 32 pixels and two steps each; that run was stopped before its candidates had ended.
Nothing was measured on real images, and the numbers of steps are guesses.
"""

import jax
import optax

import compress_jax as cj
from compress_jax.core.errors import ConfigError
from compress_jax.data import Data
from compress_jax.models import ImageNetResNet, pretrained
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training


def config(
    images: str = "",
    tfds: str = "",
    teacher: str = "",
    size: int = 224,
    teacher_steps: int = 2000,
    student_steps: int = 20000,
    candidate_steps: int = 5000,
    batch_size: int = 128,
    sparsity: float = 0.8,
    bits: int = 8,
    temperature: float = 4.0,
    max_drop: float = 0.01,
    seed: int = 0,
) -> Experiment:
    """Compress a ResNet-18 that a ResNet-50 teaches.

    Args:
      images: folder of images by class.
      tfds: name of a data set of TFDS, where there is no folder.
      teacher: safetensors file with torchvision's weights of ResNet-50; empty to train it from
        scratch.
      size: height and width that the folder's images are resized and cropped to.
      teacher_steps: steps of fine-tuning the teacher.
      student_steps: steps of the float32 student.
      candidate_steps: steps under each compression.
      batch_size: examples a step.
      sparsity: share of the pruned student's weights that are zero.
      bits: of the surviving weights.
      temperature: of the teacher's probabilities.
      max_drop: accuracy on validation data that may be lost below the student's; 0.01 is one point.
      seed: seed for all randomness.
    """
    if bool(images) == bool(tfds):
        raise ConfigError("give the images: --images FOLDER, or --tfds NAME")
    data = photos(images, tfds, size)
    classes = data.classes or len(data.names)
    large = ImageNetResNet(blocks=(3, 4, 6, 3), bottleneck=True, classes=classes)
    top = (cj.tasks.accuracy(top=5),) if classes > 5 else ()
    task = cj.tasks.classification(metrics=(cj.tasks.accuracy(), *top))

    def training(steps: int, peak: float) -> Training:
        schedule = optax.cosine_onecycle_schedule(steps, peak)
        return Training(optax.adamw(schedule, weight_decay=1e-4), steps, batch_size)

    weights = None
    if teacher:
        drawn = jax.jit(large.init)(jax.random.key(seed), data.train["image"][:1])
        published = pretrained.read(teacher)
        weights = pretrained.resnet(drawn, published, ignore=("fc.*",), fresh="params/head/*")

    prune = cj.prune.magnitude(cj.prune.cubic(sparsity, begin=0, end=candidate_steps // 2))
    quantize = cj.quantize.uniform(bits, granularity="channel")
    candidates = (
        Candidate(f"int{bits}", cj.at("**/kernel", quantize), training(candidate_steps, 5e-4)),
        Candidate(
            f"prune-{100 * sparsity:g}-int{bits}",
            cj.at("**/kernel", cj.chain(prune, quantize)),
            training(candidate_steps, 5e-4),
        ),
    )
    return Experiment(
        name="resnet50-resnet18",
        data=data,
        teacher=Network(large, training(teacher_steps, 1e-3), variables=weights),
        student=Network(ImageNetResNet(classes=classes), training(student_steps, 2e-3)),
        loss=task.distillation(alpha=0.1, temperature=temperature),
        candidates=candidates,
        requirement=Requirement(max_drop=max_drop, reference="student"),
        task=task,
        seed=seed,
    )


def photos(images: str, tfds: str, size: int) -> Data:
    """Return color images, normalized as the published teacher wants them."""
    return cj.data.images_on_disk(images or tfds, size=size, fraction=0.02)
