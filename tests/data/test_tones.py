"""Tones: their pitch measured by other means, and that seeds and kinds decide."""

import numpy as np
import pytest

from compress_jax.core.errors import ArgumentError
from compress_jax.data import _tones as module
from compress_jax.data import tones


@pytest.fixture
def clean(monkeypatch):
    """No noise."""
    monkeypatch.setattr(module, "_noise", lambda random, *shape: np.zeros(shape))


def measured(sound, rate=16000):
    """Return the fundamental of a frame: the lag at which it is most like itself, refined."""
    size = len(sound)
    x = sound - sound.mean()
    lags = np.arange(4, 400)
    alike = np.array(
        [
            x[: size - lag] @ x[lag:] / np.linalg.norm(x[: size - lag]) / np.linalg.norm(x[lag:])
            for lag in lags
        ]
    )
    # The first of the lags that are nearly as good as the best: others are its multiples.
    good = np.flatnonzero((alike[1:-1] > alike[:-2]) & (alike[1:-1] >= alike[2:])) + 1
    i = next(i for i in good if alike[i] > alike[good].max() - 0.03)
    a, b, c = alike[i - 1 : i + 2]
    return rate / (lags[i] + 0.5 * (a - c) / (a - 2 * b + c))


@pytest.mark.parametrize("kind", ["instrument", "voice"])
def test_labels_are_the_pitch(clean, kind):
    split = tones(120, seed=4, kinds=(kind,), low=80.0, high=800.0)
    hertz = np.array([measured(sound) for sound in split["sound"].astype(np.float64)])
    errors = np.abs(1200 * np.log2(hertz / 10) - split["cents"])
    # Autocorrelation itself is wrong by an octave now and then, and sees the frame's mean pitch.
    assert np.median(errors) < 8 and (errors < 50).mean() > 0.85


def test_vibrato_bends_the_middle_of_the_frame_as_the_label_says(clean):
    """A slow and long frame: the pitch of its middle alone is the label."""
    split = tones(40, seed=1, kinds=("voice",), low=200.0, high=400.0, samples=8001)
    middle = split["sound"][:, 3700:4301].astype(np.float64)
    errors = [
        abs(1200 * np.log2(measured(sound) / 10) - cents)
        for sound, cents in zip(middle, split["cents"], strict=True)
    ]
    assert np.median(errors) < 6
    ends = [1200 * np.log2(measured(sound) / 10) for sound in split["sound"][:, :600].astype(float)]
    assert np.median(np.abs(ends - split["cents"])) > 8


def test_the_seed_decides_and_pitches_are_evenly_spread():
    one = tones(2000, seed=3, samples=16)
    np.testing.assert_array_equal(one["sound"], tones(2000, seed=3, samples=16)["sound"])
    assert (one["cents"] != tones(2000, seed=4, samples=16)["cents"]).all()
    low, high = (1200 * np.log2(hz / 10) for hz in (55, 1760))
    assert low - 100 < one["cents"].min() and one["cents"].max() < high + 100
    counts = np.histogram(one["cents"], 5, (low, high))[0]
    assert (counts > 300).all()
    assert one["sound"].dtype == one["cents"].dtype == np.float32
    np.testing.assert_allclose(np.abs(one["sound"]).max(1), 1, rtol=1e-6)


def test_noise_is_from_nearly_none_to_louder_than_the_tone(monkeypatch):
    monkeypatch.setattr(module, "_partials", lambda angles, loudness, phases: np.ones(angles.shape))
    split = tones(300, seed=0, samples=1024)
    x = split["sound"].astype(np.float64)
    # With a constant in place of the tone, what varies fast is noise.
    noise = np.diff(x, axis=1).std(1) / np.abs(x.mean(1))
    assert noise.min() < 0.02 and noise.max() > 0.8


def test_no_partial_is_folded_back_from_above_half_the_rate(clean):
    split = tones(60, seed=2, low=1000.0, high=1760.0, kinds=("instrument",))
    window = np.hanning(1024)
    for sound, cents in zip(split["sound"], split["cents"], strict=True):
        spectrum = np.abs(np.fft.rfft(sound * window))
        partials = 10 * 2 ** (cents / 1200) * np.arange(1, 9) / (16000 / 1024)
        far = np.abs(np.arange(513)[:, None] - partials[None]).min(1)
        # 100 cents of vibrato move the eighth partial by half its distance to the next.
        assert np.square(spectrum[far > 22]).sum() < 0.02 * np.square(spectrum).sum()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"examples": 0}, "examples must be a whole number of at least 1"),
        ({"low": 2000.0}, "low must be a number above 0 to below 1760"),
        ({"high": 9000.0}, "high must be a number from 55.0 to below 8000"),
        ({"kinds": ("organ",)}, r"kinds must be a tuple of some of \['instrument', 'voice'\]"),
        ({"kinds": "voice"}, "kinds must be a tuple"),
        ({"kinds": ()}, "kinds must be a tuple"),
    ],
)
def test_arguments_are_checked(options, words):
    with pytest.raises(ArgumentError, match=words):
        tones(**{"examples": 4, **options})
