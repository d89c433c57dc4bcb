"""Selectors: which layers, heads, experts, positions, steps, phases and prompts a capture or an edit is about. No jax.

Each is None (all), an int, a list of ints or a slice. Negative layers, heads and experts count from the last one, as in
numpy; negative positions count back from the end of the prompt, wherever the sequence ends.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

Numbers = int | Iterable[int] | slice | None
PHASES = ("prefill", "decode")


def parsed(name: str, selector: Any) -> tuple[int, ...] | slice | None:
    """A selector as a value: None, a slice, or a tuple of ints. Raises TypeError or ValueError naming it."""
    if selector is None:
        return None
    if isinstance(selector, slice):
        bounds = [selector.start, selector.stop, selector.step]
        if any(b is not None and (isinstance(b, bool) or not isinstance(b, int | np.integer)) for b in bounds):
            raise TypeError(f"{name}={selector!r}: a slice is of ints")
        if selector.step == 0:
            raise ValueError(f"{name}={selector!r}: a slice cannot step by 0")
        return slice(*(None if b is None else int(b) for b in bounds))
    if isinstance(selector, str | bytes | bool | float):
        raise TypeError(f"{name}={selector!r}: expected an int, a list of ints or a slice")
    items = np.atleast_1d(np.asarray(selector if np.ndim(selector) == 0 else list(selector)))
    if items.size == 0:
        raise ValueError(f"{name}={selector!r} selects nothing; None is all")
    if items.ndim != 1 or items.dtype.kind not in "iu":
        raise TypeError(f"{name}={selector!r}: expected an int, a list of ints or a slice")
    chosen = tuple(int(i) for i in items)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{name}={list(chosen)} names one of them twice")
    return chosen


def chosen(name: str, selector: tuple[int, ...] | slice | None, count: int, of: str) -> tuple[int, ...]:
    """The numbers among 0 ... count - 1 that a parsed selector means. Raises ValueError if there are none such."""
    if selector is None:
        return tuple(range(count))
    if isinstance(selector, slice):
        numbers = tuple(range(count)[selector])
        if not numbers:
            raise ValueError(f"{name}={selector} selects none of the {count} {name} of {of}")
        return numbers
    outside = [i for i in selector if not -count <= i < count]
    if outside:
        raise ValueError(f"{name}={outside[0]}: {of} has {name} 0 to {count - 1}")
    numbers = tuple(i % count for i in selector)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}={list(selector)} names one of them twice")
    return numbers


@dataclasses.dataclass(frozen=True)
class Where:
    """Which positions of which prompts. All four must agree.

    Attributes:
      positions: None, ints, a slice, or "last", the last position of the prompt.
      steps: decode steps: step s is the forward pass at position prompt length + s.
      phase: None, or some of "prefill" and "decode".
      prompts: numbers of prompts in the call.
    """

    positions: tuple[int, ...] | slice | str | None = None
    steps: tuple[int, ...] | slice | None = None
    phase: tuple[str, ...] | None = None
    prompts: tuple[int, ...] | slice | None = None

    @classmethod
    def parse(cls, positions=None, steps=None, phase=None, prompts=None) -> "Where":
        if isinstance(positions, str) and positions != "last":
            raise ValueError(f'positions={positions!r}: expected ints, a slice or "last"')
        phases = None if phase is None else (phase,) if isinstance(phase, str) else tuple(phase)
        if phases is not None and (not phases or set(phases) - set(PHASES)):
            raise ValueError(f'phase={phase!r}: expected "prefill", "decode" or both')
        positions = positions if isinstance(positions, str) else parsed("positions", positions)
        for name, value in (("positions", positions), ("steps", steps)):
            if isinstance(value, slice) and (value.step or 1) < 1:
                raise ValueError(f"{name}={value}: a slice goes forward here")
        steps = parsed("steps", steps)
        ends = (steps.start, steps.stop) if isinstance(steps, slice) else steps or ()
        if any(s is not None and s < 0 for s in ends):
            raise ValueError(f"steps={steps}: steps are counted from 0, the first generated token's")
        return cls(positions, steps, phases, parsed("prompts", prompts))

    def takes(self, prompt: int, num_prompts: int) -> bool:
        """Whether it is about this prompt. Raises ValueError for prompts that are not there."""
        return self.prompts is None or prompt in chosen("prompts", self.prompts, num_prompts, "this call")

    def mask(self, prompt_length: int, length: int) -> np.ndarray:
        """bool [length]: the positions it selects in a sequence that begins with a prompt of prompt_length."""
        numbers = np.arange(length)
        keep = np.ones(length, bool)
        if self.positions is not None:
            last = (-1,) if self.positions == "last" else self.positions
            keep &= _holds(last, numbers, prompt_length)
        if self.steps is not None:
            keep &= (numbers >= prompt_length) & _holds(self.steps, numbers - prompt_length, 0)
        if self.phase is not None:
            keep &= np.isin(np.where(numbers < prompt_length, *PHASES), self.phase)
        return keep

    def json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: as_json(value) for name, value in values.items() if value is not None}


EVERYWHERE = Where()


def _holds(selector: tuple[int, ...] | slice, numbers: np.ndarray, origin: int) -> np.ndarray:
    """Which numbers a selector holds whose negative ints count back from `origin`."""

    def anchored(i: int | None) -> int | None:
        return i if i is None or i >= 0 else max(i + origin, 0)

    if isinstance(selector, slice):
        begin, end, step = anchored(selector.start) or 0, anchored(selector.stop), selector.step or 1
        held = (numbers >= begin) & ((numbers - begin) % step == 0)
        return held if end is None else held & (numbers < end)
    return np.isin(numbers, [i if i >= 0 else i + origin for i in selector])


def as_json(selector: Any) -> Any:
    """A parsed selector as JSON has it; `from_json` goes back."""
    if isinstance(selector, slice):
        return {"slice": [selector.start, selector.stop, selector.step]}
    return list(selector) if isinstance(selector, tuple) else selector


def from_json(selector: Any) -> Any:
    return slice(*selector["slice"]) if isinstance(selector, dict) else selector
