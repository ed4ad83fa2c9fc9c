"""The table of all studies is up to date, complete, and says no number that its source does not."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments"
TABLE = runpy.run_path(str(FOLDER / "table.py"))
STUDIES = TABLE["studies"]()
QUOTED = ("claim", "paper", "ours", "minutes", "date", "why")
every_study = pytest.mark.parametrize("study", STUDIES, ids=lambda study: study["study"])


def numbers(text: str) -> set[str]:
    """Return the numbers of a text, without those in the braces of its placeholders."""
    return set(re.findall(r"\d+(?:[.,:-]\d+)*", re.sub(r"{\w+}", "", text)))


def section(source: str) -> str:
    """Return a page, or the section of it that follows a heading."""
    page, _, heading = source.partition("#")
    text = (FOLDER / page).read_text()
    if not heading:
        return text
    assert f"\n## {heading}\n" in text, f"{page} has no section {heading!r}"
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def unfounded(study: dict) -> set[str]:
    """Return the numbers of a row that neither its section nor its results say."""
    results = "".join(path.read_text() for path in TABLE["files"](study))
    said = numbers(section(study["source"])) | numbers(results)
    return {number for key in QUOTED for number in numbers(study.get(key, ""))} - said


def test_the_file_is_what_the_script_writes():
    done = subprocess.run([sys.executable, str(FOLDER / "table.py"), "--check"])
    assert done.returncode == 0, "run python experiments/table.py"


@every_study
def test_every_number_is_in_the_source(study):
    assert not unfounded(study)


def test_an_invented_number_would_be_found():
    assert unfounded({**STUDIES[0], "ours": "{m} and 98.7654"}) == {"98.7654"}


@every_study
def test_every_number_in_braces_is_read_and_every_read_number_is_shown(study):
    text = "".join(study.get(key, "") for key in QUOTED)
    assert set(re.findall(r"{(\w+)}", text)) == set(study.get("numbers", {}))


@every_study
def test_a_row_is_complete(study):
    cells = [TABLE["cell"](study, column) for column in TABLE["COLUMNS"]]
    assert all(cells) and len(cells) == 8
    assert study["verdict"] in ("reached", "missed", "not comparable")
    assert study["verdict"] == "reached" or study["why"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", cells[6])


@every_study
def test_the_command_is_the_pages_and_names_a_script(study):
    command = study["command"]
    from_the_name = command[command.rfind("/", 0, command.find(".py")) + 1 :]
    assert from_the_name in " ".join(section(study["source"]).split())
    scripts = re.findall(r"\S+\.py", command) or ["no script"]
    assert all((FOLDER.parent / script).is_file() for script in scripts)


def test_there_are_enough_studies_and_misses_are_said():
    verdicts = [study["verdict"] for study in STUDIES]
    assert len({study["study"] for study in STUDIES}) == len(STUDIES) >= 12
    assert verdicts.count("reached") >= 8


def test_every_script_has_a_smallest_setting_or_a_reason():
    smoke = runpy.run_path(str(FOLDER / "smoke.py"))
    run = {each.split()[0] for each in smoke["RUNS"]}
    named = run | set(smoke["NOT_RUN"])
    scripts = {
        str(path.relative_to(FOLDER))
        for path in FOLDER.rglob("*.py")
        if re.search("__main__|argparse", path.read_text()) or path.parent.name == "tutorials"
    }
    assert not run & set(smoke["NOT_RUN"])
    assert named == scripts
