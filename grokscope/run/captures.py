"""What to keep of a run: taps by name, glob or TransformerLens spelling, cut by selectors, reduced on the device.

`capture` states a wish; `resolve` turns wishes into `Kept` for a model of a given size, or says what is wrong with
them. How a Kept enters a compiled step is the matter of grokscope.run.hooks.
"""

import dataclasses
import difflib
import fnmatch
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from grokscope.config import GrokConfig
from grokscope.model.taps import TAPS
from grokscope.run.selectors import EVERYWHERE, Where, as_json, chosen, parsed
from grokscope.run.trace import COORDINATES

ROUTING = ("router_logits", "expert_index", "expert_gate")
"""Kept with whatever is asked for: 3 KiB a token at full size. Indices do not follow from edited logits."""

TRANSFORMER_LENS = {
    "hook_embed": "embed",
    "hook_resid_pre": "resid_pre",
    "attn.hook_q": "q",
    "attn.hook_rot_q": "q",
    "attn.hook_k": "k",
    "attn.hook_rot_k": "k",
    "attn.hook_v": "v",
    "attn.hook_attn_scores": "attn_scores",
    "attn.hook_pattern": "attn_pattern",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "mlp.hook_expert_weights": "router_probs",
    "mlp.hook_expert_indices": "expert_index",
    "hook_mlp_out": "moe_out",
    "hook_resid_post": "resid_post",
    "ln_final.hook_normalized": "final_norm",
}
"""Spellings accepted, behind `blocks.3.` where the tap has layers. They mean what TAPS says: q and k are rotated,
attn_out and moe_out come before the norm that follows them."""

AXIS = {"H": "heads", "G": "heads", "E": "experts"}
"""Axes that a selector cuts."""


MOST_KEYS = 32  # of an attention row's "topk": no cache is shorter


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A smaller thing to keep than the tap itself.

    Attributes:
      meaning: one line.
      taps: those it makes sense of.
      outputs: {suffix of the key: (its dims from the tap's, dtype or None for the run's)}.
      pooled: over positions, prompt and generated together; else each position has its own.
    """

    meaning: str
    taps: tuple[str, ...]
    outputs: dict[str, tuple[Callable[[str], str], str]]
    pooled: bool = False


def _without_positions(dims: str) -> str:
    return dims.replace("T", "")


_VECTORS = tuple(name for name, tap in TAPS.items() if tap.dims[-1] in "DCF")
_STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")
_POOLED = tuple(name for name, tap in TAPS.items() if "S" not in tap.dims and tap.dtype != "int32")

REDUCTIONS: dict[str, Reduction] = {
    "norm": Reduction("length of each vector", _VECTORS, {"": (lambda d: d[:-1], "float32")}),
    "entropy": Reduction(
        "entropy in nats of each attention row, or of the router's distribution",
        ("attn_pattern", "router_logits", "router_probs"),
        {"": (lambda d: d[:-1], "float32")},
    ),
    "topk": Reduction(
        "numbers and values of the k largest along the last axis, largest first",
        ("attn_pattern", "attn_scores", "router_logits", "router_probs", "logits"),
        {"": (lambda d: d[:-1] + "N", "int32"), "_value": (lambda d: d[:-1] + "N", "float32")},
    ),
    "lens": Reduction(
        "logit lens: the k best tokens, their log-probabilities, and the rank of the one that came next (-1: none did)",
        _STREAM,
        {"": (lambda d: "TN", "int32"), "_logprob": (lambda d: "TN", "float32"), "_rank": (lambda d: "T", "int32")},
    ),
    "mean": Reduction("mean over positions", _POOLED, {"": (_without_positions, "float32")}, pooled=True),
    "moments": Reduction(
        "mean and variance over positions",
        _POOLED,
        {"": (lambda d: "M" + _without_positions(d), "float32")},
        pooled=True,
    ),
    "count": Reduction(
        "how often each expert was chosen, in all or per class of token", ("expert_index",),
        {"": (lambda d: "E", "int32")}, pooled=True,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Capture:
    """A wish, made by `capture`."""

    tap: str
    layers: tuple[int, ...] | slice | None = None
    heads: tuple[int, ...] | slice | None = None
    experts: tuple[int, ...] | slice | None = None
    where: Where = EVERYWHERE
    reduce: str | None = None
    k: int = 5
    labels: np.ndarray | None = None
    later: bool = False
    name: str | None = None

    def json(self) -> dict[str, Any]:
        """What was asked for; labels as their number of classes and a digest."""
        found = {n: as_json(getattr(self, n)) for n in ("layers", "heads", "experts", "reduce", "name")}
        found |= self.where.json() | {
            "later": self.later or None,
            "k": self.k if self.reduce in ("topk", "lens") else None,
        }
        if self.labels is not None:
            digest = hashlib.sha256(np.ascontiguousarray(self.labels, np.int64).tobytes()).hexdigest()[:16]
            found |= {"classes": int(self.labels.max()) + 1, "labels": digest}
        return {"tap": self.tap} | {n: v for n, v in found.items() if v is not None}


def capture(
    tap: str,
    *,
    layers=None,
    heads=None,
    experts=None,
    positions=None,
    steps=None,
    phase=None,
    prompts=None,
    reduce: str | None = None,
    k: int = 5,
    labels=None,
    later: bool = False,
    name: str | None = None,
) -> Capture:
    """A tap to keep, or a part of it, or a reduction of it.

    Args:
      tap: a name of grokscope.TAPS, a glob, or a TransformerLens spelling.
      layers, heads, experts, positions, steps, phase, prompts: an int, a list or a slice each. `heads` are key-value
        heads for k and v. `positions` may be negative, from the end of the prompt, or "last", its last one; `steps`
        count generated tokens from 0; `phase` is "prefill" or "decode"; `prompts` are numbers in the call.
      reduce: computed on the device: a name of grokscope.REDUCTIONS. The Trace has it as "tap.reduce".
      k: how many "topk" and "lens" keep.
      labels: for "count": int [V], a class from 0 for each token of the vocabulary, counted apart; -1 is not counted.
      later: for "attn_pattern": keep q and k, from which `trace.attention` computes rows when they are looked at.
      name: the key in the Trace, where two captures would have the same.

    Raises:
      TypeError, ValueError: a selector or a reduction that is none.
    """
    if reduce is not None and reduce not in REDUCTIONS:
        near = difflib.get_close_matches(str(reduce), REDUCTIONS, n=1) or REDUCTIONS
        raise ValueError(f"no reduction {reduce!r}; nearest: {', '.join(near)}")
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k={k!r}: expected a whole number from 1")
    if not isinstance(later, bool):
        raise TypeError(f"later={later!r}: expected True or False")
    if later and (tap_names(tap) != ["attn_pattern"] or reduce):
        raise ValueError('later=True is for a plain "attn_pattern": it keeps q and k in its place')
    return Capture(
        tap, parsed("layers", layers), parsed("heads", heads), parsed("experts", experts),
        Where.parse(positions, steps, phase, prompts), reduce, int(k), _labels(labels, reduce), later, name,
    )  # fmt: skip


def _labels(labels, reduce: str | None) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(labels)
    ints = reduce == "count" and labels.ndim == 1 and labels.size and labels.dtype.kind in "iu"
    if not ints or not 0 <= int(labels.max()) < 2**31:
        raise ValueError('labels are for reduce="count": ints, one class from 0 for each token of the vocabulary')
    return labels.astype(np.int32)


Wish = str | Capture


def as_captures(wishes: Wish | Iterable[Wish] | None) -> tuple[Capture, ...]:
    """What a user gives as `capture=`, as captures. Raises TypeError for anything else."""
    wishes = () if wishes is None else wishes
    wishes = tuple(wishes) if isinstance(wishes, Iterable) and not isinstance(wishes, str) else (wishes,)
    for wish in wishes:
        if not isinstance(wish, str | Capture):
            raise TypeError(f"capture={wish!r}: expected names of taps or grokscope.capture(...)")
    return tuple(Capture(w) if isinstance(w, str) else w for w in wishes)


def tap_names(spelling: str) -> list[str]:
    """Taps that a spelling means, whatever its layer. Raises KeyError naming the nearest."""
    return list(dict.fromkeys(tap for tap, _ in _spelled(spelling, 1000)))


def _spelled(spelling: str, num_layers: int) -> list[tuple[str, int | None]]:
    """(tap, layer or None for all) that a name, a glob or a TransformerLens spelling means."""
    if spelling in TAPS:
        return [(spelling, None)]
    found: list[tuple[str, int | None]] = [(tap, None) for tap in TAPS if fnmatch.fnmatchcase(tap, str(spelling))]
    for own, tap in TRANSFORMER_LENS.items():
        if not TAPS[tap].layered:
            found += [(tap, None)] * fnmatch.fnmatchcase(own, str(spelling))
            continue
        layers = [i for i in range(num_layers) if fnmatch.fnmatchcase(f"blocks.{i}.{own}", str(spelling))]
        found += [(tap, None)] if len(layers) == num_layers else [(tap, i) for i in layers]
    if not found:
        known = [*TAPS, *(f"blocks.*.{n}" if TAPS[t].layered else n for n, t in TRANSFORMER_LENS.items())]
        near = difflib.get_close_matches(str(spelling), known) or list(TAPS)
        raise KeyError(f"no tap named {spelling!r}; nearest: {', '.join(near)}")
    return list(dict.fromkeys(found))


def layers_of(spelling: str, layers, config: GrokConfig) -> dict[str, tuple[int, ...] | None]:
    """{tap: its layers, or None for a tap without} that a spelling and a parsed selector mean.

    Raises KeyError for an unknown tap, ValueError for layers that are not there.
    """
    found: dict[str, tuple[int, ...] | None] = {}
    for tap, layer in _spelled(spelling, config.num_layers):
        if not TAPS[tap].layered:
            if layers is not None and "*" not in spelling:
                raise ValueError(f"{tap} has no layers; leave layers= out")
            found[tap] = None
        elif layer is None:
            found[tap] = tuple(sorted(chosen("layers", layers, config.num_layers, "this model")))
        elif layers is not None:
            raise ValueError(f"{spelling!r} names its layer already; leave layers= out")
        else:
            found[tap] = (*(found.get(tap) or ()), layer)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """One thing a run keeps.

    Attributes:
      key: its name in the Trace, before the suffixes of its outputs.
      tap, layers: of a tap without layers, None.
      axis, numbers: the axis that is cut (H, G or E) and what stays of it; or None and ().
      where: positions and prompts.
      reduce, k, labels: as in `capture`.
    """

    key: str
    tap: str
    layers: tuple[int, ...] | None
    axis: str | None
    numbers: tuple[int, ...]
    where: Where
    reduce: str | None
    k: int
    labels: np.ndarray | None

    @property
    def pooled(self) -> bool:
        return self.reduce is not None and REDUCTIONS[self.reduce].pooled

    @property
    def classes(self) -> int:
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def outputs(self) -> dict[str, tuple[str, str | None]]:
        """{key in the Trace: (dims without layer, dtype or None for that of the run)}."""
        tap = TAPS[self.tap]
        if self.reduce is None:
            return {self.key: (tap.dims, tap.dtype)}
        made = {
            self.key + suffix: (dims(tap.dims), dtype)
            for suffix, (dims, dtype) in REDUCTIONS[self.reduce].outputs.items()
        }
        return {key: ("Y" * bool(self.classes) + dims, dtype) for key, (dims, dtype) in made.items()}

    def sizes(self, config: GrokConfig) -> dict[str, int]:
        """{dim letter: length}; T and S are the caller's."""
        own = {"N": self.k, "M": 2, "Y": self.classes}
        return config.dims | own | ({self.axis: len(self.numbers)} if self.axis else {})


def resolve(wishes: Wish | Iterable[Wish] | None, config: GrokConfig) -> tuple[Kept, ...]:
    """What a run keeps, in the order of TAPS: the wishes, and routing beside them unless there are none; None is
    routing alone. What a glob or the routing beside gives, gives way to a wish for that tap itself.

    Raises KeyError naming the nearest tap, ValueError for what a tap does not have or cannot be reduced to.
    """
    found: dict[str, Kept] = {}
    weak: set[str] = set()  # keys that a more exact wish replaces
    captures = as_captures(wishes)
    if not captures and wishes is not None:
        return ()
    for wish in (*captures, *map(Capture, ROUTING)):
        routing = wish.tap in ROUTING and not any(wish is c for c in captures)
        for kept in _kept(wish, config):
            vague = routing or "*" in wish.tap.replace("blocks.*.", "")
            before = found.get(kept.key)
            if before is None or (kept.key in weak and not vague):
                found[kept.key] = kept
                weak = weak | {kept.key} if vague else weak - {kept.key}
            elif (
                not vague
                and kept.layers
                and before.layers
                and _same(before, dataclasses.replace(kept, layers=before.layers))
            ):
                found[kept.key] = dataclasses.replace(kept, layers=tuple(sorted({*before.layers, *kept.layers})))
            elif not vague and not _same(before, kept):
                raise ValueError(
                    f"{kept.key!r} is captured twice, in two ways; make them one, or give one a name= of its own"
                )
    made = [key for kept in found.values() for key in kept.outputs()]
    twice = {key for key in made if made.count(key) > 1}
    if twice:
        raise ValueError(f"two captures are named {min(twice)!r}; give one another name=")
    order = list(TAPS)
    return tuple(sorted(found.values(), key=lambda kept: order.index(kept.tap)))


def _same(a: Kept, b: Kept) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) if f.name == "labels" else
               getattr(a, f.name) == getattr(b, f.name) for f in dataclasses.fields(Kept))  # fmt: skip


def _kept(wish: Capture, config: GrokConfig) -> Iterable[Kept]:
    if wish.later:
        layers = layers_of(wish.tap, wish.layers, config)["attn_pattern"]
        wish = dataclasses.replace(wish, later=False, tap="q", layers=layers)
        whole = dataclasses.replace(wish, tap="k", heads=None, where=Where(prompts=wish.where.prompts))
        yield from _kept(whole, config)
    taps = layers_of(wish.tap, wish.layers, config)
    if wish.name and len(taps) > 1:
        raise ValueError(f"name={wish.name!r} is for one tap, and {wish.tap!r} means {', '.join(taps)}")
    for tap, layers in taps.items():
        if wish.name in TAPS and (wish.name != tap or wish.reduce):
            raise ValueError(f"name={wish.name!r} is a tap itself; give the capture a name of its own")
        if wish.reduce is not None:
            _check_reduction(tap, wish, config)
        axis, numbers = _cut(tap, wish, config)
        key = wish.name or (f"{tap}.{wish.reduce}" if wish.reduce else tap)
        k = min(wish.k, config.num_experts) if tap.startswith("router") else wish.k
        yield Kept(key, tap, layers, axis, numbers, wish.where, wish.reduce, k, wish.labels)


def _check_reduction(tap: str, wish: Capture, config: GrokConfig) -> None:
    reduction = REDUCTIONS[wish.reduce]
    if tap not in reduction.taps:
        possible = [name for name, r in REDUCTIONS.items() if tap in r.taps]
        raise ValueError(
            f"{tap} has no {wish.reduce!r} ({reduction.meaning}); it has {', '.join(possible) or 'no reduction'}, and "
            f"{wish.reduce!r} is of {', '.join(reduction.taps)}"
        )
    if wish.reduce in ("topk", "lens") and not tap.startswith("router"):
        dim = "V" if wish.reduce == "lens" else TAPS[tap].dims[-1]
        most = MOST_KEYS if dim == "S" else config.dims[dim]
        if wish.k > most:
            raise ValueError(f"k={wish.k}: at most {most} for {tap}")
    if wish.labels is not None and len(wish.labels) != config.vocab_size:
        raise ValueError(f"labels has {len(wish.labels)} classes; expected one for each of {config.vocab_size} tokens")


def _cut(tap: str, wish: Capture, config: GrokConfig) -> tuple[str | None, tuple[int, ...]]:
    """The axis that `heads` or `experts` cuts, and the numbers that stay."""
    dims = "E" if wish.reduce == "count" else TAPS[tap].dims
    found: tuple[str | None, tuple[int, ...]] = (None, ())
    for name in ("heads", "experts"):
        selector = getattr(wish, name)
        if selector is None:
            continue
        axes = [d for d in dims if AXIS.get(d) == name]
        if not axes:
            raise ValueError(
                f"{tap} has no {name} to select; it has the axes {', '.join(COORDINATES[d] for d in dims)}"
                + ("; router_probs has one expert each" if name == "experts" else "")
            )
        if wish.reduce in ("entropy", "topk", "count", "lens") and axes[0] == dims[-1]:
            raise ValueError(f"{wish.reduce!r} of {tap} is over all its {name}; leave {name}= out")
        found = axes[0], chosen(name, selector, config.dims[axes[0]], "this model")
    return found
