"""``compress-jax inspect``: what is in an artifact."""

from pathlib import Path
from typing import Annotated

import tyro

from compress_jax.cli.console import shown, stdout


def inspect(file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]) -> int:
    """Show what an artifact is and how each of its leaves is stored.

    Prints the metadata (model, data, config, accuracy) and one line a leaf: shape, form, stored bits for each entry, share
    of zeros, bytes, share of the file, and why a leaf was left alone; then what the bytes are for: codes, masks, scales. For
    example

      compress-jax inspect runs/digits/artifact.safetensors

    Args:
      file: an artifact; any file that compress_jax.save wrote.

    Returns:
      The exit code.
    """
    from compress_jax.export import breakdown, load
    from compress_jax.report import causes_table, leaves_table, metadata_table, rich_table

    packed, metadata = load(file)
    console = stdout()
    console.print(rich_table(metadata_table(str(file), metadata)))
    left_alone = metadata.get("left_alone", {})
    parts = breakdown(file)
    console.print(rich_table(leaves_table(packed, left_alone, parts)))
    console.print(rich_table(causes_table(parts)))
    if not metadata:
        console.print(shown("The file holds no metadata."))
    return 0
