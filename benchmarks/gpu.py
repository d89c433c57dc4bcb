"""Layers of Grok-1's true width on an accelerator, against its limits and against the released arithmetic. One table.

    python benchmarks/gpu.py [--layers 1] [--width 6144]

Random int8 weights, bfloat16 activations. Decode reads the active int8 bytes (two experts of eight a token, attention,
the cache); prefill multiplies by two experts a token. The share is of what this device was measured to read, or to
multiply, in the same run. The baseline does what the release does: every expert for every copy of a token, matrices
dequantised in each call. On a CPU it runs at any small width, to see that it runs.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from released import released_experts

from grokscope.checkpoint.weights import described
from grokscope.config import GROK_1, GrokConfig
from grokscope.model.params import LAYER_PARAMS
from grokscope.model.transformer import KVCache, Positions
from grokscope.run import steps
from grokscope.run.hooks import PLAIN, Given
from grokscope.run.steps import DecodeState

BF16 = np.dtype(jnp.bfloat16)


def seconds(run, repeats: int = 7) -> float:
    """Median of a call that gives something to wait for; two calls warm up."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def random_layer(config: GrokConfig, key: jax.Array) -> dict:
    """One layer's parameters as a released checkpoint's are placed, with random values on the device."""
    params: dict[str, dict] = {}
    for param in LAYER_PARAMS:
        tree = described(param, config, BF16, "int8", None)
        leaves, treedef = jax.tree.flatten(tree)
        values = []
        for leaf in leaves:
            key, own = jax.random.split(key)
            values.append(_random(own, leaf, param.name, config))
        params.setdefault(param.module, {})[param.name] = jax.tree.unflatten(treedef, values)
    return params


def _random(key: jax.Array, leaf: jax.ShapeDtypeStruct, name: str, config: GrokConfig) -> jax.Array:
    if leaf.dtype == np.int8:
        return jax.jit(lambda: jax.random.bits(key, leaf.shape, jnp.uint8).astype(jnp.int8))()
    if name == "scale":
        return jnp.ones(leaf.shape, leaf.dtype)
    if name == "w":  # the router
        return jax.random.normal(key, leaf.shape, leaf.dtype) / np.sqrt(config.emb_size)
    return jnp.full(leaf.shape, 1 / 74 / np.sqrt(config.emb_size), leaf.dtype)  # int8 at random: deviation 74


def read_rate(size: int) -> float:
    """Bytes a second that the device reads."""
    array = jnp.ones(size, jnp.int8)
    total = jax.jit(lambda a: jnp.sum(a.reshape(-1, 4096).astype(jnp.int32)))
    return size / seconds(lambda: total(array))


def product_rate(n: int) -> float:
    """bfloat16 operations a second of a large product."""
    a = jnp.ones((n, n), jnp.bfloat16)
    multiply = jax.jit(lambda a, b: a @ b)
    return 2 * n**3 / seconds(lambda: multiply(a, a))


def decode(config: GrokConfig, layers: list[dict], batch: int, length: int) -> tuple[float, float]:
    """Seconds a layer of a decode step, and the int8 bytes that it must read (an upper bound: no expert shared)."""
    state = dataclasses.replace(DecodeState.idle(batch), live=jnp.ones(batch, bool))
    state = dataclasses.replace(state, positions=jnp.full(batch, length - 1))
    caches = [KVCache.zeros(config, batch, length, BF16) for _ in layers]
    x = jax.random.normal(jax.random.key(1), (batch, 1, config.emb_size), BF16)
    at = Positions.of(config, state.positions, 1)

    def step():
        y = x
        for i, params in enumerate(layers):
            y, caches[i], _ = steps.decode_layer(config, PLAIN, params, y, caches[i], at, state, {}, Given(), 0)
        return y

    experts = min(config.num_experts, batch * config.num_selected_experts)
    n = config.dims
    weights = 3 * experts * n["D"] * n["F"] + 2 * n["D"] * (n["HC"] + n["GC"])
    return seconds(step) / len(layers), weights + 4 * batch * length * n["GC"]


def prefill(config: GrokConfig, layers: list[dict], tokens: int) -> tuple[float, float]:
    """Seconds a layer of a prompt, in blocks of 512, and its useful operations."""
    block = min(512, tokens)
    xs = [jax.random.normal(jax.random.key(i), (1, block, config.emb_size), BF16) for i in range(tokens // block)]
    places = [Positions.of(config, jnp.array([i * block]), block) for i in range(len(xs))]
    ids, live = np.zeros((1, block), np.int32), np.ones((1, block), bool)

    def run():
        for params in layers:
            cache, out = KVCache.zeros(config, 1, tokens, BF16), []
            for x, at in zip(xs, places, strict=True):
                y, cache, _ = steps.layer(config, PLAIN, params, x, cache, at, ids, live, {}, Given())
                out.append(y)
        return out

    n = config.dims
    weights = 3 * config.num_selected_experts * n["D"] * n["F"] + 2 * n["D"] * (n["HC"] + n["GC"])
    return seconds(run, 3) / len(layers), tokens * (2 * weights + 2 * tokens * n["HC"])


def baseline(config: GrokConfig, params: dict, tokens: int) -> tuple[float, float]:
    """Seconds of the released experts, and of ours, over the same tokens."""
    x = jax.random.normal(jax.random.key(1), (tokens, config.emb_size), BF16)
    shape = (tokens, config.num_selected_experts)
    chosen = jax.random.randint(jax.random.key(2), shape, 0, config.num_experts)
    gates = jnp.full(shape, 0.4)
    own = [tuple(params["layer/experts"][n].experts) for n in ("gate", "up", "down")]
    normed = x.reshape(tokens, 1, -1) if tokens <= 64 else x[None]
    by_row = (*normed.shape[:2], shape[1])
    routed = steps.transformer.Routed(
        normed,
        normed,
        jnp.zeros((*normed.shape[:2], config.num_experts)),
        chosen.reshape(by_row),
        gates.reshape(by_row),
    )
    live = jnp.ones(by_row[:2], bool)
    at = (jnp.zeros(len(normed), jnp.int32), jnp.zeros(by_row[:2], jnp.int32), live, {}, Given())
    theirs = jax.jit(released_experts)
    ours = seconds(lambda: steps.experts(config, PLAIN, params, routed, *at)[0])
    return seconds(lambda: theirs(x, chosen, gates, *own), 3), ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=GROK_1.emb_size, help="heads and experts shrink with it")
    args = parser.parse_args()
    heads = 48 * args.width // GROK_1.emb_size
    config = dataclasses.replace(
        GROK_1, emb_size=args.width, num_q_heads=max(heads, 8), num_layers=args.layers, sequence_len=8192
    )
    device = jax.devices()[0]
    large = device.platform != "cpu"
    read, product = read_rate(1 << (32 if large else 28)), product_rate(8192 if large else 1024)
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(f"reads {read / 1e9:.1f} GB/s, bfloat16 products {product / 1e12:.2f} T/s")
    print(f"{args.layers} layers, D {config.emb_size}, F {config.ffn_size}, int8\n")
    layers = [random_layer(config, jax.random.key(i)) for i in range(args.layers)]
    print(f"{'':24}{'ms a layer':>12}{'of the limit':>14}{'experts: released / ours':>28}")
    for batch in (1, 8, 64):
        time_, count = decode(config, layers, batch, 2048)
        theirs, ours = baseline(config, layers[0], batch)
        print(f"{f'decode, batch {batch}':24}{1e3 * time_:12.3f}{count / time_ / read:14.2f}{theirs / ours:28.1f}")
    for tokens in (1024, 8192):
        time_, count = prefill(config, layers, tokens)
        theirs, ours = baseline(config, layers[0], min(tokens, 512))
        print(
            f"{f'prefill, {tokens} tokens':24}{1e3 * time_:12.2f}{count / time_ / product:14.2f}{theirs / ours:28.1f}"
        )


if __name__ == "__main__":
    main()
