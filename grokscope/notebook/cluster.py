"""A Grok whose devices are those of several processes, on one host or many, driven from here through ipyparallel.

Every engine makes the same calls in the same order (grokscope.run.worker), one turn at a time. This process checks the
calls, hears the tokens, and builds the Traces; captures are gathered once, on the engines, and come from the first.
An engine that is lost takes the JAX job with it: every wait watches for that, and says so at once.
"""

import contextlib
import functools
import pickle
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import ipyparallel
import jax
import numpy as np
import psutil
from jax.sharding import AbstractMesh

from grokscope import look
from grokscope.checkpoint.ckpt0 import open_checkpoint
from grokscope.run import worker
from grokscope.run.decode import Job, deferred_interrupt
from grokscope.run.engine import Call, Grok, TokenEvent, bundled_checkpoint, open_tokenizer
from grokscope.run.worker import Loaded, Request, Turn

POLL = 0.02  # seconds between two looks at the engines
GRACE = 10.0  # seconds that engines may lag behind one that has failed


class ClusterError(RuntimeError):
    """The engines are lost; `restart()` brings them back."""


def cluster(
    path: Path | str | None = None,
    *,
    n: int | None = None,
    engines: str | type | ipyparallel.Client = "local",
    mesh: str | None = None,
    numerics: str | None = None,
    weights: str | None = None,
    memory: int | str | None = None,
    tokenizer: Path | str | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    **launcher: Any,
) -> "Cluster":
    """A model over the devices of several processes, with the interface of Grok.

    Args:
      path: of the checkpoint, at the same place on every host; read here for its config and tokenizer.
      n: engines, one process each; usually one a host or one a GPU.
      engines: "local", "slurm", "mpi", "ssh" or any launcher of ipyparallel; or an ipyparallel.Client whose engines are
        taken as they are, and are not stopped by `close`.
      mesh: "DxM" over all devices of all processes; None is "1x" all.
      environment: variables that engines start with, such as JAX_PLATFORMS or CUDA_VISIBLE_DEVICES.
      timeout: seconds for engines to come, queue time included, and then to load.
      launcher: what ipyparallel.Cluster takes besides, such as controller_ip, profile or engine_launcher_class options.
      numerics, weights, memory, tokenizer: as in `load`.

    Raises:
      ClusterError: engines that do not come, or are lost. What `load` raises, from the engines.
    """
    arguments = dict(path=path, mesh=mesh, numerics=numerics, weights=weights, memory=memory, tokenizer=tokenizer)
    if not isinstance(engines, ipyparallel.Client) and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"n={n!r}: expected how many engines to start, from 1")
    return Cluster(arguments, dict(n=n, engines=engines, **launcher), dict(environment or {}), timeout)


class Cluster(Grok):
    """See `cluster`."""

    def __init__(self, arguments: dict, options: dict, environment: dict[str, str], timeout: float):
        path = arguments["path"]
        checkpoint = open_checkpoint(bundled_checkpoint() if path is None else path)
        self._arguments = arguments | {"path": str(checkpoint.directory.resolve())}
        self._options, self._environment, self._timeout = options, environment, timeout
        self._ipp: ipyparallel.Cluster | None = None
        self._client: Any = None  # ipyparallel.Client, while there are engines
        self._lost: str | None = "the engines have not been started"
        self._loaded = self._start()
        self._device = self._loaded.device
        data, model = map(int, self._loaded.mesh.split("x"))
        self._describe(
            checkpoint,
            open_tokenizer(checkpoint, arguments["tokenizer"]),
            self._loaded.numerics,
            self._loaded.form,
            AbstractMesh((data, model), ("data", "model")),
        )

    # Engines

    def _start(self) -> Loaded:
        """Engines, joined, with the model on them; if that fails they are stopped again."""
        engines = self._options["engines"]
        try:
            if isinstance(engines, ipyparallel.Client):
                self._client = engines
            else:
                options = {"controller_ip": "127.0.0.1"} if engines == "local" else {}
                options |= {"log_level": 40, "engine_timeout": int(self._timeout), **self._options}
                self._ipp = ipyparallel.Cluster(**options)
                self._client = self._ipp.start_and_connect_sync(activate=False)
            self._engines = list(self._client.ids)
            loaded = self._join()
        except TimeoutError as err:
            self._stop()
            raise ClusterError(f"the engines did not come within {self._timeout:.0f} s: {err}") from err
        except BaseException:
            self._stop()
            raise
        self._lost = None
        return loaded

    def _join(self) -> Loaded:
        # Set here because ipyparallel.Cluster takes `environment` and drops it.
        set_variables = f"import os; os.environ.update({self._environment!r})"
        for engine in self._engines:
            self._client[engine].execute(set_variables).get(timeout=self._timeout)
        here = isinstance(self._options["engines"], str) and self._options["engines"] == "local"
        first = self._client[self._engines[0]].apply_async(worker.address, "127.0.0.1" if here else None)
        coordinator = first.get(timeout=self._timeout)
        calls = [
            self._client[i].apply_async(worker.join, coordinator, len(self._engines), rank, self._arguments)
            for rank, i in enumerate(self._engines)
        ]
        return self._answered(calls, "loading", self._timeout)

    def _on_all(self, method: str, *arguments, doing: str):
        """Calls a method of the worker on every engine; the first one's answer."""
        return self._answered(self._sent(method, *arguments, doing=doing), doing)

    def _sent(self, method: str, *arguments, doing: str) -> list:
        """The calls of a method of the worker, on every engine, which are on their way."""
        if self._lost:
            raise ClusterError(f"{self._lost}; bring the engines back with restart()")
        packed = cloudpickle.dumps(arguments)
        self._refuse_gone(doing)
        return [self._client[i].apply_async(worker.call, method, packed) for i in self._engines]

    def _refuse_gone(self, doing: str) -> None:
        controller = getattr(self._ipp and self._ipp.controller, "process", None)  # another host's has none
        if controller is not None and not controller.is_running():
            raise self._is_lost(f"the controller of the engines was lost while {doing}")
        gone = sorted(set(self._engines) - set(self._client.ids))
        if gone:
            raise self._is_lost(f"engine {', '.join(map(str, gone))} was lost while {doing}")

    def _answered(self, calls: list, doing: str, timeout: float | None = None):
        """The first one's, of all. Raises at once if an engine is gone, and soon after one that fails alone."""
        end = None if timeout is None else time.monotonic() + timeout
        failed_at = None
        answers: dict[int, tuple[bool, Any]] = {}  # by rank
        while waiting := [call for call in calls if not call.ready()]:
            self._refuse_gone(doing)
            if _errors(calls, answers) or any(call.ready() and not call.successful() for call in calls):
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > GRACE:
                    break
            if end is not None and time.monotonic() > end:
                raise self._is_lost(f"no answer within {timeout:.0f} s of {doing}")
            waiting[0].wait(POLL)
        for rank, call in enumerate(calls):
            if call.ready() and not call.successful():
                error = call.exception()
                what = "was lost" if getattr(error, "ename", "") == "EngineError" else f"failed ({error})"
                raise self._is_lost(f"engine {self._engines[rank]} {what} while {doing}") from error
        errors = _errors(calls, answers)
        for rank, error in errors.items():
            if len(errors) == len(calls) or self._lost:  # or none is up yet
                raise error
            what = f"failed alone ({type(error).__name__}: {error})"  # the others wait for it, or have gone on
            raise self._is_lost(f"engine {self._engines[rank]} {what} while {doing}") from error
        return answers[0][1]

    def _is_lost(self, why: str) -> ClusterError:
        self._lost = why
        return ClusterError(f"{why}. Bring the engines back with restart()")

    def _stop(self) -> None:
        if self._ipp is not None:
            for engine_set in self._ipp.engines.values():  # jax.distributed does not let go of SIGTERM
                for launcher in getattr(engine_set, "launchers", {0: engine_set}).values():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        launcher.signal(9)
            self._ipp.stop_cluster_sync()
            self._ipp = None
            if self._client is not None:
                self._client.close()
                self._client = None

    def restart(self) -> None:
        """Starts engines anew and loads the model again; what ran is lost. Raises as `cluster` does."""
        if isinstance(self._options["engines"], ipyparallel.Client):
            raise ClusterError("these engines were started elsewhere; start them again there, and call cluster anew")
        with self._alone():
            self._lost = "the engines were stopped, and did not come back"
            self._stop()
            self._loaded = self._start()

    def close(self) -> None:
        """Stops the engines that were started for it."""
        with self._alone():
            self._stop()
            self._lost = "this cluster was closed"

    # Running

    def _run(self, call: Call, todo: list[Job] | None) -> "RemoteRun":
        return RemoteRun(self, call, todo)

    def _bytes_to_read(self, passes: list[int]) -> int:
        if self._arguments["weights"] != "streamed":
            return 0
        return self._on_all("bytes_to_read", passes, doing="planning")

    def _facts(self) -> dict[str, str]:
        size = look.si(self._loaded.nbytes, "B")
        where = f"{len(self._engines)} engines, mesh {self._loaded.mesh} of {self._loaded.device}"
        return self._shape_facts() | {
            "weights": self._lost or f"{self.numerics}, {self._form} weights {size} on {where}"
        }


def _errors(calls: list, answers: dict[int, tuple[bool, Any]]) -> dict[int, Exception]:
    """Adds the answers that have come, and gives the errors among them, by rank."""
    for rank, call in enumerate(calls):
        if rank not in answers and call.ready() and call.successful():
            answers[rank] = pickle.loads(call.get())
    return {rank: result for rank, (ok, result) in answers.items() if not ok}


@contextlib.contextmanager
def _by_value(functions: Iterable[Callable]) -> Iterator[None]:
    """Pickles functions of the user's modules as they are now: by name, an engine would take its own, imported once."""
    parts = [part for fn in functions for part in (fn, getattr(fn, "func", fn), type(getattr(fn, "__self__", fn)))]
    already = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
    names = {getattr(part, "__module__", None) for part in parts} - already
    own = [sys.modules[name] for name in names if name in sys.modules and not _installed(name)]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


def _installed(name: str) -> bool:
    """Whether a module is the same on every engine."""
    file = getattr(sys.modules[name], "__file__", None)
    folders = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
    return name.split(".")[0] == "grokscope" or file is None or any(map(Path(file).is_relative_to, folders))


class RemoteRun:
    """A run on the engines."""

    def __init__(self, cluster: Cluster, call: Call, todo: list[Job] | None):
        self.cluster, self.call, self.hooks = cluster, call, call.hooks
        self.cut_short = self.over = False
        request = Request(
            call.hooks.kept, call.changes, call.hooks.sequences, jax.tree.map(np.asarray, call.rows),
            [job.prompt for job in call.jobs], None if todo is None else [job.row for job in todo], call.batch_size,
            call.ending and (call.ending.at_eos, call.ending.strings),
        )  # fmt: skip
        with _by_value(change.kind.fn for change in call.changes if change.kind.fn):
            self.num_slots, self.cache_length = cluster._on_all("begin", request, doing="beginning")

    def results(self) -> Iterator[Job]:
        pressed, stopped = False, None  # Ctrl-C; the row at whose token it was to stop
        try:
            while not self.over:
                with deferred_interrupt() as interrupted:
                    turn: Turn = self.cluster._on_all("turn", pressed or stopped is not None, doing="running")
                    told = self._told(turn)
                    stopped = stopped if told is None else told
                pressed |= interrupted.is_set()
                self.over = turn.over
                self.cut_short |= turn.cut_short or stopped is not None
                for done in turn.jobs:
                    job = self.call.jobs[done.pop("row")]
                    for name, value in done.items():
                        setattr(job, name, value)
                    if job.row == stopped:
                        job.finish = "interrupt"
                    yield job
        finally:
            self.over = True
            if not self.cluster._lost:
                self.cluster._sent("end", doing="ending")  # not waited for: they may be long at what was interrupted
        if pressed and not self.cut_short:
            raise KeyboardInterrupt

    def _told(self, turn: Turn) -> int | None:
        """Tells of the tokens; the row at whose token it was to stop."""
        on_token = None if self.call.ending is None else self.call.ending.on_token
        if on_token is None:
            return None
        for row, position, token, text, logprob in turn.tokens:
            glimpse = functools.partial(self._glimpse, row, position)
            try:
                on_token(TokenEvent(row, position, token, text, logprob, glimpse))
            except KeyboardInterrupt:
                return row
        return None

    def _glimpse(self, row: int, position: int, key: str, of_prompt: bool) -> np.ndarray:
        if self.over:
            raise KeyError(f"{key!r} of prompt {row} at {position} has gone by; its Trace has it")
        return self.cluster._on_all("glimpse", row, position, key, of_prompt, doing="looking")
