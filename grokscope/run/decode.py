"""Runs jobs through slots: prefill each prompt alone, decode all slots together, refill a slot that is free.

A pass is layer-major. The host waits nowhere in the token loop: it reads the tokens of a step after it has dispatched
that step's forward pass, so every token it sees has had one, the last and EOS too. Prefill runs in shapes of the
prompt's own length; decode in shapes of the call: number of slots, and cache length, which holds the longest job. A
job's numbers depend on these shapes, and not on what its neighbours are.
"""

import contextlib
import dataclasses
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator

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
class Job:
    """One prompt and what becomes of it.

    Attributes:
      prompt: int32 ids.
      limit: tokens to generate at most; 0 is a forward pass alone.
      row: its row of the call's Sampling.
      accept: called with each new token and its log-probability; says why to stop after it, or None.
      tokens: prompt and generated tokens; each has had its forward pass.
      logprobs: in nats, of the generated tokens while it runs; of all, with NaN first, when the run is over.
      finish: "length", what `accept` said, or "interrupt"; None while it waits or runs.
      captures: {tap: numpy [L,] dims}, when the run is over.
      slot, first_step: where and from which decode step on it ran.
      prefilled: per block of the prompt, its log-probabilities and captures.
    """

    prompt: np.ndarray
    limit: int
    row: int
    accept: Callable[[int, float], str | None]
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish: str | None = None
    captures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    slot: int = 0
    first_step: int = 0
    prefilled: list[tuple] = dataclasses.field(default_factory=list)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    def advance(self, token: int, logprob: float) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.finish = self.accept(token, logprob)
        if self.finish is None and self.generated == self.limit:
            self.finish = "length"


def block_lengths(length: int) -> list[int]:
    """Blocks that hold a prompt: as many of 512 as fit, then the shortest that holds the rest."""
    full, rest = divmod(length, BLOCKS[-1])
    return [BLOCKS[-1]] * full + ([min(b for b in BLOCKS if b >= rest)] if rest else [])


def cache_length(length: int) -> int:
    """Positions of a cache for `length` tokens: a power of two that also holds the padded blocks of a prompt."""
    return 1 << max(sum(block_lengths(length)) - 1, BLOCKS[1] - 1).bit_length()


class Run:
    """One call of trace or generate.

    Attributes:
      num_slots, cache_length: shapes of decode; 0 if nothing is generated.
    """

    def __init__(
        self, config: GrokConfig, weights: Weights, taps: tuple[str, ...], sampling: Sampling, jobs: list[Job]
    ):
        self.config, self.weights, self.sampling, self.jobs = config, weights, sampling, jobs
        self.dtype = weights.ends["embedding"]["w"].dtype
        self.layer_taps = tuple(t for t in taps if TAPS[t].layered)
        self.embed_taps = tuple(t for t in taps if t == "embed")
        self.head_taps = tuple(t for t in taps if t in ("final_norm", "logits"))
        self.method = sampling.method(config.vocab_size)
        decoding = [job for job in jobs if job.limit]
        self.num_slots = min(MAX_SLOTS, 1 << (len(decoding) - 1).bit_length()) if decoding else 0
        self.cache_length = max((cache_length(len(j.prompt) + j.limit) for j in decoding), default=0)

    def run(self) -> None:
        """Runs all jobs, once. On Ctrl-C those that run finish as "interrupt", and those that wait stay unfinished; if
        it came too late to cut anything short, KeyboardInterrupt is raised."""
        self.waiting = deque(self.jobs)
        self.slots: list[Job | None] = [None] * self.num_slots
        self.step = 0
        self.chunks: list[dict] = []  # captures of COLUMNS decode steps each, all slots; the last still on its way
        self._empty_slots()
        with _deferred_interrupt() as interrupted:
            try:
                self._loop(interrupted)
            except KeyboardInterrupt:
                for job in filter(None, self.slots):
                    job.finish = "interrupt"
        if self.step % COLUMNS:
            self._flush()
        if interrupted.is_set() and all(job.finish not in (None, "interrupt") for job in self.jobs):
            raise KeyboardInterrupt
        self._collect()

    def _loop(self, interrupted: threading.Event) -> None:
        while True:
            self._refill(interrupted)
            if not any(self.slots):
                return
            if interrupted.is_set():
                raise KeyboardInterrupt
            fed = self.state
            self._decode_step()
            tokens, logprobs = np.asarray(fed.tokens), np.asarray(fed.logprobs)
            for slot, job in enumerate(self.slots):
                if job is None:
                    continue
                job.advance(int(tokens[slot]), float(logprobs[slot]))
                if job.finish:
                    self.slots[slot] = None
                    self.state = steps.retired(self.state, slot)

    # Prefill

    def _refill(self, interrupted: threading.Event) -> None:
        """Prefills waiting prompts: those without tokens to make are done with that, others take a free slot."""
        previous = None
        while self.waiting and (None in self.slots or not self.waiting[0].limit):
            job = self.waiting[0]
            caches, first = self._prefill(job, interrupted)
            self.waiting.popleft()
            job.tokens = job.prompt.tolist()
            if previous is not None:
                previous.prefilled = _landed(previous.prefilled)
            previous = job
            if not job.limit:
                job.finish = "length"
                continue
            job.slot, job.first_step = self.slots.index(None), self.step
            self.caches = [steps.seated_cache(c, one, job.slot) for c, one in zip(self.caches, caches, strict=True)]
            self.state = steps.seated(self.state, first, job.slot)
            self.slots[job.slot] = job
            rows = np.array([0 if j is None else j.row for j in self.slots])
            self.slot_sampling = jax.device_put(jax.tree.map(lambda a, rows=rows: a[rows], self.sampling))

    def _prefill(self, job: Job, interrupted: threading.Event) -> tuple[list[KVCache], DecodeState | None]:
        """Layer by layer, block by block; then the first new token, and the log-probabilities of the prompt."""
        config, prompt = self.config, job.prompt
        lengths = block_lengths(len(prompt))
        padded = np.zeros((1, sum(lengths)), np.int32)
        padded[0, : len(prompt)] = prompt
        live = np.arange(padded.size)[None] < len(prompt)
        begins = np.cumsum([0, *lengths[:-1]], dtype=np.int32)
        cuts = [slice(b, b + n) for b, n in zip(begins, lengths, strict=True)]

        xs, captures = [], []
        for cut in cuts:
            x, captured = steps.embed(config, self.embed_taps, self.weights.ends, padded[:, cut])
            xs.append(x)
            captures.append((captured, []))
        caches = []
        for params in self.weights.layers:
            if interrupted.is_set():
                raise KeyboardInterrupt
            cache = KVCache.zeros(config, 1, cache_length(len(prompt)), self.dtype)
            for i, cut in enumerate(cuts):
                xs[i], cache, captured = steps.layer(
                    config, self.layer_taps, params, xs[i], cache, begins[i : i + 1], live[:, cut]
                )
                captures[i][1].append(captured)
            caches.append(cache)
        first = self._first(job, xs[-1], len(prompt) - 1 - begins[-1]) if job.limit else None

        following = np.roll(padded, -1, axis=1)
        for x, cut, (captured, by_layer) in zip(xs, cuts, captures, strict=True):
            logprobs, of_head = steps.score(config, self.head_taps, self.weights.ends, x, following[:, cut])
            layered = steps.stacked(by_layer) if self.layer_taps else {}
            job.prefilled.append(_sent((logprobs, captured | layered | of_head)))
        return caches, first

    def _first(self, job: Job, x: jax.Array, last: int) -> DecodeState:
        """The first generated token, drawn from the last position of the prompt."""
        sampling = jax.tree.map(lambda a: a[[job.row]], self.sampling)
        position = np.array([len(job.prompt) - 1], np.int32)
        state = dataclasses.replace(DecodeState.idle(1), positions=position, live=np.ones(1, bool))
        x = jax.lax.dynamic_slice_in_dim(x, last, 1, axis=1)
        return steps.readout(self.config, (), self.method, self.weights.ends, x, state, sampling, {}, 0)[0]

    # Decode

    def _empty_slots(self) -> None:
        config, slots, length = self.config, self.num_slots, self.cache_length

        def buffers(taps):
            return {tap: steps.buffer(config, tap, slots, length, self.dtype) for tap in taps}

        self.caches = [KVCache.zeros(config, slots, length, self.dtype) for _ in self.weights.layers]
        self.state = DecodeState.idle(slots)
        self.embed_buffers, self.head_buffers = buffers(self.embed_taps), buffers(self.head_taps)
        self.layer_buffers = [buffers(self.layer_taps) for _ in self.weights.layers]

    def _decode_step(self) -> None:
        """Dispatches the forward pass of every slot's token, and the draw of the next one."""
        config, state, ends, column = self.config, self.state, self.weights.ends, self.step % COLUMNS
        x, self.embed_buffers = steps.decode_embed(config, self.embed_taps, ends, state, self.embed_buffers, column)
        for i, params in enumerate(self.weights.layers):
            x, self.caches[i], self.layer_buffers[i] = steps.decode_layer(
                config, self.layer_taps, params, x, self.caches[i], state, self.layer_buffers[i], column
            )
        self.state, self.head_buffers = steps.readout(
            config, self.head_taps, self.method, ends, x, state, self.slot_sampling, self.head_buffers, column
        )
        _sent((self.state.tokens, self.state.logprobs))
        self.step += 1
        if self.step % COLUMNS == 0:
            self._flush()

    def _flush(self) -> None:
        """Sends the captures of the last COLUMNS steps to the host; those sent before have arrived by now."""
        layered = steps.stacked(self.layer_buffers) if self.layer_taps else {}
        ends = self.embed_buffers | self.head_buffers
        self.chunks[-1:] = [_landed(chunk) for chunk in self.chunks[-1:]]
        self.chunks.append(_sent(layered | (steps.stacked([ends]) if ends else {})))

    # Captures on the host

    def _collect(self) -> None:
        self.chunks[-1:] = [_landed(chunk) for chunk in self.chunks[-1:]]
        for job in self.jobs:
            if job.finish is None:
                continue
            n, total = len(job.prompt), len(job.tokens)
            logprobs, blocks = zip(*_landed(job.prefilled), strict=True)
            job.prefilled.clear()
            scored = np.concatenate([part[0] for part in logprobs])
            job.logprobs = [np.nan, *scored[: n - 1].tolist(), *job.logprobs]
            # Decode steps job.first_step + (0 ... generated - 1), and the chunks that hold them.
            begin, end = job.first_step // COLUMNS, -(-(job.first_step + job.generated) // COLUMNS)
            skipped = job.first_step - begin * COLUMNS
            for tap in blocks[0]:
                parts = [_row(tap, block[tap], 0) for block in blocks]
                made = [_joined(tap, parts, total, slice(0, n))]
                if job.generated:
                    parts = [_row(tap, chunk[tap], job.slot) for chunk in self.chunks[begin:end]]
                    made.append(_joined(tap, parts, total, slice(skipped, skipped + job.generated)))
                job.captures[tap] = np.concatenate(made, axis=_axis(tap, "T"))


def _row(tap: str, value: np.ndarray, row: int) -> np.ndarray:
    """One row of [L, B, ...]; taps without layers have L = 1 in a chunk and no such axis in a block."""
    if TAPS[tap].layered:
        return value[:, row]
    return value.reshape(-1, *value.shape[-len(TAPS[tap].dims) :])[row]


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


def _sent(tree):
    """The tree, its transfer to the host begun."""
    jax.tree.map(lambda a: a.copy_to_host_async(), tree)
    return tree


def _landed(tree):
    """The tree on the host, as numpy; frees the device's copy."""
    return jax.tree.map(np.asarray, tree)


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that no step is torn; it takes effect before the next step, layer of a prompt or
    prompt. A second Ctrl-C interrupts at once. Other threads receive no Ctrl-C; a process that
    ignores it, as one in the background of a shell does, goes on ignoring it."""
    interrupted = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield interrupted
        return

    def handle(*_) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
