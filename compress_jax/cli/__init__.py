"""The command line, ``compress-jax``: one function for each command.

Each function imports what is heavy only when it runs.
"""

from compress_jax.cli._main import main

__all__ = ["main"]


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
