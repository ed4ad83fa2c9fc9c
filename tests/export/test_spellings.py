"""However an operation is spelled, its ONNX file is right or an ExportError says why not.

A few spellings by default.
"""

import importlib.util
import sys
from pathlib import Path

import jax
import pytest

for package in ("onnx", "onnxruntime", "jax2onnx"):
    pytest.importorskip(package, reason="needs pip install 'compress_jax[onnx]'")
pytestmark = pytest.mark.filterwarnings("ignore")

SCRIPT = Path(__file__).parents[2] / "experiments/faults/spellings.py"
STATIC_LEFT = {  # spellings that have sites without an integer kernel, and what is said of them
    "linen: ConvTranspose": "transposed convolutions",
    "jax: einsum of experts": "a batch of weights",
    "jax: layers in a scan": "inside a loop",
}
REFUSED = {
    "linen: DenseGeneral with batch axes": "batch='example'"
}  # JAX itself cannot trace it at any batch size
ALWAYS = (  # one of each kind; the others are slow by their number
    "linen: max_pool(x, (2, 2), strides=(2, 2))",
    "linen: avg_pool(..., count_include_pad=False)",
    "jax: reduce_window min",
    "jax: reduce_window max over 3 axes",
    "haiku: max_pool(x, 2, 2, 'VALID')",
    "nnx: Dropout",
    "linen: ConvTranspose(transpose_kernel=True)",
)


def loaded():
    spec = importlib.util.spec_from_file_location("spellings", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


SPELLINGS = loaded()
names = [
    pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow, id=name)
    for name in SPELLINGS.SPELLINGS
]


@pytest.fixture(autouse=True)
def as_users_write():
    """Other packages promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def result(name, static, folder):
    package = SPELLINGS.PACKAGES[name.partition(":")[0]]
    pytest.importorskip(package)
    return SPELLINGS.outcome(name, static, folder)


def test_there_are_enough_spellings_of_each_package():
    count = {
        prefix: sum(name.startswith(f"{prefix}:") for name in SPELLINGS.SPELLINGS)
        for prefix in SPELLINGS.PACKAGES
    }
    assert sum(count.values()) >= 150 and all(n >= 10 for n in count.values()), count


@pytest.mark.parametrize("name", names)
def test_a_spelling_is_written_and_right(name, tmp_path):
    kind, details = result(name, False, tmp_path)
    if name in REFUSED:
        assert kind == "refused" and REFUSED[name] in details
    else:
        assert kind == "written", details


@pytest.mark.slow
@pytest.mark.parametrize("name", SPELLINGS.SPELLINGS)
def test_in_integers_nothing_is_left_without_a_reason(name, tmp_path):
    kind, details = result(name, True, tmp_path)
    assert kind in ("written", "refused"), details
    if name in STATIC_LEFT:
        assert STATIC_LEFT[name] in details
