"""Examples that stay on disk give the batches that examples in memory give."""

import json
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data._disk.stored import take
from compress_jax.data._feed import Part

N = 50


def number(record):
    return {"x": np.full((2, 3), record, np.float32), "label": record % 5}


def noisy(record, random):
    return {"x": np.float32(record) + random.normal(size=(2, 3)), "label": record % 5}


@pytest.fixture
def arrays():
    x = np.broadcast_to(np.arange(N, dtype=np.float32)[:, None, None], (N, 2, 3))
    return {"x": np.array(x), "label": np.arange(N, dtype=np.int32) % 5}


class Counted:
    """Records that count how often each is read."""

    def __init__(self, n):
        self.reads = np.zeros(n, int)

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, i):
        self.reads[i] += 1
        return int(i)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_are_those_of_memory_in_any_order_of_steps(arrays, threads):
    stored = cj.data.Records(range(N), number, threads=threads).columns()
    ours = cj.data.batches(stored, 8, seed=3)
    theirs = cj.data.batches(arrays, 8, seed=3)
    for step in (0, 1, 2, 3, 17, 18, 5, 4, 1000, 0):  # onwards, as resumed, and backwards
        assert_same(ours[step], theirs[step])


def test_evaluation_sees_every_example_once_with_its_padding(arrays):
    stored = cj.data.Records(range(N), number).columns()
    for ours, theirs in zip(
        cj.data.eval_batches(stored, 16), cj.data.eval_batches(arrays, 16), strict=True
    ):
        assert_same(ours, theirs)


def test_an_example_is_read_once_for_all_its_entries():
    source = Counted(N)
    split = cj.data.Records(source, number).columns()
    before = source.reads.copy()
    take({**split, "more": np.arange(N)}, np.arange(10))
    assert (source.reads - before)[:10].tolist() == [1] * 10
    # Entry by entry, as code that knows only arrays asks for them.
    before = source.reads.copy()
    rows = {key: column[20:30] for key, column in split.items()}
    assert rows["label"].tolist() == [i % 5 for i in range(20, 30)]
    assert (source.reads - before)[20:30].tolist() == [1] * 10


def test_augmentation_depends_on_seed_step_and_record_alone():
    def feed(seed=1, threads=4):
        return cj.data.batches(
            cj.data.Records(range(N), number, noisy, threads=threads).columns(), 8, seed=seed
        )

    first = feed()
    assert_same(first[9], feed(threads=1)[9])
    assert_same(first[9], first[9])
    epoch = N // 8
    a, b = (np.concatenate([first[e * epoch + s]["x"] for s in range(epoch)]) for e in (0, 1))
    assert not np.isin(a, b).any()  # drawn anew in each epoch
    # As examples are, in evaluation.
    plain = next(iter(cj.data.eval_batches(cj.data.Records(range(N), number, noisy).columns(), 4)))
    np.testing.assert_array_equal(plain["x"][:, 0, 0], range(4))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_parts_of_processes_are_the_batch(arrays, processes):
    source = Counted(N)
    stored = cj.data.Records(source, noisy_int, noisy).columns()
    whole = cj.data.batches(stored, 8, seed=3)[2]
    read = source.reads.sum()
    rows = np.arange(8).reshape(processes, -1)
    parts = [cj.data.batches(stored, 8, seed=3, rows=own)[2] for own in rows]
    np.testing.assert_array_equal(np.concatenate([each["x"].values for each in parts]), whole["x"])
    own = parts[-1]["x"]
    assert own.shape == whole["x"].shape and len(own) == 8
    last = slice(int(rows[-1][0]), 8)
    np.testing.assert_array_equal(own[last, :, 1:], whole["x"][last, :, 1:])
    assert source.reads.sum() > read


def noisy_int(record):
    return {"x": np.full((2, 3), record, np.float64), "label": record % 5}


def test_rows_of_interleaved_devices_go_where_they_belong():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8])[[0, 4, 1, 5, 2, 6, 3, 7]], ("data",))
    where = NamedSharding(mesh, PartitionSpec("data"))
    values = np.arange(16.0)
    # What a process with half of the devices would hold: rows that do not follow each other.
    rows = np.array([0, 1, 4, 5, 8, 9, 12, 13])
    part = Part(values[rows], rows, 16)
    owned = where.devices_indices_map((16,))
    for device in list(mesh.devices)[::2]:
        index = owned[device]
        np.testing.assert_array_equal(part[index], values[index])


def test_array_records_and_pipelines_of_grain_are_sources(tmp_path, arrays):
    file = str(tmp_path / "train.array_record")
    writer = ArrayRecordWriter(file, "group_size:1")
    for i in range(N):
        writer.write(json.dumps(i).encode())
    writer.close()
    records = grain.sources.ArrayRecordDataSource([file])
    stored = cj.data.Records(records, lambda record: number(json.loads(record))).columns()
    pipeline = grain.MapDataset.range(N).map(number)
    piped = cj.data.Records(pipeline).columns()
    for split in (stored, piped):
        assert_same(cj.data.batches(split, 8, seed=0)[7], cj.data.batches(arrays, 8, seed=0)[7])


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(monkeypatch):
    # They import this module.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    stored = cj.data.Records(range(N), number, noisy, workers=2).columns()
    alone = cj.data.Records(range(N), number, noisy).columns()
    ours, theirs = (cj.data.batches(split, 8, seed=3) for split in (stored, alone))
    for step in (4, 5, 6):
        assert_same(ours[step], theirs[step])


@pytest.mark.parametrize(
    "records, said",
    [
        ([{"x": 1.0}] * 20 + [{"x": np.nan}], "x of example 20 of train is not finite"),
        ([{"x": 1.0}] * 20 + [{"x": np.ones(2)}], r"is float32\[2\], and that of example 0"),
        ([{"x": 1.0}] * 20 + [{"y": 1.0}], r"example 20 of train has \['y'\]"),
        ([{"x": 1.0}] * 20 + [{"x": "a"}], "turn text into tokens first"),
        ([{"x": 1}] * 20 + [{"x": 2**40}], "beyond 32 bits"),
        ([3.0] * 21, "it must be a dict of arrays, and is a float"),
        ([], "train has no examples"),
    ],
)
def test_a_wrong_example_is_named_when_it_is_read(records, said):
    with pytest.raises(DataError, match=said):
        split = cj.data.Records(records).columns()
        cj.data.batches(split, len(records), seed=0)[0]


def test_what_a_reader_raises_is_told_with_the_example():
    def broken(record):
        if record == 13:
            raise KeyError("no such member")
        return number(record)

    with pytest.raises(DataError, match="example 13 of train: KeyError: 'no such member'"):
        cj.data.batches(cj.data.Records(range(20), broken).columns(), 20, seed=0)[0]


def test_an_example_of_a_file_is_told_by_its_file():
    def broken(path):
        raise OSError("no such sector")

    records = cj.data.Records(["a.json", "b.json", "c.json"], broken).part(np.array([2, 0]))
    with pytest.raises(DataError, match=r"example 1 of train, record 0 \(a.json\): OSError: no"):
        records._read(1, None)


def test_nothing_reads_all_by_accident():
    column = cj.data.Records(range(N), number).columns()["x"]
    with pytest.raises(DataError, match="stays on disk"):
        np.asarray(column)


def test_data_are_checked_cut_and_told():
    data = cj.data.from_records(range(100), example=number, augment=noisy, classes=5)
    own = [
        cj.data.batches(split, len(split["label"]), seed=0)[0]["x"][:, 0, 0]
        for split in (data.validation, data.test)
    ]
    assert [len(each) for each in own] == [10, 10] and not np.isin(*own).any()
    assert np.concatenate(own).astype(int).tolist() == np.concatenate(own).tolist()  # no noise
    assert sum("on disk" in note for note in data.notes) == 3
    again = cj.data.from_records(range(100), example=number, classes=5)
    assert data.fingerprint == again.fingerprint
    other = cj.data.from_records(range(1, 101), example=number, classes=5)
    assert data.fingerprint != other.fingerprint
    with pytest.raises(ArgumentError, match="from_grain"):
        cj.data.from_records(iter(range(3)))
    with pytest.raises(DataError, match="validation has"):
        cj.data.from_records([{"x": 1}] * 20, [{"z": 1}])


# Files.


def test_tokens_are_cut_from_files_and_know_their_documents(tmp_path):
    stream = np.array([7, 8, 0, 9, 9, 9, 0, 5, 6, 7, 0, 1, 2], np.uint16)
    stream.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", stream[::-1].copy())
    data = cj.data.tokens_on_disk(
        [tmp_path / "a.bin", tmp_path / "b.npy"], tmp_path / "a.bin", tmp_path / "b.npy",
        length=4, vocabulary=10, separator=0,
    )  # fmt: skip
    rows = {key: column[:] for key, column in data.train.items()}
    assert rows["tokens"].tolist() == [
        *(stream[i : i + 5].tolist() for i in (0, 4, 8)),
        *(stream[::-1][i : i + 5].tolist() for i in (0, 4, 8)),
    ]
    assert rows["segments"][0].tolist() == [0, 0, 0, 1, 1]
    assert rows["positions"][0].tolist() == [0, 1, 2, 0, 1]
    task = cj.tasks.language_modelling()
    assert task.prepare(cj.data.batches(data.train, 2, seed=0)[0])["next"].shape == (2, 4)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    for file, said in (("odd.bin", "no whole number"), ("none.bin", "cannot be read")):
        with pytest.raises(DataError, match=said):
            cj.data.tokens_on_disk(tmp_path / file, length=4, vocabulary=10)
    with pytest.raises(DataError, match="fewer than 101 tokens"):
        cj.data.tokens_on_disk(tmp_path / "a.bin", length=100, vocabulary=10)


@pytest.fixture
def folder(tmp_path):
    for part, n in (("train", 12), ("val", 6)):
        for i in range(n):
            place = tmp_path / part / "ab"[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 255, (8 + i, 10, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path


def test_images_are_those_that_from_folder_holds(folder):
    held = cj.data.from_folder(folder, size=8)
    mean, std = (tuple(each.tolist()) for each in (held.mean, held.std))
    data = cj.data.images_on_disk(folder, size=8, mean=mean, std=std, fraction=0.2)
    # The split val is for the report, as there is no other; train gives up some for decisions.
    assert len(data.test["label"]) == 6 and len(data.validation["label"]) == 2
    ours = data.test["image"][:]
    assert np.abs(ours - held.validation["image"]).max() < 1e-5
    crops = cj.data.batches(data.train, 10, seed=0)
    assert crops[0]["image"].shape == (10, 8, 8, 3)
    assert np.abs(crops[0]["image"]).max() < 5


def test_crops_keep_their_share_of_an_image_and_its_colors():
    from compress_jax.data._disk.images import _box

    random = np.random.default_rng(0)
    boxes = np.array([_box(random, 100, 80, (0.08, 1.0)) for _ in range(500)])
    left, upper, right, lower = boxes.T
    assert (left >= 0).all() and (upper >= 0).all()
    assert (right <= 100).all() and (lower <= 80).all()
    shares = (right - left) * (lower - upper) / 8000
    forms = (right - left) / (lower - upper)
    assert shares.min() > 0.07 and shares.max() > 0.8
    assert forms.min() > 0.7 and forms.max() < 1.4


def test_sounds_are_read_at_one_rate_and_length(tmp_path):
    import scipy.io.wavfile

    t = np.arange(800) / 8000
    for i in range(12):
        place = tmp_path / "ab"[i % 2]
        place.mkdir(exist_ok=True)
        wave = np.sin(2 * np.pi * 440 * t)
        scipy.io.wavfile.write(place / f"{i}.wav", 8000, (wave * 2**14).astype(np.int16))
    data = cj.data.sounds_on_disk(tmp_path, seconds=0.2, rate=16000, shift=0.05)
    sound = data.train["sound"][0]
    assert sound.shape == (3200,) and not sound[1700:].any()
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(1600) / 16000)
    assert np.abs(sound[100:1500] - expected[100:1500]).max() < 0.01
    moved = cj.data.batches(data.train, 4, seed=0)[0]["sound"]
    assert len({np.flatnonzero(np.abs(each) > 1e-3)[0] for each in moved}) > 1
    (tmp_path / "a" / "bad.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="cannot be read as WAV"):
        cj.data.sounds_on_disk(tmp_path, seconds=0.2)


def test_a_training_on_disk_is_the_training_in_memory(tmp_path, arrays):
    """The whole loop, with a teacher and a rewrite that calibrates."""
    import optax

    from compress_jax.search import Candidate, Experiment, Network, Training

    def run(data, folder):
        training = Training(optax.sgd(0.05), 4, batch_size=8)
        student = Network(cj.models.LeNet300100(5, (8, 4)), training)
        int4 = Candidate("int4", cj.at("**/kernel", cj.quantize.uniform(4)), training)
        task = cj.tasks.classification("x")
        experiment = Experiment("rows", data, student, (int4,), task=task)
        result = cj.search.compress(experiment, folder, log_fn=lambda line: None)
        numbers = [(row.name, row.validation, row.test) for row in result.rows]
        return numbers, cj.unpack(cj.load(result.artifact)[0])

    splits = [
        {key: each[rows] for key, each in arrays.items()}
        for rows in np.split(np.arange(N), [30, 40])
    ]
    held = cj.data.Data.from_arrays(*splits)
    sources = [range(30), range(30, 40), range(40, 50)]
    stored = cj.data.from_records(*sources, example=number, classes=5)
    (ours, packed), (theirs, held_packed) = run(stored, tmp_path / "a"), run(held, tmp_path / "b")
    assert ours == theirs
    jax.tree.map(np.testing.assert_array_equal, packed, held_packed)
    # A finished stage of other data is not taken for this one's.
    other = cj.data.from_records(range(31), *sources[1:], example=number, classes=5)
    with pytest.raises(cj.core.errors.CompressError, match="was made of something else"):
        run(other, tmp_path / "a")


def test_a_label_that_cannot_be_right_stops_the_training(tmp_path):
    import optax

    from compress_jax.search import Candidate, Experiment, Network, Training

    def example(record):
        return {"x": np.ones(4, np.float32), "label": 9 if record == 333 else record % 3}

    data = cj.data.from_records(range(1000), range(9), range(9), example=example, classes=3)
    training = Training(optax.sgd(0.05), 10, batch_size=500)
    experiment = Experiment(
        "labels", data, Network(cj.models.LeNet300100(3, (4,)), training),
        (Candidate("int8", cj.at("**/kernel", cj.quantize.uniform(8)), training),),
        task=cj.tasks.classification("x"),
    )  # fmt: skip
    with pytest.raises(DataError, match="label"):
        cj.search.compress(experiment, tmp_path, log_fn=lambda line: None)
