import numpy as np
import pytest
from PIL import Image

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data import TextData, from_folder

PARTS = ("train", "validation", "test")


def image(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(path, **options)


def stored(data):
    """Return the pixels as they were on disk, of all splits."""
    images = np.concatenate([getattr(data, part)["image"] for part in PARTS])
    return np.rint((images * data.std + data.mean) * 255).astype(np.uint8)


@pytest.fixture
def by_class(tmp_path):
    """Thirty random images of three classes, in color."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 5, 7, 3), dtype=np.uint8)
    for i, each in enumerate(pixels):
        image(tmp_path / "set" / ("ant", "bee", "cat")[i % 3] / f"{i}.png", each)
    return tmp_path / "set", pixels


def test_images_by_class_are_read_bit_for_bit_and_divided(by_class):
    folder, pixels = by_class
    data = from_folder(folder)
    assert [len(getattr(data, part)["label"]) for part in PARTS] == [24, 3, 3]
    assert (data.names, data.classes, data.name) == (("ant", "bee", "cat"), 3, "set")
    labels = np.concatenate([getattr(data, part)["label"] for part in PARTS])
    found = {each.tobytes(): label for each, label in zip(stored(data), labels, strict=True)}
    assert found == {each.tobytes(): i % 3 for i, each in enumerate(pixels)}
    assert abs(data.train["image"].mean()) < 1e-5 and data.maximum == 255
    notes = " ".join(data.notes)
    for expected in ("in color", "ant, bee, cat", "drawn at random", "divided by 255"):
        assert expected in notes


def test_gray_images_have_one_channel_unless_asked(tmp_path):
    for i in range(20):
        image(tmp_path / "ab"[i % 2] / f"{i}.png", np.full((4, 4), i * 5))
    assert from_folder(tmp_path).train["image"].shape[1:] == (4, 4, 1)
    assert from_folder(tmp_path, color="rgb").train["image"].shape[1:] == (4, 4, 3)
    image(tmp_path / "a" / "more.png", np.arange(48).reshape(4, 4, 3))
    assert from_folder(tmp_path).train["image"].shape[1:] == (4, 4, 3)
    assert from_folder(tmp_path, color="gray").train["image"].shape[1:] == (4, 4, 1)


def test_splits_of_ones_own_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("val", 4), ("test", 6)):
        for i in range(n):
            pixels = rng.integers(0, 256, (4, 4), dtype=np.uint8)
            image(tmp_path / part / "ab"[i % 2] / f"{i}.png", pixels)
            if part == "test" and i < 2:
                image(tmp_path / "train" / "a" / f"again{i}.png", pixels)
    data = from_folder(tmp_path)
    assert [len(getattr(data, part)["label"]) for part in PARTS] == [20, 4, 6]
    assert "train: 2 images are dropped that occur before" in data.notes


def test_equal_images_are_never_in_two_splits(tmp_path):
    for i in range(60):
        image(tmp_path / "ab"[i % 2] / f"{i}.png", np.full((4, 4), 4 * (i // 2)))
    data = from_folder(tmp_path)
    assert sum(len(getattr(data, part)["label"]) for part in PARTS) == 30
    assert "train: 30 images are dropped that occur before" in data.notes


def test_images_are_scaled_and_cut_to_one_size(tmp_path):
    """A white square in the middle of a wide and of a high black image stays in the middle."""
    for i in range(30):
        pixels = np.zeros((20, 40) if i % 2 else (60, 30), np.uint8)
        middle = [slice(n // 2 - 5, n // 2 + 5) for n in pixels.shape]
        pixels[middle[0], middle[1]] = 200 + i
        image(tmp_path / "ab"[i % 2] / f"{i}.png", pixels)
    data = from_folder(tmp_path, size=20)
    assert data.train["image"].shape[1:] == (20, 20, 1)
    for each in stored(data)[..., 0].astype(float):
        rows, columns = np.indices(each.shape)
        center = [(axis * each).sum() / each.sum() for axis in (rows, columns)]
        assert np.allclose(center, 9.5, atol=0.2)
        assert each[0].max() == each[:, 0].max() == 0
    assert from_folder(tmp_path, size=(8, 12)).train["image"].shape[1:] == (8, 12, 1)


def test_photographs_stand_upright_and_transparent_images_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    pixels = np.zeros((4, 8), np.uint8)
    pixels[0] = 255
    for i in range(12):
        pixels[3, 7] = i
        image(tmp_path / "ab"[i % 2] / f"{i}.png", pixels, exif=exif)
    found = stored(from_folder(tmp_path))
    assert found.shape[1:] == (8, 4, 1)
    assert (found[:, :, 3] == 255).all()  # the upper row is now the right column
    for i in range(12):
        clear = np.full((8, 4, 4), i, np.uint8)
        clear[..., 3] = 0
        clear[0, 0, 3] = 255
        image(tmp_path / "ab"[i % 2] / f"{i}.png", clear)
    found = stored(from_folder(tmp_path))
    assert (found[:, 1:] == 255).all() and set(found[:, 0, 0].ravel()) == set(range(12))


def _sixteen(folder):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "a" / "x.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: image(f / "a" / "x.png", np.zeros((9, 4))),
            r"4 x 4 pixels and a/x.png is 9 x 4",
        ),
        (lambda f: (f / "a" / "x.png").write_bytes(b"no image"), "a/x.png cannot be read as an im"),
        (
            lambda f: (f / "a" / "x.png").write_bytes((f / "a" / "0.png").read_bytes()[:45]),
            "a/x.png",
        ),
        (_sixteen, "a/x.png has more than 8 bits a pixel"),
        (lambda f: (f / "c").mkdir(), "/c has no file"),
        (lambda f: (f / "a" / "x.txt").write_text("hello"), "20 images and 1 texts"),
    ],
    ids=["sizes", "no image", "cut", "deep", "empty", "mixed"],
)
def test_what_is_wrong_is_one_sentence(change, message, tmp_path):
    for i in range(20):
        image(tmp_path / "ab"[i % 2] / f"{i}.png", np.full((4, 4), i))
    change(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        from_folder(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        from_folder(tmp_path / "none")
    with pytest.raises(DataError, match="has 0 folders with files"):
        from_folder(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"no images \(.png, .*no texts"):
        from_folder(tmp_path)
    with pytest.raises(ArgumentError, match="size must be"):
        image(tmp_path / "a" / "0.png", np.zeros((4, 4)))
        image(tmp_path / "b" / "1.png", np.ones((4, 4)))
        from_folder(tmp_path, size=0)


def test_splits_with_other_classes_are_named(tmp_path):
    for name in ("train/a/0", "train/b/1", "test/a/2", "test/c/3"):
        image(tmp_path / f"{name}.png", np.full((4, 4), int(name[-1])))
    with pytest.raises(DataError, match="has the class 'c', and train has"):
        from_folder(tmp_path)
    (tmp_path / "extra").mkdir()
    with pytest.raises(DataError, match="'extra', which is none"):
        from_folder(tmp_path)


def test_other_files_are_left_out_and_told(by_class):
    folder, _ = by_class
    (folder / "ant" / "notes.md").write_text("a")
    (folder / "ant" / ".hidden").write_text("a")
    assert "1 other files are left out, such as notes.md" in from_folder(folder).notes


# Texts.


def test_texts_by_class_are_tokenized(tmp_path):
    for i in range(40):
        file = tmp_path / ("no", "yes")[i % 2] / f"{i}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"text number {i} is {i * i} and {'yes' if i % 2 else 'no'} ü", "utf-8")
    data = from_folder(tmp_path, length=24)
    assert isinstance(data, TextData) and data.tokenizer is not None
    assert data.names == ("no", "yes") and data.train["tokens"].shape[1] == 24
    (tmp_path / "no" / "0.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="0.txt cannot be read as text in UTF-8"):
        from_folder(tmp_path)


# Arrays.


def test_arrays_of_one_file_are_divided_by_their_names(tmp_path):
    x = np.arange(80, dtype=np.float32).reshape(40, 2)
    y = np.arange(40, dtype=np.int64) % 4
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    data = from_folder(tmp_path / "a.npz")
    assert np.array_equal(data.test["x"], x[:10]) and np.array_equal(data.test["y"], y[:10])
    assert (len(data.train["x"]), len(data.validation["x"])) == (36, 4)
    np.savez(tmp_path / "a.npz", train_images=x, train_labels=y, val_images=x, val_labels=y)
    data = from_folder(tmp_path)
    assert sorted(data.validation) == ["images", "labels"]
    assert np.array_equal(data.validation["images"], x)


def test_files_of_splits_are_put_together(tmp_path):
    for part in ("train", "dev", "test"):
        np.savez(tmp_path / f"{part}.npz", x=np.full((20, 3), len(part)), y=np.zeros(20, np.int32))
    data = from_folder(tmp_path)
    assert [getattr(data, part)["x"][0, 0] for part in PARTS] == [5, 3, 4]


def test_gray_images_in_arrays_get_a_channel(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.zeros((40, 28, 28), np.uint8), y_train=np.arange(40))
    data = from_folder(tmp_path)
    assert data.train["x"].shape == (32, 28, 28, 1)
    assert any("gray images, with one channel" in note for note in data.notes)


def test_files_that_are_no_arrays_are_named(tmp_path):
    file = tmp_path / "a.npz"
    file.write_bytes(b"no zip")
    with pytest.raises(DataError, match="a.npz cannot be read as arrays"):
        from_folder(tmp_path)
    np.savez(file, x=np.array([{}], object))
    with pytest.raises(DataError, match="Python objects, which may execute"):
        from_folder(tmp_path)
    np.savez(file, x_train=np.ones(9), train_x=np.ones(9))
    with pytest.raises(DataError, match="'x' of train twice"):
        from_folder(tmp_path)
    np.savez(tmp_path / "b.npz", x=np.ones(9))
    with pytest.raises(DataError, match="several .npz files"):
        from_folder(tmp_path)
