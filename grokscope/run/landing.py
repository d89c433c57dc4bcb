"""The captures of a prompt, on their way from the device to where they stay on the host.

They leave layer by layer: beside those of a layer that runs, the device holds ON_THEIR_WAY bytes of them, or a layer's,
but not all. On CPU the memory of one layer then serves the next: new pages cost more than the copy.
"""

from collections import deque

import jax
import numpy as np

from grokscope.run import steps
from grokscope.run.staging import Hooks, Place

ON_THEIR_WAY = 1 << 25  # bytes that may wait, so that device and host need not wait for each other


class Landing:
    """The arrays of one prompt's captures, filled as these come.

    Attributes:
      captures: {key: numpy [L,] dims}.
    """

    def __init__(self, hooks: Hooks, prompt: int, blocks: list[tuple[int, int]]):
        """`blocks`: first position and length of each block of the prompt."""
        self.captures: dict[str, np.ndarray] = {}
        self._num_keys = hooks.sequences[prompt].prompt_length
        self._places: dict[str, tuple] = {}
        self._sent: deque[tuple[int, Place, dict[str, jax.Array]]] = deque()
        for kept in hooks.kept:
            positions, cut = hooks.prompt_positions(kept, prompt), hooks.cut(kept, prompt)
            within = []  # of each block: which of its positions are kept, and where they go
            for begin, length in blocks:
                here = np.flatnonzero((positions >= begin) & (positions < begin + length))
                within.append((_span(here if cut else positions[here] - begin), _span(here)))
            for key, (dims, _) in {} if kept.pooled else kept.outputs().items():
                self._places[key] = kept.layers, dims, len(positions), within

    def send(self, block: int, place: Place, captures: dict[str, jax.Array]) -> None:
        """Begins the transfer of what a block captured at a place, {key: [1, ...]}; waits for earlier ones while too
        much is on its way.
        """
        if captures:
            self._sent.append((block, place, sent(steps.gathered(captures))))
            while len(self._sent) > 1 and sum(_nbytes(c) for _, _, c in self._sent) > ON_THEIR_WAY:
                self._take(*self._sent.popleft())

    def finish(self) -> dict[str, np.ndarray]:
        """The captures, all of them here."""
        while self._sent:
            self._take(*self._sent.popleft())
        return self.captures

    def _take(self, block: int, place: Place, captures: dict[str, jax.Array]) -> None:
        while captures:
            key, value = captures.popitem()
            layers, dims, length, within = self._places[key]
            before, own = [slice(None)] * dims.index("T"), np.asarray(value)[0]
            if key not in self.captures:
                shape = list(own.shape)
                shape[len(before)] = length
                if dims.endswith("S"):
                    shape[-1] = self._num_keys
                self.captures[key] = np.empty(shape if layers is None else (len(layers), *shape), own.dtype)
            into = self.captures[key] if layers is None else self.captures[key][layers.index(place)]
            here, there = within[block]
            into[*before, there] = up_to(own, dims, self._num_keys)[*before, here]


def sent(tree):
    """The tree, its transfer to the host begun."""
    jax.tree.map(lambda a: a.copy_to_host_async(), tree)
    return tree


def up_to(value: np.ndarray, dims: str, length: int) -> np.ndarray:
    """Keys beyond `length` left out."""
    return value[..., :length] if dims.endswith("S") else value


def _span(numbers: np.ndarray) -> np.ndarray | slice:
    """Ascending numbers, as a slice if they follow one another."""
    if len(numbers) and numbers[-1] - numbers[0] + 1 == len(numbers):
        return slice(numbers[0], numbers[-1] + 1)
    return numbers


def _nbytes(captures: dict[str, jax.Array]) -> int:
    return sum(a.nbytes for a in captures.values())
