"""Metrics files hold what was written, and after a resume nothing of the future."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from compress_jax.train import JsonLines, TensorBoard, progress


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_is_on_disk_before_the_next_is_written(tmp_path):
    writer = JsonLines(tmp_path / "deep" / "metrics.jsonl")
    for step in (1, 2):
        writer.write(step, {"loss": np.float32(0.5), "bad": float("nan")})
        assert lines(tmp_path / "deep" / "metrics.jsonl")[-1] == {
            "step": step,
            "loss": 0.5,
            "bad": None,
        }
    writer.close()


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30
)
@given(cut=st.integers(0, 200), resume=st.integers(0, 12))
def test_a_resumed_file_is_that_of_an_uninterrupted_run_wherever_it_was_cut(tmp_path, cut, resume):
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)

    def run(start, stop):
        writer = JsonLines(path, start)
        for step in range(start + 1, stop + 1):
            writer.write(step, {"loss": 1 / step})
        writer.close()

    run(0, 10)
    whole = path.read_bytes()
    complete = whole[:cut].count(b"\n")
    path.write_bytes(whole[:cut])
    run(min(resume, complete), 10)  # a checkpoint is never newer than the metrics before it
    assert path.read_bytes() == whole


def test_lines_that_are_not_ours_are_dropped_when_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[]\n{"loss": 2}\nnonsense\n\n{"step": 2}\n')
    JsonLines(path, 5).close()
    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_tensorboard_writes_an_event_file(tmp_path):
    writer = TensorBoard(tmp_path)
    writer.write(3, {"train/loss": 0.25})
    writer.close()
    (path,) = tmp_path.glob("events*")
    content = path.read_bytes()
    assert b"train/loss" in content and np.float32(0.25).tobytes() in content


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_title_steps_and_values(terminal, tmp_path):
    with (tmp_path / "out").open("w+") as file:
        with progress(
            "teaching",
            20,
            5,
            console=Console(file=file, force_terminal=terminal, width=200),
            seconds=0,
        ) as report:
            for step in range(6, 21):
                report(step, {"loss": 0.125} if step % 10 == 0 else {})
        file.seek(0)
        shown = file.read()
    assert "teaching" in shown and "20/20" in shown and "loss 0.125" in shown
    assert terminal or shown == "teaching 10/20: loss 0.125\nteaching 20/20: loss 0.125\n"
