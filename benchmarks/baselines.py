"""Held-out bits per byte by domain beside baselines, over the windows of `train.evaluate`.

    python benchmarks/baselines.py PACK NAME=CHECKPOINT [NAME=CHECKPOINT ...]

A column for each checkpoint, and two for an n-gram model of the same token ids: on as many tokens as the two short runs
of the model card saw, drawn by the training weights, and on all of PACK. Prints Markdown.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from grokscope import train
from grokscope.checkpoint.ckpt0 import open_checkpoint

WINDOWS, LENGTH = 96, 256  # held-out windows a domain, predicted tokens in each
ORDER = 5
SEEN = 32_768_000  # tokens of a short run: 1000 batches of 32 x 1024


@dataclasses.dataclass
class Level:
    """The n-grams of one length n: keys are (index of the first n - 1 tokens among the keys of n - 1) * V + last."""

    keys: np.ndarray  # sorted
    counts: np.ndarray  # Kneser-Ney: occurrences at the highest order, below it the number of different tokens before
    discounts: np.ndarray  # of counts 0, 1, 2, 3 and more
    total: np.ndarray  # counts after a context, by context
    kept_back: np.ndarray  # discounts taken after a context, by context


class Ngram:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1998) of `order` tokens, over rows [W, T] of token ids.

    No n-gram crosses from one row into the next. Below unigrams stands the uniform distribution.
    """

    def __init__(self, rows: np.ndarray, order: int, vocab_size: int):
        self.vocab_size = vocab_size
        index, contexts, levels = np.zeros((len(rows), rows.shape[1] + 1), np.int64), 1, []
        for n in range(1, order + 1):
            where = index[:, :-1] * vocab_size + rows[:, n - 1 :]  # the key of the n-gram that begins there
            keys, first, inverse, counts = np.unique(where, return_index=True, return_inverse=True, return_counts=True)
            row, column = np.divmod(first, where.shape[1])
            suffixes = index[row, column + 1]  # of each n-gram, without its first token
            if levels:
                levels[-1] = (*levels[-1][:2], np.bincount(suffixes, minlength=contexts))
            levels.append((contexts, keys, counts))
            index, contexts = inverse.reshape(where.shape), len(keys)
        self.levels = [_level(*level, vocab_size) for level in levels]

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """Of every token of the rows [W, T] but the first, given those before it in its row: [W, T - 1]."""
        found = np.full(rows.shape, 1 / self.vocab_size)
        context = np.zeros((len(rows), rows.shape[1] + 1), np.int64)  # index of the n - 1 tokens from there, or -1
        for n, level in enumerate(self.levels, 1):
            context = context[:, :-1]
            keys = context * self.vocab_size + rows[:, n - 1 :]
            at = np.searchsorted(level.keys, keys).clip(max=len(level.keys) - 1)
            known = level.keys[at] == keys
            counts = np.where(known, level.counts[at], 0)
            total = np.where(context < 0, 0, level.total[context])
            higher = counts - level.discounts[counts.clip(max=3)] + level.kept_back[context] * found[:, n - 1 :]
            found[:, n - 1 :] = np.where(total > 0, higher / np.maximum(total, 1), found[:, n - 1 :])
            context = np.where(known, at, -1)
        return found[:, 1:]


def _level(contexts: int, keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> Level:
    one, two, three, four = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    ratio = one / (one + 2 * two)
    discounts = np.array([0, 1 - 2 * ratio * two / one, 2 - 3 * ratio * three / two, 3 - 4 * ratio * four / three])
    before = keys // vocab_size
    total = np.bincount(before, counts, minlength=contexts)
    kept_back = np.bincount(before, discounts[counts.clip(max=3)], minlength=contexts)
    return Level(keys, counts, discounts, total, kept_back)


def drawn(data: train.TokenData, tokens: int | None) -> np.ndarray:
    """Rows of LENGTH + 1 training tokens, none twice: all there are, or `tokens` predicted ones by the weights."""
    rng, rows = np.random.default_rng(0), []
    for domain, weight in data.weights.items():
        ids = data.ids[domain]
        every = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
        count = len(every) if tokens is None else round(tokens * weight / sum(data.weights.values()) / LENGTH)
        rows.append(every[rng.permutation(len(every))[:count]])
    return np.concatenate(rows).astype(np.int32)


def bits_per_byte(ngram: Ngram, held_out: train.TokenData) -> dict[str, float]:
    """By domain and of the mixture, as `train.evaluate` has them."""
    found = {}
    for domain, density in held_out.bytes_per_token.items():
        chances = ngram.probabilities(held_out.windows(domain, LENGTH, WINDOWS))
        found[domain] = -float(np.log2(chances).mean()) / density
    share = held_out.weights
    return {**found, "mixture": sum(share[d] * found[d] for d in share) / sum(share.values())}


def check_sums(ngram: Ngram, held_out: train.TokenData) -> float:
    """How far from 1 the probabilities of all tokens after a held-out context sum, at most, over contexts."""
    every = np.arange(ngram.vocab_size)[:, None]
    contexts = [held_out.windows(domain, 5, 1)[0][:n] for domain in held_out.weights for n in (1, 2, 3, 4, 6)]
    asked = [np.hstack([np.tile(context, (len(every), 1)), every]) for context in contexts]
    return max(abs(ngram.probabilities(rows)[:, -1].sum() - 1) for rows in asked)


def main(pack: str, *named: str) -> None:
    checkpoints = {name: Path(path) for name, path in (item.split("=", 1) for item in named)}
    vocab_size = open_checkpoint(next(iter(checkpoints.values()))).config.vocab_size
    data, held_out = (train.TokenData(pack, split, vocab_size) for split in ("train", "valid"))
    columns = {}
    for name, path in checkpoints.items():
        found = train.evaluate_checkpoint(path, pack, length=LENGTH, windows=WINDOWS)
        columns[name] = {domain: row["bits_per_byte"] for domain, row in found.items()}
    for tokens in (SEEN, None):
        rows = drawn(data, tokens)
        ngram = Ngram(rows, ORDER, vocab_size)
        print(
            f"{ORDER}-gram of {rows.size / 1e6:.1f} M tokens: {sum(len(x.keys) for x in ngram.levels) / 1e6:.1f} M "
            f"n-grams; probabilities sum to 1 within {check_sums(ngram, held_out):.0e}"
        )
        columns[f"{ORDER}-gram, {rows.size / 1e6:.1f} M"] = bits_per_byte(ngram, held_out)
        del ngram

    print("\n| domain | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for domain in [*held_out.weights, "mixture"]:
        print(f"| {domain} | " + " | ".join(f"{column[domain]:.3f}" for column in columns.values()) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
