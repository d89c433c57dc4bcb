"""Two runs side by side: where the text, the routing and the predictions part."""

import dataclasses
import difflib
from typing import TYPE_CHECKING

import numpy as np

from grokscope import look
from grokscope.run.trace import ROUTING, Trace

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Traces a and b, aligned by token.

    Attributes:
      pairs: int [N, 2] of positions in a and b that hold the same token of a common stretch, in order.
      divergence: length of their common beginning, or None if a and b have the same tokens.
      layers: layer numbers of `routing`, those that both kept; none without routing, or of other numbers of experts.
      routing: float32 [L, N], distance of the router's probabilities at a pair: half the sum of the absolute
        differences, 0 alike, 1 nothing in common.
      swapped: bool [L, N], whether the set of chosen experts differs.
      divergence_nats: float32 [N], KL(a, b) of the next token, or None where one of them has no "logits".
    """

    a: Trace
    b: Trace
    pairs: np.ndarray
    divergence: int | None
    layers: list[int]
    routing: np.ndarray
    swapped: np.ndarray
    divergence_nats: np.ndarray | None

    def to_pandas(self) -> "pd.DataFrame":
        """A row for every token of either, in order: position_a, position_b (-1: not there), piece_a, piece_b,
        logprob_a, logprob_b (nats), routing (mean over layers), layers_swapped, kl (nats; NaN without logits)."""
        import pandas as pd

        rows, at = [], {"a": 0, "b": 0}

        def alone(side: str, trace: Trace, until: int) -> None:
            for i in range(at[side], until):
                rows.append(
                    {f"position_{side}": i, f"piece_{side}": trace.pieces[i], f"logprob_{side}": trace.logprobs[i]}
                )
            at[side] = until

        for n, (i, j) in enumerate(self.pairs):
            alone("a", self.a, i)
            alone("b", self.b, j)
            row = {
                "position_a": i, "position_b": j, "piece_a": self.a.pieces[i], "piece_b": self.b.pieces[j],
                "logprob_a": self.a.logprobs[i], "logprob_b": self.b.logprobs[j],
            }  # fmt: skip
            if self.layers:
                row |= {"routing": self.routing[:, n].mean(), "layers_swapped": self.swapped[:, n].sum()}
            if self.divergence_nats is not None:
                row["kl"] = self.divergence_nats[n]
            rows.append(row)
            at = {"a": i + 1, "b": j + 1}
        alone("a", self.a, len(self.a))
        alone("b", self.b, len(self.b))
        columns = [
            "position_a",
            "position_b",
            "piece_a",
            "piece_b",
            "logprob_a",
            "logprob_b",
            "routing",
            "layers_swapped",
            "kl",
        ]
        frame = pd.DataFrame(rows, columns=columns)
        frame[["position_a", "position_b"]] = frame[["position_a", "position_b"]].fillna(-1).astype(int)
        return frame

    def _repr_html_(self) -> str:
        """Both texts, what they do not share on the colours of A and B."""
        strips = []
        for side, (trace, color) in enumerate(((self.a, look.DIVERGING[1]), (self.b, look.DIVERGING[5]))):
            shared = set(self.pairs[:, side].tolist())
            colors = [None if i in shared else color for i in range(len(trace))]
            titles = [f"position {i}, log p {p:.2f} nats" for i, p in enumerate(trace.logprobs)]
            strips.append(f"<b>{'AB'[side]}</b>" + look.tokens_html(trace.pieces, colors, titles, trace.prompt_length))
        return "".join(strips) + look.facts_html("Comparison", self._facts())

    def _facts(self) -> dict[str, str]:
        at = self.divergence
        parts = "nowhere" if at is None else f"at position {at} ({_piece(self.a, at)!r}, {_piece(self.b, at)!r})"
        facts = {"texts part": parts, "aligned": f"{len(self.pairs)} tokens"}
        if self.layers and len(self.pairs):
            facts["routing differs"] = f"by {self.routing.mean():.3f}"
            facts["other experts"] = f"at {self.swapped.mean():.1%} of {self.swapped.size} choices"
        if self.divergence_nats is not None and len(self.pairs):
            facts["KL"] = f"{self.divergence_nats.mean():.3g} nats a token"
        return facts

    def __repr__(self) -> str:
        return f"Comparison({'; '.join(f'{name} {value}' for name, value in self._facts().items())})"


def compare(a: Trace, b: Trace) -> Comparison:
    """Where two runs part: of the same prompt under edits, of two prompts, of two checkpoints with one vocabulary.

    Tokens are aligned as in a diff, behind their common beginning; routing and, where both have "logits", predictions
    are compared at the pairs.
    """
    for trace in (a, b):
        if not isinstance(trace, Trace):
            raise TypeError(f"compare takes two Traces; got {type(trace).__name__}")
    shorter = min(len(a), len(b))
    differing = np.flatnonzero(a.tokens[:shorter] != b.tokens[:shorter])
    divergence = int(differing[0]) if len(differing) else None if len(a) == len(b) else shorter
    same = shorter if divergence is None else divergence
    rest = difflib.SequenceMatcher(None, a.tokens[same:].tolist(), b.tokens[same:].tolist(), autojunk=False)
    blocks = [(0, 0, same), *((same + m.a, same + m.b, m.size) for m in rest.get_matching_blocks())]
    pairs = np.array([(i + n, j + n) for i, j, size in blocks for n in range(size)], int).reshape(-1, 2)

    layers, routing, swapped = [], np.empty((0, len(pairs)), np.float32), np.empty((0, len(pairs)), bool)
    alike = a.meta["config"]["num_experts"] == b.meta["config"]["num_experts"]
    if alike and all(_whole(t, name) for t in (a, b) for name in ROUTING):
        kept = [set(t.layers[tap]) for t in (a, b) for tap in ("router_logits", "expert_index")]
        layers = sorted(set.intersection(*kept))
    if layers:
        probs = [
            [_softmax(t["router_logits", n][at]) for n in layers] for t, at in ((a, pairs[:, 0]), (b, pairs[:, 1]))
        ]
        routing = np.abs(np.array(probs[0]) - np.array(probs[1])).sum(-1) / 2
        width = max(t["expert_index"].shape[-1] for t in (a, b))
        sets = [
            [_sets(t["expert_index", n][at], width) for n in layers] for t, at in ((a, pairs[:, 0]), (b, pairs[:, 1]))
        ]
        swapped = (np.array(sets[0]) != np.array(sets[1])).any(-1)
    kl = None
    if all(_whole(t, "logits") for t in (a, b)):
        log_a, log_b = (
            log_softmax(t["logits"][at].astype(np.float64)) for t, at in ((a, pairs[:, 0]), (b, pairs[:, 1]))
        )
        kl = kl_nats(log_a, log_b).astype(np.float32)
    return Comparison(a, b, pairs, divergence, layers, routing, swapped, kl)


def _whole(trace: Trace, tap: str) -> bool:
    return tap in trace.taps and "T" not in trace.numbers.get(tap, {}) and "E" not in trace.numbers.get(tap, {})


def _sets(experts: np.ndarray, width: int) -> np.ndarray:
    """Of each row the experts in order, behind -1 for nobody, as many as the wider of two runs has."""
    nobody = np.full((len(experts), width - experts.shape[-1]), -1, experts.dtype)
    return np.sort(np.concatenate([nobody, experts], axis=-1), axis=-1)


def _piece(trace: Trace, position: int) -> str:
    return trace.pieces[position] if position < len(trace) else "(end)"


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Nats, along the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl_nats(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p, q) in nats along the last axis; what p rules out (a banned logit) adds nothing."""
    possible = log_p > -np.inf
    apart = np.subtract(log_p, log_q, out=np.zeros(log_p.shape), where=possible)
    return (np.exp(log_p) * apart).sum(-1)


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(x))
