import grain
import numpy as np
import pytest

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data import TextData, from_grain

PARTS = ("train", "validation", "test")


def example(i):
    return {"x": np.array([i, i * i], np.float32), "y": i % 3}


def rows(data, key):
    return np.concatenate([getattr(data, part)[key] for part in PARTS])


def pipelines():
    source = [example(i) for i in range(50)]
    dataset = grain.MapDataset.source(source)
    yield "list", source
    yield "map", dataset
    yield "shuffled", dataset.seed(3).shuffle()
    yield "iter", dataset.to_iter_dataset()
    yield "generator", (each for each in source)
    yield (
        "loader",
        grain.DataLoader(
            data_source=source,
            sampler=grain.samplers.IndexSampler(50, shuffle=False, num_epochs=1),
            worker_count=0,
        ),
    )


@pytest.mark.parametrize("name", [name for name, _ in pipelines()])
def test_pipelines_of_all_kinds_give_all_examples(name):
    data = from_grain(dict(pipelines())[name])
    assert sorted(rows(data, "x")[:, 0]) == [*range(50)]
    assert np.array_equal(rows(data, "x")[:, 0] % 3, rows(data, "y"))
    assert [len(getattr(data, part)["y"]) for part in PARTS] == [40, 5, 5]
    assert "y: int64 is stored as int32" in data.notes


def test_what_a_filter_drops_is_not_there():
    dataset = grain.MapDataset.source([example(i) for i in range(60)])
    data = from_grain(dataset.filter(lambda each: each["y"] != 0))
    assert sorted(rows(data, "x")[:, 0]) == [i for i in range(60) if i % 3]


def test_splits_of_ones_own_are_kept():
    parts = [[example(i) for i in range(n, n + 20)] for n in (0, 100, 200)]
    data = from_grain(*parts)
    assert [getattr(data, part)["x"][0, 0] for part in PARTS] == [0, 100, 200]


def test_endless_pipelines_need_a_number():
    endless = grain.MapDataset.source([example(i) for i in range(20)]).repeat()
    with pytest.raises(DataError, match="does the pipeline repeat. Give examples="):
        from_grain(endless)
    assert len(rows(from_grain(endless, examples=30), "y")) == 30
    iterator = endless.to_iter_dataset()
    assert len(rows(from_grain(iterator, examples=30), "y")) == 30


def test_texts_as_bytes_are_tokenized():
    source = [
        {"sentence": f"ü number {i} of {i * 7}".encode(), "label": i % 2, "idx": i}
        for i in range(40)
    ]
    data = from_grain(source, length=16)
    assert isinstance(data, TextData)
    assert data.train["tokens"].shape[1] == 16
    assert "columns that are not used: idx" in data.notes


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], DataError, "train has no examples"),
        ([1, 2], DataError, "example 0 of train must be a dict"),
        ([{"x": 1}, {"y": 1}], DataError, r"example 1 of train has \['y'\], and example 0 \['x'\]"),
        ([{"x": 1}, {"x": 0.5}], DataError, "x of train of example 1 is float64"),
        (
            [{"x": [1]}, {"x": [1, 2]}],
            DataError,
            r"is int64\[2\], and that of example 0 is int64\[1",
        ),
        ([{"x": None}], DataError, "is a NoneType; examples hold numbers"),
        ([{"x": b"\xff"}], DataError, "no text in UTF-8"),
        ({"x": np.ones(3)}, ArgumentError, "a dict of arrays goes to Data.from_arrays"),
        (3, ArgumentError, "must be a pipeline or a sequence"),
    ],
)
def test_what_does_not_fit_is_said(source, error, message):
    with pytest.raises(error, match=message):
        from_grain(source)
    with pytest.raises(ArgumentError, match="examples"):
        from_grain([example(0)], examples=0)
