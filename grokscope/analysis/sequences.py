"""What an analysis reads: Traces one by one, which of their positions, and how each is labelled."""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from grokscope.run.dump import Dump
from grokscope.run.trace import Trace

Source = Trace | Dump | Sequence[Trace]
PHASES = ("prefill", "decode")
CLASSES = ("special", "newline", "space", "digits", "capital", "lower", "other letters", "punctuation")


def sequences(source: Source) -> Iterator[Trace]:
    """The Traces, one at a time. Raises TypeError for anything else, ValueError if there is none."""
    number_of_traces(source)
    for trace in [source] if isinstance(source, Trace) else source:
        if not isinstance(trace, Trace):
            raise TypeError(f"expected Traces; got {type(trace).__name__}")
        yield trace


def number_of_traces(source: Source) -> int:
    """How many Traces there are. Raises as `sequences` does."""
    if isinstance(source, Trace):
        return 1
    if not isinstance(source, Dump | Sequence):
        raise TypeError(f"expected a Trace, a list of Traces or a Dump; got {type(source).__name__}")
    if not len(source):
        raise ValueError("there is no Trace to analyse")
    return len(source)


def having(source: Source, *taps: str) -> Iterator[tuple[int, Trace]]:
    """(index, Trace) of those that hold one of these taps: a capture may be about other prompts, or about positions
    that one lacks. If none does, the last, which the analysis will miss it in.
    """
    some = False
    for index, trace in enumerate(sequences(source)):
        if any(tap in trace.taps for tap in taps):
            some = True
            yield index, trace
    if not some:
        yield index, trace


def phases(phase: str) -> list[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """(name, which of `trace.phase` belong to it) of each group of rows: "each", "all", "prefill" or "decode"."""
    if phase == "all":
        return [("all", lambda of: np.ones(len(of), bool))]
    if phase not in ("each", *PHASES):
        raise ValueError(f'phase={phase!r}: expected "each", "all", "prefill" or "decode"')
    return [(name, lambda of, name=name: of == name) for name in PHASES if phase in ("each", name)]


def token_classes(pieces: Iterable[str]) -> np.ndarray:
    """The class of each piece, by its first character that is not the mark of a space; one of CLASSES."""
    return np.array([_token_class(piece) for piece in pieces], object)


def _token_class(piece: str) -> str:
    if len(piece) > 2 and piece[0] in "[<" and piece[-1] in "]>":
        return "newline" if piece == "<0x0A>" else "special"
    body = piece.lstrip("▁ ")
    if not body:
        return "space"
    if body[0] == "\n":
        return "newline"
    kind = unicodedata.category(body[0])
    if kind[0] == "N":
        return "digits"
    if kind[0] == "L":
        return {"Lu": "capital", "Ll": "lower"}.get(kind, "other letters")
    return "space" if kind[0] in "ZC" else "punctuation"


class Labels:
    """A label of every position.

    Attributes:
      by_prompt: whether a label is of a whole prompt; then prompts, not tokens, are what a null shuffles.
    """

    def __init__(self, by: Any, count: int):
        """by: "class", "token" (the piece), "position" (in powers of two), an array over the vocabulary, a list with
        a label or an array [T] for each of the `count` Traces, or a function of a Trace that gives either."""
        self.by = by = by.to_numpy() if hasattr(by, "to_numpy") else by  # of pandas: by place, not by its index
        self.count = count
        self._of = self._function(by, count)
        self.by_prompt: bool | None = None

    def _function(self, by: Any, count: int) -> Callable[[int, Trace], Any]:
        named = {
            "class": lambda _, trace: _classes(trace),
            "token": lambda _, trace: np.array(trace.pieces, object),
            "position": lambda _, trace: _octaves(len(trace)),
        }
        if isinstance(by, str):
            if by not in named:
                raise ValueError(
                    f'labels {by!r}: expected "class", "token", "position", an array, a list or a function'
                )
            return named[by]
        if callable(by):
            return lambda _, trace: by(trace)
        if not hasattr(by, "__len__"):
            raise TypeError(f"labels {by!r:.60}: expected a name, an array, a list or a function")
        if isinstance(by, np.ndarray) and by.ndim == 1 and len(by) != count:
            return lambda _, trace: self._over_vocabulary(trace)
        if len(by) != count:
            raise ValueError(
                f"{len(by)} labels for {count} Traces; give one (or an array of one a token) for each, or an array "
                "over the vocabulary"
            )
        return lambda index, _: by[index]

    def _over_vocabulary(self, trace: Trace) -> np.ndarray:
        size = trace.meta["config"]["vocab_size"]
        if len(self.by) != size:
            raise ValueError(
                f"an array of {len(self.by)} labels; the vocabulary has {size} tokens. Labels of the tokens of a text "
                "go into a list, one array for each Trace"
            )
        return self.by[trace.tokens]

    def of(self, index: int, trace: Trace) -> np.ndarray:
        """[T] labels of a Trace, the index-th of all."""
        if isinstance(self.by, np.ndarray) and self.by.shape == (trace.meta["config"]["vocab_size"],) == (self.count,):
            raise ValueError(
                f"an array of {self.count} labels, for as many Traces and tokens of the vocabulary: give a list of one "
                "for each Trace, or the function lambda trace: labels[trace.tokens]"
            )
        found = self._of(index, trace)
        scalar = isinstance(found, str) or np.ndim(found) == 0
        if self.by_prompt is None:
            self.by_prompt = scalar
        if scalar != self.by_prompt:
            raise ValueError("some labels are of prompts and some of tokens; give one kind")
        if scalar:
            return np.full(len(trace), found, object)
        if len(found) != len(trace):
            raise ValueError(f"Trace {index} has {len(trace)} tokens and {len(found)} labels")
        return np.asarray(found)


def _classes(trace: Trace) -> np.ndarray:
    if trace.pieces == [f"<{token}>" for token in trace.tokens]:
        raise ValueError(
            'labels "class": the checkpoint of this Trace has no tokenizer, so its tokens have ids alone; give an '
            "array over the vocabulary"
        )
    return token_classes(trace.pieces)


def _octaves(length: int) -> np.ndarray:
    """ "0", "1", "2-3", "4-7", ...: the position, as coarse as it is far."""
    names = ["0", "1", *(f"{1 << i}-{(2 << i) - 1}" for i in range(1, max(length, 2).bit_length()))]
    return np.array(names, object)[np.frexp(np.arange(length))[1]]
