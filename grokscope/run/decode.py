"""Runs jobs through slots: prefill each prompt, decode all slots together, refill a slot that is free.

A pass is layer-major. The host reads the tokens of a step after it has dispatched that step's forward pass, so every
token it sees has had one, the last and EOS too. Else it waits in the token loop only where a prompt that takes a free
slot has large captures. Short prompts are prefilled together, in batches that the lengths in the call determine, and
each waits for a slot; longer ones alone. Decode runs in shapes of the call: number of slots, and cache length, which
holds the longest job. A job's numbers depend on these shapes, and not on what its neighbours are. Jobs are handed out
as they are done, with their captures; in memory remain those of the jobs in the slots, and of a batch that waits.
"""

import contextlib
import dataclasses
import functools
import itertools
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from grokscope.checkpoint.weights import Streamed, Weights
from grokscope.config import GrokConfig
from grokscope.model.sharding import on, replicated
from grokscope.model.transformer import MASKED, KVCache, Positions
from grokscope.run import steps
from grokscope.run.captures import Kept
from grokscope.run.hooks import CaptureKind, Stage
from grokscope.run.landing import Landing, Transfers, to_host, up_to
from grokscope.run.layers import Captured, Work, run_layer, split
from grokscope.run.processes import agreed, from_any
from grokscope.run.sampling import Sampling
from grokscope.run.staging import Hooks, Place, places_of
from grokscope.run.steps import COLUMNS, DecodeState

BATCH_SIZE = 8  # slots, unless the caller says otherwise
TOGETHER = 32768  # tokens of prompts that share a reading of streamed layers
ROWS = 16  # prompts that run together at most
ASKED = 16  # decode steps between two questions whether another process was told to stop
NEAR = 64  # how many prompts of a call are searched for those


@dataclasses.dataclass(eq=False)
class Job:
    """One prompt and what becomes of it.

    Attributes:
      prompt: int32 ids.
      limit: tokens to generate at most; 0 is a forward pass alone.
      row: its row of the call's Sampling.
      accept: called with each new token and its log-probability; says why to stop after it, or None.
      tokens: prompt and generated tokens; each has had its forward pass.
      logprobs: in nats, of the generated tokens; of all, with NaN first, once its prompt's captures are here.
      finish: "length", what `accept` said, or "interrupt"; None while it waits or runs.
      captures: {key: numpy [L,] dims}, when it is done.
      slot, first_step: where and from which decode step on it ran.
      glimpse: (position, key, whether of the prompt) -> what is captured so far, see `Run.glimpse`.
      chunks: captures that are here: of its prompt, then of its generated tokens.
      pools: its pools, one dictionary for each stage of a pass.
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
    glimpse: Callable[[int, str, bool], np.ndarray] | None = None
    chunks: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    pools: list[dict] = dataclasses.field(default_factory=list)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    def judge(self) -> None:
        """Asks whether the last token is the last of all."""
        self.finish = self.accept(self.tokens[-1], self.logprobs[-1])
        if self.finish is None and self.generated == self.limit:
            self.finish = "length"


@functools.cache
def blocks() -> tuple[int, ...]:
    """Query lengths that are compiled. On an accelerator longer ones, as experts are read once for more rows; fewer, as
    each compiles for 10 s, and no expert runs for what fills a block."""
    return (1, 32, 64, 128, 256, 512) if jax.default_backend() == "cpu" else (1, 32, 128, 512, 1024, 2048)


def layers_at_once(num_layers: int) -> int:
    """Layers of a compiled step of generation. Several on accelerators, where to call one takes longer than a layer
    that is small or cut over devices (0.28 ms for an H100): four, or so many that nothing is left over and compiled
    apart. On CPU four take 1.3 to 1.5 times as long as one by one."""
    return 1 if jax.default_backend() == "cpu" else max(n for n in range(1, 5) if num_layers % n == 0)


def alike(stages: list[Stage]) -> list[slice]:
    """Layers that run as one compiled step: neighbours, if the hooks of all are the same, or one."""
    found, most = [], layers_at_once(len(stages))
    for begin in range(0, len(stages), most):
        size = most if all(stage is stages[begin] for stage in stages[begin : begin + most]) else 1
        found += [slice(layer, layer + size) for layer in range(begin, begin + most, size)]
    return found


def block_lengths(length: int) -> list[int]:
    """Blocks that hold a prompt: as many of the longest as fit, then the shortest that holds the rest."""
    full, rest = divmod(length, blocks()[-1])
    return [blocks()[-1]] * full + ([min(b for b in blocks() if b >= rest)] if rest else [])


def cache_length(length: int) -> int:
    """Positions of a cache for `length` tokens: a power of two that also holds the padded blocks of a prompt."""
    return 1 << max(sum(block_lengths(length)) - 1, blocks()[1] - 1).bit_length()


class _Pass:
    """Prompts on their way through the layers together: a row each and idle ones behind, and what becomes of them.

    Attributes:
      jobs: of the rows, but for the idle ones.
      rows, lengths: numbers of the prompts, None for the idle ones, and their lengths.
      tokens, live: [rows, positions], padded; blocks: (first position, length) of each.
      at: (positions, tokens, live) of each block that is embedded.
      cache_length, hooked: positions of their caches; their hooks.
      landings: their captures; None for a prompt that is only there because it was when the call began.
      xs, scored: the stream of each block, and the log-probabilities of its tokens.
      caches: one a layer, if tokens follow; handed on to _Prefilled.
      lenses: of each block, to be read out at the end.
      pools: one dictionary for each stage.
    """

    def __init__(self, jobs: list[Job], wanted: set[Job], hooks: Hooks, dtype):
        of_blocks = block_lengths(max(len(job.prompt) for job in jobs))
        self.blocks = [(sum(of_blocks[:i]), length) for i, length in enumerate(of_blocks)]
        idle = num_rows(len(jobs)) - len(jobs)
        self.jobs = jobs
        self.rows: list[int | None] = [*(job.row for job in jobs), *[None] * idle]
        self.lengths = np.array([*(len(job.prompt) for job in jobs), *[0] * idle], np.int32)
        self.tokens = np.zeros((len(self.rows), sum(of_blocks)), np.int32)
        self.live = np.arange(self.tokens.shape[1]) < self.lengths[:, None]
        self.tokens[self.live] = np.concatenate([job.prompt for job in jobs])
        self.at: list[tuple[Positions, np.ndarray, np.ndarray]] = []
        self.cache_length = cache_length(self.tokens.shape[1])
        self.hooked = hooks.prefill(self.rows, self.cache_length)
        self.landings = [
            Landing(hooks, job.row, self.hooked.cut, self.blocks, dtype) if job in wanted else None for job in jobs
        ]
        self.xs: list[jax.Array] = []
        self.scored: list[jax.Array] = []
        self.caches: list[KVCache] = []
        self.lenses: list[list[tuple[CaptureKind, Place, jax.Array]]] = [[] for _ in self.blocks]
        self.pools: list[dict] = []


class _Prefilled(NamedTuple):
    """A job that needs only a slot: the caches and first tokens of its batch, and which row is its own."""

    job: Job
    caches: list[KVCache]
    first: DecodeState
    row: int


class Run:
    """One call of trace or generate.

    Attributes:
      num_slots, cache_length: shapes of decode; 0 if nothing is generated.
    """

    def __init__(
        self, config: GrokConfig, weights: Weights, hooks: Hooks, sampling: Sampling, jobs: list[Job], batch_size: int,
        todo: list[Job] | None = None,
    ):  # fmt: skip
        """`todo`: those of the jobs that run; the rest only shape the call."""
        self.config, self.weights, self.hooks, self.sampling = config, weights, hooks, sampling
        self.dtype = weights.ends["embedding"]["w"].dtype
        self.streamed = isinstance(weights, Streamed)
        self.method = sampling.method(config.vocab_size)
        steps.make_room(hooks.functions)
        lengths = [(len(job.prompt), job.limit) for job in jobs]
        self.num_slots, self.cache_length = shapes(lengths, batch_size, weights.mesh)
        self.wanted = set(jobs if todo is None else todo)
        together = [[jobs[prompt] for prompt in batch] for batch in batches(lengths, self.num_slots)]
        self.waiting = deque(batch for batch in together if not self.wanted.isdisjoint(batch))
        self.slots: list[Job | None] = [None] * self.num_slots
        self.prefilled: deque[_Prefilled] = deque()
        self.ready: deque[Job] = deque()
        self.transfers = Transfers()
        self.arriving: _Pass | None = None  # the last of its captures are on their way
        self.segments: list[tuple[Job, int, int]] = []  # steps of jobs that left their slot since the last flush
        self.pending: tuple[dict, list] | None = None  # the last chunk, on its way, and the segments in it
        self.step = 0
        self.cut_short = self.over = False
        if self.num_slots:
            with on(weights.mesh):
                self._empty_slots()

    def results(self) -> Iterator[Job]:
        """The jobs as they are done. On Ctrl-C those that run finish as "interrupt", and those that wait never come; if
        it came too late to cut anything short, KeyboardInterrupt is raised at the end."""
        pressed = False
        while True:
            with deferred_interrupt() as interrupted:
                if pressed:  # in a turn that also finished something, which was handed out first
                    interrupted.set()
                while not self.ready and not self.over:
                    self.turn(agreed(interrupted, not any(self.slots) or self.step % ASKED == 0))
            pressed |= interrupted.is_set()
            if not self.ready:
                break
            yield self.ready.popleft()
        if from_any(pressed) and not self.cut_short:
            raise KeyboardInterrupt

    def turn(self, interrupted: threading.Event) -> None:
        """Prompts into free slots and one decode step. What is done then lies in `ready`; at the end it is `over`."""
        with on(self.weights.mesh):
            try:
                self._turn(interrupted)
            except KeyboardInterrupt:
                self._cut_short()

    def _cut_short(self) -> None:
        running = [job for job in self.slots if job]
        self.cut_short |= bool(running or self.prefilled or self.waiting)
        self.waiting.clear()
        self.prefilled.clear()
        for job in running:
            self._leave(job, "interrupt")

    def _turn(self, interrupted: threading.Event) -> None:
        """Prompts into free slots, one decode step, and its tokens read; at the end, what is still on its way."""
        self._refill(interrupted)
        if self.ready:
            return
        if not any(self.slots):
            self._land()
            if self.segments:
                self._flush()
            self._land_chunk()
            self.over = not self.waiting
            return
        if interrupted.is_set():
            raise KeyboardInterrupt
        fed = self.state
        self._decode_step()
        tokens, logprobs = np.asarray(fed.tokens), np.asarray(fed.logprobs)
        if self.step % COLUMNS == 1:
            self._land_chunk()
        running = [job for job in self.slots if job]
        for job in running:  # all of them, then callbacks: one that raises leaves tokens and captures in step
            job.tokens.append(int(tokens[job.slot]))
            job.logprobs.append(float(logprobs[job.slot]))
        for job in running:
            job.judge()
            if job.finish:
                self._leave(job, job.finish)

    def _leave(self, job: Job, finish: str) -> None:
        """Frees the slot of a job that is finished."""
        job.finish = finish
        self.slots[job.slot] = None
        self.state = steps.retired(self.state, job.slot)
        if any(self._decode_pools()):
            taken = to_host(steps.taken(self._decode_pools(), job.slot))
            job.pools = [own | of_slot for own, of_slot in zip(job.pools, taken, strict=True)]
        if not self.captures_decode or job.first_step == self.step:
            self._done(job)
        elif self.step % COLUMNS:  # else its last chunk is pending already
            begin = max(job.first_step, self.step - self.step % COLUMNS)
            self.segments.append((job, begin, self.step))

    # Prefill

    def _refill(self, interrupted: threading.Event) -> None:
        """Prefills waiting prompts, until some are done that have no tokens to make; others take a free slot."""
        seated = self._seat_all()
        while not self.ready and (together := self._next_batches()):
            for one, first in self._prefill(together, interrupted):
                self.waiting.popleft()
                self._land()
                self.arriving = one
                if first is not None:
                    self._wait_for_slots(one, first)
            seated |= self._seat_all()
        if seated:
            rows = np.array([0 if j is None else j.row for j in self.slots])
            self.slot_sampling = replicated(jax.tree.map(lambda a, rows=rows: a[rows], self.sampling))
            self._take_hooks([None if j is None else j.row for j in self.slots])

    def _next_batches(self) -> list[list[Job]]:
        """Those that are prefilled next: one, or with streamed weights as many as may share a reading of the layers;
        none while others wait for a slot."""
        if self.prefilled:
            return []
        sizes = ([(len(job.prompt), job.limit) for job in batch] for batch in self.waiting)
        count = prefilled_together(sizes, self.slots.count(None))
        return list(itertools.islice(self.waiting, count if self.streamed else min(count, 1)))

    def _wait_for_slots(self, one: _Pass, first: DecodeState) -> None:
        for row, job in enumerate(one.jobs):
            if job in self.wanted:
                job.pools = self._about(job, steps.taken(one.pools, row) if any(one.pools) else one.pools)
                self.prefilled.append(_Prefilled(job, one.caches, first, row))
        one.caches = []

    def _seat_all(self) -> bool:
        """Gives prompts that wait for nothing else the slots that are free; whether any."""
        seated = False
        while self.prefilled and None in self.slots:
            job, caches, first, row = self.prefilled.popleft()
            slot, rows = self.slots.index(None), len(first.tokens)
            job.slot, job.first_step, job.glimpse = slot, self.step, functools.partial(self.glimpse, job)
            job.tokens = job.prompt.tolist()
            self.caches = [
                steps.seated_cache(c, own, slot, row, rows) for c, own in zip(self.caches, caches, strict=True)
            ]
            self.state = steps.seated(self.state, first, slot, row)
            self._seat_pools(job)
            self.slots[slot], seated = job, True
        return seated

    def _prefill(
        self, together: list[list[Job]], interrupted: threading.Event
    ) -> list[tuple[_Pass, DecodeState | None]]:
        """Layer by layer, block by block; then the first new token, and the log-probabilities of the prompts."""
        passes = [_Pass(batch, self.wanted, self.hooks, self.dtype) for batch in together]
        for one in passes:
            self._embed(one)
        for layer in range(self.config.num_layers):
            if interrupted.is_set():
                raise KeyboardInterrupt
            works = [self._work(one, layer) for one in passes]
            run_layer(self.config, self.weights, layer, works)
            for one, work in zip(passes, works, strict=True):
                one.pools.append(work.pools)
                for block in range(len(one.blocks)):
                    self._send(one, block, layer, work.captures[block])
                work.captures = []  # or they would be held while the next layer runs
                if one.jobs[0].limit:
                    one.caches.append(work.cache)
        return [(one, self._score(one)) for one in passes]

    def _embed(self, one: _Pass) -> None:
        stage, given = one.hooked.embed
        pools = self.hooks.pools(stage, len(one.rows))
        for i, (begin, length) in enumerate(one.blocks):
            block, start = slice(begin, begin + length), np.full(len(one.rows), begin, np.int32)
            tokens, live = one.tokens[:, block], one.live[:, block]
            x, positions, captured = steps.embed(
                self.config, stage, self.weights.ends, tokens, start, live, pools, given
            )
            pools, captured = split(stage, captured)
            self._send(one, i, "embed", captured)
            one.xs.append(x)
            one.at.append((positions, tokens, live))
        one.pools = [pools]

    def _work(self, one: _Pass, layer: int) -> Work:
        stage, given = one.hooked.layers[layer]
        rows = len(one.rows)
        cache = KVCache.zeros(self.config, rows, one.cache_length, self.dtype)
        return Work(stage, given, one.at, one.xs, cache, self.hooks.pools(stage, rows), [[] for _ in one.at])

    def _score(self, one: _Pass) -> DecodeState | None:
        stage, given = one.hooked.head
        first, last = self._first(one) if one.jobs[0].limit else (None, None)
        following = np.full(one.tokens.shape, -1, np.int32)
        for row, own in enumerate(one.jobs):
            following[row, : len(own.prompt) - 1] = own.prompt[1:]
        pools = self.hooks.pools(stage, len(one.rows))
        for i, (x, at, (begin, length)) in enumerate(zip(one.xs, one.at, one.blocks, strict=True)):
            targets = following[:, begin : begin + length]
            logprobs, captured = steps.score(
                self.config, stage, self.weights.ends, x, np.maximum(targets, 0), *at, pools, given
            )
            pools, captured = split(stage, captured)
            self._send(one, i, "head", captured)
            one.scored.append(to_host(logprobs))
            if first is not None and i == len(one.xs) - 1 and self.hooks.lenses:
                targets = steps.noted(targets, first, last)
            for kind, place, value in one.lenses[i]:
                after = targets
                if kind.positions:
                    inside = self.hooks.padded_positions(kind.key, one.rows) - begin
                    after = steps.at_columns(targets, np.clip(inside, 0, targets.shape[1] - 1))
                self.transfers.send(one.landings, i, place, self._read(kind, value, after))
        one.pools.append(pools)
        one.xs, one.at, one.lenses = [], [], []  # it waits for its captures, without what only the layers needed
        return first

    def _send(self, one: _Pass, block: int, place: Place, captured: list[Captured]) -> None:
        """What is kept of a block's captures to the host; lenses wait until it is known what follows."""
        kept = [found for found in captured if place in places_of(self.hooks.by_key[found[0].key])]
        one.lenses[block] += [(kind, place, value) for kind, _, value in kept if kind.reduce == "lens"]
        whole = {key: value for kind, key, value in kept if kind.reduce != "lens"}
        self.transfers.send(one.landings, block, place, whole)

    def _read(self, kind: CaptureKind, value: jax.Array, following) -> dict[str, jax.Array]:
        """A lens read out."""
        return dict(
            zip(kind.outputs, steps.lens(self.config, kind.k, self.weights.ends, value, following), strict=True)
        )

    def _first(self, one: _Pass) -> tuple[DecodeState, np.ndarray]:
        """The first generated tokens, drawn from the last position of each prompt, and where that is in its block."""
        sampling = jax.tree.map(lambda a: a[[row or 0 for row in one.rows]], self.sampling)
        positions = np.maximum(one.lengths - 1, 0)
        state = dataclasses.replace(DecodeState.idle(len(one.rows)), positions=positions, live=one.lengths > 0)
        last = np.maximum(positions - one.blocks[-1][0], 0)
        (stage, given), x = one.hooked.draw, steps.at_positions(one.xs[-1], last)
        args = (self.method, self.weights.ends, x, state, sampling, {}, given, 0)
        return steps.readout(self.config, stage, *args)[0], last

    # Decode

    def _empty_slots(self) -> None:
        config, slots, length = self.config, self.num_slots, self.cache_length
        self.caches = [KVCache.zeros(config, slots, length, self.dtype) for _ in range(config.num_layers)]
        self.state = DecodeState.idle(slots)
        self._take_hooks([None] * slots)
        made = [self.hooks.buffers(place, slots, COLUMNS, length, self.dtype) for place in self.hooks.places]
        self.embed_buffers, *self.layer_buffers, self.head_buffers = made
        places = 0 if self.streamed else layers_at_once(config.num_layers)
        self.spares = [self.hooks.spares(slots, COLUMNS, length, self.dtype) for _ in range(places)]
        self.dropped = self.hooks.dropped()
        self.captures_decode = any(not kind.pooled for stage in self._decode_stages() for kind in stage.captures)
        self.targets = np.full((slots, COLUMNS), -1, np.int32) if self.hooks.lenses else None

    def _take_hooks(self, rows: list[int | None]) -> None:
        """Those of the prompts in the slots."""
        self.hooked = self.hooks.decode(rows, self.cache_length)
        self.together = alike([staged.stage for staged in self.hooked.layers])

    def _decode_stages(self) -> list[Stage]:
        return [staged.stage for staged in (self.hooked.embed, *self.hooked.layers, self.hooked.head)]

    def _decode_pools(self) -> list[dict]:
        buffers = [self.embed_buffers, *self.layer_buffers, self.head_buffers]
        return [
            {kind.key: own[kind.key] for kind in stage.captures if kind.pooled}
            for stage, own in zip(self._decode_stages(), buffers, strict=True)
        ]

    def _seat_pools(self, job: Job) -> None:
        """A job's pools into its slot; those that only its prompt has stay with the job."""
        pools = self._decode_pools()
        if not any(pools):
            return
        rows = [
            {
                key: own.get(key, jax.tree.map(lambda a: np.zeros(a.shape[1:], a.dtype), pool))
                for key, pool in of.items()
            }
            for of, own in zip(pools, job.pools, strict=True)
        ]
        pools = steps.seated_pools(pools, rows, job.slot)
        for buffers, new in zip([self.embed_buffers, *self.layer_buffers, self.head_buffers], pools, strict=True):
            buffers.update(new)

    def _decode_step(self) -> None:
        """Dispatches the forward pass of every slot's token, and the draw of the next one."""
        config, state, ends, column = self.config, self.state, self.weights.ends, self.step % COLUMNS
        stage, given = self.hooked.embed
        x, positions, self.embed_buffers = steps.decode_embed(
            config, stage, ends, state, self.embed_buffers, given, column
        )
        if self.streamed:
            for i in range(config.num_layers):
                x = self._streamed_step(i, x, positions, column)
        else:
            for at in self.together:
                x = self._layers_step(at, x, positions, column)
        stage, given = self.hooked.head
        self.state, self.head_buffers = steps.readout(
            config, stage, self.method, ends, x, state, self.slot_sampling, self.head_buffers, given, column
        )
        if self.targets is not None:
            self.targets = steps.noted(self.targets, self.state, column)
        to_host((self.state.tokens, self.state.logprobs))
        self.step += 1
        if self.step % COLUMNS == 0 and self.captures_decode:
            self._flush()

    def _layers_step(self, at: slice, x: jax.Array, positions: Positions, column: int) -> jax.Array:
        """Layers whose hooks are alike."""
        given, dropped = [staged.given for staged in self.hooked.layers[at]], self.dropped[at]
        buffers = self.layer_buffers[at]
        if any(dropped):
            buffers = [
                own | {key: spare[key] for key in keys} for own, spare, keys in zip(buffers, self.spares, dropped)
            ]
        x, self.caches[at], buffers = steps.decode_layers(
            self.config, self.hooked.layers[at.start].stage, self.weights.layers[at], x, self.caches[at], positions,
            self.state, buffers, given, column,
        )  # fmt: skip
        if any(dropped):
            for own, spare, keys in zip(buffers, self.spares, dropped):
                spare |= {key: own.pop(key) for key in keys}
        self.layer_buffers[at] = buffers
        return x

    def _streamed_step(self, layer: int, x: jax.Array, positions: Positions, column: int) -> jax.Array:
        """`decode_layers` of one, in the pieces that streamed weights take."""
        (stage, given), state, buffers = self.hooked.layers[layer], self.state, self.layer_buffers[layer]
        at = (positions, state.tokens[:, None], state.live[:, None])
        pools = {kind.key: buffers.pop(kind.key) for kind in stage.captures if kind.pooled}
        work = Work(stage, given, [at], [x], self.caches[layer], pools, [[]])
        run_layer(self.config, self.weights, layer, [work])
        captured = {key: value for _, key, value in work.captures[0] if key in buffers}
        self.layer_buffers[layer] = steps.written(stage, buffers, captured, column) | work.pools
        self.caches[layer] = work.cache
        return work.xs[0]

    def _flush(self) -> None:
        """Sends the captures of the last steps, COLUMNS at most, to the host."""
        self._land_chunk()
        captures: list = []
        buffers = [self.embed_buffers, *self.layer_buffers, self.head_buffers]
        for stage, own in zip(self._decode_stages(), buffers, strict=True):
            captures += split(stage, own)[1]
        begin = self.step - (self.step % COLUMNS or COLUMNS)
        running = [(job, max(job.first_step, begin), self.step) for job in self.slots if job]
        by_key: dict[str, list[jax.Array]] = {}
        for kind, key, value in captures:
            read = self._read(kind, value, self.targets) if kind.reduce == "lens" else {key: value}
            for name, output in read.items():
                by_key.setdefault(name, []).append(output)
        chunk = to_host(steps.stacked(by_key))
        self.pending = chunk, [*self.segments, *running]
        self.segments = []

    # Captures on the host

    def _land(self) -> None:
        """The captures of the last prompts are here."""
        one, self.arriving = self.arriving, None
        if one is None:
            return
        scored = np.concatenate(on_host(one.scored), axis=1)
        pools = [] if one.jobs[0].limit else on_host(one.pools)
        for row, (job, landing) in enumerate(zip(one.jobs, one.landings, strict=True)):
            if landing is None:
                continue
            job.logprobs = [np.nan, *scored[row, : len(job.prompt) - 1].tolist(), *job.logprobs]
            job.chunks = [self.transfers.finish(landing)]
            if not job.limit:
                job.tokens, job.finish = job.prompt.tolist(), "length"
                job.pools = self._about(job, jax.tree.map(lambda a, row=row: a[row], pools))
                self._done(job)

    def _about(self, job: Job, pools: list[dict]) -> list[dict]:
        """Those that are about any position of its prompt; its neighbours may have more."""
        own = {k.key for k in self.hooks.kept if len(self.hooks.prompt_positions(k, job.row))}
        return [{key: pool for key, pool in of_stage.items() if key in own} for of_stage in pools]

    def glimpse(self, job: Job, position: int, key: str, of_prompt: bool) -> np.ndarray:
        """A capture of a job before its Trace is there: of its prompt [L, T, ...], or of its token at `position`,
        [L, ...], one of the last COLUMNS.

        Waits for the device, and costs a transfer each time. Raises KeyError for what is not captured whole, or not of
        this prompt or token, and once it has gone into the Trace.
        """
        kept = next((k for k in self.hooks.kept if key in k.outputs() and self.hooks.takes(k, job.row)), None)
        if kept is None or kept.pooled:
            raise KeyError(f"{key!r} is not captured of prompt {job.row}, position by position")
        if not of_prompt and (kept.reduce == "lens" or not kept.outputs()[key][0].startswith("T")):
            raise KeyError(f"{key!r} cannot be looked at token by token while it runs")
        if of_prompt and self._arrives(job):
            self._land()
        step = job.first_step + position - len(job.prompt)
        if key in job.captures:
            return self._glimpse_of_done(job, position, kept, key, of_prompt)
        overwritten = job.glimpse is None or self.step - step > COLUMNS
        if (not job.chunks) if of_prompt else overwritten:
            raise KeyError(f"{key!r} of prompt {job.row} at {position} has gone by; its Trace has it")
        if of_prompt:
            return np.array(job.chunks[0][key])
        held = [own[key] for own in (self.embed_buffers, *self.layer_buffers, self.head_buffers) if key in own]
        if not held:
            raise KeyError(f"{key!r} is not captured at generated tokens")
        return np.asarray(steps.glimpsed(held, job.slot, step % COLUMNS))

    def _glimpse_of_done(self, job: Job, position: int, kept: Kept, key: str, of_prompt: bool) -> np.ndarray:
        """As `glimpse`, of a job that is done and not yet a Trace."""
        length, (dims, _) = len(job.prompt), kept.outputs()[key]
        there = kept.where.mask(length, len(job.tokens))
        axis = dims.index("T") + (kept.layers is not None)
        if of_prompt:
            return up_to(job.captures[key].take(np.arange(there[:length].sum()), axis), dims, length)
        if not there[position]:
            raise KeyError(f"{key!r} is not captured at generated tokens")
        return job.captures[key].take(there[:position].sum(), axis)

    def _arrives(self, job: Job) -> bool:
        return self.arriving is not None and job in self.arriving.jobs

    def _land_chunk(self) -> None:
        """The last chunk is here: each job gets its steps of it, and those that have all are done."""
        if self.pending is None:
            return
        (chunk, segments), self.pending = self.pending, None
        self._land()
        chunk = on_host(chunk)
        for job, begin, end in segments:
            end = min(end, job.first_step + job.generated) if job.finish else end
            positions = np.arange(begin, end) - job.first_step + len(job.prompt)
            if end > begin:
                job.chunks.append(self._segment(chunk, job, begin % COLUMNS, positions))
            if job.finish:
                self._done(job)

    def _segment(self, chunk: dict, job: Job, column: int, positions: np.ndarray) -> dict[str, np.ndarray]:
        parts = {}
        for kept in self.hooks.kept:
            if kept.pooled or not self.hooks.takes(kept, job.row):
                continue
            n, end = len(job.prompt), int(positions[-1]) + 1
            at = np.flatnonzero(kept.where.mask(n, end)[positions[0] :]) + column
            for key, (dims, _) in kept.outputs().items():
                if key in chunk:
                    value = _row(chunk[key], kept, job.slot)
                    parts[key] = up_to(np.take(value, at, axis=dims.index("T") + (kept.layers is not None)), dims, end)
        return parts

    def _done(self, job: Job) -> None:
        """Joins what a finished job has, and hands it out."""
        if self._arrives(job):
            self._land()
        n, total = len(job.prompt), len(job.tokens)
        for kept in self.hooks.kept:
            if not self.hooks.takes(kept, job.row):
                continue
            if kept.pooled:
                if any(kept.key in pools for pools in job.pools):  # else no position of this prompt was asked for
                    job.captures[kept.key] = _pooled(kept, on_host(job.pools))
                continue
            for key, (dims, _) in kept.outputs().items():
                if own := [part.pop(key) for part in job.chunks if key in part]:
                    job.captures[key] = _joined(own, dims, kept, total)
            rank = job.captures.get(f"{kept.key}_rank") if kept.reduce == "lens" else None
            if rank is not None and kept.where.mask(n, total)[-1]:
                rank[..., -1] = -1  # nothing came after the last token
        job.chunks, job.pools, job.glimpse = [], [], None
        self.ready.append(job)


def shapes(lengths: list[tuple[int, int]], batch_size: int, mesh: Mesh | AbstractMesh | None) -> tuple[int, int]:
    """(slots, cache length) of the decode step for prompts of these lengths and limits; zeros if nothing is decoded.

    On a mesh the data axis divides the slots.
    """
    decoding = [(length, limit) for length, limit in lengths if limit]
    slots = min(batch_size, 1 << (len(decoding) - 1).bit_length()) if decoding else 0
    data = 1 if mesh is None else mesh.shape["data"]
    slots = -(-slots // data) * data
    return slots, max((cache_length(length + limit) for length, limit in decoding), default=0)


def tokens_of_passes(lengths: list[tuple[int, int]], batch_size: int, mesh: Mesh | AbstractMesh | None) -> list[int]:
    """Tokens of each pass that reads streamed layers, where prompts of these lengths make all their limits allow."""
    slots, _ = shapes(lengths, batch_size, mesh)
    groups = [list(itertools.chain(*group)) for group in reading_groups(batches(lengths, slots), lengths, slots)]
    steps = sum(max(lengths[p][1] for p in group) for group in groups)
    return [sum(lengths[p][0] for p in group) for group in groups] + [slots] * steps


def batches(lengths: list[tuple[int, int]], slots: int) -> list[list[int]]:
    """Numbers of the prompts, of these lengths and limits, that run through the layers together.

    That is each alone, unless it is short: such of one block's length share as many positions as the longest block has,
    but are not more than the slots they go to.
    """
    found: list[list[int]] = []
    for begin in range(0, len(lengths), NEAR):
        filling: dict[tuple[int, bool], list[int]] = {}
        for prompt in range(begin, min(begin + NEAR, len(lengths))):
            length, limit = lengths[prompt]
            block = block_lengths(length)[0]
            kind, most = (block, bool(limit)), min(ROWS, blocks()[-1] // block, slots if limit else ROWS)
            if kind not in filling or len(filling[kind]) == most:
                filling[kind] = []
                found.append(filling[kind])
            filling[kind].append(prompt)
    return found


def num_rows(prompts: int) -> int:
    """Rows of a batch of so many: a power of two, so that few shapes are compiled."""
    return 1 << (prompts - 1).bit_length()


def prefilled_together(sizes: Iterable[list[tuple[int, int]]], free: int) -> int:
    """How many batches of prompts of these lengths and limits, from the first on, may share a reading of streamed
    layers where as many slots are free."""
    count = tokens = seats = 0
    for batch in sizes:
        tokens += sum(length for length, _ in batch)
        seats += sum(bool(limit) for _, limit in batch)
        if (seats and not free) or (count and (seats > free or tokens > TOGETHER)):
            break
        count += 1
    return count


def reading_groups(together: list[list[int]], lengths: list[tuple[int, int]], slots: int) -> list[list[list[int]]]:
    """The batches that share each reading, if all of a group end together."""
    groups, begin = [], 0
    while begin < len(together):
        sizes = ([lengths[p] for p in batch] for batch in itertools.islice(together, begin, None))
        count = prefilled_together(sizes, slots)
        groups.append(together[begin : begin + count])
        begin += count
    return groups


def _row(value: np.ndarray, kept: Kept, row: int) -> np.ndarray:
    """One row of [layers, B, ...], without the axis of layers where the tap has none."""
    return value[:, row] if kept.layers is not None else value[0, row]


def _joined(parts: list[np.ndarray], dims: str, kept: Kept, total: int) -> np.ndarray:
    """Parts joined along positions; the axis of keys, where there is one, made `total` long."""
    if dims.endswith("S"):
        fill = MASKED if kept.tap == "attn_scores" else 0
        spare = [[(0, 0)] * (part.ndim - 1) + [(0, total - part.shape[-1])] for part in parts]
        parts = [np.pad(p, s, constant_values=fill) if s[-1][1] else p for p, s in zip(parts, spare, strict=True)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=dims.index("T") + (kept.layers is not None))


def _pooled(kept: Kept, places: list[dict]) -> np.ndarray:
    """The result of the pools of a job, stacked over layers."""
    found = []
    for pools in places:
        if kept.key not in pools:
            continue
        pool = pools[kept.key]
        if kept.reduce == "count":
            found.append(pool)
            continue
        number, mean, *spread = pool
        value = np.stack([mean, spread[0] / max(number, 1)]) if spread else mean
        found.append(value if number else np.full_like(value, np.nan))  # the sequence ended before any
    value = np.stack(found)
    return value if kept.layers is not None else value[0]


def on_host(tree):
    """The tree on the host, as numpy; frees the device's copy."""
    return jax.tree.map(np.asarray, tree)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that no step is torn; it takes effect before the next step, or layer of a batch of
    prompts. A second Ctrl-C interrupts at once. Inside of another, it is that one's event. Other threads receive no
    Ctrl-C; a process that ignores it, as one in the background of a shell does, goes on ignoring it.
    """
    before, deferred = signal.getsignal(signal.SIGINT), _Deferred()
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield deferred.interrupted
    elif isinstance(before, _Deferred):
        yield before.interrupted
    else:
        signal.signal(signal.SIGINT, deferred)
        try:
            yield deferred.interrupted
        finally:
            signal.signal(signal.SIGINT, before)


class _Deferred:
    """A handler of Ctrl-C."""

    def __init__(self):
        self.interrupted = threading.Event()

    def __call__(self, *_) -> None:
        if self.interrupted.is_set():
            raise KeyboardInterrupt
        self.interrupted.set()
