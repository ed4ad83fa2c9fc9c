"""The UCI handwritten digits of scikit-learn as a TFDS builder, which needs no network."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


def is_test(labels: np.ndarray) -> np.ndarray:
    """Return which examples are test examples: in each class every fifth in the source's order.

    The source has no official split. This one is stratified and depends only on the labels. Every
    writer is in both splits, so the test measures new digits, not new writers.

    Args:
      labels: integers ``[n]``.

    Returns:
      Booleans ``[n]``, true for about one example in five.

    Example:
      >>> is_test(np.array([0, 0, 0, 0, 0, 1])).tolist()
      [False, False, False, False, True, False]
    """
    rank = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange(np.sum(labels == label))
    return rank % 5 == 4


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """1,797 images of 8x8 pixels with values 0 to 16, in ten classes.

    1,442 are for training and 355 for testing, see `is_test`.
    """

    VERSION = tfds.core.Version("1.0.0")
    MAXIMUM = 16

    def _info(self) -> tfds.core.DatasetInfo:
        """Describe the features.

        Images are raw bytes: TFDS encodes arrays as images with TensorFlow only, and PNG is slower.
        """
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding="bytes"),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Optical recognition of handwritten digits (UCI), test part, as shipped "
            "with scikit-learn.",
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            metadata=tfds.core.MetadataDict(maximum=self.MAXIMUM),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        """Make both splits from scikit-learn's arrays."""
        # Imported here: it takes longer than the rest of the work, and is needed only once.
        from sklearn.datasets import load_digits

        source: Any = load_digits()
        images = source.images.astype(np.uint8)[..., None]  # [n, 8, 8, 1]
        labels = source.target
        test = is_test(labels)
        return {
            "train": self._generate_examples(images, labels, np.flatnonzero(~test)),
            "test": self._generate_examples(images, labels, np.flatnonzero(test)),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray
    ) -> Iterator[Any]:
        """Yield the examples at ``rows``, with their index in the source as the key."""
        for row in rows.tolist():
            yield row, {"image": images[row], "label": int(labels[row])}
