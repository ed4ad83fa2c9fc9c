"""Labeled sounds that stay on disk: WAV files, each read when a batch asks for it."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io.wavfile
import scipy.signal

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data._data import Data
from compress_jax.data._disk.records import Reading, data_of
from compress_jax.data._folder import listings_of

SOUNDS = (".wav",)


@dataclass(frozen=True)
class Sounds:
    """How WAV files become examples of one length.

    Attributes:
      rate: samples a second.
      samples: of an example.
      shift: samples by which a sound is moved at most, in training.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "a.wav"
      >>> scipy.io.wavfile.write(file, 4, np.array([0, 2**14, 0, -(2**14)], np.int16))
      >>> Sounds(4, 6, 0).example((file, 1))["sound"].tolist()
      [0.0, 0.5, 0.0, -0.5, 0.0, 0.0]
    """

    rate: int
    samples: int
    shift: int

    def example(self, record: tuple[Path, int]) -> dict[str, Any]:
        """Return a sound from its beginning, cut or followed by silence."""
        file, label = record
        return self._made(read_sound(file, self.rate), 0, label)

    def shifted(self, record: tuple[Path, int], random: np.random.Generator) -> dict[str, Any]:
        """Return a sound that is moved at random."""
        file, label = record
        by = int(random.integers(-self.shift, self.shift + 1))
        return self._made(read_sound(file, self.rate), by, label)

    def _made(self, heard: np.ndarray, by: int, label: int) -> dict[str, Any]:
        """Put a sound so many samples after the beginning, or before it."""
        sound = np.zeros(self.samples, np.float32)
        own = heard[max(-by, 0) :][: self.samples - max(by, 0)]
        sound[max(by, 0) :][: len(own)] = own
        return {"sound": sound, "label": np.int32(label)}


def read_sound(file: str | Path, rate: int) -> np.ndarray:
    """Read a WAV file as one channel, at a rate.

    Args:
      file: of 8, 16, 24 or 32 bits, or floats; several channels are averaged.
      rate: samples a second of the result; another rate in the file is resampled.

    Returns:
      float32 ``[samples]``, in [-1, 1].

    Raises:
      DataError: if it cannot be read.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> file = Path(tempfile.mkdtemp()) / "a.wav"
      >>> scipy.io.wavfile.write(file, 8000, np.zeros((80, 2), np.int16))
      >>> cj.data.read_sound(file, 16000).shape
      (160,)
    """
    try:
        found, stored = scipy.io.wavfile.read(io.BytesIO(Path(file).read_bytes()))
    except Exception as error:  # of a damaged file, of any kind
        why = str(error).split("\n")[0]
        raise DataError(f"{file} cannot be read as WAV ({type(error).__name__}: {why})") from error
    sound = _unit(stored)  # [samples] or [samples, channels]
    mono = sound.mean(axis=1) if sound.ndim == 2 else sound
    if found == rate or not len(mono):
        return mono.astype(np.float32)
    common = math.gcd(found, rate)
    return scipy.signal.resample_poly(mono, rate // common, found // common).astype(np.float32)


def _unit(stored: np.ndarray) -> np.ndarray:
    """Scale stored samples to [-1, 1]."""
    if stored.dtype == np.uint8:
        return (stored.astype(np.float32) - 128) / 128
    if stored.dtype.kind == "i":
        return stored.astype(np.float32) / -float(np.iinfo(stored.dtype).min)
    return stored.astype(np.float32)


def sounds_on_disk(
    folder: str | Path,
    *,
    seconds: float,
    rate: int = 16000,
    shift: float = 0.1,
    fraction: float = 0.1,
    seed: int = 0,
    threads: int = 16,
    workers: int = 0,
) -> Data:
    """Return labeled WAV files that are read for each batch anew.

    Args:
      folder: with a folder for each class, or with train/ and test/ of such folders.
      seconds: length of an example; longer sounds are cut, shorter ones followed by silence.
      rate: samples a second; files of another rate are resampled.
      shift: seconds by which a sound is moved at most in training, to either side.
      fraction: the share of train that a missing split gets; the files of one speaker may then be
        in several, so give folders of splits where that matters.
      seed: of the draw.
      threads: files read at once.
      workers: processes that read; 0 for threads.

    Returns:
      The data, on disk: ``sound`` float32 ``[n, seconds * rate]`` and ``label``.

    Raises:
      DataError: if the folder has no such files, or one cannot be read.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> folder = Path(tempfile.mkdtemp())
      >>> for i in range(20):
      ...     (folder / "ab"[i % 2]).mkdir(exist_ok=True)
      ...     scipy.io.wavfile.write(folder / "ab"[i % 2] / f"{i}.wav", 80, np.zeros(9, np.int16))
      >>> data = cj.data.sounds_on_disk(folder, seconds=0.2, rate=80)
      >>> data.train["sound"].shape, data.names
      ((16, 16), ('a', 'b'))
    """
    if not seconds > 0 or not 0 <= shift < seconds:
        raise ArgumentError(
            f"seconds must be above 0, and shift from 0 and below it; got {seconds} and {shift}"
        )
    notes: list[str] = []
    found = listings_of(Path(folder).expanduser(), notes, {"sounds": SOUNDS})
    sounds = Sounds(rate, round(seconds * rate), round(shift * rate))
    how = Reading(
        sounds.example, sounds.shifted, threads, workers, len(found.names), found.names, fraction,
        seed, Path(folder).name,
    )  # fmt: skip
    return data_of(found.files, how, notes)
