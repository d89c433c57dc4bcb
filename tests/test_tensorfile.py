"""Tensor files: the released bytes out, nothing but the released bytes in."""

import io
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
from conftest import SHARED, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from grokscope.checkpoint import tensorfile
from grokscope.checkpoint.ckpt0 import RELEASED_SIZES
from grokscope.checkpoint.tensorfile import Streamed, Tensor, TensorFileError

BF16 = ml_dtypes.bfloat16


def int8(*shape, groups=1, scales=BF16, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, shape).astype(np.int8)
    return Tensor(weight, rng.random((*shape[:-2], groups, shape[-1])).astype(scales))


def same(a, b):
    assert (a is None) == (b is None)
    assert a is None or (a.dtype == b.dtype and a.shape == b.shape and (np.asarray(a) == np.asarray(b)).all())


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(np.float32([1.5, -2])),
        Tensor(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
        int8(4, 6),
        int8(3, 8, 5, groups=4),
        int8(256, 300, scales=np.float32),  # payload over a frame
        int8(16, 8200, groups=8),  # scales over a frame
    ],
    ids=lambda t: str(t.weight.shape),
)
def test_round_trip(tmp_path, tensor):
    tensorfile.write(tmp_path / "t", tensor)
    again = tensorfile.read(tmp_path / "t")
    same(again.weight, tensor.weight)
    same(again.scales, tensor.scales)
    assert list(tmp_path.iterdir()) == [tmp_path / "t"]


@pytest.mark.parametrize("shape", [(6, 2, 5), (6, 300, 200)])  # in a frame, and over one
def test_streamed_pieces_give_the_same_bytes(tmp_path, shape):
    whole = int8(*shape)
    tensorfile.write(tmp_path / "whole", whole)
    pieces = iter(np.split(whole.weight, [1, 4]))
    tensorfile.write(tmp_path / "pieces", Tensor(Streamed(shape, np.dtype(np.int8), pieces), whole.scales))
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(ValueError, match=f"needs {np.prod(shape)}"):
        tensorfile.write(tmp_path / "short", Tensor(Streamed(shape, np.dtype(np.int8), whole.weight[1:]), whole.scales))
    assert not list(tmp_path.glob("short*"))


@given(st.integers(1, 70_000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_bytes_are_those_of_the_pickler(tmp_path_factory, columns, quantised):
    """Framing and memo as Python's C pickler has them; only the module name of numpy 1 differs, by one byte."""
    path = tmp_path_factory.mktemp("t") / "t"
    if quantised:
        tensor = int8(2, columns)
        Released = type("QuantizedWeight8bit", (), {"__module__": "__main__"})
        import __main__

        __main__.QuantizedWeight8bit = Released
        value = Released()
        value.__dict__ |= {"weight": tensor.weight, "scales": tensor.scales}
    else:
        tensor = Tensor(np.zeros(columns, np.float32))
        value = tensor.weight
    with path.open("wb") as file:
        pickle.dump(value, file, 4)
    theirs = path.read_bytes()
    tensorfile.write(path, tensor)
    ours = path.read_bytes()
    name = theirs.index(b"\x8c\x16numpy._core.multiarray")
    assert len(ours) == len(theirs) - 1
    assert ours[11:name] == theirs[11:name]  # behind protocol and length of the first frame
    assert ours[name + 23 :] == theirs[name + 24 :]


def test_released_files_come_out_byte_for_byte(golden, tmp_path):
    for path in sorted((golden("tiny") / "ckpt-0").iterdir()):
        tensorfile.write(tmp_path / "t", tensorfile.read(path))
        assert (tmp_path / "t").read_bytes() == path.read_bytes(), path.name


SMALL = {
    "rms_norm/scale": Tensor(np.zeros(6144, np.float32)),
    "router/w": Tensor(np.zeros((6144, 8), np.float32)),
    "multi_head_attention/key/w": int8(6144, 1024),
    "multi_head_attention/query/w": int8(6144, 6144),
    "multi_head_attention/linear/w": int8(6144, 6144, groups=8),
}


@pytest.mark.parametrize("path", SMALL)
def test_released_sizes(tmp_path, path):
    tensorfile.write(tmp_path / "t", SMALL[path])
    assert (tmp_path / "t").stat().st_size == RELEASED_SIZES[path]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["in_out_embed/embeddings", "moe/linear/w", "moe/linear_1/w"])
def test_released_sizes_of_the_large(tmp_path, path):
    zeros = {
        "in_out_embed/embeddings": lambda: Tensor(np.zeros((131072, 6144), np.float32)),
        "moe/linear/w": lambda: Tensor(np.zeros((8, 6144, 32768), np.int8), np.zeros((8, 1, 32768), BF16)),
        "moe/linear_1/w": lambda: Tensor(np.zeros((8, 32768, 6144), np.int8), np.zeros((8, 8, 6144), BF16)),
    }
    try:
        tensorfile.write(tmp_path / "t", zeros[path]())
        assert (tmp_path / "t").stat().st_size == RELEASED_SIZES[path]
    finally:
        (tmp_path / "t").unlink(missing_ok=True)


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, getattr], ids=lambda f: f.__name__)
def test_hostile_pickles_do_not_run(tmp_path, function):
    mark = tmp_path / "ran"
    path = tmp_path / "t"
    path.write_bytes(pickle.dumps(Hostile(function, f"touch {mark}"), 4))
    with pytest.raises(TensorFileError, match=rf"{path}: at byte \d+: found the name \w+.{function.__name__}"):
        tensorfile.read(path)
    assert not mark.exists()


def test_hostile_call_inside_an_array(tmp_path):
    """A REDUCE of an allowed name on other arguments, and of numpy on a foreign dtype."""
    path = tmp_path / "t"
    for value in (
        np.array([{"a": 1}], object),
        np.zeros(3, np.float64),
        np.asfortranarray(np.ones((3, 2), np.float32)),
        [1, 2],
    ):
        path.write_bytes(pickle.dumps(value, 4))
        with pytest.raises(TensorFileError, match="at byte"):
            tensorfile.read(path)


def test_numpy_2_names_are_read(tmp_path):
    stream = io.BytesIO()
    pickle.dump(np.float32([[1, 2]]), stream, 4)
    assert b"numpy._core" in stream.getvalue()
    (tmp_path / "t").write_bytes(stream.getvalue())
    same(tensorfile.read(tmp_path / "t").weight, np.float32([[1, 2]]))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_files_are_refused_by_name_and_offset(tmp_path_factory, data):
    """Cut anywhere, or any byte of the structure changed: refused, or the very same tensor; never another exception."""
    path = tmp_path_factory.mktemp("t") / "t"
    tensor = int8(5, 7, groups=5)
    tensorfile.write(path, tensor)
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        bad = good[:at]
    else:
        bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    path.write_bytes(bad)
    try:
        found = tensorfile.read(path)
    except TensorFileError as err:
        assert str(path) in str(err)
    else:
        assert len(bad) == len(good)
        assert found.weight.shape == tensor.weight.shape


OPCODES = [bytes([c]) for c in b"\x94\x93\x81\x85\x86\x87R)}(tubN\x88\x89."] + [b"h\x00", b"h\x01", b"K\x01", b"C\x01b"]
OPCODES += [
    b"\x8c" + bytes([len(w)]) + w for w in (b"numpy", b"ndarray", b"dtype", b"ml_dtypes", b"bfloat16", b"f4", b"weight")
]


@given(st.lists(st.sampled_from(OPCODES), max_size=30))
@settings(max_examples=400, deadline=None)
def test_any_program_is_refused_with_its_name(tmp_path_factory, program):
    path = tmp_path_factory.mktemp("t") / "t"
    path.write_bytes(b"\x80\x04" + b"".join(program) + b".")
    with pytest.raises(TensorFileError) as caught:
        tensorfile.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "program",
    [b"}}\x93", b")" + b"\x85" * 5000 + b"\x8c\x01x\x93", b")" + b"\x94h\x00\x86" * 60 + b")R"],
    ids=["dictionary as a name", "5000 nested tuples", "60 doublings"],
)
def test_programs_that_would_break_a_message(tmp_path, program):
    (tmp_path / "t").write_bytes(b"\x80\x04" + program + b".")
    with pytest.raises(TensorFileError) as caught:
        tensorfile.read(tmp_path / "t")
    assert len(str(caught.value)) < 500


def test_a_program_of_endless_operations_is_refused(tmp_path):
    """Which would only take memory: the released files have fewer than two hundred."""
    (tmp_path / "t").write_bytes(b"\x80\x04" + b"}\x94" * 5000 + b".")
    with pytest.raises(TensorFileError, match="more than 1000 operations"):
        tensorfile.read(tmp_path / "t")


def test_trailing_bytes(tmp_path):
    tensorfile.write(tmp_path / "t", int8(2, 2))
    with (tmp_path / "t").open("ab") as file:
        file.write(b"more")
    with pytest.raises(TensorFileError, match="4 bytes after the end"):
        tensorfile.read(tmp_path / "t")


def test_scales_that_do_not_divide(tmp_path):
    tensorfile.write(tmp_path / "t", Tensor(np.zeros((5, 3), np.int8), np.zeros((2, 3), BF16)))
    with pytest.raises(TensorFileError, match="do not fit weights"):
        tensorfile.read(tmp_path / "t")


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is not on this machine")
def test_every_shared_checkpoint_comes_out_byte_for_byte(tmp_path):
    files = [p for case in ("deep", "blocks", "bf16") for p in sorted((shared("golden") / case / "ckpt-0").iterdir())]
    assert len(files) == 146 + 26 + 26
    for path in files:
        tensorfile.write(tmp_path / "t", tensorfile.read(path))
        assert (tmp_path / "t").read_bytes() == path.read_bytes(), path
