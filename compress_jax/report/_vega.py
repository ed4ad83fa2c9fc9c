"""Vega-Lite and what draws it, as JavaScript inside the page: from the package vl-convert-python.

Chosen over Plotly for size: Vega, Vega-Lite and Vega-Embed are 0.9 MB in a page, Plotly 4.5 MB; and
their charts are data that is drawn as SVG, with text that screen readers reach.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path

from compress_jax.core.errors import ArtifactError
from compress_jax.export import write_atomically

PACKAGE = "vl-convert-python"
MISSING = (
    "Charts are still pictures here, and answers, activations and sensitivities have none, as the "
    "package vl-convert-python is not installed: pip install 'compress_jax[report]', then "
    "compress-jax report draws all of them, with hover and zoom."
)


def library() -> str | None:
    """Return the JavaScript that draws charts, or None if the package is not installed.

    Joining it takes seconds, so it is kept in the user's cache folder, by version.
    """
    if importlib.util.find_spec("vl_convert") is None:
        return None
    kept = cache() / f"vega-{importlib.metadata.version(PACKAGE)}.js"
    if _is_ours(kept):
        return kept.read_text()
    import vl_convert

    text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # Where nothing can be kept, such as a read-only home, the next report joins it again.
    with contextlib.suppress(ArtifactError):
        write_atomically(kept, text.encode())
    return text


def cache() -> Path:
    """Return the folder in which the library is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "compress_jax"


def _is_ours(file: Path) -> bool:
    """Return whether a file is there that nobody but this user could have written."""
    if not file.is_file():
        return False
    status = file.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022
