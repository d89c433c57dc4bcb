"""The compiled steps of a run: embed, one layer, score a block of a prompt, read out the next token.

Each is jitted once per (configuration, captured taps, shapes); a layer's step serves every layer. In prefill captures
are outputs. In decode they are written into a donated buffer of COLUMNS positions per layer and tap, so that looking
costs no dispatch and no transfer a step; a full buffer is stacked over layers, and only that copy goes to the host.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grokscope.config import GrokConfig
from grokscope.model import transformer
from grokscope.model.taps import TAPS
from grokscope.run.hooks import with_hooks
from grokscope.run.sampling import Method, Sampling, choose

COLUMNS = 64  # decode steps between two transfers of captures


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What each slot feeds next.

    Attributes:
      tokens: the token drawn last.
      logprobs: its log-probability in nats, before temperature and filters.
      positions: where it stands in its sequence.
      live: whether the slot holds a sequence that is still running.
    """

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    positions: Int[Array, " B"]
    live: Bool[Array, " B"]

    @classmethod
    def idle(cls, slots: int) -> "DecodeState":
        zeros = jnp.zeros(slots, jnp.int32)
        return cls(zeros, zeros.astype(jnp.float32), zeros, zeros.astype(bool))


def position_axis(tap: str) -> int:
    """Axis of positions in a captured value, batch axis included."""
    return 1 + TAPS[tap].dims.index("T")


def _embed(config: GrokConfig, taps: tuple[str, ...], params, tokens: Int[Array, "B T"]):
    """Stream [B, T, D] before the first layer, and captures."""
    return with_hooks(transformer.embed, taps)(config, params, tokens)


def _layer(config: GrokConfig, taps: tuple[str, ...], params, x, cache, start, live):
    """One layer over a block x [B, T, D] at positions start [B] ...; live [B, T]. Stream, cache and captures."""
    (x, cache, _), captured = with_hooks(transformer.layer, taps)(config, params, x, cache, start, live)
    return x, cache, captured


embed = jax.jit(_embed, static_argnums=(0, 1))
layer = jax.jit(_layer, static_argnums=(0, 1), donate_argnums=(4,))


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(config: GrokConfig, taps: tuple[str, ...], params, x, following: Int[Array, "B T"]):
    """Log-probability [B, T] of each position's next token, and captures."""
    logits, captured = with_hooks(transformer.unembed, taps)(config, params, x)
    return _logprob(logits.astype(jnp.float32), following), captured


def _logprob(logits: Float[Array, "*B V"], ids: Int[Array, "*B"]) -> Float[Array, "*B"]:
    own = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4, 6))
def decode_layer(config: GrokConfig, taps: tuple[str, ...], params, x, cache, state: DecodeState, buffers, column):
    """`layer` for the one position [B, 1, D] of each slot; captures go into column `column` of the buffers."""
    x, cache, captured = _layer(config, taps, params, x, cache, state.positions, state.live[:, None])
    return x, cache, _written(buffers, captured, column)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def decode_embed(config: GrokConfig, taps: tuple[str, ...], params, state: DecodeState, buffers, column):
    x, captured = _embed(config, taps, params, state.tokens[:, None])
    return x, _written(buffers, captured, column)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(7,))
def readout(
    config: GrokConfig,
    taps: tuple[str, ...],
    method: Method,
    params,
    x,
    state: DecodeState,
    sampling: Sampling,
    buffers,
    column,
):
    """Draws the token after each row's position from the stream [B, 1, D]: next state, and buffers."""
    logits, captured = with_hooks(transformer.unembed, taps)(config, params, x)
    logits = logits[:, 0].astype(jnp.float32)
    tokens = choose(method, logits, state.positions + 1, sampling)
    state = DecodeState(tokens, _logprob(logits, tokens), state.positions + 1, state.live)
    return state, _written(buffers, captured, column)


def _written(buffers: dict, captured: dict, column) -> dict:
    return {
        tap: jax.lax.dynamic_update_slice_in_dim(buffers[tap], value, column, axis=position_axis(tap))
        for tap, value in captured.items()
    }


def buffer(config: GrokConfig, tap: str, slots: int, cache_length: int, dtype) -> jax.Array:
    """An empty capture buffer of one layer: the tap's dims behind the slots, COLUMNS positions."""
    lengths = config.dims | {"T": COLUMNS, "S": cache_length}
    return jnp.zeros((slots, *(lengths[d] for d in TAPS[tap].dims)), TAPS[tap].dtype or dtype)


@jax.jit
def stacked(layers: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """{tap: [L, B, ...]} from one dictionary a layer, as copies that the host may look at."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@jax.jit
def seated(state: DecodeState, first: DecodeState, slot) -> DecodeState:
    """`first` (of one row) in place of the slot."""
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one[0]), state, first)


@jax.jit
def retired(state: DecodeState, slot) -> DecodeState:
    """The slot idle: it runs on, but no expert runs for it."""
    return dataclasses.replace(state, live=state.live.at[slot].set(False))


@functools.partial(jax.jit, donate_argnums=(0,))
def seated_cache(cache: transformer.KVCache, row: transformer.KVCache, slot) -> transformer.KVCache:
    """The cache of one prompt, of the same length or shorter, in place of the slot's."""
    return jax.tree.map(lambda all_, one: jax.lax.dynamic_update_slice(all_, one, (slot, 0, 0, 0)), cache, row)
