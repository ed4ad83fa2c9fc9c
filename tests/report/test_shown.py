"""Foreign text is shown as it is on terminals, in Markdown, HTML and pictures."""

import html
import io
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from compress_jax import report
from compress_jax.cli import main
from compress_jax.core.table import printable
from compress_jax.export import save
from compress_jax.report import Table, html_table, markdown_table, rich_table
from compress_jax.report._plots import drawing, tradeoff
from compress_jax.report._read import read_run
from compress_jax.report._tables import escaped

NAMES = [
    "$\\frac$ and $",
    "_private",
    "a|b",
    "<img src=x>",
    "\x1b[2Jred\x1b]0;t\x07",
    "**bold** `x`",
    "\u202eturned",
    "層",
]


def printed(table: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False)
    console.print(rich_table(table))
    return console.file.getvalue().splitlines()


def rows(names: list[str]) -> list[dict]:
    numbers = {
        "nbytes": 1_234_567,
        "validation": 0.975,
        "test": 0.97,
        "bits": 4.25,
        "reason": "fine",
    }
    return [
        {"name": name, "accepted": None if name in ("teacher", "student") else True, **numbers}
        for name in names
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_word_of_the_results_is_ever_broken(width: int):
    names = ["teacher", "student", "prune-91-int4", "a rather long name of a candidate"]
    lines = printed(report.results_table(rows(names), "prune-91-int4"), width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for word in (
        "teacher",
        "prune-91-int4",
        "candidate",
        "1,234,567",
        "97.50 %",
        "validation",
        "accuracy",
        "chosen",
    ):
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text), (
            f"{word} is broken at {width} columns"
        )
    assert len(lines) <= 12 * len(names)


words = st.text(st.characters(codec="utf-8"), max_size=40)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(words, words, st.integers(0, 10**9).map(str)), min_size=1, max_size=4),
    st.integers(20, 120),
)
def test_every_cell_of_any_table_is_there_and_moves_no_cursor(cells, width):
    table = Table("title", ("one", "two words", "n"), tuple(cells))
    lines = printed(table, width)
    assert all(printable(line) == line for line in lines)
    assert all(row[2] in "\n".join(lines) for row in cells), "a number is never broken"
    if (
        max(len(word) for row in cells for cell in row for word in [*printable(cell).split(), ""])
        <= 20
    ):
        words = {word for row in cells for cell in row for word in printable(cell).split()}
        assert all(word in "\n".join(lines) for word in words)


@given(words)
def test_any_text_stays_one_cell_of_markdown_and_html(text):
    table = Table("", ("a",), ((text,),))
    lines = markdown_table(table).splitlines()
    assert len(lines) == 3 and len(re.findall(r"(?<!\\)(?:\\\\)*\|", lines[2])) == 2
    cell = re.search("<td[^>]*>(.*?)</td>", html_table(table), re.DOTALL).group(1)
    assert html.unescape(cell) == printable(text) and not {"<", ">", '"', "'"} & set(cell)
    assert html_table(table).count("<") == html_table(Table("", ("a",), (("",),))).count("<")
    assert not {"<", ">"} & set(escaped(text))
    back = re.sub(r"\\([\\`*|~$\[\]!_#+-])", r"\1", escaped(text))  # what a reader of Markdown sees
    seen = printable(text, lines=True).replace("\n", " ").replace("\t", " ")
    assert html.unescape(back.replace("&#8203;", "")) == seen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run whose names are all odd."""
    weights = {"params": {name: {"kernel": jnp.ones((4, 4))} for name in NAMES}}
    for name in ("student", "artifact"):
        save(
            tmp_path / f"{name}.safetensors",
            weights,
            {"model": NAMES[4], "left_alone": {NAMES[3]: NAMES}},
        )
    found = rows(["student", *NAMES])
    results = {"experiment": NAMES[3], "chosen": NAMES[0], "met": True, "rows": found}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "log.txt").write_text("\n".join(NAMES))
    for name in NAMES:
        (tmp_path / "candidates" / name).mkdir(parents=True)
        (tmp_path / "candidates" / name / "metrics.jsonl").write_text(
            '{"step": 1, "train/loss": 1.0}\n'
        )
    return tmp_path


@pytest.mark.slow
def test_odd_names_go_through_every_page_and_picture(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    assert main(["report", str(folder)]) == 0
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for shown in (page, text, *capfd.readouterr()):
        assert "\x1b" not in shown and "\u202e" not in shown and "<img src=x>" not in shown
    assert printable(NAMES[4]) in page and "層" in page
    assert main(["inspect", str(folder / "artifact.safetensors")]) == 0
    shown = capfd.readouterr().out
    assert "\x1b" not in shown and "\\x1b[2J" in shown


def test_labels_do_not_lie_on_one_another(folder: Path):
    figure = tradeoff(read_run(folder))  # all at one point
    labels = [text for text in figure.axes[0].texts if "bytes" in text.get_text()]
    with drawing():
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) == 1 + len(NAMES)
    assert not [1 for i, one in enumerate(boxes) for other in boxes[:i] if one.overlaps(other)]
    assert all(np.isfinite(box.bounds).all() for box in boxes)
