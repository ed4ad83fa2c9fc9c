"""The versions of what a run depends on, found without a start of JAX."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from compress_jax.cli.workdir import PACKAGES, package_version

DEVICES = {"gpu": "/dev/nvidia[0-9]*", "tpu": "/dev/accel[0-9]*"}  # of the drivers


def versions() -> list[str]:
    """Return versions and backends as lines.

    No accelerator is initialized: that takes seconds and memory, and another process may have it.

    Example:
      >>> versions()[0]
      'compress_jax 0.1.0'
    """
    # Run from the source tree, the package is not installed, but knows its version.
    own = sys.modules["compress_jax"].__version__
    others = [name for name in PACKAGES if name != "compress_jax"]
    return [
        f"compress_jax {own}",
        *(f"{name} {package_version(name)}" for name in others),
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"backends: {', '.join(_backends())}",
    ]


def _backends() -> list[str]:
    """Return what JAX may use here: CPUs, its installed plugins, and the devices there are."""
    plugins = [each.name for each in importlib.metadata.entry_points(group="jax_plugins")]
    if package_version("libtpu") != "not installed":
        plugins.append("tpu")
    found = ["cpu", *(f"{name} (plugin installed)" for name in sorted(set(plugins)))]
    for kind, pattern in DEVICES.items():
        number = len(list(Path("/").glob(pattern.lstrip("/"))))
        if number:
            found.append(f"{number} {kind} devices")
    if chosen := os.environ.get("JAX_PLATFORMS"):
        found.append(f"JAX_PLATFORMS={chosen}")
    return found
