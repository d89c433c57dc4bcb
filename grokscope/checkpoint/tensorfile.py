"""One file of a released checkpoint: a pickle of one array, or of int8 weights with their scales. No pickle code runs.

Reading walks the few opcodes that such a file can hold and keeps inert records; everything else is refused by file and
byte offset. Array payloads are contiguous, so they are memory-mapped, never copied. Writing gives the bytes that
Python's pickler gave for the release: protocol 4, its framing rule, numpy 1's module names.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

QUANTIZED = ("__main__", "QuantizedWeight8bit")
RECONSTRUCT = ("numpy.core.multiarray", "_reconstruct")
NDARRAY = ("numpy", "ndarray")
DTYPE = ("numpy", "dtype")
BFLOAT16 = ("ml_dtypes", "bfloat16")
NUMPY_2 = {("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT}
GLOBALS = {QUANTIZED, RECONSTRUCT, NDARRAY, DTYPE, BFLOAT16}
DTYPES = {"f4": np.dtype("<f4"), "i1": np.dtype("|i1"), BFLOAT16: np.dtype(ml_dtypes.bfloat16)}

CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i"}
BYTE_STRINGS = {b"C": "<B", b"B": "<I", b"\x8e": "<Q"}
REFERENCES = {b"h": "<B", b"j": "<I"}
"""The opcodes that push one value, with the form of the number behind them."""

MAX_DIMS = 8
FRAME_TARGET = 65536  # the pickler closes a frame of this size, and writes longer byte strings outside frames


class TensorFileError(ValueError):
    """The file is not a tensor file of the release; says at which byte, and what was found there."""


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array to be written piece by piece in C order, so that it is never held whole. Written once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Iterable[np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Contents of one file, memory-mapped. `scales` is None for an array that is not quantised.

    Attributes:
      weight: float32 of any shape, or int8 [..., K, N]. `write` takes a Streamed in its place.
      scales: bfloat16 or float32 [..., G, N], or None.
    """

    weight: np.ndarray
    scales: np.ndarray | None = None


@dataclasses.dataclass
class _Array:
    dtype: np.dtype | None = None
    shape: tuple = ()
    offset: int = 0


@dataclasses.dataclass
class _Object:
    fields: dict | None = None


@dataclasses.dataclass
class _DType:
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Bytes:
    offset: int
    length: int


_MARK = object()
MOST_OPCODES = 1000  # of a file; the released ones have fewer than two hundred


class _Reader:
    """Runs the opcodes of one file on inert records."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, data, 0
        self.stack: list = []
        self.memo: list = []

    def fail(self, found: str, expected: str, at: int | None = None) -> TensorFileError:
        return TensorFileError(
            f"{self.path}: at byte {self.at if at is None else at}: found {found}, expected {expected}. "
            "Not a tensor file of the Grok-1 release; nothing in it was run."
        )

    def take(self, count: int) -> bytes:
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise self.fail(
                f"the end of the file after {len(self.data)} bytes", f"{self.at - len(self.data)} more", begin
            )
        return self.data[begin : self.at].tobytes()

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def skip(self, length: int) -> _Bytes:
        """A byte string, left where it is."""
        begin = self.at
        if begin + length > len(self.data):
            raise self.fail(
                f"{len(self.data) - begin} bytes to the end of the file",
                f"a payload of {length}: the file is truncated",
            )
        self.at += length
        return _Bytes(begin, length)

    def top(self):
        if not self.stack or self.stack[-1] is _MARK:
            raise self.fail("an operation without its operand", "a complete pickle")
        return self.stack[-1]

    def pop(self):
        self.top()
        return self.stack.pop()

    def since_mark(self) -> list:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise self.fail("an operation without its mark", "a complete pickle")
        self.stack.pop()
        return items[::-1]

    def run(self):
        """The object of the file. Raises TensorFileError at the first byte that the format does not have."""
        if self.take(2) != b"\x80\x04":
            raise self.fail(repr(self.data[:2].tobytes()), "a pickle of protocol 4 (bytes 80 04)", 0)
        for _ in range(MOST_OPCODES):
            begin = self.at
            if (code := self.take(1)) == b".":
                break
            if code in CONSTANTS:
                self.stack.append(CONSTANTS[code])
            elif code in NUMBERS:
                self.stack.append(self.number(NUMBERS[code]))
            elif code in BYTE_STRINGS:
                self.stack.append(self.skip(self.number(BYTE_STRINGS[code])))
            elif code in REFERENCES:
                self.stack.append(self.recall(self.number(REFERENCES[code]), begin))
            else:
                self.operate(code, begin)
        else:
            raise self.fail(f"more than {MOST_OPCODES} operations", "the few of an array and its scales")
        if self.at != len(self.data):
            raise self.fail(f"{len(self.data) - self.at} bytes after the end", "nothing")
        return self.pop()

    def recall(self, index: int, begin: int):
        if index >= len(self.memo):
            raise self.fail(f"a reference to memo {index}", f"one below {len(self.memo)}", begin)
        return self.memo[index]

    def operate(self, code: bytes, begin: int) -> None:
        """An opcode that works on the stack."""
        match code:
            case b"\x95":  # frame: its length only tells a reader how far to buffer
                self.take(8)
            case b"\x8c":
                self.stack.append(self.take(self.number("<B")).decode("utf-8", "replace"))
            case b"\x94":
                self.memo.append(self.top())
            case b"(":
                self.stack.append(_MARK)
            case b"}":
                self.stack.append({})
            case b"\x85" | b"\x86" | b"\x87":
                items = [self.pop() for _ in range(code[0] - 0x84)]
                self.stack.append(tuple(items[::-1]))
            case b"t":
                self.stack.append(tuple(self.since_mark()))
            case b"u":
                items, fields = self.since_mark(), self.top()
                if not isinstance(fields, dict) or len(items) % 2 or not all(isinstance(k, str) for k in items[::2]):
                    raise self.fail("items for something else than a dictionary", "weight and scales", begin)
                fields.update(zip(items[::2], items[1::2], strict=True))
            case b"\x93":
                self.stack.append(self.name(self.pop(), self.pop(), begin))
            case b"\x81" | b"R":
                args, function = self.pop(), self.pop()
                self.stack.append(self.made(code, function, args, begin))
            case b"b":
                state, target = self.pop(), self.pop()
                self.build(target, state, begin)
                self.stack.append(target)
            case _:
                raise self.fail(f"pickle opcode {code!r}", "one that arrays need", begin)

    def name(self, name, module, begin: int) -> tuple[str, str]:
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.fail("a name that is not text", "one of the five names of the format", begin)
        found = NUMPY_2.get((module, name), (module, name))
        if found not in GLOBALS:
            raise self.fail(f"the name {module}.{name}", "one of the five names of the format", begin)
        return found

    def made(self, code: bytes, function, args, begin: int):
        match code, function, args:
            case b"\x81", ("__main__", "QuantizedWeight8bit"), ():
                return _Object()
            case b"R", ("numpy.core.multiarray", "_reconstruct"), (("numpy", "ndarray"), (0,), _Bytes(length=1)):
                return _Array()
            case b"R", ("numpy", "dtype"), (("ml_dtypes", "bfloat16") | "f4" | "i1" as name, False, True):
                return _DType(DTYPES[name])
        raise self.fail("a call with other arguments", "an array of float32, int8 or bfloat16", begin)

    def build(self, target, state, begin: int) -> None:
        match target, state:
            case _Array(dtype=None), (1, tuple(shape), _DType(dtype), False, _Bytes(offset, length)) if len(
                shape
            ) <= MAX_DIMS and all(isinstance(n, int) and n >= 0 for n in shape):
                if length != math.prod(shape) * dtype.itemsize:
                    raise self.fail(
                        f"{length} bytes for {dtype} of shape {shape}", f"{math.prod(shape) * dtype.itemsize}", begin
                    )
                target.dtype, target.shape, target.offset = dtype, shape, offset
            case _DType(), (3, "<" | "|", None, None, None, int(), int(), int()):
                pass
            case _Object(fields=None), {"weight": _Array(), "scales": _Array()} if len(state) == 2:
                target.fields = state
            case _:
                raise self.fail(
                    f"a state of {type(target).__name__} that is not in C order and little-endian",
                    "the format's",
                    begin,
                )


def read(path: Path) -> Tensor:
    """The tensor of a file, memory-mapped. Raises TensorFileError (what, where) and FileNotFoundError."""
    path = Path(path)
    if not path.stat().st_size:
        raise TensorFileError(f"{path} is empty; expected a tensor file of the Grok-1 release")
    data = np.memmap(path, mode="r", dtype=np.uint8)
    reader = _Reader(path, data)
    found = reader.run()

    def view(array: _Array) -> np.ndarray:
        if array.dtype is None:
            raise reader.fail("an array that was never filled", "a complete pickle")
        return np.frombuffer(data, array.dtype, math.prod(array.shape), array.offset).reshape(array.shape)

    if isinstance(found, _Array):
        weight = view(found)
        if weight.dtype != np.float32:
            raise TensorFileError(f"{path} holds a bare array of {weight.dtype}; expected float32, or int8 with scales")
        return Tensor(weight)
    if not isinstance(found, _Object) or not found.fields:
        raise reader.fail(f"a {type(found).__name__.strip('_')}", "an array, or int8 weights with scales")
    weight, scales = view(found.fields["weight"]), view(found.fields["scales"])
    if weight.dtype != np.int8 or scales.dtype == np.int8:
        raise TensorFileError(f"{path}: weight is {weight.dtype}, scales {scales.dtype}; expected int8 and float")
    grouped = (
        scales.ndim == weight.ndim >= 2
        and scales.shape[:-2] == weight.shape[:-2]
        and scales.shape[-1] == weight.shape[-1]
    )
    if not grouped or not scales.shape[-2] or weight.shape[-2] % scales.shape[-2]:
        raise TensorFileError(
            f"{path}: scales {scales.shape} do not fit weights {weight.shape}; expected [..., G, N], G dividing K"
        )
    return Tensor(weight, scales)


def _byte_pieces(array: np.ndarray | Streamed) -> Iterator[memoryview]:
    left = array.nbytes
    for piece in array.pieces if isinstance(array, Streamed) else (array,):
        left -= piece.nbytes
        yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
    if left:
        raise ValueError(
            f"the pieces of a streamed array have {array.nbytes - left} bytes, {array.shape} needs {array.nbytes}"
        )


class _Writer:
    """Emits opcodes in the frames of Python's C pickler, which ends a full frame where the next object begins."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.frame = bytearray()
        self.memo: dict = {}
        self.memoized = 0
        file.write(b"\x80\x04")

    def flush(self) -> None:
        if self.frame:
            self.file.write(b"\x95" + struct.pack("<Q", len(self.frame)) + self.frame)
            self.frame.clear()

    def begin(self, data: bytes = b"") -> None:
        """Opcodes that begin an object."""
        if len(self.frame) >= FRAME_TARGET:
            self.flush()
        self.frame += data

    def end(self, data: bytes, key=None) -> None:
        """Opcodes that end an object, which is then memoized; `key` finds it again."""
        self.frame += data + b"\x94"
        if key is not None:
            self.memo[key] = self.memoized
        self.memoized += 1

    def known(self, key) -> bool:
        self.begin(b"h" + bytes([self.memo[key]]) if key in self.memo else b"")
        return key in self.memo

    def string(self, text: str) -> None:
        if not self.known(text):
            self.end(b"\x8c" + bytes([len(text)]) + text.encode(), text)

    def name(self, module_and_name: tuple[str, str]) -> None:
        if not self.known(module_and_name):
            for part in module_and_name:
                self.string(part)
            self.end(b"\x93", module_and_name)

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.begin(b"K" + struct.pack("<B", value))
        elif 0 <= value < 1 << 16:
            self.begin(b"M" + struct.pack("<H", value))
        else:
            self.begin(b"J" + struct.pack("<i", value))

    def shape(self, shape: tuple[int, ...]) -> None:
        self.begin(b"(" if len(shape) > 3 else b"")
        for length in shape:
            self.integer(length)
        self.end(b"t" if len(shape) > 3 else bytes([0x84 + len(shape)]))

    def payload(self, array: np.ndarray | Streamed) -> None:
        size = array.nbytes
        if size < 1 << 8:
            head = b"C" + struct.pack("<B", size)
        elif size < 1 << 32:
            head = b"B" + struct.pack("<I", size)
        else:
            head = b"\x8e" + struct.pack("<Q", size)
        if size < FRAME_TARGET:
            self.begin(head + b"".join(_byte_pieces(array)))
        else:
            self.flush()
            self.file.write(head)
            for piece in _byte_pieces(array):
                self.file.write(piece)
        self.end(b"")

    def array(self, array: np.ndarray | Streamed) -> None:
        name, order, sizes = _DTYPE_STATES[array.dtype.name]
        self.name(RECONSTRUCT)
        self.name(NDARRAY)
        self.shape((0,))
        if not self.known(b"b"):
            self.end(b"C\x01b", b"b")
        self.end(b"\x87")
        self.end(b"R")
        self.begin(b"(")
        self.integer(1)
        self.shape(array.shape)
        self.name(DTYPE)
        self.string(name) if isinstance(name, str) else self.name(name)
        self.end(b"\x89\x88\x87")
        self.end(b"R")
        self.begin(b"(")
        self.integer(3)
        self.string(order)
        self.begin(b"NNN")
        for value in sizes:
            self.integer(value)
        self.end(b"t")
        self.begin(b"b\x89")
        self.payload(array)
        self.end(b"t")
        self.frame += b"b"

    def tensor(self, tensor: Tensor) -> None:
        if tensor.scales is None:
            self.array(tensor.weight)
        else:
            self.name(QUANTIZED)
            self.end(b")\x81")
            self.end(b"}")
            self.begin(b"(")
            self.string("weight")
            self.array(tensor.weight)
            self.string("scales")
            self.array(tensor.scales)
            self.frame += b"ub"
        self.frame += b"."
        self.flush()


_DTYPE_STATES = {
    "float32": ("f4", "<", (-1, -1, 0)),
    "int8": ("i1", "|", (-1, -1, 0)),
    "bfloat16": (BFLOAT16, "<", (2, 2, 64)),
}


def write(path: Path, tensor: Tensor) -> None:
    """Writes the released form of a tensor, whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            _Writer(file).tensor(tensor)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
