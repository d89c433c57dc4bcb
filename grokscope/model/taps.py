"""Taps: the named values inside the network, each declared once.

`tap(name, value)` returns value, unless an observer is installed around the function being traced; then it returns
what the observer gives back. Layers are numbered by whoever calls the layer, so a tap knows no layer. Nothing calls a
tap inside a branch, loop or shard_map body: such bodies return the value, and the tap stands outside.

A tap is also a name that `jax.checkpoint` knows, so that training can say what a layer keeps for its derivative.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import jax
from jax.ad_checkpoint import checkpoint_name


@dataclasses.dataclass(frozen=True)
class Tap:
    """One named value. `dims` leave out the leading batch axis; a tap of a layer gets the layer axis in front."""

    dims: str  # one letter an axis: T position, S key position, others as in GrokConfig.dims
    meaning: str
    layered: bool = True
    dtype: str | None = None  # None: the activation type of the run


TAPS: dict[str, Tap] = {
    "embed": Tap("TD", "embedding of the token, after its multiplier", layered=False),
    "resid_pre": Tap("TD", "residual stream before the layer"),
    "q": Tap("THC", "queries, rotated"),
    "k": Tap("TGC", "keys, rotated"),
    "v": Tap("TGC", "values"),
    "attn_scores": Tap("HTS", "capped and masked scores, exactly what the softmax reads", dtype="float32"),
    "attn_pattern": Tap("HTS", "attention probabilities, query by key", dtype="float32"),
    "attn_z": Tap("THC", "each head's mix of values"),
    "attn_out": Tap("TD", "output of attention, before its norm"),
    "attn_delta": Tap("TD", "what attention adds to the stream"),
    "resid_mid": Tap("TD", "residual stream between attention and experts"),
    "router_logits": Tap("TE", "router scores of all experts", dtype="float32"),
    "router_probs": Tap("TE", "softmax of the router scores", dtype="float32"),
    "expert_index": Tap("TK", "chosen experts, most probable first", dtype="int32"),
    "expert_gate": Tap("TK", "their gates: probabilities, not renormalised", dtype="float32"),
    "expert_hidden": Tap("TKF", "hidden activation of each chosen expert"),
    "expert_out": Tap("TKD", "output of each chosen expert, before its gate"),
    "moe_out": Tap("TD", "gated sum of expert outputs, before its norm"),
    "moe_delta": Tap("TD", "what the experts add to the stream"),
    "resid_post": Tap("TD", "residual stream after the layer"),
    "final_norm": Tap("TD", "stream after the last norm", layered=False),
    "logits": Tap("TV", "logits after their multiplier; position i predicts token i + 1", layered=False),
}


@runtime_checkable
class Observer(Protocol):
    """What watches a function while it is traced."""

    def wants(self, name: str) -> bool: ...

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        """The value to go on with."""
        ...


_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer", default=None)
"""Of this thread: two models may be compiled at the same time."""


def _same(value: jax.Array) -> jax.Array:
    return value


def tap(name: str, value: jax.Array, unpack=_same, pack=_same) -> jax.Array:
    """`value`, as the installed observer returns it.

    Where the network holds the value in another layout, `unpack` gives the layout of TAPS and `pack` goes back; they
    run only if somebody looks.
    """
    value = checkpoint_name(value, name)
    observer = _observer.get()
    if observer is None or not observer.wants(name):
        return value
    return pack(observer(name, unpack(value)))


def watched(*names: str) -> bool:
    """Whether somebody looks at any of these."""
    observer = _observer.get()
    return observer is not None and any(observer.wants(name) for name in names)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Installs `observer` while a function is traced; it sees nothing of calls that were compiled before."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
