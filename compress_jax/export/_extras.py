"""Optional packages, imported on demand, with an error that says what to install."""

import importlib
from types import ModuleType

from compress_jax.core.errors import ExportError


def extra(module: str, name: str) -> ModuleType:
    """Import a module of an optional dependency.

    Args:
      module: its full name.
      name: the extra of this package that installs it.

    Returns:
      The module.

    Raises:
      ExportError: if it is not installed; it says how to install it.

    Example:
      >>> extra("json", "onnx").__name__
      'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(
            f"this export needs the package {module.split('.')[0]!r}, which cannot be imported "
            f"({error}); pip install 'compress_jax[{name}]'"
        ) from error
