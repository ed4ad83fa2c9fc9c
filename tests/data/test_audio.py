"""The front end against scipy's transforms in float64, librosa's numbers, and what must hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.signal

from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.data import (
    MFCC,
    LogMel,
    Standardized,
    mel_filters,
    power_spectrum,
    spec_augment,
    standardized,
)

TIME = np.arange(8000) / 16000
SOUND = (
    0.5 * np.sin(2 * np.pi * (200 * TIME + 1500 * TIME**2))
    + 0.1 * np.sin(2 * np.pi * 3000 * TIME)
    + 0.01 * np.cos(7 * np.arange(8000.0) ** 2)
)
PEAKS = {"scale": "htk", "equal_area": False}  # torchaudio's defaults
# librosa 0.11.0: melspectrogram(y=np.pad(SOUND, (16, 16)), sr=16000, n_fft=512, hop_length=320,
# win_length=480, center=False, n_mels=40, fmin=20, fmax=7600), in float64, and
# log(maximum(it, 1e-6)); mfcc(S=that). librosa puts a window of 480 into the middle of 512 samples.
FRAMES = [0, 11, 23]
BANDS = [0, 5, 17, 30, 39]
LOG_MEL = [
    [-3.93291, -6.938887, -7.727171, -8.50022, -8.342201],
    [-9.061226, -7.797489, -7.83018, -8.474204, -8.113176],
    [-7.583072, -8.560691, -7.24116, -8.028634, -8.118838],
]
# The same with htk=True, norm=None.
LOG_MEL_HTK = [
    [-2.058148, 5.286264, -2.93685, -2.337544, -2.096519],
    [-6.2455, -3.811344, -2.982591, -2.71867, -2.014254],
    [-4.054508, -3.577277, -0.921154, -2.339356, -1.946216],
]
COEFFICIENTS = [0, 1, 5, 12]
CEPSTRA = [
    [-42.44797, 7.49571, 4.34377, -2.61225],
    [-42.21398, 4.41816, -1.00072, 1.10376],
    [-44.15461, -1.91825, 1.29986, 5.429],
]


def waveforms(batch=3, samples=8000, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, samples)).astype(np.float32)


def run(front_end, x):
    """Compiled as one program: op by op takes longer."""
    return np.asarray(jax.jit(front_end)(jnp.asarray(x)))


def reference(x, f):
    """Frame by frame in float64, with scipy's transform and filters that are interpolated."""
    count = 1 + (x.shape[-1] - f.window) // f.hop
    frames = np.stack([x[:, i * f.hop : i * f.hop + f.window] for i in range(count)], 1)
    window = scipy.signal.get_window("hann", f.window, fftbins=True)
    power = np.abs(scipy.fft.rfft(frames.astype(np.float64) * window, f.points)) ** 2
    top = f.high or f.rate / 2
    to_mel = {
        "htk": lambda hz: 1127.0104803 * np.log1p(hz / 700),
        "slaney": lambda hz: np.where(
            hz < 1000, hz * 0.015, 15 + np.log(np.maximum(hz, 1) / 1000) * 27 / np.log(6.4)
        ),
    }[f.scale]
    # Corners by looking the scale up backwards, on a fine grid.
    grid = np.linspace(f.low, top, 400_001)
    corners = np.interp(np.linspace(to_mel(f.low), to_mel(top), f.bands + 2), to_mel(grid), grid)
    hz = np.fft.rfftfreq(f.points, 1 / f.rate)
    rows = []
    for left, middle, right in zip(corners, corners[1:], corners[2:], strict=False):
        triangle = np.interp(hz, [left, middle, right], [0, 1, 0], left=0, right=0)
        rows.append(triangle * (2 / (right - left) if f.equal_area else 1))
    return np.log(np.maximum(power @ np.array(rows).T, f.floor))


@pytest.mark.parametrize("points", [1, 2, 7, 9, 480, 512, 640, 1024])
def test_the_power_spectrum_is_that_of_scipy(points):
    x = waveforms(4, points)
    got = run(power_spectrum, x)
    wanted = np.abs(scipy.fft.rfft(x.astype(np.float64))) ** 2
    assert got.shape == wanted.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, atol=2e-6 * wanted.max(), rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        PEAKS,
        {"window": 640, "hop": 320, "size": 1024, "bands": 64, "low": 0, "high": 7000.0},
        {"window": 400, "hop": 160, "bands": 20, "floor": 1.0},
        {"window": 100, "hop": 130, "bands": 8, "rate": 8000},  # gaps between frames
    ],
)
def test_log_mel_is_the_reference(options):
    x = waveforms()
    front_end = LogMel(**options)
    got = run(front_end, x)
    wanted = reference(x, front_end)
    assert got.shape == wanted.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, atol=2e-4)


@pytest.mark.parametrize(("options", "wanted"), [({}, LOG_MEL), (PEAKS, LOG_MEL_HTK)])
def test_log_mel_is_librosas(options, wanted):
    got = run(LogMel(high=7600.0, **options), SOUND[None])
    np.testing.assert_allclose(got[0][np.ix_(FRAMES, BANDS)], wanted, atol=1e-3)


def test_mfcc_is_librosas():
    got = run(MFCC(13, LogMel(high=7600.0)), SOUND[None])
    assert got.shape == (1, 24, 13)
    np.testing.assert_allclose(got[0][np.ix_(FRAMES, COEFFICIENTS)], CEPSTRA, atol=2e-3)


def test_mfcc_is_scipys_transform_of_log_mel_and_loses_nothing_with_all_coefficients():
    x = waveforms()
    log_mel = run(LogMel(bands=20), x)
    got = run(MFCC(20, LogMel(bands=20)), x)
    np.testing.assert_allclose(
        got, scipy.fft.dct(log_mel.astype(np.float64), norm="ortho"), atol=1e-4
    )
    np.testing.assert_allclose(np.square(got).sum(-1), np.square(log_mel).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(run(MFCC(7, LogMel(bands=20)), x), got[..., :7], atol=1e-5)


def test_filters_are_triangles_of_one_peak_or_one_area():
    peaks = mel_filters(16000, 8192, 30, low=50, high=7000, equal_area=False)
    assert peaks.dtype == np.float64 and 0.97 < peaks.max(0).min() and peaks.max() <= 1
    # Between the first peak and the last, neighbors add up to 1: nothing is heard twice.
    first, last = peaks[:, 0].argmax() + 1, peaks[:, -1].argmax()
    np.testing.assert_allclose(peaks[first:last].sum(1), 1, atol=1e-12)
    areas = mel_filters(16000, 8192, 30, low=50, high=7000).sum(0) * 16000 / 8192
    np.testing.assert_allclose(areas, 1, rtol=1e-2)


def test_a_tone_is_loudest_in_the_band_that_holds_it():
    front_end = LogMel(bands=32)
    for hz in (300, 1000, 3500):
        tone = np.sin(2 * np.pi * hz * TIME)[None].astype(np.float32)
        band = front_end.filters()[round(hz * 512 / 16000)].argmax()
        assert (run(front_end, tone).argmax(-1) == band).all()


def test_a_shift_by_one_hop_shifts_the_frames_by_one():
    x = waveforms()
    np.testing.assert_allclose(run(LogMel(), x)[:, 1:], run(LogMel(), x[:, 320:]), atol=1e-5)


def test_integers_are_sound_as_microphones_give_it():
    x = np.array([[0, 16384, -32768, 32767] * 200], np.int16)
    np.testing.assert_array_equal(run(LogMel(), x), run(LogMel(), x.astype(np.float32) / 32768))


def test_silence_is_the_floor_and_has_finite_gradients():
    silence = np.zeros((1, 960), np.float32)
    np.testing.assert_allclose(run(LogMel(floor=1e-3), silence), np.log(1e-3), rtol=1e-6)
    assert np.isfinite(run(jax.grad(lambda x: MFCC()(x).sum()), silence)).all()


def test_it_is_made_of_what_every_runtime_has():
    """No Fourier transform, gather or complex number; few constants, as they are in every file."""
    jaxpr = jax.make_jaxpr(MFCC())(jnp.zeros((2, 16000)))
    names = {equation.primitive.name for equation in jaxpr.eqns}
    known = {
        "reshape", "slice", "concatenate", "broadcast_in_dim", "mul", "sub", "add", "dot_general",
        "transpose", "max", "log", "jit", "pad", "convert_element_type",
    }  # fmt: skip
    assert names <= known and "dot_general" in names
    assert sum(np.size(each) for each in jaxpr.consts) < 16_000  # a plain transform: 263,168


def test_standardized_features_have_mean_0_and_deviation_1_on_what_they_were_fitted_to():
    x = waveforms(7, 4000) * np.geomspace(0.01, 1, 7, dtype=np.float32)[:, None]
    front_end = standardized(MFCC(5), x)
    y = run(front_end, x).astype(np.float64)
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1)), 1, rtol=1e-4)
    plain = run(MFCC(5), x).astype(np.float64)
    np.testing.assert_allclose(front_end.mean, plain.mean((0, 1)), rtol=1e-4, atol=1e-4)
    assert front_end == Standardized(MFCC(5), front_end.mean, front_end.std)
    assert hash(front_end) == hash(standardized(MFCC(5), x))
    fewer = standardized(MFCC(5), x, examples=2)
    assert fewer.mean == standardized(MFCC(5), x[[0, 3, 6]]).mean


def test_equal_options_are_one_program():
    """Modules hold front ends as fields: equal ones must be equal, and hashable."""
    assert MFCC(10, LogMel(bands=30)) == MFCC(10, LogMel(bands=30))
    assert hash(MFCC(10)) == hash(MFCC(10)) and MFCC(10) != MFCC(11)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LogMel(window=0), ArgumentError, "window must be a whole number of at least 1"),
        (lambda: LogMel(size=256), ArgumentError, "size must be .* at least 480, got 256"),
        (lambda: LogMel(high=9000.0), ArgumentError, "high must be a number from 0 to 8000"),
        (lambda: LogMel(low=8000.0), ArgumentError, "low must be a number from 0 to below"),
        (lambda: LogMel(scale="bark"), ArgumentError, "scale must be 'slaney' or 'htk'"),
        (lambda: LogMel(bands=200), ArgumentError, "of 200 mel bands are narrower than the 31.25"),
        (lambda: LogMel(floor=0.0), ArgumentError, "floor must be a number above 0"),
        (lambda: MFCC(41), ArgumentError, "coefficients must be a whole number from 1 to 40"),
        (lambda: MFCC(10, 40), ArgumentError, "log_mel must be a LogMel, got a int"),
        (lambda: LogMel()(np.zeros(16000)), ShapeError, r"waveforms are \[batch, samples\]"),
        (lambda: LogMel()(np.zeros((1, 479))), ShapeError, "479 samples are shorter than a frame"),
    ],
)
def test_what_cannot_work_is_said(make, error, words):
    with pytest.raises(error, match=words):
        make()


# SpecAugment.


def masked(x, seed=0, **options):
    run = jax.jit(functools.partial(spec_augment, **options))
    return run(jax.random.key(seed), {"features": x, "label": jnp.arange(len(x))})


def test_masks_are_whole_stretches_of_frames_and_bands():
    x = jnp.ones((200, 49, 40))
    hidden = np.asarray(masked(x, time_masks=1, band_masks=1, fill=0.0)["features"]) == 0
    times = hidden.all(2)  # [batch, frames]
    bands = hidden.all(1)
    np.testing.assert_array_equal(hidden, times[:, :, None] | bands[:, None, :])
    for each, widest in ((times, 10), (bands, 8)):
        widths = each.sum(1)
        assert set(widths) == set(range(widest + 1))  # every width occurs
        edges = np.diff(np.pad(each, ((0, 0), (1, 1))).astype(int), axis=1)
        assert ((edges == 1).sum(1) == (widths > 0)).all()  # one stretch
        assert each.any(0).all()  # every place is hidden in some example


def test_the_key_decides_and_other_entries_stay():
    x = jax.random.normal(jax.random.key(9), (8, 49, 40))
    run = jax.jit(lambda key, batch: spec_augment(key, batch, entry="mel"))
    one, again, other = (
        run(jax.random.key(seed), {"mel": x, "label": jnp.arange(8)}) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one["mel"], again["mel"])
    assert (one["mel"] != other["mel"]).any() and (one["label"] == jnp.arange(8)).all()


def test_what_hides_is_each_examples_mean_and_the_rest_is_as_it_was():
    x = jax.random.normal(jax.random.key(3), (5, 20, 16, 1))
    got = np.asarray(masked(x, time_width=6, band_width=5)["features"])
    changed = got != np.asarray(x)
    assert 0.02 < changed.mean() < 0.8
    for row, original, where in zip(got, np.asarray(x), changed, strict=True):
        np.testing.assert_allclose(row[where], original.mean(), rtol=1e-5)


def test_no_masks_change_nothing():
    x = jax.random.normal(jax.random.key(3), (5, 20, 16))
    for options in ({"time_masks": 0, "band_masks": 0}, {"time_width": 0, "band_width": 0}):
        np.testing.assert_array_equal(masked(x, **options)["features"], x)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"entry": "mel"}, ArgumentError, "entry='mel' is not in the batch; it has"),
        ({"entry": "label"}, ShapeError, r"label is \[4\]; spectrograms are"),
        ({"time_width": 21}, ArgumentError, "time_width must be a whole number from 0 to 20"),
        ({"band_width": 17}, ArgumentError, "band_width must be a whole number from 0 to 16"),
    ],
)
def test_masks_that_do_not_fit_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        masked(jnp.ones((4, 20, 16)), **options)
