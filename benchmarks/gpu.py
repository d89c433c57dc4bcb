"""Layers of Grok-1's true width on an accelerator, against its limits and against the released arithmetic. Two tables.

    python benchmarks/gpu.py [--layers 8] [--width 6144]

Random int8 weights, bfloat16 activations. Decode, with one layer a call and with several, reads the active int8 bytes
(two experts of eight a token, attention, the cache); prefill multiplies by two experts a token, in the blocks of
`Grok.generate`. The share is of what this device was measured to read, or to multiply, in the same run.

The second table is of one layer's experts alone, by all candidates: the project's kernel (Pallas) with the experts in
one array, and with a list of them as when they are streamed; XLA's loop over tiles that switches to an expert;
`ragged_dot` of matrices dequantised in each call; and what the release does: every expert for every copy of a token,
dequantised in each call. They are checked against each other. On a CPU all of it runs at any small width, to see that
it runs.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from released import dequantized, released_experts

from grokscope.checkpoint.weights import described
from grokscope.config import GROK_1, GrokConfig
from grokscope.model import kernel, transformer
from grokscope.model.params import LAYER_PARAMS
from grokscope.model.transformer import ExpertList, KVCache, Positions, each
from grokscope.run import steps
from grokscope.run.decode import block_lengths
from grokscope.run.hooks import PLAIN, Given
from grokscope.run.steps import DecodeState

BF16 = np.dtype(jnp.bfloat16)
STEPS = 4


class Timed(NamedTuple):
    """Seconds of a call."""

    whole: float
    called: float  # until this process has it back
    first: float  # the first time, compiled or read from disk


def timed(run, repeats: int = 7) -> Timed:
    """Medians of a call that gives something to wait for; two calls warm up."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        found = run()
        called = time.perf_counter() - begin
        jax.block_until_ready(found)
        times.append((time.perf_counter() - begin, called))
    whole, called = (statistics.median(column) for column in zip(*times[2:], strict=True))
    return Timed(whole, called, times[0][0])


def seconds(run, repeats: int = 7) -> float:
    return timed(run, repeats).whole


def random_layer(config: GrokConfig, key: jax.Array) -> dict:
    """One layer's parameters as a released checkpoint's are placed, with random values on the device."""
    params: dict[str, dict] = {}
    for param in LAYER_PARAMS:
        tree = described(param, config, BF16, "int8", None)
        leaves, treedef = jax.tree.flatten(tree)
        values = []
        for leaf in leaves:
            key, own = jax.random.split(key)
            values.append(_random(own, leaf.shape, leaf.dtype, param.name, config.emb_size))
        params.setdefault(param.module, {})[param.name] = jax.tree.unflatten(treedef, values)
    return params


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _random(key: jax.Array, shape: tuple[int, ...], dtype, name: str, width: int) -> jax.Array:
    if dtype == np.int8:
        return jax.random.bits(key, shape, jnp.uint8).astype(jnp.int8)
    if name == "scale":
        return jnp.ones(shape, dtype)
    if name == "w":  # the router
        return jax.random.normal(key, shape, dtype) / np.sqrt(width)
    return jnp.full(shape, 1 / 74 / np.sqrt(width), dtype)  # int8 at random: deviation 74


def read_rate(size: int) -> float:
    """Bytes a second that the device reads."""
    array = jax.random.normal(jax.random.key(0), size // 4)
    total = jax.jit(jnp.sum)
    return size / seconds(lambda: total(array))


def product_rate(n: int) -> float:
    """bfloat16 operations a second of a large product, of random values: a card multiplies zeros or ones faster."""
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    multiply = jax.jit(lambda a, b: a @ b)
    return 2 * n**3 / seconds(lambda: multiply(a, b))


def decode(config: GrokConfig, layers: list[dict], batch: int, length: int, together: int) -> tuple[Timed, int, float]:
    """So many layers of decode steps, so many a call, and the bytes a layer must read: each expert that some row takes
    once.

    Several steps in a row, since `Grok.generate` calls a step before it reads the token of the last one.
    """
    state = dataclasses.replace(DecodeState.idle(batch), live=jnp.ones(batch, bool))
    state = dataclasses.replace(state, positions=jnp.full(batch, length - 1))
    caches = [KVCache.zeros(config, batch, length, BF16) for _ in layers]
    x = jax.random.normal(jax.random.key(1), (batch, 1, config.emb_size), BF16)
    at = Positions.of(config, state.positions, 1)

    def run():
        for _ in range(STEPS):
            y = x
            for begin in range(0, len(layers), together):
                y = some(y, slice(begin, begin + together))
        return y

    def some(y, own: slice):
        more = [{} for _ in layers[own]], [Given() for _ in layers[own]], 0
        y, caches[own], _ = steps.decode_layers(config, PLAIN, layers[own], y, caches[own], at, state, *more)
        return y

    times, y, taken = timed(run), x, 0
    for i, params in enumerate(layers):
        place = (at, state.tokens[:, None], state.live[:, None])
        routed, caches[i], _ = steps.attend(config, PLAIN, params, y, caches[i], *place, {}, Given())
        y = some(y, slice(i, i + 1))
        taken += len(np.unique(routed.chosen))
    n = config.dims
    weights = 3 * taken / len(layers) * n["D"] * n["F"] + 2 * n["D"] * (n["HC"] + n["GC"])
    return times, STEPS * len(layers), weights + 4 * batch * length * n["GC"]


def prefill(config: GrokConfig, layers: list[dict], tokens: int) -> tuple[Timed, int, float]:
    """So many layers over a prompt, and the useful operations of each."""
    sizes = block_lengths(tokens)
    xs = [jax.random.normal(jax.random.key(i), (1, n, config.emb_size), BF16) for i, n in enumerate(sizes)]
    starts = np.cumsum([0, *sizes[:-1]])
    places = [Positions.of(config, jnp.array([start]), n) for start, n in zip(starts, sizes, strict=True)]
    tokens_of = [(jnp.zeros((1, n), jnp.int32), jnp.ones((1, n), bool)) for n in sizes]

    def run():
        for params in layers:
            cache, out = KVCache.zeros(config, 1, tokens, BF16), []
            for x, at, (ids, live) in zip(xs, places, tokens_of, strict=True):
                y, cache, _ = steps.layer(config, PLAIN, params, x, cache, at, ids, live, {}, Given())
                out.append(y)
        return out

    n = config.dims
    weights = 3 * config.num_selected_experts * n["D"] * n["F"] + 2 * n["D"] * (n["HC"] + n["GC"])
    return timed(run, 3), len(layers), tokens * (2 * weights + 2 * tokens * n["HC"])


def in_loop(fn, tile: int, rows, weights, groups):
    """As transformer.by_expert."""
    return transformer.in_loop(fn, tile, rows, tuple(zip(*map(each, weights), strict=True)), groups)


def in_ragged_dot(fn, tile: int, rows, weights, groups):
    """As transformer.by_expert."""

    def multiply(rows, own):
        return jax.lax.ragged_dot(rows, jnp.stack([dequantized(w, rows.dtype) for w in each(own)]), groups.counts)

    return fn(rows, *weights, multiply=multiply)


def candidates(config: GrokConfig, params: dict, tokens: int) -> dict[str, tuple[float, float]]:
    """{name: (seconds, largest difference to the released way, of its largest value)} of a layer's experts."""
    x = jax.random.normal(jax.random.key(1), (tokens, config.emb_size), BF16)
    scores = jax.random.uniform(jax.random.key(2), (tokens, config.num_experts))
    _, chosen = jax.lax.top_k(scores, config.num_selected_experts)
    gates = jnp.full(chosen.shape, 0.4, BF16)
    stacks = [params["layer/experts"][n] for n in ("gate", "up", "down")]
    lists = [ExpertList(tuple(each(stack))) for stack in stacks]

    def by(way, x, chosen, gates, gate, up, down):
        pairs = transformer.sort_pairs(config.num_experts, chosen[None], jnp.ones((1, tokens), bool))
        tile = transformer.tile_size(tokens, gate[0])
        rows = jnp.pad(x[pairs.order // config.num_selected_experts], ((0, tile), (0, 0)))
        hidden = way(transformer.gate_and_up, tile, rows, (gate, up), pairs.groups)
        out = way(transformer.down, tile, hidden, (down,), pairs.groups)
        return jnp.einsum("nk,nkd->nd", gates, transformer.as_chosen(out, chosen, pairs))

    def released(x, chosen, gates, *own):
        return released_experts(x, chosen, gates, *(tuple(each(w)) for w in own))

    ways = {"loop": (in_loop, lists), "ragged_dot": (in_ragged_dot, lists)}
    if kernel.available():
        ways = {"kernel": (transformer.by_expert, stacks), "kernel, a list": (transformer.by_expert, lists)} | ways
    runs = {
        name: functools.partial(jax.jit(functools.partial(by, way)), x, chosen, gates, *own)
        for name, (way, own) in ways.items()
    }
    runs["released"] = functools.partial(jax.jit(released), x, chosen, gates, *lists)
    found = {name: run().astype(jnp.float32) for name, run in runs.items()}
    right = found["released"]
    return {
        name: (
            seconds(lambda run=run: [run() for _ in range(STEPS)], 5) / STEPS,
            float(jnp.max(jnp.abs(found[name] - right)) / jnp.max(jnp.abs(right))),
        )
        for name, run in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
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
    print(f"{'':24}{'ms a layer':>12}{'of the limit':>14}{'ms to call it':>15}{'first call, s':>15}")

    def row(name: str, measured: tuple[Timed, int, float], rate: float) -> None:
        times, count, each = measured
        share = each * count / times.whole / rate
        called = 1e3 * times.called / count
        print(f"{name:24}{1e3 * times.whole / count:12.3f}{share:14.2f}{called:15.3f}{times.first:15.1f}", flush=True)

    for batch, together in itertools.product((1, 8, 64), (1, 4)):
        row(f"decode, {batch} x 1, {together} a call", decode(config, layers, batch, 2048, together), read)
    for tokens in (1024, 8192):
        row(f"prefill, {tokens} tokens", prefill(config, layers, tokens), product)
    print("\nexperts of one layer, ms (difference to released)")
    for tokens in (1, 8, 64, 1024):
        of_ways = candidates(config, layers[0], tokens)
        cells = [f"{name} {1e3 * time_:.3f} ({apart:.0e})" for name, (time_, apart) in of_ways.items()]
        print(f"{f'{tokens} tokens':12}" + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
