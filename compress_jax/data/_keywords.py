"""`keywords`: spoken commands of a second, recorded or synthetic."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress_jax.core.arguments import one_of, whole
from compress_jax.core.errors import DataError
from compress_jax.data._builders import Keywords, SpeechCommands, espeak
from compress_jax.data._builders.keywords import ACCENTS, LABELS, SAMPLES
from compress_jax.data._data import PARTS, Data, fingerprint
from compress_jax.data._dataset import damaged, data_error, data_home, progress, quiet
from compress_jax.data._preprocess import Split

_CHUNK = 1000  # records in one call


def keywords(
    source: Literal["any", "speech_commands", "espeak"] = "any",
    *,
    data_dir: str | Path | None = None,
    takes: int = 6,
) -> Data:
    """Load spoken keywords: ten words, ``_silence_``, and ``_unknown_`` for any other word.

    Recorded ones are TFDS's ``speech_commands``, if it is prepared. Synthetic ones are spoken by
    the program espeak-ng in 90 voices, with accents, speeds, pitches, noise and places of the word
    drawn at random, which always gives the same data; they are prepared on disk at the first call
    (1 to 3 minutes on 2 cores). The voices of validation and test are in no other split.

    Args:
      source: ``"speech_commands"``; ``"espeak"`` for synthetic ones; ``"any"`` for the former where
        it is prepared, else the latter.
      data_dir: the folder of prepared data; by default ``$TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``.
      takes: how often each synthetic voice says each keyword.

    Returns:
      The `Data`: ``sound`` int16 ``[n, 16000]``, a second at 16 kHz, and ``label`` int32 ``[n]``.
      Front ends such as `MFCC` take the integers as they are. ``name`` and ``notes`` say which of
      the two it is.

    Raises:
      DataError: if there is neither a prepared set nor espeak-ng, with what to do.

    Example:
      >>> import compress_jax as cj
      >>> data = cj.data.keywords()  # doctest: +SKIP
      >>> data.name, data.train["sound"].shape, data.classes  # doctest: +SKIP
      ('keywords (synthetic)', (5148, 16000), 12)

    References:
      Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", 2018;
      https://github.com/espeak-ng/espeak-ng.
    """
    one_of("source", source, ("any", "speech_commands", "espeak"))
    whole("takes", takes, 1)
    home = data_home(data_dir)
    recorded = None if source == "espeak" else _recorded(home)
    if recorded is not None:
        return recorded
    if source == "speech_commands":
        raise DataError(
            f"speech_commands is not prepared in {home}, and TFDS can prepare it only with "
            "TensorFlow; where there is one, and a network, run tfds.builder('speech_commands', "
            f"file_format='array_record', data_dir='{home}').download_and_prepare()"
        )
    return _synthetic(home, takes)


def _recorded(home: Path) -> Data | None:
    """Return Speech Commands, or None if it is not prepared."""
    place = home / "speech_commands"
    builder, prepared = _made(place, lambda: SpeechCommands(**_common(home)))
    if not prepared:
        return None
    splits = {part: _read(builder, part) for part in PARTS}
    note = f"sound: clips shorter or longer than {SAMPLES:,} samples are padded with zeros or cut"
    return _data("speech_commands", splits, (note,))


def _synthetic(home: Path, takes: int, voices: dict[str, tuple[str, ...]] | None = None) -> Data:
    """Return clips of espeak-ng, which are prepared first if they are not."""

    def builder(advance: Callable[[int], None] = lambda n: None) -> Keywords:
        return Keywords(takes=takes, voices=voices, advance=advance, **_common(home))

    place = home / "keywords"
    made, prepared = _made(place, builder)
    if not prepared:
        _require_espeak(made.voices)
        try:
            with progress("speaking keywords", made.total) as advance, quiet():
                builder(advance).download_and_prepare()
        except Exception as error:
            if not _made(place, builder)[1]:  # else another process was faster
                raise data_error(error, "keywords", home) from error
        made, _ = _made(place, builder)
    splits = {part: _read(made, part) for part in PARTS}
    version = (made.info.metadata or {}).get("espeak")
    counts = {part: len(names) for part, names in made.voices.items()}
    return _data(
        "keywords (synthetic)",
        splits,
        (
            f"sound: synthetic speech of espeak-ng {version}, in {len(ACCENTS)} English accents; "
            "accuracy on it is not accuracy on recorded speech",
            f"validation and test: {counts['validation']} and {counts['test']} voices, none of "
            f"which is among the {counts['train']} of train",
        ),
    )


def _require_espeak(voices: dict[str, tuple[str, ...]]) -> None:
    """Raise a DataError unless espeak-ng is installed and has all voices."""
    if espeak.version() is None:
        raise DataError(
            "keywords are spoken by the program espeak-ng, which is not installed; install it "
            "(apt-get install espeak-ng, or brew install espeak-ng) and run again"
        )
    missing = espeak.missing_voices([name for names in voices.values() for name in names])
    if missing:
        raise DataError(
            f"espeak-ng {espeak.version()} lacks the voices {', '.join(missing)}; install its data "
            "whole, of version 1.51 or later (apt-get install espeak-ng espeak-ng-data)"
        )


def _common(home: Path) -> dict[str, Any]:
    return {"data_dir": home, "file_format": "array_record"}


def _made(place: Path, make: Callable[[], Any]) -> tuple[Any, bool]:
    """Return a builder, and whether its data are prepared; their metadata may be damaged."""
    try:
        with quiet():
            builder = make()
            return builder, builder.is_prepared()
    except Exception as error:
        raise DataError(damaged(place, error)) from error


def _read(builder: Any, part: str) -> Split:
    """Read a split into memory: ``sound`` int16 ``[n, 16000]`` and ``label`` int32 ``[n]``."""
    try:
        with quiet():
            source = builder.as_data_source(part)
            sounds = np.zeros((len(source), SAMPLES), np.int16)
            labels = np.empty(len(source), np.int32)
            for start in range(0, len(source), _CHUNK):
                rows = range(start, min(start + _CHUNK, len(source)))
                for row, each in zip(rows, source.__getitems__(rows), strict=True):
                    heard = each["audio"][:SAMPLES]
                    sounds[row, : len(heard)] = heard
                    labels[row] = each["label"]
    except Exception as error:
        raise DataError(damaged(builder.data_path, error)) from error
    return {"sound": sounds, "label": labels}


def _data(name: str, splits: dict[str, Split], notes: tuple[str, ...]) -> Data:
    return Data(
        name,
        splits["train"],
        splits["validation"],
        splits["test"],
        classes=len(LABELS),
        names=LABELS,
        fingerprint=fingerprint(splits),
        maximum=2.0**15,
        notes=notes,
    )
