"""Files of torch.save, written here as PyTorch writes them, and what they must not do."""

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from compress_jax.core.errors import WeightsError
from compress_jax.models._torch_file import read_torch

KINDS = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}


class Storage:
    """What torch.save keeps beside the pickle."""

    def __init__(self, key, numbers):
        self.key = key
        self.numbers = numbers


class Tensor:
    """What a pickle says of an array: its storage, offset, shape and strides."""

    def __init__(self, storage, offset, shape, strides):
        self.of = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.of


@pytest.fixture
def torch(monkeypatch):
    """Modules with the names that PyTorch's pickles mention."""
    made = types.ModuleType("torch")
    made._utils = types.ModuleType("torch._utils")
    for name in KINDS.values():
        setattr(made, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("nothing of the file may be called")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    made._utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", made)
    monkeypatch.setitem(sys.modules, "torch._utils", made._utils)
    return made


def saved(torch, value, storages, **more):
    """Return a file as torch.save makes it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, each):
            if isinstance(each, Storage):
                kind = getattr(torch, KINDS[each.numbers.dtype.name])
                return "storage", kind, each.key, "cpu", len(each.numbers)
            return None

    program = io.BytesIO()
    Pickler(program, protocol=2).dump(value)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program.getvalue())
        for each in storages:
            archive.writestr(f"archive/data/{each.key}", each.numbers.tobytes())
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)
    return file


def saved_of_old(torch, value, storages, magic=0x1950A86A20F9469CFC6C, order=True):
    """Return a file as torch.save made it before PyTorch 1.6."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, each):
            if isinstance(each, Storage):
                kind = getattr(torch, KINDS[each.numbers.dtype.name])
                return "storage", kind, each.key, "cpu", len(each.numbers), None
            return None

    file = io.BytesIO()
    for each in (magic, 1001, {"protocol_version": 1001, "little_endian": order}):
        pickle.dump(each, file, protocol=2)
    Pickler(file, protocol=2).dump(value)
    pickle.dump([each.key for each in storages], file, protocol=2)
    for each in storages:
        file.write(struct.pack("<q", len(each.numbers)) + each.numbers.tobytes())
    return file


def test_files_from_before_pytorch_1_6(torch, tmp_path):
    base = Storage("94", np.arange(6, dtype=np.float32))
    count = Storage("17", np.array([7], np.int64))
    state = OrderedDict(
        turned=Tensor(base, 0, (3, 2), (1, 3)), count=Tensor(count, 0, (), ()),
        part=Tensor(base, 2, (2,), (2,)),
    )  # fmt: skip
    for storages in ([base, count], [count, base]):
        file = saved_of_old(torch, state, storages)
        (tmp_path / "old.pth").write_bytes(file.getvalue())
        for arrays in (read_torch(file), read_torch(tmp_path / "old.pth")):
            np.testing.assert_array_equal(arrays["turned"], [[0, 3], [1, 4], [2, 5]])
            np.testing.assert_array_equal(arrays["part"], [2, 4])
            assert arrays["count"] == 7 and arrays["count"].dtype == np.int64


def test_damage_and_evil_in_files_from_before_pytorch_1_6(torch):
    base = Storage("0", np.arange(6, dtype=np.float32))
    state = {"a": Tensor(base, 0, (6,), (1,))}
    for evil in (Evil(print, "x"), Evil(OrderedDict, [])):
        with pytest.raises(WeightsError, match="it is not executed"):
            read_torch(saved_of_old(torch, {"weight": evil}, []))
    with pytest.raises(WeightsError, match="another byte order"):
        read_torch(saved_of_old(torch, state, [base], order=False))
    with pytest.raises(WeightsError, match="is damaged"):
        read_torch(saved_of_old(torch, state, []))
    whole = saved_of_old(torch, state, [base]).getvalue()
    with pytest.raises(WeightsError):
        read_torch(io.BytesIO(whole[:-3]))
    huge = whole.replace(b"K\x06N", b"J\xff\xff\xff\x7fN")
    assert huge != whole
    with pytest.raises(WeightsError, match="more than the file"):
        read_torch(io.BytesIO(huge))


def test_arrays_of_all_shapes_strides_and_dtypes(torch):
    base = Storage("0", np.arange(24, dtype=np.float32))
    count = Storage("1", np.array([7], np.int64))
    half = Storage("2", np.array([0.5, -2], np.float16))
    state = OrderedDict(
        plain=Tensor(base, 0, (2, 3, 4), (12, 4, 1)),
        turned=Tensor(base, 0, (4, 6), (1, 4)),
        part=Tensor(base, 10, (2, 2), (5, 2)),
        repeated=Tensor(base, 3, (2, 3), (0, 1)),
        count=Tensor(count, 0, (), ()),
        half=Tensor(half, 0, (2,), (1,)),
        none=Tensor(base, 24, (0, 5), (5, 1)),
    )
    state._metadata = OrderedDict(version=1)
    arrays = read_torch(saved(torch, state, [base, count, half]))
    x = np.arange(24, dtype=np.float32)
    np.testing.assert_array_equal(arrays["plain"], x.reshape(2, 3, 4))
    np.testing.assert_array_equal(arrays["turned"], x.reshape(6, 4).T)
    np.testing.assert_array_equal(arrays["part"], [[10, 12], [15, 17]])
    np.testing.assert_array_equal(arrays["repeated"], [[3, 4, 5], [3, 4, 5]])
    assert arrays["count"].shape == () and arrays["count"] == 7
    assert arrays["count"].dtype == np.int64 and arrays["half"].dtype == np.float16
    assert arrays["none"].shape == (0, 5)
    arrays["plain"][:] = 0  # arrays of their own
    assert arrays["turned"][0, 1] == 4


def test_more_names_than_one_byte_can_number(torch):
    base = Storage("0", np.arange(400, dtype=np.float32))
    state = {f"layer{i}.weight": Tensor(base, i, (1,), (1,)) for i in range(400)}
    arrays = read_torch(saved(torch, state, [base]))
    assert len(arrays) == 400 and all(arrays[f"layer{i}.weight"] == [i] for i in range(400))


class Evil:
    def __init__(self, function, *arguments):
        self.of = function, arguments

    def __reduce__(self):
        return self.of


def test_no_code_of_a_file_is_executed(torch, tmp_path):
    victim = tmp_path / "victim"
    for evil in (
        Evil(eval, f"open({str(victim)!r}, 'w')"),
        Evil(print, "x"),
        Evil(OrderedDict, []),
    ):
        with pytest.raises(WeightsError, match="it is not executed"):
            read_torch(saved(torch, {"weight": evil}, []))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (25,), (1,)), (20, (5,), (1,)), (0, (3, 3), (10, 3)), (0, (2,), (-1,)), (-1, (2,), (1,)),
     (0, (2, -3), (1, 1)), (0, (2,), (1, 1)), (0, (10**9,), (0,))],
)  # fmt: skip
def test_memory_beside_the_numbers_is_not_read(torch, offset, shape, strides):
    base = Storage("0", np.arange(24, dtype=np.float32))
    with pytest.raises(WeightsError):
        read_torch(saved(torch, {"w": Tensor(base, offset, shape, strides)}, [base]))


def test_what_is_no_dict_of_arrays_is_refused(torch, tmp_path):
    base = Storage("0", np.arange(4, dtype=np.float32))
    cut = Storage("0", np.arange(4, dtype=np.float32))
    for value in ({"epoch": 3}, (1, 2), {1: Tensor(base, 0, (2,), (1,))}):
        with pytest.raises(WeightsError, match="holds no dict of arrays"):
            read_torch(saved(torch, value, [base]))
    with pytest.raises(WeightsError, match="another byte order"):
        read_torch(saved(torch, {}, [], byteorder="big"))
    file = saved(torch, {"w": Tensor(cut, 0, (2,), (1,))}, [])
    with pytest.raises(WeightsError, match="is damaged: .*no item named 'archive/data/0'"):
        read_torch(file)
    text = tmp_path / "model.pth"
    text.write_text("no zip")
    with pytest.raises(WeightsError, match="model.pth cannot be read as a file of torch.save"):
        read_torch(text)


def test_every_damaged_byte_is_an_error_or_other_arrays_and_nothing_else(torch):
    base = Storage("0", np.arange(6, dtype=np.float32))
    state = OrderedDict(a=Tensor(base, 0, (2, 3), (3, 1)), b=Tensor(base, 2, (2,), (1,)))
    with zipfile.ZipFile(saved(torch, state, [base])) as archive:
        program = bytearray(archive.read("archive/data.pkl"))
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(program)
        damaged[random.integers(len(program))] = random.integers(256)
        damaged = damaged[: random.integers(1, 2 * len(program))]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", bytes(damaged))
            archive.writestr("archive/data/0", base.numbers.tobytes())
        try:
            arrays = read_torch(file)
        except WeightsError:
            refused += 1
        else:
            assert all(isinstance(each, np.ndarray) for each in arrays.values())
    assert 200 < refused < 600
