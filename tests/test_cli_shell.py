"""The command line as a shell sees it: closed pipes, full disks, narrow terminals."""

import errno
import io
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import compress_jax as cj
from compress_jax.cli import main
from compress_jax.cli.console import _Console, fitted
from compress_jax.core import CheckpointError
from compress_jax.train._loop import Session, open_recorders


@pytest.mark.wide(1)
@pytest.mark.parametrize("words", [["inspect"], ["--help"], ["report", "--help"]])
def test_a_closed_pipe_is_quiet_and_has_an_exit_code_of_its_own(words: list[str], tmp_path: Path):
    if words == ["inspect"]:  # which prints by rich
        cj.save(tmp_path / "x.safetensors", {"params": {"w": np.ones(4, np.float32)}})
        words = [*words, str(tmp_path / "x.safetensors")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "compress_jax.cli", *words], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_output_that_the_shell_has_closed_goes_nowhere(monkeypatch: pytest.MonkeyPatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["inspect", "--help"]) == 0
    assert main(["inspect", "/no/such/file"]) == 1
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.parametrize(
    "command",
    [[], ["run"], ["eval"], ["export"], ["inspect"], ["report"], ["plan"], ["sweep"], ["compare"]],
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


def test_paragraphs_of_a_help_text_are_whole_and_commands_stay_lines(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "differ in nothing but --by are one group; of each group the mean" in shown
    assert "\n\n  compress-jax compare runs/digits-sweep\n  compress-jax compare runs" in shown
    assert "\n\n\n" not in shown


def test_a_terminal_gets_lines_wrapped_at_words_and_a_file_gets_them_whole():
    text = "error: this is a sentence of more than twenty letters in /a/path/that/is/long"
    lines = {}
    for terminal in (True, False):
        console = _Console(
            force_terminal=terminal, width=20, file=io.StringIO(), soft_wrap=True, highlight=False
        )
        console.print(text)
        lines[terminal] = console.file.getvalue().splitlines()
    assert lines[False] == [text]
    assert len(lines[True]) > 3 and " ".join(lines[True]) == text
    assert all(len(line) <= 20 for line in lines[True][:-1])


def test_the_version_says_what_is_installed(capsys):
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"compress_jax {cj.__version__}"
    for package in ("jax", "jaxlib", "flax", "optax", "numpy"):
        assert f"{package} {version(package)}" in lines
    assert any(line.startswith(f"python {platform.python_version()}") for line in lines)
    assert lines[-1].startswith("backends: cpu")


@pytest.mark.slow
def test_the_version_starts_no_backend():
    # To use this platform is an error.
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    words = [sys.executable, "-m", "compress_jax.cli", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and "no_such_platform" in done.stdout


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
