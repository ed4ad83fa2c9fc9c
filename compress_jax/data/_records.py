"""From examples one by one, such as a grain pipeline gives, to `Data` in memory."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from rich.console import Console

from compress_jax.core.arguments import whole
from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data._columns import Columns, Reading, from_columns, stacked
from compress_jax.data._data import Data
from compress_jax.data._dataset import progress
from compress_jax.data._tokenizer import Tokenizer

MOST = 10_000_000  # examples; more is a pipeline that repeats without end
CHUNK = 1000


def from_grain(
    train: Iterable[Mapping[str, Any]],
    validation: Iterable[Mapping[str, Any]] | None = None,
    test: Iterable[Mapping[str, Any]] | None = None,
    *,
    examples: int | None = None,
    text: str | None = None,
    label: str | None = None,
    tokenizer: Tokenizer | None = None,
    length: int = 128,
    fraction: float = 0.1,
    seed: int = 0,
    name: str = "grain",
    names: tuple[str, ...] = (),
) -> Data:
    """Read pipelines of examples into memory: of grain, of TFDS, or any sequence of dicts.

    An example is a dict of numbers, arrays and texts, not a batch of them: put no ``.batch()`` at
    the pipeline's end. Texts, also as bytes, are tokenized.

    Args:
      train: a `grain.MapDataset`, `grain.IterDataset` or `grain.DataLoader`, the data source of
        TFDS, a list, or anything that can be iterated over.
      validation: the like of it; None cuts it from train.
      test: the like of it; None cuts it from train.
      examples: how many to read of train, where the pipeline has no end.
      text: the entry with texts, where there are several.
      label: the entry with the labels of texts.
      tokenizer: see `from_texts`.
      length: tokens of a row of text.
      fraction: the share of train that a missing split gets.
      seed: of the draw.
      name: of the data set.
      names: of the classes.

    Returns:
      The data.

    Raises:
      DataError: if examples differ in entries, shapes or dtypes, there are none, or there is no end
        of them.

    Example:
      >>> import compress_jax as cj
      >>> import grain
      >>> import numpy as np
      >>> pipeline = grain.MapDataset.range(50).map(lambda i: {"x": np.ones(3) * i, "y": i % 2})
      >>> data = cj.data.from_grain(pipeline)
      >>> data.train["x"].shape, data.test["y"].dtype.name
      ((40, 3), 'int32')
    """
    if examples is not None:
        whole("examples", examples, 1)
    how = Reading(text, label, tokenizer, length, fraction, seed, name, names)
    given = {"train": train, "validation": validation, "test": test}
    columns = {
        part: read_columns(part, each, examples if part == "train" else None)
        for part, each in given.items()
        if each is not None
    }
    return from_columns(columns, how, [])


def read_columns(
    part: str, pipeline: Iterable[Mapping[str, Any]], limit: int | None = None
) -> Columns:
    """Read a pipeline into columns.

    Args:
      part: the name of the split, for errors.
      pipeline: see `from_grain`.
      limit: how many examples to read; None for all.

    Returns:
      Arrays and texts by name.

    Raises:
      DataError: if examples do not fit together.

    Example:
      >>> read_columns("train", [{"y": 1}, {"y": 2}])["y"].tolist()
      [1, 2]
    """
    if isinstance(pipeline, Mapping | str | bytes):
        raise ArgumentError(
            f"{part} must be a sequence of examples, each a dict; it is a "
            f"{type(pipeline).__name__}; a dict of arrays goes to Data.from_arrays"
        )
    total = _known(pipeline)
    if limit is None and total is not None and total > MOST:
        raise _endless(part)
    total = min((n for n in (limit, total) if n is not None), default=None)
    values: dict[str, list[Any]] = {}
    for i, example in enumerate(_shown(part, _examples(part, pipeline, total), limit, total)):
        if not isinstance(example, Mapping) or not example:
            raise DataError(
                f"example {i} of {part} must be a dict of arrays; it is a {type(example).__name__}"
            )
        values = values or {key: [] for key in example}
        if set(example) != set(values):
            raise DataError(
                f"example {i} of {part} has {sorted(example)}, and example 0 {sorted(values)}"
            )
        for key, value in example.items():
            values[key].append(value)
    if not values:
        raise DataError(f"{part} has no examples; does a filter leave none?")
    return {key: stacked(each, f"{key} of {part}") for key, each in values.items()}


def _endless(part: str) -> DataError:
    return DataError(
        f"{part} has not ended after {MOST:,} examples; does the pipeline repeat? Give "
        "examples=..., or leave .repeat() out"
    )


def _known(pipeline: Iterable[Any]) -> int | None:
    """Return how many examples there are; None where the pipeline does not say."""
    try:
        return len(pipeline)  # pyright: ignore[reportArgumentType]
    except (TypeError, NotImplementedError):
        return None


def _examples(part: str, pipeline: Any, total: int | None) -> Iterator[Any]:
    """Yield the examples; those that a grain pipeline filters out are None there."""
    if total is not None and hasattr(pipeline, "__getitems__"):  # many at once is faster
        for start in range(0, total, CHUNK):
            yield from pipeline.__getitems__(range(start, min(start + CHUNK, total)))
    elif total is not None and hasattr(pipeline, "__getitem__"):
        found = (pipeline[i] for i in range(total))
        yield from (each for each in found if each is not None)
    elif hasattr(pipeline, "__iter__"):
        yield from pipeline
    else:
        raise ArgumentError(
            f"{part} must be a pipeline or a sequence; it is a {type(pipeline).__name__}"
        )


def _shown(
    part: str, examples: Iterator[Any], limit: int | None, total: int | None
) -> Iterator[Any]:
    """Yield examples up to a limit, and show on a terminal how many there were."""
    if total is not None:
        with progress(f"reading {part}", max(total, 1)) as advance:
            for example in islice(examples, limit):
                yield example
                advance(1)
        return
    with Console(stderr=True).status(f"reading {part}") as status:
        for i, example in enumerate(examples):
            if i == MOST:
                raise _endless(part)
            if i % CHUNK == 0:
                status.update(f"reading {part}: {i:,} examples")
            yield example
