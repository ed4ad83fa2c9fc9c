"""A report as Markdown; its pictures are files beside it."""

from compress_jax.report._plots import CAPTIONS
from compress_jax.report._read import Run
from compress_jax.report._sections import Section, headline, sections
from compress_jax.report._tables import escaped, markdown_table


def text(run: Run, pictures: list[str]) -> str:
    """Return ``report.md``; its pictures are files beside it.

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
    for table in part.tables:
        # A single table needs no title beside that of its section.
        title = [f"### {escaped(table.title)}"] if len(part.tables) > 1 else []
        blocks += [*title, markdown_table(table)]
    if part.picture:
        blocks.append(f"![{part.title}](report/{part.picture}.png)\n\n{CAPTIONS[part.picture]}")
    return "\n\n".join(blocks)
