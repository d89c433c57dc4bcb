"""`explore(grok)`: prompt, watch the routing while text appears, look at tokens and heads, edit, compare, export.

Generation runs in a thread, and Stop sets an event that the next token sees; tokens are sent in batches, so that a fast
model does not flood the page.
"""

import contextlib
import dataclasses
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from IPython.display import HTML

from grokscope.analysis.compare import Comparison, compare
from grokscope.notebook.widgets.page import (
    EXAMPLES,
    EXPORTED,
    RUNS,
    WINDOW,
    Page,
    Run,
    experts_bytes,
    gates_bytes,
    raw,
    shape,
)
from grokscope.run import edits as edits_module
from grokscope.run.captures import capture
from grokscope.run.dump import Dump, Writer, refuse_existing
from grokscope.run.edits import Edit
from grokscope.run.engine import Grok, TokenEvent
from grokscope.run.trace import ROUTING, Trace

BATCH_SECONDS = 0.05
WATCH_SECONDS = 0.1
BEST = 5
COMPARED = "2GB"  # the most that predictions of a run may take while two are compared
_EXPLORERS: "weakref.WeakSet[Explore]" = weakref.WeakSet()


class Explore(Page):
    """The app. `runs` are the Traces made in it, the newest last, and `trace` is the newest."""

    def __init__(self, grok: Grok, prompt: str = EXAMPLES["Story"]):
        super().__init__([], prompt=prompt, max=40, top_p=0.95, temperature=0.8, seed=7, edits=[])
        self._grok = grok
        self._number = 0
        self._stop = threading.Event()
        self._drawing = threading.Lock()
        self._model = threading.RLock()  # a Grok runs in one thread at a time
        self._worker: threading.Thread | None = None
        layers = grok.config.num_layers
        self._lens_layers = list(range(layers)) if layers <= 16 else sorted({*range(7, layers, 8), layers - 1})
        for other in _EXPLORERS:  # its cell was run again: that begins anew
            if other._grok is grok:
                other._on_stop()
        _EXPLORERS.add(self)

    @property
    def trace(self) -> Trace:
        """Raises IndexError before the first run."""
        return self.runs[-1]

    def _facts(self) -> dict[str, Any]:
        return shape(self._grok.config, self._grok.name, self._grok.numerics) | {"running": self._running}

    @property
    def _running(self) -> bool:
        return bool(self._worker and self._worker.is_alive() and self._worker.name == "generate")

    def _on_count(self, text: str) -> None:
        """The tokens of the prompt box."""
        tokenizer = self._grok.tokenizer
        if tokenizer is not None:
            ids = tokenizer.encode(text) if text else []
            self.send(
                {"kind": "count", "pieces": [tokenizer.pieces[i] for i in ids], "bos": self._grok.config.prompt_bos}
            )

    def _on_generate(self, prompt: str, options: dict, edits: list) -> None:
        if self._worker:
            self._worker.join(0.5)  # it may have told its last and not yet have ended
            if self._worker.is_alive():
                what = "a run is under way; stop it first" if self._running else "an export is under way; wait for it"
                raise RuntimeError(what)
        if not prompt:
            raise ValueError("the prompt is empty; type a text")
        self._number += 1
        name = ", ".join(_short(one) for one in edits) or f"baseline, seed {options['seed']}"
        if any(run.prompt != prompt for run in self._runs):
            start = " ".join(prompt.split())
            name = f"{start if len(start) < 16 else start[:15] + '…'}: {name}"
        run = Run(self._number, name, prompt, options, [])
        self._stop.clear()
        self._worker = threading.Thread(target=self._generate, name="generate", args=(run, edits), daemon=True)
        self._worker.start()

    def _on_stop(self) -> None:
        self._stop.set()

    def _on_price(self, run: int) -> None:
        trace = self._trace(run)
        rows = self._grok.plan([trace.tokens], capture=list(EXPORTED)).rows  # and those of routing, which come along
        self.send({"kind": "price", "run": run, "bytes": {name: row["disk"] for name, row in rows.items()}})

    def _on_export(self, run: int, taps: list, directory: str) -> None:
        if self._worker and self._worker.is_alive():
            raise RuntimeError("a run is under way; wait, or stop it")
        total = self._grok.plan([self._trace(run).tokens], capture=list(taps) or ()).total["disk"]
        found = next(one for one in self._runs if one.id == run)
        self._worker = threading.Thread(target=self._export, args=(found, taps, directory, total), daemon=True)
        self._worker.start()

    def _on_compare(self, a: int, b: int) -> None:
        """In a thread: predictions of both runs are computed once more, as they are too large to be kept."""

        def told() -> None:
            try:
                with self._model:
                    super(Explore, self)._on_compare(a, b)
            except Exception as err:
                self._failed("compare", err, a=a, b=b)

        threading.Thread(target=told, daemon=True).start()

    # In the thread

    def _comparison(self, a: Trace, b: Trace) -> Comparison:
        return compare(self._predicted(a), self._predicted(b))

    def _predicted(self, trace: Trace) -> Trace:
        """The Trace up to its logits, under its own edits."""
        run = next(one for one in self._runs if one.trace is trace)
        with self._grok.edits(*run.edits):
            found = self._grok.trace(trace.tokens, capture=["logits"], budget=COMPARED)
        assert isinstance(found, Trace)
        return found

    def _generate(self, run: Run, edits: list[dict[str, Any]]) -> None:
        waiting: list[tuple] = []
        begun = sent = time.perf_counter()

        def flush() -> None:
            if waiting:
                tokens, *arrays = zip(*waiting, strict=True)
                experts, gates, logits = (np.stack(array, 1) for array in arrays)
                message = {"kind": "tokens", "run": run.id, "tokens": tokens}
                self.send(message, [experts_bytes(experts), gates_bytes(gates), raw(logits)])
                waiting.clear()

        def on_token(event: TokenEvent) -> None:
            nonlocal sent, begun
            if event.position == prompt_length:
                self._begin(run, ids, event)
                begun = sent = time.perf_counter()
            token = {"piece": self._piece(event.id), "id": event.id, "logprob": event.logprob}
            waiting.append((token, *(event.glimpse(name, False) for name in ROUTING)))
            if time.perf_counter() - sent > BATCH_SECONDS:
                flush()
                sent = time.perf_counter()
            if self._stop.is_set():
                raise KeyboardInterrupt

        o = run.options
        lens = capture("resid_post", layers=self._lens_layers, reduce="lens", k=BEST)
        try:
            ids = self._grok.encode(run.prompt)
            prompt_length = len(ids)
            with self._model:
                run.edits = [edit for one in edits for edit in self._edit(one)]
                with self._grok.edits(*run.edits):
                    (trace,) = self._grok.stream(
                        [ids], o["max"], temperature=o["temperature"], top_p=o["top_p"], seed=o["seed"],
                        on_token=on_token, capture=["router_logits", capture("attn_pattern", later=True), lens],
                    )  # fmt: skip
            run.seconds = time.perf_counter() - begun
        except Exception as err:
            self._failed("generate", err, ended=True)
            return
        flush()
        run.trace = trace
        self._runs = [*self._runs, run][-RUNS:]
        self._show(run, trace, known=True)
        self._redrawing = threading.Thread(target=self._redraw, daemon=True)
        self._redrawing.start()

    def _begin(self, run: Run, ids: np.ndarray, event: TokenEvent) -> None:
        """The prompt and its routing, at the first token after it."""
        experts, gates, logits = (event.glimpse(name, True) for name in ROUTING)
        start, limit = max(0, len(ids) - WINDOW), run.options["max"]
        message = {
            "kind": "begin", "run": run.id, "name": run.name, "prompt_length": len(ids), "total": len(ids) + limit,
            "ids": ids.tolist(), "pieces": [self._piece(i) for i in ids], "logprobs": [None] * len(ids), "max": limit,
            "start": start,
        }  # fmt: skip
        self.send(message, [experts_bytes(experts), gates_bytes(gates[:, start:]), raw(logits[:, start:])])

    def _redraw(self) -> None:
        """In a thread of its own, so that the next run need not wait."""
        with self._drawing:
            picture = HTML(self._picture()) if self._stills else None
            for still in self._stills:
                still.update(picture)

    def _export(self, run: Run, taps: list[str], directory: str, total: int) -> None:
        trace, done = self._trace(run.id), threading.Event()
        watch = threading.Thread(target=self._watch, args=(Path(directory), total, done), daemon=True)
        watch.start()
        try:
            refuse_existing(directory)
            with self._model, self._grok.edits(*run.edits):
                found = self._grok.trace(trace.tokens, capture=list(taps) or ())
            assert isinstance(found, Trace)
            exported = dataclasses.replace(trace, taps=found.taps, dims=found.dims, numbers=found.numbers)
            about = {name: trace.meta[name] for name in ("checkpoint", "numerics", "sampling", "edits", "versions")}
            with Writer(directory, about | {"capture": list(taps)}, 1) as writer:
                writer.add(0, exported)
            done.set()
            watch.join()
            size = Dump(directory).nbytes
            self.send({"kind": "exported", "path": str(Path(directory)), "bytes": size, "taps": list(found.taps)})
        except Exception as err:
            done.set()
            watch.join()
            self._failed("export", err)

    def _watch(self, directory: Path, total: int, done: threading.Event) -> None:
        """Tells what of a dump is on disk, until it is done."""
        before = -1
        while not done.wait(WATCH_SECONDS):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                written = sum(file.stat().st_size for file in directory.glob("*"))
                if written != before:
                    self.send({"kind": "writing", "bytes": written, "total": total})
                before = written

    def _piece(self, token: int) -> str:
        return f"<{token}>" if self._grok.tokenizer is None else self._grok.tokenizer.pieces[token]

    def _edit(self, one: dict[str, Any]) -> list[Edit]:
        """Edits of one row of the edit panel."""
        kind, layer, number = one["kind"], int(one["layer"]), one["number"]
        if kind == "ban":
            return [edits_module.route.ban(layers=layer, experts=int(number))]
        if kind == "force":
            return [edits_module.route.force(experts=[int(number)], layers=layer)]
        if kind == "scale":
            return [edits_module.scale("attn_z", float(one["factor"]), layers=layer, heads=int(number))]
        if kind == "steer":
            keep = capture("resid_post", layers=layer, reduce="mean")
            a, b = (self._grok.trace(self._trace(int(one[side])).tokens, capture=keep) for side in ("a", "b"))
            towards = a["resid_post.mean", layer] - b["resid_post.mean", layer]
            return [edits_module.add("resid_post", float(one["factor"]) * towards, layers=layer)]
        raise ValueError(f"edit {kind!r}: expected ban, force, scale or steer")


def _short(one: dict[str, Any]) -> str:
    layer, number, factor = one["layer"], one["number"], one.get("factor")
    if one["kind"] == "scale":
        return f"{layer}.{number} × {factor}"
    if one["kind"] == "steer":
        return f"steer {one['a']} − {one['b']} × {factor} @ {layer}"
    return f"{one['kind']} {number} @ {layer}"


def explore(grok: Grok, prompt: str = EXAMPLES["Story"]) -> Explore:
    """The explorer of a model: an app in the notebook. `app.trace` is the last run, `app.runs` all that are kept."""
    return Explore(grok, prompt)
