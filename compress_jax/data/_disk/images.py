"""Labeled images that stay on disk, as files or as TFDS has them: decoded for each batch anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from compress_jax.core.errors import ArgumentError
from compress_jax.data._data import Data
from compress_jax.data._dataset import prepared, quiet
from compress_jax.data._disk.records import Reading, data_of
from compress_jax.data._folder import listings_of
from compress_jax.data._images import Color, covering, upright

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's images in [0, 1], as torchvision's networks want them
STD = (0.229, 0.224, 0.225)
TRIES = 10


@dataclass(frozen=True)
class Pictures:
    """How images become examples of one size: for evaluation, and cropped for training.

    Attributes:
      size: height and width of the examples.
      mean: of each channel, of pixels in [0, 1].
      std: of each channel.
      color: ``"gray"`` or ``"rgb"``.
      area: the smallest and the largest share of an image that a crop for training keeps.
      flip: whether half the crops are mirrored.

    Example:
      >>> pictures = Pictures((2, 2), (0.5,), (0.5,), "gray", (0.5, 1.0), True)
      >>> import io
      >>> file = io.BytesIO()
      >>> Image.new("L", (4, 6), 255).save(file, "png")
      >>> pictures.example((file.getvalue(), 3))["image"].tolist()
      [[[1.0], [1.0]], [[1.0], [1.0]]]
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    color: Color
    area: tuple[float, float]
    flip: bool

    def example(self, record: tuple[Any, int]) -> dict[str, Any]:
        """Return an image that is scaled until it covers the size, and its middle."""
        source, label = record
        return self._made(covering(self._opened(source), self.size), label)

    def crop(self, record: tuple[Any, int], random: np.random.Generator) -> dict[str, Any]:
        """Return a random part of an image, of a random form, scaled to the size."""
        source, label = record
        image = self._opened(source)
        box = _box(random, image.width, image.height, self.area)
        height, width = self.size
        part = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        if self.flip and random.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._made(part, label)

    def _opened(self, source: Any) -> Image.Image:
        name = "its image" if isinstance(source, bytes) else str(source)
        return upright(source, name, self.color)

    def _made(self, image: Image.Image, label: int) -> dict[str, Any]:
        pixels = np.asarray(image, np.float32).reshape(*self.size, len(self.mean))
        pixels = (pixels / 255 - np.asarray(self.mean, np.float32)) / np.asarray(self.std)
        return {"image": pixels.astype(np.float32), "label": np.int32(label)}


def images_on_disk(
    place: str | Path,
    *,
    size: int | tuple[int, int] = 224,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    area: tuple[float, float] = (0.08, 1.0),
    flip: bool = True,
    fraction: float = 0.01,
    seed: int = 0,
    data_dir: str | Path | None = None,
    threads: int = 16,
    workers: int = 0,
) -> Data:
    r"""Return labeled images that are decoded for each batch anew: ImageNet on a pod, say.

    For evaluation an image is scaled until it covers the size, and its middle is taken. Training
    sees a random part of it, of an area and a form that are drawn anew each time (the crops of
    Inception and ResNet), half of them mirrored. Pixels are :math:`(x / 255 - \mu_c) / \sigma_c`.

    Args:
      place: a folder with a folder for each class, or with train/ and test/ of such folders, as in
        `from_folder`; or the name of a data set of TFDS, ``"imagenet2012"``, prepared in
        ``data_dir``.
      size: height and width, or one number for both.
      mean: of each channel; one number for gray images. By default ImageNet's.
      std: of each channel.
      area: the smallest and the largest share of an image that a crop keeps.
      flip: whether crops are mirrored.
      fraction: the share of train that a missing split gets.
      seed: of the draw of missing splits.
      data_dir: see `load`.
      threads: images decoded at once.
      workers: processes that decode; 0 for threads, which suffice: decoding runs beside Python.

    Returns:
      The data, on disk: ``image`` float32 ``[n, height, width, channels]`` and ``label``. A split
      validation without a test is the test split, and validation is then cut from train.

    Raises:
      DataError: if the folder or the data set cannot be read.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> folder = Path(tempfile.mkdtemp())
      >>> for i in range(20):
      ...     (folder / "ab"[i % 2]).mkdir(exist_ok=True)
      ...     Image.new("RGB", (9, 7 + i), (i, 0, 0)).save(folder / "ab"[i % 2] / f"{i}.png")
      >>> data = cj.data.images_on_disk(folder, size=8, fraction=0.1)
      >>> data.train["image"].shape, data.names
      ((16, 8, 8, 3), ('a', 'b'))

    References:
      Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6 (the crops).
    """
    pair = (size, size) if isinstance(size, int) else (size[0], size[1])
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise ArgumentError(f"mean and std are of 3 channels, or of 1; got {mean} and {std}")
    color: Color = "gray" if len(mean) == 1 else "rgb"
    pictures = Pictures(pair, tuple(mean), tuple(std), color, area, flip)
    is_folder = Path(place).expanduser().is_dir()
    notes: list[str] = []
    if is_folder:
        found = listings_of(Path(place).expanduser(), notes)
        sources: dict[str, Any] = dict(found.files)
        names = found.names
    else:
        sources, names = _of_tfds(str(place), data_dir)
    if "test" not in sources and "validation" in sources:
        sources["test"] = sources.pop("validation")
        notes.append("test: the validation split")
    how = Reading(
        pictures.example, pictures.crop, threads, workers, len(names), names, fraction, seed,
        Path(place).name,
    )  # fmt: skip
    return data_of(sources, how, notes)


@dataclass(frozen=True)
class _Labeled:
    """Pairs of an image and its label, of the records of TFDS.

    Attributes:
      source: its data source.
      keys: the names of image and label in a record.
    """

    source: Any
    keys: tuple[str, str]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        record: Mapping[str, Any] = self.source[number]
        return record[self.keys[0]], record[self.keys[1]]


def _of_tfds(name: str, data_dir: str | Path | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    builder = prepared(name, data_dir)
    image, label = builder.info.supervised_keys
    with quiet():
        # The files' bytes: they are decoded here, and only when they are asked for.
        stored = {image: tfds.decode.SkipDecoding()}
        splits = {
            part: _Labeled(builder.as_data_source(part, decoders=stored), (image, label))
            for part in ("train", "validation", "test")
            if part in builder.info.splits
        }
    if builder.name == "imagenet2012":
        splits.pop("test", None)  # its labels are hidden
    return splits, tuple(builder.info.features[label].names)


def _box(
    random: np.random.Generator, width: int, height: int, area: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Draw a part of an image: left, upper, right and lower edge."""
    for _ in range(TRIES):
        size = random.uniform(*area) * width * height
        form = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))  # width by height
        w = round(float(np.sqrt(size * form)))
        h = round(float(np.sqrt(size / form)))
        if 0 < w <= width and 0 < h <= height:
            left = int(random.integers(0, width - w + 1))
            upper = int(random.integers(0, height - h + 1))
            return left, upper, left + w, upper + h
    # No drawn form fits into an image that is very long: the middle of it does.
    side = min(width, height)
    left = (width - side) // 2
    upper = (height - side) // 2
    return left, upper, left + side, upper + side
