"""Blank images, where only shapes count."""

import numpy as np

from compress_jax.data._data import Data
from compress_jax.data._preprocess import Split


def blank_images(count: int, size: int, classes: int = 1000) -> Data:
    """Return images that are all zeros and take no memory: for plans, where only shapes count.

    Args:
      count: training examples, at least as many as a batch has.
      size: height and width; there are three channels.
      classes: labels go from 0 to ``classes - 1`` again and again.

    Returns:
      The data; its notes say that they teach nothing.

    Example:
      >>> import compress_jax as cj
      >>> data = cj.data.blank_images(4096, 224)
      >>> data.train["image"].shape, data.train["image"].base.nbytes
      ((4096, 224, 224, 3), 4)
    """

    def split(number: int) -> Split:
        images = np.broadcast_to(np.zeros((), np.float32), (number, size, size, 3))
        return {"image": images, "label": np.arange(number, dtype=np.int32) % classes}

    return Data(
        "blank",
        split(count),
        split(16),
        split(16),
        classes,
        f"blank-{count}-{size}-{classes}",
        notes=("images are blank and teach nothing: for plans and trials only",),
    )
