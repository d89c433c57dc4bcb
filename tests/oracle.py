"""Grok-1 in plain numpy float64: the network by its facts, one token sequence at a time, no cache, every tap.

Written apart from the package and importing nothing of it: files are read with Python's own pickle.
"""

import json
import pickle
import types
from pathlib import Path

import numpy as np


class QuantizedWeight8bit:
    """Stand-in for the class whose name the released pickles carry."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name == "QuantizedWeight8bit":
            return QuantizedWeight8bit
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_file(path):
    with open(path, "rb") as file:
        found = _Unpickler(file).load()
    if isinstance(found, np.ndarray):
        return found.astype(np.float64)
    weight, scales = found.weight.astype(np.float64), found.scales.astype(np.float64)
    return weight * np.repeat(scales, weight.shape[-2] // scales.shape[-2], axis=-2)


def read_checkpoint(directory):
    """Configuration and {path: float64 array}; layers in lexicographic order of their numbers."""
    directory = Path(directory)
    config = types.SimpleNamespace(**json.loads((directory / "config.json").read_text()))
    names = ["embedding", "final_norm"]
    per_layer = ["gate", "down", "up", "key", "out", "query", "value", "norm_0", "norm_1", "norm_2", "norm_3", "router"]
    for layer in sorted(range(config.num_layers), key=str):
        names += [f"{layer}/{name}" for name in per_layer]
    files = sorted((directory / "ckpt-0").iterdir())
    assert len(files) == len(names)
    return config, {name: read_file(path) for name, path in zip(names, files)}


def norm(x, scale):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(x):
    """x [T, heads, C]: pair (c, c + C/2) of position t turned by t * 10000^(-2c/C)."""
    length, _, width = x.shape
    half = width // 2
    out = np.empty_like(x)
    for t in range(length):
        for c in range(half):
            angle = t * 10000.0 ** (-2 * c / width)
            a, b = x[t, :, c], x[t, :, c + half]
            out[t, :, c] = a * np.cos(angle) - b * np.sin(angle)
            out[t, :, c + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


def attention(taps, config, w, x):
    length = len(x)
    heads, groups, width = config.num_q_heads, config.num_kv_heads, config.key_size
    q = taps["q"] = rotate((x @ w["query"]).reshape(length, heads, width))
    k = taps["k"] = rotate((x @ w["key"]).reshape(length, groups, width))
    v = taps["v"] = (x @ w["value"]).reshape(length, groups, width)
    scores = np.full((heads, length, length), -1e30)
    for h in range(heads):
        for t in range(length):
            for s in range(t + 1):
                dot = q[t, h] @ k[s, h // (heads // groups)]
                scores[h, t, s] = 30 * np.tanh(dot * config.attn_output_multiplier / 30)
    taps["attn_scores"] = scores
    pattern = taps["attn_pattern"] = softmax(scores)
    z = np.stack([pattern[h] @ v[:, h // (heads // groups)] for h in range(heads)], axis=1)
    taps["attn_z"] = z
    return z.reshape(length, heads * width) @ w["out"]


def experts(taps, config, w, x):
    logits = taps["router_logits"] = x @ w["router"]
    probs = taps["router_probs"] = softmax(logits)
    index = taps["expert_index"] = np.argsort(-probs, axis=-1, kind="stable")[:, : config.num_selected_experts]
    gates = taps["expert_gate"] = np.take_along_axis(probs, index, axis=-1)
    hidden = taps["expert_hidden"] = np.stack(
        [[gelu(x[t] @ w["gate"][e]) * (x[t] @ w["up"][e]) for e in index[t]] for t in range(len(x))]
    )
    out = taps["expert_out"] = np.stack(
        [[hidden[t, i] @ w["down"][e] for i, e in enumerate(index[t])] for t in range(len(x))]
    )
    return (gates[..., None] * out).sum(axis=1)


def forward(config, weights, tokens):
    """{tap: array}, taps of layers stacked along a leading axis."""
    taps = {"embed": weights["embedding"][tokens] * config.embedding_multiplier_scale}
    layers = []
    x = taps["embed"]
    for layer in range(config.num_layers):
        w = {name.split("/")[1]: value for name, value in weights.items() if name.startswith(f"{layer}/")}
        here = {"resid_pre": x}
        here["attn_out"] = attention(here, config, w, norm(x, w["norm_0"]))
        here["attn_delta"] = norm(here["attn_out"], w["norm_1"])
        x = here["resid_mid"] = x + here["attn_delta"]
        here["moe_out"] = experts(here, config, w, norm(x, w["norm_2"]))
        here["moe_delta"] = norm(here["moe_out"], w["norm_3"])
        x = here["resid_post"] = x + here["moe_delta"]
        layers.append(here)
    taps |= {name: np.stack([here[name] for here in layers]) for name in layers[0]}
    taps["final_norm"] = norm(x, weights["final_norm"])
    taps["logits"] = taps["final_norm"] @ weights["embedding"].T * config.output_multiplier_scale
    return taps


def logprobs(logits, tokens):
    """log p(token i | before), NaN for the first."""
    table = logits - logits.max(axis=-1, keepdims=True)
    table = table - np.log(np.exp(table).sum(axis=-1, keepdims=True))
    return np.array([np.nan, *(table[i, t] for i, t in enumerate(tokens[1:]))])
