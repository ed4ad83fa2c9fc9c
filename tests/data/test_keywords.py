"""Keywords: what a clip holds, that voices are of one split, and what is said where none are."""

import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data._builders import espeak
from compress_jax.data._builders import keywords as builder
from compress_jax.data._builders.keywords import (
    LABELS,
    VOICES,
    WORDS,
    Clip,
    Keywords,
    SpeechCommands,
    clips,
    record,
)
from compress_jax.data._dataset import quiet
from compress_jax.data._keywords import _synthetic

FEW = {"train": ("m1", "f3"), "validation": ("f2",), "test": ("f1",)}


@pytest.fixture
def spoken(monkeypatch):
    """A program that hums a tone for each word, in place of espeak-ng."""
    said = []

    def speak(word, accent, voice, speed, pitch):
        said.append((word, accent, voice, speed, pitch))
        hz = 200 + 20 * len(word) + sum(map(ord, voice)) % 100
        return np.sin(2 * np.pi * hz * np.arange(8000) / 16000)

    monkeypatch.setattr(espeak, "speak", speak)
    monkeypatch.setattr(espeak, "version", lambda: "9.9")
    monkeypatch.setattr(espeak, "missing_voices", lambda voices: [])
    return said


def test_a_voice_is_of_one_split_and_speaks_once():
    names = [name for each in VOICES.values() for name in each]
    assert len(names) == len(set(names)) and {len(each) for each in VOICES.values()} == {67, 12}
    families = {split: {name.rstrip("0123456789") for name in own} for split, own in VOICES.items()}
    for split in ("validation", "test"):
        others = set().union(*(own for each, own in families.items() if each != split))
        # f1 to f5 and m1 to m8 are numbered, but have little in common.
        assert families[split] & others <= {"f", "m"}


def test_every_label_is_said_evenly_and_unknown_words_are_other_words():
    own = clips("f2", 4)
    counts = {label: sum(clip.label == label for clip in own) for label in LABELS}
    assert counts == dict.fromkeys(LABELS, 4) | {"_unknown_": 8}
    assert len({clip.key for clip in own}) == len(own)
    unknown = [clip.word for clip in own if clip.label == "_unknown_"]
    assert len(set(unknown)) == 8 and not set(unknown) & set(WORDS)
    assert all(clip.word == clip.label for clip in own if clip.label in WORDS)
    assert not any(clip.word for clip in own if clip.label == "_silence_")


def test_a_clip_depends_on_its_key_alone(spoken):
    clip = Clip("f2", "go", "go", 0)
    first = record(clip)
    record(Clip("m1", "stop", "stop", 5))
    np.testing.assert_array_equal(record(clip), first)
    assert first.dtype == np.int16 and first.shape == (16000,)
    assert (record(clip._replace(take=1)) != first).any()
    spoken.clear()
    for take in range(60):
        record(clip._replace(take=take))
    _, accents, _, speeds, pitches = zip(*spoken, strict=True)
    assert set(accents) == set(builder.ACCENTS)
    assert 120 <= min(speeds) < 140 and 200 < max(speeds) <= 220
    assert 20 <= min(pitches) < 30 and 70 < max(pitches) <= 80


def test_words_are_somewhere_in_noise_of_known_loudness(monkeypatch):
    starts = []
    ratios = []
    for take in range(40):
        # A word of one loud sample shows where it begins, and how loud the noise is beside it.
        word = np.zeros(8000)
        word[0] = 100.0
        monkeypatch.setattr(espeak, "speak", lambda *_, word=word: word)
        sound = record(Clip("f2", "go", "go", take)).astype(np.float64)
        start = int(np.abs(sound).argmax())
        starts.append(start)
        rest = np.delete(sound, start)
        ratios.append(20 * np.log10(np.sqrt(np.mean(rest**2)) * 100 / abs(sound[start])))
        peak = 20 * np.log10(32767 / np.abs(sound).max())
        assert 0.99 < peak < 20.01
    assert min(starts) < 1000 and 7000 < max(starts) <= 8000
    below = np.array(ratios) - 20 * np.log10(np.sqrt(np.mean(word**2)))
    assert -25.5 < below.min() < -20 and -5 < below.max() < 0.5


def test_silence_is_noise_of_many_colors(spoken):
    tilts = []
    for take in range(30):
        sound = record(Clip("f2", "_silence_", "", take)).astype(np.float64)
        power = np.abs(np.fft.rfft(sound)) ** 2
        tilts.append(np.log2(power[500:1000].mean() / power[4000:8000].mean()) / 3)
    assert not spoken
    assert min(tilts) < 0.3 and max(tilts) > 1.5 and max(tilts) < 2.2  # the power of frequency


def test_prepared_data_are_the_same_each_time_and_disjoint_in_voices(spoken, tmp_path):
    data = _synthetic(tmp_path / "a", 2, FEW)
    assert data.train["sound"].shape == (52, 16000) and data.train["sound"].dtype == np.int16
    assert len(data.test["label"]) == len(data.validation["label"]) == 26
    assert data.classes == 12 and data.names == LABELS
    assert np.bincount(data.test["label"]).tolist() == [2] * 11 + [4]
    assert "synthetic" in data.name and "espeak-ng 9.9" in data.notes[0]
    assert "none of which is among the 2 of train" in data.notes[1]
    calls = len(spoken)
    again = _synthetic(tmp_path / "a", 2, FEW)
    assert len(spoken) == calls and again.fingerprint == data.fingerprint
    shutil.rmtree(tmp_path / "a")
    assert _synthetic(tmp_path / "b", 2, FEW).fingerprint == data.fingerprint
    with quiet():
        made = Keywords(takes=2, data_dir=tmp_path / "b", file_format="array_record")
        heard = {
            part: {each["voice"].decode() for each in made.as_data_source(part)} for part in FEW
        }
    assert heard == {part: set(names) for part, names in FEW.items()}


def test_other_numbers_of_takes_are_other_data(spoken, tmp_path):
    one = _synthetic(tmp_path, 1, FEW)
    two = _synthetic(tmp_path, 2, FEW)
    assert (len(one.train["label"]), len(two.train["label"])) == (26, 52)
    assert len(_synthetic(tmp_path, 1, FEW).train["label"]) == 26


def test_without_espeak_one_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="espeak-ng, which is not installed; install it .apt-get"):
        cj.data.keywords(data_dir=tmp_path)


def test_a_voice_that_is_missing_is_named(monkeypatch, tmp_path):
    listing = (
        b"Pty Language\n 5  variant  --/M  Andy   !v/Andy       (en-us 5)\n 5 v --/F  f !v/f2\n"
    )
    answers = {
        "--version": b"eSpeak NG text-to-speech: 1.40  Data at: /x",
        "--voices=variant": listing,
    }
    monkeypatch.setattr(espeak, "_run", lambda option: answers[option])
    assert espeak.missing_voices(["Andy", "f2", "f9"]) == ["f9"]
    with pytest.raises(DataError, match="espeak-ng 1.40 lacks the voices Alex, Alicia, anika"):
        cj.data.keywords("espeak", data_dir=tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"RIFF" + bytes(40), b"RIFF" + bytes(20) + b"\x22\x56" + bytes(5000)]
)
def test_a_program_that_says_nothing_is_an_error(monkeypatch, content):
    monkeypatch.setattr(espeak, "_run", lambda *options: content)
    with pytest.raises(DataError, match="en-us.f2 .* gave (no sound|silence)"):
        espeak.speak("go", "en-us", "f2", 150, 50)


def test_the_silence_around_a_word_goes_and_its_rate_is_ours(monkeypatch):
    tone = np.sin(2 * np.pi * 441 * np.arange(4410) / 22050)
    samples = np.concatenate([np.zeros(2205), tone, np.zeros(6615)])
    header = b"RIFF" + bytes(20) + (22050).to_bytes(4, "little") + bytes(16)
    content = header + (samples * 16384).astype("<i2").tobytes()
    monkeypatch.setattr(espeak, "_run", lambda *options: content)
    sound = espeak.speak("go", "en-us", "f2", 150, 50)
    assert abs(len(sound) - 3200) < 40
    spectrum = np.abs(np.fft.rfft(sound, 16000))
    assert spectrum.argmax() == 441 and abs(np.abs(sound).max() - 0.5) < 0.02


def test_damaged_data_are_not_read(spoken, tmp_path):
    _synthetic(tmp_path, 1, FEW)
    (file,) = tmp_path.rglob("*test.array_record*")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        _synthetic(tmp_path, 1, FEW)


class Recorded(SpeechCommands, skip_registration=True):
    """Clips of three lengths, stored as TFDS's own builder stores them."""

    name = "speech_commands"

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(n) for split, n in PARTS.items()}

    def _generate_examples(self, n=0):
        for i in range(n):
            length = (16000, 12000, 16500)[i % 3]
            yield i, {"audio": np.full(length, i + 1, np.int16), "label": LABELS[i % 12]}


PARTS = {"train": 24, "validation": 6, "test": 5}


def test_recorded_speech_comes_first_if_it_is_prepared(tmp_path, spoken):
    with quiet():
        Recorded(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = cj.data.keywords(data_dir=tmp_path)
    assert data.name == "speech_commands" and not spoken and "padded with zeros" in data.notes[0]
    assert {part: len(getattr(data, part)["label"]) for part in PARTS} == PARTS
    for sound, label in zip(data.train["sound"], data.train["label"], strict=True):
        i = int(sound[0]) - 1
        length = min(16000, (16000, 12000, 16500)[i % 3])
        assert (sound[:length] == i + 1).all() and not sound[length:].any() and label == i % 12


def test_recorded_speech_that_is_not_prepared_says_how_it_is(tmp_path):
    with pytest.raises(DataError, match="only with TensorFlow; .* file_format='array_record'"):
        cj.data.keywords("speech_commands", data_dir=tmp_path)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ArgumentError, match="source must be 'any', 'speech_commands' or 'espeak'"):
        cj.data.keywords("librispeech", data_dir=tmp_path)
    with pytest.raises(ArgumentError, match="takes must be a whole number of at least 1"):
        cj.data.keywords(takes=0, data_dir=tmp_path)


@pytest.mark.skipif(espeak.version() is None, reason="needs espeak-ng")
def test_espeak_has_the_voices_and_says_the_same_each_time():
    assert espeak.missing_voices([name for each in VOICES.values() for name in each]) == []
    first = espeak.speak("yes", "en-us", "f2", 150, 50)
    again = espeak.speak("yes", "en-us", "f2", 150, 50)
    np.testing.assert_array_equal(first, again)
    other = espeak.speak("yes", "en-us", "m3", 150, 50)
    assert 3000 < len(first) < 16000 and (len(other) != len(first) or (other != first).any())
    slow = espeak.speak("yes", "en-us", "f2", 120, 50)
    assert len(slow) > 1.1 * len(first)


def test_it_is_no_data_set_of_tfds():
    """Our builders are not registered: a name of TFDS means TFDS's."""
    assert "keywords" not in tfds.list_builders(with_community_datasets=False)
