"""What every process of a cluster does: the same calls in the same order; process 0 answers.

A call goes on one turn at a time, driven from outside, so no process is ever inside a long loop: Stop comes between two
turns, in all of them at once, and nobody waits in a collective for one that has stopped. Answers are pickled; an error
is an answer too, of each process that meets it.
"""

import dataclasses
import functools
import pickle
import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle
import jax

from grokscope.model import sharding
from grokscope.run import engine
from grokscope.run.captures import Kept
from grokscope.run.decode import Job, Run
from grokscope.run.edits import Change
from grokscope.run.sampling import Sampling
from grokscope.run.staging import Hooks
from grokscope.run.staging import Sequence as Length


class Request(NamedTuple):
    """A call of Grok as it travels."""

    kept: tuple[Kept, ...]
    changes: tuple[Change, ...]
    sequences: list[Length]
    rows: Sampling
    prompts: list
    todo: list[int] | None
    batch_size: int
    ending: tuple[bool, tuple[str, ...]] | None


class Turn(NamedTuple):
    """What a turn brought: tokens (row, position, id, text, logprob), jobs that are done, and whether all are."""

    tokens: list[tuple[int, int, int, str, float]]
    jobs: list[dict[str, Any]]
    over: bool
    cut_short: bool


class _Worker:
    def __init__(self, grok: "engine.Grok"):
        self.grok = grok
        self.run: Run | None = None
        self.tokens: list[engine.TokenEvent] = []
        self.jobs: list[Job] = []
        self.done: list[Job] = []
        self.functions: dict[bytes, Callable] = {}
        self.stop = threading.Event()

    def begin(self, request: Request) -> tuple[int, int]:
        grok = self.grok
        ending = request.ending and engine.Ending(*request.ending, self.tokens.append)
        jobs = [grok.job(p, s.limit, i, ending) for i, (p, s) in enumerate(zip(request.prompts, request.sequences))]
        hooks = Hooks(grok.config, request.kept, tuple(map(self.known, request.changes)), request.sequences)
        todo = None if request.todo is None else [jobs[row] for row in request.todo]
        self.stop.clear()
        self.tokens.clear()
        self.jobs = jobs
        self.run = Run(grok.config, grok._weights, hooks, request.rows, jobs, request.batch_size, todo)
        return self.run.num_slots, self.run.cache_length

    def known(self, change: Change) -> Change:
        """With the function that came before, where the same one comes again, for which steps are compiled."""
        if change.kind.fn is None:
            return change
        fn = self.functions.setdefault(cloudpickle.dumps(change.kind.fn), change.kind.fn)
        return dataclasses.replace(change, kind=dataclasses.replace(change.kind, fn=fn))

    def turn(self, stop: bool) -> Turn:
        run = self.run
        assert run is not None
        if stop:
            self.stop.set()
        self.tokens.clear()
        for job in self.done:  # what was done in the turn before has been looked at
            job.captures = {}
        if not run.over:
            run.turn(self.stop)
        done = [{n: getattr(job, n) for n in ("row", "tokens", "logprobs", "captures", "finish")} for job in run.ready]
        self.done = list(run.ready)
        run.ready.clear()
        tokens = [(e.prompt, e.position, e.id, e.text, e.logprob) for e in self.tokens]
        return Turn(tokens, done, run.over, run.cut_short)

    def glimpse(self, row: int, position: int, key: str, of_prompt: bool):
        assert self.run is not None
        return self.run.glimpse(self.jobs[row], position, key, of_prompt)

    def bytes_to_read(self, passes: list[int]) -> int:
        return self.grok._bytes_to_read(passes)

    def end(self) -> None:
        self.run, self.jobs, self.done = None, [], []


_worker: _Worker | None = None


def _answer(call: Callable) -> bytes:
    """(True, result) or (False, the error), pickled; of the results the first process's alone."""
    try:
        result = call()
        return pickle.dumps((True, None if jax.process_index() else result))
    except Exception as err:
        return _packed(err)


def _packed(err: Exception) -> bytes:
    """(False, err), or what can be said of an error that cannot travel."""
    try:
        packed = cloudpickle.dumps((False, err))
        pickle.loads(packed)
        return packed
    except Exception:
        return pickle.dumps((False, RuntimeError(f"{type(err).__name__}: {err}")))


def address(host: str | None) -> str:
    """host:port at which this process can coordinate the others."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host or socket.gethostname()}:{probe.getsockname()[1]}"


def join(coordinator: str, num_processes: int, process: int, arguments: dict) -> bytes:
    """Joins the processes and loads the model; answers what was Loaded."""
    jax.distributed.initialize(coordinator, num_processes, process, initialization_timeout=120)
    return _answer(functools.partial(_load, arguments))


class Loaded(NamedTuple):
    """The model on the engines: mesh "DxM", bytes and form of all its weights, numerics, kind of device."""

    mesh: str
    nbytes: int
    form: str
    numerics: str
    device: str


def _load(arguments: dict) -> Loaded:
    global _worker
    arguments = arguments | {"mesh": arguments["mesh"] or f"1x{len(jax.devices())}"}
    grok = engine.load(**arguments)
    weights = grok._weights
    assert weights is not None
    _worker = _Worker(grok)
    device = jax.devices()[0].device_kind
    return Loaded(sharding.name(weights.mesh), weights.nbytes, weights.form, grok.numerics, device)


def call(method: str, arguments: bytes) -> bytes:
    """`method` of the worker; arguments are pickled."""
    return _answer(lambda: getattr(_worker, method)(*pickle.loads(arguments)))
