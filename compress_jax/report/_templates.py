"""The page's templates, style and script, which are files of this package."""

import importlib.resources

import jinja2
from markupsafe import Markup

from compress_jax.core.table import printable


def source(name: str) -> str:
    """Return a file of the templates' folder as it is."""
    folder = importlib.resources.files("compress_jax.report").joinpath("templates")
    return folder.joinpath(name).read_text(encoding="utf-8")


def rendered(name: str, **values: object) -> str:
    """Return a template with values in it.

    Args:
      name: of the file.
      values: what it names. Everything that is no Markup is made printable, then escaped.

    Returns:
      HTML.

    Example:
      >>> from compress_jax.report._tables import Table
      >>> table = Table("", ("network",), (("<script>",),))
      >>> ">&lt;script&gt;</td>" in rendered("table.html", table=table, caption="")
      True
    """
    return _environment().get_template(name).render(**values)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Data for the script, with every character escaped that could end its element.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


def _finalized(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
