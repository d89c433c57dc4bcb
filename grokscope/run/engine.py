"""Grok: a loaded model that traces and generates. `load` is where a session begins."""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from grokscope import look
from grokscope.checkpoint.ckpt0 import Checkpoint, Progress, open_checkpoint, slots
from grokscope.checkpoint.weights import Reader, Streamed, Weights, default_form, streaming_memory
from grokscope.checkpoint.weights import load as load_weights
from grokscope.config import GrokConfig
from grokscope.model import sharding
from grokscope.model.quant import QuantizedWeight, dequantize
from grokscope.model.sharding import make_mesh
from grokscope.run import captures, edits, landing, steps
from grokscope.run.captures import Wish
from grokscope.run.compiled import keep_compiled
from grokscope.run.decode import BATCH_SIZE, Job, Run, deferred_interrupt, tokens_of_passes
from grokscope.run.dump import Dump, Writer
from grokscope.run.plan import Plan, as_bytes, priced, refuse_over
from grokscope.run.processes import from_first, in_first, wait_for_all
from grokscope.run.sampling import Sampling
from grokscope.run.staging import Hooks, misses
from grokscope.run.staging import Sequence as Length
from grokscope.run.trace import Trace
from grokscope.tokenizer import Tokenizer

NUMERICS = ("float32", "bfloat16")
BUNDLED = "grok-1-mini"

Prompt = str | Sequence[int] | np.ndarray
Prompts = Prompt | Sequence[Prompt]


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """A generated token, as `on_token` receives it.

    Attributes:
      prompt: index of its prompt in the call.
      position: where it stands in its sequence.
      id, logprob: the token and its log-probability in nats, before temperature and filters.
      text: the whole characters it completes; "" inside a UTF-8 sequence.
      glimpse: a look at captures while it runs: glimpse("router_logits", False) is [L, E] of this token, and
        glimpse("router_logits", True) [L, T, E] of the prompt. Taps whose dims begin with T. Waits for the device.
        Raises KeyError for what is not captured, and once the Trace has it.
    """

    prompt: int
    position: int
    id: int
    text: str
    logprob: float
    glimpse: Callable[[str, bool], np.ndarray] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Loss:
    """Mean loss over predicted tokens. `bits_per_byte` is NaN without a tokenizer."""

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


class Running(Protocol):
    """What becomes of a call: a Run here, or one on the engines of a cluster. As in Run."""

    num_slots: int
    cache_length: int
    hooks: Hooks
    cut_short: bool

    def results(self) -> Iterator[Job]: ...


@dataclasses.dataclass(frozen=True)
class Ending:
    """What ends a continuation, and who is told of its tokens."""

    at_eos: bool
    strings: tuple[str, ...]
    on_token: Callable[[TokenEvent], None] | None


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that was checked and has not begun."""

    hooks: Hooks
    changes: tuple["edits.Change", ...]
    rows: Sampling
    jobs: list[Job]
    batch_size: int
    ending: Ending | None
    sampling: dict
    edits: list[dict]


def default_numerics() -> str:
    """What `load` and `train` compute in where nobody says: "float32" on CPU, "bfloat16" on accelerators."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def bundled_checkpoint() -> Path:
    """Where grok-1-mini lies: inside an installed package, or in `checkpoints/` of a clone."""
    package = Path(__file__).parents[1]
    places = [package / "checkpoints" / BUNDLED, package.parent / "checkpoints" / BUNDLED]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"the bundled {BUNDLED} is neither at {places[0]} nor at {places[1]}; give a path to load")


def load(
    path: Path | str | None = None,
    *,
    numerics: str | None = None,
    weights: str | None = None,
    mesh: str | None = None,
    memory: int | str | None = None,
    tokenizer: Path | str | None = None,
    progress: Progress = iter,
) -> "Grok":
    """A model ready to run.

    Args:
      path: folder of a checkpoint in the released layout; None is the bundled grok-1-mini.
      numerics: "float32" (highest precision at every product) or "bfloat16" (as released); None is float32 on CPU and
        bfloat16 on GPU.
      weights: "expanded" to the type of the numerics, or "int8" with scales; None expands on CPU up to
        64 MB, and up to half of the memory where the processors have several last caches; else it is int8. "streamed"
        leaves them on disk, from where layers are read while the model runs.
      mesh: "DxM", data by model: weights, activations and cache over D * M devices; None is one device, or "1xM"
        of all where several processes were joined (grokscope.run.processes).
      memory: bytes, or "20GB", that streamed weights may take on all devices; None is half of the machine's memory, or
        0.8 of an accelerator's.
      tokenizer: a SentencePiece model; None is `tokenizer.model` of the checkpoint, if there is one.
      progress: wraps the tensors as they are read, as tqdm does.

    Raises:
      FileNotFoundError, ValueError: no checkpoint there, or a file of it is missing or not what it should be; a mesh
        that does not fit. MemoryError: too little `memory` to stream.
    """
    checkpoint = open_checkpoint(bundled_checkpoint() if path is None else path)
    numerics = _numerics(numerics)
    if weights not in (None, "expanded", "int8", "streamed"):
        raise ValueError(f'weights={weights!r}; expected "expanded", "int8", "streamed" or None')
    if memory is not None and weights != "streamed":
        raise ValueError(f'memory={memory!r} is for weights="streamed"; resident weights take what they take')
    tokens = open_tokenizer(checkpoint, tokenizer)
    mesh = mesh or (f"1x{len(jax.devices())}" if jax.process_count() > 1 else None)
    dtype, devices = jax.numpy.dtype(numerics), mesh and make_mesh(mesh, checkpoint.config)
    _set_process(devices)
    if weights == "streamed":
        budget = streaming_memory(devices) if memory is None else as_bytes(memory, "memory")
        loaded = Streamed(Reader(checkpoint, dtype, "int8", devices), budget)
    else:
        reader = Reader(checkpoint, dtype, weights or default_form(checkpoint.config, dtype), devices)
        loaded = load_weights(reader, progress)
    return Grok(checkpoint, loaded, tokens, numerics)


def unloaded(path: Path | str | None = None, numerics: str | None = None) -> "Grok":
    """A Grok of one device for `plan` alone: of its checkpoint it reads sizes and tokenizer, and no weights."""
    checkpoint = open_checkpoint(bundled_checkpoint() if path is None else path)
    made = Grok(checkpoint, Weights({}, [], "int8"), open_tokenizer(checkpoint, None), _numerics(numerics))
    made.close()
    return made


def _numerics(asked: str | None) -> str:
    if asked not in (None, *NUMERICS):
        raise ValueError(f"numerics={asked!r}; expected one of {', '.join(NUMERICS)}, or None")
    return asked or default_numerics()


def _set_process(mesh: Mesh | None) -> None:
    """What is set for all of the process: what it compiles is kept; on CPU freed memory too, and steps on a mesh run
    one after the other.
    """
    keep_compiled()
    if jax.default_backend() == "cpu":
        landing.keep_freed_memory()
        if mesh:
            steps.one_at_a_time()


def open_tokenizer(checkpoint: Checkpoint, path: Path | str | None) -> Tokenizer | None:
    """That of the path, or the checkpoint's own, if there is one."""
    model = checkpoint.tokenizer if path is None else Path(path)
    return None if model is None else Tokenizer(model, checkpoint.config.vocab_size)


class Grok:
    """A Grok-1 of any size, its weights on the device.

    Attributes:
      config: its sizes.
      tokenizer: public, or None if the checkpoint has none: then prompts are ids and pieces read "<422>".
      numerics: "float32" or "bfloat16".
    """

    def __init__(self, checkpoint: Checkpoint, weights: Weights | Streamed, tokenizer: Tokenizer | None, numerics: str):
        self._describe(checkpoint, tokenizer, numerics, weights.form, weights.mesh)
        self._weights: Weights | Streamed | None = weights
        self._device = jax.devices()[0].device_kind

    def _describe(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | None,
        numerics: str,
        form: str,
        mesh: Mesh | AbstractMesh | None,
    ) -> None:
        self.config: GrokConfig = checkpoint.config
        self.tokenizer = tokenizer
        self.numerics = numerics
        self._checkpoint, self._form, self._mesh = checkpoint, form, mesh
        self._hash = checkpoint.hash()
        self._busy = threading.Lock()

    def trace(
        self, x: Prompts, capture: Wish | Iterable[Wish] | None = None, *, budget: int | str | None = None
    ) -> Trace | list[Trace]:
        """The forward pass of a text, of ids, or of a list of either (then one Trace each).

        `capture`: names of taps (grokscope.TAPS) and grokscope.capture(...), kept beside routing; None is routing
        alone, () nothing at all. On Ctrl-C those of a list that are finished come back; with none KeyboardInterrupt is
        raised. Else it raises as `generate` does.
        """
        sampling = dict(temperature=0.0, top_p=1.0, top_k=None, seed=0)
        return self._all(x, 0, capture, sampling, BATCH_SIZE, None, budget)

    def generate(
        self,
        x: Prompts,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        stop_at_eos: bool = True,
        stop: str | Sequence[str] | None = None,
        on_token: Callable[[TokenEvent], None] | None = None,
        capture: Wish | Iterable[Wish] | None = None,
        batch_size: int = BATCH_SIZE,
        budget: int | str | None = None,
    ) -> Trace | list[Trace]:
        """Continues a text, ids, or a list of either: one Trace each, in float32 equal to running each alone.

        Args:
          x: prompts. A text gets BOS in front if config.prompt_bos says so; ids are never changed.
          max_new_tokens: tokens to make at most. Prompt and these must fit the context.
          temperature: 0 is exact greedy.
          top_p, top_k: keep the most probable tokens up to this mass of the whole distribution at this temperature, and
            no more than this number of them.
          seed: one for all prompts or one each; the same seed gives the same text, alone or in a batch.
          stop_at_eos: end at EOS. An EOS in a prompt does not end it.
          stop: strings that end it; the token that completes one is kept.
          on_token: called with a TokenEvent as each token is read.
          capture: what to keep beside routing: names of taps, grokscope.capture(...), or a list of these; None is
            routing alone, () nothing at all.
          batch_size: prompts that run at once; a new one takes the place of one that ends.
          budget: bytes, or "2GB", that captures may take on the device, on the host, or on disk; see `plan`.

        On Ctrl-C the Traces of the finished and running prompts come back; meta["prompt"] says which.

        Raises:
          MemoryError: captures over the budget; it says which reductions would fit.
          ValueError: an empty or too long prompt, an id outside the vocabulary, a text without tokenizer, bad sampling;
            a capture or an edit that is about nothing. KeyError: an unknown tap. RuntimeError: closed, or already
            running.
        """
        sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        ending = self._ending(stop_at_eos, stop, on_token)
        return self._all(x, _limit(max_new_tokens), capture, sampling, batch_size, ending, budget)

    def stream(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        ordered: bool = True,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        stop_at_eos: bool = True,
        stop: str | Sequence[str] | None = None,
        on_token: Callable[[TokenEvent], None] | None = None,
        capture: Wish | Iterable[Wish] | None = None,
        batch_size: int = BATCH_SIZE,
        budget: int | str | None = None,
    ) -> Iterator[Trace]:
        """The Traces of `generate` one by one, as they are done, so that memory holds those under way alone.

        `ordered`: in the order of the prompts; else whichever is ready. meta["prompt"] says which it is. The model is
        busy from the first Trace until the iterator is at its end or closed. On Ctrl-C it ends behind those that are
        finished or running. The rest is as in `generate`; errors of what was asked for come at once.
        """
        sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        limit = _limit(max_new_tokens)
        ids, single = self._prompts(prompts, limit)
        if single:
            raise TypeError("stream takes a list of prompts; for one there is generate")
        ending = self._ending(stop_at_eos, stop, on_token)
        return self._traces(self._prepared(ids, limit, capture, sampling, batch_size, ending, budget), ordered)

    def plan(
        self,
        x: Prompts | None = None,
        max_new_tokens: int = 0,
        *,
        capture: Wish | Iterable[Wish] | None = None,
        tokens: int | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Plan:
        """The bytes that `trace` (max_new_tokens=0) or `generate` of x would keep, from shapes alone.

        `tokens` instead of x: that many, in prompts as long as the context allows. Raises as `generate` does.
        """
        if (x is None) == (tokens is None):
            raise ValueError("give either prompts or tokens=" + ("" if x is None else ", not both"))
        limit = _limit(max_new_tokens) if max_new_tokens else 0
        batch_size = _from_one("batch_size", batch_size)
        if limit >= self.config.sequence_len:
            raise ValueError(
                f"max_new_tokens={limit}: expected fewer than the context of {self.config.sequence_len} holds"
            )
        if x is not None:
            lengths = [len(prompt) for prompt in self._prompts(x, limit)[0]]
        else:
            full, rest = divmod(_from_one("tokens", tokens), self.config.sequence_len - limit)
            lengths = [self.config.sequence_len - limit] * full + [rest] * bool(rest)
        _, _, hooks = self._hooks(capture, lengths, limit)
        plan = priced(hooks, batch_size, self.numerics, self._mesh, self._form == "streamed")
        passes = tokens_of_passes([tuple(s) for s in hooks.sequences], batch_size, self._mesh)
        return dataclasses.replace(plan, read=self._bytes_to_read(passes))

    def dump(
        self,
        prompts: Sequence[Prompt],
        directory: Path | str,
        max_new_tokens: int = 0,
        *,
        resume: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        stop_at_eos: bool = True,
        capture: Wish | Iterable[Wish] | None = None,
        batch_size: int = BATCH_SIZE,
        budget: int | str | None = None,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Dump:
        """Traces of many prompts (max_new_tokens=0: forward passes alone), written part by part while it runs.

        A part is written at 16 MB or after a minute. `resume` goes on with a dump of the same call that was cut short,
        even by kill -9: parts that are there stay, and the rest is made as it would have been, to the bit (on another
        mesh within rounding). On Ctrl-C finished Traces are written, and KeyboardInterrupt is raised. `progress` is
        told after each Trace how many are done. All else is as in `generate`.

        Raises, beside what generate does: FileExistsError for a folder that holds anything; ValueError to resume the
        dump of another call; OSError if it cannot be written (finished parts stay).
        """
        limit = _limit(max_new_tokens) if max_new_tokens else 0
        capture = None if capture is None else captures.as_captures(capture)
        ids, single = self._prompts(prompts, limit)
        if single:
            raise TypeError("dump takes a list of prompts; one Trace has save")
        sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        ending = self._ending(stop_at_eos, None, None) if limit else None
        call = self._prepared(ids, limit, capture, sampling, batch_size, ending, budget)
        about = self._about(call, ids, limit, capture, bool(stop_at_eos))
        with deferred_interrupt() as interrupted:  # or one process leaves while others wait for it
            self._write(call, functools.partial(Writer, directory, about, len(ids), resume=resume), progress)
            wait_for_all()
        found = Dump(directory)
        if found.missing or interrupted.is_set():
            raise KeyboardInterrupt
        return found

    def _write(self, call: Call, begin: Callable[[], Writer], progress: Callable[[int], object]) -> None:
        """Runs what is not there yet; the first process writes it, and only it looks at the folder (`begin`)."""
        with contextlib.ExitStack() as held:
            writer = in_first(lambda: held.enter_context(begin()))
            done = from_first(writer.done if writer else set(), len(call.jobs))
            todo = [job for job in call.jobs if job.row not in done]
            for count, trace in enumerate(self._traces(call, ordered=False, todo=todo), len(done) + 1):
                if trace.meta["finish"] == "interrupt":
                    continue
                if writer:
                    writer.add(trace.meta["prompt"], trace)
                progress(count)

    def _about(self, call: Call, ids: list[np.ndarray], limit: int, capture, stop_at_eos: bool) -> dict:
        """What makes a dump the dump of this run; JSON."""
        digest = hashlib.sha256(b"".join(len(p).to_bytes(8) + p.tobytes() for p in ids)).hexdigest()
        return {
            "checkpoint": {"name": self.name, "hash": self._hash},
            "numerics": self.numerics,
            "weights": self._form,
            "prompts_sha256": digest,
            "max_new_tokens": limit,
            "stop_at_eos": stop_at_eos,
            "sampling": {n: np.asarray(v).tolist() for n, v in call.sampling.items()},
            "capture": [c.json() for c in capture] if capture is not None else None,
            "edits": call.edits,
            "batch_size": call.batch_size,
            "versions": versions(),
        }

    def edits(self, *changes: "edits.Edit") -> contextlib.AbstractContextManager[None]:
        """`with grok.edits(...):` calls of this thread run with these edits, after those of a `with` around it.

        A call reads them once, when it starts. Raises, before anything runs, KeyError for an unknown tap, TypeError or
        ValueError for what this model does not have; the call does for experts that are banned and needed.
        """
        edits.changes(changes, self.config)
        return _Edited(self, changes)

    @property
    def current_edits(self) -> list["edits.Edit"]:
        """Those that a call would run with now: of the `with grok.edits(...)` around it, outer ones first."""
        return [edit for entered in _EDITS.get() if entered.grok is self for edit in entered.changes]

    def loss(self, x: Prompts) -> Loss:
        """Mean loss of a text, of ids, or over a list of either. The first token of each is given, not predicted."""
        traces = self.trace(x, capture=())
        traces = [traces] if isinstance(traces, Trace) else traces
        if len(traces) < len(self._prompts(x, 0)[0]):
            raise KeyboardInterrupt
        logprobs = np.concatenate([t.logprobs[1:] for t in traces])
        if not len(logprobs):
            raise ValueError("nothing to predict: a loss needs at least two tokens (or BOS and one)")
        nats = -float(logprobs.sum(dtype=np.float64))
        if self.tokenizer is None:
            return Loss(nats / len(logprobs), math.nan, len(logprobs), 0)
        num_bytes = sum(len(self.tokenizer.bytes[i]) for t in traces for i in t.tokens[1:])
        return Loss(
            nats / len(logprobs), nats / math.log(2) / num_bytes if num_bytes else math.nan, len(logprobs), num_bytes
        )

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return self._checkpoint.directory.name

    def encode(self, prompt: Prompt) -> np.ndarray:
        """The ids int32 [T] that a prompt is run as, BOS in front where the model wants it. Raises as `trace` does."""
        return self._ids(prompt, 0, 0)

    def weight(self, name: str, layer: int | None = None) -> np.ndarray:
        """A weight as the checkpoint has it, float32, read from disk.

        name: "embedding/w" or "embedding/final_norm/scale"; with `layer`, "attention/query" (key, value, out),
        "router/w", "experts/gate" (up, down), "pre_attention_norm/scale" (and so on). Raises KeyError naming all.
        """
        found = {}
        for slot in slots(self.config):
            if slot.layer == layer:
                found[f"{slot.param.module.removeprefix('layer/')}/{slot.param.name}"] = slot
        if name not in found:
            if not found:
                raise KeyError(f"no layer {layer!r}: this model has layers 0 to {self.config.num_layers - 1}")
            where = f"of layer {layer}" if layer is not None else "outside the layers (layer= names one)"
            raise KeyError(f"no weight {name!r} {where}; there are {', '.join(found)}")
        tensor = self._checkpoint.read(found[name])
        if tensor.scales is None:
            return np.array(tensor.weight, np.float32)
        return dequantize(QuantizedWeight(tensor.weight, tensor.scales))

    def close(self) -> None:
        """Frees the memory of the weights; the object cannot run afterwards."""
        with self._alone():
            if self._weights is not None:
                self._weights.delete()
                self._weights = None

    def __enter__(self) -> "Grok":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _shape_facts(self) -> dict[str, str]:
        c = self.config
        return {
            "size": f"{look.si(c.num_parameters)} parameters, {look.si(c.num_active_parameters)} active",
            "layers": f"{c.num_layers} layers, D {c.emb_size}, {c.num_q_heads}/{c.num_kv_heads} heads",
            "experts": f"{c.num_experts} experts top {c.num_selected_experts}",
            "context": f"context {c.sequence_len}",
        }

    def _facts(self) -> dict[str, str]:
        facts = self._shape_facts()
        if self._weights is None:
            return facts | {"weights": "closed"}
        size = look.si(self._weights.nbytes, "B")
        kind = f"{self._form} weights {size}"
        if isinstance(self._weights, Streamed):
            kind = f"weights streamed within {look.si(self._weights.memory, 'B')}, {size} held now"
        where = jax.default_backend() + (f" {sharding.name(self._mesh)}" if self._mesh else "")
        return facts | {"weights": f"{self.numerics}, {kind} on {where}"}

    def _repr_html_(self) -> str:
        return look.facts_html(f"Grok({self.name})", self._facts())

    def __repr__(self) -> str:
        return f"Grok({self.name}: {'; '.join(self._facts().values())})"

    # Running

    @contextlib.contextmanager
    def _alone(self):
        """Holds the model; raises RuntimeError if it is in use already, by another thread or by this one."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this Grok is already running, perhaps in another thread; wait, or load a second one")
        try:
            yield
        finally:
            self._busy.release()

    def _ending(self, stop_at_eos: bool, stop, on_token) -> Ending:
        if not isinstance(stop_at_eos, bool | np.bool_):
            raise TypeError(f"stop_at_eos={stop_at_eos!r}: expected True or False")
        if not isinstance(stop, str | Iterable | None):
            raise TypeError(f"stop={stop!r}: expected a string, or a list of strings")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop={stop!r}: expected non-empty strings")
        if stops and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this checkpoint has none; stop in on_token instead")
        return Ending(bool(stop_at_eos), stops, on_token)

    def _all(self, x: Prompts, limit: int, capture, sampling: dict, batch_size, ending, budget) -> Trace | list[Trace]:
        prompts, single = self._prompts(x, limit)
        prepared = self._prepared(prompts, limit, capture, sampling, batch_size, ending, budget)
        with deferred_interrupt() as interrupted:  # or what is finished is lost where Ctrl-C comes between two turns
            traces = sorted(self._traces(prepared, ordered=False), key=lambda trace: trace.meta["prompt"])
        whole = len(traces) == len(prompts) and all(trace.meta["finish"] != "interrupt" for trace in traces)
        if not traces or (whole and interrupted.is_set()):
            raise KeyboardInterrupt
        return traces[0] if single else traces

    def _prepared(
        self, prompts: list[np.ndarray], limit: int, capture, sampling: dict, batch_size, ending, budget
    ) -> Call:
        """A call, checked, with the edits of this moment."""
        batch_size = _from_one("batch_size", batch_size)
        made, changes, hooks = self._hooks(capture, [len(prompt) for prompt in prompts], limit)
        refuse_over(budget, hooks, batch_size, self.numerics, self._mesh, self._form == "streamed")
        rows = Sampling.rows(len(prompts), self.config.vocab_size, **sampling)
        jobs = [self.job(prompt, limit, row, ending) for row, prompt in enumerate(prompts)]
        return Call(hooks, changes, rows, jobs, batch_size, ending, sampling, [edit.json() for edit in made])

    def _hooks(
        self, capture, lengths: list[int], limit: int
    ) -> tuple[list["edits.Edit"], tuple["edits.Change", ...], Hooks]:
        """The edits of this moment, what they change, and the hooks of prompts of these lengths."""
        kept = captures.resolve(capture, self.config)
        made = self.current_edits
        changes = edits.changes(made, self.config)
        sequences = [Length(length, limit) for length in lengths]
        edits.refuse_impossible_routes(changes, self.config, sequences)
        hooks = Hooks(self.config, kept, changes, sequences)
        for missed in misses(hooks, (*hooks.kept, *changes)):
            what = f"capture {missed.key!r}" if isinstance(missed, captures.Kept) else f"edit of {missed.kind.tap}"
            raise ValueError(
                f"the {what} is about no position: prompts have {min(lengths)} to {max(lengths)} tokens, {limit} may "
                f"follow, and it asks for {missed.where.json()}"
            )
        return made, changes, hooks

    def job(self, prompt: np.ndarray, limit: int, row: int, ending: Ending | None) -> Job:
        job = Job(prompt, limit, row, lambda *_: None)
        if ending is not None:
            job.accept = functools.partial(self._accept, job, _Watch(self.tokenizer), ending)
        return job

    def _run(self, call: Call, todo: list[Job] | None) -> Running:
        if self._weights is None:
            raise RuntimeError("this Grok was closed; load it again")
        return Run(self.config, self._weights, call.hooks, call.rows, call.jobs, call.batch_size, todo)

    def _bytes_to_read(self, passes: list[int]) -> int:
        return self._weights.bytes_to_read(passes) if isinstance(self._weights, Streamed) else 0

    def _traces(self, call: Call, ordered: bool, todo: list[Job] | None = None) -> Iterator[Trace]:
        with self._alone():
            run = self._run(call, todo)
            done: dict[int, Trace] = {}
            following, kept = 0, set()
            for job in run.results():
                done[job.row] = self._trace(job, run, call)
                trace = done[job.row]
                kept |= {key for key, a in trace.taps.items() if a.size and trace.numbers[key].get("T") != []}
                while done and (not ordered or following in done):
                    yield done.pop(following if ordered else next(iter(done)))
                    following += 1
            yield from (done[row] for row in sorted(done))  # after an interrupt
            for missed in call.hooks.kept if todo is None and not run.cut_short else ():
                if not kept & set(missed.outputs()):
                    warnings.warn(f"capture {missed.key!r} is empty: every sequence ended before it", stacklevel=3)

    def _accept(self, job: Job, watch: "_Watch", ending: Ending, token: int, logprob: float) -> str | None:
        """Reports a token; says why to stop after it."""
        text = watch.read(token)
        if ending.on_token is not None:
            position = len(job.tokens) - 1
            glimpse = functools.partial(job.glimpse, position)
            ending.on_token(TokenEvent(job.row, position, token, text, logprob, glimpse))
        if ending.at_eos and token == self.config.eos_token:
            return "eos"
        return "stop" if any(s in watch.text[-len(s) - len(text) :] for s in ending.strings) else None

    def _prompts(self, x: Prompts, limit: int) -> tuple[list[np.ndarray], bool]:
        """Ids of each prompt, and whether `x` was one prompt rather than a list."""
        if isinstance(x, Trace):
            raise TypeError("got a Trace; give its ids, trace.tokens, or its text, trace.text")
        if isinstance(x, str):
            return [self._ids(x, 0, limit)], True
        if isinstance(x, bytes | bytearray | Mapping) or not getattr(x, "shape", True) or not hasattr(x, "__len__"):
            raise TypeError(f"a prompt is a text, token ids, or a list of either; got {type(x).__name__}")
        items = list(x)
        if not items:
            raise ValueError("an empty list: expected prompts, or a prompt of at least one token")
        single = _is_number(items[0])
        return [self._ids(p, i, limit) for i, p in enumerate([items] if single else items)], single

    def _ids(self, prompt: Prompt, index: int, limit: int) -> np.ndarray:
        name = f"prompt {index}"
        if _is_number(prompt):
            raise TypeError(f"{name} is one number; a prompt is a text or a sequence of ids")
        if len(prompt) == 0:
            raise ValueError(
                f"{name} is empty; give at least one token (for free text the ids [{self.config.bos_token}], BOS)"
            )
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{name} is a text, but {self._checkpoint.directory} has no tokenizer.model; "
                    "give token ids, or load(..., tokenizer=path)"
                )
            try:
                ids = self.tokenizer.encode(prompt)
            except ValueError as err:
                raise ValueError(f"{name}: {err}") from err
            ids = np.array([self.config.bos_token] * self.config.prompt_bos + ids, np.int32)
        else:
            try:
                ids = np.asarray(prompt)
            except ValueError as err:
                raise TypeError(f"{name} is neither a text nor a sequence of whole numbers: {err}") from err
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise TypeError(
                    f"{name} is neither a text nor a sequence of whole numbers: {ids.dtype} of shape {ids.shape}"
                )
            outside = ids[(ids < 0) | (ids >= self.config.vocab_size)]
            if len(outside):
                raise ValueError(
                    f"{name} holds id {outside[0]}; the vocabulary has ids 0 to {self.config.vocab_size - 1}"
                )
        if len(ids) + limit > self.config.sequence_len:
            raise ValueError(
                f"{name} has {len(ids)} tokens"
                + (f" and max_new_tokens={limit}, {len(ids) + limit} in all" if limit else "")
                + f"; the context holds {self.config.sequence_len}. Shorten the prompt"
                + (" or make fewer tokens" if limit else ", or give it in pieces, of grok.tokenizer.encode(text)")
            )
        return ids.astype(np.int32)

    def _trace(self, job: Job, run: Running, call: Call) -> Trace:
        tokens = np.array(job.tokens, np.int32)
        n = len(job.prompt)
        if self.tokenizer is None:
            pieces = [f"<{i}>" for i in tokens]
            text, continuation = "".join(pieces), "".join(pieces[n:])
        else:
            pieces = [self.tokenizer.pieces[i] for i in tokens]
            text = self.tokenizer.decode(tokens)
            stream = self.tokenizer.stream(following=True)
            continuation = "".join(stream(i) for i in tokens[n:]) + stream(None)
        meta = {
            "checkpoint": {"name": self.name, "hash": self._hash},
            "config": dataclasses.asdict(self.config),
            "numerics": self.numerics,
            "weights": self._form,
            "sampling": {n: _of(v, job.row) for n, v in call.sampling.items()} if job.limit else None,
            "shapes": {"slots": run.num_slots, "cache_length": run.cache_length},
            "mesh": sharding.name(self._mesh),
            "edits": call.edits,
            "finish": job.finish,
            "prompt": job.row,
            "device": self._device,
            "versions": versions(),
        }
        dims, numbers = _axes(run.hooks, job)
        taps, job.captures = job.captures, {}
        lenses = [taps[k.key] for k in call.hooks.kept if k.reduce == "lens" and k.key in taps]
        if lenses and self.tokenizer is not None:
            guessed = np.unique(np.concatenate([best.ravel() for best in lenses]))
            meta["words"] = {str(i): self.tokenizer.pieces[i] for i in guessed}
        return Trace(
            tokens=tokens,
            pieces=pieces,
            text=text,
            continuation=continuation,
            prompt_length=n,
            logprobs=np.array(job.logprobs, np.float32),
            taps=taps,
            dims=dims,
            numbers=numbers,
            meta=meta,
        )


_EDITS: contextvars.ContextVar[tuple["_Edited", ...]] = contextvars.ContextVar("edits", default=())
"""Of this thread or task: the `with` statements around it, outer ones first."""


class _Edited:
    """The `with` of `Grok.edits`; may be entered again."""

    def __init__(self, grok: Grok, changes: tuple["edits.Edit", ...]):
        self.grok, self.changes = grok, changes

    def __enter__(self) -> None:
        _EDITS.set((*_EDITS.get(), self))

    def __exit__(self, kind, *_) -> None:
        inside = _EDITS.get()
        at = max((i for i, one in enumerate(inside) if one is self), default=-1)
        if at >= 0:
            _EDITS.set(inside[:at] + inside[at + 1 :])
        if at != len(inside) - 1 and kind is None:
            raise RuntimeError(
                "these edits end before others that began after them, so calls in between ran with both; a `yield` "
                "inside of `with grok.edits(...)` leaves them in force outside of its generator: make a list there"
            )


def _from_one(name: str, number) -> int:
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        raise ValueError(f"{name}={number!r}: expected a whole number from 1")
    return int(number)


def _limit(max_new_tokens) -> int:
    return _from_one("max_new_tokens", max_new_tokens)


def _axes(hooks: Hooks, job: Job) -> tuple[dict[str, str], dict[str, dict[str, list[int]]]]:
    """Dims of what a job captured, and the numbers along its axes that do not simply count."""
    dims, numbers = {}, {}
    for kept in hooks.kept:
        for key, (letters, _) in kept.outputs().items():
            if key not in job.captures:
                continue
            dims[key] = "L" * (kept.layers is not None) + letters
            own = numbers[key] = {}
            if kept.layers is not None:
                own["L"] = list(kept.layers)
            if kept.axis:
                own[kept.axis] = list(kept.numbers)
            mask = kept.where.mask(len(job.prompt), len(job.tokens))
            if not mask.all() or kept.pooled:
                own["T"] = np.flatnonzero(mask).tolist()
    return dims, numbers


def _is_number(x) -> bool:
    return not isinstance(x, str | bytes) and (np.isscalar(x) or getattr(x, "shape", None) == ())


def _of(value, row: int):
    """What the user gave for one prompt, as JSON has it."""
    return value if value is None else np.asarray(value).flat[row if np.ndim(value) else 0].item()


class _Watch:
    """The text of one prompt's continuation as it grows."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.text = ""
        self._stream = (lambda token: f"<{token}>") if tokenizer is None else tokenizer.stream(following=True)

    def read(self, token: int) -> str:
        text = self._stream(token)
        self.text += text
        return text


@functools.cache
def versions() -> dict[str, str]:
    packages = ("grokscope", "jax", "jaxlib", "dm-haiku", "numpy")
    return {name: importlib.metadata.version(name) for name in packages}
