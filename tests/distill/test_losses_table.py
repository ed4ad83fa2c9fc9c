"""The table of losses is complete, up to date, and every test it names exists."""

import re
import runpy
from pathlib import Path

import pytest

from compress_jax import distill

SCRIPT = Path(__file__).parents[2] / "experiments/distillation/losses.py"
NO_LOSSES = set(
    "Adapter Bank Cache CachedFeed CalibrationBins Drift LossContext Objective Schedule Teacher "
    "Teachers Term "
    "TopK Total activation "
    "agreement buckets by_example calibration calibration_error capture cast cka contrast conv "
    "crd_bank crd_negatives "
    "crd_update deconv drift embedding fingerprint fusion gaussian generate generator hexadecimal "
    "linear masked_mean "
    "masked_total next_tokens norm ofd_margin on_features on_labels on_logits on_policy "
    "on_weights open_cache paraphraser "
    "pool on_vocabulary projector require_same resize_features sequential token_total "
    "top_k translator "
    "write_cache".split()
)


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_every_public_name_is_a_loss_with_a_row_or_none(script):
    assert set(distill.__all__) == set(script["EVIDENCE"]) | NO_LOSSES
    assert not set(script["EVIDENCE"]) & NO_LOSSES


def test_the_tests_it_names_exist(script):
    for test in script["EVIDENCE"].values():
        file, name = test.split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), test


def test_the_file_is_what_the_script_writes_with_a_formula_and_a_paper_in_each_row(script):
    text = script["table"]()
    assert SCRIPT.with_name("losses.md").read_text() == text, (
        "run python experiments/distillation/losses.py"
    )
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(script["EVIDENCE"])
    assert all("`" in row[2] and re.search(r"(19|20)\d\d", row[3]) for row in rows)
