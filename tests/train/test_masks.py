"""Masked means do not depend on how a batch is spread over microbatches and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax import distill as d
from compress_jax.core.errors import ArgumentError, ConfigError, ShapeError
from compress_jax.quantize import static
from compress_jax.train import (
    _evaluate,
    create,
    distillation,
    make_step,
    pmap_step,
    quantized,
    replicate,
    supervised,
)


class LM(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(7, name="head")(nn.tanh(nn.Dense(4, name="mid")(nn.Embed(7, 4)(x))))


MODEL, ROWS, LONG = LM(), 8, 5
X = jax.random.randint(jax.random.key(3), (ROWS, LONG), 1, 7)
MASK = jnp.arange(LONG)[None] < jnp.array([5, 1, 1, 2, 5, 0, 1, 1])[:, None]
BATCH = {"tokens": X, "label": X, "mask": MASK}
VARIABLES, OTHER = (MODEL.init(jax.random.key(i), X) for i in (1, 0))
TEACHER = d.Teacher(d.capture(MODEL, ("mid",)), OTHER)
TERMS = [d.on_labels(0.5), d.on_logits(d.kl, 0.25), d.on_features(d.hint, "mid", "mid", 2.0)]
LOSS = distillation(MODEL, TERMS, inputs="tokens")
PLAIN = supervised(MODEL, inputs="tokens")
TAUGHT = distillation(MODEL, [d.on_logits(d.hinton(0.5), labels=True)], inputs="tokens")
C = cj.at("**/kernel", cj.prune.magnitude(optax.linear_schedule(0.0, 0.5, 4)))
LOSSES = {
    "distillation": (LOSS, TEACHER),
    "supervised": (PLAIN, None),
    "hinton": (TAUGHT, d.Teacher(MODEL.apply, OTHER)),
}


def run(name, microbatches=1, devices=None, steps=2, batch=BATCH):
    loss, teacher = LOSSES[name]
    aux = (
        loss.init(jax.random.key(2), VARIABLES, batch, teacher)
        if name == "distillation"
        else ({}, {})
    )
    optimizer = optax.sgd(optax.linear_schedule(1.0, 0.1, 2), momentum=0.5)
    state = create(VARIABLES, C, optimizer, jax.random.key(0), aux)
    step = make_step(loss, optimizer, C, microbatches=microbatches)
    if devices:
        step = pmap_step(step, jax.devices()[:devices])
        state, teacher = (replicate(each, jax.devices()[:devices]) for each in (state, teacher))
    else:
        step = jax.jit(step)
    for _ in range(steps):
        state, metrics = step(state, batch, teacher=teacher)
    first = (lambda x: x[0]) if devices else (lambda x: x)
    return jax.tree.map(first, (state.params, state.fixed, state.parts, state.step)), jax.tree.map(
        first, metrics
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_and_devices_take_the_step_of_the_whole_batch(name):
    (whole, metrics) = run(name)
    assert int(whole[-1]) == 2
    spreads = [{"microbatches": 2, "devices": 2}, {"microbatches": 4}, {"devices": 4}]
    for spread in spreads if name == "distillation" else spreads[:1]:
        state, found = run(name, **spread)
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        for key in metrics:
            np.testing.assert_allclose(found[key], metrics[key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.slow
def test_metrics_are_of_what_counts():
    _, metrics = run("distillation", steps=1)
    logits, counts = MODEL.apply(VARIABLES, X), np.asarray(MASK)
    np.testing.assert_allclose(
        metrics["accuracy"], (logits.argmax(-1) == X)[counts].mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["labels"], d.cross_entropy(logits, X)[counts].mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["kl"], d.kl(logits, MODEL.apply(OTHER, X))[counts].mean(), rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_padding_decides_nothing(name):
    loss, teacher = LOSSES[name]
    padded = jnp.where(MASK, X, 0)

    def slopes(batch):
        if name == "distillation":
            parts, memory = loss.init(jax.random.key(2), VARIABLES, batch, teacher)
            return jax.grad(
                lambda p: loss.loss(
                    p, parts, {}, memory, batch, jax.random.key(0), teacher, jnp.int32(0)
                )[0]
            )(VARIABLES["params"])
        return jax.grad(lambda p: loss(p, {}, batch, jax.random.key(0), teacher)[0])(
            VARIABLES["params"]
        )

    one, other = (
        slopes({**BATCH, "tokens": x, "label": jnp.where(MASK, X, y)})
        for x, y in ((padded, -1), (X, -100))
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_a_loss_that_divides_too_early_is_refused():
    def mean(params, model_state, batch, key, teacher, train=True):
        each = d.cross_entropy(MODEL.apply({"params": params}, batch["tokens"]), batch["label"])
        return d.masked_mean(each, batch["mask"]), (model_state, {})

    def total(params, model_state, batch, key, teacher, train=True):
        each = d.cross_entropy(MODEL.apply({"params": params}, batch["tokens"]), batch["label"])
        return d.masked_total(each, batch["mask"]), (
            model_state,
            {"loss twice": d.masked_total(2 * each, batch["mask"])},
        )

    optimizer = optax.sgd(1.0)
    state = create(VARIABLES, cj.identity(), optimizer, jax.random.key(0))
    with pytest.raises(ArgumentError, match="Total"):
        make_step(mean, optimizer, cj.identity(), microbatches=2)(state, BATCH)
    one, metrics = make_step(mean, optimizer, cj.identity())(state, BATCH)
    two, found = make_step(total, optimizer, cj.identity(), microbatches=4)(state, BATCH)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one.params, two.params
    )
    np.testing.assert_allclose(
        [found["loss"], found["loss twice"] / 2], [metrics["loss"]] * 2, rtol=1e-5
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda o: o,
        lambda o: optax.chain(optax.clip(1.0), o),
        lambda o: cj.train.label_optimizer(o, o),
    ],
)
@pytest.mark.parametrize(
    "inner",
    [
        lambda: optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(),
        lambda: optax.apply_every(2),
    ],
)
def test_optimizers_that_accumulate_by_themselves_are_refused(inner, wrap):
    optimizer = wrap(inner())
    with pytest.raises(ArgumentError, match="microbatches=n"):
        create(VARIABLES, cj.identity(), optimizer, jax.random.key(0))


@pytest.mark.slow
def test_what_cannot_be_cut_or_found_is_named():
    with pytest.raises(ShapeError, match="3 microbatches"):
        run("supervised", microbatches=3)
    for wrong in (0, 1.5, True):
        with pytest.raises(ArgumentError, match="whole number from 1"):
            make_step(PLAIN, optax.sgd(1.0), C, microbatches=wrong)
    with pytest.raises(ConfigError, match="'msak'.*only"):
        supervised(MODEL, inputs="tokens", mask="msak")(
            VARIABLES["params"], {}, BATCH, jax.random.key(0), None
        )


@pytest.mark.slow
def test_moving_ranges_see_what_counts():
    model = quantized(MODEL, static(8, range="ema"))
    variables = model.init(jax.random.key(1), X)
    batch = {**BATCH, "tokens": jnp.where(MASK, X, 0)}
    loud = {
        **variables["params"],
        "Embed_0": {"embedding": variables["params"]["Embed_0"]["embedding"].at[0].set(1e3)},
    }
    _, (state, _) = supervised(model, inputs="tokens")(
        loud, {"quantization": variables["quantization"]}, batch, jax.random.key(0), None
    )
    highest = max(float(each["input"]["high"]) for each in state["quantization"]["ranges"].values())
    assert 0 < highest < 100
    calibrated = model.calibrate({"params": loud}, [batch["tokens"]], mask=[MASK])
    assert (
        max(float(each["input"]["high"]) for each in calibrated["quantization"]["ranges"].values())
        < 100
    )


@pytest.mark.slow
def test_accuracy_of_tokens_counts_what_counts():
    split = {"tokens": np.asarray(X), "label": np.asarray(X), "mask": np.asarray(MASK)}
    hits = (MODEL.apply(VARIABLES, X).argmax(-1) == X)[np.asarray(MASK)]
    for size in (3, 8):
        found = _evaluate.accuracy(
            MODEL.apply, VARIABLES, split, batch_size=size, inputs="tokens", mask="mask"
        )
        np.testing.assert_allclose(found, hits.mean(), rtol=1e-6)
    batches = [
        {k: v[i : i + 2, :n] for k, v in split.items()} for i, n in ((0, 5), (2, 3), (4, 5), (6, 2))
    ]

    def measure(variables, batch):
        logits = MODEL.apply(variables, batch["tokens"])
        return {"nats": d.masked_total(d.cross_entropy(logits, batch["label"]), batch["mask"])}

    found = _evaluate.averages(measure, VARIABLES, batches)["nats"]
    np.testing.assert_allclose(
        found, d.cross_entropy(MODEL.apply(VARIABLES, X), X)[np.asarray(MASK)].mean(), rtol=1e-5
    )
