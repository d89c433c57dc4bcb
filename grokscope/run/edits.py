"""What to change of a run: values at taps, the choice of experts, any function of a tap.

An Edit is what a user wrote; it becomes Changes, one tap and one kind of operation each, for a model of a given size.
Changes of one kind that are about different prompts are stacked into one row each, so a batch may hold a different edit
per prompt, and only a new kind of edit compiles anything.
"""

import builtins
import dataclasses
import dis
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np

from grokscope.config import GrokConfig
from grokscope.model.taps import TAPS
from grokscope.model.transformer import MASKED
from grokscope.run.captures import AXIS, layers_of, tap_names
from grokscope.run.hooks import EditKind
from grokscope.run.selectors import EVERYWHERE, Where, as_json, chosen, from_json, parsed
from grokscope.run.trace import COORDINATES, Trace

CANCELLED = {"attn_out": "attn_delta", "moe_out": "moe_delta"}
"""A positive factor on these is undone by the norm that follows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """One edit as it was asked for.

    Attributes:
      op: the function of this module that made it: "scale", "route.ban", ...
      args: its arguments, selectors parsed.
      parts: ((tap, op, value), ...) it is made of; value is a float32 array, None, a Trace, or a function.
      layers, heads, experts, where: parsed selectors.
      positions: {target: source} of a patch.
    """

    op: str
    args: dict[str, Any]
    parts: tuple[tuple[str, str, Any], ...]
    layers: tuple[int, ...] | slice | None = None
    heads: tuple[int, ...] | slice | None = None
    experts: tuple[int, ...] | slice | None = None
    where: Where = EVERYWHERE
    positions: dict[int, int] | None = None

    def json(self) -> dict[str, Any]:
        """{"op": ..., its arguments}, and "taps" where a spelling means some. `from_json` goes back, unless it holds a
        Trace or a function.
        """
        given = {"op": self.op} | {n: _json(v) for n, v in self.args.items() if v is not None}
        return given | ({"taps": tap_names(given["tap"])} if given.get("tap", "") not in ("", *TAPS) else {})

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Edit":
        """The edit of a JSON object. Raises ValueError for one that held a Trace or a function."""
        args = {n: from_json(v) for n, v in value.items() if n not in ("op", "taps")}
        if value.get("op") not in _MAKERS:
            raise ValueError(f"edit {value.get('op')!r} cannot be read back; those that can are {', '.join(_MAKERS)}")
        return _MAKERS[value["op"]](**args)

    def __repr__(self) -> str:
        args = ", ".join(f"{n}={_json(v)!r}" for n, v in self.args.items() if v is not None)
        return f"{self.op}({args if len(args) <= 100 else args[:97] + '...'})"


def _json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if isinstance(value, Trace):
        digest = hashlib.sha256(json.dumps([value.tokens.tolist(), value.meta["edits"]]).encode())
        for name, held in value.taps.items():
            digest.update(name.encode() + np.ascontiguousarray(held).tobytes())
        return {"tokens": value.tokens.tolist(), "digest": digest.hexdigest()[:16]}
    if callable(value):
        return _function(value)
    if isinstance(value, dict):
        return {str(k): _json(v) for k, v in value.items()}
    return as_json(value)


def _function(fn: Callable, within: tuple[int, ...] = ()) -> str:
    """The name of a function, and a digest of what it does as far as can be seen: its code, and what it closes over.

    within: ids of the functions that lead to it.
    """
    if id(fn) in within:
        return "itself"
    code, within = getattr(fn, "__code__", None), (*within, id(fn))
    seen = [getattr(fn, name, None) for name in ("__defaults__", "__kwdefaults__", "func", "args", "keywords")]
    seen += [getattr(fn, "__dict__", {})] if code is None else [cell.cell_contents for cell in fn.__closure__ or ()]
    if isinstance(fn, MethodType):
        seen.append(getattr(fn.__self__, "__dict__", None))
    if code is not None:
        there = getattr(fn, "__globals__", {})
        seen.append({n: _global(fn, there[n], n, within) for n in _globals(code) if n in there})
    about = [None if code is None else _code(code), _seen(seen, within)]
    module, name = getattr(fn, "__module__", ""), getattr(fn, "__qualname__", type(fn).__qualname__)
    return f"{module}.{name} {hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]}"


def _seen(value: Any, within: tuple[int, ...]) -> Any:
    """What can be seen of a value, as JSON: arrays whole, which `repr` abridges, and functions in turn."""
    if isinstance(value, list | tuple):
        return [_seen(one, within) for one in value]
    if isinstance(value, Mapping):
        return [[repr(key), _seen(one, within)] for key, one in value.items()]
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return _seen(value.tolist(), within)
    if isinstance(value, np.ndarray | jax.Array):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return [str(value.dtype), [*value.shape], digest]
    if callable(value) and not isinstance(value, type):
        return _function(value, within)
    if type(value).__repr__ is object.__repr__ and hasattr(value, "__dict__"):  # which would tell its address
        return "itself" if id(value) in within else [type(value).__qualname__, _seen(vars(value), (*within, id(value)))]
    return repr(value)


def _globals(code: CodeType) -> list[str]:
    """Names that a function, or one inside it, looks up in its module."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return sorted(own.union(*(_globals(c) for c in code.co_consts if isinstance(c, CodeType))))


def _global(fn: Callable, value: Any, name: str, within: tuple[int, ...]) -> Any:
    """What can be seen of a global; of modules and what comes from elsewhere the name."""
    elsewhere = isinstance(value, ModuleType | type) or (
        callable(value) and getattr(value, "__module__", None) != fn.__module__
    )
    return name if elsewhere else _seen(value, within)


def _code(code: CodeType) -> list:
    """Of a function and the functions inside it."""
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), [*code.co_names], constants]


def _edit(op: str, parts, selectors: dict, **args) -> Edit:
    known = {"layers", "heads", "experts", "positions", "steps", "phase", "prompts"}
    if unknown := {*selectors} - known:
        raise TypeError(f"{op} has no {min(unknown)!r}; selectors are {', '.join(sorted(known))}")
    cuts = {name: parsed(name, selectors.get(name)) for name in ("layers", "heads", "experts")}
    rest = {name: selectors.get(name) for name in ("positions", "steps", "phase", "prompts")}
    where = Where.parse(**rest)
    given = {f.name: getattr(where, f.name) for f in dataclasses.fields(where)}
    return Edit(op, cuts | given | args, tuple(parts), **cuts, where=where)


def _number(name: str, value: Any) -> np.ndarray:
    """A value as float32, a copy: an edit stays what it was made. Raises TypeError for what is not real numbers."""
    try:
        if value is None or np.iscomplexobj(value):
            raise TypeError("no real number")
        array = np.array(value, np.float32)
    except (TypeError, ValueError) as err:
        raise TypeError(f"{name}={value!r}: expected a number or an array of numbers") from err
    if np.isnan(array).any():
        raise ValueError(f"{name} holds NaN")
    return array


def scale(tap: str, factor: float, **selectors) -> Edit:
    """The tap times a factor, or an array that fits its axes behind the position.

    Selectors of every edit: layers, heads, experts, positions, steps, phase, prompts; each an int, a list or a slice.
    """
    array = _number("factor", factor)
    for name in CANCELLED.keys() & tap_names(tap) if np.any(array != 0) else ():
        instead = CANCELLED[name]
        warnings.warn(f"the norm after {name} undoes a positive factor; scale {instead} instead", stacklevel=2)
    return _edit("scale", [(tap, "scale", array)], selectors, tap=tap, factor=array)


def add(tap: str, vector, **selectors) -> Edit:
    """The tap plus a vector (steering), or a number. Selectors: see scale."""
    array = _number("vector", vector)
    return _edit("add", [(tap, "add", array)], selectors, tap=tap, vector=array)


def set(tap: str, value, **selectors) -> Edit:
    """The tap replaced by a value that fits its axes behind the position. Selectors: see scale."""
    array = _number("value", value)
    return _edit("set", [(tap, "set", array)], selectors, tap=tap, value=array)


def patch(trace: Trace, tap: str, *, positions=None, **selectors) -> Edit:
    """The tap as another Trace has it, at the same positions, or at those of a map {position: position there}.

    Without `positions`, where the other Trace is shorter, what is behind its end stays as it is.
    The Trace must hold the tap at the layers and heads that are patched. Negative positions count from the end of the
    prompt on either side. A patch of expert_index comes among edits of `route` in the order given, and as with
    `route.swap` gates stay; patch expert_gate too to bring theirs along. Raises KeyError for a tap that was not
    captured.
    """
    if not isinstance(trace, Trace):
        raise TypeError(f"patch takes a Trace; got {type(trace).__name__}")
    if isinstance(positions, str) and positions == "last":
        positions = -1
    if positions is not None and not isinstance(positions, slice | Mapping):
        numbers = parsed("positions", positions)
        positions = {p: p for p in numbers} if isinstance(numbers, tuple) else None
    sources = dict(positions) if positions is not None and not isinstance(positions, slice) else None
    where = list(sources) if sources is not None else positions
    if sources is not None and any(
        isinstance(p, bool) or not isinstance(p, int | np.integer) for p in [*sources, *sources.values()]
    ):
        raise TypeError(f"positions={positions!r}: a map is from ints to ints")
    made = _edit("patch", [(tap, "set", trace)], selectors | {"positions": where}, trace=trace, tap=tap)
    args = made.args | ({"positions": sources} if sources else {})
    return dataclasses.replace(made, args=args, positions=sources)


def ablate(**selectors) -> Edit:
    """What heads (attn_z), experts (expert_out; nobody replaces them) or whole layers (both deltas) give, zeroed."""
    zero, parts = np.zeros((), np.float32), []
    if selectors.get("heads") is not None:
        parts.append(("attn_z", "scale", zero))
    if selectors.get("experts") is not None:
        parts.append(("expert_out", "scale", zero))
    if not parts and selectors.get("layers") is not None:
        parts = [("attn_delta", "scale", zero), ("moe_delta", "scale", zero)]
    made = _edit("ablate", parts, selectors)  # TypeError: a selector that is none
    if not parts:
        raise ValueError("ablate needs heads=, experts= or layers=")
    return made


def edit(tap: str, fn: Callable, **selectors) -> Edit:
    """fn(value, layer, positions) -> value at a tap: jax, on one row without batch axis, compiled once for each fn.

    value has the dims of the tap; layer is an int32 scalar (-1 at taps without layers); positions is int32 [T]. A
    prompt comes padded, its positions -1 there, and a long one in blocks; a generated token comes alone, and S is the
    room for keys. So fn works position by position, or leaves out what is at -1: a mean over positions is
    `jnp.mean(value, 0, where=positions[:, None] >= 0)`. What fn closes over, its globals and attributes are as they are
    when a call begins. Give the same function object again, not a new lambda, to compile nothing. Selectors: see scale.
    """
    try:
        inspect.signature(fn).bind(None, None, None)
    except TypeError as err:
        raise TypeError(f"fn={fn!r}: expected a function of (value, layer, positions)") from err
    except ValueError:  # one that does not tell
        pass
    return _edit("edit", [(tap, "edit", fn)], selectors, tap=tap, fn=fn)


class route:  # noqa: N801  a namespace: gs.route.ban
    """Edits of the choice of experts. All take layers, positions, steps, phase and prompts.

    They apply in the order given; ban and bias come before the choice, the others after it. Gates are what expert
    outputs are weighted with.
    """

    @staticmethod
    def force(experts, **selectors) -> Edit:
        """Exactly these run. They share the mass of the router's own choice in proportion to their probabilities."""
        experts = parsed("experts", experts)
        if experts is None:
            raise ValueError("experts=None: force needs the experts that are to run")
        return _edit("route.force", [("expert_index", "force", experts)], _but_experts(selectors), experts=experts)

    @staticmethod
    def ban(experts, **selectors) -> Edit:
        """Their logits become -inf; the next expert enters, and probabilities are of those left."""
        cut = _but_experts(selectors) | {"experts": experts}
        return _edit("route.ban", [("router_logits", "set", np.array(-np.inf, np.float32))], cut)

    @staticmethod
    def bias(logits, **selectors) -> Edit:
        """Router logits plus a number an expert, [E]."""
        array = _number("logits", logits)
        return _edit("route.bias", [("router_logits", "add", array)], selectors, logits=array)

    @staticmethod
    def swap(a: int, b: int, **selectors) -> Edit:
        """Where a was chosen b runs, and where b was chosen a; gates stay."""
        pair = parsed("a, b", (a, b))
        return _edit("route.swap", [("expert_index", "swap", pair)], _but_experts(selectors), a=a, b=b)

    @staticmethod
    def top_k(n: int, **selectors) -> Edit:
        """The n most probable experts run, fewer or more than the model's own K."""
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f"n={n!r}: expected a whole number from 1")
        return _edit("route.top_k", [("expert_index", "top_k", int(n))], _but_experts(selectors), n=int(n))

    @staticmethod
    def gates(kind: str, **selectors) -> Edit:
        """Gates "uniform" over the chosen experts, or "renormalised" to a sum of 1."""
        if kind not in ("uniform", "renormalised"):
            raise ValueError(f'gates({kind!r}): expected "uniform" or "renormalised"')
        return _edit("route.gates", [("expert_index", kind, None)], _but_experts(selectors), kind=kind)


def _but_experts(selectors: dict) -> dict:
    for name in ("experts", "heads"):
        if name in selectors:
            raise TypeError(f"this edit of routing takes no {name}= as a selector")
    return selectors


_MAKERS: dict[str, Callable[..., Edit]] = {
    "scale": scale, "add": add, "set": set, "ablate": ablate,
    **{f"route.{n}": getattr(route, n) for n in ("force", "ban", "bias", "swap", "top_k", "gates")},
}  # fmt: skip


# For a model.


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """One operation at one tap of one model.

    Attributes:
      kind: as the compiler sees it.
      layers: where, or None at a tap without layers.
      mask: bool over the axis of the kind, or over the experts that "force" names.
      value: float32 scalar or of the tap's dims without T; int for routing; or a Source.
      where: positions and prompts.
    """

    kind: EditKind
    layers: tuple[int, ...] | None
    mask: np.ndarray | None
    value: Any
    where: Where

    def table(self, prompt_length: int, length: int) -> np.ndarray:
        """int32 [length]: which of its values applies at each position, -1 for none."""
        if isinstance(self.value, Source):
            return self.value.table(self.where, prompt_length, length)
        return np.where(self.where.mask(prompt_length, length), 0, -1).astype(np.int32)

    def values(self, layer: int | None, num_keys: int, width: int) -> np.ndarray | None:
        """[N, ...]: the values the table points at, one for all experts as often as a token may take one (`width`)."""
        if isinstance(self.value, Source):
            return self.value.at(layer, num_keys)
        if self.value is None:
            return None
        value = np.asarray(self.value)[None]
        return np.repeat(value, width, self._rank_axis) if self.experts == 1 else value

    @property
    def experts(self) -> int:
        """How many chosen experts of a token its values are for; 0 where they are not by expert."""
        if not self._rank_axis or self.kind.routes:
            return 0
        if isinstance(self.value, Source):
            trace, tap = self.value.trace, self.value.tap
            return trace.taps[tap].shape[trace.dims[tap].index("K")]
        return np.shape(self.value)[self._rank_axis - 1] if np.ndim(self.value) else 0

    @property
    def _rank_axis(self) -> int:
        """Of [N, ...]; 0 where there is none."""
        return TAPS[self.kind.tap].dims.replace("T", "").find("K") + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Values of another Trace at one tap: [N, ...] at the positions it holds."""

    trace: Trace
    tap: str
    held: dict[int, int]  # position there -> which of N
    positions: dict[int, int] | None

    def table(self, where: Where, prompt_length: int, length: int) -> np.ndarray:
        table = np.full(length, -1, np.int32)
        if self.positions is None:
            for position in np.flatnonzero(where.mask(prompt_length, length)):
                table[position] = self.held.get(int(position), -1)
            return table
        there = self.trace.prompt_length
        allowed = dataclasses.replace(where, positions=None).mask(prompt_length, length)
        seen: dict[int, int] = {}
        for given, source in self.positions.items():
            target = given + prompt_length if given < 0 else given
            source = source + there if source < 0 else source
            if target in seen:
                raise ValueError(
                    f"the patch names one position twice: {seen[target]} and {given} of a prompt of {prompt_length} "
                    "tokens"
                )
            seen[target] = given
            if source not in self.held:
                raise ValueError(
                    f"the patch reads position {source} of a Trace that holds {_range(self.held)} of {self.tap}"
                )
            if 0 <= target < length and allowed[target]:
                table[target] = self.held[source]
        return table

    def at(self, layer: int | None, num_keys: int) -> np.ndarray:
        dims = TAPS[self.tap].dims
        value = self.trace[self.tap] if layer is None else self.trace[self.tap, layer]
        value = np.moveaxis(value, dims.index("T"), 0)
        if "S" in dims:
            spare = [(0, 0)] * (value.ndim - 1) + [(0, max(num_keys - value.shape[-1], 0))]
            value = np.pad(value, spare, constant_values=MASKED if self.tap == "attn_scores" else 0)[..., :num_keys]
        for axis, dim in enumerate("T" + dims.replace("T", "")):
            numbers = self.trace.numbers.get(self.tap, {}).get(dim)
            if dim not in "TS" and numbers is not None:  # heads or experts, in the order of the capture
                value = np.take(value, np.argsort(numbers), axis=axis)
        return value


def _range(held: Iterable[int]) -> str:
    numbers = sorted(held)
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"


def changes(edits: Iterable[Edit], config: GrokConfig) -> tuple[Change, ...]:
    """The changes that edits make to a model of this size, in order.

    Raises KeyError for an unknown tap, TypeError or ValueError for what the model does not have or a value that does
    not fit.
    """
    made = []
    for one in edits:
        if not isinstance(one, Edit):
            raise TypeError(
                f"{one!r} is not an edit; make one with grokscope.scale, add, set, patch, ablate, route or edit"
            )
        for tap, op, value in one.parts:
            for name, layers in layers_of(tap, one.layers, config).items():
                made.append(_change(one, name, op, value, layers, config))
    return tuple(made)


def _change(one: Edit, tap: str, op: str, value, layers, config: GrokConfig) -> Change:
    if op in ("force", "swap", "top_k", "uniform", "renormalised"):
        return _route(op, value, layers, one.where, config)
    if tap == "expert_index" and not isinstance(value, Trace):
        raise ValueError("expert_index is edited by grokscope.route (force, ban, swap, top_k)")
    if tap == "expert_index" and one.experts is not None:
        raise ValueError("a patch of expert_index is of all experts that a token takes; leave experts= away")
    axis, mask = _masked(one, tap, config)
    fn = value if op == "edit" else None
    if isinstance(value, Trace):
        value = _source(value, tap, layers, axis, mask, one.positions, config)
    elif fn is not None:
        value = None
    elif value.ndim:
        rest = TAPS[tap].dims.replace("T", "")
        if "S" in rest:
            raise ValueError(f"{op} of {tap} takes one number; use grokscope.edit for a pattern of your own")
        behind = len(rest) - rest.find("K")  # axes from that of a token's experts on: one value for all, or some
        own = value.shape[-behind] if "K" in rest and value.ndim >= behind else 1
        shape = tuple(own if d == "K" else config.dims[d] for d in rest)
        try:
            value = np.broadcast_to(value, shape)
        except ValueError as err:
            raise ValueError(
                f"{op} of {tap}: a value of shape {value.shape} does not fit {shape} ({' '.join(rest)})"
            ) from err
    does = "" if fn is None else _function(fn)
    return Change(EditKind(tap, op, axis, fn, does), layers, mask, value, one.where)


def _route(op: str, value, layers, where: Where, config: GrokConfig) -> Change:
    mask, count = None, config.num_experts
    if op == "force":
        mask = np.zeros(count, bool)
        mask[list(chosen("experts", value, count, "this model"))] = True
        value = None
    elif op == "swap":
        a, b = chosen("experts", value, count, "this model")
        value = np.arange(count, dtype=np.int32)
        value[[a, b]] = b, a
    elif op == "top_k":
        if value > count:
            raise ValueError(f"top_k({value}): this model has {count} experts")
        value = np.int32(value)
    return Change(EditKind("expert_index", op), layers, mask, value, where)


def _masked(one: Edit, tap: str, config: GrokConfig) -> tuple[str | None, np.ndarray | None]:
    """The axis an edit cuts, and which of it: heads are H or G, experts E, or K where they were chosen."""
    dims, found = TAPS[tap].dims, (None, None)
    for name in ("heads", "experts"):
        selector = getattr(one, name)
        if selector is None or (one.op == "ablate" and name == ("experts" if tap == "attn_z" else "heads")):
            continue
        axes = [d for d in dims if AXIS.get(d) == name] or (["E"] if name == "experts" and "K" in dims else [])
        if not axes:
            raise ValueError(f"{tap} has no {name}; its axes are {', '.join(COORDINATES[d] for d in dims)}")
        mask = np.zeros(config.dims[axes[0]], bool)
        mask[list(chosen(name, selector, len(mask), "this model"))] = True
        found = axes[0], mask
    return found


def _source(trace: Trace, tap: str, layers, axis, mask, positions, config: GrokConfig) -> Source:
    dims = TAPS[tap].dims
    kept = trace.coords(tap)  # KeyError: not captured
    absent = [layer for layer in layers or () if layer not in trace.layers[tap]]
    if absent:
        raise KeyError(f"the Trace to patch from lacks layer {absent[0]} of {tap}; it has {trace.layers[tap]}")
    if tap == "expert_index" and (number := trace.meta["config"]["num_experts"]) != config.num_experts:
        raise ValueError(
            f"the Trace to patch from is of a model of {number} experts, and this one has {config.num_experts}"
        )
    for dim, numbers in zip("L" * TAPS[tap].layered + dims, kept.values(), strict=True):
        whole = len(trace) if dim in "TS" else config.dims.get(dim)
        if dim not in "LTK" and len(numbers) != whole:
            raise ValueError(
                f"the Trace to patch from has {len(numbers)} of {tap}'s {COORDINATES[dim]}s, and this model {whole}; "
                "capture all"
            )
    return Source(trace, tap, {int(p): i for i, p in enumerate(kept["position"])}, positions)


def refuse_impossible_routes(made: Iterable[Change], config: GrokConfig, prompts: Iterable[tuple[int, int]]) -> None:
    """Raises ValueError where bans leave a token fewer experts than it takes, or one is both forced and banned there.

    prompts: (prompt length, tokens that may follow) of each of the call.
    """
    about = [change for change in made if change.kind.op in ("force", "top_k") or _bans(change)]
    prompts = list(prompts) if any(map(_bans, about)) else []
    seen: builtins.set[tuple] = builtins.set()
    for prompt, (length, limit) in enumerate(prompts):
        own = [change for change in about if change.where.takes(prompt, len(prompts))]
        if (key := (length, limit, *map(id, own))) in seen:
            continue
        seen.add(key)
        on = {change: change.table(length, length + limit) >= 0 for change in own}
        alike: dict[tuple, tuple[int, list[Change]]] = {}  # layers of the same changes, by the first of them
        for layer in range(config.num_layers):
            here = [change for change in own if layer in change.layers]
            alike.setdefault(tuple(map(id, here)), (layer, here))
        for layer, here in alike.values():
            _refuse_impossible(here, on, layer, length + limit, config)


def _refuse_impossible(here: list[Change], on: dict[Change, np.ndarray], layer: int, length: int, config) -> None:
    """Of the changes of one layer; `on`: at which positions each applies."""
    banned, takes = np.zeros((length, config.num_experts), bool), np.full(length, config.num_selected_experts)
    for change in here:
        if _bans(change):
            banned |= on[change][:, None] & (True if change.mask is None else change.mask)
        else:  # of a token that is sent somewhere the router's own choice is of no use
            takes = np.where(on[change], change.value if change.kind.op == "top_k" else 0, takes)
    left = config.num_experts - banned.sum(1)
    if (left < takes).any():
        at = int(np.argmax(left < takes))
        raise ValueError(f"these bans leave {left[at]} experts in layer {layer}; a token takes {takes[at]}")
    for change in here:
        if change.kind.op == "force":
            both = np.flatnonzero((on[change][:, None] & banned & change.mask).any(0))
            if len(both):
                raise ValueError(f"expert {both[0]} is both forced and banned in layer {layer}")


def _bans(change: Change) -> bool:
    value = change.value
    is_number = not isinstance(value, Source) and np.ndim(value) == 0
    return change.kind.tap == "router_logits" and change.kind.op == "set" and is_number and bool(np.isneginf(value))
