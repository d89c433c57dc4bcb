"""A Trace: one sequence, what the model did on it, and where it comes from. numpy and pandas only, no jax.

Every token has had its forward pass, so all taps have len(tokens) positions. `logits[i]` predicts token i + 1;
`logprobs[i]` is log p(token i | those before) in nats, before temperature and filters, with logprobs[0] = NaN.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grokscope import look

if TYPE_CHECKING:
    import pandas as pd

COORDINATES = {
    "L": "layer",
    "T": "position",
    "S": "key_position",
    "H": "head",
    "G": "kv_head",
    "E": "expert",
    "K": "rank",
    "C": "channel",
    "D": "channel",
    "F": "channel",
    "V": "token",
    "N": "best",
    "M": "moment",
    "Y": "class",
}
"""Name of the numbers along each dimension letter."""

TABLES = ("tokens", "router")
ROUTING = ("expert_index", "expert_gate", "router_logits")
"""Taps the table "router" is made of."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """One sequence of T tokens, without batch axis and padding.

    Attributes:
      tokens: int32 [T], prompt and generated tokens, EOS included.
      pieces: T strings as the tokenizer spells them, or "<422>" without a tokenizer.
      text, continuation: of all tokens, and of those after the prompt; EOS has no text.
      prompt_length: tokens of the prompt.
      logprobs: float32 [T], nats; NaN first.
      taps: {name: array} in the type of the run (bfloat16 kept); `trace[name]` gives float32 or int32.
      dims: {name: letters of its axes}, "L" in front for taps of a layer.
      numbers: {name: {letter: what its axis numbers}} where an axis does not simply count: layers, and selected heads,
        experts and positions ("T" of what was reduced over positions: those it is over).
      meta: checkpoint, config, numerics, sampling, edits, versions, finish, prompt (index among those of the call);
        with a lens "words", {id: piece} of what it guessed.
    """

    tokens: np.ndarray
    pieces: list[str]
    text: str
    continuation: str
    prompt_length: int
    logprobs: np.ndarray
    taps: dict[str, np.ndarray]
    dims: dict[str, str]
    numbers: dict[str, dict[str, list[int]]]
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def layers(self) -> dict[str, list[int]]:
        """{name: layer numbers along its first axis}, of those that have one."""
        return {name: own["L"] for name, own in self.numbers.items() if "L" in own}

    @property
    def phase(self) -> np.ndarray:
        """[T] of "prefill" (the prompt) and "decode"."""
        return np.where(np.arange(len(self)) < self.prompt_length, "prefill", "decode")

    def __getitem__(self, key: str | tuple[str, int]) -> np.ndarray:
        """trace[tap], or trace[tap, layer number], as numpy float32 or int32. Layer -1 is the model's last.

        Raises KeyError naming the captured taps, or the layers kept of this one.
        """
        name, *layer = key if isinstance(key, tuple) else (key,)
        if name not in self.taps:
            near = "".join(f"; nearest: {n}" for n in difflib.get_close_matches(str(name), self.taps, n=1))
            raise KeyError(f"tap {name!r} was not captured{near}; captured are {', '.join(self.taps) or 'none'}")
        value = self.taps[name]
        if layer:
            kept = self.layers.get(name)
            if len(layer) > 1 or kept is None:
                raise KeyError(f"{name!r} takes {'one layer number' if kept else 'no layer: it has no layer axis'}")
            number = _counted(layer[0], self.meta["config"]["num_layers"])
            if number not in kept:
                raise KeyError(f"layer {number} of {name!r} was not kept; kept are {kept}")
            value = value[kept.index(number)]
        return value if value.dtype == np.int32 else value.astype(np.float32)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.taps)

    def coords(self, tap: str) -> dict[str, np.ndarray]:
        """{axis name: its numbers}, in the order of the axes of trace[tap]: layer, position, head, expert, ..."""
        self[tap, self.layers[tap][0]] if self.layers.get(tap) else self[tap]  # KeyError
        own = self.numbers.get(tap, {})
        axes = zip(self.dims[tap], self.taps[tap].shape, strict=True)
        return {COORDINATES[d]: np.array(own[d]) if d in own else np.arange(n) for d, n in axes}

    @property
    def attention_edits(self) -> set[str]:
        """Which of attn_scores and attn_pattern this run edited: q and k do not show that."""
        taps = {tap for e in self.meta["edits"] for tap in e.get("taps", [e.get("tap")])}
        return taps & {"attn_scores", "attn_pattern"}

    def attention(self, layers=None, heads=None, positions=None) -> np.ndarray:
        """Attention rows [layer, head, position, key_position], float32, computed from captured q and k.

        layers, heads, positions: an int or a list of numbers each; None is all that were captured. Negative layers and
        heads count from the model's last. Capture with grokscope.capture("attn_pattern", later=True). Raises KeyError
        if q or k is missing.
        """
        if missing := [name for name in ("q", "k") if name not in self.taps]:
            raise KeyError(
                f"attention needs the taps q and k, and this Trace lacks {' and '.join(missing)}; "
                'capture them, or grokscope.capture("attn_pattern", later=True)'
            )
        if edited := self.attention_edits:
            raise ValueError(
                f"this run edited {min(edited)}, which q and k do not show; capture attn_pattern itself, not later"
            )
        config, held = self.meta["config"], self.coords("q")
        chosen = {}
        layered, headed = ("layer", layers, config["num_layers"]), ("head", heads, config["num_q_heads"])
        for axis, wanted, size in (layered, headed, ("position", positions, 0)):
            numbers = held[axis] if wanted is None else np.array([_counted(n, size) for n in np.atleast_1d(wanted)])
            absent = [n for n in numbers if n not in held[axis]]
            if absent:
                raise KeyError(f"{axis} {absent[0]} of 'q' was not kept; kept are {held[axis].tolist()}")
            chosen[axis] = numbers
        if len(self.coords("k")["position"]) < len(self):
            raise KeyError("attention needs 'k' at all positions")
        share = config["num_q_heads"] // config["num_kv_heads"]
        rows = np.searchsorted(held["position"], chosen["position"])
        columns = [held["head"].tolist().index(h) for h in chosen["head"]]
        kept = self.coords("k")["kv_head"].tolist()
        if missing := {h // share for h in chosen["head"]} - {*kept}:
            raise KeyError(f"kv_head {min(missing)} of 'k', which these heads read, was not kept; kept are {kept}")
        groups = [kept.index(h // share) for h in chosen["head"]]
        hidden = np.arange(len(self)) > chosen["position"][:, None]
        found = np.empty((len(chosen["layer"]), len(columns), len(rows), len(self)), np.float32)
        for i, layer in enumerate(chosen["layer"]):
            q, k = self["q", layer][rows][:, columns], self["k", layer][:, groups]
            scores = np.einsum("thc,shc->hts", q, k).astype(self.taps["q"].dtype).astype(np.float32)  # as in the run
            scores = scores * (config["attn_output_multiplier"] / 30)
            scores = np.where(hidden, -np.inf, 30 * np.tanh(scores))
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            found[i] = weights / weights.sum(-1, keepdims=True)
        return found

    def to_pandas(self, table: str, *, wide: bool = False) -> "pd.DataFrame":
        """A tidy table.

        "tokens": position, token, piece, phase, logprob. "router": one row per position, layer and rank of the chosen
        expert: position, piece, phase, layer, rank, expert, logit, prob (softmax of the logits), gate (what was used).
        `wide`: one row a position, columns (expert | gate, layer, rank).
        """
        import pandas as pd

        if wide and table == "tokens":
            raise ValueError('"tokens" has one row a token already; wide=True is for "router"')
        frame = pd.DataFrame(self.columns(table))
        if not wide:
            return frame
        index, columns = ["position", "piece", "phase"], ["layer", "rank"]
        wide_of = {name: frame.pivot(index=index, columns=columns, values=name) for name in ("expert", "gate")}
        return pd.concat(wide_of, axis=1)

    @property
    def tables(self) -> list[str]:
        """Those that `to_pandas` can make of what was captured."""
        numbers = [{"E": None} | self.numbers.get(name, {}) for name in ROUTING if name in self.taps]
        return ["tokens"] + ["router"] * (len(numbers) == len(ROUTING) and all(n == numbers[0] for n in numbers))

    def columns(self, table: str) -> dict[str, np.ndarray]:
        """The columns of a table as arrays of one length; see `to_pandas`."""
        if table not in TABLES:
            raise ValueError(f'no table {table!r}; tables are "router" and "tokens"')
        pieces = np.array(self.pieces, object)
        if table == "tokens":
            positions = np.arange(len(self), dtype=np.int32)
            columns = {"position": positions, "token": self.tokens, "piece": pieces}
            return columns | {"phase": self.phase, "logprob": self.logprobs}
        experts, gates, logits = (self[name] for name in ROUTING)
        if table not in self.tables:
            raise ValueError(f"the router table needs {', '.join(ROUTING)} of the same layers, positions, all experts")
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        probs = shifted / shifted.sum(-1, keepdims=True)
        num_layers, length, k = experts.shape
        rows = np.indices((length, num_layers, k), dtype=np.int32).reshape(3, -1)
        position, layer, rank = rows[:, experts[rows[1], rows[0], rows[2]] >= 0]  # -1: nobody was chosen
        positions = self.coords("expert_index")["position"].astype(np.int32)[position]

        def chosen(values):
            return np.take_along_axis(values, np.maximum(experts, 0), axis=-1)[layer, position, rank]

        return {
            "position": positions,
            "piece": pieces[positions],
            "phase": self.phase[positions],
            "layer": np.array(self.layers["expert_index"], np.int32)[layer],
            "rank": rank,
            "expert": experts[layer, position, rank],
            "logit": chosen(logits),
            "prob": chosen(probs),
            "gate": gates[layer, position, rank],
        }

    def save(self, directory: Path | str) -> Path:
        """Writes a dump that grokscope.open reads back. See grokscope.run.dump."""
        from grokscope.run import dump

        return dump.save(self, directory)

    def _repr_html_(self) -> str:
        """The text, each token on the colour of its first expert at the middle kept layer; hover for numbers."""
        colors, titles, where = [None] * len(self), [f"{i}" for i in range(len(self))], ""
        if "router" in self.tables and "T" not in self.numbers["expert_index"]:
            layer = self.layers["expert_index"][len(self.layers["expert_index"]) // 2]
            experts, gates = self["expert_index", layer], self["expert_gate", layer]
            colors = [look.expert_color(e) for e in experts[:, 0]]
            titles = [
                f"position {i}, layer {layer}: "
                + ", ".join(f"expert {e} gate {g:.2f}" for e, g in zip(*own, strict=True) if e >= 0)
                for i, own in enumerate(zip(experts, gates, strict=True))
            ]
            where = f"first expert at layer {layer}"
        titles = [f"{t}, log p {p:.2f} nats" for t, p in zip(titles, self.logprobs, strict=True)]
        facts = {
            "tokens": f"{self.prompt_length} prefill + {len(self) - self.prompt_length} decode",
            "finish": self.meta["finish"],
            "log p": f"{np.nanmean(self.logprobs[1:]):.2f} nats a token" if len(self) > 1 else "–",
            "taps": ", ".join(self.taps) or "none",
        } | ({"colour": where} if where else {})
        strip = look.tokens_html(self.pieces, colors, titles, self.prompt_length)
        return strip + look.facts_html("Trace", facts)

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        counts = f"{self.prompt_length} + {len(self) - self.prompt_length} tokens, finish {self.meta['finish']}"
        return f"Trace({text!r}, {counts}, taps: {', '.join(self.taps) or 'none'})"


def _counted(number: int, size: int) -> int:
    """From the last of `size`, where it is negative and there is one."""
    return number + size if isinstance(number, int | np.integer) and -size <= number < 0 else number
