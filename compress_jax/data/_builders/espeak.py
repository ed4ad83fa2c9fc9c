"""Speech from the program espeak-ng, a process for each word: the same samples in any order."""

import re
import subprocess
from collections.abc import Sequence

import numpy as np
import scipy.signal

from compress_jax.core.errors import DataError

PROGRAM = "espeak-ng"
RATE = 16000
HEADER = 44  # bytes of the WAV header that espeak-ng writes


def version() -> str | None:
    """Return the version of espeak-ng, or None if it is not installed.

    Example:
      >>> version() is None or version()[0].isdigit()
      True
    """
    try:
        text = _run("--version").decode()
    except FileNotFoundError:
        return None
    found = re.search(r"\d+(\.\d+)+", text)
    return found.group() if found else "of an unknown version"


def missing_voices(voices: Sequence[str]) -> list[str]:
    """Return which variants of a voice espeak-ng does not have.

    Without this check it would speak with another voice and say nothing.

    Args:
      voices: names of files in espeak-ng's folder of variants, such as ``"f2"``.

    Returns:
      Those that it does not list.
    """
    listed = re.findall(r"!v/(.+?)\s*(?:\(|$)", _run("--voices=variant").decode(), re.MULTILINE)
    return [voice for voice in voices if voice not in set(listed)]


def speak(word: str, accent: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """Return a spoken word, without the silence around it.

    Args:
      word: what is said.
      accent: a language of espeak-ng, such as ``"en-us"``.
      voice: a variant, which is who speaks.
      speed: words a minute.
      pitch: 0 to 99.

    Returns:
      float64 ``[samples]`` in [-1, 1], 16,000 a second.

    Raises:
      DataError: if espeak-ng fails.
    """
    options = ["-v", f"{accent}+{voice}", "-s", str(speed), "-p", str(pitch), "--stdout", word]
    content = _run(*options)
    if content[:4] != b"RIFF" or len(content) <= HEADER:
        raise DataError(f"{PROGRAM} {' '.join(options)} gave no sound; is its installation whole?")
    rate = int.from_bytes(content[24:28], "little")
    samples = np.frombuffer(content[HEADER:], "<i2") / 32768
    common = np.gcd(rate, RATE)
    sound = scipy.signal.resample_poly(samples, RATE // common, rate // common)
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    if not len(loud):
        raise DataError(f"{PROGRAM} {' '.join(options)} gave silence; is its installation whole?")
    return sound[loud[0] : loud[-1] + 1]


def _run(*options: str) -> bytes:
    """Run espeak-ng and return its standard output."""
    done = subprocess.run([PROGRAM, *options], capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise DataError(f"{PROGRAM} {' '.join(options)} failed: {done.stderr.decode().strip()}")
    return done.stdout
