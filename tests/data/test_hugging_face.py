import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from compress_jax.core.errors import DataError
from compress_jax.data import TextData, from_hugging_face

pa = pytest.importorskip("pyarrow")
PARTS = ("train", "validation", "test")


def save(folder, columns, features=None, shards=1):
    """Write what `datasets.Dataset.save_to_disk` writes, version 5.2.0."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    rows = -(-table.num_rows // shards)
    for i, name in enumerate(names):
        part = table.slice(i * rows, rows)
        with pa.OSFile(str(folder / name), "wb") as sink:
            with pa.ipc.new_stream(sink, part.schema) as writer:
                writer.write_table(part, max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features or {}}))


def names_of(*classes):
    return {"label": {"names": list(classes), "_type": "ClassLabel"}}


def test_columns_of_all_kinds_come_back(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4, 3)).astype(np.float32)
    v = rng.integers(0, 9, (30, 5))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(v.ravel()), 5)
    nested = pa.array(x.tolist(), pa.list_(pa.list_(pa.float32())))
    flags = [i % 2 == 0 for i in range(30)]
    columns = {"x": nested, "v": fixed, "y": np.arange(30.0), "flag": flags}
    save(tmp_path, columns, shards=3)
    data = from_hugging_face(tmp_path)
    rows = {key: np.concatenate([getattr(data, part)[key] for part in PARTS]) for key in data.train}
    order = np.argsort(rows["y"])
    assert np.array_equal(rows["x"][order], x)
    assert np.array_equal(rows["v"][order], v)
    assert np.array_equal(rows["flag"][order], np.arange(30) % 2 == 0)
    assert [len(getattr(data, part)["y"]) for part in PARTS] == [24, 3, 3]


def test_splits_are_those_of_the_folder_and_hidden_labels_are_told(tmp_path):
    rng = np.random.default_rng(0)

    def texts(n):
        return [" ".join(f"w{k}" for k in rng.integers(0, 99, 9)) for _ in range(n)]

    listed = {"train": 40, "validation": 10, "test": 10, "unsupervised": 5}
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": list(listed)}))
    for part, n in listed.items():
        label = [-1] * n if part == "test" else [i % 2 for i in range(n)]
        columns = {"sentence": texts(n), "label": label, "idx": list(range(n))}
        save(tmp_path / part, columns, names_of("bad", "good"))
    data = from_hugging_face(tmp_path, length=24)
    assert isinstance(data, TextData)
    assert len(data.test["label"]) == 10  # that of validation
    assert len(data.train["label"]) + len(data.validation["label"]) == 40
    assert data.names == ("bad", "good")
    notes = " ".join(data.notes)
    for expected in ("'unsupervised' is left out", "hidden (-1)", "test: the validation split",
                     "the column 'sentence'", "not used: idx"):  # fmt: skip
        assert expected in notes


def test_images_are_decoded(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 4), dtype=np.uint8)
    images = []
    for each in pixels:
        file = io.BytesIO()
        Image.fromarray(each).save(file, "png")
        images.append({"bytes": file.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, kind), "label": [i % 2 for i in range(20)]}
    save(tmp_path, columns, names_of("a", "b"))
    data = from_hugging_face(tmp_path)
    rows = np.concatenate([getattr(data, part)["image"] for part in PARTS])
    rows = np.rint((rows * data.std + data.mean) * 255).astype(np.uint8)[..., 0]
    assert {row.tobytes() for row in rows} == {row.tobytes() for row in pixels}
    assert from_hugging_face(tmp_path, size=3).train["image"].shape[1:] == (3, 3, 1)


def test_columns_that_cannot_be_used_are_left_out_and_told(tmp_path):
    save(tmp_path, {"x": np.ones(20), "when": pa.array([0] * 20, pa.timestamp("s"))})
    data = from_hugging_face(tmp_path)
    assert sorted(data.train) == ["x"]
    assert "train: the column 'when' (timestamp[s]) is left out" in data.notes


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": [[1], [1, 2]] * 10}, {}, "x of train has rows of 1 to 2 values; pad them"),
        ({"x": [1.0, None] * 10}, {}, "x of train lacks a value in 10 rows"),
        ({"x": [[1.0], [None]] * 10}, {}, "x of train lacks 10 values"),
        ({"a": ["s"] * 20, "b": ["t"] * 20, "label": [0] * 20}, {}, "say which is meant: text='a'"),
        ({"a": ["s"] * 20, "y": [0] * 20, "z": [0] * 20}, {}, "which of the columns"),
        ({"x": [1] * 20}, {"text": "x"}, "text='x' is no column of texts"),
        ({"a": ["s"] * 20, "y": [0] * 20}, {"label": "z"}, "label='z' is no column"),
        ({"x": pa.array([], pa.int32())}, {}, "has no rows"),
    ],
)
def test_what_does_not_fit_is_said(columns, options, message, tmp_path):
    save(tmp_path, columns)
    with pytest.raises(DataError, match=message):
        from_hugging_face(tmp_path, **options)


def test_wrong_folders_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="there is no folder"):
        from_hugging_face(tmp_path / "none")
    with pytest.raises(DataError, match="save_to_disk"):
        from_hugging_face(tmp_path)
    save(tmp_path, {"x": np.ones(20)})
    file = tmp_path / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="arrow cannot be read by pyarrow"):
        from_hugging_face(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="state.json cannot be read"):
        from_hugging_face(tmp_path)


def test_without_pyarrow_one_sentence_says_so(tmp_path, monkeypatch):
    save(tmp_path, {"x": np.ones(20)})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        from_hugging_face(tmp_path)


def test_files_outside_the_folder_are_not_read(tmp_path):
    """A state.json may come from anywhere."""
    save(tmp_path / "other", {"x": np.ones(20)})
    save(tmp_path / "set", {"x": np.ones(20)})
    state = {"_data_files": [{"filename": "../other/data-00000-of-00001.arrow"}]}
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    (tmp_path / "set" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match="set/data-00000-of-00001.arrow cannot be read"):
        from_hugging_face(tmp_path / "set")
