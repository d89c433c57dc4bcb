"""How captures and edits enter a function that is being compiled.

What is static (which taps, which reduction, which kind of edit) is a Stage; what may change without compiling anew
(which heads and positions, edit values, tables a row) is a pytree of arrays, `given`. `with_hooks(fn, stage)` runs fn
with an observer installed, which edits a tap before anything else sees it, and returns captures as outputs of the one
jitted function. With an empty stage the traced function is the plain one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from grokscope.model.sharding import constrain, whole
from grokscope.model.taps import TAPS, observed


@dataclasses.dataclass(frozen=True)
class CaptureKind:
    """A capture as the compiler sees it: it gives `outputs`, or a pool that is called `key`.

    dims: of what a step gives, without batch and layer; those of `in_step` in turn.
    positions: whether a prompt's are cut to those in given["positions"].
    """

    key: str
    tap: str
    outputs: tuple[str, ...]
    dims: tuple[str, ...] = ()
    reduce: str | None = None
    k: int = 0
    axis: str | None = None
    classes: int = 0
    positions: bool = False

    @property
    def pooled(self) -> bool:
        return self.reduce in POOLS

    @property
    def in_step(self) -> tuple[str, ...]:
        """Keys of what a step gives: of pools and of a lens, which is read out later, one value."""
        return (self.key,) if self.pooled or self.reduce == "lens" else self.outputs

    @property
    def time_axis(self) -> int | None:
        """Axis of positions in what a step gives, batch axis included; None for a pool."""
        return None if self.pooled else 1 + TAPS[self.tap].dims.index("T")


@dataclasses.dataclass(frozen=True)
class EditKind:
    """An edit as the compiler sees it: `op` at `tap`, of part of `axis` or all of it. fn: of op "edit"; `does`: a
    digest of what it does, for one that closes over what has changed is another.
    """

    tap: str
    op: str
    axis: str | None = None
    fn: Callable | None = None
    does: str = ""

    @property
    def routes(self) -> bool:
        return self.op in ROUTES


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """The hooks of one compiled step, made by `stage`. `width`: experts a token may take; 0 leaves that to the model.

    Equal ones are one object, so that a dispatch need not compare them.
    """

    captures: tuple[CaptureKind, ...]
    edits: tuple[EditKind, ...]
    width: int

    def __bool__(self) -> bool:
        return bool(self.captures or self.edits or self.width)


@functools.lru_cache(maxsize=4096)
def stage(captures: tuple[CaptureKind, ...] = (), edits: tuple[EditKind, ...] = (), width: int = 0) -> Stage:
    return Stage(captures, edits, width)


PLAIN = stage()


class At(NamedTuple):
    """Where a step stands: positions and tokens [B, T], and which of them are live."""

    positions: Int[Array, "B T"]
    tokens: Int[Array, "B T"]
    live: Bool[Array, "B T"]


class Given(NamedTuple):
    """What a stage takes besides: one dictionary for each of its captures and of its edits.

    captures: "numbers" int32 [n] of the cut axis; "positions" int32 [B, P] kept of prompts; of pooled ones "table"
      bool [B, length] of the positions that count, and "labels" int32 [V].
    edits: "table" int32 [B, length]: which of N values applies at a position, -1 for none; "mask" bool [B, axis];
      "value" [B, N, ...]; "layer" int32.
    """

    captures: tuple[dict, ...] = ()
    edits: tuple[dict, ...] = ()


PIECES = ("expert_gate", "expert_hidden", "logits")
"""A layer runs in pieces, so that streamed experts can follow the routing: the last tap of each."""


def pieces(of_layer: Stage, given: Given) -> list[tuple[Stage, Given]]:
    """The hooks of a layer, in three: before its experts, inside them, and behind."""
    order = list(TAPS)
    ends = [order.index(tap) for tap in PIECES]

    def inside(piece: int, kind) -> bool:
        return (ends[piece - 1] if piece else -1) < order.index(kind.tap) <= ends[piece]

    found = []
    for piece in range(len(PIECES)):
        captures = [(kind, g) for kind, g in zip(of_layer.captures, given.captures, strict=True) if inside(piece, kind)]
        edits = [(kind, g) for kind, g in zip(of_layer.edits, given.edits, strict=True) if inside(piece, kind)]
        kinds = [tuple(kind for kind, _ in hooks) for hooks in (captures, edits)]
        own = stage(*kinds, of_layer.width if piece == 0 or any(kinds) else 0)
        found.append((own, Given(tuple(g for _, g in captures), tuple(g for _, g in edits))))
    return found


def with_hooks(fn: Callable, stage: Stage) -> Callable:
    """function(given, pools, at, *args, chosen=None) -> (fn(*args), {key: captured}).

    Captured values have the dims of Kept.outputs behind a batch axis, those of several outputs as a tuple; pooled ones
    are the pools of that name gone on with. `chosen`: the experts, where the routing is not part of fn.
    """
    if not stage:
        return lambda given, pools, at, *args, chosen=None: (fn(*args), {})

    def hooked(given: Given, pools: dict, at: At, *args, chosen=None):
        observer = _Observer(stage, given, pools, at)
        if chosen is not None:
            observer.seen["expert_index"] = chosen
        with observed(observer):
            result = fn(*args)
        return result, observer.captured

    return hooked


class _Observer:
    def __init__(self, stage: Stage, given: Given, pools: dict, at: At):
        self.stage, self.pools, self.at = stage, pools, at
        self.captures = list(zip(stage.captures, given.captures, strict=True))
        self.edits = list(zip(stage.edits, given.edits, strict=True))
        self.choice = [(kind, g) for kind, g in self.edits if kind.tap == "expert_index"]
        self.seen: dict[str, jax.Array] = {}
        self.captured: dict[str, Any] = {}
        self.names = {kind.tap for kind in (*stage.captures, *stage.edits)}
        if stage.width:
            self.names |= {"router_logits", "router_probs", "expert_index", "expert_gate"}
        if any(kind.axis == "E" for kind in stage.edits):
            self.names.add("expert_index")

    def wants(self, name: str) -> bool:
        return name in self.names

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        if name == "expert_index" and self.stage.width:
            value, self.gates = self._routed(value)
        elif name == "expert_gate" and self.stage.width:
            value = self.gates
        for kind, given in self.edits:
            if kind.tap == name != "expert_index":
                value = _edited(kind, given, value, self.at, self.seen.get("expert_index"))
        if name == "expert_gate" and self.stage.width:  # -1 has no gate
            value = jnp.where(self.seen["expert_index"] >= 0, value, 0)
        if name.startswith(("router", "expert_index")):
            self.seen[name] = value
        for kind, given in self.captures:
            if kind.tap == name:
                found = self._captured(kind, given, value)
                several = found if isinstance(found, tuple) and not kind.pooled else (found,)
                self.captured |= zip(kind.in_step, self._laid_out(kind, several), strict=True)
        return value

    def _laid_out(self, kind: CaptureKind, values: tuple) -> list:
        """On a mesh, where the next step and the buffers expect them."""
        if kind.pooled:
            return [jax.tree.map(whole, value) for value in values]
        return [constrain(value, "B" + dims) for value, dims in zip(values, kind.dims or [""], strict=True)]

    def _captured(self, kind: CaptureKind, given: dict, value: jax.Array):
        if "K" in TAPS[kind.tap].dims and kind.tap.startswith("expert_") and self.stage.width:
            chosen = self.seen["expert_index"]
            value = value if kind.tap == "expert_index" else jnp.where(_beside(chosen >= 0, value), value, 0)
        dims = TAPS[kind.tap].dims
        if kind.reduce == "count":
            return POOLS["count"](kind, given, self.pools[kind.key], value, self._counted(given))
        if kind.reduce == "topk" and "S" in dims:
            value = jnp.where(jnp.arange(value.shape[-1]) <= self.at.positions[:, None, :, None], value, -jnp.inf)
        if kind.positions:
            axis = 1 + dims.index("T")
            inside = jnp.clip(given["positions"] - self.at.positions[:, :1], 0, value.shape[axis] - 1)
            shape = [len(inside)] + [inside.shape[1] if d == axis else 1 for d in range(1, value.ndim)]
            value = jnp.take_along_axis(value, inside.reshape(shape), axis)
        if kind.axis:
            value = jnp.take(value, given["numbers"], axis=1 + dims.index(kind.axis))
        if kind.pooled:
            return POOLS[kind.reduce](kind, given, self.pools[kind.key], value, self._counted(given))
        return REDUCE[kind.reduce](kind, value) if kind.reduce else value

    def _counted(self, given: dict) -> tuple[Array, At]:
        """Which positions [B, T] a pool takes."""
        return jnp.take_along_axis(given["table"], self.at.positions, axis=1) & self.at.live, self.at

    def _routed(self, index: Int[Array, "B T K"]) -> tuple[Array, Array]:
        """Chosen experts and gates after edits of the choice, [B, T, width]; -1 and 0 where a token takes fewer."""
        logits, probs = self.seen["router_logits"], self.seen["router_probs"]
        gates = jnp.take_along_axis(probs, index, axis=-1)
        wider = ((0, 0), (0, 0), (0, max(self.stage.width - index.shape[-1], 0)))
        index, gates = jnp.pad(index, wider, constant_values=-1), jnp.pad(gates, wider)
        for kind, given in self.choice:
            if not kind.routes:  # a patch
                index = _edited(kind, given, index, self.at, index)
                gates = jnp.where(index >= 0, gates, 0)
                continue
            on = jnp.take_along_axis(given["table"], self.at.positions, axis=1)[..., None] >= 0
            new_index, new_gates = ROUTES[kind.op](given, index, gates, logits, probs)
            index, gates = jnp.where(on, new_index, index), jnp.where(on, new_gates, gates)
        return index, gates


# Reductions of each position.


def _entropy(kind: CaptureKind, value: Array) -> Array:
    if kind.tap == "router_logits":
        value = jax.nn.softmax(value, axis=-1)
    return -jnp.sum(jax.scipy.special.xlogy(value, value), axis=-1)


def _topk(kind: CaptureKind, value: Array) -> tuple[Array, Array]:
    values, numbers = jax.lax.top_k(value.astype(jnp.float32), kind.k)
    if "S" in TAPS[kind.tap].dims:  # keys that are not there yet
        there = values > -jnp.inf
        values, numbers = jnp.where(there, values, 0), jnp.where(there, numbers, -1)
    return numbers.astype(jnp.int32), values


REDUCE: dict[str, Callable] = {
    "norm": lambda kind, value: jnp.linalg.norm(value.astype(jnp.float32), axis=-1),
    "entropy": _entropy,
    "topk": _topk,
    "lens": lambda kind, value: value,  # as it is: read out with the target once that is known (steps.lens)
}


# Reductions over positions. A pool is (number of positions [B] and float32 mean [B, ...]), with "moments" the sum of
# squared deviations too, merged as in Chan, Golub and LeVeque (1979); or int32 counts.


def _positions_last(kind: CaptureKind, on: Bool[Array, "B T"], value: Array) -> tuple[Array, Array]:
    """The value [B, T, ...] in float32, and `on` of the same rank."""
    value = jnp.moveaxis(value.astype(jnp.float32), 1 + TAPS[kind.tap].dims.index("T"), 1)
    return value, _beside(on, value)


def _moments(kind: CaptureKind, given: dict, pool: tuple, value: Array, counted) -> tuple:
    value, on = _positions_last(kind, counted[0], value)
    number, mean, *spread = pool
    new = jnp.sum(counted[0], axis=1).astype(jnp.float32)
    total = number + new
    own_mean = jnp.sum(jnp.where(on, value, 0), axis=1) / _beside(jnp.maximum(new, 1), mean)
    share = _beside(new / jnp.maximum(total, 1), mean)
    merged = (total, mean * (1 - share) + own_mean * share)  # not mean + delta * share: a banned logit is -inf in both
    if not spread:
        return merged
    delta = own_mean - mean
    own = jnp.sum(jnp.where(on, jnp.square(value - own_mean[:, None]), 0), axis=1)
    return (*merged, spread[0] + own + jnp.square(delta) * share * _beside(number, mean))


def _count(kind: CaptureKind, given: dict, pool: Array, index: Int[Array, "B T K"], counted) -> Array:
    on, at = counted
    chose = (index[..., None] == jnp.arange(pool.shape[-1])) & on[..., None, None]
    chose = jnp.sum(chose, axis=2, dtype=jnp.int32)  # [B, T, E]
    if not kind.classes:
        return pool + jnp.sum(chose, axis=1)
    is_class = given["labels"][at.tokens][..., None] == jnp.arange(kind.classes)
    return pool + jnp.einsum("btc,bte->bce", is_class.astype(jnp.int32), chose)


POOLS: dict[str, Callable] = {"mean": _moments, "moments": _moments, "count": _count}


# Edits.


def _beside(small: Array, large: Array) -> Array:
    """`small` with axes of length 1 behind its own, of the rank of `large`."""
    return small.reshape(small.shape + (1,) * (large.ndim - small.ndim))


OPS: dict[str, Callable] = {
    "scale": lambda value, given: value * given,
    "add": lambda value, given: value + given,
    "set": lambda value, given: jnp.broadcast_to(given, value.shape),
}


def _edited(kind: EditKind, given: dict, value: Array, at: At, chosen: Array | None) -> Array:
    dims = TAPS[kind.tap].dims
    t_axis = 1 + dims.index("T")
    which = jnp.take_along_axis(given["table"], at.positions, axis=1)  # [B, T]
    moved = jnp.moveaxis(value, t_axis, 1)  # [B, T, ...]
    on = _beside(which >= 0, moved)
    if kind.axis:
        on = on & _axis_mask(kind, given["mask"], moved, dims, chosen)
    if "S" in dims:
        keys = jnp.arange(value.shape[-1])
        on = on & (keys <= _beside(at.positions, moved))
    if kind.fn is not None:
        positions = jnp.where(at.live, at.positions, -1)
        try:
            new = jax.vmap(kind.fn, in_axes=(0, None, 0))(value, given["layer"], positions)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as err:
            raise TypeError(
                f"the function of an edit of {kind.tap} is compiled, so its arguments have no values yet: use "
                "jax.numpy instead of numpy, and jax.numpy.where instead of `if`"
            ) from err
        if getattr(new, "shape", None) != value.shape:
            found = None if new is None else jnp.shape(new)[1:]
            raise ValueError(
                f"the function of an edit of {kind.tap} returned {found}; expected the shape it got, "
                f"{value.shape[1:]} ({' '.join(dims)})"
            )
        new = jnp.moveaxis(new, t_axis, 1)
    else:
        rows = jnp.arange(which.shape[0])[:, None]
        picked = given["value"][rows, jnp.maximum(which, 0)]  # [B, T] or [B, T, ...]
        if picked.ndim == moved.ndim and "K" in dims:
            picked, on = _of_as_many(kind, picked, on, moved)
        new = OPS[kind.op](moved.astype(picked.dtype), picked if picked.ndim == moved.ndim else _beside(picked, moved))
    return jnp.moveaxis(jnp.where(on, new.astype(value.dtype), moved), 1, t_axis)


def _of_as_many(kind: EditKind, picked: Array, on: Array, moved: Array) -> tuple[Array, Array]:
    """Values for the first of the experts that a token may take here. Of the others gates and outputs stay as they are;
    as an index they become -1, nobody.
    """
    given, taken = picked.shape[2], moved.shape[2]
    spare = [(0, taken - given) if axis == 2 else (0, 0) for axis in range(moved.ndim)]
    picked = jnp.pad(picked, spare, constant_values=-1 if kind.tap == "expert_index" else 0)
    if kind.tap == "expert_index":
        return picked, on
    return picked, on & (jnp.arange(taken) < given).reshape([-1 if axis == 2 else 1 for axis in range(moved.ndim)])


def _axis_mask(kind: EditKind, mask: Bool[Array, "B n"], moved: Array, dims: str, chosen) -> Array:
    """The mask [B, n] of heads or experts, spread over a value [B, T, ...]."""
    rest = dims.replace("T", "")
    if kind.axis in rest:
        shape = [mask.shape[0]] + [1] * (moved.ndim - 1)
        shape[2 + rest.index(kind.axis)] = mask.shape[1]
        return mask.reshape(shape)
    rows = jnp.arange(mask.shape[0])[:, None, None]
    return _beside(mask[rows, jnp.maximum(chosen, 0)] & (chosen >= 0), moved)  # K for E: the expert that was chosen


def _force(given: dict, index, gates, logits, probs):
    """Exactly the experts of a mask [B, E], most probable first; they share the mass of what was chosen before."""
    values, forced = jax.lax.top_k(jnp.where(given["mask"][:, None], logits, -jnp.inf), index.shape[-1])
    valid = values > -jnp.inf
    share = jnp.sum(gates, axis=-1, keepdims=True) * jax.nn.softmax(values, axis=-1)
    return jnp.where(valid, forced, -1), jnp.where(valid, share, 0)


def _top(given: dict, index, gates, logits, probs):
    """The n [B] most probable experts."""
    values, best = jax.lax.top_k(probs, index.shape[-1])
    valid = (jnp.arange(index.shape[-1]) < given["value"][:, None, None]) & (values > 0)
    return jnp.where(valid, best, -1), jnp.where(valid, values, 0)


def _swap(given: dict, index, gates, logits, probs):
    """Experts renamed by a table [B, E]; each keeps the gate of the one that was chosen."""
    rows = jnp.arange(index.shape[0])[:, None, None]
    return jnp.where(index >= 0, given["value"][rows, jnp.maximum(index, 0)], -1), gates


def _uniform(given: dict, index, gates, logits, probs):
    chosen = index >= 0
    return index, chosen / jnp.maximum(jnp.sum(chosen, axis=-1, keepdims=True), 1).astype(gates.dtype)


def _renormalised(given: dict, index, gates, logits, probs):
    return index, gates / jnp.sum(gates, axis=-1, keepdims=True)


ROUTES: dict[str, Callable] = {
    "force": _force, "top_k": _top, "swap": _swap, "uniform": _uniform, "renormalised": _renormalised,
}  # fmt: skip
