"""Eight devices compute what one does, under a mesh and pmap, also with batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from compress_jax.core import NoMatchError, ShapeError, at, identity, leafwise, straight_through
from compress_jax.distill import Teacher, mse, on_logits
from compress_jax.models import LeNet300100, ResNet
from compress_jax.train import (
    create,
    distillation,
    jit_step,
    label_optimizer,
    make_step,
    place,
    pmap_step,
    replicate,
    shardings,
    supervised,
    unreplicate,
)

RULES = [("dense_*/kernel", P(None, "data")), ("dense_0/bias", P("data"))]


def rounding():
    """Round to a learned grid, under a mask of the values above the mean of squares."""

    def init(x, key):
        return jnp.ones((), x.dtype), jnp.ones(x.shape, bool)

    def view(x, scale, mask):
        return mask.astype(x.dtype) * scale * straight_through(lambda x: jnp.round(x * 16) / 16)(x)

    def update(x, scale, mask, *, step, grad, stats, key):
        return scale, jnp.abs(x) > 0.1 * jnp.abs(x).max()

    return at("**/kernel", leafwise(view, init=init, update=update))


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def batches(count, size, dtype=np.float32, n=16):
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(n, size, size, 1)).astype(dtype) for _ in range(count)]
    return [{"image": image, "label": rng.integers(0, 10, n)} for image in images]


def run(step, state, feed, **kwargs):
    for batch in feed:
        state, metrics = step(state, batch, **kwargs)
    return state, metrics


def assert_close(actual, wanted, atol):
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(wanted), strict=True
    ):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path)
        )


def setup(model, size, dtype=jnp.float32):
    optimizer = label_optimizer(optax.adam(1e-3), optax.sgd(1e-3))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 1)))
    variables = jax.tree.map(lambda x: x.astype(dtype), variables)
    return optimizer, lambda: create(variables, rounding(), optimizer, jax.random.key(1))


@pytest.mark.slow
@pytest.mark.parametrize("rules", [[], RULES])
def test_lenet_in_float32(rules):
    model, feed = LeNet300100(hidden=(16, 8)), batches(3, 4)
    optimizer, new = setup(model, 4)
    step = make_step(supervised(model), optimizer, rounding())
    alone, metrics = run(jax.jit(step), new(), feed)
    placed = place(new(), mesh(), rules)
    assert placed.params["dense_0"]["kernel"].sharding.spec == (P(None, "data") if rules else P())
    together, same = run(jit_step(step, mesh(), placed, rules=rules), placed, feed)
    assert_close(together, alone, 1e-6)
    assert_close(same, metrics, 1e-6)
    assert (
        together.params["dense_0"]["kernel"].sharding
        == shardings(new(), mesh(), rules).params["dense_0"]["kernel"]
    )
    mapped, same = run(pmap_step(step), replicate(new()), feed)
    assert_close(unreplicate(mapped), alone, 1e-6)
    assert_close(unreplicate(same), metrics, 1e-6)
    for a in jax.tree.leaves(mapped.params):
        np.testing.assert_array_equal(
            a, np.broadcast_to(a[:1], a.shape)
        )  # no device drifts from the others


@pytest.mark.slow
def test_resnet_with_batch_norm_in_float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # flax's BatchNorm promotes
        model, feed = ResNet(8, 2, dtype=jnp.float64), batches(4, 8, np.float64)
        optimizer, new = setup(model, 8, jnp.float64)
        step = make_step(supervised(model), optimizer, rounding())
        alone, metrics = run(jax.jit(step), new(), feed)
        start = place(new(), mesh())
        together, same = run(jit_step(step, mesh(), start), start, feed)
        assert_close((together, same), (alone, metrics), 1e-12)
        step = make_step(supervised(model.clone(axis_name="data")), optimizer, rounding())
        mapped, same = run(pmap_step(step), replicate(new()), feed)
        assert_close((unreplicate(mapped), unreplicate(same)), (alone, metrics), 1e-12)


def test_whatever_shadows_a_parameter_lives_where_it_does():
    _, new = setup(LeNet300100(hidden=(16, 8)), 4)
    where = shardings(new(), mesh(), RULES)
    pairs = jax.tree.leaves_with_path(
        jax.tree.map(lambda s: s.spec, where), is_leaf=lambda x: isinstance(x, P)
    )
    specs = {jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in pairs}
    kernels = {name: spec for name, spec in specs.items() if "dense_0/kernel" in name}
    assert len(kernels) == 5  # the parameter, its mask, its learned scale, and Adam's two moments
    assert {name for name, spec in kernels.items() if spec == P()} == {
        "learned/0/dense_0/kernel"
    }  # a scalar
    assert all(
        spec == P() for name, spec in specs.items() if "head" in name or "dense_1/bias" in name
    )


@pytest.mark.slow
def test_augmentation_is_the_same_for_any_sharding_of_the_batch():
    model, feed = LeNet300100(hidden=(8,)), batches(2, 4)

    def augment(key, batch):
        return {**batch, "image": batch["image"] + jax.random.normal(key, batch["image"].shape)}

    optimizer, new = setup(model, 4)
    step = make_step(supervised(model, augment=augment), optimizer, rounding())
    start = place(new(), mesh())
    assert_close(
        run(jit_step(step, mesh(), start), start, feed), run(jax.jit(step), new(), feed), 1e-6
    )


@pytest.mark.slow
def test_under_pmap_devices_draw_their_own_noise_but_the_same_masks():
    def loss(params, model_state, batch, key, teacher, train=True):
        return params["w"].sum(), (model_state, {"noise": jax.random.uniform(key)})

    compression = leafwise(
        lambda x, learned, fixed: x * fixed,
        init=lambda x, key: (None, jnp.ones_like(x)),
        update=lambda x, learned, fixed, *, step, grad, stats, key: (
            None,
            jax.random.uniform(key, x.shape),
        ),
        key=jax.random.key(5),
    )
    state = create({"params": {"w": jnp.ones(4)}}, compression, optax.sgd(0.1), jax.random.key(0))
    step = make_step(loss, optax.sgd(0.1), compression)
    mapped, metrics = pmap_step(step)(replicate(state), np.zeros((8, 1), np.float32))
    alone, alone_metrics = jax.jit(step)(state, np.zeros((8, 1), np.float32))
    assert_close(unreplicate(mapped).fixed, alone.fixed, 0.0)
    assert (
        abs(float(metrics["noise"][0]) - float(alone_metrics["noise"])) > 1e-6
    )  # a mean of eight draws


@pytest.mark.slow
def test_the_state_is_donated_and_neither_its_original_nor_the_teacher_are():
    model, feed = LeNet300100(hidden=(8,)), batches(2, 4)
    optimizer, new = setup(model, 4)
    original = new()
    teacher = Teacher(model.apply, original.variables())
    teacher = jax.device_put(teacher, jax.sharding.NamedSharding(mesh(), P()))
    step = make_step(distillation(model, [on_logits(mse)]), optimizer, rounding())
    placed = place(original, mesh())
    run(jit_step(step, mesh(), placed), placed, feed, teacher=teacher)
    assert placed.params["head"]["kernel"].is_deleted()
    copies = replicate(original)
    run(pmap_step(step), copies, feed, teacher=replicate(teacher))
    assert copies.params["head"]["kernel"].is_deleted()
    for leaf in jax.tree.leaves((original, teacher)):
        assert not leaf.is_deleted()


def test_both_compile_once():
    traces = []

    def loss(params, model_state, batch, key, teacher, train=True):
        traces.append(1)
        return jnp.square(params["w"] - batch).mean(), (model_state, {})

    step = make_step(loss, optax.adam(0.1), identity())
    state = create({"params": {"w": jnp.zeros(())}}, identity(), optax.adam(0.1), jax.random.key(0))
    for compiled, start in (
        (jit_step(step, mesh(), state), place(state, mesh())),
        (pmap_step(step), replicate(state)),
    ):
        del traces[:]
        before = jax.tree.map(lambda x: x.sharding, start)
        end, _ = run(compiled, start, 5 * [np.ones(8, np.float32)])
        assert len(traces) == 1
        assert all(
            jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b, end, before))
        )  # else a second compilation


@pytest.mark.slow
def test_what_cannot_be_divided_is_named():
    _, new = setup(LeNet300100(hidden=(12, 8)), 4)
    with pytest.raises(
        ShapeError, match=r"dense_0/kernel has shape \(16, 12\); 12 cannot be divided evenly over 8"
    ):
        shardings(new(), mesh(), [("**/kernel", P(None, "data"))])
    with pytest.raises(ShapeError, match="too few axes"):
        shardings(new(), mesh(), [("**/bias", P(None, "data"))])
    with pytest.raises(NoMatchError, match="dense_0/kernel"):
        shardings(new(), mesh(), [("conv/*", P("data"))])
    optimizer, new = setup(LeNet300100(hidden=(8,)), 4)
    step = make_step(supervised(LeNet300100(hidden=(8,))), optimizer, rounding())
    (odd,) = batches(1, 4, n=15)
    with pytest.raises(ShapeError, match=r"15.* over 8"):
        jit_step(step, mesh(), new())(place(new(), mesh()), odd)
    with pytest.raises(ShapeError, match=r"15.* over 8"):
        pmap_step(step)(replicate(new()), odd)
