"""MNIST and Fashion-MNIST with TFDS's own features and content, prepared without TensorFlow."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import mnist as stock

from compress_jax.data._builders import idx

_PARTS = {"train": "train", "test": "t10k"}


def _ignore(examples: int) -> None:
    """Do nothing with the number of examples written."""


class MNIST(stock.MNIST, skip_registration=True):
    """The stock builder without TensorFlow, which TFDS needs to extract gzip and to encode arrays.

    Attributes:
      SHA256: digests of the decompressed files, by file name.
      folder: the folder of the four files; None to download them.
      advance: called with the number of examples that were written.
    """

    SHA256: Mapping[str, str] = {
        "train-images-idx3-ubyte.gz": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte.gz": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    }

    def __init__(
        self, *, folder: Path | None = None, advance: Callable[[int], None] = _ignore, **kwargs: Any
    ):
        """Store our two arguments; the others are `tfds.core.DatasetBuilder`'s."""
        self.folder = folder
        self.advance = advance
        super().__init__(**kwargs)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        """Find or download the files, and make both splits."""
        if self.folder is not None:
            paths = {name: self.folder / name for name in idx.FILES}
        else:
            paths = dl_manager.download({name: self.URL + name for name in idx.FILES})
        return {split: self._generate_examples(paths, part) for split, part in _PARTS.items()}

    def _generate_examples(self, paths: Mapping[str, Any], part: str) -> Iterator[Any]:
        """Yield PIL images, which TFDS encodes without TensorFlow, by the stock builder's keys."""

        def content(kind: str) -> Any:
            name = idx.file_name(part, kind)
            return idx.read(paths[name], self.SHA256.get(name))

        images = content("images")
        labels = content("labels")
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield row, {"image": Image.fromarray(image), "label": int(label)}
            self.advance(1)


class FashionMNIST(MNIST, skip_registration=True):
    """Fashion-MNIST: the same code with its own URL, classes and digests."""

    URL = stock.FashionMNIST.URL
    SHA256: Mapping[str, str] = {
        "train-images-idx3-ubyte.gz": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte.gz": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    }

    def _info(self) -> tfds.core.DatasetInfo:
        """Describe the data as TFDS's own Fashion-MNIST does."""
        return stock.FashionMNIST._info(self)  # type: ignore[arg-type]
