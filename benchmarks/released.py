"""The arithmetic of the released code, as a baseline: every layer in one compiled step, every weight dequantised in
each call, every expert run on both copies of every token. The attention and the norms are the project's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from grokscope.checkpoint.ckpt0 import open_checkpoint
from grokscope.checkpoint.weights import Reader, load
from grokscope.config import GrokConfig
from grokscope.model import transformer
from grokscope.model.quant import QuantizedWeight
from grokscope.model.transformer import ExpertList, KVCache, Positions


def dequantized(w: QuantizedWeight, dtype) -> jax.Array:
    groups = w.scales.shape[0]
    wide = w.weight.reshape(groups, -1, w.weight.shape[-1]).astype(dtype) * w.scales[:, None].astype(dtype)
    return wide.reshape(w.weight.shape)


def released_experts(x, chosen, gates, gate, up, down) -> jax.Array:
    """[N, D] of tokens x [N, D]: all experts for all N * K copies, then a choice."""
    copies = jnp.repeat(x, chosen.shape[-1], axis=0)
    out = [
        (jax.nn.gelu(copies @ dequantized(g, x.dtype)) * (copies @ dequantized(u, x.dtype))) @ dequantized(d, x.dtype)
        for g, u, d in zip(gate, up, down, strict=True)
    ]
    mine = jnp.take_along_axis(jnp.stack(out, 1), chosen.reshape(-1, 1, 1), axis=1)[:, 0]
    return jnp.sum(mine.reshape(*chosen.shape, -1) * gates[..., None].astype(x.dtype), axis=1)


def _layer(config: GrokConfig, params, x, cache: KVCache, start):
    positions = Positions.of(config, start, x.shape[1])
    wide = {
        module: {n: dequantized(w, x.dtype) if isinstance(w, QuantizedWeight) else w for n, w in own.items()}
        for module, own in params.items()
        if module != "layer/experts"
    }
    routed, cache = transformer.attend_and_route(config, wide, x, cache, positions)
    flat = [a.reshape(-1, a.shape[-1]) for a in (routed.normed, routed.chosen, routed.gates)]
    experts: dict[str, ExpertList] = params["layer/experts"]
    out = released_experts(*flat, *(experts[name].experts for name in ("gate", "up", "down")))
    parts = out.reshape(1, *x.shape[:2], 1, -1)  # already mixed: one part of one choice with gate 1
    return transformer.add_experts(config, wide, routed._replace(gates=jnp.ones((*x.shape[:2], 1))), parts), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(config: GrokConfig, weights, tokens, caches: list[KVCache], start):
    """The best token after tokens [B, T] at positions start [B] on, and the caches."""
    ends, layers = weights
    x = transformer.embed(config, ends, tokens)
    for i, params in enumerate(layers):
        x, caches[i] = _layer(config, params, x, caches[i], start)
    return jnp.argmax(transformer.unembed(config, ends, x[:, -1:])[:, 0], axis=-1), caches


class Released:
    """Greedy generation. The prompt is not padded; the cache is a power of two long."""

    def __init__(self, path):
        checkpoint = open_checkpoint(path)
        loaded = load(Reader(checkpoint, np.dtype(np.float32), "int8"))
        self.config, self.weights = checkpoint.config, (loaded.ends, loaded.layers)

    def generate(self, prompts: np.ndarray, new: int) -> np.ndarray:
        """The new tokens [B, new]."""
        batch, n = prompts.shape
        length = 1 << (n + new - 2).bit_length()
        caches = [KVCache.zeros(self.config, batch, length, jnp.float32) for _ in range(self.config.num_layers)]
        tokens, found = jnp.asarray(prompts), []
        for position in [0, *range(n, n + new - 1)]:
            drawn, caches = step(self.config, self.weights, tokens, caches, jnp.full(batch, position, jnp.int32))
            found.append(drawn)
            tokens = drawn[:, None].astype(jnp.int32)
        return np.stack(jax.device_get(found), axis=1)
