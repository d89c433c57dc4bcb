"""The compiled steps of a run: embed, one layer, score a block of a prompt, read out the next token.

Each is jitted once per (configuration, stage of hooks, shapes); a layer's step serves every layer. In prefill captures
are outputs. In decode they are written into a donated buffer of COLUMNS positions per layer and capture, so that
looking costs no dispatch and no transfer a step; a full buffer is stacked over layers, and that copy goes to the host.
Pools, captures reduced over positions, go through the steps as the cache does.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grokscope.config import GrokConfig
from grokscope.model import transformer
from grokscope.model.sharding import constrain, on_one_device, whole
from grokscope.model.transformer import KVCache, Positions
from grokscope.run.hooks import At, EditKind, Stage, pieces, with_hooks
from grokscope.run.sampling import Method, Sampling, choose

COLUMNS = 64  # decode steps between two transfers of captures
FUNCTIONS = 32  # edits by functions whose steps are kept; each takes 8 MB with grok-1-mini on CPU


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
        zeros = np.zeros(slots, np.int32)  # nothing runs on one device alone between steps of several
        return cls(zeros, zeros.astype(np.float32), zeros, zeros.astype(bool))


def _embed(config: GrokConfig, stage: Stage, params, tokens: Int[Array, "B T"], start, live, pools, given):
    """Stream [B, T, D] before the first layer, its positions start [B] and on, and captures."""
    positions = Positions.of(config, start, tokens.shape[1])
    at = At(positions.numbers, tokens, live)
    x, captured = with_hooks(transformer.embed, stage)(given, pools, at, config, params, tokens)
    return x, positions, captured


def _attend(config: GrokConfig, stage: Stage, params, x, cache, positions: Positions, tokens, live, pools, given):
    """A layer up to its routing, over a block x [B, T, D]; tokens, live [B, T].

    What the experts need (Routed), cache, captures.
    """
    at = At(positions.numbers, tokens, live)
    run = with_hooks(transformer.attend_and_route, stage)
    (routed, cache), captured = run(given, pools, at, config, params, x, cache, positions)
    return routed, cache, captured


def _experts(config: GrokConfig, stage: Stage, params, routed, positions, tokens, live, pools, given):
    """Outputs of the chosen experts [P, B, T, K, D], in parts, and captures."""
    run = with_hooks(transformer.run_experts, stage)
    at = At(positions.numbers, tokens, live)
    return run(given, pools, at, config, params, routed, live, chosen=routed.chosen)


def _add(config: GrokConfig, stage: Stage, params, routed, parts, positions, tokens, live, pools, given):
    """Stream [B, T, D] after the layer, and captures."""
    run = with_hooks(transformer.add_experts, stage)
    at = At(positions.numbers, tokens, live)
    return run(given, pools, at, config, params, routed, parts, chosen=routed.chosen)


def _layer(config: GrokConfig, stage: Stage, params, x, cache, positions, tokens, live, pools, given):
    """One layer over a block: stream, cache, captures."""
    place = (positions, tokens, live, pools)
    (first, given_first), (second, given_second), (third, given_third) = pieces(stage, given)
    routed, cache, captured = _attend(config, first, params, x, cache, *place, given_first)
    parts, inside = _experts(config, second, params, routed, *place, given_second)
    x, behind = _add(config, third, params, routed, parts, *place, given_third)
    return x, cache, captured | inside | behind


embed = jax.jit(_embed, static_argnums=(0, 1))
layer = jax.jit(_layer, static_argnums=(0, 1), donate_argnums=(4,))
attend = jax.jit(_attend, static_argnums=(0, 1), donate_argnums=(4,))
experts = jax.jit(_experts, static_argnums=(0, 1))
add = jax.jit(_add, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def some_experts(config: GrokConfig, params, routed, live, which: Bool[Array, " E"], parts: Float[Array, "P B T K D"]):
    """`parts` with the outputs of the experts in `which` put in; of these alone the parameters are what they should."""
    own = (routed.chosen >= 0) & which[routed.chosen]
    only = routed._replace(chosen=jnp.where(own, routed.chosen, -1))
    return jnp.where(own[None, ..., None], transformer.run_experts(config, params, only, live), parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
    config: GrokConfig, stage: Stage, params, x, following: Int[Array, "B T"], positions, tokens, live, pools, given
):
    """Log-probability [B, T] of each position's next token, and captures."""
    at = At(positions.numbers, tokens, live)
    found, captured = with_hooks(transformer.next_logprobs, stage)(given, pools, at, config, params, x, following)
    return whole(found), captured


@functools.partial(jax.jit, static_argnums=(0, 1))
def lens(config: GrokConfig, k: int, params, x: Float[Array, "B T D"], following: Int[Array, "B T"]):
    """The k best next tokens at a stream, their log-probabilities, and the rank from 0 of the one that followed."""
    logits = transformer.unembed(config, params, x).astype(jnp.float32)
    values, best = jax.lax.top_k(logits, k)
    logprobs = values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, jnp.maximum(following, 0)[..., None], axis=-1)
    rank = jnp.sum(logits > own, axis=-1, dtype=jnp.int32)
    return best.astype(jnp.int32), logprobs, jnp.where(following < 0, -1, rank)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4, 7))
def decode_layers(
    config: GrokConfig,
    stage: Stage,
    params: list,
    x,
    caches: list[KVCache],
    positions,
    state: DecodeState,
    buffers: list[dict],
    given: list,
    column,
):
    """`layer` after layer, of the same hooks, for the one position [B, 1, D] of each slot; captures go into column
    `column` of a layer's buffers.
    """
    at = (positions, state.tokens[:, None], state.live[:, None])
    one = jax.jit(_layer, static_argnums=(0, 1))  # is traced once for all of them
    for i, own in enumerate(buffers):
        x, caches[i], captured = one(config, stage, params[i], x, caches[i], *at, own, given[i])
        buffers[i] = _written(stage, own, captured, column)
    return x, caches, buffers


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def decode_embed(config: GrokConfig, stage: Stage, params, state: DecodeState, buffers, given, column):
    tokens, live = state.tokens[:, None], state.live[:, None]
    x, positions, captured = _embed(config, stage, params, tokens, state.positions, live, buffers, given)
    return x, positions, _written(stage, buffers, captured, column)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(7,))
def readout(
    config: GrokConfig,
    stage: Stage,
    method: Method,
    params,
    x,
    state: DecodeState,
    sampling: Sampling,
    buffers,
    given,
    column,
):
    """Draws the token after each row's position from the stream [B, 1, D]: next state, and buffers."""
    at = At(state.positions[:, None], state.tokens[:, None], state.live[:, None])
    logits, captured = with_hooks(transformer.unembed, stage)(given, buffers, at, config, params, x)
    logits = logits[:, 0].astype(jnp.float32)
    tokens = choose(method, logits, state.positions + 1, sampling)
    state = DecodeState(tokens, transformer.logprob(logits, tokens), state.positions + 1, state.live)
    return jax.tree.map(whole, state), _written(stage, buffers, captured, column)


def _written(stage: Stage, buffers: dict, captured: dict, column) -> dict:
    """Captures of one position a slot in column `column`; pools as they have become."""
    axes = {key: kind.time_axis for kind in stage.captures for key in kind.in_step}
    return {
        key: value
        if axes[key] is None
        else jax.lax.dynamic_update_slice_in_dim(buffers[key], value, column, axis=axes[key])
        for key, value in captured.items()
    }


written = jax.jit(_written, static_argnums=0, donate_argnums=1)


@functools.partial(jax.jit, donate_argnums=(0,))
def noted(targets: Int[Array, "B N"], state: DecodeState, column) -> Int[Array, "B N"]:
    """The token that each row draws next, in column `column`: one for all, or [B]."""
    return targets.at[jnp.arange(len(targets)), column].set(state.tokens)


@jax.jit
def at_columns(targets: Int[Array, "B N"], where: Int[Array, "B P"]) -> Int[Array, "B P"]:
    """Some columns of each row."""
    return jnp.take_along_axis(targets, where, axis=1)


@jax.jit
def at_positions(x: Float[Array, "B T D"], where: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
    """One position of each row."""
    return constrain(jnp.take_along_axis(x, where[:, None, None], axis=1), "BTD")


@jax.jit
def stacked(captures: dict[str, list[jax.Array]]) -> dict[str, jax.Array]:
    """{key: [layers, B, ...]}, as copies that this host may look at: where there are several, whole ones."""
    here = whole if jax.process_count() > 1 else lambda x: x
    return {key: here(jnp.stack(layers)) for key, layers in captures.items()}


def gathered(captures: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Captures as this host may look at them; where there is one host, they are not copied."""
    return _everywhere(captures) if captures and jax.process_count() > 1 else captures


@jax.jit
def _everywhere(captures):
    return jax.tree.map(whole, captures)


@jax.jit
def glimpsed(buffers: list[jax.Array], slot, column) -> jax.Array:
    """One position [layers, ...] of a slot's buffers."""
    return whole(jnp.stack([buffer[slot, column] for buffer in buffers]))


@functools.partial(jax.jit, static_argnums=0)
def chosen_experts(num_experts: int, chosen: Int[Array, "B T K"], live: Bool[Array, "B T"]) -> Bool[Array, " E"]:
    """Which experts any live token takes."""
    return whole(jnp.any((chosen[..., None] == jnp.arange(num_experts)) & live[..., None, None], axis=(0, 1, 2)))


@jax.jit
def seated_pools(pools: list[dict], rows: list[dict], slot) -> list[dict]:
    """The pools of one prompt in place of the slot's."""
    return jax.tree.map(lambda all_, one: whole(all_.at[slot].set(one)), pools, rows)


@jax.jit
def taken(pools: list[dict], row) -> list[dict]:
    """The pools of a row, as copies."""
    return jax.tree.map(lambda all_: whole(all_[row]), pools)


@jax.jit
def seated(state: DecodeState, first: DecodeState, slot, row) -> DecodeState:
    """That row of `first` in place of the slot."""
    return jax.tree.map(lambda all_, rows: whole(all_.at[slot].set(rows[row])), state, first)


@jax.jit
def retired(state: DecodeState, slot) -> DecodeState:
    """The slot idle: it runs on, but no expert runs for it."""
    return dataclasses.replace(state, live=whole(state.live.at[slot].set(False)))


@functools.partial(jax.jit, static_argnums=4, donate_argnums=0)
def seated_cache(cache: KVCache, prefilled: KVCache, slot, row, rows: int) -> KVCache:
    """One row of the caches of that many prompts, of the same length or shorter, in place of the slot's."""

    def put(all_, own):
        groups, behind = len(own) // rows, [0] * (own.ndim - 1)  # of a row, where these are merged with B
        one = jax.lax.dynamic_slice_in_dim(own, row * groups, groups)
        return constrain(jax.lax.dynamic_update_slice(all_, one, (slot * groups, *behind)), "BGSC")

    return jax.tree.map(put, cache, prefilled)


def _compiled() -> dict[str, Any]:
    """The jitted functions of this module."""
    return {name: step for name, step in globals().items() if hasattr(step, "clear_cache")}


_met: set[EditKind] = set()


def make_room(functions: set[EditKind]) -> None:
    """Drops compiled steps where new edits by functions make too many with those before, as in a sweep. What runs again
    is read from the user's cache folder, where there is one."""
    if functions - _met and len(functions | _met) > FUNCTIONS + len(functions):
        _met.clear()
        for step in _compiled().values():
            step.clear_cache()
    _met.update(functions)


@functools.cache
def one_at_a_time() -> None:
    """From now on a step on a mesh is waited for before the next is dispatched: for meshes of CPU devices.

    Two steps in flight may wait for each other for ever: those of several processes because their collectives (gloo)
    have one channel for a set of devices, those of virtual devices where threads are few; accelerators run steps in
    order.
    """
    for name, step in _compiled().items():
        globals()[name] = _waited_for(step)


def _waited_for(step):
    @functools.wraps(step)
    def waited(*args):
        found = step(*args)
        return found if on_one_device() else jax.block_until_ready(found)

    vars(waited).update(lower=step.lower, clear_cache=step.clear_cache)  # compiled without being called, and dropped
    return waited
