import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from compress_jax.core import identity
from compress_jax.distill import Teacher, cast, hinton
from compress_jax.models import LeNet300100
from compress_jax.train.losses import distilled
from compress_jax.train.state import create
from compress_jax.train.step import make_step


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
    np.testing.assert_array_equal(teacher(INPUTS), model.apply(teacher.variables, INPUTS, train=False))
    np.testing.assert_allclose(teacher(INPUTS)[:4], teacher(INPUTS[:4]), atol=1e-6)  # other examples do not matter


def test_no_gradient_goes_through():
    teacher = teacher_of(Normed())
    to_teacher, to_inputs = jax.grad(lambda t, x: t(x).sum(), argnums=(0, 1))(teacher, INPUTS)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((to_teacher, to_inputs)))


def test_short_weights_drift_little_and_give_float32_logits():
    with jax.numpy_dtype_promotion("standard"):  # Linen's batch norm mixes its float32 statistics with bfloat16
        full, half = teacher_of(Normed()), teacher_of(Normed(dtype=jnp.bfloat16)).cast(jnp.bfloat16)
        drifted, exact = half(INPUTS), full(INPUTS)
    dtypes = {name: {leaf.dtype for leaf in jax.tree.leaves(tree)} for name, tree in half.variables.items()}
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


def test_a_student_learns_its_teachers_logits_in_the_training_step():
    student, optimizer = LeNet300100(classes=3, hidden=(16,)), optax.adam(0.01)
    teacher = teacher_of(Normed())
    loss = distilled(student, Teacher.__call__, hinton(alpha=0.0, temperature=2.0))
    state = create(student.init(jax.random.key(2), INPUTS), identity(), optimizer, jax.random.key(3))
    step = jax.jit(make_step(loss, optimizer, identity()), donate_argnums=0)
    batch = {"image": INPUTS, "label": jnp.zeros(16, jnp.int32)}
    before = jax.tree.map(jnp.copy, teacher)
    losses = []
    for _ in range(150):
        state, metrics = step(state, batch, teacher=teacher)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.02 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, teacher, before)
