"""What devices can do, as their makers say: FLOPs a second, memory, bandwidth, links."""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import PyTree

_given: contextvars.ContextVar[float | None] = contextvars.ContextVar("given", default=None)


class Chip(NamedTuple):
    """What a device can do, as its maker says.

    Attributes:
      flops: operations a second of dense bfloat16 products.
      memory: bytes.
      bandwidth: bytes a second from and to its memory.
      links: bytes a second to other devices, all links together, in one direction.

    Example:
      >>> CHIPS["v5p"].memory
      95000000000
    """

    flops: float
    memory: int
    bandwidth: float
    links: float


# Read on 2026-11-29: v5e and v5p on Google Cloud's pages, the others in tables by third parties.
# Links of GPUs are those within one machine; between machines the network is slower.
CHIPS = {
    "v4": Chip(275e12, 32 * 10**9, 1.2e12, 0.3e12),
    "v5e": Chip(197e12, 16 * 10**9, 0.82e12, 0.2e12),
    "v5p": Chip(459e12, 95 * 10**9, 2.77e12, 0.6e12),
    "v6e": Chip(918e12, 32 * 10**9, 1.64e12, 0.4e12),
    "a100": Chip(312e12, 80 * 10**9, 2.04e12, 0.3e12),
    "h100": Chip(989e12, 80 * 10**9, 3.35e12, 0.45e12),
    "h200": Chip(989e12, 141 * 10**9, 4.8e12, 0.45e12),
}


# What a chip is called in JAX, `jax.Device.device_kind`. An H100 on a PCIe card is another one.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


@contextlib.contextmanager
def peak_flops(flops: float) -> Iterator[None]:
    """Say what a device can do, for the utilization of every training within the ``with`` block.

    It is known of the chips in `search.CHIPS`, in dense bfloat16 products; say it for others, or
    where the products of a training are of another dtype.

    Args:
      flops: operations a second of one device.

    Raises:
      ArgumentError: if that is no number above 0.

    Example:
      >>> import compress_jax as cj
      >>> with cj.train.peak_flops(1.5e12):
      ...     pass  # cj.search.compress(experiment, folder), or cj.train.fit(...)
    """
    is_number = isinstance(flops, (int, float)) and not isinstance(flops, bool)
    if not (is_number and 0 < flops < math.inf):
        raise ArgumentError(f"flops must be operations a second, a number above 0; got {flops!r}")
    token = _given.set(float(flops))
    try:
        yield
    finally:
        _given.reset(token)


def peak_of(tree: PyTree) -> float | None:
    """Return the operations a second of all devices that hold some arrays; None if unknown.

    Args:
      tree: the arrays.

    Returns:
      The number that `peak_flops` was given, or that of the chip, times the number of devices.

    Example:
      >>> with peak_flops(2.0):
      ...     peak_of(jax.numpy.ones(3))
      2.0
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    devices = set().union(*(leaf.sharding.device_set for leaf in leaves))
    own = _given.get()
    if own is not None:
        return own * len(devices)
    chips = [KINDS.get(device.device_kind) for device in devices]
    # Nothing is guessed: of one unknown device the whole is unknown.
    known = [CHIPS[chip].flops for chip in chips if chip is not None]
    return sum(known) if known and len(known) == len(chips) else None
