"""After its training no device holds a divided network whole; its results are those of one."""

import gc

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import compress_jax as cj
from compress_jax.search._divided import beside, divided, from_file, measured, rules_of
from compress_jax.search._stage import Stage, train

RULES = (("dense_*/kernel", P("fsdp")),)
LARGE = 4096  # entries: the kernels that the rules divide


def spied(seen):
    """Return a task whose metric notes, while it is computed, where large new arrays live."""
    before = jax.live_arrays()  # those that other tests of this process keep

    def sums(out, labels, counts):
        gc.collect()
        old = {id(array) for array in before}
        for array in jax.live_arrays():
            if id(array) in old:
                continue
            if array.ndim == 2 and array.size >= LARGE and array.dtype == np.float32:
                seen.append((array.shape, [x.data.shape for x in array.addressable_shards]))
        return np.array([(out.argmax(-1) == labels)[counts > 0].sum(), (counts > 0).sum()])

    spy = cj.tasks.accuracy()._replace(name="spied", sums=sums, on_host=True)
    return cj.tasks.classification(metrics=(cj.tasks.accuracy(), spy))


def experiment(rules, mesh, task, method):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, 200)
    image = rng.normal(size=(200, 8, 8, 1)).astype(np.float32)
    image[np.arange(200), label, label, 0] += 3
    training = cj.search.Training(optax.adam(3e-3), 6, batch_size=16)
    network = cj.search.Network(cj.models.LeNet300100(4, (128, 64)), training, rules=rules)
    return cj.search.Experiment(
        "divided",
        cj.data.Data.from_arrays({"image": image, "label": label}),
        network,
        (cj.search.Candidate("small", cj.at("dense_*/kernel", method), training),),
        cj.search.Requirement(max_drop=0.9),
        teacher=network,
        loss=cj.tasks.classification().distillation(alpha=0.5),
        mesh=mesh,
        task=task,
        longer_student=False,
    )


def test_a_divided_training_ends_in_host_memory(tmp_path):
    setup = experiment(RULES, cj.train.make_mesh(fsdp=8), cj.tasks.classification(), cj.identity())
    short = cj.search.Training(optax.sgd(0.1), 1, batch_size=16)
    prune = cj.at("dense_*/kernel", cj.prune.magnitude(0.5))
    stage = Stage("short", setup.student.pure, short, compression=prune, rules=RULES)
    (tmp_path / "checkpoints").mkdir()  # begun before: its gradients are not compared again
    state = train(setup, stage, tmp_path)
    # Rather than on one device: NumPy's, params and masks both.
    own = jax.tree.leaves((state.params, state.fixed))
    assert len(own) > 4 and all(isinstance(leaf, np.ndarray) for leaf in own)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        cj.chain(cj.prune.magnitude(0.5), cj.quantize.uniform(4, granularity=16)),
        cj.lowrank.svd(8),
    ],
    ids=["pruned", "lowrank"],
)
def test_no_device_holds_a_divided_network_while_it_is_measured(tmp_path, method):
    seen = []
    over = experiment(RULES, cj.train.make_mesh(fsdp=8), spied(seen), method)
    ours = cj.search.compress(over, tmp_path / "divided", log_fn=lambda line: None)
    assert {shape for shape, _ in seen} == {(64, 128), (128, 64)}
    for shape, shards in seen:
        assert shards == [(shape[0] // 8, shape[1])] * 8
    one = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    alone = experiment((), one, spied([]), method)
    whole = cj.search.compress(alone, tmp_path / "whole", log_fn=lambda line: None)
    for a, b in zip(ours.rows, whole.rows, strict=True):
        assert a.nbytes == pytest.approx(b.nbytes, rel=0.01)
        assert a.validation == pytest.approx(b.validation, abs=0.05)  # one answer of 20
        assert a.metrics["validation"]["spied"] == a.metrics["validation"]["accuracy"]


def test_divided_metrics_are_those_of_one_device_and_batches_may_be_ragged(tmp_path):
    setup = experiment(RULES, cj.train.make_mesh(fsdp=8), cj.tasks.classification(), cj.identity())
    model = setup.student.pure
    variables = model.init(jax.random.key(0), *(np.zeros(x.shape, x.dtype) for x in setup.example))
    file = tmp_path / "network.safetensors"
    cj.save(file, variables)
    split = {name: x[:13] for name, x in setup.data.train.items()}  # 13 rows over 8 devices
    ours = measured(setup, model.apply, divided(setup, variables, RULES), split)
    again = measured(setup, model.apply, from_file(setup, file, RULES), split)
    assert ours == again  # the digest of all bits too
    whole = measured(setup, model.apply, variables, split)
    assert ours.values == whole.values


def test_rules_that_divide_nothing_leave_variables_where_they_are(tmp_path):
    setup = experiment((), cj.train.make_mesh(), cj.tasks.classification(), cj.identity())
    variables = {"params": {"w": np.ones((8, 8), np.float32)}}
    assert divided(setup, variables, ()) is variables
    file = tmp_path / "w.safetensors"
    cj.save(file, variables)
    assert len(from_file(setup, file, (("w", P("tensor")),))["params"]["w"].devices()) == 1
    with beside(setup, variables, ()):
        assert jax.config.jax_default_device is None
    assert rules_of(setup, setup.candidates[0]) == ()
