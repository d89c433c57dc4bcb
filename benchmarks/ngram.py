"""An n-gram baseline for the model card: held-out bits per byte by domain, on the windows of `train.evaluate`.

    python benchmarks/ngram.py PACK [MILLIONS]

Orders 1 to 4, interpolated as Witten and Bell (1991): P(w | h) = (c(h w) + T(h) P(w | shorter h)) / (c(h) + T(h)), with
T(h) the number of different tokens seen after h, down to the uniform distribution. It is trained on MILLIONS of tokens
(20.4, as many as grok-1-mini saw) drawn as the training loop draws them, in windows of 257.
"""

import math
import sys
from pathlib import Path

import numpy as np

from grokscope.checkpoint.ckpt0 import open_checkpoint
from grokscope.run.engine import bundled_checkpoint
from grokscope.train import TokenData

BITS = 13  # of a token id, so that four fit an int64
ORDER = 4


class Counts:
    """How often each of some keys occurred."""

    def __init__(self, keys: np.ndarray):
        self.keys, self.counts = np.unique(keys, return_counts=True)

    def of(self, keys: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.counts[at], 0)


class NGram:
    def __init__(self, windows: np.ndarray, vocab_size: int):
        self.vocab_size = vocab_size
        self.orders = []
        for order in range(1, ORDER + 1):
            grams = Counts(_keys(windows, order).ravel())
            histories = grams.keys >> BITS
            totals = Counts(np.repeat(histories, grams.counts))
            self.orders.append((grams, totals, Counts(histories)))

    def probabilities(self, windows: np.ndarray) -> np.ndarray:
        """[N, T] of the tokens 1 .. T of windows [N, T + 1], each after those before it in its window."""
        found = np.full((len(windows), windows.shape[1] - 1), 1 / self.vocab_size)
        for order, (grams, totals, types) in enumerate(self.orders, 1):
            keys = _keys(windows, order)[:, 1 if order == 1 else 0 :]
            count, total, kinds = grams.of(keys), totals.of(keys >> BITS), types.of(keys >> BITS)
            own = found[:, -keys.shape[1] :]
            own[:] = np.where(total > 0, (count + kinds * own) / np.maximum(total + kinds, 1), own)
        return found


def _keys(windows: np.ndarray, order: int) -> np.ndarray:
    """int64 [N, T - order + 1]: the ids of each run of `order` tokens, side by side."""
    length = windows.shape[1] - order + 1
    keys = np.zeros((len(windows), length), np.int64)
    for i in range(order):
        keys = keys << BITS | windows[:, i : i + length]
    return keys


def main(pack: Path, millions: float = 20.4) -> None:
    vocab_size, length = open_checkpoint(bundled_checkpoint()).config.vocab_size, 256
    data = TokenData(pack, "train", vocab_size)
    windows = np.concatenate(
        [data.batch(11, step, 1000, length) for step in range(round(millions * 1e6 / length / 1000))]
    )
    model = NGram(windows, vocab_size)
    each = np.concatenate([np.tile(windows[:1, :4], (vocab_size, 1)), np.arange(vocab_size)[:, None]], axis=1)
    print(f"probabilities after {windows[0, :4].tolist()} add up to {model.probabilities(each)[:, -1].sum():.9f}")
    held_out, mixture = TokenData(pack, "valid", vocab_size), np.zeros(2)
    for domain, weight in held_out.weights.items():
        rng = np.random.default_rng(7)
        own = np.stack([held_out.window(domain, rng, length) for _ in range(96)])
        nats = -np.log(model.probabilities(own)).mean()
        row = np.array([nats, nats / math.log(2) / held_out.bytes_per_token[domain]])
        mixture += weight * row / sum(held_out.weights.values())
        print(f"{domain:12}{row[0]:8.3f}{row[1]:8.3f}")
    print(f"{'mixture':12}{mixture[0]:8.3f}{mixture[1]:8.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
