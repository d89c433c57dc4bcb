"""The Grok-1 network in Haiku, in reading order: norm, cache, attention, router, experts, layer, embedding.

Equal to the released code (tests/test_golden.py): norms before and after each half of a layer, capped attention
scores, gates that are not renormalised, tied embedding with both multipliers. One layer is one function, traced once
and called L times; all of its states come in and go out. The compute type is the type of the embedding table.

Only positions are masked (causally). Padding needs no mask of its own: what lies past the true length of a row is
never visible to the positions before it, and is overwritten before decoding reaches it. `live` marks the tokens whose
experts have to run; it saves work and changes no live value.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from grokscope.config import GrokConfig
from grokscope.model import kernel
from grokscope.model.params import PARAMS, initializer
from grokscope.model.quant import HIGHEST, QuantizedWeight, Weight, in_kernel, matmul, widened_in_parts
from grokscope.model.sharding import axis_size, constrain, on_one_device, per_shard, spec, zeros
from grokscope.model.taps import tap, watched

ATTENTION_CAP = 30.0
MASKED = -1e30
AT_ONCE = 1 << 20  # attention scores or logits, unless somebody looks at them: on CPU 4 MB, which stay in a cache
MIN_BLOCK = 64  # positions, however many that makes
MIN_OWN = 128  # queries of a block that read only what is before them
KEYS = 256  # of a long cache, read at a time on CPU; its length is a power of two (run.decode.cache_length)
FEW_PAIRS = 256  # tokens and choices that an accelerator sorts by comparing all with all, in fewer steps
NORM_EPS = 1e-5
ROTARY_BASE = 10000.0

Params = Mapping[str, Mapping[str, Any]]
"""{Haiku module: {name: array, QuantizedWeight or ExpertList}}."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertList:
    """A stack of E expert matrices [E, K, N], kept as E separate weights, so that one can be read without the rest.

    A static slice of one stacked array makes XLA on CPU copy the expert each time (9 against 37 GB/s, measured). The
    kernel for int8 does not, and takes either: of a stack it compiles once for all experts.
    """

    experts: tuple[Any, ...]  # weights; a pytree may hold other leaves in their place

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.experts), *self.experts[0].shape)

    def __getitem__(self, index: int) -> Weight:
        return self.experts[index]


Stack = ExpertList | Weight
"""Matrices [E, K, N] of the experts of a layer; arrays where they are initialised."""


def each(stack: Stack) -> list[Weight]:
    """[K, N] of each expert."""
    return [stack[e] for e in range(stack.shape[0])]


class KVCache(NamedTuple):
    """Keys (rotated) and values of one layer for S positions: [B, G, S, C] each on a mesh, [B * G, S, C] on one device.

    This is how attention reads them. (With an axis for B alone, XLA on CPU copies the cache of one row four times to
    write a position.)
    """

    k: jax.Array
    v: jax.Array

    @staticmethod
    def sizes(config: GrokConfig, batch: int, length: int) -> tuple[int, int, int, int]:
        """[B, G, S, C]."""
        return batch, config.num_kv_heads, length, config.key_size

    @classmethod
    def shape(cls, config: GrokConfig, batch: int, length: int) -> tuple[int, ...]:
        """As it is held on the mesh in force."""
        batch, groups, *rest = cls.sizes(config, batch, length)
        return (batch * groups, *rest) if on_one_device() else (batch, groups, *rest)

    @staticmethod
    def dims(shape: tuple[int, ...]) -> str:
        return "BGSC"[-len(shape) :]

    @classmethod
    def zeros(cls, config: GrokConfig, batch: int, length: int, dtype) -> "KVCache":
        shape = cls.shape(config, batch, length)
        return cls(zeros(cls.dims(shape), shape, dtype), zeros(cls.dims(shape), shape, dtype))

    def write(self, k: Array, v: Array, start: Int[Array, " B"]) -> "KVCache":
        """Positions start .. start + T of each row replaced by k and v [B, T, G, C]."""
        whole, new = spec(self.dims(self.k.shape), self.k.shape), spec("BTGC", k.shape)
        put = per_shard(put_rows, (whole, new, PartitionSpec(new[0])), whole)
        return KVCache(put(self.k, k, start), put(self.v, v, start))

    def of_each(self, batch: int) -> tuple[Float[Array, "B G S C"], Float[Array, "B G S C"]]:
        """Keys and values of each row of a batch."""
        k, v = (a.reshape(batch, -1, *a.shape[-2:]) for a in self)
        return k, v


def put_rows(cache: Float[Array, "*N S C"], new: Float[Array, "B T G C"], start: Int[Array, " B"]) -> Array:
    """The cache with positions start .. start + T of each row of the batch replaced."""
    batch, length, groups, channels = new.shape
    rows, new = cache.reshape(-1, *cache.shape[-2:]), by_group(new).reshape(-1, length, channels)
    if batch == 1:  # the same without a scatter, which takes four steps more
        return jax.lax.dynamic_update_slice_in_dim(rows, new, start[0], axis=1).reshape(cache.shape)
    put = jax.vmap(lambda row, own, at: jax.lax.dynamic_update_slice_in_dim(row, own, at, axis=0))
    return put(rows, new, jnp.repeat(start, groups)).reshape(cache.shape)


def by_group(x: Float[Array, "B T G C"]) -> Float[Array, "B G T C"]:
    return x.transpose(0, 2, 1, 3)


class Module(hk.Module):
    """A Haiku module that takes its weights from PARAMS."""

    def __init__(self, config: GrokConfig, name: str):
        super().__init__(name=name)
        self.config = config

    def weight(self, name: str) -> Any:
        """An array, a QuantizedWeight or an ExpertList, as it was placed."""
        (param,) = (p for p in PARAMS if (p.module, p.name) == (self.module_name, name))
        return hk.get_parameter(name, param.shape(self.config), init=initializer(param, self.config))


class RMSNorm(Module):
    """Root-mean-square norm in float32, times a plain scale (not 1 + scale)."""

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + NORM_EPS)
        return (wide * inverse * self.weight("scale")).astype(x.dtype)


class Positions(NamedTuple):
    """Where the tokens of a block stand, and by what angles their queries and keys turn there (float32).

    Made before the first layer, for all of them: inside a layer, XLA on CPU computes the sine and cosine of each
    position anew for every head.
    """

    numbers: jax.Array  # int32 [B, T]
    cos: jax.Array  # [B, T, 1, C / 2]
    sin: jax.Array

    @classmethod
    def of(cls, config: GrokConfig, start: Int[Array, " B"], length: int) -> "Positions":
        """start .. start + T of each row."""
        half = config.key_size // 2
        numbers = start[:, None] + jnp.arange(length)
        frequencies = ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angles = numbers[..., None, None].astype(jnp.float32) * frequencies
        return cls(constrain(numbers, "BT"), constrain(jnp.cos(angles), "BTHC"), constrain(jnp.sin(angles), "BTHC"))

    def rotate(self, x: Float[Array, "B T N C"]) -> Float[Array, "B T N C"]:
        """Rotary embedding over the whole head, half-split: channel c turns with channel c + C/2."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = first * self.cos - second * self.sin, second * self.cos + first * self.sin
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def values_at_once() -> int:
    """Attention scores or logits of a part. On an accelerator few large parts: the host is asked between them."""
    return AT_ONCE if jax.default_backend() == "cpu" else 1 << 28


def keys_at_once() -> int:
    """Keys of a long cache, likewise."""
    return KEYS if jax.default_backend() == "cpu" else 2048


def in_parts(fn, each: int, *args: Array) -> Array:
    """fn(*args), arrays over [B, T], for as many positions at a time as make `values_at_once` of `each` a position.

    A derivative computes a part again, and keeps nothing from inside of it.
    """
    fn = jax.checkpoint(fn)
    batch, length = args[0].shape[:2]
    block = 1 << max(values_at_once() // each, MIN_BLOCK).bit_length() - 1
    if block >= length or length % block:
        return fn(*args)
    parts = tuple(jnp.moveaxis(a.reshape(batch, -1, block, *a.shape[2:]), 1, 0) for a in args)
    done = jax.lax.map(lambda part: fn(*part), parts)
    return jnp.moveaxis(done, 0, 1).reshape(batch, length, *done.shape[3:])


class Attention(Module):
    """Grouped-query attention: query head h reads key-value head h // (H / G)."""

    def __call__(
        self, x: Float[Array, "B T D"], cache: KVCache | None, positions: Positions
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """x holds these positions; without a cache they attend to one another only."""
        batch, length, _ = x.shape
        heads, groups, channels = self.config.num_q_heads, self.config.num_kv_heads, self.config.key_size

        q = constrain(matmul(x, self.weight("query")).reshape(batch, length, heads, channels), "BTHC")
        k = constrain(matmul(x, self.weight("key")).reshape(batch, length, groups, channels), "BTGC")
        v = constrain(matmul(x, self.weight("value")).reshape(batch, length, groups, channels), "BTGC")
        q, k, v = tap("q", positions.rotate(q)), tap("k", positions.rotate(k)), tap("v", v)
        if cache is not None:
            cache = cache.write(k, v, positions.numbers[:, 0])
        k, v = cache.of_each(batch) if cache is not None else (by_group(k), by_group(v))
        if heads % axis_size("model") == 0 and groups % axis_size("model"):  # each device takes the one it reads
            copies = math.lcm(groups, axis_size("model")) // groups
            k, v = (constrain(jnp.repeat(a, copies, axis=1), "BGSC") for a in (k, v))
        z = tap("attn_z", self.read(q, k, v, positions.numbers))
        return constrain(matmul(z.reshape(batch, length, heads * channels), self.weight("out")), "BTD"), cache

    def read(
        self,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B G S C"],
        v: Float[Array, "B G S C"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T H C"]:
        """What each head reads for the queries at these positions.

        All keys are scored at once if somebody looks, and for one query, where a loop costs more than it saves (a
        step behind 900 tokens 1.1 to 1.6 times as long, measured).
        """
        if watched("attn_scores", "attn_pattern"):
            return self.read_whole(q, k, v, positions)
        if q.shape[1] == k.shape[2]:
            return self.read_own(q, k, v, positions)
        keys = keys_at_once()
        if q.shape[1] == 1 or k.shape[2] <= 2 * keys:
            return self.read_together(q, k, v, positions)

        def run(q, k, v, positions):
            return in_parts(lambda q, at: self.read_seen(q, k, v, at), q.shape[2] * keys, q, positions)

        of_q, of_k = spec("BTHC", q.shape), spec("BGSC", k.shape)
        return per_shard(run, (of_q, of_k, of_k, PartitionSpec(of_q[0])), of_q)(q, k, v, positions)

    def read_own(self, q, k, v, positions) -> Float[Array, "B T H C"]:
        """As `read`, of a block from position 0 on, which is all that there is: each part of it reads no further than
        itself, 5/8 of the whole.
        """
        length = q.shape[1]
        size = max(length // 4, MIN_OWN)
        parts = [(slice(begin, begin + size), slice(begin + size)) for begin in range(0, length, size)]
        own = [self.read_together(q[:, at], k[:, :, seen], v[:, :, seen], positions[:, at]) for at, seen in parts]
        return jnp.concatenate(own, axis=1)

    def read_together(self, q, k, v, positions) -> Float[Array, "B T H C"]:
        """As `read_whole`, as many queries at a time as stay in a cache."""
        return in_parts(lambda q, at: self.read_whole(q, k, v, at), q.shape[2] * k.shape[2], q, positions)

    def read_whole(self, q, k, v, positions) -> Float[Array, "B T H C"]:
        """As `read`, all keys at once."""
        scores = tap("attn_scores", self.scores(q, k, positions, 0))
        pattern = tap("attn_pattern", jax.nn.softmax(scores, axis=-1)).astype(q.dtype)
        return from_rows(mix(pattern, v), q.shape)

    def read_seen(self, q, k, v, positions) -> Float[Array, "B T H C"]:
        """As `read`, a few keys at a time and none behind the last query: half of a long prompt (8192 tokens take 0.54
        to 0.6 of the time, measured). Scores are capped: their exponentials need no largest one to begin with.
        """
        batch, length, heads, channels = q.shape
        keys = keys_at_once()

        def some(index, carry):
            total, z = carry
            own_k, own_v = (jax.lax.dynamic_slice_in_dim(a, index * keys, keys, axis=2) for a in (k, v))
            weights = jnp.exp(self.scores(q, own_k, positions, index * keys) - ATTENTION_CAP)
            return total + weights.sum(-1), z + mix(weights.astype(q.dtype), own_v).astype(jnp.float32)

        groups = k.shape[1]
        none = jnp.zeros((batch, heads, length)), jnp.zeros((batch, groups, heads // groups * length, channels))
        total, z = jax.lax.fori_loop(0, jnp.max(positions) // keys + 1, some, none)
        return from_rows((z / total.reshape(*z.shape[:3], 1)).astype(q.dtype), q.shape)

    def scores(self, q, k: Float[Array, "B G N C"], positions, first) -> Float[Array, "B H T N"]:
        """Capped scores, float32, against the keys of positions first .. first + N; MASKED behind a query."""
        batch, length, heads, channels = q.shape
        groups = k.shape[1]
        # The query heads of a group as more rows of one product: XLA on CPU takes 3 to 5 times as long for the einsum.
        rows = q.reshape(batch, length, groups, -1, channels).transpose(0, 2, 3, 1, 4)
        rows = rows.reshape(batch, groups, -1, channels)
        scores = jnp.einsum("bgmc,bgnc->bgmn", rows, k, precision=HIGHEST).astype(jnp.float32)
        scores = scores.reshape(batch, heads, length, -1) * (self.config.attn_output_multiplier / ATTENTION_CAP)
        visible = first + jnp.arange(k.shape[2]) <= positions[:, None, :, None]  # [B, 1, T, N]
        return jnp.where(visible, ATTENTION_CAP * jnp.tanh(scores), MASKED)


def mix(weights: Float[Array, "B H T N"], v: Float[Array, "B G N C"]) -> Float[Array, "B G M C"]:
    """Values added up by weight; the rows of each group are its heads' queries."""
    batch, _, _, keys = weights.shape
    return jnp.matmul(weights.reshape(batch, v.shape[1], -1, keys), v, precision=HIGHEST)


def from_rows(z: Float[Array, "B G M C"], shape: tuple[int, ...]) -> Float[Array, "B T H C"]:
    batch, length, heads, channels = shape
    return z.reshape(batch, heads, length, channels).transpose(0, 2, 1, 3)


class Router(Module):
    """Scores all experts in float32 and keeps the K most probable. Their gates are not renormalised."""

    def __call__(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T E"], Int[Array, "B T K"], Float[Array, "B T K"]]:
        """Router logits, chosen experts and their gates."""
        logits = tap("router_logits", matmul(x.astype(jnp.float32), self.weight("w")))
        probs = tap("router_probs", jax.nn.softmax(logits, axis=-1))
        gates, chosen = jax.lax.top_k(probs, self.config.num_selected_experts)
        return logits, tap("expert_index", chosen), tap("expert_gate", gates)


def tile_size(num_tokens: int, kept: Weight) -> int:
    """Rows that one product of an expert takes, of weights kept like this one: fixed by the shape of the call, never by
    how tokens are routed.

    The kernel for int8 has tiles of its own. Any other accelerator reads an expert once for all tokens of a decode
    step; of more rows a tile takes half to all of what an expert does on average (of 2 in 8). On CPU few rows go one by
    one: such a product reads fastest, and a second row finds the matrix in the cache; eight go by fours, as int8 does,
    which is widened for every tile. Then a tile takes the average of an expert up to 40 rows, which waste few of their
    own and amortise reading the matrix (64 where it is widened a part at a time), and three eighths of it where that is
    more: best or near it at all sizes tried.
    """
    if kernel.available() and isinstance(kept, QuantizedWeight):
        return kernel.tile_size(num_tokens // 4)
    if jax.default_backend() != "cpu":
        return num_tokens if num_tokens <= 32 else max(num_tokens // 8, min(num_tokens // 4, 32))
    if num_tokens <= 8:
        return min(num_tokens, 4) if isinstance(kept, QuantizedWeight) or num_tokens > 4 else 1
    return max(min(max(num_tokens // 4, 8), 64 if widened_in_parts(kept) else 40), 3 * num_tokens // 32)


class Groups(NamedTuple):
    """Where each expert's rows lie among rows sorted by expert: int32 [E] each."""

    begins: jax.Array
    counts: jax.Array


def by_expert(fn, tile: int, rows: Float[Array, "M X"], weights: tuple[Stack, ...], groups: Groups) -> Array:
    """fn(rows of expert e, e of each of the weights) for every expert, [M, Y]: each runs as many tiles as it has rows
    for, or none. fn is `gate_and_up` or `down`.

    M is all rows that there may be, and what is to spare. Those of no expert become 0.
    """
    if not in_kernel(rows.dtype, weights[0][0]):
        return in_loop(fn, tile, rows, tuple(zip(*map(each, weights), strict=True)), groups)
    tiles = kernel.Tiles.of(groups.begins, groups.counts, tile, len(rows))

    def multiply(rows, own: Stack):
        stacks = [w[None] for w in own.experts] if isinstance(own, ExpertList) else [own]
        return kernel.products(rows, stacks, tiles, tile)

    out = fn(rows, *weights, multiply=multiply)
    return jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(groups.counts), out, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_loop(fn, tile: int, rows: Float[Array, "M X"], weights: tuple[tuple[Weight, ...], ...], groups: Groups) -> Array:
    """`by_expert` without a kernel.

    One loop over all tiles, each of which switches to its expert. (A loop for each expert compiles 1.2 times as long;
    int8 weights it needs a barrier for, or XLA widens all of them before the loop.) The last tile of an expert runs
    over into the stretch of the next, which overwrites it; so M needs a tile to spare at its end.

    The derivative is written out because a loop of unknown length has none of its own; it keeps nothing but the inputs
    (measured on CPU, training: 1.6 times as fast as a branch per tile, and as a fixed capacity 1.1).
    """
    width = jax.eval_shape(fn, rows, *weights[0]).shape[-1]
    branches = [lambda some, own=own: fn(some, *own) for own in weights]
    tiles = -(-groups.counts // tile)
    ends = jnp.cumsum(tiles)

    def run(index, out):
        expert = jnp.sum(index >= ends)
        at = groups.begins[expert] + (index - (ends - tiles)[expert]) * tile
        some = jax.lax.dynamic_slice_in_dim(rows, at, tile)
        some = some[0] if tile == 1 else some  # of [1, X] XLA on CPU makes copies in every branch
        done = jax.lax.switch(expert, branches, some).reshape(tile, width)
        return jax.lax.dynamic_update_slice_in_dim(out, done, at, axis=0)

    return jax.lax.fori_loop(0, ends[-1], run, jnp.zeros((len(rows), width), rows.dtype))


def _in_loop_forward(fn, tile, rows, weights, groups):
    return in_loop(fn, tile, rows, weights, groups), (rows, weights, groups)


def _in_loop_backward(fn, tile, saved, grads):
    rows, weights, groups = saved
    row_grads, weight_grads = jnp.zeros_like(rows), []
    for expert, own in enumerate(weights):

        def run(index, carry, own=own, begin=groups.begins[expert], count=groups.counts[expert]):
            row_grads, own_grads = carry
            at = begin + index * tile
            inside = jnp.arange(tile) + index * tile < count
            given = jnp.where(inside[:, None], jax.lax.dynamic_slice_in_dim(grads, at, tile), 0)
            _, pull = jax.vjp(fn, jax.lax.dynamic_slice_in_dim(rows, at, tile), *own)
            some, *more = pull(given)
            row_grads = jax.lax.dynamic_update_slice_in_dim(row_grads, some, at, axis=0)
            return row_grads, tuple(a + b for a, b in zip(own_grads, more, strict=True))

        none = tuple(jnp.zeros_like(w) for w in own)
        row_grads, own_grads = jax.lax.fori_loop(0, -(-groups.counts[expert] // tile), run, (row_grads, none))
        weight_grads.append(own_grads)
    return row_grads, tuple(weight_grads), None


in_loop.defvjp(_in_loop_forward, _in_loop_backward)


def gate_and_up(rows: Float[Array, "*N D"], gate, up, multiply=matmul) -> Float[Array, "*N F"]:
    """By one expert; with a `multiply` that takes the weights of all, by each row's own."""
    return jax.nn.gelu(multiply(rows, gate), approximate=True) * multiply(rows, up)


def down(hidden: Float[Array, "*N F"], weight, multiply=matmul) -> Float[Array, "*N D"]:
    """As `gate_and_up`."""
    return multiply(hidden, weight)


class Pairs(NamedTuple):
    """The N * K (token, choice) pairs of N tokens, sorted by expert."""

    order: jax.Array  # int32 [N * K]
    back: jax.Array  # its inverse
    groups: Groups


def sort_pairs(num_experts: int, chosen: Int[Array, "B T K"], live: Bool[Array, "B T"]) -> Pairs:
    pairs = jnp.where(live[..., None] & (chosen >= 0), chosen, num_experts).reshape(-1)
    numbers = jnp.arange(len(pairs))
    keys = pairs * len(pairs) + numbers
    if jax.default_backend() != "cpu" and len(pairs) <= FEW_PAIRS:
        back = jnp.sum(keys[:, None] > keys, axis=1)
        order = jnp.sum(jnp.where(back == numbers[:, None], numbers, 0), axis=1)
    else:  # of one array, and scattered back: two argsorts take XLA on CPU 3.5 times as long (206 us of 1024 pairs)
        order = jnp.sort(keys) % len(pairs)
        back = jnp.zeros_like(order).at[order].set(numbers, unique_indices=True)
    counts = jnp.sum(pairs[:, None] == jnp.arange(num_experts), axis=0)
    return Pairs(order, back, Groups(jnp.cumsum(counts) - counts, counts))


def spared(rows: Float[Array, "N X"], kept: Weight, tile: int) -> Float[Array, "M X"]:
    """Rows, and a tile of zeros behind them where a loop multiplies whole tiles."""
    return rows if in_kernel(rows.dtype, kept) else jnp.pad(rows, ((0, tile), (0, 0)))


def as_sorted(kept: Weight, values: Float[Array, "B T K X"], pairs: Pairs) -> Float[Array, "M X"]:
    tile = tile_size(values.shape[0] * values.shape[1], kept)
    return spared(values.reshape(-1, values.shape[-1])[pairs.order], kept, tile)


def as_chosen(rows: Float[Array, "M X"], chosen: Int[Array, "B T K"], pairs: Pairs) -> Float[Array, "B T K X"]:
    return rows[pairs.back].reshape(*chosen.shape, -1)


def run_gate_and_up(kept: Weight, x: Float[Array, "B T D"], pairs: Pairs, weights) -> Float[Array, "M F"]:
    tokens = x.reshape(-1, x.shape[-1])
    tile = tile_size(len(tokens), kept)
    rows = spared(tokens[pairs.order // (len(pairs.order) // len(tokens))], kept, tile)
    return by_expert(gate_and_up, tile, rows, weights, pairs.groups)


def run_down(kept: Weight, hidden: Float[Array, "M F"], chosen: Int[Array, "B T K"], pairs: Pairs, weights) -> Array:
    tile = tile_size(chosen.shape[0] * chosen.shape[1], kept)
    out = by_expert(down, tile, hidden, weights, pairs.groups)
    return as_chosen(out, chosen, pairs)[None]


class Experts(Module):
    """Runs the chosen experts, and no others.

    The (token, choice) pairs are sorted by expert. One rule serves a decode step, long prompts and training, and a
    row's numbers do not depend on its neighbours. On a mesh each device sorts the tokens of its data shard, and runs
    its columns of gate and up and its rows of down.
    """

    def __call__(
        self, x: Float[Array, "B T D"], chosen: Int[Array, "B T K"], live: Bool[Array, "B T"]
    ) -> Float[Array, "P B T K D"]:
        """Output of each chosen expert before its gate, as one part for each model shard: they add up to it.

        Those of dead tokens, and of -1 (nobody), mean nothing.
        """
        num_experts = self.config.num_experts
        gates, ups, downs = (self.weight(name) for name in ("gate", "up", "down"))
        (batch,) = spec(("B",), x.shape[:1])
        lead = () if isinstance(gates, ExpertList) else (None,)  # axes of an array before those of a matrix
        tokens, columns, rows = PartitionSpec(batch), PartitionSpec(*lead, None, "model"), PartitionSpec(*lead, "model")
        of_hidden, by_choice = PartitionSpec(batch, "model"), PartitionSpec(batch, None, None, "model")

        pairs = per_shard(functools.partial(sort_pairs, num_experts), (tokens, tokens), tokens)(chosen, live)
        run = per_shard(functools.partial(run_gate_and_up, gates[0]), (tokens, tokens, columns), of_hidden)
        hidden = run(x, pairs, (gates, ups))
        unpack = per_shard(as_chosen, (of_hidden, tokens, tokens), by_choice)
        pack = per_shard(functools.partial(as_sorted, gates[0]), (by_choice, tokens), of_hidden)
        hidden = tap("expert_hidden", hidden, lambda h: unpack(h, chosen, pairs), lambda h: pack(h, pairs))
        run = functools.partial(run_down, gates[0])
        run = per_shard(run, (of_hidden, tokens, tokens, rows), PartitionSpec("model", batch))
        return run(hidden, chosen, pairs, (downs,))


class Routed(NamedTuple):
    """A layer before its experts: what the rest of it needs."""

    resid_mid: jax.Array  # [B, T, D]
    normed: jax.Array  # [B, T, D], what router and experts read
    logits: jax.Array  # [B, T, E]
    chosen: jax.Array  # [B, T, K]
    gates: jax.Array  # [B, T, K]


class DecoderLayer(Module):
    """Attention and experts, each between two norms; in three pieces, so that streamed experts follow the routing."""

    @hk.name_like("__call__")
    def attend_and_route(self, x, cache: KVCache | None, positions: Positions) -> tuple[Routed, KVCache | None]:
        x = tap("resid_pre", x)
        attended, cache = Attention(self.config, "attention")(
            RMSNorm(self.config, "pre_attention_norm")(x), cache, positions
        )
        delta = RMSNorm(self.config, "post_attention_norm")(tap("attn_out", attended))
        x = tap("resid_mid", x + tap("attn_delta", delta))
        normed = RMSNorm(self.config, "pre_moe_norm")(x)
        return Routed(x, normed, *Router(self.config, "router")(normed)), cache

    @hk.name_like("__call__")
    def run_experts(self, routed: Routed, live) -> Float[Array, "P B T K D"]:
        return Experts(self.config, "experts")(routed.normed, routed.chosen, live)

    @hk.name_like("__call__")
    def add_experts(self, routed: Routed, parts: Float[Array, "P B T K D"]) -> Float[Array, "B T D"]:
        parts = tap("expert_out", parts, lambda parts: parts.sum(0), lambda out: out[None])
        mixed = jnp.einsum("btk,pbtkd->pbtd", routed.gates.astype(parts.dtype), parts, precision=HIGHEST)
        mixed = constrain(mixed.sum(0), "BTD")
        delta = RMSNorm(self.config, "post_moe_norm")(tap("moe_out", mixed))
        return tap("resid_post", routed.resid_mid + tap("moe_delta", delta))


class Embedding(Module):
    """The one table that reads tokens and predicts them."""

    def encode(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        rows = jnp.take(self.weight("w"), tokens, axis=0)
        rows = constrain(rows, "BTD")
        return tap("embed", rows * jnp.asarray(self.config.embedding_multiplier_scale, rows.dtype))

    @hk.name_like("__call__")
    def decode(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        x = tap("final_norm", RMSNorm(self.config, "final_norm")(x))
        # Not x @ w.T: of one row of 6144, XLA on CPU would lay the whole table out anew, 3.2 GB for every token.
        logits = jnp.einsum("btd,vd->btv", x, self.weight("w").astype(x.dtype), precision=HIGHEST)
        return tap("logits", logits * jnp.asarray(self.config.output_multiplier_scale, x.dtype))


# The network as pure functions of parameters, one dictionary for each layer and one for the embedding.


def _pure(method):
    """function(config, params, *inputs) from a function of (config, *inputs) that builds Haiku modules."""

    def apply(config: GrokConfig, params: Params, *inputs):
        return hk.without_apply_rng(hk.transform(lambda *args: method(config, *args))).apply(params, *inputs)

    return apply


embed = _pure(lambda config, tokens: Embedding(config, "embedding").encode(tokens))
unembed = _pure(lambda config, x: Embedding(config, "embedding").decode(x))

attend_and_route = _pure(lambda config, *inputs: DecoderLayer(config, "layer").attend_and_route(*inputs))
run_experts = _pure(lambda config, *inputs: DecoderLayer(config, "layer").run_experts(*inputs))
add_experts = _pure(lambda config, *inputs: DecoderLayer(config, "layer").add_experts(*inputs))


def layer(config: GrokConfig, params: Params, x, cache: KVCache | None, positions: Positions, live):
    """The three pieces in one: stream [B, T, D], cache, routing."""
    routed, cache = attend_and_route(config, params, x, cache, positions)
    return add_experts(config, params, routed, run_experts(config, params, routed, live)), cache, routed


def next_logprobs(config: GrokConfig, params: Params, x: Float[Array, "B T D"], following: Int[Array, "B T"]):
    """Log-probability [B, T], float32, of the token that follows each position."""

    def of(x, following):
        return logprob(unembed(config, params, x).astype(jnp.float32), following)

    if watched("final_norm", "logits"):
        return of(x, following)
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return of(x, following)  # XLA there widens a bfloat16 table, and holds that twice where a loop reads it
    shards = axis_size("data")
    rows = x.shape[:2] if shards > 1 else (1, following.size)  # in one shard a part takes rows of any prompts
    each = config.vocab_size * rows[0] // (shards * axis_size("model"))  # logits of a position on one device
    return in_parts(of, each, x.reshape(*rows, -1), following.reshape(rows)).reshape(following.shape)


def logprob(logits: Float[Array, "*B V"], ids: Int[Array, "*B"]) -> Float[Array, "*B"]:
    own = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def initial_params(config: GrokConfig, key: jax.Array) -> tuple[Params, list[Params]]:
    """Fresh float32 parameters: of the embedding, and of each layer."""
    ends = hk.transform(lambda x: Embedding(config, "embedding").decode(x))

    def whole(x):
        block = DecoderLayer(config, "layer")
        routed, _ = block.attend_and_route(x, None, Positions.of(config, jnp.zeros(1, jnp.int32), 1))
        return block.add_experts(routed, block.run_experts(routed, jnp.ones((1, 1), bool)))

    one = hk.transform(whole)
    key, *layer_keys = jax.random.split(key, config.num_layers + 1)
    x = jnp.zeros((1, 1, config.emb_size))
    init = jax.jit(one.init)
    return ends.init(key, x), [init(k, x) for k in layer_keys]
