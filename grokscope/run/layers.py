"""One layer over prompts, or over the slots of a decode step: one call a block, or, with streamed weights, in pieces.

Streamed, all the work of a layer is done while its weights are there: attention and routing of every block first, then
one expert after the other, each for the tokens that chose it, while the next is read; then what they add up to.
"""

import dataclasses

import jax
import numpy as np

from grokscope.checkpoint.weights import EXPERTS, Streamed, Weights
from grokscope.config import GrokConfig
from grokscope.model.sharding import zeros
from grokscope.model.transformer import ExpertList, KVCache, Params, Routed
from grokscope.run import steps
from grokscope.run.hooks import CaptureKind, Given, Stage, pieces

Captured = tuple[CaptureKind, str, jax.Array]


@dataclasses.dataclass(eq=False)
class Work:
    """What a layer does for one batch of rows: its blocks of positions in turn.

    Attributes:
      stage, given: its hooks at this layer.
      at: (positions, tokens, live) of each block.
      xs: the stream of each block, before the layer and then behind it.
      cache: of this layer.
      pools: captures reduced over positions, gone on with.
      captures: of each block, the others.
    """

    stage: Stage
    given: Given
    at: list[tuple]
    xs: list[jax.Array]
    cache: KVCache
    pools: dict
    captures: list[list[Captured]]

    def take(self, stage: Stage, captured: dict, block: int) -> None:
        pools, rest = split(stage, captured)
        self.pools |= pools
        self.captures[block] += rest


def split(stage: Stage, captured: dict) -> tuple[dict, list[Captured]]:
    """The pools among what a stage captured, and the rest of what is there (spare buffers are not)."""
    pools, rest = {}, []
    for kind in stage.captures:
        for key in kind.in_step:
            if kind.pooled:
                pools[key] = captured[key]
            elif key in captured:
                rest.append((kind, key, captured[key]))
    return pools, rest


def run_layer(config: GrokConfig, weights: Weights | Streamed, layer: int, works: list[Work]) -> None:
    """Layer number `layer` for all of them."""
    if isinstance(weights, Streamed):
        return _streamed(config, weights, layer, works)
    for work in works:
        for i, place in enumerate(work.at):
            work.xs[i], work.cache, captured = steps.layer(
                config, work.stage, weights.layers[layer], work.xs[i], work.cache, *place, work.pools, work.given
            )
            work.take(work.stage, captured, i)


def _streamed(config: GrokConfig, weights: Streamed, layer: int, works: list[Work]) -> None:
    params = weights.attention(layer)
    hooks = [pieces(work.stage, work.given) for work in works]
    routed = [_attended(config, params, work, own[0]) for work, own in zip(works, hooks, strict=True)]
    blocks = [(place, block) for work, own in zip(works, routed, strict=True) for place, block in zip(work.at, own)]
    taken = [steps.chosen_experts(config.num_experts, block.chosen, live) for (_, _, live), block in blocks]
    chosen = set(np.flatnonzero(np.any([np.asarray(of_block) for of_block in taken], axis=0)).tolist())
    if any(second[0] for _, second, _ in hooks):  # their hooks want to see all experts at once
        own = _all_experts(weights, layer, chosen)
        parts = [_hooked_experts(config, own, work, r, h[1]) for work, r, h in zip(works, routed, hooks, strict=True)]
    else:
        parts = _experts_in_turn(config, weights, layer, chosen, blocks, works)
    for work, of_work, own, (_, _, (stage, given)) in zip(works, routed, parts, hooks, strict=True):
        for i, (place, block) in enumerate(zip(work.at, of_work, strict=True)):
            work.xs[i], captured = steps.add(config, stage, params, block, own[i], *place, work.pools, given)
            work.take(stage, captured, i)


def _attended(config: GrokConfig, params: Params, work: Work, hooks: tuple[Stage, Given]) -> list[Routed]:
    stage, given = hooks
    routed = []
    for i, place in enumerate(work.at):
        block, work.cache, captured = steps.attend(
            config, stage, params, work.xs[i], work.cache, *place, work.pools, given
        )
        work.take(stage, captured, i)
        routed.append(block)
    return routed


def _all_experts(weights: Streamed, layer: int, chosen: set[int]) -> Params:
    """The chosen experts at once."""
    found = {e: own[EXPERTS] for numbers, own in weights.experts(layer, chosen) for e in numbers}
    any_one = next(iter(found.values()))
    numbers = range(len(any_one["gate"].experts))
    return {EXPERTS: {n: ExpertList(tuple(found.get(e, any_one)[n][e] for e in numbers)) for n in any_one}}


def _hooked_experts(config, params: Params, work: Work, routed: list[Routed], hooks) -> list[jax.Array]:
    stage, given = hooks
    found = []
    for i, (place, block) in enumerate(zip(work.at, routed, strict=True)):
        parts, captured = steps.experts(config, stage, params, block, *place, work.pools, given)
        work.take(stage, captured, i)
        found.append(parts)
    return found


def _experts_in_turn(config, weights: Streamed, layer: int, chosen: set[int], blocks, works) -> list[list[jax.Array]]:
    num_parts = 1 if weights.mesh is None else weights.mesh.shape["model"]
    parts = [zeros("PBTKD", (num_parts, *b.chosen.shape, config.emb_size), b.normed.dtype) for _, b in blocks]
    for numbers, params in weights.experts(layer, chosen):
        which = np.isin(np.arange(config.num_experts), numbers)
        for i, ((_, _, live), block) in enumerate(blocks):
            parts[i] = steps.some_experts(config, params, block, live, which, parts[i])
        jax.block_until_ready(parts)
    rest = iter(parts)
    return [[next(rest) for _ in work.at] for work in works]
