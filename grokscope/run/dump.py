"""Traces on disk: `manifest.json` and safetensors parts of some Traces each, bfloat16 kept. No jax.

A part holds for prompt 7 the tensors "7.tokens", "7.logprobs" and "7.tap.resid_post", and in its metadata, as JSON, the
other fields of each Trace. Parts are written whole or not at all; the manifest, which names every finished one with
size and sha256, is replaced after each. So after a crash all finished parts are readable, and `missing` says what is
not there yet.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from grokscope import look
from grokscope.run.trace import Trace

FORMAT = "grokscope dump 2"
ARRAYS = ("tokens", "logprobs")
FIELDS = tuple(f.name for f in dataclasses.fields(Trace) if f.name not in (*ARRAYS, "taps"))
PART_BYTES = 16_000_000


def refuse_existing(directory: Path | str) -> None:
    """Raises FileExistsError unless a dump can be written there: nothing, or an empty folder."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty folder; choose a new one, or delete it first")


def save(trace: Trace, directory: Path | str) -> Path:
    """Writes one Trace into a new or empty folder; raises FileExistsError for one that holds anything."""
    with Writer(directory, {"single": True}, 1) as writer:
        writer.add(0, trace)
    return Path(directory)


class Writer:
    """Writes Traces into a folder, part by part, in a thread that is at most one part behind.

    Use as a context manager: leaving it writes what is left, an error inside it included. `about` identifies the run
    that is dumped; a folder is gone on with (`resume`) only by the same.
    """

    def __init__(self, directory: Path | str, about: dict[str, Any], num_prompts: int, *, resume: bool = False):
        self.directory = Path(directory)
        if resume and (self.directory / "manifest.json").exists():
            self.manifest = _manifest(self.directory)
            theirs = self.manifest["about"]
            changed = [n for n in {**about, **theirs} if about.get(n) != theirs.get(n)]
            if changed or self.manifest["prompts"] != num_prompts:
                what = ", ".join(f"{n} ({theirs.get(n)!r}, now {about.get(n)!r})"[:200] for n in changed) or "prompts"
                raise ValueError(f"{directory} is the dump of another run; different: {what}")
        else:
            refuse_existing(self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)
            self.manifest = {"format": FORMAT, "about": about, "prompts": num_prompts, "parts": []}
        self._traces: dict[int, Trace] = {}
        self._size = 0
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
        if self._size >= PART_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(self._write, self._traces) if self._traces else None
        self._traces, self._size = {}, 0

    def _write(self, traces: dict[int, Trace]) -> None:
        part = self.directory / f"act-{len(self.manifest['parts']):08d}.safetensors"
        arrays = {f"{p}.{name}": getattr(t, name) for p, t in traces.items() for name in ARRAYS}
        arrays |= {f"{p}.tap.{name}": a for p, t in traces.items() for name, a in t.taps.items()}
        fields = {p: {name: getattr(t, name) for name in FIELDS} for p, t in traces.items()}
        partial = part.with_suffix(".partial")
        save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, partial, {"traces": json.dumps(fields)})
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        size = partial.stat().st_size
        os.replace(partial, part)
        self.manifest["parts"].append({"file": part.name, "bytes": size, "sha256": digest, "prompts": [*traces]})
        self._write_manifest()

    def _write_manifest(self) -> None:
        partial = self.directory / "manifest.json.partial"
        with partial.open("w") as file:
            json.dump(self.manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.directory / "manifest.json")

    def __enter__(self) -> "Writer":
        self._lock = (self.directory / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            self._lock.close()
            raise RuntimeError(f"{self.directory} is being written by another process") from err
        self._write_manifest()
        return self

    def __exit__(self, *_) -> None:
        try:
            self._hand_over()
            if self._writing is not None:
                self._writing.result()
        finally:
            self._thread.shutdown()
            (self.directory / ".lock").unlink(missing_ok=True)
            self._lock.close()


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} is not a dump: it has no manifest.json")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        for part in manifest["parts"]:
            part["file"], part["bytes"], part["sha256"], part["prompts"] = (
                str(part["file"]), int(part["bytes"]), str(part["sha256"]), [int(p) for p in part["prompts"]],
            )  # fmt: skip
        manifest["prompts"], manifest["about"] = int(manifest["prompts"]), dict(manifest["about"])
        if manifest["about"].get("single") and not manifest["parts"]:
            raise ValueError("no parts")
    except (ValueError, KeyError, TypeError, AttributeError) as err:
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


class Dump:
    """The Traces of a run on disk, also while they are still being written: `dump[7]` is that of prompt 7.

    Attributes:
      about: checkpoint, capture, sampling, edits and versions of the run.
      num_prompts: of the run; those finished are `dump.prompts`, and the rest `dump.missing`.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        manifest = _manifest(self.directory)
        self.about: dict[str, Any] = manifest["about"]
        self.num_prompts: int = manifest["prompts"]
        self._parts = manifest["parts"]
        self._part_of = {p: part for part in self._parts for p in part["prompts"]}

    @property
    def prompts(self) -> list[int]:
        return sorted(self._part_of)

    @property
    def missing(self) -> list[int]:
        return [p for p in range(self.num_prompts) if p not in self._part_of]

    @property
    def nbytes(self) -> int:
        return sum(part["bytes"] for part in self._parts)

    def __len__(self) -> int:
        return len(self._part_of)

    def __iter__(self) -> Iterator[Trace]:
        return (self[p] for p in self.prompts)

    def __getitem__(self, prompt: int) -> Trace:
        """One Trace; no other is read. Raises KeyError for a prompt that is not there (yet)."""
        if prompt not in self._part_of:
            raise KeyError(f"prompt {prompt} is not in {self.directory}: {len(self)} of {self.num_prompts} are")
        with self._opened(self._part_of[prompt]) as file:
            fields = json.loads(file.metadata()["traces"])[str(prompt)]
            arrays = {name: file.get_tensor(f"{prompt}.{name}") for name in ARRAYS}
            taps = {name: file.get_tensor(f"{prompt}.tap.{name}") for name in fields["dims"]}
        return Trace(**arrays, taps=taps, **fields)

    def to_numpy(self, tap: str) -> tuple[np.ndarray, np.ndarray]:
        """A tap of all Traces joined along positions, and the prompt [N] of each position. Raises KeyError."""
        dims, values, prompts = "", [], []
        for prompt in self.prompts:
            with self._opened(self._part_of[prompt]) as file:
                fields = json.loads(file.metadata()["traces"])[str(prompt)]
                if tap not in fields["dims"]:
                    raise KeyError(f"prompt {prompt} has no {tap!r}; it has {', '.join(fields['dims'])}")
                dims = fields["dims"][tap]
                if "T" not in dims or "S" in dims:
                    raise KeyError(f"{tap!r} [{' '.join(dims)}] of several prompts cannot be joined along positions")
                value = file.get_tensor(f"{prompt}.tap.{tap}")
            values.append(value if value.dtype == np.int32 else value.astype(np.float32))
            prompts.append(np.full(value.shape[dims.index("T")], prompt))
        if not values:
            raise KeyError(f"{self.directory} holds no finished prompt yet")
        return np.concatenate(values, axis=dims.index("T")), np.concatenate(prompts)

    def to_pandas(self, table: str):
        """`Trace.to_pandas` of all Traces, with a column "prompt" in front."""
        import pandas as pd

        frames = {prompt: self[prompt].to_pandas(table) for prompt in self.prompts}
        return pd.concat(frames, names=["prompt", None]).reset_index(level="prompt").reset_index(drop=True)

    def verify(self) -> None:
        """Reads every part. Raises ValueError naming one that is missing or was changed since it was written."""
        for part in self._parts:
            path = self.directory / part["file"]
            if path.exists():
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == part["sha256"]:
                        continue
            raise ValueError(f"{path} is missing or was changed since it was written: its sha256 is not the manifest's")

    def _opened(self, part: dict[str, Any]):
        path = self.directory / part["file"]
        if not path.exists() or path.stat().st_size != part["bytes"]:
            raise ValueError(f"{path} is missing or was changed since it was written: expected {part['bytes']} bytes")
        return safe_open(path, "np")

    def __repr__(self) -> str:
        size = look.si(self.nbytes, "B")
        return f"Dump({self.directory}: {len(self)} of {self.num_prompts} prompts, {len(self._parts)} parts, {size})"
