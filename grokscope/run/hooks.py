"""What to capture, and how a capture enters a function that is being compiled.

`with_hooks(fn, names)` runs fn with an observer installed and returns its result together with the captured values, so
captures are ordinary outputs of one jitted function. Without names, the traced function is the plain one.
"""

import difflib
from collections.abc import Callable, Iterable

import jax

from grokscope.model.taps import TAPS, observed

ROUTING = ("router_logits", "expert_index", "expert_gate")
"""Captured with whatever is asked for: 3 KiB a token at full size. Indices do not follow from edited logits."""


def resolve(capture: str | Iterable[str] | None) -> tuple[str, ...]:
    """Tap names in the order of TAPS, routing among them unless `capture` is empty; None means routing alone.

    Raises KeyError naming the nearest tap.
    """
    names = () if capture is None else (capture,) if isinstance(capture, str) else tuple(capture)
    for name in names:
        if name not in TAPS:
            near = difflib.get_close_matches(str(name), TAPS) or list(TAPS)
            raise KeyError(f"no tap named {name!r}; nearest: {', '.join(near)}")
    wanted = {*names, *ROUTING} if names or capture is None else ()
    return tuple(name for name in TAPS if name in wanted)


class _Recorder:
    """An observer that keeps the values of some taps."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.captured: dict[str, jax.Array] = {}

    def wants(self, name: str) -> bool:
        return name in self.names

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        self.captured[name] = value
        return value


def with_hooks(fn: Callable, names: tuple[str, ...]) -> Callable:
    """fn that returns (result, {tap: value}); values have the dims of TAPS behind a batch axis."""
    if not names:
        return lambda *args: (fn(*args), {})

    def hooked(*args):
        recorder = _Recorder(names)
        with observed(recorder):
            result = fn(*args)
        return result, recorder.captured

    return hooked
