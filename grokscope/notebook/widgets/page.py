"""`view(trace)`: the explorer's views of runs that are done, without a model.

The page is the files of browser/: page.html, page.css, and the scripts of PARTS, which are joined in that order to be
the one function that anywidget calls for each view of a widget. So the scripts share one scope, there is nothing to
build, and nothing is fetched. The page holds views and the selection; the kernel holds runs. Messages carry arrays as
binary buffers. A page that is loaded again asks for everything it shows.
"""

import base64
import dataclasses
import io
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image

from grokscope import look
from grokscope.analysis import routing
from grokscope.analysis.attention import targets
from grokscope.analysis.compare import Comparison, compare
from grokscope.config import GrokConfig
from grokscope.model.taps import TAPS
from grokscope.notebook import plots
from grokscope.run.edits import Edit
from grokscope.run.trace import ROUTING, Trace

BROWSER = Path(__file__).with_name("browser")
PARTS = (
    "formats", "state", "drawing", "text", "routing", "experts", "attention", "lens", "token", "compare", "rail",
    "selection", "messages",
)  # fmt: skip
"""Scripts, in the order they are joined: what runs while it is read needs what stands before it."""

RUNS = 12  # kept; older ones are forgotten
THUMBNAIL = 64
WINDOW = 256  # positions that the page shows, and asks for, at once
LISTED = 8  # strongest reads of a position
EXAMPLES = {
    "Story": "The old keeper of the lighthouse climbed the stairs at dusk, and",
    "Repeat": "red fox, blue whale, grey owl, black cat. red fox, blue whale, grey",
    "Python": "def area(width, height):\n    return width * height\n\ndef volume(",
    "German": "Der alte Mann ging jeden Morgen an das Meer und",
}
PANES = {
    "prompt": "prompt", "edits": "edits", "runs": "runs", "export": "export", "token_strip": "text", "routing": "map",
    "expert_load": "load", "router_entropy": "ent", "coactivation": "coact", "transitions": "trans",
    "attention": "attn", "logit_lens": "lens", "token": "insp", "compare": "cmp",
}  # fmt: skip
"""Panes of the page by name, and their ids there. A view that is a plot too has the plot's name."""
VIEWS = ("token_strip", "routing", "expert_load", "router_entropy", "coactivation", "transitions", "attention", "token")
EXPORTED = ("router_logits", "expert_gate", "resid_post", "attn_pattern", "logits")


def _module() -> str:
    """The page's scripts as one module; `leave` is in the last."""
    html = json.dumps((BROWSER / "page.html").read_text("utf-8"))
    body = "\n".join((BROWSER / f"{part}.js").read_text("utf-8") for part in PARTS)
    return f"export default {{ render({{ model, el }}) {{\nconst HTML = {html};\n{body}\nreturn leave;\n}} }};\n"


@dataclasses.dataclass
class Run:
    """One run of the session. `trace` is None until it is done; `edits` are those it ran under."""

    id: int
    name: str
    prompt: str
    options: dict[str, Any]
    edits: list[Edit]
    trace: Trace | None = None
    seconds: float = 0.0


class Page(anywidget.AnyWidget):
    """The kernel side of the page, as far as runs that are done are concerned. `panes`: those that are shown."""

    _esm = _module()
    _css = (BROWSER / "page.css").read_text("utf-8")
    draft = traitlets.Dict().tag(sync=True)  # what the fields hold, so that a page that is loaded again has it

    def __init__(self, runs: list[Run], panes: tuple[str, ...] = tuple(PANES), **draft):
        super().__init__(draft=draft)
        # ipykernel 7.4 takes messages of a page to the subshell that the last answer to it was sent from, which is gone
        # once the page is loaded again; without this they go where the page says.
        vars(self.comm)["_reply_subshell_for"] = None
        self._stills: list[Any] = []
        self._runs = runs
        self._panes = panes
        self.on_msg(self._receive)

    def _ipython_display_(self, **_) -> None:
        """The widget, and under it a picture for where it does not live: in a saved notebook, or on paper. The page
        hides the picture (page.css)."""
        data, metadata = super()._repr_mimebundle_() or ({}, {})
        display(data, metadata=metadata, raw=True)
        self._stills.append(display(HTML(self._picture()), display_id=True))

    def _picture(self) -> str:
        """HTML of the newest run, or of the newest two where they can be compared."""
        if not self.runs:
            return '<div class="gs-still">No run was made before this was saved. Run the cell again.</div>'
        last = self.runs[-1]
        parts = [last._repr_html_(), _image(plots.routing, last)]
        if "compare" in self._panes and len(self.runs) > 1:
            comparison = compare(*self.runs[-2:])
            parts += [comparison._repr_html_(), *([_image(plots.compare, comparison)] if len(comparison.pairs) else [])]
        return f'<div class="gs-still">{"".join(parts)}</div>'

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

    def _failed(self, kind: str, err: Exception, **more) -> None:
        """Told in the pane of what was asked."""
        text = err.args[0] if isinstance(err, KeyError) else err
        self.send({"kind": "error", "of": kind, "text": f"{type(err).__name__}: {text}", **more})

    def _on_hello(self) -> None:
        """A page has come: what it shows, from the beginning."""
        panes = [PANES[pane] for pane in self._panes]
        self.send({"kind": "model", "panes": panes, "window": WINDOW, **self._facts()})
        for run in self._runs:
            if run.trace is not None:
                self._show(run, run.trace, running=self._running)

    @property
    def _running(self) -> bool:
        """Whether a run is under way."""
        return False

    def _facts(self) -> dict[str, Any]:
        meta = self.runs[-1].meta
        return shape(GrokConfig(**meta["config"]), meta["checkpoint"]["name"], meta["numerics"])

    def _on_whole(self, run: int) -> None:
        found = next((one for one in self._runs if one.id == run), None)
        if found is not None:
            self._show(found, self._trace(run))

    def _on_cells(self, run: int, start: int) -> None:
        """Gates and logits of the positions of a window."""
        trace = self._trace(run)
        here = slice(start, start + WINDOW)
        count = len(trace.tokens[here])
        buffers = [gates_bytes(trace["expert_gate"][:, here]), raw(trace["router_logits"][:, here])]
        self.send({"kind": "cells", "run": run, "start": start, "count": count}, buffers)

    def _on_lens(self, run: int, start: int) -> None:
        """Best tokens after each kept layer, their log-probabilities, and the rank of what followed, of a window."""
        trace = self._trace(run)
        best, logprob, rank = (
            trace[f"resid_post.lens{end}"][:, start : start + WINDOW] for end in ("", "_logprob", "_rank")
        )
        known = trace.meta.get("words", {})
        words = {str(token): known.get(str(token), f"<{token}>") for token in np.unique(best)}
        message = {"kind": "lens", "run": run, "start": start, "count": best.shape[1], "best": best.shape[-1]}
        self.send(message | {"words": words}, [zlib.compress(raw(a), 1) for a in (best, logprob, rank)])

    def _on_experts(self, run: int) -> None:
        """Entropy, co-activation and transitions of a whole run, as `grokscope.analysis` has them."""
        trace = self._trace(run)
        phases, tables, buffers = [], ("entropy", "coactivation", "transitions"), []
        few = {"coactivation": trace.meta["config"]["num_experts"] < 2, "transitions": not _deep(trace)}
        found = [
            {name: getattr(routing, name)(trace, phase=phase) for name in tables if not few.get(name)}
            for phase in ("all", "prefill", "decode")
            if phase == "all" or (trace.phase == phase).any()
        ]
        for of in found:
            phases.append([of["entropy"].phase.iloc[0], int(of["entropy"].tokens.iloc[0])])
            buffers.append(of["entropy"].entropy.to_numpy(np.float32))
            for name in tables[1:]:
                columns = of[name][["count", "expected", "lift"]].to_numpy(np.float32) if name in of else np.zeros(0)
                buffers.append(columns)
        self.send({"kind": "experts", "run": run, "phases": phases}, [zlib.compress(raw(b), 1) for b in buffers])

    def _on_attention(self, run: int, layer: int) -> None:
        """Thumbnails of a layer's heads [H, n, n]: the largest of each block, square roots as bytes."""
        trace = self._trace(run)
        size = min(len(trace), THUMBNAIL)
        starts = -(-np.arange(size) * len(trace) // size)
        about, packed, labels = targets(trace.tokens), [], []
        for head in range(trace.meta["config"]["num_q_heads"]):
            pattern = _rows(trace, layer, head)
            blocks = np.maximum.reduceat(np.maximum.reduceat(pattern, starts, axis=0), starts, axis=1)
            packed.append(np.rint(255 * np.sqrt(blocks)).astype(np.uint8))
            labels.append(_label(pattern, about))
        message = {"kind": "attention", "run": run, "layer": layer, "size": size, "labels": labels}
        self.send(message, [zlib.compress(raw(np.array(packed)), 1)])

    def _on_head(self, run: int, layer: int, head: int, start: int) -> None:
        """One head in a window of positions.

        Buffers: the triangle of the window, rows one after the other, in 65,535ths; what each position reads most in
        the whole text, and who reads it most (position [n, LISTED], -1 where there is none, and weight); the mean
        weight it gets from later positions [n].
        """
        trace = self._trace(run)
        pattern = _rows(trace, layer, head)
        here = np.arange(start, min(start + WINDOW, len(trace)))
        triangle = pattern[np.ix_(here, here)][np.tril_indices(len(here))]
        later = np.tril(pattern, -1)[:, here].T  # [n, T]: who reads these
        received = later.sum(1) / np.maximum(len(trace) - 1 - here, 1)
        message = {"kind": "head", "run": run, "layer": layer, "head": head, "start": start, "count": len(here)}
        message["label"] = _label(pattern, targets(trace.tokens))
        packed = zlib.compress(np.rint(65535 * triangle).astype(np.uint16).tobytes(), 1)
        listed = [*_strongest(pattern[here]), *_strongest(later)]
        self.send(message, [packed, *(raw(a) for a in (*listed, received.astype(np.float32)))])

    def _on_compare(self, a: int, b: int) -> None:
        """KL of two runs at each position, nats, as `grokscope.compare` has it; null where they cannot be compared."""
        comparison = self._comparison(self._trace(a), self._trace(b))
        kl = [None] * min(len(comparison.a), len(comparison.b))
        if comparison.divergence_nats is not None:
            for (i, j), nats in zip(comparison.pairs.tolist(), comparison.divergence_nats.tolist(), strict=True):
                if i == j:
                    kl[i] = max(0.0, nats)
        self.send({"kind": "compare", "a": a, "b": b, "kl": kl})

    def _comparison(self, a: Trace, b: Trace) -> Comparison:
        return compare(a, b)

    # What is sent of a run

    def _summary(self, run: Run, trace: Trace) -> dict[str, Any]:
        """What the page lists of a run: tokens, log-probabilities in nats (null for the first), seconds; layers of the
        lens, where it is of all positions."""
        lens = trace.numbers.get("resid_post.lens", {"T": []})
        return {
            "run": run.id, "name": run.name, "prompt_length": trace.prompt_length, "total": len(trace),
            "ids": trace.tokens.tolist(), "pieces": trace.pieces,
            "logprobs": [None if np.isnan(p) else round(float(p), 4) for p in trace.logprobs],
            "finish": trace.meta["finish"], "seconds": run.seconds, "max": run.options.get("max", 0),
            "lens_layers": [] if "T" in lens else lens["L"],
        }  # fmt: skip

    def _show(self, run: Run, trace: Trace, *, known: bool = False, running: bool = False) -> None:
        """A run that is done, and its experts. `known`: the page has them from the stream; if not, it asks
        (`_on_whole`). `running`: another is under way."""
        experts = b"" if known else zlib.compress(experts_bytes(trace["expert_index"]), 1)
        told = {"kind": "run", "kept": len(self._runs), "running": running}
        self.send(told | self._summary(run, trace), [experts])

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


def _image(plot: Callable, of: Any) -> str:
    """A plot as HTML. Without pyplot, whose current figure belongs to the notebook's cells."""
    figure, file, small = Figure(figsize=(7.2, 2.6), layout="constrained"), io.BytesIO(), io.BytesIO()
    plot(of, ax=figure.add_subplot())
    figure.savefig(file, format="png", dpi=100)
    # A third of the bytes, with colours off by at most 4 of 255 (64 layers, measured).
    image = Image.open(file).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    image.save(small, "PNG", optimize=True)
    data = base64.b64encode(small.getvalue()).decode()
    return f'<img alt="{plot.__name__}" src="data:image/png;base64,{data}">'


def raw(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def experts_bytes(index: np.ndarray) -> bytes:
    """int8 [L, T, K] of the experts that ran, K at least 2."""
    return raw(_two_at_least(index).astype(np.int8))


def gates_bytes(gates: np.ndarray) -> bytes:
    """float32 [L, T, K] of their gates."""
    return raw(_two_at_least(gates))


def _two_at_least(ranked: np.ndarray) -> np.ndarray:
    missing = np.full((*ranked.shape[:-1], max(0, 2 - ranked.shape[-1])), -1, ranked.dtype)
    return np.concatenate([ranked, missing], axis=-1)


def _deep(trace: Trace) -> bool:
    return len(trace.layers["expert_index"]) > 1


def _rows(trace: Trace, layer: int, head: int) -> np.ndarray:
    """[T, S] of one head: row reads column."""
    if "attn_pattern" in trace.taps:
        return trace["attn_pattern", layer][head]
    return trace.attention(layers=layer, heads=head)[0, 0]


def _strongest(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the LISTED largest of each row [n, LISTED], -1 where it is 0, and their values, largest first."""
    found = np.argsort(-weights, axis=1, kind="stable")[:, :LISTED]
    values = np.take_along_axis(weights, found, axis=1).astype(np.float32)
    short = ((0, 0), (0, LISTED - found.shape[1]))
    at = np.where(values > 0, found, -1).astype(np.int32)
    return np.pad(at, short, constant_values=-1), np.pad(values, short)


def _label(pattern: np.ndarray, about: dict[str, np.ndarray]) -> tuple[str, float] | None:
    """The clearest score of a head, (name, score), or None where no score is above 0.3."""
    scores = {}
    for name, target in about.items():
        rows = target.any(1)
        scores[name] = float((pattern * target).sum(-1)[rows].mean()) if rows.any() else 0.0
    best = max(scores, key=lambda name: scores[name])
    return (best, scores[best]) if scores[best] > 0.3 else None


def view(*traces: Trace, panes: str | Sequence[str] = VIEWS) -> Page:
    """One Trace, or several to compare, in the explorer's views, without a model; from disk, `gs.open(dump)[0]`.

    `panes`: one or more of "token_strip", "routing", "expert_load", "router_entropy", "coactivation", "transitions",
    "attention" (needs "attn_pattern" or q and k), "logit_lens" (needs a lens), which are plots too, "token" (route,
    predictions, lens), "runs" and "compare" (two Traces). Of the default ones attention is left out where it was not
    captured. A view of one run shows the last Trace.
    """
    if not traces or not all(isinstance(t, Trace) for t in traces):
        raise TypeError(f"view takes Traces; got {', '.join(type(t).__name__ for t in traces) or 'none'}")
    chosen = [panes] if isinstance(panes, str) else list(panes)
    possible = [pane for pane in PANES if pane not in ("prompt", "edits", "export")]
    if unknown := set(chosen) - set(possible):
        raise ValueError(f"no pane {min(unknown)!r}; panes are {', '.join(possible)}")
    for i, trace in enumerate(traces):
        if not all(_whole(trace, tap) for tap in ROUTING):
            raise ValueError(f"Trace {i} lacks routing of all layers and positions; capture router_logits")
        if _sizes(trace) != _sizes(traces[0]):
            raise ValueError(f"Trace {i} is of a model of {_sizes(trace)}, those before of {_sizes(traces[0])}")
        if "attention" in chosen and not _has_attention(trace):
            if panes != VIEWS:
                raise ValueError(f'Trace {i} lacks attention; capture gs.capture("attn_pattern", later=True)')
            chosen.remove("attention")
        if "logit_lens" in chosen and "T" in trace.numbers.get("resid_post.lens", {"T": []}):
            raise ValueError(
                f'Trace {i} lacks a lens of all positions; capture gs.capture("resid_post", reduce="lens", k=5)'
            )
    if "compare" in chosen and len(traces) < 2:
        raise ValueError("one Trace cannot be compared; give two")
    runs = [Run(i + 1, t.text[:30], "", {}, [], t) for i, t in enumerate(traces)]
    return Page(runs, tuple(chosen), prompt="", max=0, top_p=1, temperature=0, seed=0, edits=[])


def _has_attention(trace: Trace) -> bool:
    """Whether all heads are there, of all layers, at all positions, and not edited behind q and k."""
    if "attn_pattern" in trace.taps:
        return _whole(trace, "attn_pattern")
    return _whole(trace, "q") and _whole(trace, "k") and not trace.attention_edits


def _whole(trace: Trace, tap: str) -> bool:
    return tap in trace.taps and trace.numbers[tap] == {"L": [*range(trace.meta["config"]["num_layers"])]}


def _sizes(trace: Trace) -> str:
    c = trace.meta["config"]
    return f"{c['num_layers']} layers, {c['num_experts']} experts, {c['num_q_heads']} heads"
