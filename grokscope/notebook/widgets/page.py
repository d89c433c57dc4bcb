"""`view(trace)`: the explorer's views of runs that are done, without a model.

The page is the files of browser/: page.html, page.css, and the scripts of PARTS, which are joined in that order to be
the one function that anywidget calls for each view of a widget. So the scripts share one scope, there is nothing to
build, and nothing is fetched. The page holds views and the selection; the kernel holds runs. Messages carry arrays as
binary buffers. A page that is loaded again asks for everything it shows.
"""

import dataclasses
import json
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
from grokscope.run.trace import Trace

BROWSER = Path(__file__).with_name("browser")
PARTS = (
    "formats", "state", "drawing", "text", "routing", "attention", "token", "compare", "rail", "selection", "messages",
)  # fmt: skip
"""Scripts, in the order they are joined: what runs while it is read needs what stands before it."""

RUNS = 12  # kept; older ones are forgotten
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


def _module() -> str:
    """The page's scripts as one module; `leave` is in the last."""
    html = json.dumps((BROWSER / "page.html").read_text("utf-8"))
    body = "\n".join((BROWSER / f"{part}.js").read_text("utf-8") for part in PARTS)
    return f"export default {{ render({{ model, el }}) {{\nconst HTML = {html};\n{body}\nreturn leave;\n}} }};\n"


@dataclasses.dataclass
class Run:
    """One run of the session. `trace` is None until it is done."""

    id: int
    name: str
    prompt: str
    options: dict[str, Any]
    edits: list[dict[str, Any]]
    trace: Trace | None = None
    seconds: float = 0.0


class Page(anywidget.AnyWidget):
    """The kernel side of the page, as far as runs that are done are concerned. `panes`: those that are shown."""

    _esm = _module()
    _css = (BROWSER / "page.css").read_text("utf-8")
    draft = traitlets.Dict().tag(sync=True)  # what the fields hold, so that a page that is loaded again has it

    def __init__(self, runs: list[Run], panes: tuple[str, ...] = tuple(PANES), **draft):
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
        return shape(GrokConfig(**meta["config"]), meta["checkpoint"]["name"], meta["numerics"])

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

    def _summary(self, run: Run, trace: Trace) -> dict[str, Any]:
        """What the page lists of a run: tokens, log-probabilities in nats (0 for the first), seconds."""
        return {
            "run": run.id, "name": run.name, "prompt_length": trace.prompt_length, "total": len(trace),
            "ids": trace.tokens.tolist(), "pieces": trace.pieces,
            "logprobs": np.nan_to_num(trace.logprobs).round(4).tolist(), "finish": trace.meta["finish"],
            "seconds": run.seconds, "max": run.options.get("max", 0),
        }  # fmt: skip

    def _show(self, run: Run, trace: Trace, *, known: bool = False) -> None:
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


def shape(config: GrokConfig, name: str, numerics: str) -> dict[str, Any]:
    """What the page says of a model."""
    c = config
    size = f"{look.si(c.num_parameters)} parameters, {look.si(c.num_active_parameters)} active"
    return {
        "name": name, "numerics": numerics, "layers": c.num_layers, "experts": c.num_experts, "heads": c.num_q_heads,
        "kv_heads": c.num_kv_heads, "running": False, "examples": EXAMPLES,
        "facts": [size, f"{c.num_layers} layers, {c.num_experts} experts, {c.num_q_heads} heads"],
        "taps": {tap: " ".join(TAPS[tap].dims) for tap in EXPORTED},
    }  # fmt: skip


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
    runs = [Run(i + 1, t.text[:30], "", {}, [], t) for i, t in enumerate(traces)]
    return Page(runs, tuple(panes), prompt="", max=0, top_p=1, temperature=0, seed=0, edits=[])
