"""Read the arrays of a file of ``torch.save`` without PyTorch, and without executing any of it.

Such a file is a zip archive: the numbers as they are, and a pickle that says which array is where.
Before PyTorch 1.6 it was that pickle, between others, and the numbers after it.

A pickle is a program for a small stack machine; one of its instructions calls any function by name,
which is why such files must not be loaded unless they are trusted. Here is that machine with
instructions for dicts of arrays alone: a name that is no array or dict is refused.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from compress_jax.core.errors import WeightsError

# Names that may be called or meant; all that a dict of arrays needs.
DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
STORAGES = {
    "torch FloatStorage": np.dtype("<f4"),
    "torch DoubleStorage": np.dtype("<f8"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
MARK = object()
# How a file of PyTorch before 1.6 begins: a pickle of this number, and one of its protocol.
OLD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
PROTOCOL = 1001
# What Python raises where an instruction finds something else on the stack than it needs.
DAMAGE = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, struct.error)


def read_torch(file: str | os.PathLike[str] | BinaryIO) -> dict[str, np.ndarray]:
    """Read a dict of arrays, such as a ``state_dict``, from a file of ``torch.save``.

    Args:
      file: a path, or a file that is open for reading.

    Returns:
      Arrays by name.

    Raises:
      WeightsError: if it is another kind of file, damaged, or holds anything but arrays.

    Example:
      >>> read_torch("weights.pth")["conv1.weight"].shape  # doctest: +SKIP
      (128, 1, 512, 1)

    References:
      The instructions: https://github.com/python/cpython/blob/main/Lib/pickletools.py
    """
    try:
        content = _content(file)
        arrays = _old(content) if content.startswith(OLD) else _zipped(content, file)
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise WeightsError(f"{file} cannot be read as a file of torch.save: {error}") from error
    except DAMAGE as error:
        raise WeightsError(f"{file} is damaged: {error!r}") from error
    if not isinstance(arrays, dict) or not all(map(_is_named, arrays.items())):
        raise WeightsError(f"{file} holds no dict of arrays; save model.state_dict()")
    return arrays


def _content(file: str | os.PathLike[str] | BinaryIO) -> bytes:
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return opened.read()
    file.seek(0)
    return file.read()


def _zipped(content: bytes, file: object) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        program = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        folder = program.removesuffix("data.pkl")
        if _order(archive, folder) != b"little":
            raise WeightsError(f"{file} was written on a machine of another byte order")
        return _Machine(
            archive.read(program), lambda key, _: archive.read(f"{folder}data/{key}")
        ).run()


def _old(content: bytes) -> Any:
    """Read a file of PyTorch before 1.6: five pickles, then the numbers of each storage."""
    sizes: dict[str, int] = {}

    def measure(key: str, size: int) -> bytes:
        if not 0 <= size <= len(content):
            raise WeightsError(f"storage {key} has {size} bytes, more than the file")
        sizes[key] = size
        return bytes(size)

    # Where the numbers begin is known only after the pickles, so the third is carried out twice.
    machine = _Machine(content, measure)
    machine.at = len(OLD)
    protocol, system = machine.run(), machine.run()
    if protocol != PROTOCOL or not system["little_endian"]:
        raise WeightsError(f"the file has protocol {protocol}, or another byte order")
    start = machine.at
    machine.run()
    storages: dict[str, bytes] = {}
    keys = machine.run()
    at = machine.at
    for key in keys:
        at += 8  # how many numbers there are, which the pickle says too
        storages[key] = content[at : at + sizes[key]]
        at += sizes[key]
    machine = _Machine(content, lambda key, _: storages[key])
    machine.at = start
    return machine.run()


def _is_named(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], np.ndarray)


def _order(archive: zipfile.ZipFile, folder: str) -> bytes:
    name = f"{folder}byteorder"
    return archive.read(name) if name in archive.namelist() else b"little"


class _Name(str):
    """The full name of something outside of the file."""


class _Machine:
    """The stack, the memory and the instructions of a pickle."""

    def __init__(self, program: bytes, storage: Callable[[str, int], bytes]) -> None:
        self.program = program
        self.storage = storage
        self.at = 0
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def run(self) -> Any:
        """Return what the program leaves on the stack."""
        while (code := self._take(1)) != b".":
            if code in _CONSTANTS:
                self.stack.append(_CONSTANTS[code]())
            elif code in _NUMBERS:
                self.stack.append(self._number(_NUMBERS[code]))
            elif code in _ACTIONS:
                _ACTIONS[code](self)
            else:
                raise WeightsError(
                    f"the file has the instruction {code!r}, which no dict of arrays needs; it is "
                    "not executed"
                )
        return self.stack.pop()

    def _take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.program) - self.at:
            raise WeightsError("the file ends within its description")
        self.at += count
        return self.program[self.at - count : self.at]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self.program.index(b"\n", self.at)
        return self._take(end + 1 - self.at)[:-1].decode()

    def version(self) -> None:
        self._take(1)

    def text(self) -> None:
        self.stack.append(self._take(self._number("<I")).decode())

    def name(self) -> None:
        name = f"{self._line()} {self._line()}"
        if name not in (DICT, TENSOR, *STORAGES):
            raise WeightsError(
                f"the file names {name.replace(' ', '.')}, which is no array; it is not executed"
            )
        self.stack.append(_Name(name))

    def remember(self, form: str) -> None:
        self.memory[self._number(form)] = self.stack[-1]

    def recall(self, form: str) -> None:
        self.stack.append(self.memory[self._number(form)])

    def since_mark(self) -> list[Any]:
        at = max(i for i, each in enumerate(self.stack) if each is MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def several(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def put(self, items: list[Any]) -> None:
        """Put keys and values, which alternate, into the dict on top of the stack."""
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def add(self, items: list[Any]) -> None:
        """Put items at the end of the list on top of the stack."""
        self.stack[-1].extend(items)

    def put_one(self) -> None:
        value = self.stack.pop()
        self.put([self.stack.pop(), value])

    def load(self) -> None:
        """Replace ``("storage", kind, key, device, count)`` by the numbers of that storage."""
        _, kind, key, _, count, *part = self.stack.pop()
        if any(each is not None for each in part):
            raise WeightsError(f"storage {key} is a part of another one; save the state_dict anew")
        dtype = STORAGES[kind]
        numbers = np.frombuffer(self.storage(key, count * dtype.itemsize), dtype)
        if len(numbers) != count:
            raise WeightsError(f"storage {key} has {len(numbers)} numbers in place of {count}")
        self.stack.append(numbers)

    def call(self) -> None:
        """Make an array, or an empty dict."""
        arguments = self.stack.pop()
        name = self.stack.pop()
        if name == DICT and not arguments:
            self.stack.append({})
        elif isinstance(name, _Name) and name == TENSOR:
            self.stack.append(_array(*arguments[:4]))
        else:
            raise WeightsError(f"the file calls {name!r}; it is not executed")

    def forget(self) -> None:
        """Drop the attributes of a dict: versions of PyTorch's modules."""
        self.stack.pop()


def _array(
    numbers: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """Return an array of its own, of the numbers that lie at ``offset + strides * index``."""
    ends = [n - 1 for n in shape]
    last = offset + sum(n * step for n, step in zip(ends, strides, strict=True))
    if min((offset, *ends, *strides), default=0) < 0 and 0 not in shape:
        raise WeightsError(f"an array of shape {shape} has strides {strides} and offset {offset}")
    if math.prod(shape) and (last >= len(numbers) or math.prod(shape) > len(numbers)):
        raise WeightsError(f"an array of shape {shape} exceeds its {len(numbers)} numbers")
    steps = [step * numbers.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps).copy()


_CONSTANTS: dict[bytes, Callable[[], Any]] = {
    b"}": dict, b"]": list, b")": tuple, b"(": lambda: MARK, b"N": lambda: None,
    b"\x88": lambda: True, b"\x89": lambda: False,
}  # fmt: skip
_NUMBERS = {b"J": "<i", b"K": "<B", b"M": "<H", b"G": ">d"}
_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.version,
    b"X": _Machine.text,
    b"c": _Machine.name,
    b"q": lambda m: m.remember("<B"),
    b"r": lambda m: m.remember("<I"),
    b"h": lambda m: m.recall("<B"),
    b"j": lambda m: m.recall("<I"),
    b"t": lambda m: m.stack.append(tuple(m.since_mark())),
    b"\x85": lambda m: m.several(1),
    b"\x86": lambda m: m.several(2),
    b"\x87": lambda m: m.several(3),
    b"s": _Machine.put_one,
    b"u": lambda m: m.put(m.since_mark()),
    b"e": lambda m: m.add(m.since_mark()),
    b"a": lambda m: m.add([m.stack.pop()]),
    b"Q": _Machine.load,
    b"R": _Machine.call,
    b"b": _Machine.forget,
}
