"""The report of a run: tables, pictures, one HTML page and one Markdown page."""

from compress_jax.report._page import write
from compress_jax.report._read import Run, read_results, read_run
from compress_jax.report._rows import causes_table, leaves_table, metadata_table, results_table
from compress_jax.report._tables import Table, html_table, markdown_table, rich_table

__all__ = [
    "Run",
    "Table",
    "html_table",
    "causes_table",
    "leaves_table",
    "markdown_table",
    "metadata_table",
    "read_results",
    "read_run",
    "results_table",
    "rich_table",
    "write",
]


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
