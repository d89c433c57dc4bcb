"""Traces on disk: `manifest.json`, tensors in safetensors parts, tables in Parquet parts. No jax.

    out/manifest.json                what was run, the taps, every finished part with sizes and sha256
        act-00000000.safetensors     of some prompts: "7.tokens", "7.logprobs", "7.tap.resid_post"; bfloat16 kept
        tokens-00000000.parquet      of the same prompts: `Trace.to_pandas("tokens")` with a column "prompt" in front
        router-00000000.parquet      the same of "router", where routing was captured

The other fields of each Trace are JSON in the metadata of the safetensors file. Parts are written whole or not at all;
the manifest is replaced after each. So after a crash all finished parts are readable, and `missing` says what is not
there yet. A part whose files lie there unlisted is of a crash, and is written again.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import save_file

from grokscope import look
from grokscope.checkpoint.lock import lock
from grokscope.run.trace import TABLES, Trace

FORMAT = "grokscope dump 3"
ARRAYS = ("tokens", "logprobs")
FIELDS = tuple(f.name for f in dataclasses.fields(Trace) if f.name not in (*ARRAYS, "taps"))
PART_BYTES = 16_000_000
PART_SECONDS = 60
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
          "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
          "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip
"""Types of arrays, as safetensors spells them."""


def refuse_existing(directory: Path | str) -> None:
    """Raises FileExistsError unless a dump can be written there: nothing, or an empty folder."""
    directory = Path(directory)
    if not directory.exists() or (directory.is_dir() and _begun_only(directory)):
        return
    if not directory.is_dir() or any(directory.iterdir()):
        begun = "it holds a dump: resume it, or " if _may_go_on(directory) else ""
        raise FileExistsError(f"{directory} exists and is not an empty folder; {begun}choose a new one, or delete it")


def _may_go_on(directory: Path) -> bool:
    """Whether `resume` may go on there: not with the dump of a single Trace, which is written at once."""
    try:
        return not _manifest(directory, empty=True)["about"].get("single")
    except (FileNotFoundError, ValueError):
        return False


def _begun_only(directory: Path) -> bool:
    """Whether there is nothing but what is left of a dump that never had a part: the lock, perhaps the manifest, and
    files of a part that was cut short."""
    names = {path.name for path in directory.iterdir()}
    ours = re.compile(rf"\.lock|(manifest\.json|(act|{'|'.join(TABLES)})-0{{8}}\.\w+)(\.partial)?")
    if ".lock" not in names or not all(ours.fullmatch(name) for name in names):
        return False
    return "manifest.json" not in names or not _manifest(directory, empty=True)["parts"]


def save(trace: Trace, directory: Path | str) -> Path:
    """Writes one Trace into a new or empty folder; raises FileExistsError for one that holds anything."""
    with Writer(directory, {"single": True}, 1) as writer:
        writer.add(0, trace)
    return Path(directory)


class Writer:
    """Writes Traces into a folder, part by part, in a thread that is at most one part behind.

    Use as a context manager: leaving it writes what is left, an error inside it included. `about` identifies the run
    that is dumped; a folder is gone on with (`resume`) only by the same. A part is closed at PART_BYTES, and where
    Traces come slowly with the first after PART_SECONDS.
    """

    def __init__(self, directory: Path | str, about: dict[str, Any], num_prompts: int, *, resume: bool = False):
        json.dumps(about)  # TypeError before anything is written
        self.directory = Path(directory)
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "about": about,
            "prompts": num_prompts,
            "taps": {},
            "parts": [],
        }
        if not (resume and (self.directory / "manifest.json").exists()):
            refuse_existing(self.directory)
        self._traces: dict[int, Trace] = {}
        self._size = 0
        self._begun = time.monotonic()
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    @property
    def done(self) -> frozenset[int]:
        """Prompts that are on disk."""
        return frozenset(p for part in self.manifest["parts"] for p in part["prompts"])

    def add(self, prompt: int, trace: Trace) -> None:
        """Takes a Trace; raises OSError if an earlier part could not be written."""
        self._traces[prompt] = trace
        self._size += sum(a.nbytes for a in trace.taps.values()) + 8 * len(trace)
        if self._size >= PART_BYTES or time.monotonic() - self._begun >= PART_SECONDS:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(self._write, self._traces) if self._traces else None
        self._traces, self._size, self._begun = {}, 0, time.monotonic()

    def _write(self, traces: dict[int, Trace]) -> None:
        names = [part["files"]["act"]["file"] for part in self.manifest["parts"]]
        number = max((int(name[4:12]) + 1 for name in names), default=0)
        files = {"act": self._file(f"act-{number:08d}.safetensors", functools.partial(_save_tensors, traces))}
        for table in TABLES:
            having = {p: t for p, t in traces.items() if table in t.tables}
            if having:
                write = functools.partial(_save_table, having, table)
                files[table] = self._file(f"{table}-{number:08d}.parquet", write)
        for trace in traces.values():
            for tap, value in trace.taps.items():
                self.manifest["taps"].setdefault(tap, {"dims": trace.dims[tap], "dtype": str(value.dtype)})
        self.manifest["parts"].append({"prompts": [*traces], "files": files})
        self._write_manifest()

    def _file(self, name: str, write) -> dict[str, Any]:
        """Writes a file whole; its entry in the manifest."""
        partial = self.directory / (name + ".partial")
        write(partial)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        entry = {"file": name, "bytes": partial.stat().st_size, "sha256": digest}
        os.replace(partial, self.directory / name)
        return entry

    def _write_manifest(self) -> None:
        self._file("manifest.json", lambda path: path.write_text(json.dumps(self.manifest, indent=1)))

    def __enter__(self) -> "Writer":
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.directory)
        try:
            if (self.directory / "manifest.json").exists():
                self._go_on(_manifest(self.directory, empty=True))
            if not self.manifest["parts"] and _begun_only(self.directory):
                for path in self.directory.glob("*-*.*"):  # of a part that was cut short
                    path.unlink()
            self._write_manifest()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _go_on(self, found: dict[str, Any]) -> None:
        if not found["parts"]:
            return
        ours, theirs = self.manifest["about"], found["about"]
        changed = [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
        if changed or found["prompts"] != self.manifest["prompts"]:
            what = ", ".join(f"{n} ({theirs.get(n)!r}, now {ours.get(n)!r})"[:200] for n in changed) or "prompts"
            raise ValueError(f"{self.directory} is the dump of another run; different: {what}")
        whole = [part for part in found["parts"] if all(_is_whole(self.directory, f) for f in part["files"].values())]
        for part in found["parts"]:  # what is missing or cut is made again
            if part not in whole:
                for entry in part["files"].values():
                    (self.directory / entry["file"]).unlink(missing_ok=True)
        self.manifest = found | {"parts": whole}

    def __exit__(self, *_) -> None:
        try:
            self._hand_over()
            if self._writing is not None:
                self._writing.result()
        finally:
            self._thread.shutdown()
            self._lock.close()


def _save_tensors(traces: dict[int, Trace], path: Path) -> None:
    arrays = {f"{p}.{name}": getattr(t, name) for p, t in traces.items() for name in ARRAYS}
    arrays |= {f"{p}.tap.{name}": a for p, t in traces.items() for name, a in t.taps.items()}
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise TypeError(f"{name} is of type {array.dtype}; a dump holds {', '.join(DTYPES)}")
    fields = {p: {name: getattr(t, name) for name in FIELDS} for p, t in traces.items()}
    path.touch()  # save_file alone lets nobody else read it
    mode = path.stat().st_mode
    try:
        save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path, {"traces": json.dumps(fields)})
    except SafetensorError as err:
        raise OSError(f"{path} cannot be written: {err}") from err
    path.chmod(mode)


def _save_table(traces: dict[int, Trace], table: str, path: Path) -> None:
    columns = [t.columns(table) for t in traces.values()]
    lengths = [len(c["position"]) for c in columns]
    joined = {"prompt": np.repeat(np.array([*traces], np.int32), lengths)}
    joined |= {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
    floats = [name for name, value in joined.items() if value.dtype == np.float32]
    others = [name for name in joined if name not in floats]
    typed = {n: pa.array(joined[n], pa.string()) for n in ("piece", "phase")}  # of no rows no type could be inferred
    if "logprob" in joined:  # that of a first token is null, so that sums leave it out
        typed["logprob"] = pa.array(joined["logprob"], pa.float32(), from_pandas=True)
    try:
        pq.write_table(
            pa.table(joined | typed), path, compression="zstd", use_dictionary=others, use_byte_stream_split=floats
        )
    except OSError as err:
        raise OSError(f"{path} cannot be written: {err}") from err


def _some(prompts: int | Iterable[int]) -> list[int]:
    chosen = [prompts] if isinstance(prompts, int | np.integer) else [*prompts]
    if not chosen:
        raise ValueError("prompts=[] selects nothing; None is all")
    return chosen


def _is_whole(directory: Path, entry: dict[str, Any]) -> bool:
    path = directory / entry["file"]
    return path.exists() and path.stat().st_size == entry["bytes"]


def _manifest(directory: Path, *, empty: bool = False) -> dict[str, Any]:
    """Raises ValueError for a damaged one; for that of a single Trace without its part unless `empty`."""
    path = directory / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} is not a dump: it has no manifest.json")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        for part in manifest["parts"]:
            part["prompts"] = [int(p) for p in part["prompts"]]
            part["files"] = {
                kind: {"file": str(f["file"]), "bytes": int(f["bytes"]), "sha256": str(f["sha256"])}
                for kind, f in part["files"].items()
            }
            part["files"]["act"]
            if outside := [f["file"] for f in part["files"].values() if Path(f["file"]).name != f["file"]]:
                raise ValueError(f"{outside[0]!r} is not the name of a file")
        manifest["prompts"], manifest["about"] = int(manifest["prompts"]), dict(manifest["about"])
        manifest["taps"] = {tap: {"dims": t["dims"], "dtype": t["dtype"]} for tap, t in manifest["taps"].items()}
        if manifest["about"].get("single") and not manifest["parts"] and not empty:
            raise ValueError("no parts")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
        raise ValueError(f"{path} is damaged, or not a manifest of {FORMAT!r}: {err}") from err
    return manifest


def open(directory: Path | str) -> "Trace | Dump":
    """The Trace that was saved there, checked; or the Dump of a run, whose Traces are read when they are asked for.

    Raises FileNotFoundError if it is none, ValueError naming a file that was changed.
    """
    dump = Dump(directory)
    if not dump.about.get("single"):
        return dump
    dump.verify()
    return dump[0]


class _Part:
    """A safetensors part, mapped into memory: arrays are read from the disk where they are touched."""

    def __init__(self, path: Path):
        raw = np.memmap(path, np.uint8, "r")
        try:
            begin = 8 + int(raw[:8].view("<u8")[0])
            self.header = json.loads(raw[8:begin].tobytes())
            self.fields = json.loads(self.header.pop("__metadata__")["traces"])
        except (ValueError, KeyError) as err:
            raise ValueError(f"{path} was changed since it was written: {err}") from err
        self._data = raw[begin:]

    def array(self, name: str) -> np.ndarray:
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        return self._data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


class Dump:
    """The Traces of a run on disk, also while they are still being written: `dump[7]` is that of prompt 7.

    Attributes:
      about: checkpoint, capture, sampling, edits and versions of the run.
      taps: {name: {"dims": letters of its axes, "dtype": type}}.
      num_prompts: of the run; those finished are `dump.prompts`, and the rest `dump.missing`.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        manifest = _manifest(self.directory)
        self.about: dict[str, Any] = manifest["about"]
        self.taps: dict[str, dict[str, str]] = manifest["taps"]
        self.num_prompts: int = manifest["prompts"]
        self._parts = manifest["parts"]
        self._part_of = {p: part for part in self._parts for p in part["prompts"]}
        self._opened: tuple[str, _Part] | None = None

    @property
    def prompts(self) -> list[int]:
        return sorted(self._part_of)

    @property
    def missing(self) -> list[int]:
        return [p for p in range(self.num_prompts) if p not in self._part_of]

    @property
    def nbytes(self) -> int:
        return sum(file["bytes"] for part in self._parts for file in part["files"].values())

    def __len__(self) -> int:
        return len(self._part_of)

    def __iter__(self) -> Iterator[Trace]:
        return (self[p] for p in self.prompts)

    def __getitem__(self, prompt: int) -> Trace:
        """One Trace; its taps are mapped, so that only what is touched is read. Raises KeyError if it is not there."""
        part = self._tensors(self._part(prompt))
        fields = part.fields[str(prompt)]
        arrays = {name: part.array(f"{prompt}.{name}") for name in ARRAYS}
        return Trace(**arrays, taps={n: part.array(f"{prompt}.tap.{n}") for n in fields["dims"]}, **fields)

    def to_numpy(
        self, tap: str, layer: int | None = None, *, prompts: int | Iterable[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A tap of all Traces, or of some, joined along positions, and the prompt [N] of each position.

        With `layer`, only that layer is read. Raises KeyError for what is not there.
        """
        values, of = [], []
        for prompt in self.prompts if prompts is None else _some(prompts):
            trace = self[prompt]
            if prompts is None and tap in self.taps and tap not in trace.taps:
                continue  # captured of other prompts
            value = trace[tap] if layer is None else trace[tap, layer]
            dims = trace.dims[tap] if layer is None else trace.dims[tap][1:]
            if "T" not in dims or "S" in dims:
                raise KeyError(f"{tap!r} [{' '.join(dims)}] of several prompts cannot be joined along positions")
            values.append(value)
            of.append(np.full(value.shape[dims.index("T")], prompt))
        if not values:
            raise KeyError(f"{self.directory} holds no finished prompt yet")
        return np.concatenate(values, axis=dims.index("T")), np.concatenate(of)

    def to_pandas(self, table: str, *, prompts: int | Iterable[int] | None = None):
        """`Trace.to_pandas` of all Traces, or of some, with a column "prompt" in front, ordered by it."""
        where, parts = None, self._parts
        if prompts is not None:
            prompts = _some(prompts)
            where, holding = [("prompt", "in", prompts)], [self._part(p) for p in prompts]
            parts = [part for part in parts if part in holding]
        frame = pq.read_table(self._files(table, parts), filters=where).to_pandas()
        return frame.sort_values("prompt", kind="stable", ignore_index=True)

    def files(self, table: str) -> list[str]:
        """The Parquet files of a table, for DuckDB, polars or Arrow. Raises ValueError, naming the tables there are."""
        return self._files(table, self._parts)

    def _files(self, table: str, parts: list[dict[str, Any]]) -> list[str]:
        found = [part["files"][table]["file"] for part in parts if table in part["files"] and table != "act"]
        if not found:
            there = sorted({kind for part in self._parts for kind in part["files"]} - {"act"})
            raise ValueError(f"{self.directory} has no table {table!r}; it has {', '.join(there) or 'none yet'}")
        return [str(self.directory / name) for name in found]

    def verify(self) -> None:
        """Reads every part. Raises ValueError naming one that is missing or was changed since it was written."""
        for part in self._parts:
            for entry in part["files"].values():
                path = self._whole(entry)
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                        raise ValueError(f"{path} was changed since it was written: its sha256 is not the manifest's")

    def _part(self, prompt: int) -> dict[str, Any]:
        if not isinstance(prompt, int | np.integer):
            raise TypeError(f"a Dump has Traces by the number of their prompt, as dump[7]; got {prompt!r}")
        if prompt not in self._part_of:
            raise KeyError(f"prompt {prompt} is not in {self.directory}: {len(self)} of {self.num_prompts} are")
        return self._part_of[prompt]

    def _tensors(self, part: dict[str, Any]) -> _Part:
        entry = part["files"]["act"]
        if self._opened is None or self._opened[0] != entry["file"]:
            self._opened = entry["file"], _Part(self._whole(entry))
        return self._opened[1]

    def _whole(self, entry: dict[str, Any]) -> Path:
        path = self.directory / entry["file"]
        if not _is_whole(self.directory, entry):
            raise ValueError(f"{path} is missing or was changed since it was written: expected {entry['bytes']} bytes")
        return path

    def _repr_html_(self) -> str:
        capture = {name: f"{t['dtype']} [{' '.join(t['dims'])}]" for name, t in self.taps.items()}
        facts = {"folder": str(self.directory), "prompts": f"{len(self)} of {self.num_prompts}"}
        facts |= {"parts": str(len(self._parts)), "size": look.si(self.nbytes, "B")} | capture
        return look.facts_html("Dump", facts)

    def __repr__(self) -> str:
        size = look.si(self.nbytes, "B")
        return f"Dump({self.directory}: {len(self)} of {self.num_prompts} prompts, {len(self._parts)} parts, {size})"
