"""The report as Markdown, its pictures in files beside it."""

from compress_jax.report.read import Run
from compress_jax.report.sections import CAPTIONS, Section, headline, sections
from compress_jax.report.tables import escaped, markdown_table


def text(run: Run, pictures: list[str]) -> str:
    """Return ``report.md``.

    Args:
      run: the run.
      pictures: the names of those in ``report/``.

    Returns:
      Markdown.
    """
    parts = [
        f"# {escaped(run.results['experiment'])}",
        escaped(headline(run), block=True),
        *(_section(part) for part in sections(run, pictures)),
    ]
    return "\n\n".join(parts) + "\n"


def _section(part: Section) -> str:
    blocks = [f"## {part.title}"]
    if part.lines:
        blocks.append("\n".join(f"* {escaped(line, block=True)}" for line in part.lines))
    blocks.extend(markdown_table(table) for table in part.tables)
    if part.picture:
        blocks.append(f"![{part.title}](report/{part.picture}.png)\n\n{CAPTIONS[part.picture]}")
    return "\n\n".join(blocks)
