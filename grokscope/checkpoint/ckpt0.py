"""The released layout: a directory with `config.json`, `ckpt-0/tensor00000_000 ...` and, if any, `tokenizer.model`.

No file stores its layer: layers lie in lexicographic order ("0", "1", "10", "11", ..., "2", "20", ...), because the
release flattened a dictionary by sorted key. A directory that holds only Grok-1's 770 files, without config, is Grok-1.
"""

import contextlib
import dataclasses
import hashlib
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np

from grokscope import look
from grokscope.checkpoint import tensorfile
from grokscope.checkpoint.lock import lock
from grokscope.checkpoint.tensorfile import Tensor, TensorFileError
from grokscope.config import GROK_1, GrokConfig
from grokscope.model.params import GLOBAL_PARAMS, LAYER_PARAMS, Param
from grokscope.model.quant import QuantizedWeight, quantize
from grokscope.tokenizer import Tokenizer

SUMS = "SHA256SUMS"
UNFINISHED = ".unfinished"  # folder inside of a checkpoint that is being written

Progress = Callable[[Collection], Iterable]
"""Wraps a collection that takes long to go through, as tqdm does."""

RELEASED_SIZES = {
    "in_out_embed/embeddings": 3_221_225_637,
    "rms_norm/scale": 24_727,
    "moe/linear/w": 1_611_137_347,
    "moe/linear_1/w": 1_611_399_491,
    "moe/linear_v/w": 1_611_137_347,
    "multi_head_attention/key/w": 6_293_814,
    "multi_head_attention/linear/w": 37_847_359,
    "multi_head_attention/query/w": 37_761_334,
    "multi_head_attention/value/w": 6_293_814,
    "rms_norm_1/scale": 24_727,
    "rms_norm_2/scale": 24_727,
    "rms_norm_3/scale": 24_727,
    "router/w": 196_770,
}
"""Bytes of each of Grok-1's files, from the listing of the release."""

KNOWN_EMBEDDING_RMS = 0.0127436
KNOWN_FIGURES = (
    "expert load of layer 0 over 2048 tokens .132 .102 .166 .126 .114 .127 .128 .105",
    "median top1 - top2 probability of layer 0: 0.00617",
    "attention delta / stream of layer 0: 0.876; moe delta / stream: 0.483",
)
"""Public measurements of the real weights."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """One file of the layout and the weight it holds."""

    index: int
    param: Param
    layer: int | None

    @property
    def file(self) -> str:
        return f"tensor{self.index:05d}_000"

    @property
    def path(self) -> str:
        """The weight's name in the release."""
        return (
            f"language_model/{self.param.path}"
            if self.layer is None
            else f"decoder_layer_{self.layer}/{self.param.path}"
        )


def slots(config: GrokConfig) -> list[Slot]:
    """Every file of a checkpoint of this shape, in order."""
    found = [Slot(i, p, None) for i, p in enumerate(GLOBAL_PARAMS)]
    for layer in sorted(range(config.num_layers), key=str):
        found += [Slot(len(found) + i, p, layer) for i, p in enumerate(LAYER_PARAMS)]
    return found


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, opened: nothing but its config has been read."""

    directory: Path
    tensors: Path  # the folder of the tensor files
    config: GrokConfig

    @property
    def tokenizer(self) -> Path | None:
        path = self.directory / "tokenizer.model"
        return path if path.exists() else None

    def read(self, slot: Slot) -> Tensor:
        """The memory-mapped tensor of a slot. Raises FileNotFoundError or TensorFileError, naming file and weight."""
        path = self.file(slot)
        tensor = tensorfile.read(path)
        expected = slot.param.shape(self.config)
        if tensor.weight.shape != expected or (tensor.scales is not None and slot.param.groups is None):
            raise TensorFileError(f"{path} ({slot.path}): {self._mismatch(tensor, slot, expected)}")
        return tensor

    def file(self, slot: Slot) -> Path:
        """The file of a slot. Raises FileNotFoundError, naming file and weight."""
        path = self.tensors / slot.file
        if not path.exists():
            raise FileNotFoundError(
                f"{path} ({slot.path}) is missing; `grokscope verify {self.directory}` lists all faults"
            )
        return path

    def refuse_more(self) -> None:
        """Raises ValueError where there are more tensor files than the config says: then it is of another model."""
        number = len(slots(self.config))
        beyond = self.tensors / f"tensor{number:05d}_000"
        if beyond.exists():
            raise ValueError(
                f"{self.directory}: config.json says {self.config.num_layers} layers, which are {number} tensor files, "
                f"and there is {beyond.name}; `grokscope verify {self.directory}` lists all faults"
            )

    def _mismatch(self, tensor: Tensor, slot: Slot, expected: tuple[int, ...]) -> str:
        found = f"found {tensor.weight.dtype} {list(tensor.weight.shape)}, expected {list(expected)}"
        if slot.param.groups is None:
            found += " float32"
        same = [p.path for p in (*GLOBAL_PARAMS, *LAYER_PARAMS) if p.shape(self.config) == tensor.weight.shape]
        return found + (f". The shape is that of {' or '.join(same)}: files swapped?" if same else "")

    def hash(self) -> str:
        """sha256 over config, file sizes, and router and norm files: identifies a checkpoint without reading it all."""
        digest = hashlib.sha256(self.config.to_json().encode())
        for slot in slots(self.config):
            path = self.file(slot)
            digest.update(f"{slot.file} {path.stat().st_size}\n".encode())
            if slot.param.name == "scale" or slot.param.module == "layer/router":
                digest.update(path.read_bytes())
        return digest.hexdigest()


def open_checkpoint(directory: Path | str) -> Checkpoint:
    """Finds config and tensor files. Raises FileNotFoundError or ValueError, saying what a checkpoint looks like."""
    directory = Path(directory)
    layout = "a checkpoint is a folder with config.json and ckpt-0/tensor00000_000, tensor00001_000, ..."
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; {layout}")
    if directory.resolve().name == "ckpt-0" and (directory.resolve().parent / "config.json").exists():
        directory = directory.resolve().parent
    tensors = directory / "ckpt-0" if (directory / "ckpt-0").is_dir() else directory
    if (directory / "config.json").exists():
        return Checkpoint(directory, tensors, GrokConfig.read(directory / "config.json"))
    count = len(list(tensors.glob("tensor?????_000")))
    if count == len(slots(GROK_1)):
        return Checkpoint(directory, tensors, GROK_1)
    raise FileNotFoundError(
        f"{directory} has no config.json and {count} tensor files (Grok-1 has {len(slots(GROK_1))}); {layout}"
    )


def write(
    directory: Path | str,
    config: GrokConfig,
    weight: Callable[[Slot], np.ndarray | QuantizedWeight | Tensor],
    tokenizer: Path | None = None,
    progress: Progress = iter,
) -> Path:
    """Writes a checkpoint in the released form, int8 with 8 scale groups on row-parallel matrices, with SHA256SUMS.

    `weight(slot)` gives a float array, quantised here where the release is quantised, or a QuantizedWeight or Tensor as
    it is to be stored. While it is written all lies in a folder inside of `directory`, so that there is a whole
    checkpoint or none; what was begun is deleted. A directory that has contents is refused, and so is a disk without
    room for it.
    """
    directory = Path(directory)
    refuse_contents(directory)
    new, partial = not directory.exists(), directory / UNFINISHED
    partial.mkdir(parents=True, exist_ok=True)
    with lock(partial):
        whole, finished = partial / "whole", list[Path]()
        try:
            shutil.rmtree(whole, ignore_errors=True)  # of a process that was killed
            require_room(directory, payload_bytes(config))
            _write(whole, config, weight, tokenizer, progress)
            finished = sorted(whole.iterdir(), key=lambda path: path.name == "config.json")  # last: without, it is none
            for path in finished:
                path.rename(directory / path.name)
        except BaseException:
            for path in (directory / path.name for path in finished):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            if new:
                with contextlib.suppress(OSError):  # somebody put something there
                    directory.rmdir()
            raise
        shutil.rmtree(partial)
    return directory


def refuse_contents(directory: Path) -> None:
    """Raises FileExistsError where there is more than what a `write` that was killed left."""
    if directory.exists() and any(path.name != UNFINISHED for path in directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; choose a new folder, or delete it first")


def _write(directory: Path, config: GrokConfig, weight, tokenizer: Path | None, progress: Progress) -> None:
    (directory / "ckpt-0").mkdir(parents=True)
    (directory / "config.json").write_text(config.to_json())
    if tokenizer is not None:
        shutil.copyfile(tokenizer, directory / "tokenizer.model")
    for slot in progress(slots(config)):
        tensor = _stored(slot, weight(slot))
        if tensor.weight.shape != slot.param.shape(config):
            raise ValueError(f"{slot.path}: weight is {tensor.weight.shape}, expected {slot.param.shape(config)}")
        tensorfile.write(directory / "ckpt-0" / slot.file, tensor)
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    sums = [f"{_sha256(p)}  {p.relative_to(directory)}\n" for p in progress(files)]
    (directory / SUMS).write_text("".join(sums))


def _stored(slot: Slot, value: np.ndarray | QuantizedWeight | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if slot.param.groups is None:
        return Tensor(np.asarray(value, np.float32))
    if not isinstance(value, QuantizedWeight):
        value = quantize(value, scale_groups(slot.param, value.shape))
    return Tensor(np.asarray(value.weight), np.asarray(value.scales))


def scale_groups(param: Param, shape: tuple[int, ...]) -> int:
    """G of a quantised matrix, as in the release where its contracting axis has room for that."""
    return math.gcd(param.groups, shape[-2])


def payload_bytes(config: GrokConfig) -> int:
    """Bytes of all weights and scales as stored; the files have some 150 to 320 more each."""
    total = 0
    for slot in slots(config):
        shape = slot.param.shape(config)
        if slot.param.groups is None:
            total += 4 * math.prod(shape)
        else:
            total += math.prod(shape) + 2 * math.prod(shape) // shape[-2] * scale_groups(slot.param, shape)
    return total


def require_room(directory: Path, total: int, present: int = 0) -> None:
    """Raises OSError where the disk of `directory`, which may not exist yet, has no room for `total` bytes and 1 %;
    `present` bytes of them are there already."""
    disk = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    free, needed = shutil.disk_usage(disk).free, total + total // 100 - present
    if free < needed:
        raise OSError(
            f"{directory} needs {look.si(needed, 'B')} more ({look.si(total, 'B')} and 1 % to spare, less "
            f"{look.si(present, 'B')} that are there), its disk has {look.si(free, 'B')} free; "
            "make room or choose a folder on another disk"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass
class Report:
    """What `verify` found: `problems` name file, finding and expectation; `notes` say what was and was not checked."""

    checkpoint: Checkpoint
    num_files: int
    num_bytes: int
    problems: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(directory: Path | str, progress: Progress = iter) -> Report:
    """Checks file set, sizes, headers, shapes, types, finite values and, where present, tokenizer and SHA256SUMS. Never
    raises for what a file holds; raises as `open_checkpoint` does where there is no checkpoint. Runs no pickle code."""
    checkpoint = open_checkpoint(directory)
    expected = slots(checkpoint.config)
    report = Report(checkpoint, 0, 0, [], [])
    present = {p.name for p in checkpoint.tensors.iterdir() if p.is_file()}
    if checkpoint.tensors == checkpoint.directory:
        present -= {"config.json", "tokenizer.model", SUMS, "README.md", "MODEL_CARD.md"}
    for name in sorted(present - {s.file for s in expected}):
        report.problems.append(f"{name}: not a file of this checkpoint, which ends at {expected[-1].file}")
    for slot in progress(expected):
        fault = _fault(checkpoint, slot)
        if fault:
            report.problems.append(f"{slot.file} ({slot.path}): {fault}")
        elif slot.file in present:
            report.num_files += 1
            report.num_bytes += (checkpoint.tensors / slot.file).stat().st_size
    sums = checkpoint.directory / SUMS
    if sums.exists():
        changed = _changed(sums, expected, checkpoint, progress)
        report.problems += changed
        if not changed:
            report.notes.append(f"{SUMS} compared: every file is as it was written, so none were swapped.")
    else:
        report.notes.append(
            f"No {SUMS}: a swap of files of equal shape (key and value, two norms, two layers) "
            "cannot be seen in this format."
        )
    if checkpoint.tokenizer is not None:
        try:
            Tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)
        except ValueError as err:
            report.problems.append(str(err))
    if checkpoint.config == GROK_1:
        report.notes += _known_figures(checkpoint, report)
    return report


def _fault(checkpoint: Checkpoint, slot: Slot) -> str | None:
    path = checkpoint.tensors / slot.file
    if not path.exists():
        return "missing"
    released = RELEASED_SIZES[slot.param.path] if checkpoint.config == GROK_1 else None
    if not path.is_file():
        return "not a file"
    size = path.stat().st_size
    try:
        tensor = checkpoint.read(slot)
    except TensorFileError as err:
        text = str(err).removeprefix(f"{path}").removeprefix(f" ({slot.path})").removeprefix(": ")
        return text + (f" (file has {size} bytes, the release {released})" if released not in (None, size) else "")
    if released not in (None, size):
        return f"{size} bytes, the released file has {released}"
    floats = tensor.weight if tensor.scales is None else tensor.scales
    if not np.isfinite(floats.astype(np.float32, copy=False)).all():
        return "holds values that are not finite"
    return None


def _changed(sums: Path, expected: list[Slot], checkpoint: Checkpoint, progress: Progress) -> list[str]:
    """Files that differ from SHA256SUMS, and tensor files that it does not list."""
    listed = {}
    problems = []
    for number, line in enumerate(sums.read_text("utf-8", "replace").splitlines(), 1):
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if found:
            listed[found[2].removeprefix("./")] = found[1]  # as `find . -exec sha256sum` names them
        else:
            problems.append(f"{SUMS}: line {number} is not a sum and a file name")
    for name, digest in progress(listed.items()):
        path = sums.parent / name
        if not path.is_file():
            problems.append(f"{name}: listed in {SUMS} but missing")
        elif _sha256(path) != digest:
            problems.append(f"{name}: contents differ from {SUMS}: changed or swapped since it was written")
    folder = checkpoint.tensors.relative_to(checkpoint.directory)
    problems += [f"{s.file}: not listed in {SUMS}" for s in expected if str(folder / s.file) not in listed]
    return problems


def _known_figures(checkpoint: Checkpoint, report: Report) -> list[str]:
    embedding = slots(GROK_1)[0]
    if any(p.startswith(embedding.file) for p in report.problems):
        return []
    table = checkpoint.read(embedding).weight
    square = sum(float(np.square(rows, dtype=np.float64).sum()) for rows in np.array_split(table, 64))
    rms = math.sqrt(square / table.size)
    if abs(rms / KNOWN_EMBEDDING_RMS - 1) > 1e-3:
        report.problems.append(
            f"{embedding.file}: embedding RMS {rms:.7f}, the real weights have {KNOWN_EMBEDDING_RMS}"
        )
    return [
        f"Embedding RMS {rms:.7f} (real weights {KNOWN_EMBEDDING_RMS}).",
        "Published figures of the real weights that need a text to compare: " + "; ".join(KNOWN_FIGURES) + ".",
    ]
