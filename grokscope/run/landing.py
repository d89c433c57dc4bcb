"""The captures of prompts, on their way from the device to where they stay on the host.

They leave layer by layer: beside those of a layer that runs, the device holds ON_THEIR_WAY bytes of them, not all. On
CPU the memory of one layer then serves the next: new pages cost more than the copy.
"""

import ctypes
import sys
from collections import deque

import jax
import numpy as np

from grokscope.run import steps
from grokscope.run.staging import Hooks, Place

ON_THEIR_WAY = 1 << 25  # bytes that may wait, so that device and host need not wait for each other
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Has glibc keep 256 MB that are freed, not 64: on CPU the outputs of each layer are allocated anew, and a full
    cache of 512 tokens spent a third of its time on pages given back by the one before.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if adjust:  # the second is what it becomes by itself, were it not for the first
        adjust(M_TRIM_THRESHOLD, 1 << 28)
        adjust(M_MMAP_THRESHOLD, 1 << 25)


class Landing:
    """The arrays of one prompt's captures, filled as these come.

    Attributes:
      captures: {key: numpy [L,] dims}.
      awaited: how many transfers have not come.
    """

    def __init__(self, hooks: Hooks, prompt: int, cut: frozenset[str], blocks: list[tuple[int, int]], dtype):
        """`cut`: captures of which only the positions that are kept will come; `blocks`: first position and length of
        each; `dtype`: of the run.
        """
        self.captures: dict[str, np.ndarray] = {}
        self.awaited = 0
        self._layers: dict[str, tuple[int, ...] | None] = {}
        self._dims: dict[str, str] = {}
        self._within: dict[str, list[tuple]] = {}  # of each block: which of its positions are kept, and where they go
        for kept in hooks.kept:
            positions = hooks.prompt_positions(kept, prompt)
            if kept.pooled or not len(positions):
                continue
            within = []
            for begin, length in blocks:
                here = np.flatnonzero((positions >= begin) & (positions < begin + length))
                within.append((_span(here if kept.key in cut else positions[here] - begin), _span(here)))
            sizes = hooks.dims(kept) | {"T": len(positions), "S": hooks.sequences[prompt].prompt_length}
            for key, (dims, own) in kept.outputs().items():
                shape = tuple(sizes[d] for d in dims)
                shape = shape if kept.layers is None else (len(kept.layers), *shape)
                self.captures[key] = np.empty(shape, own or dtype)
                self._layers[key], self._dims[key], self._within[key] = kept.layers, dims, within

    def take(self, block: int, place: Place, key: str, value: np.ndarray) -> None:
        """What a block captured at a place, copied once; nothing of what is not kept of this prompt."""
        if key not in self.captures:
            return
        layers, dims = self._layers[key], self._dims[key]
        into = self.captures[key] if layers is None else self.captures[key][layers.index(place)]
        before, (here, there) = [slice(None)] * dims.index("T"), self._within[key][block]
        into[*before, there] = up_to(value, dims, into.shape[-1])[*before, here]


class Transfers:
    """Captures on their way, oldest first."""

    def __init__(self):
        self._waiting: deque[tuple[list[Landing | None], int, Place, dict[str, jax.Array]]] = deque()
        self._nbytes = 0

    def send(self, landings: list[Landing | None], block: int, place: Place, captures: dict[str, jax.Array]) -> None:
        """Begins one, {key: [B, ...]} with a row for each landing, None if nobody wants it, and perhaps idle ones
        behind; waits for earlier ones while too much is on its way.
        """
        if not captures:
            return
        self._waiting.append((landings, block, place, to_host(steps.gathered(captures))))
        self._nbytes += _nbytes(captures)
        for landing in filter(None, landings):
            landing.awaited += 1
        while len(self._waiting) > 1 and self._nbytes > ON_THEIR_WAY:
            self._take()

    def finish(self, landing: Landing) -> dict[str, np.ndarray]:
        """The captures of a prompt, all of them here."""
        while landing.awaited:
            self._take()
        return landing.captures

    def _take(self) -> None:
        landings, block, place, captures = self._waiting.popleft()
        self._nbytes -= _nbytes(captures)
        while captures:  # each waited for, and let go
            key, value = captures.popitem()
            for landing, row in zip(landings, np.asarray(value), strict=False):
                if landing:
                    landing.take(block, place, key, row)
        for landing in filter(None, landings):
            landing.awaited -= 1


def to_host(tree):
    """The tree, its transfer begun."""
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
