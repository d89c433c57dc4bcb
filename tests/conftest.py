"""Fixtures: the bundled model, golden cases, random checkpoints of any shape, and what lies in ../shared."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:  # what a worker or a process that it starts compiles is kept for all
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="grokscope-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import grokscope as gs
from grokscope.checkpoint import ckpt0
from grokscope.model.quant import quantize
from grokscope.run import engine

engine.default_numerics = lambda: "float32"  # what is expected here, also where JAX_PLATFORMS=cuda
jax.config.update("jax_num_cpu_devices", 8)  # meshes; what asks for none runs on the first

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"


def shared(path: str) -> Path:
    """A file of ../shared; skips where there is none."""
    if not (SHARED / path).exists():
        pytest.skip(f"../shared/{path} is not on this machine")
    return SHARED / path


@pytest.fixture
def listening():
    """Ctrl-C raises KeyboardInterrupt, even where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def grok():
    return gs.load()


@pytest.fixture(scope="session")
def golden():
    """Directory of a golden case by name."""

    def find(case: str) -> Path:
        own = HERE / "golden" / case
        return own if own.exists() else shared(f"golden/{case}")

    return find


def small_config(**changes) -> gs.GrokConfig:
    sizes = {
        "vocab_size": 97,
        "sequence_len": 256,
        "emb_size": 48,
        "key_size": 16,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "num_layers": 3,
        "widening_factor": 1.7,
        "embedding_multiplier_scale": 6.9,
        "output_multiplier_scale": 0.57735,
        "attn_output_multiplier": 0.25,
    }
    return gs.GrokConfig(**sizes | changes)


def write_random(directory: Path, config: gs.GrokConfig, seed: int = 0, groups: int | None = None) -> Path:
    """A random checkpoint in the released format; `groups` overrides the scale groups of every quantised matrix."""
    rng = np.random.default_rng(seed)

    def weight(slot):
        shape = slot.param.shape(config)
        if slot.param.init in ("one", "post_norm"):
            return rng.uniform(0.5, 1.5, shape)
        fan_in = shape[-1] if slot.param.init == "embed" else shape[-2]
        value = rng.standard_normal(shape) / np.sqrt(fan_in)
        return quantize(value, groups) if groups and slot.param.groups else value

    return ckpt0.write(directory, config, weight)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("random") / "checkpoint", small_config())


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Thousands of compiled functions in one process come to the limit of memory maps, and XLA then crashes."""
    yield
    jax.clear_caches()
