"""Runs sequences through slots: prefill each prompt alone, decode all slots together, refill a slot that is free.

A pass is layer-major. The host waits nowhere in the token loop: it reads the tokens of a step after it has dispatched
that step's forward pass, so every token it sees has had one, the last and EOS too. Shapes depend on the call (slots,
cache length) and on a prompt's own length, never on its neighbours.
"""

import contextlib
import dataclasses
import signal
import threading
from collections import deque
from collections.abc import Callable

import jax
import numpy as np

from grokscope.checkpoint.weights import Weights
from grokscope.config import GrokConfig
from grokscope.model.taps import TAPS
from grokscope.model.transformer import MASKED, KVCache
from grokscope.run import steps
from grokscope.run.sampling import Sampling
from grokscope.run.steps import COLUMNS, DecodeState

BLOCKS = (1, 32, 128, 512)  # query lengths that are compiled
MAX_SLOTS = 8


@dataclasses.dataclass
class Sequence:
    """One prompt and what became of it.

    Attributes:
      prompt: its ids.
      limit: most tokens to generate.
      accept: called with each new (token, logprob) -> why to stop after it, or None.
      tokens, logprobs: prompt and generated tokens whose forward pass has been dispatched; logprobs[0] is NaN.
      finish: "length", or what `accept` said, or "interrupt"; None while it waits or runs.
      captures: {tap: numpy, [L,] dims} when the run is over.
    """

    prompt: np.ndarray
    limit: int
    row: int
    accept: Callable[["Sequence", int, float], str | None]
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish: str | None = None
    captures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    _slot: int = 0
    _first_step: int = 0
    _prompt_logprobs: list = dataclasses.field(default_factory=list)  # device arrays, one a block
    _prompt_captures: list = dataclasses.field(default_factory=list)  # {tap: device array}, one a block

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)


def block_lengths(length: int) -> list[int]:
    """Blocks that hold a prompt: as many of 512 as fit, then the shortest that holds the rest."""
    full, rest = divmod(length, BLOCKS[-1])
    return [BLOCKS[-1]] * full + ([min(b for b in BLOCKS if b >= rest)] if rest else [])


def cache_length(length: int) -> int:
    """Positions of a cache for `length` tokens: a power of two that also holds the padded blocks of a prompt."""
    return 1 << max(sum(block_lengths(length)) - 1, BLOCKS[1] - 1).bit_length()


class Run:
    """One call of trace or generate. `sequences` may be run once."""

    def __init__(
        self, config: GrokConfig, weights: Weights, taps: tuple[str, ...], sampling: Sampling, sequences: list[Sequence]
    ):
        self.config, self.weights, self.sampling, self.sequences = config, weights, sampling, sequences
        self.dtype = weights.ends["embedding"]["w"].dtype
        self.layer_taps = tuple(t for t in taps if TAPS[t].layered)
        self.embed_taps = tuple(t for t in taps if t == "embed")
        self.head_taps = tuple(t for t in taps if t in ("final_norm", "logits"))
        self.method = sampling.method(config.vocab_size)
        self.chunks: list[dict] = []  # captures of each COLUMNS decode steps, all slots

    def run(self) -> None:
        """Runs all sequences; on KeyboardInterrupt those that run finish as "interrupt", those that wait stay as they
        are. Captures are on the sequences afterwards."""
        self.deepest = cache_length(max(len(s.prompt) + s.limit for s in self.sequences))
        self.waiting = deque(self.sequences)
        decoding = [s for s in self.sequences if s.limit]
        self.seats: list[Sequence | None] = [None] * min(
            MAX_SLOTS, 1 << (len(decoding) - 1).bit_length() if decoding else 1
        )
        self.step = 0
        if decoding:
            self._empty_slots()
        with _deferred_interrupt() as interrupted:
            try:
                self._loop(interrupted)
            except KeyboardInterrupt:
                for sequence in self.seats:
                    if sequence is not None:
                        sequence.finish = "interrupt"
        if self.step % COLUMNS:
            self._flush()
        self._collect()

    def _loop(self, interrupted: threading.Event) -> None:
        while True:
            self._refill(interrupted)
            if not any(self.seats):
                return
            if interrupted.is_set():
                raise KeyboardInterrupt
            fed = self.state
            self._decode_step()
            tokens, logprobs = np.asarray(fed.tokens), np.asarray(fed.logprobs)
            for slot, sequence in enumerate(self.seats):
                if sequence is None:
                    continue
                self._advance(sequence, int(tokens[slot]), float(logprobs[slot]))
                if sequence.finish:
                    self.seats[slot] = None
                    self.state = dataclasses.replace(self.state, live=self.state.live.at[slot].set(False))

    def _advance(self, sequence: Sequence, token: int, logprob: float) -> None:
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        sequence.finish = sequence.accept(sequence, token, logprob)
        if sequence.finish is None and sequence.generated == sequence.limit:
            sequence.finish = "length"

    # Prefill

    def _refill(self, interrupted: threading.Event) -> None:
        """Prefills waiting prompts: those without new tokens to make are done with that, others take a free slot."""
        while self.waiting and (None in self.seats or not self.waiting[0].limit):
            if interrupted.is_set():
                raise KeyboardInterrupt
            sequence = self.waiting[0]
            caches, first = self._prefill(sequence)
            self.waiting.popleft()
            sequence.tokens = sequence.prompt.tolist()
            if not sequence.limit:
                sequence.finish = "length"
                continue
            slot = self.seats.index(None)
            self.caches = [steps.seated_cache(all_, one, slot) for all_, one in zip(self.caches, caches, strict=True)]
            self.state = steps.seated(self.state, first, slot)
            self.slot_rows[slot] = sequence.row
            self.slot_sampling = jax.device_put(jax.tree.map(lambda a: a[self.slot_rows], self.sampling))
            sequence._slot, sequence._first_step = slot, self.step
            self.seats[slot] = sequence

    def _prefill(self, sequence: Sequence) -> tuple[list[KVCache], DecodeState | None]:
        config, prompt = self.config, sequence.prompt
        lengths = block_lengths(len(prompt))
        padded = np.zeros((1, sum(lengths)), np.int32)
        padded[0, : len(prompt)] = prompt
        live = np.arange(padded.size)[None] < len(prompt)
        begins = np.cumsum([0, *lengths[:-1]])
        cuts = [slice(b, b + n) for b, n in zip(begins, lengths, strict=True)]

        xs, captures = [], []
        for cut in cuts:
            x, captured = steps.embed(config, self.embed_taps, self.weights.ends, padded[:, cut])
            xs.append(x)
            captures.append((captured, []))
        starts = [np.array([b], np.int32) for b in begins]
        caches = []
        for params in self.weights.layers:
            cache = KVCache.zeros(config, 1, cache_length(len(prompt)), self.dtype)
            for i, cut in enumerate(cuts):
                xs[i], cache, captured = steps.layer(
                    config, self.layer_taps, params, xs[i], cache, starts[i], live[:, cut]
                )
                captures[i][1].append(captured)
            caches.append(cache)
        first = self._first(sequence, xs[-1], len(prompt) - 1 - begins[-1]) if sequence.limit else None

        following = np.roll(padded, -1, axis=1)
        for x, cut, (captured, by_layer) in zip(xs, cuts, captures, strict=True):
            logprobs, of_head = steps.score(config, self.head_taps, self.weights.ends, x, following[:, cut])
            sequence._prompt_logprobs.append(_sent(logprobs))
            sequence._prompt_captures.append(
                _sent(captured | (steps.stacked(by_layer) if self.layer_taps else {}) | of_head)
            )
        return caches, first

    def _first(self, sequence: Sequence, x: jax.Array, last: int) -> DecodeState:
        """The first generated token, drawn from the last position of the prompt."""
        row = np.array([sequence.row])
        position = np.array([len(sequence.prompt) - 1], np.int32)
        state = dataclasses.replace(DecodeState.idle(1), positions=position, live=np.ones(1, bool))
        sampling = jax.tree.map(lambda a: a[row], self.sampling)
        x = jax.lax.dynamic_slice_in_dim(x, last, 1, axis=1)
        return steps.readout(self.config, (), self.method, self.weights.ends, x, state, sampling, {}, 0)[0]

    # Decode

    def _empty_slots(self) -> None:
        slots, config = len(self.seats), self.config
        self.caches = [KVCache.zeros(config, slots, self.deepest, self.dtype) for _ in self.weights.layers]
        self.state = DecodeState.idle(slots)
        self.slot_rows = np.zeros(slots, int)

        def buffers(taps):
            return {tap: steps.buffer(config, tap, slots, self.deepest, self.dtype) for tap in taps}

        self.embed_buffers, self.head_buffers = buffers(self.embed_taps), buffers(self.head_taps)
        self.layer_buffers = [buffers(self.layer_taps) for _ in self.weights.layers]

    def _decode_step(self) -> None:
        """Dispatches the forward pass of every slot's token, and the draw of the next one."""
        config, state, ends, column = self.config, self.state, self.weights.ends, self.step % COLUMNS
        x, self.embed_buffers = steps.decode_embed(config, self.embed_taps, ends, state, self.embed_buffers, column)
        live = state.live[:, None]
        for i, params in enumerate(self.weights.layers):
            x, self.caches[i], self.layer_buffers[i] = steps.decode_layer(
                config, self.layer_taps, params, x, self.caches[i], state.positions, live, self.layer_buffers[i], column
            )
        self.state, self.head_buffers = steps.readout(
            config, self.head_taps, self.method, ends, x, state, self.slot_sampling, self.head_buffers, column
        )
        self.step += 1
        if self.step % COLUMNS == 0:
            self._flush()

    def _flush(self) -> None:
        """Sends the captures of the last COLUMNS steps to the host, without waiting for them."""
        layered = steps.stacked(self.layer_buffers) if self.layer_taps else {}
        ends = self.embed_buffers | self.head_buffers
        self.chunks.append(_sent(layered | (steps.stacked([ends]) if ends else {})))

    # Captures on the host

    def _collect(self) -> None:
        chunks = [jax.tree.map(np.asarray, chunk) for chunk in self.chunks]
        for sequence in self.sequences:
            if sequence.finish is None:
                continue
            n, total = len(sequence.prompt), len(sequence.tokens)
            scored = np.concatenate([np.asarray(part)[0] for part in sequence._prompt_logprobs])
            sequence.logprobs = [np.nan, *scored[: n - 1].tolist(), *sequence.logprobs]
            blocks = [jax.tree.map(np.asarray, block) for block in sequence._prompt_captures]
            sequence._prompt_logprobs.clear()
            sequence._prompt_captures.clear()
            first, last = sequence._first_step, sequence._first_step + total - n
            for tap in blocks[0]:
                layered = TAPS[tap].layered
                parts = [b[tap][:, 0] if layered else b[tap][0] for b in blocks]
                prompt_part = _joined(tap, parts, total, slice(0, n))
                parts = [c[tap][:, sequence._slot] if layered else c[tap][0, sequence._slot] for c in chunks]
                if last > first:
                    # Only the chunks that this sequence ran in.
                    begin = first // COLUMNS
                    decoded = _joined(
                        tap,
                        parts[begin : -(-last // COLUMNS)],
                        total,
                        slice(first - begin * COLUMNS, last - begin * COLUMNS),
                    )
                    prompt_part = np.concatenate([prompt_part, decoded], axis=_axis(tap, "T"))
                sequence.captures[tap] = prompt_part


def _axis(tap: str, dim: str) -> int:
    """Axis of a dim in a captured value without batch axis."""
    return TAPS[tap].dims.index(dim) + TAPS[tap].layered


def _joined(tap: str, parts: list[np.ndarray], total: int, positions: slice) -> np.ndarray:
    """Parts joined along positions and cut to `positions`; the axis of keys, where there is one, made `total` long."""
    joined = np.concatenate(parts, axis=_axis(tap, "T"))
    joined = joined[(slice(None),) * _axis(tap, "T") + (positions,)]
    if "S" not in TAPS[tap].dims:
        return joined
    axis = _axis(tap, "S")
    joined = joined[(slice(None),) * axis + (slice(0, total),)]
    missing = [(0, 0)] * joined.ndim
    missing[axis] = (0, total - joined.shape[axis])
    return np.pad(joined, missing, constant_values=MASKED if tap == "attn_scores" else 0)


@contextlib.contextmanager
def _deferred_interrupt():
    """An event that Ctrl-C sets, so that a step is never torn; it takes effect before the next step or prompt.

    Other threads receive no Ctrl-C, and cannot set a handler.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _sent(tree):
    """The tree, its transfer to the host begun."""
    jax.tree.map(lambda a: a.copy_to_host_async(), tree)
    return tree
