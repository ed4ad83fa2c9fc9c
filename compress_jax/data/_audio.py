"""Sound: log-mel spectrograms and cepstra as pure functions of waveforms, and masks for training.

Everything is made of reshapes, slices and products with constants, so that it is exported with the
model that it feeds: there is no Fourier transform among the operations of LiteRT and ONNX runtimes
that can be relied on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.arguments import flag, number, one_of, whole
from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.types import Array, Batch
from compress_jax.data._preprocess import statistics

PRECISION = jax.lax.Precision.HIGHEST  # bfloat16 products would leave 2 digits of a spectrum
_CHUNK = 200  # waveforms at once


@dataclass(frozen=True)
class LogMel:
    r"""Log-mel spectrograms of waveforms: ``[batch, samples] -> [batch, frames, bands]``.

    .. math:: P_{tk} = \Big|\sum_{n<W} h_n x_{tH+n} e^{-2\pi ikn/N}\Big|^2, \quad
       y_{tb} = \ln\max\Big(\sum_k M_{bk} P_{tk},\ \epsilon\Big)

    h is a periodic Hann window, M the triangles of `mel_filters`. Frames begin at 0, H, 2H and so
    on; samples that fill no frame are left out, and nothing is padded.

    Attributes:
      rate: samples a second.
      window: samples of a frame, W.
      hop: samples from the start of one frame to that of the next, H.
      size: of the Fourier transform, N; None for the least power of two that holds the window.
      bands: the number of mel bands.
      low: where the lowest band begins, in Hz.
      high: where the highest band ends, in Hz; None for half the rate.
      scale: of the mel filters, see `mel_filters`.
      equal_area: see `mel_filters`.
      floor: the least energy of a band, before the logarithm.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> cj.data.LogMel(bands=40)(jnp.zeros((2, 16000))).shape
      (2, 49, 40)

    References:
      Davis and Mermelstein, "Comparison of Parametric Representations for Monosyllabic Word
      Recognition in Continuously Spoken Sentences", 1980.
    """

    rate: int = 16000
    window: int = 480
    hop: int = 320
    size: int | None = None
    bands: int = 40
    low: float = 20.0
    high: float | None = None
    scale: Literal["slaney", "htk"] = "slaney"
    equal_area: bool = True
    floor: float = 1e-6

    def __post_init__(self) -> None:
        """Check each field."""
        for name in ("rate", "window", "hop", "bands"):
            whole(name, getattr(self, name), 1)
        if self.size is not None:
            whole("size", self.size, self.window)
        number("floor", self.floor, 0, above=True)
        self.filters()

    @property
    def points(self) -> int:
        """The size of the Fourier transform."""
        return self.size or 2 ** math.ceil(math.log2(self.window))

    def filters(self) -> np.ndarray:
        """Return the mel filters, float64 ``[points // 2 + 1, bands]``."""
        return mel_filters(
            self.rate, self.points, self.bands, low=self.low, high=self.high, scale=self.scale,
            equal_area=self.equal_area,
        )  # fmt: skip

    def __call__(self, waveforms: Array) -> jax.Array:
        """Return the log-mel spectrograms of waveforms.

        Args:
          waveforms: ``[batch, samples]``; floats, usually in [-1, 1], or integers, which are
            divided by the largest power of two of their dtype.

        Returns:
          float32 ``[batch, frames, bands]``.

        Raises:
          ShapeError: if they are of another rank, or shorter than a frame.
        """
        frames = _frames(_unit(waveforms), self.window, self.hop)  # [batch, frames, window]
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.window) / self.window)
        frames = frames * jnp.asarray(hann, jnp.float32)[None, None]
        padding = ((0, 0), (0, 0), (0, self.points - self.window))
        power = power_spectrum(jnp.pad(frames, padding))
        return jnp.log(jnp.maximum(_times(power, self.filters()), self.floor))


@dataclass(frozen=True)
class MFCC:
    r"""Mel-frequency cepstral coefficients: ``[batch, samples] -> [batch, frames, coefficients]``.

    The orthonormal cosine transform (DCT-II) of log-mel spectrograms y of B bands, without its
    higher coefficients:

    .. math:: c_{tq} = s_q \sum_b y_{tb} \cos\frac{\pi q (2b + 1)}{2B}, \quad
       s_0 = \sqrt{1/B},\ s_q = \sqrt{2/B}

    Attributes:
      coefficients: how many are kept.
      log_mel: what is transformed.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> cj.data.MFCC(10)(jnp.zeros((2, 16000))).shape
      (2, 49, 10)

    References:
      Davis and Mermelstein, 1980, as for `LogMel`.
    """

    coefficients: int = 10
    log_mel: LogMel = field(default_factory=LogMel)

    def __post_init__(self) -> None:
        """Check each field."""
        if not isinstance(self.log_mel, LogMel):
            raise ArgumentError(f"log_mel must be a LogMel, got a {type(self.log_mel).__name__}")
        whole("coefficients", self.coefficients, 1, self.log_mel.bands)

    def __call__(self, waveforms: Array) -> jax.Array:
        """Return the coefficients of waveforms.

        Args:
          waveforms: ``[batch, samples]``, see `LogMel`.

        Returns:
          float32 ``[batch, frames, coefficients]``.
        """
        return _times(self.log_mel(waveforms), _dct(self.log_mel.bands)[:, : self.coefficients])


@dataclass(frozen=True)
class Standardized:
    r"""Features with mean 0 and deviation 1 along their last axis: :math:`(y - \mu) / \sigma`.

    Convolutions pad with zeros, which are then the mean; the first cepstral coefficient alone is
    about -40 otherwise. `standardized` finds the numbers.

    Attributes:
      front_end: a pure function of waveforms, such as `MFCC`.
      mean: of each band or coefficient.
      std: of each band or coefficient; above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> front_end = cj.data.Standardized(cj.data.MFCC(2), mean=(-40.0, 7.0), std=(14.0, 5.0))
      >>> front_end(jnp.zeros((1, 16000))).shape
      (1, 49, 2)
    """

    front_end: Callable[[Array], jax.Array]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, waveforms: Array) -> jax.Array:
        """Return the features of waveforms ``[batch, samples]``: float32, as of ``front_end``."""
        y = self.front_end(waveforms)
        mean, std = (jnp.asarray(each, y.dtype) for each in (self.mean, self.std))
        return (y - mean[None, None]) / std[None, None]


def standardized(
    front_end: Callable[[Array], jax.Array], waveforms: Array, *, examples: int = 2000
) -> Standardized:
    """Return a front end whose features have mean 0 and deviation 1 on given waveforms.

    Args:
      front_end: a pure function ``[batch, samples] -> [batch, frames, bands]``.
      waveforms: ``[n, samples]`` of the training split.
      examples: how many of them are used, evenly spread.

    Returns:
      The front end.

    Example:
      >>> import numpy as np
      >>> import compress_jax as cj
      >>> sounds = np.random.default_rng(0).normal(size=(8, 4000)).astype(np.float32)
      >>> front_end = cj.data.standardized(cj.data.MFCC(2), sounds)
      >>> round(abs(float(front_end(sounds).mean())), 3)
      0.0
    """
    whole("examples", examples, 1)
    chosen = np.asarray(waveforms)[:: max(1, len(waveforms) // examples)]
    run = jax.jit(front_end)
    parts = [run(chosen[i : i + _CHUNK]) for i in range(0, len(chosen), _CHUNK)]
    mean, std = statistics({"features": np.concatenate(parts)}, entry="features")
    return Standardized(front_end, tuple(mean.tolist()), tuple(std.tolist()))


def mel_filters(
    rate: int,
    size: int,
    bands: int,
    *,
    low: float = 0.0,
    high: float | None = None,
    scale: Literal["slaney", "htk"] = "slaney",
    equal_area: bool = True,
) -> np.ndarray:
    r"""Return triangular filters whose corners are evenly spaced on a mel scale.

    With corners :math:`f_0 < \dots < f_{B+1}`, filter b rises from :math:`f_b` to 1 at
    :math:`f_{b+1}` and falls to :math:`f_{b+2}`, linearly in Hz; with equal areas it is divided by
    :math:`(f_{b+2} - f_b) / 2`. The scales:

    .. math:: m_\text{htk} = 2595 \log_{10}(1 + f/700), \quad m_\text{slaney} = 3f/200 \text{ below
       1 kHz},\ 15 + 27 \ln(f/1000) / \ln 6.4 \text{ above}

    Args:
      rate: samples a second.
      size: of the Fourier transform.
      bands: the number of filters.
      low: where the first filter begins, in Hz.
      high: where the last filter ends, in Hz; None for half the rate.
      scale: ``"slaney"`` (librosa's default) or ``"htk"`` (that of torchaudio and TensorFlow).
      equal_area: True as in librosa; False for filters whose peak is 1.

    Returns:
      float64 ``[size // 2 + 1, bands]``.

    Raises:
      ArgumentError: if the range of frequencies is empty, or a filter is so narrow that it lies
        between two frequencies of the transform and would always give 0.

    Example:
      >>> import compress_jax as cj
      >>> cj.data.mel_filters(16000, 512, 40).shape
      (257, 40)

    References:
      Slaney, "Auditory Toolbox", 1998; Young et al., "The HTK Book", section 5.4.
    """
    top = rate / 2 if high is None else number("high", high, 0, rate / 2)
    number("low", low, 0, top, below=True)
    to_mel, to_hz = _SCALES[one_of("scale", scale, _SCALES)]
    corners = to_hz(np.linspace(to_mel(low), to_mel(top), bands + 2))
    rises = np.diff(corners)  # [bands + 1]
    frequencies = np.arange(size // 2 + 1) * rate / size
    offsets = frequencies[:, None] - corners[None]  # [frequencies, bands + 2]
    up = offsets[:, :-2] / rises[:-1]
    down = -offsets[:, 2:] / rises[1:]
    filters = np.maximum(0, np.minimum(up, down))
    empty = np.flatnonzero(filters.max(0) == 0)
    if len(empty):
        raise ArgumentError(
            f"{len(empty)} of {bands} mel bands are narrower than the {rate / size:.4g} Hz between "
            f"frequencies (the first is band {empty[0]}, at {corners[empty[0] + 1]:.0f} Hz); use "
            "fewer bands, or a larger size"
        )
    return (
        filters * (2 / (corners[2:] - corners[:-2])) if flag("equal_area", equal_area) else filters
    )


def power_spectrum(frames: jax.Array) -> jax.Array:
    r"""Return the squared magnitudes of the discrete Fourier transform, by products with constants.

    .. math:: P_k = \Big|\sum_{n<N} x_n e^{-2\pi ikn/N}\Big|^2, \quad k = 0, \dots, N / 2

    For N = AB it is one step of Cooley and Tukey's algorithm: transforms of size A, a rotation,
    transforms of size B. Its constants have about 2N entries and not N^2 (16 KB and not 1 MB for
    N = 512): they are part of every exported file.

    Args:
      frames: float32 ``[..., N]``.

    Returns:
      float32 ``[..., N // 2 + 1]``.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> cj.data.power_spectrum(jnp.array([1.0, 0.0, -1.0, 0.0])).round(4).tolist()
      [0.0, 4.0, 0.0]

    References:
      Cooley and Tukey, "An Algorithm for the Machine Calculation of Complex Fourier Series", 1965.
    """
    *leading, points = frames.shape
    a = max(n for n in range(1, math.isqrt(points) + 1) if points % n == 0)
    b = points // a
    last = (points // 2) // a + 1  # frequencies of the second step; the others mirror these
    # n = b i + j and k = p + a q: e^(-2 pi i kn / N) = e^(ip / a) e^(jp / N) e^(jq / b).
    x = frames.reshape(-1, a, b).swapaxes(1, 2)  # [rows, j, i]
    real, imag = (_times(x, part) for part in _wave(a, a, a))  # [rows, j, p]
    cos, sin = (jnp.asarray(part)[None] for part in _wave(b, a, points))
    turned = (real * cos - imag * sin).swapaxes(1, 2), (real * sin + imag * cos).swapaxes(1, 2)
    both = np.concatenate(_wave(b, last, b), axis=1)  # [j, 2 q]
    real, imag = (_times(part, both) for part in turned)  # [rows, p, 2 q]
    cosines = real[..., :last] - imag[..., last:]
    sines = real[..., last:] + imag[..., :last]
    power = (cosines * cosines + sines * sines).swapaxes(1, 2)  # [rows, q, p]
    power = power.reshape(*leading, last * a)
    return power[..., : points // 2 + 1]


def spec_augment(
    key: jax.Array,
    batch: Batch,
    *,
    entry: str = "features",
    time_masks: int = 2,
    time_width: int = 10,
    band_masks: int = 2,
    band_width: int = 8,
    fill: float | None = None,
) -> Batch:
    """Hide stretches of time and of frequency in each spectrogram, at random.

    A mask is of a width drawn evenly from 0 to the largest, and begins anywhere it fits.

    Args:
      key: a typed PRNG key.
      batch: a dict of arrays.
      entry: the name of the spectrograms, ``[batch, frames, bands]`` or ``[batch, frames, bands,
        channels]``.
      time_masks: how many stretches of time are hidden; they may overlap.
      time_width: the longest stretch, in frames.
      band_masks: how many stretches of bands are hidden. Cepstral coefficients are no bands: 0.
      band_width: the widest stretch, in bands.
      fill: what hides them; None for the mean of each example.

    Returns:
      The batch with its new spectrograms.

    Raises:
      ArgumentError: if the entry is missing, or a width exceeds the spectrograms.
      ShapeError: if the entry is of another rank.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> batch = {"features": jnp.ones((2, 49, 40))}
      >>> masked = cj.data.spec_augment(jax.random.key(0), batch, fill=0.0)["features"]
      >>> masked.shape, bool(0.3 < masked.mean() < 1)
      ((2, 49, 40), True)

    References:
      Park et al., "SpecAugment: A Simple Data Augmentation Method for Automatic Speech
      Recognition", 2019, section 2 (without time warping).
    """
    if entry not in batch:
        raise ArgumentError(f"entry={entry!r} is not in the batch; it has {sorted(batch)}")
    x = batch[entry]
    if x.ndim not in (3, 4):
        raise ShapeError(
            f"{entry} is {list(x.shape)}; spectrograms are [batch, frames, bands], and may have "
            "channels"
        )
    whole("time_width", time_width, 0, x.shape[1])
    whole("band_width", band_width, 0, x.shape[2])
    time_key, band_key = jax.random.split(key)
    times = _stretches(time_key, x.shape[0], x.shape[1], time_masks, time_width)
    bands = _stretches(band_key, x.shape[0], x.shape[2], band_masks, band_width)
    hidden = times[:, :, None] | bands[:, None, :]  # [batch, frames, bands]
    hidden = hidden.reshape(*hidden.shape, *(1,) * (x.ndim - 3))
    own = x.mean(tuple(range(1, x.ndim)), keepdims=True)
    value = own if fill is None else jnp.full_like(own, fill)
    return {**batch, entry: jnp.where(hidden, value, x)}


def _unit(waveforms: Array) -> jax.Array:
    """Return waveforms as float32, integers divided by the largest magnitude of their dtype."""
    x = jnp.asarray(waveforms)
    if x.ndim != 2:
        raise ShapeError(f"waveforms are [batch, samples]; got {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jnp.float32)
    return x.astype(jnp.float32) / -float(jnp.iinfo(x.dtype).min)


def _frames(x: jax.Array, window: int, hop: int) -> jax.Array:
    """Return overlapping frames ``[batch, frames, window]``.

    Frame t is blocks t, t + 1, ... of ``hop`` samples side by side: slices, and no gather.
    """
    batch, samples = x.shape
    if samples < window:
        raise ShapeError(f"waveforms of {samples} samples are shorter than a frame of {window}")
    count = 1 + (samples - window) // hop
    parts = math.ceil(window / hop)
    blocks = count + parts - 1
    x = jnp.pad(x[:, : blocks * hop], ((0, 0), (0, max(0, blocks * hop - samples))))
    x = x.reshape(batch, blocks, hop)
    side_by_side = [x[:, i : i + count] for i in range(parts)]
    return jnp.concatenate(side_by_side, axis=-1)[:, :, :window]


def _times(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    """Return ``x @ matrix``; the constant comes second, as runtimes have their weights."""
    return jnp.matmul(x, jnp.asarray(matrix, jnp.float32), precision=PRECISION)


def _wave(rows: int, columns: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the real and imaginary part of ``e^(-2 pi i rc / period)``, float32."""
    # Reduced before the division: the angle is exact.
    angles = np.outer(np.arange(rows), np.arange(columns)) % period * (2 * np.pi / period)
    return np.cos(angles).astype(np.float32), -np.sin(angles).astype(np.float32)


def _dct(size: int) -> np.ndarray:
    """Return the orthonormal DCT-II as a matrix ``[inputs, outputs]``, float64."""
    inputs = np.arange(size)[:, None]
    cosines = np.cos(np.pi * np.arange(size)[None] * (2 * inputs + 1) / (2 * size))
    scales = np.full(size, math.sqrt(2 / size))
    scales[0] = math.sqrt(1 / size)
    return cosines * scales


def _stretches(key: jax.Array, batch: int, length: int, count: int, widest: int) -> jax.Array:
    """Return which of ``length`` places lie in one of ``count`` random stretches of each example.

    Returns:
      Booleans ``[batch, length]``.
    """
    width_key, start_key = jax.random.split(key)
    widths = jax.random.randint(width_key, (batch, count), 0, widest + 1)
    room = (length - widths + 1).astype(jnp.float32)
    starts = (jax.random.uniform(start_key, (batch, count)) * room).astype(jnp.int32)
    places = jnp.arange(length)[None, None]  # [1, 1, length]
    inside = (places >= starts[..., None]) & (places < (starts + widths)[..., None])
    return inside.any(1)


def _htk_to_mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)


def _htk_to_hz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)


def _slaney_to_mel(hz: float) -> float:
    return 3 * hz / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def _slaney_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, 200 * mel / 3, 1000 * 6.4 ** ((mel - 15) / 27))


_SCALES = {"slaney": (_slaney_to_mel, _slaney_to_hz), "htk": (_htk_to_mel, _htk_to_hz)}
