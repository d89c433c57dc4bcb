"""`explore(grok)`: prompt, watch the routing while text appears, look at tokens and heads, edit, compare, export.

The page (explore.js) holds views and the selection; the kernel holds runs. Messages carry arrays as binary buffers.
Generation runs in a thread, and Stop sets an event that the next token sees; tokens are sent in batches, so that a fast
model does not flood the page. A page that is loaded again asks for everything it shows.
"""

import dataclasses
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from grokscope import look
from grokscope.analysis.attention import patterns, targets
from grokscope.config import GrokConfig
from grokscope.model.taps import TAPS
from grokscope.run import edits as edits_module
from grokscope.run.captures import capture
from grokscope.run.edits import Edit
from grokscope.run.engine import Grok, TokenEvent
from grokscope.run.trace import Trace

BATCH_SECONDS = 0.05
RUNS = 12  # kept; older ones are forgotten
BEST = 5
THUMBNAIL = 64
EXAMPLES = {
    "Story": "The old keeper of the lighthouse climbed the stairs at dusk, and",
    "Repeat": "red fox, blue whale, grey owl, black cat. red fox, blue whale, grey",
    "Python": "def area(width, height):\n    return width * height\n\ndef volume(",
    "German": "Der alte Mann ging jeden Morgen an das Meer und",
}
PANES = {
    "prompt": "prompt", "edits": "edits", "runs": "runs", "export": "export", "text": "text", "routing": "rout",
    "attention": "attn", "token": "insp", "compare": "cmp",
}  # fmt: skip
"""Panes of the page by name, and their ids there."""
EXPORTED = ("router_logits", "expert_gate", "resid_post", "attn_pattern", "logits")


@dataclasses.dataclass
class _Run:
    """One run of the session. `trace` is None until it is done."""

    id: int
    name: str
    prompt: str
    options: dict[str, Any]
    edits: list[dict[str, Any]]
    trace: Trace | None = None
    seconds: float = 0.0


class Page(anywidget.AnyWidget):
    """The kernel side of explore.js as far as runs that are done are concerned. `panes`: those that are shown."""

    _esm = Path(__file__).with_name("explore.js")
    _css = Path(__file__).with_name("explore.css")
    draft = traitlets.Dict().tag(sync=True)  # what the fields hold, so that a page that is loaded again has it

    def __init__(self, runs: list[_Run], panes: tuple[str, ...] = tuple(PANES), **draft):
        super().__init__(draft=draft)
        self._runs = runs
        self._panes = panes
        self.on_msg(self._receive)

    @property
    def runs(self) -> list[Trace]:
        """The Traces that are shown, the newest last."""
        return [run.trace for run in self._runs if run.trace is not None]

    # Messages of the page

    def _receive(self, _, content: dict, buffers: list) -> None:
        message = dict(content)
        kind = message.pop("kind")
        try:
            getattr(self, f"_on_{kind}")(**message)
        except Exception as err:
            self._failed(kind, err)

    def _failed(self, pane: str, err: Exception) -> None:
        self.send({"kind": "error", "pane": pane, "text": f"{type(err).__name__}: {err}"})

    def _on_hello(self) -> None:
        """A page has come: what it shows, from the beginning."""
        self.send({"kind": "model", "panes": [PANES[pane] for pane in self._panes], **self._facts()})
        for run in self._runs:
            if run.trace is not None:
                self._show(run, run.trace)

    def _facts(self) -> dict[str, Any]:
        meta = self.runs[0].meta
        return _shape(GrokConfig(**meta["config"]), meta["checkpoint"]["name"], meta["numerics"])

    def _on_attention(self, run: int, layer: int) -> None:
        """Thumbnails of a layer's heads [H, n, n]: the largest of each block, square roots as bytes."""
        trace = self._trace(run)
        ((_, _, _, pattern),) = patterns(trace, layer)
        size = min(len(trace), THUMBNAIL)
        starts = -(-np.arange(size) * len(trace) // size)
        blocks = np.maximum.reduceat(np.maximum.reduceat(pattern, starts, axis=1), starts, axis=2)
        packed = np.rint(255 * np.sqrt(blocks)).astype(np.uint8)
        message = {"kind": "attention", "run": run, "layer": layer, "size": size, "labels": _labels(pattern, trace)}
        self.send(message, [zlib.compress(packed.tobytes(), 1)])

    def _on_head(self, run: int, layer: int, head: int) -> None:
        """One head, the rows of its triangle one after the other, in 65,535ths."""
        trace = self._trace(run)
        ((_, numbers, _, pattern),) = patterns(trace, layer)
        own = pattern[list(numbers).index(head)]
        packed = np.rint(65535 * own[np.tril_indices(len(trace))]).astype(np.uint16)
        message = {"kind": "head", "run": run, "layer": layer, "head": head, "label": _labels(own[None], trace)[0]}
        self.send(message, [zlib.compress(packed.tobytes(), 1)])

    def _on_whole(self, run: int) -> None:
        found = next(one for one in self._runs if one.id == run)
        self._show(found, self._trace(run))

    # What is sent of a run

    def _summary(self, run: _Run, trace: Trace) -> dict[str, Any]:
        """What the page lists of a run: tokens, log-probabilities in nats (0 for the first), seconds."""
        return {
            "run": run.id, "name": run.name, "prompt_length": trace.prompt_length, "total": len(trace),
            "ids": trace.tokens.tolist(), "pieces": trace.pieces,
            "logprobs": np.nan_to_num(trace.logprobs).round(4).tolist(), "finish": trace.meta["finish"],
            "seconds": run.seconds, "max": run.options.get("max", 0),
        }  # fmt: skip

    def _show(self, run: _Run, trace: Trace, *, known: bool = False) -> None:
        """A run that is done. `known`: the page has its routing from the stream; if not, it asks (`_on_whole`)."""
        best, logprob, rank = (
            trace.taps.get(f"resid_post.lens{end}", np.zeros(0)) for end in ("", "_logprob", "_rank")
        )
        logits = trace["router_logits"][:, : 0 if known else None]
        self.send(
            {"kind": "run", **self._summary(run, trace), "lens_layers": trace.layers.get("resid_post.lens", []),
             "best": best.shape[-1],              "words": trace.meta.get("words", {})},
            [np.ascontiguousarray(a).tobytes() for a in (logits, best, logprob, rank)],
        )  # fmt: skip

    def _trace(self, run: int) -> Trace:
        for one in self._runs:
            if one.id == run and one.trace is not None:
                return one.trace
        raise KeyError(f"run {run} was forgotten: the last {RUNS} are kept; generate it again")


class Explore(Page):
    """The app. `runs` are the Traces made in it, the newest last, and `trace` is the newest."""

    def __init__(self, grok: Grok, prompt: str = EXAMPLES["Story"]):
        super().__init__([], prompt=prompt, max=40, top_p=0.95, temperature=0.8, seed=7, edits=[])
        self._grok = grok
        self._number = 0
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        layers = grok.config.num_layers
        self._lens_layers = list(range(layers)) if layers <= 16 else [*range(7, layers, 8)]

    @property
    def trace(self) -> Trace:
        """Raises IndexError before the first run."""
        return self.runs[-1]

    def _facts(self) -> dict[str, Any]:
        running = bool(self._worker and self._worker.is_alive())
        return _shape(self._grok.config, self._grok.name, self._grok.numerics) | {"running": running}

    def _on_count(self, text: str) -> None:
        """The tokens of the prompt box."""
        tokenizer = self._grok.tokenizer
        if tokenizer is not None:
            ids = tokenizer.encode(text) if text else []
            self.send(
                {"kind": "count", "pieces": [tokenizer.pieces[i] for i in ids], "bos": self._grok.config.prompt_bos}
            )

    def _on_generate(self, prompt: str, options: dict, edits: list) -> None:
        if self._worker and self._worker.is_alive():
            raise RuntimeError("a run is under way; stop it first")
        made = [edit for one in edits for edit in self._edit(one)]
        self._number += 1
        if not prompt:
            raise ValueError("the prompt is empty; type a text")
        name = ", ".join(_short(one) for one in edits) or f"baseline, seed {options['seed']}"
        run = _Run(self._number, name, prompt, options, edits)
        self._stop.clear()
        self._worker = threading.Thread(target=self._generate, args=(run, made), daemon=True)
        self._worker.start()

    def _on_stop(self) -> None:
        self._stop.set()

    def _on_price(self, run: int) -> None:
        trace = self._trace(run)
        plan = self._grok.plan([trace.tokens], capture=list(EXPORTED))
        self.send({"kind": "price", "run": run, "bytes": {name: plan.rows[name]["disk"] for name in EXPORTED}})

    def _on_export(self, run: int, taps: list, directory: str) -> None:
        if self._worker and self._worker.is_alive():
            raise RuntimeError("a run is under way; wait, or stop it")
        found = next(one for one in self._runs if one.id == run)
        self._worker = threading.Thread(target=self._export, args=(found, taps, directory), daemon=True)
        self._worker.start()

    # In the thread

    def _generate(self, run: _Run, made: list[Edit]) -> None:
        waiting: list[tuple[dict, np.ndarray]] = []
        begun = sent = time.perf_counter()

        def flush() -> None:
            if waiting:
                self.send(
                    {"kind": "tokens", "run": run.id, "tokens": [token for token, _ in waiting]},
                    [np.ascontiguousarray(np.stack([logits for _, logits in waiting], 1)).tobytes()],
                )
                waiting.clear()

        def on_token(event: TokenEvent) -> None:
            nonlocal sent, begun
            if event.position == prompt_length:
                logits = event.glimpse("router_logits", True)
                begin = {
                    "run": run.id, "name": run.name, "prompt_length": len(ids), "total": len(ids) + o["max"],
                    "ids": ids.tolist(), "pieces": [self._piece(i) for i in ids], "logprobs": [0.0] * len(ids),
                    "max": o["max"],
                }  # fmt: skip
                self.send({"kind": "begin", **begin}, [np.ascontiguousarray(logits).tobytes()])
                begun = sent = time.perf_counter()
            token = {"piece": self._piece(event.id), "id": event.id, "logprob": event.logprob}
            waiting.append((token, event.glimpse("router_logits", False)))
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
            with self._grok.edits(*made):
                (trace,) = self._grok.stream(
                    [ids], o["max"], temperature=o["temperature"], top_p=o["top_p"], seed=o["seed"], on_token=on_token,
                    capture=["router_logits", capture("attn_pattern", later=True), lens],
                )  # fmt: skip
            run.seconds = time.perf_counter() - begun
        except Exception as err:
            self._failed("generate", err)
            return
        flush()
        run.trace = trace
        self._runs = [*self._runs, run][-RUNS:]
        self._show(run, trace, known=True)

    def _export(self, run: _Run, taps: list[str], directory: str) -> None:
        try:
            made = [edit for one in run.edits for edit in self._edit(one)]
            with self._grok.edits(*made):
                dump = self._grok.dump([self._trace(run.id).tokens], directory, capture=list(taps) or ())
            self.send({"kind": "exported", "path": str(Path(directory)), "bytes": dump.nbytes, "taps": list(dump.taps)})
        except Exception as err:
            self._failed("export", err)

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


def _shape(config: GrokConfig, name: str, numerics: str) -> dict[str, Any]:
    """What the page says of a model."""
    c = config
    size = f"{look.si(c.num_parameters)} parameters, {look.si(c.num_active_parameters)} active"
    return {
        "name": name, "numerics": numerics, "layers": c.num_layers, "experts": c.num_experts, "heads": c.num_q_heads,
        "kv_heads": c.num_kv_heads, "running": False, "examples": EXAMPLES,
        "facts": [size, f"{c.num_layers} layers, {c.num_experts} experts, {c.num_q_heads} heads"],
        "taps": {tap: " ".join(TAPS[tap].dims) for tap in EXPORTED},
    }  # fmt: skip


def _short(one: dict[str, Any]) -> str:
    layer, number, factor = one["layer"], one["number"], one.get("factor")
    if one["kind"] == "scale":
        return f"{layer}.{number} × {factor}"
    if one["kind"] == "steer":
        return f"steer {one['a']} − {one['b']} × {factor} @ {layer}"
    return f"{one['kind']} {number} @ {layer}"


def _labels(pattern: np.ndarray, trace: Trace) -> list[tuple[str, float] | None]:
    """The clearest score of each head, (name, score), or None where no score is above 0.3."""
    found = []
    for name, target in targets(trace.tokens).items():
        rows = target.any(1)
        score = (pattern * target).sum(-1)[:, rows].mean(1) if rows.any() else np.zeros(len(pattern))
        found.append((name, score))
    best = [
        max(((name, float(score[h])) for name, score in found), key=lambda one: one[1]) for h in range(len(pattern))
    ]
    return [one if one[1] > 0.3 else None for one in best]


def explore(grok: Grok, prompt: str = EXAMPLES["Story"]) -> Explore:
    """The explorer of a model: an app in the notebook. `app.trace` is the last run, `app.runs` all that are kept."""
    return Explore(grok, prompt)


def view(*traces: Trace, panes: Sequence[str] = ("text", "routing", "attention", "token")) -> Page:
    """One Trace, or several to compare, in the explorer's views, without a model: also what `gs.open` gives.

    `panes`: of "text" (token strip), "routing" (map and load), "attention" (needs "attn_pattern" or q and k; left out
    without), "token" (route, predictions and lens, where it was captured), "runs" and "compare" (two Traces).
    """
    if not traces or not all(isinstance(t, Trace) for t in traces):
        raise TypeError("view takes Traces")
    if unknown := set(panes) - {"text", "routing", "attention", "token", "runs", "compare"}:
        raise ValueError(f"no pane {min(unknown)!r}; panes are text, routing, attention, token, runs, compare")
    for i, trace in enumerate(traces):
        if "router" not in trace.tables or "T" in trace.numbers["expert_index"]:
            raise ValueError(f"Trace {i} lacks routing at all positions; capture router_logits")
    if not all("attn_pattern" in t.taps or {"q", "k"} <= set(t.taps) for t in traces):
        panes = [pane for pane in panes if pane != "attention"]
    runs = [_Run(i + 1, t.text[:30], "", {}, [], t) for i, t in enumerate(traces)]
    return Page(runs, tuple(panes), prompt="", max=0, top_p=1, temperature=0, seed=0, edits=[])
