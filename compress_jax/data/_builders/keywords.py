"""Keywords as TFDS builders: spoken by espeak-ng, or recorded for Speech Commands."""

import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from compress_jax.core.errors import DataError
from compress_jax.data._builders import espeak

RATE = espeak.RATE
SAMPLES = RATE  # of a clip: one second
WORDS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes")
SILENCE = "_silence_"
UNKNOWN = "_unknown_"
LABELS = (*WORDS, SILENCE, UNKNOWN)
# What is said where the label is unknown; words of Speech Commands, too.
OTHERS = (
    "bed", "bird", "cat", "dog", "happy", "house", "tree", "wow", "learn", "visual", "follow",
    "forward", "zero", "one", "two", "three", "four", "five", "seven", "nine",
)  # fmt: skip
ACCENTS = (
    "en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029",
    "en-us-nyc",
)  # fmt: skip
# Who speaks. Variants that sound nearly alike (Andy and AnxiousAndy, Gene and Gene2) are of one
# split; whispers, effects and copies (adam, caleb and klatt6 are klatt) are left out.
VOICES = {
    "train": (
        "Alex", "Alicia", "Andy", "anika", "anikaRobot", "AnxiousAndy", "aunty", "benjamin",
        "croak", "Denis", "Diogo", "ed", "edward", "edward2", "f3", "f4", "Gene", "Gene2",
        "grandpa", "gustave", "Henrique", "Hugo", "iven", "iven2", "iven3", "iven4", "john",
        "kaukovalta", "klatt", "klatt2", "klatt3", "klatt4", "klatt5", "Lee", "linda", "m1", "m2",
        "m3", "m5", "m6", "m7", "marcelo", "Marco", "max", "Michael", "michel", "miguel", "Mike",
        "Nguyen", "norbert", "paul", "RicishayMax", "RicishayMax2", "RicishayMax3", "rob",
        "robert", "robosoft", "robosoft2", "robosoft3", "robosoft4", "robosoft5", "robosoft6",
        "robosoft7", "robosoft8", "steph", "steph2", "Tweaky",
    ),
    "validation": (
        "antonio", "belinda", "david", "f2", "grandma", "m8", "Mario", "Mr serious", "pablo",
        "shelby", "Storm", "zac",
    ),
    "test": (
        "Andrea", "Annie", "boris", "f1", "f5", "Jacky", "m4", "pedro", "quincy", "sandro",
        "travis", "victor",
    ),
}  # fmt: skip


class Clip(NamedTuple):
    """What is heard in a second.

    Attributes:
      voice: who speaks.
      label: one of `LABELS`.
      word: what is said; empty for silence.
      take: counts clips of the same voice and label.
    """

    voice: str
    label: str
    word: str
    take: int

    @property
    def key(self) -> str:
        """What the clip is known by, and its random numbers come from."""
        return f"{self.voice}/{self.label}/{self.take}"


def clips(voice: str, takes: int) -> list[Clip]:
    """Return the clips of a voice: each keyword and silence ``takes`` times, twice as many others.

    Example:
      >>> len(clips("f2", 3)), clips("f2", 3)[0].key
      (39, 'f2/down/0')
    """
    known = [Clip(voice, word, word, take) for word in WORDS for take in range(takes)]
    silent = [Clip(voice, SILENCE, "", take) for take in range(takes)]
    first = int(_random(voice).integers(len(OTHERS)))
    said = [OTHERS[(first + take) % len(OTHERS)] for take in range(2 * takes)]
    unknown = [Clip(voice, UNKNOWN, word, take) for take, word in enumerate(said)]
    return [*known, *silent, *unknown]


def record(clip: Clip) -> np.ndarray:
    """Return the samples of a clip, which depend on nothing else: int16 ``[16000]``.

    The word is said in a random accent, speed and pitch, at a random place of the second, and there
    is noise of a random color (its power falls with frequency to a power of 0 to 2), 0 to 25 dB
    below the word. Peaks are 1 to 20 dB below the largest sample.
    """
    random = _random(clip.key)
    # Drawn for silence too: what is drawn after them does not depend on the label.
    accent = ACCENTS[random.integers(len(ACCENTS))]
    speed, pitch = (int(random.integers(*ends)) for ends in ((120, 221), (20, 81)))
    noise = _noise(random)
    ratio = 10 ** (-random.uniform(0, 25) / 20)
    level = 10 ** (-random.uniform(1, 20) / 20)
    place = random.uniform()
    if clip.word:
        word = espeak.speak(clip.word, accent, clip.voice, speed, pitch)[:SAMPLES]
        loudness = np.sqrt(np.mean(word**2))
        start = round(place * (SAMPLES - len(word)))
        sound = ratio * loudness * noise
        sound[start : start + len(word)] += word
    else:
        sound = noise
    return np.round(sound * (level * 32767 / np.abs(sound).max())).astype(np.int16)


def _random(key: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(key.encode()))


def _noise(random: np.random.Generator) -> np.ndarray:
    """Return a second of noise of a random color, with a root mean square of 1."""
    spectrum = np.fft.rfft(random.normal(size=SAMPLES))
    frequencies = np.maximum(np.arange(len(spectrum)), 50.0)  # flat below 50 Hz
    noise = np.fft.irfft(spectrum * frequencies ** (-random.uniform(0, 2) / 2), SAMPLES)
    return noise / np.sqrt(np.mean(noise**2))


def _ignore(examples: int) -> None:
    """Do nothing with the number of examples written."""


class Keywords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Synthetic clips of a second: ten keywords, other words, and silence.

    Attributes:
      takes: how often each voice says each keyword.
      voices: names by split.
      advance: called with the number of examples that were written.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        takes: int = 6,
        voices: dict[str, tuple[str, ...]] | None = None,
        advance: Callable[[int], None] = _ignore,
        **kwargs: Any,
    ):
        """Store our arguments; the others are `tfds.core.DatasetBuilder`'s."""
        self.takes = takes
        self.voices = voices or VOICES
        self.advance = advance
        config = tfds.core.BuilderConfig(name=f"takes_{takes}", version=self.VERSION)
        super().__init__(config=config, **kwargs)

    @property
    def total(self) -> int:
        """The number of clips."""
        return sum(len(clips(v, self.takes)) for names in self.voices.values() for v in names)

    def _info(self) -> tfds.core.DatasetInfo:
        """Describe the features; samples are raw bytes, as lists of integers are ten times slower.

        The program's version is kept with the data: another one may pronounce differently.
        """
        features = tfds.features.FeaturesDict(
            {
                "audio": tfds.features.Tensor(shape=(SAMPLES,), dtype=np.int16, encoding="bytes"),
                "label": tfds.features.ClassLabel(names=list(LABELS)),
                "voice": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Keywords of Speech Commands, synthesized by espeak-ng.",
            features=features,
            supervised_keys=("audio", "label"),
            homepage="https://github.com/espeak-ng/espeak-ng",
            metadata=tfds.core.MetadataDict(espeak=espeak.version() or ""),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        """Make the splits; a voice is in one of them."""
        return {split: self._generate_examples(names) for split, names in self.voices.items()}

    def _generate_examples(self, voices: tuple[str, ...]) -> Iterator[Any]:
        """Yield the clips of each voice, a process for each word."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for voice in voices:
                own = clips(voice, self.takes)
                for clip, samples in zip(own, pool.map(record, own), strict=True):
                    yield clip.key, {"audio": samples, "label": clip.label, "voice": voice}
                self.advance(len(own))


class SpeechCommands(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS's own data set where it is prepared, with its samples as plain integers.

    TFDS's feature for sound needs TensorFlow even to be named; what it stores are integers.
    """

    VERSION = tfds.core.Version("0.0.3")

    def _info(self) -> tfds.core.DatasetInfo:
        """Describe the features as they are stored."""
        features = tfds.features.FeaturesDict(
            {
                "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                "label": tfds.features.ClassLabel(names=list(LABELS)),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Speech Commands, version 0.02.",
            features=features,
            supervised_keys=("audio", "label"),
            homepage="https://arxiv.org/abs/1804.03209",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        """Refuse: the published archives are prepared by the stock builder."""
        raise DataError("speech_commands is prepared by TFDS with TensorFlow")

    def _generate_examples(self) -> Iterator[Any]:
        """Never called."""
        raise NotImplementedError
