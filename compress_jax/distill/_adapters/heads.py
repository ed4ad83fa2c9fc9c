"""Adapters that particular losses are published with, built from `linear`, `conv` and `norm`."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from compress_jax.core.types import Params
from compress_jax.distill._adapters.adapter import (
    Adapter,
    Shape,
    activation,
    conv,
    linear,
    norm,
    sequential,
)
from compress_jax.distill._losses.shapes import flat, unit

_leaky = activation(partial(jax.nn.leaky_relu, negative_slope=0.1))


def _scaled(build: Callable[[int], Adapter]) -> Adapter:
    """Return the adapter that ``build`` makes for the teacher's number of channels.

    Its ``apply`` must not depend on that number, which only ``init`` knows.
    """
    # The teacher's channels are known when `init` is called; `apply` reads sizes from the params.
    return Adapter(
        lambda key, student, teacher: build(teacher[-1]).init(key, student, teacher), build(1).apply
    )


def gaussian(hidden: int | None = None, variance: float = 5.0, epsilon: float = 1e-5) -> Adapter:
    """Return the adapter of `vid`: a mean per teacher feature and a variance per channel.

    The mean is ``linear(relu(linear(relu(linear(x)))))``, the variance ``softplus(raw) + epsilon``.

    Args:
      hidden: channels between the linear maps; None for the teacher's.
      variance: initial variance of all channels.
      epsilon: smallest variance.

    Returns:
      An `Adapter` whose ``apply`` returns ``(mean, variance [channels])``; positions must be the
      teacher's.

    Example:
      >>> params = gaussian().init(jax.random.key(0), (8, 4, 4, 2), (8, 4, 4, 3))
      >>> mean, variance = gaussian().apply(params, jnp.ones((1, 4, 4, 2)))
      >>> mean.shape, variance.round(3).tolist()
      ((1, 4, 4, 3), [5.0, 5.0, 5.0])

    References:
      Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, section
      2.
    """
    mean = sequential(
        linear(hidden, bias=False),
        activation(),
        linear(hidden, bias=False),
        activation(),
        linear(bias=False),
    )

    def init(key: jax.Array, student_shape: Shape, teacher_shape: Shape) -> Params:
        # The inverse of softplus: softplus(log(expm1(v))) = v.
        raw = jnp.full(teacher_shape[-1], math.log(math.expm1(variance - epsilon)), jnp.float32)
        return {"mean": mean.init(key, student_shape, teacher_shape), "raw_variance": raw}

    def apply(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return mean.apply(params["mean"], x), jax.nn.softplus(params["raw_variance"]) + epsilon

    return Adapter(init, apply)


def embedding(dim: int = 128) -> Adapter:
    """Return the adapter of `crd`: features flattened, mapped linearly and scaled to norm 1.

    Student and teacher get one each. Its ``init`` is given the shape of its own features (the
    second shape is not used).

    Args:
      dim: width of the embedding.

    Returns:
      An `Adapter` that returns ``[batch, dim]``.

    Example:
      >>> params = embedding(16).init(jax.random.key(0), (8, 2, 2, 4), (8, 2, 2, 4))
      >>> embedded = embedding(16).apply(params, jnp.ones((3, 2, 2, 4)))
      >>> jnp.linalg.norm(embedded, axis=1).round(4).tolist()
      [1.0, 1.0, 1.0]

    References:
      Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020, section 3.
    """
    project = linear(dim)

    def init(key: jax.Array, student_shape: Shape, teacher_shape: Shape) -> Params:
        # [batch, all the rest]
        own = (student_shape[0], math.prod(student_shape[1:]))
        return project.init(key, own, own)

    return Adapter(init, lambda params, x: unit(project.apply(params, flat(x))))


def projector(factor: int = 2) -> Adapter:
    """Return SimKD's projector from the student's last feature map to the teacher's; use `hint`.

    A bottleneck: linear, 3x3 convolution, linear, each with `norm` and ReLU, with the teacher's
    channels divided by ``factor`` inside. Unlike all other adapters this one is shipped: the
    student is its backbone, the projector and the teacher's own classifier.

    Args:
      factor: teacher channels over channels of the bottleneck.

    Returns:
      An `Adapter`; positions must be the teacher's.

    Example:
      >>> params = projector().init(jax.random.key(0), (8, 4, 4, 2), (8, 4, 4, 6))
      >>> projector().apply(params, jnp.ones((1, 4, 4, 2))).shape, params["0"]["kernel"].shape
      ((1, 4, 4, 6), (2, 3))

    References:
      Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, section
      3.
    """

    def build(channels: int) -> Adapter:
        narrow = max(channels // factor, 1)
        maps = (linear(narrow, bias=False), conv(narrow, bias=False), linear(bias=False))
        layers = []
        for layer in maps:
            layers += [layer, norm(), activation()]
        return sequential(*layers)

    return _scaled(build)


def generator() -> Adapter:
    """Return the adapter of `mgd`: two 3x3 convolutions with a ReLU between them.

    It generates the teacher's features from the student's masked ones.

    Returns:
      An `Adapter`; positions must be the teacher's.

    Example:
      >>> params = generator().init(jax.random.key(0), (8, 4, 4, 2), (8, 4, 4, 6))
      >>> generator().apply(params, jnp.ones((1, 4, 4, 2))).shape
      (1, 4, 4, 6)

    References:
      Yang et al., "Masked Generative Distillation", ECCV 2022, equation 2.
    """
    return sequential(conv(), activation(), conv())


def translator() -> Adapter:
    """Return the student's adapter of `ft`: features to the shape of a factor.

    Three 3x3 convolutions, each with `norm` and leaky ReLU.

    Returns:
      An `Adapter`; give its ``init`` the shape of the paraphraser's factor as the teacher's.

    Example:
      >>> params = translator().init(jax.random.key(0), (8, 4, 4, 2), (8, 4, 4, 3))
      >>> translator().apply(params, jnp.ones((1, 4, 4, 2))).shape
      (1, 4, 4, 3)

    References:
      Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
      NeurIPS 2018, section 3.2.
    """
    return sequential(*([conv(), norm(), _leaky] * 3))


def paraphraser(rate: float = 0.5) -> Adapter:
    """Return the teacher's adapter of `ft`: an autoencoder whose code is the factor.

    Three 3x3 convolutions to ``rate`` times the channels and three back. Train it first, on the
    teacher's features alone, by ``hint(reconstruction, features)``.

    Args:
      rate: channels of the factor, as a fraction of the teacher's (the paper's paraphrase rate).

    Returns:
      An `Adapter` whose ``apply`` returns ``(factor, reconstruction)``; its ``init`` is given the
      teacher's shape twice.

    Example:
      >>> params = paraphraser().init(jax.random.key(0), (8, 4, 4, 6), (8, 4, 4, 6))
      >>> factor, reconstruction = paraphraser().apply(params, jnp.ones((1, 4, 4, 6)))
      >>> factor.shape, reconstruction.shape
      ((1, 4, 4, 3), (1, 4, 4, 6))

    References:
      Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
      NeurIPS 2018, equation 1.
    """
    encode = translator()
    decode = sequential(conv(), norm(), _leaky, conv(), norm(), _leaky, conv())

    def init(key: jax.Array, student_shape: Shape, teacher_shape: Shape) -> Params:
        # [batch, *positions, channels of the factor]
        code = (*teacher_shape[:-1], max(int(rate * teacher_shape[-1]), 1))
        first, second = jax.random.split(key)
        return {
            "encode": encode.init(first, teacher_shape, code),
            "decode": decode.init(second, code, teacher_shape),
        }

    def apply(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        factor = encode.apply(params["encode"], x)
        return factor, decode.apply(params["decode"], factor)

    return Adapter(init, apply)
