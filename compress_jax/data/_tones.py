"""Synthetic tones whose pitch is known exactly."""

from collections.abc import Collection

import numpy as np

from compress_jax.core.arguments import number, whole
from compress_jax.core.errors import ArgumentError
from compress_jax.data._preprocess import Split

KINDS = ("instrument", "voice")
HARMONICS = 48
_CHUNK = 256  # tones at once: [256, 48, 1024] floats are 50 MB


def tones(
    examples: int,
    *,
    seed: int = 0,
    samples: int = 1024,
    rate: int = 16000,
    low: float = 55.0,
    high: float = 1760.0,
    kinds: Collection[str] = KINDS,
) -> Split:
    r"""Return short frames of tones with vibrato in noise, and their pitch.

    .. math:: x(t) = e(t) \sum_{k} a_k \cos(k \theta(t) + \phi_k) + n(t), \quad
       \theta' = 2\pi f\, 2^{\frac{d}{1200} \sin(2\pi v t + \psi)}

    The fundamental f is even in pitch between ``low`` and ``high``; vibrato of 4 to 8 Hz is up to a
    semitone deep; the loudness e rises or falls; noise is white to brown, 40 dB below the tone to 3
    dB above it. The label is the pitch in the middle of the frame. An ``"instrument"`` has partials
    that fall as a power of k, in some only the odd ones; a ``"voice"`` has three formants.

    Args:
      examples: how many.
      seed: of all that is drawn.
      samples: of a frame.
      rate: samples a second.
      low: the lowest fundamental, in Hz.
      high: the highest one, in Hz.
      kinds: which kinds there are, evenly mixed.

    Returns:
      ``sound`` float32 ``[examples, samples]`` with peaks of 1, and ``cents`` float32
      ``[examples]``, the pitch in cents above 10 Hz: ``1200 * log2(hz / 10)``.

    Raises:
      ArgumentError: if a number is out of range, or a kind is unknown.

    Example:
      >>> import compress_jax as cj
      >>> split = cj.data.tones(3, seed=1)
      >>> split["sound"].shape, split["cents"].shape
      ((3, 1024), (3,))
    """
    whole("examples", examples, 1)
    whole("samples", samples, 2)
    number("low", low, 0, high, above=True, below=True)
    number("high", high, low, rate / 2, below=True)
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds or isinstance(kinds, str):
        raise ArgumentError(f"kinds must be a tuple of some of {list(KINDS)}; got {kinds!r}")
    random = np.random.default_rng(seed)
    parts = []
    for start in range(0, examples, _CHUNK):
        count = min(_CHUNK, examples - start)
        parts.append(_some(random, count, samples, rate, (low, high), sorted(kinds)))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _some(
    random: np.random.Generator,
    count: int,
    samples: int,
    rate: int,
    ends: tuple[float, float],
    kinds: list[str],
) -> Split:
    hz = ends[0] * (ends[1] / ends[0]) ** random.uniform(size=count)
    seconds = (np.arange(samples) - samples // 2) / rate  # 0 in the middle
    depth = 100 * random.uniform(size=(count, 1)) ** 2
    speed = random.uniform(4, 8, (count, 1))
    start = random.uniform(0, 2 * np.pi, (count, 1))
    bend = depth * np.sin(2 * np.pi * speed * seconds + start)  # cents, [count, samples]
    frequencies = hz[:, None] * 2 ** (bend / 1200)
    angles = 2 * np.pi * np.cumsum(frequencies, 1) / rate
    loudness = _loudness(random, hz, kinds)
    loudness *= _orders() * frequencies.max(1)[:, None] < rate / 2  # nothing is folded back
    sound = _partials(angles, loudness, random.uniform(0, 2 * np.pi, loudness.shape))
    sound *= 10 ** (random.uniform(-10, 10, (count, 1)) * seconds / seconds[-1] / 20)
    sound /= np.sqrt(np.mean(sound**2, 1, keepdims=True))
    sound += 10 ** (random.uniform(-40, 3, (count, 1)) / 20) * _noise(random, count, samples)
    sound /= np.abs(sound).max(1, keepdims=True)
    cents = 1200 * np.log2(frequencies[:, samples // 2] / 10)
    return {"sound": sound.astype(np.float32), "cents": cents.astype(np.float32)}


def _orders() -> np.ndarray:
    return np.arange(1, HARMONICS + 1)[None]


def _loudness(random: np.random.Generator, hz: np.ndarray, kinds: list[str]) -> np.ndarray:
    """Return the amplitude of each partial, ``[count, HARMONICS]``."""
    count = len(hz)
    k = _orders()
    falling = k ** -random.uniform(0.5, 2, (count, 1))
    odd = (random.uniform(size=(count, 1)) < 0.2) & (k % 2 == 0)
    uneven = np.exp(random.normal(0, 0.5, (count, HARMONICS)))
    instrument = np.where(odd, 0, falling) * uneven
    # Formants as resonances, on the falling spectrum of a glottis.
    centers = random.uniform([300, 900, 2300], [900, 2300, 3500], (count, 3))[..., None]
    widths = random.uniform(60, 200, (count, 3))[..., None]
    places = (k * hz[:, None])[:, None]  # [count, 1, HARMONICS]
    resonances = (1 / (1 + ((places - centers) / widths) ** 2)).sum(1) + 0.02
    voice = resonances / k
    each = random.integers(len(kinds), size=(count, 1))
    return np.where(np.array(kinds)[each] == "voice", voice, instrument)


def _partials(angles: np.ndarray, loudness: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """Return the sum of the partials, ``[count, samples]``, one after the other."""
    sound = np.zeros_like(angles)
    for k in range(HARMONICS):
        audible = loudness[:, k] > 0
        turned = (k + 1) * angles[audible] + phases[audible, k : k + 1]
        sound[audible] += loudness[audible, k : k + 1] * np.cos(turned)
    return sound


def _noise(random: np.random.Generator, count: int, samples: int) -> np.ndarray:
    """Return noise whose power falls with frequency to a power of 0 to 2; its rms is 1."""
    spectrum = np.fft.rfft(random.normal(size=(count, samples)))
    frequencies = np.maximum(np.arange(spectrum.shape[1]), 1.0)
    spectrum *= frequencies ** (-random.uniform(0, 2, (count, 1)) / 2)
    noise = np.fft.irfft(spectrum, samples)
    return noise / np.sqrt(np.mean(noise**2, 1, keepdims=True))
