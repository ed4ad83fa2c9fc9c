"""The pages of a run, against the files they were made from."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax import report
from compress_jax.core import ConfigError
from compress_jax.core.bits import Bits
from compress_jax.core.packed import Clustered
from compress_jax.export import save
from compress_jax.report import Table, html_table, markdown_table

ROWS = [
    {
        "name": "teacher",
        "parameters": 90,
        "nbytes": 4000,
        "validation": 0.98,
        "test": 0.97,
        "accepted": None,
        "reason": "",
    },
    {
        "name": "student",
        "parameters": 45,
        "nbytes": 2000,
        "validation": 0.97,
        "test": 0.96,
        "accepted": None,
        "reason": "",
    },
    {
        "name": "a<b>",
        "parameters": 45,
        "nbytes": 500,
        "validation": 0.96,
        "test": None,
        "accepted": True,
        "reason": "fine",
    },
    {
        "name": "mild|",
        "parameters": 45,
        "nbytes": 250,
        "validation": 0.95,
        "test": 0.94,
        "accepted": True,
        "reason": "ok",
    },
    {
        "name": "strong",
        "parameters": 45,
        "nbytes": 100,
        "validation": 0.5,
        "test": None,
        "accepted": False,
        "reason": "bad",
    },
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run's folder, made by hand."""
    weights = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    node = Clustered(Bits.pack(jnp.asarray(weights > 0, jnp.uint8), 1), jnp.array([-0.8, 0.8]))
    bias = jnp.zeros(5)
    save(
        tmp_path / "student.safetensors",
        {"params": {"d": {"kernel": jnp.asarray(weights), "bias": bias}}},
    )
    metadata = {
        "name": "mild|",
        "left_alone": {"no pattern matches": ["d/bias"]},
        "model": "M(\n  1\n)",
    }
    save(
        tmp_path / "artifact.safetensors",
        {"params": {"d": {"kernel": node, "bias": bias}}},
        metadata,
    )
    rows = [{**row, "bits": 8 * row["nbytes"] / row["parameters"]} for row in ROWS]
    results = {"experiment": "by <hand>", "chosen": "mild|", "met": True, "rows": rows}
    (tmp_path / "results.json").write_text(json.dumps(results))
    requirement = {"max_drop": 0.04, "min_ratio": 3.0, "max_bytes": None, "reference": "teacher"}
    about = {
        "config": "hand.py",
        "arguments": {"bits": 1},
        "flags": ["--bits", "1"],
        "versions": {"jax": "1"},
    }
    (tmp_path / "run.json").write_text(json.dumps({**about, "requirement": requirement}))
    (tmp_path / "log.txt").write_text("mild|: accepted: ok\nstrong: refused: bad\n")
    (tmp_path / "student").mkdir()
    lines = [
        {"step": 1, "train/loss": 2.0, "train/accuracy": 0.5},
        {"step": 2, "train/loss": None, "train/accuracy": 0.75},
    ]
    (tmp_path / "student" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    return tmp_path


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.append(tag)
        self.targets.extend(
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")
        )


@pytest.mark.slow
def test_page_needs_nothing_else(folder: Path):
    page = report.write(folder).read_text()
    links = Links()
    links.feed(page)
    assert len(links.targets) > 4
    assert all(target.startswith(("data:", "#")) for target in links.targets)
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "http" not in page.replace("http-equiv", "") and "url(" not in page
    assert not {"link", "iframe"} & set(links.tags)


@pytest.mark.slow
def test_pages_escape_what_people_wrote(folder: Path):
    page = report.write(folder).read_text()
    text = (folder / "report.md").read_text()
    for shown in (page, text):
        assert "a&lt;b&gt;" in shown and "by &lt;hand&gt;" in shown and "<hand>" not in shown
    assert "mild\\|" in (folder / "report.md").read_text()


def test_markdown_rows_are_those_of_the_results(folder: Path):
    report.write(folder)
    lines = (folder / "report.md").read_text().splitlines()
    start = lines.index("## Results") + 4
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[start : start + len(ROWS)]]
    for cells, row in zip(rows, ROWS, strict=True):
        name, test, validation, nbytes, ratio, to_teacher, bits, _ = (
            html.unescape(cell.strip().strip("*").replace("\\|", "|")) for cell in cells
        )
        assert name == row["name"] and int(nbytes.replace(",", "")) == row["nbytes"]
        assert float(validation.rstrip(" %")) == pytest.approx(100 * row["validation"], abs=0.005)
        assert (
            test == "-"
            if row["test"] is None
            else float(test.rstrip(" %")) == pytest.approx(100 * row["test"])
        )
        assert float(ratio.rstrip("x")) == pytest.approx(2000 / row["nbytes"], abs=0.05)
        assert float(to_teacher.rstrip("x")) == pytest.approx(4000 / row["nbytes"], abs=0.05)
        assert float(bits) == pytest.approx(8 * row["nbytes"] / row["parameters"], abs=0.005)
    assert (
        rows[3][0].strip() == "**mild\\|**"
        and rows[3][-1].strip() == "**chosen**"
        and rows[4][-1].strip() == "refused"
    )


@pytest.mark.slow
def test_decisions_and_what_was_left_alone_are_told(folder: Path):
    report.write(folder)
    text = (folder / "report.md").read_text()
    assert "* strong: refused: bad" in text and "| no pattern matches | 1 | d/bias |" in text
    assert "compress-jax run hand.py --bits 1" in text
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_same_folder_gives_the_same_bytes(folder: Path):
    first = report.write(folder).read_bytes()
    assert report.write(folder).read_bytes() == first


@pytest.mark.slow
def test_a_run_of_the_library_needs_no_command_line(folder: Path):
    for name in ("run.json", "log.txt"):
        (folder / name).unlink()
    text = report.write(folder).with_suffix(".md").read_text()
    assert "* strong: refused: bad" in text and "compress_jax.search.compress" in text


def test_unfinished_run_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="finish the run first"):
        report.write(tmp_path)


def test_tables_align_numbers_only():
    table = Table("", ("what", "n", "x"), (("a", "1,000", "-"), ("b", "2.5 %", "word")), totals=1)
    assert markdown_table(table).splitlines()[1:] == [
        "| :-- | --: | :-- |",
        "| a | 1,000 | - |",
        "| **b** | **2.5 %** | **word** |",
    ]
    assert (
        html_table(table).count('class="n"') == 3 and html_table(table).count('class="total"') == 1
    )
