"""A Trace on disk: `manifest.json` and one safetensors file of its arrays, bfloat16 kept. No jax.

The manifest names every part with size and sha256 and is written last, so a folder without one is not a dump.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from safetensors.numpy import load_file, save_file

from grokscope.run.trace import Trace

FORMAT = "grokscope dump 1"
ARRAYS = ("tokens", "logprobs")
FIELDS = tuple(f.name for f in dataclasses.fields(Trace) if f.name not in (*ARRAYS, "taps"))


def refuse_existing(directory: Path | str) -> None:
    """Raises FileExistsError unless a dump can be written there: nothing, or an empty folder."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty folder; choose a new one, or delete it first")


def save(trace: Trace, directory: Path | str) -> Path:
    """Writes a dump into a new or empty folder; raises FileExistsError for one that holds anything."""
    directory = Path(directory)
    refuse_existing(directory)
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / "act-00000000.safetensors"
    arrays = {name: getattr(trace, name) for name in ARRAYS} | {f"tap.{n}": a for n, a in trace.taps.items()}
    save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, part)
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    manifest = {
        "format": FORMAT,
        "parts": [{"file": part.name, "bytes": part.stat().st_size, "sha256": digest}],
        "trace": {name: getattr(trace, name) for name in FIELDS},
    }
    partial = directory / "manifest.json.partial"
    partial.write_text(json.dumps(manifest, indent=1))
    os.replace(partial, directory / "manifest.json")
    return directory


def open(directory: Path | str) -> Trace:
    """The Trace of a dump. Raises FileNotFoundError if it is none, ValueError naming a file that was changed."""
    directory = Path(directory)
    path = directory / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} is not a dump: it has no manifest.json")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        (part,), fields = manifest["parts"], {name: manifest["trace"][name] for name in FIELDS}
        file, digest = directory / part["file"], part["sha256"]
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{path} is damaged, or not a manifest of {FORMAT!r}: {err}") from err
    if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise ValueError(f"{file} is missing or was changed since it was written: its sha256 is not that of {path}")
    arrays = load_file(file)
    taps = {name: arrays[f"tap.{name}"] for name in fields["dims"]}
    return Trace(**{name: arrays[name] for name in ARRAYS}, taps=taps, **fields)
