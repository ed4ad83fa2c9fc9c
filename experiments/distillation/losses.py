"""Every public loss of `compress_jax.distill`.

Formula and paper from its docstring, and the test that holds it to them.

python experiments/distillation/losses.py

writes losses.md beside this file; tests/distill/test_losses_table.py fails if a loss has no row or
the file is not this.
"""

import inspect
import re
from pathlib import Path

from compress_jax import distill

FILE = Path(__file__).parent / "losses.md"
VALUES, RELATIONS = (
    "test_features.py::test_values_are_the_references",
    "test_relations.py::test_values_are_the_references",
)

EVIDENCE = {
    "cross_entropy": "test_logits.py::test_mse_and_cross_entropy_against_float64",
    "kl": "test_logits.py::test_kl_is_scipys_relative_entropy",
    "hinton": "test_logits.py::test_hinton_mixes_labels_and_teacher",
    "mse": "test_logits.py::test_mse_and_cross_entropy_against_float64",
    "hard_label": "test_logits.py::test_hard_labels_are_the_teachers_predictions",
    "reverse_kl": "test_divergences.py::test_reverse_kl_is_kl_with_roles_swapped",
    "jsd": "test_divergences.py::test_half_is_scipys_jensen_shannon",
    "total_variation": "test_divergences.py::test_total_variation_is_half_the_sum_and_bounds_by_pinsker",  # noqa: E501
    "dkd": "test_decoupled.py::test_it_is_the_papers_formula",
    "dist": "test_dist.py::test_it_is_pearsons_correlation_of_rows_and_columns",
    "standardize": "test_transforms.py::test_standardised_logits_are_z_scores",
    "virtual_teacher": "test_transforms.py::test_a_virtual_teacher_is_a_smoothed_label",
    "ensemble": "test_transforms.py::test_an_ensemble_is_the_mean_of_probabilities",
    "ensembled": "../train/test_distillation.py::test_weights_and_several_teachers_and_masks",
    "averaged": "test_transforms.py::test_averaged_weighs_losses_and_hands_on_labels",
    "top_k_kl": "test_top_k.py::test_it_is_kl_over_k_plus_one_buckets",
    "chunked_kl": "test_chunked.py::test_values_and_gradients_are_those_of_the_naive_form",
    "chunked_hinton": "test_chunked.py::test_hinton_shares_the_pass_with_the_labels",
    "hint": VALUES,
    "attention": VALUES,
    "fsp": VALUES,
    "ft": VALUES,
    "nst": VALUES,
    "vid": VALUES,
    "ab": VALUES,
    "ofd": VALUES,
    "review": VALUES,
    "mgd": "test_features.py::test_mgd_hides_whole_positions_and_as_many_as_it_should",
    "rkd": RELATIONS,
    "rkd_distance": RELATIONS,
    "rkd_angle": RELATIONS,
    "similarity": RELATIONS,
    "pkt": RELATIONS,
    "cc": RELATIONS,
    "ickd": RELATIONS,
    "cka_loss": RELATIONS,
    "crd": "test_contrastive.py::test_crd_is_the_papers_loss",
    "l2_sp": "test_weights.py::test_half_the_squared_distance_over_all_leaves",
}


def formula(doc: str) -> str:
    """Return the first sentence of the docstring's second paragraph, where the formula is."""
    paragraph = " ".join(doc.split("\n\n")[1].split())
    code = re.sub(r"``.*?``", lambda found: "x" * len(found.group()), paragraph)
    end = re.search(r"\.(\s|$)|: (?!x)", code)
    return paragraph[: end.start() if end else None].replace("``", "`").replace("|", "\\|").strip()


def papers(doc: str) -> str:
    """Return the references."""
    if "References:" not in doc:
        return ""
    entries = re.split(
        r"(?<=\.)\n", doc.split("References:")[1].strip()
    )  # each ends with a full stop
    return "; ".join(" ".join(entry.split()).rstrip(".") for entry in entries)


def table() -> str:
    """Return the file's text."""
    lines = [
        "# The losses of compress_jax.distill",
        "",
        f"Written by `{Path(__file__).name}` from the docstrings. Tests are in tests/distill.",
    ]
    lines += ["", "| loss | what it is | paper | held to it by |", "|---|---|---|---|"]
    for name, test in EVIDENCE.items():
        doc = inspect.getdoc(getattr(distill, name)) or ""
        lines.append(f"| `{name}` | {formula(doc)} | {papers(doc)} | `{test}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(table())
