"""Any way to get smaller is a candidate: rewrites, smaller widths, other networks, chains."""

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import compress_jax as cj
from compress_jax.core import CompressError, ConfigError
from compress_jax.search import (
    Candidate,
    Experiment,
    Network,
    Requirement,
    Training,
    compress,
    quantize_activations,
    rewrite,
    shrink,
)
from compress_jax.search._method import rebuilt_model
from compress_jax.tasks import measure


class Nnx(nnx.Module):
    def __init__(self, width, rngs):
        self.a = nnx.Linear(6, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.a(x)))))


def linen(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(3)])


NETS = {
    "linen": linen,
    "nnx": lambda width: lambda rngs: Nnx(width, rngs),
    "equinox": lambda width: lambda key: eqx.nn.MLP(6, 3, width, 1, key=key),
}
TASK = cj.tasks.classification("x", "y")
T = Training(optax.adam(0.02), 40, batch_size=48)
NONE = Training(optax.adam(0.02), 0, batch_size=48)


def silent(line):
    pass


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)).astype(np.float32)
    return cj.data.Data.from_arrays({"x": x, "y": (x @ rng.normal(size=(6, 3))).argmax(-1)})


def experiment(data, kind, candidates, **changes) -> Experiment:
    usual = {"task": TASK, "order": "all", "requirement": Requirement(max_drop=0.9)}
    student = Network(NETS[kind](16), T)
    return Experiment("own", data, student, tuple(candidates), **{**usual, **changes})


def ways(kind):
    pattern = "**/weight" if kind == "equinox" else "**/kernel"
    int4 = cj.at(pattern, cj.quantize.uniform(4, granularity="channel"))
    int8 = cj.at(pattern, cj.quantize.uniform(8, granularity="channel"))
    halved = rewrite(cj.prune.sparsegpt, sparsity=0.5, pattern=pattern)
    return (
        Candidate("rounded", int4),
        Candidate("no steps", int4, NONE),
        Candidate("trained", int4, T),
        Candidate("gptq", rewrite(cj.quantize.gptq, int4)),
        Candidate("bias", (rewrite(cj.quantize.gptq, int4), rewrite(cj.quantize.correct_bias))),
        Candidate("sparse", (halved, rewrite(cj.quantize.gptq, int4))),
        Candidate("int8", (quantize_activations(cj.quantize.static(bits=8)), int8)),
        Candidate("narrow", (shrink(ratio=0.5), T, int8)),
        Candidate("small", (Network(NETS[kind](8), T), int8)),
    )  # fmt: skip


@pytest.fixture(scope="module", params=["linen", pytest.param("nnx", marks=pytest.mark.slow),
    pytest.param("equinox", marks=pytest.mark.slow)])  # fmt: skip
def run(request, data, tmp_path_factory):
    """A finished run of every way, for one framework: ``(experiment, folder, result)``."""
    folder = tmp_path_factory.mktemp("ways")
    whole = experiment(data, request.param, ways(request.param))
    return whole, folder, compress(whole, folder, log_fn=silent)


def test_every_way_is_tried_and_measured(run):
    whole, folder, result = run
    rows = {row.name: row for row in result.rows}
    assert list(rows)[0] == "student" and {each.name for each in whole.candidates} < set(rows)
    assert rows["rounded"].nbytes < rows["int8"].nbytes
    assert rows["rounded"].validation == rows["no steps"].validation
    assert all(rows[name].validation > 0.6 for name in rows)
    assert rows["narrow"].parameters < 0.7 * rows["student"].parameters
    assert rows["small"].parameters < 0.7 * rows["student"].parameters


def test_what_is_in_the_files_is_what_was_measured(run):
    """The model of each artifact is built anew, from the config and what the file says."""
    whole, folder, result = run
    for row in result.rows:
        file = folder / "candidates" / row.name / "artifact.safetensors"
        if row.name.startswith("student"):
            continue
        model = rebuilt_model(whole, file, row.name)
        variables = cj.unpack(cj.load(file)[0])
        found = measure(TASK, model.apply, variables, whole.data.validation).values["accuracy"]
        assert found == row.validation, row.name


def test_a_solver_after_another_keeps_its_zeros(run):
    _, folder, _ = run
    packed = cj.load(folder / "candidates" / "sparse" / "artifact.safetensors")[0]["params"]
    kernels = [x for x in jax.tree.leaves(cj.unpack(packed)) if x.ndim == 2]
    for kernel in kernels:
        assert np.mean(np.asarray(kernel) == 0) >= 0.5
        assert len(np.unique(np.asarray(kernel)[:, 0])) <= 16


def test_the_student_is_trained_on_as_the_chosen_one_was(data, tmp_path):
    """What the same training gives without compression is a row of its own."""
    int4 = cj.at("**/kernel", cj.quantize.uniform(4))
    whole = experiment(data, "linen", [Candidate("int4", int4, T)])
    result = compress(whole, tmp_path, log_fn=silent)
    student, longer, _ = result.rows
    assert longer.name == "student-longer" and longer.accepted is None
    assert longer.test is not None and abs(longer.nbytes - student.nbytes) < 64
    weights = [
        jax.tree.leaves(cj.load(tmp_path / f"{name}.safetensors")[0])
        for name in ("student", "student-longer")
    ]
    assert any((a != b).any() for a, b in zip(*weights, strict=True))


def test_without_training_nothing_is_trained_on(data, tmp_path):
    result = compress(experiment(data, "linen", ways("linen")[:1]), tmp_path, log_fn=silent)
    assert [row.name for row in result.rows] == ["student", "rounded"]


INT4 = cj.quantize.uniform(4)
WRONG = {
    "a function": (lambda: Candidate("x", cj.quantize.uniform), r"search.rewrite\(uniform\)"),
    "shrink": (lambda: Candidate("x", cj.prune.shrink), r"search.shrink\(ratio=0.5\)"),
    "nothing": (lambda: Candidate("x", ()), "at least one way"),
    "a network last": (
        lambda: Candidate("x", (INT4, Network(linen(4), T))),
        "a Network takes the student's place",
    ),
    "two trainings": (lambda: Candidate("x", (INT4, T), T), "two trainings after a Compression"),
    "a solver without a grid": (lambda: rewrite(cj.quantize.gptq), "gptq needs a compression"),
    "a fold with a grid": (
        lambda: rewrite(cj.quantize.fold_batch_norm, INT4),
        "takes no compression",
    ),
    "an option of no one": (
        lambda: rewrite(cj.quantize.gptq, INT4, dampening=1),
        "takes no dampening=",
    ),
    "an option of shrink": (lambda: shrink(ration=0.5), "takes no ration="),
    "no function": (lambda: rewrite("gptq"), "rewrite takes a function"),
}


@pytest.mark.parametrize("which", WRONG)
def test_what_is_no_way_to_get_smaller_is_refused(which):
    make, said = WRONG[which]
    with pytest.raises(CompressError, match=said):
        make()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ((INT4, rewrite(cj.quantize.equalize)), "equalize must come before"),
        ((rewrite(cj.quantize.correct_bias),), "nothing to correct"),
        ((INT4, rewrite(cj.quantize.awq, INT4)), "awq must come before"),
    ],
)
def test_an_order_that_cannot_work_is_refused(method, said, data, tmp_path):
    at = tuple(cj.at("**/kernel", each) if each is INT4 else each for each in method)
    with pytest.raises(ConfigError, match=said):
        compress(experiment(data, "linen", [Candidate("x", at)]), tmp_path, log_fn=silent)


def test_training_begins_at_the_scales_that_a_solver_chose(data, tmp_path):
    """Without a step of any size, what was solved is what is stored."""
    int3 = cj.at("**/kernel", cj.quantize.uniform(3))
    clipped = rewrite(cj.quantize.clip, int3)
    still = Training(optax.sgd(0.0), 3, batch_size=48)
    candidates = (
        Candidate("clipped", clipped),
        Candidate("clipped, still", clipped, still),
        Candidate("rounded", int3),
    )
    compress(experiment(data, "linen", candidates), tmp_path, log_fn=silent)
    stored = {
        name: jax.tree.leaves(cj.load(tmp_path / "candidates" / name / "artifact.safetensors")[0])
        for name in ("clipped", "clipped, still", "rounded")
    }
    pairs = zip(stored["clipped"], stored["clipped, still"], strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    # The test would not tell if clipping changed nothing.
    others = zip(stored["clipped"], stored["rounded"], strict=True)
    assert not all(np.array_equal(a, b) for a, b in others)


def test_what_a_solver_cannot_solve_for_is_said_before_anything_is_trained(data, tmp_path):
    odd = cj.at("**/kernel", cj.quantize.uniform(4, granularity=5))
    for solver in (cj.quantize.gptq, cj.layerwise.solve):
        bad = Candidate("bad", rewrite(solver, odd))
        with pytest.raises(CompressError, match="candidate 'bad': .*5"):
            compress(experiment(data, "linen", [bad]), tmp_path, log_fn=silent)
    assert not any(tmp_path.iterdir())
