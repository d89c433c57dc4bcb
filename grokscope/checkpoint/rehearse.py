"""A random checkpoint in the released format with the statistics of Grok-1, to try machines before 318 GB are moved.

What is known of the real weights is known of layer 0, and every layer here is like it: margins of the router, and what
attention and experts add to the stream. As each layer adds as much, the stream grows with the square root of depth.
Queries meet keys with scores of standard deviation 3, so that heads attend to few tokens, as trained ones do. Its texts
mean nothing.

A weight is int8 of a normal variable, from a table of its quantiles by 16 random bits: 1 G weights/s, a tenth of the
time that normal numbers take. Memory: two expert matrices, 0.4 GB at Grok-1's width.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import ml_dtypes
import numpy as np
from scipy.special import ndtri

from grokscope.checkpoint import ckpt0
from grokscope.checkpoint.ckpt0 import Progress, Slot
from grokscope.checkpoint.tensorfile import Streamed, Tensor
from grokscope.config import GrokConfig

EMBEDDED_RMS = 0.998890  # of embeddings times the multiplier
ATTENTION_RATIO = 0.876  # |attention delta| / |stream before it|, layer 0
EXPERTS_RATIO = 0.483  # |moe delta| / |stream before it|, layer 0
ROUTER_STD = 0.1005  # of router logits: the median top1 - top2 probability of 8 experts is 0.00617
SCORE_STD = 3.0  # of attention scores
SPREAD = 0.2  # of the logarithm of scales, between columns, groups and channels

NORM_RMS = {
    "layer/post_attention_norm": EMBEDDED_RMS * ATTENTION_RATIO,
    "layer/post_moe_norm": EMBEDDED_RMS * math.hypot(1, ATTENTION_RATIO) * EXPERTS_RATIO,
}
GAINS = {"query": math.sqrt(SCORE_STD), "key": math.sqrt(SCORE_STD), "w": ROUTER_STD}
"""By weight, in units of 1/sqrt(fan in); 1 for the others, which a norm follows."""

BLOCK = 1 << 18  # weights drawn at a time: their random bits stay in the processor's cache


def rehearse(
    directory: Path | str,
    config: GrokConfig,
    seed: int = 0,
    tokenizer: Path | None = None,
    progress: Progress = iter,
) -> Path:
    """Writes the checkpoint, as ckpt0.write does: whole or not at all. The same seed gives the same bytes."""
    return ckpt0.write(directory, config, lambda slot: _tensor(slot, config, seed), tokenizer, progress)


def _tensor(slot: Slot, config: GrokConfig, seed: int) -> Tensor:
    param, shape = slot.param, slot.param.shape(config)
    rng = np.random.Generator(np.random.SFC64([seed, slot.index]))
    if param.name == "scale":
        return Tensor(_norm(param.module, shape, rng))
    if param.init == "embed":
        std = EMBEDDED_RMS / config.embedding_multiplier_scale
        return Tensor(Streamed(shape, np.dtype(np.float32), _normals(shape, std, rng)))
    std = GAINS.get(param.name, 1) / math.sqrt(shape[-2])
    if param.groups is None:
        return Tensor(np.concatenate(list(_normals(shape, std, rng))))
    groups = ckpt0.scale_groups(param, shape)
    rows = shape[-2] // groups
    table = _quantiles(rows)
    rms = math.sqrt(((rows - 1) * table.var(dtype=np.float64) + 127**2) / rows)
    scales = (std / rms * _spread((*shape[:-2], groups, shape[-1]), rng)).astype(ml_dtypes.bfloat16)
    matrices = (_steps(*shape[-2:], groups, table, rng) for _ in range(math.prod(shape[:-2])))
    return Tensor(Streamed(shape, np.dtype(np.int8), matrices), scales)


def _spread(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Factors of mean square 1."""
    return np.exp(SPREAD * rng.standard_normal(shape, np.float32) - SPREAD**2)


def _norm(module: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Scales of a norm. Those of the last have either sign, because the tied table would repeat its token otherwise."""
    scale = NORM_RMS.get(module, 1) * _spread(shape, rng)
    return scale * rng.choice(np.float32([-1, 1]), shape) if module == "embedding/final_norm" else scale


def _normals(shape: tuple[int, ...], std: float, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """float32 [V, D], some rows at a time."""
    rows = max(1, BLOCK // shape[-1])
    for begin in range(0, shape[0], rows):
        yield rng.standard_normal((min(rows, shape[0] - begin), *shape[1:]), np.float32) * np.float32(std)


def _quantiles(rows: int) -> np.ndarray:
    """int8 [65536]: quantiles of a normal variable, in steps in which the largest of `rows` draws is about 127."""
    largest = NormalDist().inv_cdf(1 - 1 / (2 * max(rows, 2)))
    quantiles = ndtri((np.arange(1 << 16) + 0.5) / (1 << 16))
    return np.clip(np.rint(127 / largest * quantiles), -127, 127).astype(np.int8)


def _steps(k: int, n: int, groups: int, table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int8 [K, N] drawn from the table; the largest entry of each column of a group is +-127, as quantize does."""
    steps = np.empty(k * n, np.int8)
    for begin in range(0, steps.size, BLOCK):
        block = steps[begin : begin + BLOCK]
        words = rng.integers(0, 1 << 64, -(-block.size // 4), np.uint64)
        table.take(words.view(np.uint16)[: block.size], out=block, mode="clip")
    grouped = steps.reshape(groups, k // groups, n)
    row = rng.integers(0, k // groups, (groups, 1, n))
    np.put_along_axis(grouped, row, rng.choice(np.int8([-127, 127]), row.shape), axis=1)
    return grouped.reshape(k, n)
