"""Which stage each step of a run has, and its arrays for the rows at hand.

A prompt has the hooks that are about it. The decode step has those that may be about any prompt of the call, so that it
is the same function whoever sits in its slots, and a call that goes on where another stopped computes the same bits.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from grokscope.config import GrokConfig
from grokscope.model.sharding import replicated, zeros
from grokscope.model.taps import TAPS
from grokscope.run.captures import Kept
from grokscope.run.edits import Change, Source
from grokscope.run.hooks import PLAIN, CaptureKind, Given, Stage, stage

IN_DECODE = 16  # widths of the stream that are small

Place = int | str  # a layer, "embed" or "head"


class Sequence(NamedTuple):
    """What hooks need to know of a prompt: its length, and the tokens that may follow."""

    prompt_length: int
    limit: int

    @property
    def longest(self) -> int:
        return self.prompt_length + self.limit


class Staged(NamedTuple):
    """A stage with its arrays."""

    stage: Stage
    given: Given


BARE = Staged(PLAIN, Given())


class Hooked(NamedTuple):
    """The stages of a pass.

    draw: the edits of the head alone, for drawing the token after a prompt.
    cut: captures of which a step gives only the positions that are kept.
    """

    embed: Staged
    layers: list[Staged]
    head: Staged
    draw: Staged
    cut: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked:
    """Changes of one kind that are about different prompts, in one instance of the kind."""

    changes: list[tuple[frozenset[int], Change]]

    def of(self, prompt: int | None) -> Change | None:
        return next((change for prompts, change in self.changes if prompt in prompts), None)


def places_of(hook: Kept | Change) -> tuple[Place, ...]:
    """Where it is: its layers, or an end."""
    tap = hook.tap if isinstance(hook, Kept) else hook.kind.tap
    return ("embed" if tap == "embed" else "head",) if hook.layers is None else tuple(hook.layers)


class Hooks:
    """The captures and edits of one call.

    Attributes:
      kept, by_key, width: what is kept, the same by its key, and how many experts a token may take.
      functions: the kinds of edits that are functions of the user's.
    """

    def __init__(
        self, config: GrokConfig, kept: tuple[Kept, ...], changes: tuple[Change, ...], sequences: list[Sequence]
    ):
        self.config, self.kept, self.sequences = config, kept, sequences
        self.width = max([config.num_selected_experts, *map(_experts_needed, changes)])
        for change in changes:
            if change.experts > self.width:
                raise ValueError(
                    f"an edit of {change.kind.tap} is for {change.experts} experts a token, and this run takes "
                    f"{self.width}; put grokscope.route.top_k({change.experts}) beside it"
                )
        self.functions = {change.kind for change in changes if change.kind.fn}
        self._wider = self.width > config.num_selected_experts
        self.places: list[Place] = ["embed", *range(config.num_layers), "head"]
        self.by_key = {k.key: k for k in kept}
        self._captured = {place: [k for k in kept if self.captures(k, place)] for place in self.places}
        self._after = {k.key for k in kept if self.reaches(k)[1]}
        self._edits = self._stacked(changes)
        self._decode = {place: self._decode_stage(place) for place in self.places}

    def _stacked(self, changes: tuple[Change, ...]) -> dict[Place, list[Stacked]]:
        """A change joins an earlier one of its kind if no prompt has both, nor one at the same tap in between."""
        found: dict[Place, list[Stacked]] = {place: [] for place in self.places}
        everyone = frozenset(range(len(self.sequences)))
        for change in changes:
            prompts = everyone
            if change.where.prompts is not None:
                prompts = frozenset(p for p in everyone if change.where.takes(p, len(everyone)))
            for place in places_of(change):
                for stacked in reversed(found[place]):
                    first = stacked.changes[0][1]
                    apart = all(prompts.isdisjoint(others) for others, _ in stacked.changes)
                    if first.kind == change.kind and _shape(first) == _shape(change) and apart:
                        stacked.changes.append((prompts, change))
                        break
                    if first.kind.tap == change.kind.tap and not apart:
                        found[place].append(Stacked([(prompts, change)]))
                        break
                else:
                    found[place].append(Stacked([(prompts, change)]))
        return found

    # Which

    def captures(self, kept: Kept, place: Place, decode: bool = False) -> bool:
        """Whether a step captures it there: what is small in all layers, to be dropped where it is not kept, so that
        layers of which different things are kept are one compiled step.

        One token has little to drop, beside the weights that its step reads; so in decode nearly all is small.
        """
        if place in places_of(kept) or kept.layers is None or kept.pooled or not isinstance(place, int):
            return place in places_of(kept)
        sizes = self.dims(kept) | {"T": 1, "S": max(s.longest for s in self.sequences)}
        of_token = math.prod(sizes[d] for d in TAPS[kept.tap].dims)
        return of_token <= self.config.emb_size * (IN_DECODE if decode else 1)

    def takes(self, kept: Kept, prompt: int) -> bool:
        return kept.where.takes(prompt, len(self.sequences))

    def reaches(self, kept_or_change: Kept | Change) -> tuple[bool, bool]:
        """Whether it may be about any position of any prompt, and of any generated token, of this call."""
        before = after = False
        for prompt, sequence in enumerate(self.sequences):
            if kept_or_change.where.takes(prompt, len(self.sequences)):
                mask = _reach(kept_or_change, sequence)
                before |= bool(mask[: sequence.prompt_length].any())
                after |= bool(mask[sequence.prompt_length :].any())
            if before and after:
                break
        return before, after

    def _decode_stage(self, place: Place) -> tuple[Stage, list[Kept], list[Stacked]]:
        if not any(s.limit for s in self.sequences):
            return PLAIN, [], []
        kept = [k for k in self.kept if k.key in self._after and self.captures(k, place, decode=True)]
        edits = [e for e in self._edits[place] if any(self.reaches(change)[1] for _, change in e.changes)]
        return self._stage([self._kind(k, cut=False) for k in kept], edits), kept, edits

    def _stage(self, kinds: list[CaptureKind], edits: list[Stacked]) -> Stage:
        changes = [e.changes[0][1].kind for e in edits]
        chooses = any(kind.tap == "expert_index" for kind in changes)
        width = self.width if self._wider or chooses else 0
        return stage(tuple(kinds), tuple(changes), width) if kinds or changes else PLAIN

    def _kind(self, kept: Kept, cut: bool) -> CaptureKind:
        k = kept.k if kept.reduce in ("topk", "lens") else 0
        outputs, dims = tuple(kept.outputs()), tuple(dims for dims, _ in self.in_step(kept).values())
        return CaptureKind(kept.key, kept.tap, outputs, dims, kept.reduce, k, kept.axis, kept.classes, cut)

    # For rows

    def prefill(self, rows: list[int | None], length: int) -> Hooked:
        """The stages of prompts that run together, or of nothing in a row; `length`: positions of their cache."""
        prompts = [prompt for prompt in rows if prompt is not None]
        memo: dict = {}
        wanted: dict[str, tuple[CaptureKind, dict]] = {}
        for kept in self.kept:
            if any(len(self.prompt_positions(kept, prompt)) for prompt in prompts):
                kind = self._kind(kept, self.cut(kept, prompts))
                padded = self.padded_positions(kept.key, rows) if kind.positions else None
                wanted[kept.key] = kind, self._given_capture(kept, rows, length, padded, memo)
        staged: dict[Place, Staged] = {}
        for place in self.places:
            captures = [wanted[kept.key] for kept in self._captured[place] if kept.key in wanted]
            kinds, given = [kind for kind, _ in captures], tuple(of_kind for _, of_kind in captures)
            edits = [e for e in self._edits[place] if any(self._edits_prompt(e, prompt) for prompt in prompts)]
            edit_given = tuple(self._given_edit(e, place, rows, length, memo) for e in edits)
            staged[place] = Staged(self._stage(kinds, edits), Given(given, edit_given))
            if place == "head":
                draw = Staged(self._stage([], edits), Given((), edit_given))
        layers = [staged[i] for i in range(self.config.num_layers)]
        cut = frozenset(key for key, (kind, _) in wanted.items() if kind.positions)
        return Hooked(staged["embed"], layers, staged["head"], draw, cut)

    def prompt_positions(self, kept: Kept, prompt: int) -> np.ndarray:
        """Positions of the prompt that are kept."""
        if not self.takes(kept, prompt):
            return np.zeros(0, np.int32)
        length = self.sequences[prompt].prompt_length
        return np.flatnonzero(kept.where.mask(length, length)).astype(np.int32)

    def cut(self, kept: Kept, prompts: list[int]) -> bool:
        """Whether a step gives only the positions that are kept of prompts that run together, and not all."""
        wanted = max(len(self.prompt_positions(kept, prompt)) for prompt in prompts)
        return not kept.pooled and _bucket(wanted) < max(self.sequences[prompt].prompt_length for prompt in prompts)

    def padded_positions(self, key: str, rows: list[int | None]) -> np.ndarray:
        """Positions [B, P] of the prompts that are kept, as many as are compiled for, -1 behind."""
        empty = np.zeros(0, np.int32)
        positions = [empty if prompt is None else self.prompt_positions(self.by_key[key], prompt) for prompt in rows]
        padded = np.full((len(rows), _bucket(max(map(len, positions)))), -1, np.int32)
        for row, own in zip(padded, positions, strict=True):
            row[: len(own)] = own
        return padded

    @property
    def lenses(self) -> bool:
        """Whether a capture needs to know which token follows."""
        return any(kept.reduce == "lens" for kept in self.kept)

    def _edits_prompt(self, edit: Stacked, prompt: int) -> bool:
        change, length = edit.of(prompt), self.sequences[prompt].prompt_length
        return change is not None and bool((change.table(length, length) >= 0).any())

    def decode(self, slots: list[int | None], length: int) -> Hooked:
        """The stages of a decode step; slots hold prompts, or nothing."""
        memo: dict = {}
        staged = {}
        for place, (of_place, kept, edits) in self._decode.items():
            captures = tuple(self._given_capture(k, slots, length, None, memo) for k in kept)
            staged[place] = Staged(
                of_place, Given(captures, tuple(self._given_edit(e, place, slots, length, memo) for e in edits))
            )
        return Hooked(staged["embed"], [staged[i] for i in range(self.config.num_layers)], staged["head"], BARE)

    def _given_capture(self, kept: Kept, rows, length: int, positions: np.ndarray | None, memo: dict) -> dict[str, Any]:
        if kept.key not in memo:
            given: dict[str, Any] = {}
            if kept.axis:
                given["numbers"] = np.array(kept.numbers, np.int32)
            if positions is not None:
                given["positions"] = positions
            if kept.pooled:
                table = np.zeros((len(rows), length), bool)
                for row, prompt in enumerate(rows):
                    if prompt is not None and self.takes(kept, prompt):
                        table[row] = kept.where.mask(self.sequences[prompt].prompt_length, length)
                given["table"] = table
            if kept.labels is not None:
                given["labels"] = kept.labels
            memo[kept.key] = replicated(given)
        return memo[kept.key]

    def _given_edit(self, edit: Stacked, place: Place, rows, length: int, memo: dict) -> dict[str, Any]:
        changes = [None if prompt is None else edit.of(prompt) for prompt in rows]
        model = edit.changes[0][1]
        layer = place if isinstance(place, int) else None
        key = (*map(id, changes), id(model.kind), layer if isinstance(model.value, Source) else None)
        if key not in memo:
            memo[key] = replicated(self._edit_arrays(model, changes, layer, rows, length))
        own = {} if model.kind.fn is None else {"layer": np.int32(-1 if layer is None else layer)}
        return memo[key] | own

    def _edit_arrays(self, model: Change, changes, layer: int | None, rows, length: int) -> dict[str, np.ndarray]:
        table = np.full((len(rows), length), -1, np.int32)
        for row, (prompt, change) in enumerate(zip(rows, changes, strict=True)):
            if change is not None:
                table[row] = change.table(self.sequences[prompt].prompt_length, length)
        given = {"table": table}
        if model.mask is not None:
            given["mask"] = np.stack([np.zeros_like(model.mask) if c is None else c.mask for c in changes])
        filled = [(change or model) for change in changes]
        if model.kind.routes:
            if model.value is not None:
                given["value"] = np.stack([np.asarray(change.value) for change in filled])
        elif model.kind.fn is None:
            values = [np.asarray(change.values(layer, length, self.width)) for change in filled]
            count = _bucket(max(map(len, values)))
            given["value"] = np.stack([np.pad(v, [(0, count - len(v))] + [(0, 0)] * (v.ndim - 1)) for v in values])
        return given

    # Shapes

    def dims(self, kept: Kept) -> dict[str, int]:
        return kept.sizes(self.config) | ({"K": self.width} if self._wider else {})

    def pool(self, kept: Kept, rows: int) -> Any:
        """An empty pool, on the host: nothing runs on one device alone between steps of several."""
        if kept.reduce == "count":
            sizes = self.dims(kept)
            return np.zeros((rows, *([kept.classes] if kept.classes else []), sizes["E"]), np.int32)
        shape = (rows, *(self.dims(kept)[d] for d in TAPS[kept.tap].dims if d != "T"))
        means = [np.zeros(shape, np.float32) for _ in range(1 + (kept.reduce == "moments"))]
        return (np.zeros(rows, np.float32), *means)

    def pools(self, stage: Stage, rows: int) -> dict[str, Any]:
        """The empty pools of a stage."""
        return {kind.key: self.pool(self.by_key[kind.key], rows) for kind in stage.captures if kind.pooled}

    def in_step(self, kept: Kept) -> dict[str, tuple[str, str | None]]:
        """{key: (dims, dtype)} of what a step gives of a capture that is not pooled."""
        if kept.reduce == "lens":
            return {kept.key: (TAPS[kept.tap].dims, None)}
        return kept.outputs()

    def buffers(self, place: Place, slots: int, columns: int, length: int, dtype) -> dict[str, Any]:
        """Empty capture buffers and pools of the decode step at one place."""
        of_place, kept, _ = self._decode[place]
        made = self.pools(of_place, slots)
        for k in kept:
            if place in places_of(k):
                made |= self._zeros(k, slots, columns, length, dtype)
        return made

    def dropped(self) -> list[list[str]]:
        """What a decode step gives of each layer that is not kept of it."""
        return [[key for k in of_layer for key in self.in_step(k)] for of_layer in self._dropped()]

    def spares(self, slots: int, columns: int, length: int, dtype) -> dict[str, Any]:
        """Capture buffers for what is dropped, for layers to share."""
        made = {}
        for kept in {k.key: k for of_layer in self._dropped() for k in of_layer}.values():
            made |= self._zeros(kept, slots, columns, length, dtype)
        return made

    def _dropped(self) -> list[list[Kept]]:
        layers = range(self.config.num_layers)
        return [[k for k in self._decode[layer][1] if layer not in k.layers] for layer in layers]

    def _zeros(self, kept: Kept, slots: int, columns: int, length: int, dtype) -> dict[str, Any]:
        shapes = self.buffer_shapes(kept, slots, columns, length, dtype)
        return {key: zeros(*of_key) for key, of_key in shapes.items()}

    def buffer_shapes(self, kept: Kept, slots: int, columns: int, length: int, dtype) -> dict[str, tuple]:
        """{key: (dims, shape, dtype)} of a capture's buffers at one place; none of a pool."""
        if kept.pooled:
            return {}
        sizes = self.dims(kept) | {"B": slots, "T": columns, "S": length}
        return {
            key: ("B" + dims, tuple(sizes[d] for d in "B" + dims), own or dtype)
            for key, (dims, own) in self.in_step(kept).items()
        }


def _experts_needed(change: Change) -> int:
    if change.kind.op == "force":
        return int(np.sum(change.mask))
    return int(change.value) if change.kind.op == "top_k" else 0


def _shape(change: Change) -> tuple[int, ...]:
    """Of the values a change holds. Another Trace's are for layer after layer, as many as it has positions, and like no
    others but those for as many experts.
    """
    return (-1, change.experts) if isinstance(change.value, Source) else np.shape(change.value)


def _reach(hook: Kept | Change, sequence: Sequence) -> np.ndarray:
    if isinstance(hook, Kept):
        return hook.where.mask(sequence.prompt_length, sequence.longest)
    return hook.table(sequence.prompt_length, sequence.longest) >= 0


def _bucket(count: int) -> int:
    """A length to compile for: the power of two that holds it."""
    return 1 << max(count - 1, 0).bit_length()


def misses(hooks: Hooks, found: tuple[Kept | Change, ...]) -> Iterator[Kept | Change]:
    """Those that are about no position of any prompt of the call."""
    return (one for one in found if not any(hooks.reaches(one)))
