"""What is compiled is kept in the user's cache folder, so that the next process starts without compiling."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import jax


def keep_compiled() -> None:
    """Turns JAX's persistent cache on, unless the user chose a folder or turned it off; without a folder that can
    be written to, does nothing. Each jaxlib and kind of processor has its own: code of one may not run on another.
    """
    chosen = jax.config.values
    if chosen["jax_compilation_cache_dir"] is not None or not chosen["jax_enable_compilation_cache"]:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = importlib.metadata.version("jaxlib")
    folder = home / "grokscope" / f"jaxlib-{version}-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # read-only, or full
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _processor() -> str:
    """A name for the instructions that this machine has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:  # not Linux
        features = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
