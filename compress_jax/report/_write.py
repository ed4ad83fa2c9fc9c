"""A run's folder to ``report.html``, ``report.md`` and the pictures in ``report/``."""

from collections.abc import Callable
from pathlib import Path

from compress_jax.export import write_atomically
from compress_jax.report.html import page
from compress_jax.report.markdown import text
from compress_jax.report.plots import pictures
from compress_jax.report.read import read_run


def write(directory: str | Path, say: Callable[[str], None] | None = None) -> Path:
    """Write the report of a finished run.

    Args:
      directory: its folder.
      say: receives a sentence for each file that is damaged and so is not shown; the report has them too.

    Returns:
      ``report.html``, one file that needs nothing else; beside it are ``report.md`` and its pictures in ``report/``.

    Raises:
      ConfigError: if no run was finished there.
      ArtifactError: if an artifact is missing or damaged, or nothing can be written.

    Example:
      >>> import json, tempfile
      >>> import jax.numpy as jnp
      >>> from compress_jax.export import save
      >>> directory, params = Path(tempfile.mkdtemp()), {"params": {"kernel": jnp.ones((2, 2))}}
      >>> names = ("student", "artifact")
      >>> sizes = [save(directory / f"{name}.safetensors", params) for name in names]
      >>> numbers = {"validation": 0.9, "test": 0.8, "bits": 32.0, "accepted": None, "reason": ""}
      >>> rows = [{"name": name, "nbytes": size, **numbers} for name, size in zip(names, sizes)]
      >>> results = {"experiment": "tiny", "chosen": "artifact", "met": True, "rows": rows}
      >>> _ = (directory / "results.json").write_text(json.dumps(results))
      >>> write(directory).name, (directory / "report" / "tradeoff.png").exists()
      ('report.html', True)
    """
    run = read_run(Path(directory))
    for note in run.notes:
        (say or str)(note)
    drawn = pictures(run)
    for name, png in drawn.items():
        write_atomically(run.directory / "report" / f"{name}.png", png)
    write_atomically(run.directory / "report.md", text(run, list(drawn)).encode())
    write_atomically(run.directory / "report.html", page(run, drawn).encode())
    return run.directory / "report.html"
