"""The command line as a shell sees it: closed pipes, full disks, narrow terminals."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress_jax.cli import main
from compress_jax.cli.console import fitted
from compress_jax.core import CheckpointError
from compress_jax.train._loop import Session, open_recorders


@pytest.mark.wide(1)
@pytest.mark.parametrize("words", [["--help"], ["report", "--help"]])
def test_a_closed_pipe_is_quiet_and_has_an_exit_code_of_its_own(words: list[str]):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "compress_jax.cli", *words], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    "command", [[], ["run"], ["eval"], ["export"], ["inspect"], ["report"], ["plan"]]
)
@pytest.mark.parametrize("width", ["60", "80"])
def test_help_fits_the_terminal_and_breaks_no_word(
    command: list[str], width: str, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", width)
    assert main([*command, "--help"]) == 0
    narrow = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "400")
    assert main([*command, "--help"]) == 0
    wide = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= int(width)
    words = {word for word in wide.split() if word.isalpha()}
    assert words <= set(narrow.replace("│", " ").split()) and len(words) > 10


def test_help_lists_every_exit_code(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {code:<5}" in shown for code in (0, 1, 2, 3, 4, 130, 141, 143))


def test_wrapping_keeps_words_and_what_is_narrow():
    text = "short\n\n  name     what it means, in many words that go on\nx" + "y" * 90
    lines = fitted(text, 30).split("\n")
    assert (
        lines[:2] == ["short", ""]
        and lines[-1] == "x" + "y" * 90
        and all(len(line) <= 30 for line in lines[:-1])
    )
    assert all(line.startswith(" " * 11) for line in lines[3:-1]) and fitted(text, 1000) == text


class Full:
    """A recorder on a full disk."""

    def write(self, step, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    close = write


def test_a_full_disk_while_training_is_one_sentence():
    session = Session([Full()], [], lambda step, values: None, None, None)
    with pytest.raises(CheckpointError, match="the disk is full; what was saved before is kept"):
        session.record(1, "train", {"loss": 1.0})


def test_metrics_that_cannot_be_written_are_one_sentence(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with (
        pytest.raises(CheckpointError, match="cannot write .*metrics.jsonl"),
        open_recorders(tmp_path, 0),
    ):
        pass


def test_damaged_lines_of_metrics_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(
        b'{"step": 1, "a": 1.0}\n\xff\xfe\n['
        + b"[" * 100_000
        + b'\n{"step": 2, "a": 1.0}\n{"step": 3, "a'
    )
    with open_recorders(tmp_path, 2):
        pass
    assert (
        "2 lines of" in caplog.text
        and file.read_bytes() == b'{"step": 1, "a": 1.0}\n{"step": 2, "a": 1.0}\n'
    )
