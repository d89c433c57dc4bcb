"""A small checkpoint in the released format whose insides are known, because every weight was set by hand.

    layer 0   head PREVIOUS copies the identity of the token before; head DUPLICATE attends to the same token earlier
    layer 1   head INDUCTION finds the token that came after the last occurrence of this one, and predicts it
    layer 2   does nothing: both its deltas are zero
    experts   DIGITS takes digits, CAPITALS capitals, at all layers; DEAD takes nobody; TWINS have the same weights; the
              second expert of a token follows from a hash of it

32 tokens: BOS, 10 digits, 10 capitals, 11 lower letters. The stream has a place for each thing: who the token is, who
was before it, a constant, its class.
"""

from pathlib import Path

import numpy as np

import grokscope as gs
from grokscope.checkpoint import ckpt0

V, D, C, H = 32, 256, 64, 4
IDENTITY, BEFORE = slice(0, 32), slice(32, 64)
CONSTANT, DIGIT, CAPITAL, BOS = 64, 65, 66, 67
HASH = slice(70, 78)  # a number for each token: which of the other experts it takes
WRITTEN = slice(80, 112)  # by experts, and a little into IDENTITY
PREVIOUS, DUPLICATE, INDUCTION = (0, 1), (0, 2), (1, 3)  # (layer, head)
IDLE_LAYER = 2
DIGITS, CAPITALS, DEAD, TWINS = 3, 5, 7, (0, 1)
CLASSES = np.array(["bos"] + ["digits"] * 10 + ["capital"] * 10 + ["lower"] * 11, object)
CONFIG = gs.GrokConfig(
    vocab_size=V, sequence_len=256, emb_size=D, key_size=C, num_q_heads=H, num_kv_heads=H, num_layers=3,
    widening_factor=0.75, pad_token=0, bos_token=0, eos_token=0, embedding_multiplier_scale=1.0,
    output_multiplier_scale=1.0, attn_output_multiplier=1.0,
)  # fmt: skip


def prompt(length: int, seed: int) -> list[int]:
    """BOS, then random tokens of all three classes."""
    return [0, *np.random.default_rng(seed).integers(1, V, length - 1).tolist()]


def repeated(length: int, seed: int) -> list[int]:
    """BOS, then `length` different tokens in random order, twice."""
    half = (1 + np.random.default_rng(seed).permutation(V - 1)[:length]).tolist()
    return [0, *half, *half]


def _embedding() -> np.ndarray:
    w = np.zeros((V, D))
    w[:, IDENTITY] = 4 * np.eye(V)
    w[:, CONSTANT] = 4
    w[CLASSES == "digits", DIGIT] = 4
    w[CLASSES == "capital", CAPITAL] = 4
    w[0, BOS] = 4
    w[:, HASH] = np.random.default_rng(7).normal(size=(V, 8))
    return w


def _turned(u: np.ndarray, positions: float) -> np.ndarray:
    """A key or query as rotary embedding turns it at a position."""
    half = C // 2
    angle = positions * 10000.0 ** (-np.arange(half) / half)
    a, b = u[:half], u[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def _slow(width: int) -> np.ndarray:
    """[width, C]: channels that rotary embedding hardly turns within a hundred positions."""
    half = C // 2
    channels = np.r_[half // 2 : half, half + half // 2 : C]
    return np.eye(C)[channels[:width]]


def _attention(layer: int) -> dict[str, np.ndarray]:
    query, key, value = (np.zeros((D, H, C)) for _ in range(3))
    out = np.zeros((H, C, D))
    if layer == PREVIOUS[0]:
        _, head = PREVIOUS  # the query at t is what a key at t - 1 looks like, whatever the tokens are
        u = np.zeros(C)
        u[:4] = 0.31  # the four fastest pairs: one position further is clearly another
        key[CONSTANT, head], query[CONSTANT, head] = u, _turned(u, -1)
        value[IDENTITY, head, :V] = np.eye(V)
        out[head, :V, BEFORE] = np.eye(V)
        _, head = DUPLICATE
        query[IDENTITY, head] = key[IDENTITY, head] = 3 * _slow(V)
    if layer == INDUCTION[0]:
        _, head = INDUCTION  # the key says who was before, and the query who is here; BOS is the place to rest
        query[IDENTITY, head] = 2.2 * _slow(V)
        key[BEFORE, head] = 1.2 * _slow(V)
        query[CONSTANT, head, C // 2 - 1], key[BOS, head, C // 2 - 1] = 1.0, 2.0
        value[IDENTITY, head, :V] = np.eye(V)
        value[IDENTITY, head, 0] = 0
        out[head, :V, IDENTITY] = np.eye(V)
    return {
        "query": query.reshape(D, H * C), "key": key.reshape(D, H * C), "value": value.reshape(D, H * C),
        "out": out.reshape(H * C, D),
    }  # fmt: skip


def _experts(layer: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(layer)
    f = CONFIG.ffn_size
    gate, up = (rng.normal(size=(8, D, f)) / 16 for _ in range(2))
    down = np.zeros((8, f, D))
    if layer != IDLE_LAYER:
        down[:, :, WRITTEN] = rng.normal(size=(8, f, 32))
        down[:, :, IDENTITY] = 0.02 * rng.normal(size=(8, f, 32))
    for w in (gate, up, down):
        w[TWINS[1]] = w[TWINS[0]]
    router = np.zeros((D, 8))
    router[HASH] = 0.3 * rng.normal(size=(8, 8))
    router[:, [DIGITS, CAPITALS, DEAD]] = 0
    router[DIGIT, DIGITS] = router[CAPITAL, CAPITALS] = 8
    router[CONSTANT, [DIGITS, CAPITALS, DEAD]] = -4
    return {"gate": gate, "up": up, "down": down, "router": router}


def write(directory: Path) -> Path:
    def weight(slot):
        if slot.param.name == "scale":
            return np.ones(D)
        if not slot.param.layered:
            return _embedding()
        made = _attention(slot.layer) | _experts(slot.layer)
        return made["router" if slot.param.module == "layer/router" else slot.param.name]

    return ckpt0.write(directory, CONFIG, weight)
