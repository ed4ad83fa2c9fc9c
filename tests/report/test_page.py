"""The page: its structure, its numbers, and that nothing of a file acts in it."""

import csv
import html
import json
import re
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compress_jax import report
from compress_jax.report import Table, _page
from compress_jax.report._charts import efficient
from compress_jax.report._vega import MISSING
from compress_jax.report._written import csv_table, latex_table


class Seen(HTMLParser):
    """Elements, with the text inside scripts, heads and cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        if self.inside in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def data(self) -> dict:
        return json.loads(self.scripts[0])


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch):
    """Stand in for the library, which takes seconds and megabytes."""
    monkeypatch.setattr(_page, "library", lambda: "/* library */")


def written(folder: Path) -> Seen:
    return Seen(report.write(folder).read_text())


def test_headings_and_names_for_readers_of_screens(whole):
    seen = written(whole())
    levels = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert seen.all("html")[0]["lang"] == "en"
    ids = [attrs["id"] for _, attrs in seen.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in seen.all("a") if a["href"].startswith("#")]
    assert len(targets) > 10 and set(targets) <= set(ids)
    assert all(attrs.get("aria-labelledby") in ids for attrs in seen.all("section"))
    drawings = [attrs for attrs in seen.all("div") if attrs.get("class") == "drawing"]
    assert len(drawings) == len(seen.data()) > 8
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    assert all(attrs.get("scope") == "col" for attrs in seen.all("th"))
    assert len(seen.all("caption")) == len(seen.all("table"))


def test_nothing_is_loaded_from_elsewhere(whole):
    text = report.write(whole()).read_text()
    seen = Seen(text)
    for tag, attrs in seen.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    policy = seen.all("meta")[1]["content"]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert "http" not in re.sub(r"http-equiv|<script>.*?</script>", "", text, flags=re.DOTALL)


def test_numbers_are_those_of_the_results(whole):
    folder = whole()
    rows = json.loads((folder / "results.json").read_text())["rows"]
    seen = written(folder)
    table = next(each for each in seen.tables if each[0][0] == "network")
    column = {name: i for i, name in enumerate(table[0])}
    assert len(table) == 1 + len(rows)
    for cells, row in zip(table[1:], rows, strict=True):
        assert cells[0] == row["name"]
        assert int(cells[column["bytes on disk"]].replace(",", "")) == row["nbytes"]
        assert int(cells[column["MACs"]]) == row["macs"]
        shown = float(cells[column["validation plain"]].rstrip(" %"))
        assert shown == pytest.approx(100 * row["validation"], abs=0.005)
    front = seen.data()["front-nbytes"]["spec"]["data"]["values"]
    assert [(p["name"], p["x"]) for p in front] == [(r["name"], r["nbytes"]) for r in rows]
    assert [p["y"] for p in front] == pytest.approx([100 * r["validation"] for r in rows])
    assert {"front-nbytes", "front-macs", "confusion", "sensitivities"} <= set(seen.data())


def test_requirements_have_verdicts(whole):
    table = next(each for each in written(whole()).tables if each[0][0] == "what")
    # The artifact has 242 bytes and 95.1 %; the teacher 98 %, the student 2,000 bytes.
    assert [row[0] for row in table[1:]] == [
        "validation plain",
        "ratio to student",
        "bytes on disk",
    ]
    assert [row[2] for row in table[1:]] == ["95.10 %", "8.3x", "242"]
    assert [row[3] for row in table[1:]] == ["met", "met", "missed"]


def test_exports_times_and_commits_are_shown(whole):
    seen = written(whole())
    cells = [cell for table in seen.tables for row in table for cell in row]
    for cell in ("1,234", "5,678", "99.00 %", "2.00", "0123abcd", "2.5", "8 x cpu", "int8", "15"):
        assert cell in cells, cell


def test_nothing_in_a_file_acts(whole, evil: str):
    folder = whole(evil, evil.replace("/", ""))
    text = report.write(folder).read_text()
    seen = Seen(text)
    assert len(seen.scripts) == 3 and seen.scripts[1] == "/* library */"
    assert json.loads(seen.scripts[0])["confusion"] and "<" not in seen.scripts[0]
    assert not [attrs for _, attrs in seen.tags if any(name.startswith("on") for name in attrs)]
    assert not seen.all("img") and "49" not in seen.all("div")[0]
    markdown = (folder / "report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown


def test_tables_can_be_had_as_files(whole):
    folder = whole()
    seen = written(folder)
    files = {
        a["download"]: urllib.parse.unquote(a["href"]) for a in seen.all("a") if "download" in a
    }
    name = next(each for each in files if each.endswith("results.csv"))
    lines = list(csv.reader(files[name].split(",", 1)[1].splitlines()))
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [line[0] for line in lines[1:]] == [row["name"] for row in rows]
    assert r"\begin{tabular}" in files[name.replace(".csv", ".tex")]


def test_cells_act_in_no_spreadsheet_and_no_latex():
    table = Table("", ("a", "b"), (("=1+1", "-"), ("@x", "-3"), (r"\input{x}", "50 %")))
    assert csv_table(table).splitlines()[1:] == ["'=1+1,-", "'@x,'-3", "\\input{x},50 %"]
    assert r"\textbackslash{}input\{x\} & 50 \% \\" in latex_table(table)


def test_front_is_what_nothing_beats():
    places = [(5, 0.9), (1, 0.5), (3, 0.9), (3, 0.7), (9, 0.95), (2, 0.4)]
    rows = [{"n": n, "validation": v} for n, v in places]
    beaten = [any(m <= n and w >= v and (m, w) != (n, v) for m, w in places) for n, v in places]
    found = efficient(rows, "n", higher=True)
    assert sorted(found) == [i for i, each in enumerate(beaten) if not each]
    assert [rows[i]["n"] for i in found] == sorted(rows[i]["n"] for i in found)


def test_without_the_library_there_are_pictures_and_a_sentence(whole, monkeypatch):
    monkeypatch.setattr(_page, "library", lambda: None)
    text = report.write(whole()).read_text()
    seen = Seen(text)
    images = seen.all("img")
    assert len(images) == 4 and all(each["alt"] for each in images)
    assert not seen.data() and len(seen.scripts) == 2
    assert html.escape(MISSING, quote=False).replace("'", "&#39;") in text


def test_damaged_extras_are_noted_and_the_rest_is_shown(whole):
    folder = whole()
    (folder / "export" / "export.json").write_text("{")
    (folder / "search" / "sensitivities.json").write_text('{"measure": 3}')
    (folder / "sessions.jsonl").write_text("{}\nno\n")
    (folder / "artifact.safetensors").write_bytes((folder / "student.safetensors").read_bytes())
    notes: list[str] = []
    report.write(folder, log_fn=notes.append)
    text = "\n".join(notes)
    for name in ("export.json", "sensitivities.json", "sessions.jsonl", "another artifact"):
        assert name in text
