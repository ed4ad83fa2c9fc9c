from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

import compress_jax as cj
from compress_jax.core import ShapeError, identity
from compress_jax.distill import (
    Teacher,
    Teachers,
    capture,
    cast,
    drift,
    fingerprint,
    hexadecimal,
    hinton,
    on_logits,
    resize_features,
)
from compress_jax.models import LeNet300100
from compress_jax.train import create, distillation, make_step


class Normed(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x)
        return nn.Dense(3, dtype=self.dtype)(x)


INPUTS = jax.random.normal(jax.random.key(1), (16, 5))


def teacher_of(model):
    return Teacher(model.apply, model.init(jax.random.key(0), INPUTS))


def test_logits_are_those_of_the_model_in_eval_mode():
    model, teacher = Normed(), teacher_of(Normed())
    np.testing.assert_array_equal(
        teacher(INPUTS), model.apply(teacher.variables, INPUTS, train=False)
    )
    np.testing.assert_allclose(
        teacher(INPUTS)[:4], teacher(INPUTS[:4]), atol=1e-6
    )  # other examples do not matter


def test_no_gradient_goes_through():
    teacher = teacher_of(Normed())
    to_teacher, to_inputs = jax.grad(lambda t, x: t(x).sum(), argnums=(0, 1))(teacher, INPUTS)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((to_teacher, to_inputs)))


@pytest.mark.slow
def test_short_weights_drift_little_and_give_float32_logits():
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # Linen's batch norm mixes its float32 statistics with bfloat16
        full, half = teacher_of(Normed()), teacher_of(Normed(dtype=jnp.bfloat16)).cast(jnp.bfloat16)
        drifted, exact = half(INPUTS), full(INPUTS)
    dtypes = {
        name: {leaf.dtype for leaf in jax.tree.leaves(tree)}
        for name, tree in half.variables.items()
    }
    assert dtypes == {"params": {jnp.dtype(jnp.bfloat16)}, "batch_stats": {jnp.dtype(jnp.float32)}}
    assert drifted.dtype == jnp.float32
    np.testing.assert_allclose(drifted, exact, atol=0.03 * float(jnp.abs(exact).max()))
    assert (drifted != exact).any()


def test_cast_leaves_integers_and_keys():
    tree = {"w": jnp.ones(2), "n": jnp.array(1), "key": jax.random.key(0)}
    after = cast(tree, jnp.float16)
    assert after["w"].dtype == jnp.float16
    assert all(after[name].dtype == tree[name].dtype for name in ("n", "key"))


def test_teachers_of_one_model_share_a_compiled_step():
    traces = []

    @jax.jit
    def logits(teacher, x):
        traces.append(None)
        return teacher(x)

    model = Normed()
    first, second = teacher_of(model), teacher_of(model)
    second = jax.tree.map(lambda leaf: 2 * leaf, second)
    assert (logits(first, INPUTS) != logits(second, INPUTS)).any()
    assert len(traces) == 1


def test_a_replicated_teacher_serves_sharded_batches():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    teacher = teacher_of(Normed())
    everywhere = jax.device_put(teacher, NamedSharding(mesh, PartitionSpec()))
    batch = jax.device_put(INPUTS, NamedSharding(mesh, PartitionSpec("data")))
    logits = jax.jit(lambda teacher, x: teacher(x))(everywhere, batch)
    assert not logits.sharding.is_fully_replicated
    np.testing.assert_allclose(logits, teacher(INPUTS), atol=1e-6)


@pytest.mark.slow
def test_a_student_learns_its_teachers_logits_in_the_training_step():
    student, optimizer = LeNet300100(classes=3, hidden=(16,)), optax.adam(0.01)
    teacher = teacher_of(Normed())
    objective = hinton(alpha=0.0, temperature=2.0)
    loss = distillation(student, [on_logits(objective, labels=True)])
    state = create(
        student.init(jax.random.key(2), INPUTS), identity(), optimizer, jax.random.key(3)
    )
    step = jax.jit(make_step(loss, optimizer, identity()), donate_argnums=0)
    batch = {"image": INPUTS, "label": jnp.zeros(16, jnp.int32)}
    before = jax.tree.map(jnp.copy, teacher)
    losses = []
    for _ in range(150):
        state, metrics = step(state, batch, teacher=teacher)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.02 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, teacher, before)


@pytest.mark.slow
def test_a_teacher_of_8_bit_weights_stays_packed_and_drifts_little(tmp_path):
    model, full = Normed(), teacher_of(Normed())
    int8 = cj.at("**/kernel", cj.quantize.uniform(8, granularity="channel"))
    params = full.variables["params"]
    packed = {**full.variables, "params": int8.pack(params, int8.init(params))}
    cj.save(tmp_path / "teacher.safetensors", packed)
    stored, _ = cj.load(tmp_path / "teacher.safetensors")  # an artifact is a teacher as it is
    teacher = Teacher(model.apply, stored)
    moved = jax.jit(drift)(teacher, full, INPUTS)
    assert (
        0 < moved.largest < 0.05 * jnp.abs(full(INPUTS)).max()
        and moved.agreement == 1
        and moved.kl < 1e-3
    )
    largest = max(
        jax.tree.leaves(teacher.variables["params"]["Dense_0"]["kernel"]),
        key=lambda leaf: leaf.size,
    )
    assert largest.dtype == jnp.uint8
    assert hexadecimal(fingerprint(teacher)) == hexadecimal(
        fingerprint(Teacher(model.apply, packed))
    )
    assert hexadecimal(fingerprint(teacher)) != hexadecimal(fingerprint(full))


def test_the_hash_is_of_every_array_its_place_and_its_kind():
    trees = [{"a": jnp.ones(4)}, {"b": jnp.ones(4)}, {"a": jnp.ones((2, 2))}, {"a": jnp.ones(4, jnp.int32)},  # noqa: E501
             {"a": jnp.ones(4).at[3].set(2)}, {"a": jnp.ones(4), "b": jnp.ones(4)}]  # fmt: skip
    assert len({hexadecimal(fingerprint(tree)) for tree in trees}) == len(trees)
    assert hexadecimal(fingerprint({"a": np.ones(4, np.float32)})) == hexadecimal(
        fingerprint(trees[0])
    )


@pytest.mark.slow
def test_a_teacher_sees_its_own_resolution_and_several_are_stacked():
    half = Teacher(
        lambda v, x: x.reshape(len(x), -1) * v["w"],
        {"w": jnp.float32(2.0)},
        view=partial(resize_features, size=(2, 2)),
    )
    images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(half(images), [[5.0, 9.0, 21.0, 25.0]])
    assert half.cast(jnp.bfloat16).view is half.view
    both = Teachers(
        (half, Teacher(capture(LeNet300100(hidden=(3,)), ("dense_0",)), _variables(images)))
    )
    with pytest.raises(ShapeError, match=r"\(1, 4\), \(1, 10\)"):
        both(images)
    _, features = both.members[1].forward(images)
    assert features["dense_0"].shape == (1, 3)


@pytest.mark.parametrize(
    "old, new",
    [
        ("Part", "Adapter"),
        ("Seen", "LossContext"),
        ("Calibration", "CalibrationBins"),
        ("resize", "resize_features"),
    ],
)
def test_old_names_warn_and_still_work(old, new):
    with pytest.warns(DeprecationWarning, match=new):
        assert getattr(cj.distill, old) is getattr(cj.distill, new)
    assert old not in dir(cj.distill)


def test_old_arguments_and_methods_warn_and_still_work():
    with pytest.warns(DeprecationWarning, match="adapter="):
        term = cj.distill.on_features(cj.distill.hint, "a", "b", part=cj.distill.linear())
    assert term.name == "hint"
    teacher = Teacher(lambda v, x: x * v["w"], {"w": jnp.float32(2.0)})
    with pytest.warns(DeprecationWarning, match="forward"):
        logits, features = teacher.see(jnp.ones(3))
    assert logits.tolist() == [2.0] * 3 and not features
    with pytest.warns(DeprecationWarning, match="as_teacher"):
        assert cj.train.graduate is cj.train.as_teacher
    with pytest.warns(DeprecationWarning, match="aux="):
        state = create(
            {"params": {}}, identity(), optax.sgd(0.1), jax.random.key(0), beside=({}, {"a": 1})
        )
    assert int(state.memory["a"]) == 1
    with pytest.warns(DeprecationWarning, match="label_smoothing="):
        cj.train.supervised(LeNet300100(), smoothing=0.1)


def _variables(images):
    return LeNet300100(hidden=(3,)).init(jax.random.key(0), images)
