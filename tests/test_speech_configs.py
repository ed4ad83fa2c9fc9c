"""The speech configs, with small data: what they build fits together and learns."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.models import Crepe

CONFIGS = Path(__file__).parents[1] / "configs"


def module(name):
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def learned(experiment, network, steps, rate=0.03):
    """Train a network on the task's labels, and return the loss before and after."""
    task = experiment.task
    model = network.pure
    batch = {name: jnp.asarray(x[:16]) for name, x in experiment.data.train.items()}
    variables = jax.jit(model.init)(jax.random.key(0), *task.inputs_of(batch))
    params = variables.pop("params")
    term = task.on_labels(1.0)
    assert term.weight == 1
    optimizer = optax.sgd(rate, momentum=0.9)

    @jax.jit
    def step(params, rest, state, key):
        augmented = network.training.augment(key, batch)

        def loss(params):
            out, _, new = model.train(params, rest, task.inputs_of(augmented), key, None)
            return label_loss(task, out, batch), new

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state, value

    state = optimizer.init(params)
    values = []
    for i in range(steps):
        params, variables, state, value = step(params, variables, state, jax.random.key(i))
        values.append(float(value))
    return values, {"params": params, **variables}


def label_loss(task, out, batch):
    labels = batch[task.labels]
    if task.logits:
        return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()
    return optax.sigmoid_binary_cross_entropy(out, labels[..., :-1]).mean()


def packs(experiment, variables):
    """Pack a network by every candidate's compression."""
    for candidate in experiment.candidates:
        for item in candidate.items:
            if isinstance(item, cj.Compression):
                state = item.init(variables["params"])
                packed = item.pack(variables["params"], state)
                jax.tree.map(
                    np.testing.assert_array_equal,
                    cj.unpack(packed),
                    item.view(variables["params"], state),
                )


def clips(n, seed):
    """Tones in place of words: a pitch for each label."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 12
    time = np.arange(16000) / 16000
    hz = 300 * 1.25 ** labels[:, None]
    sound = np.sin(2 * np.pi * hz * time) + 0.1 * random.normal(size=(n, 16000))
    return {"sound": (8000 * sound).astype(np.int16), "label": labels.astype(np.int32)}


@pytest.mark.slow
def test_keywords_learns_from_waveforms_and_its_candidates_fit(monkeypatch):
    made = module("keywords")
    data = cj.data.Data("clips", clips(48, 0), clips(24, 1), clips(24, 2), classes=12)
    monkeypatch.setattr(made, "keywords", lambda source, takes: data)
    experiment = made.config(teacher_steps=4, student_steps=4, candidate_steps=4)
    assert experiment.example[0].shape == (1, 16000) and experiment.example[0].dtype == jnp.int16
    values, variables = learned(experiment, experiment.student, 30)
    assert np.mean(values[-3:]) < 0.7 * values[0]
    packs(experiment, variables)
    values, _ = learned(experiment, experiment.teacher, 3)
    assert np.isfinite(values).all()


@pytest.mark.slow
def test_pitch_measures_cents_and_learns_from_both(monkeypatch, tmp_path):
    made = module("pitch")
    model = Crepe(width=1)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1024)))
    monkeypatch.setattr(made, "load_crepe", lambda capacity, path: (model, variables))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    experiment = made.config(examples=40, taught=10, tested=20)
    train = experiment.data.train
    assert train["target"].shape == (40, 361)
    exact = np.asarray(cj.models.pitch_targets(train["target"][:, -1]))
    np.testing.assert_allclose(train["target"][10:, :-1], exact[10:], atol=1e-6)
    said = jax.nn.sigmoid(model.apply(variables, train["sound"][:10]))
    np.testing.assert_allclose(train["target"][:10, :-1], 0.5 * exact[:10] + 0.5 * said, atol=1e-5)
    # What was said is kept: the network is not asked again.
    monkeypatch.setattr(made.jax, "jit", None)
    again = made.answers(tmp_path / "pitch", model, variables, train["sound"][:10])
    monkeypatch.undo()
    np.testing.assert_allclose(again, said, atol=1e-5)
    perfect = np.log(np.clip(exact, 1e-6, 1 - 1e-6) / np.clip(1 - exact, 1e-6, 1))
    near, nearer = experiment.task.metrics
    for shift, wanted in ((0, 1.0), (60, 0.0)):
        labels = train["target"] + np.eye(361, dtype=np.float32)[-1] * np.float32(shift)
        got = near.value(near.sums(jnp.asarray(perfect), jnp.asarray(labels), jnp.ones(40)))
        assert got == wanted
    assert (near.name, nearer.name) == ("raw pitch accuracy", "within 25 cents")
    values, trained = learned(experiment, experiment.student, 30)
    assert np.mean(values[-3:]) < 0.8 * values[0]
    packs(experiment, trained)
