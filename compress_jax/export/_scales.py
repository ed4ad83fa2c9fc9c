"""Weight scales at which every bias is representable in int32, for integer kernels."""

import numpy as np

# The largest bias in steps is half of int32's range, which leaves the other half to the products.
LARGEST = 2.0**30
SMALLEST = 1e-30  # the smallest scale: products of scales must stay normal numbers in float32


def floor(bias: np.ndarray, step: float) -> np.ndarray:
    r"""Return the smallest weight scale of each channel at which its bias is representable.

    A bias is stored as :math:`round(b / (s_x s_w))` in int32, so
    :math:`s_w \ge |b| / (s_x 2^{30})`.

    Args:
      bias: float, of each channel.
      step: :math:`s_x`, the scale of the activations.

    Returns:
      float64, of each channel.

    Example:
      >>> floor(np.array([0.0, 2.0**20]), 1.0)
      array([0.        , 0.00097656])
    """
    return np.abs(np.asarray(bias, np.float64)) / (float(step) * LARGEST)


def representable(
    levels: np.ndarray,
    scale: np.ndarray,
    values: np.ndarray,
    axis: int,
    bias: np.ndarray,
    step: float,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Raise the scales of channels until their bias is representable.

    A channel whose levels are all zero may have any scale: it gets the smallest, for then its bias
    is exact. A channel whose weights are tiny compared with its bias gets a larger scale, and its
    weights are rounded again.

    Args:
      levels: int8, signed.
      scale: float32, of each channel.
      values: the weights themselves.
      axis: of channels.
      bias: of each channel.
      step: the scale of the activations.

    Returns:
      ``(levels, scale, how many channels were rounded again)``.

    Example:
      >>> levels, scale = np.array([[127, 0]], np.int8), np.array([1e-12, 0.5], np.float32)
      >>> values, bias = levels * scale, np.array([3.0, 3.0])
      >>> levels, scale, changed = representable(levels, scale, values, 1, bias, step=0.1)
      >>> levels.tolist(), changed, np.allclose(np.round(3.0 / (scale * 0.1)) * (scale * 0.1), 3.0)
      ([[0, 0]], 1, True)
    """
    shape = [-1 if i == axis else 1 for i in range(levels.ndim)]
    others = tuple(i for i in range(levels.ndim) if i != axis)
    dead = (levels == 0).all(others)  # [channels]
    # The margin outweighs the rounding to float32 below, which may go down.
    least = np.maximum(floor(bias, step), SMALLEST) * (1 + 1e-6)
    low = ~dead & (scale < least)
    of_dead = np.where(bias == 0, 1, least)
    new = np.where(dead, of_dead, np.maximum(scale, least)).astype(np.float32)  # [channels]
    # Symmetric codes: -127 to 127, never -128.
    again = np.clip(np.round(values.astype(np.float64) / new.reshape(shape)), -127, 127)
    return np.where(low.reshape(shape), again, levels).astype(np.int8), new, int(low.sum())
