"""From the stream to the vocabulary: the logit lens, and who put a logit there. Weights are numpy, no jax.

The lens itself runs on the device (`capture("resid_post", reduce="lens", k=5)`); `lens` makes a table of it.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from grokscope.analysis.sequences import Source, having
from grokscope.run.trace import COORDINATES, Trace

if TYPE_CHECKING:
    from grokscope.run.engine import Grok

ATTRIBUTION = (
    "embed", "attn_z", "attn_out", "expert_gate", "expert_index", "expert_out", "moe_out", "resid_post", "logits",
)  # fmt: skip
"""Taps that `attribution` reads."""


def lens(source: Source, tap: str = "resid_post") -> pd.DataFrame:
    """What the stream would predict if the model ended there, at every captured layer and position.

    Columns: prompt (its number in its call), layer (of taps that have one), position, piece, phase, best (0 is the
    likeliest), token and word (its guess), logprob (nats), rank (of the token that followed; 0 is best, -1 where none
    did).
    """
    frames = []
    for _, trace in having(source, f"{tap}.lens"):
        if f"{tap}.lens" not in trace.taps:
            raise KeyError(f"the lens at {tap!r} was not captured; use grokscope.capture({tap!r}, reduce='lens', k=5)")
        best, logprob, rank = (trace[f"{tap}.lens{end}"] for end in ("", "_logprob", "_rank"))
        coords = trace.coords(f"{tap}.lens")
        layered = "layer" in coords
        if not layered:
            best, logprob, rank = best[None], logprob[None], rank[None]
        grid = np.meshgrid(coords.get("layer", [0]), coords["position"], np.arange(best.shape[-1]), indexing="ij")
        layer, position, number = (axis.ravel() for axis in grid)
        columns = {"prompt": trace.meta["prompt"]} | ({"layer": layer} if layered else {})
        columns |= {"position": position, "piece": np.array(trace.pieces, object)[position]}
        words = trace.meta.get("words", {})
        word = [words.get(str(token), f"<{token}>") for token in best.ravel()]
        columns |= {"phase": trace.phase[position], "best": number, "token": best.ravel(), "word": word}
        columns["logprob"] = logprob.ravel()
        frames.append(pd.DataFrame(columns | {"rank": np.broadcast_to(rank[..., None], best.shape).ravel()}))
    return pd.concat(frames, ignore_index=True)


def attribution(
    grok: "Grok", trace: Trace, *, position: int = -2, target: int | str | None = None, against: int | str | None = None
) -> pd.DataFrame:
    """Direct logit attribution: what the embedding, each head and each chosen expert add to one logit.

    The norms are held fixed at what they were, which makes the network after a part linear: a head's output (or a gate
    times an expert's) goes through its post-norm's scale, the final norm and the row of the token. `position`: where;
    `target`: a token (a text of one, or an id), by default what followed; `against`: one whose logit is subtracted.

    Columns: part ("embed", "head", "expert", "edit", "error"), layer, head, expert, rank (of the expert), -1 where
    none, logit. They sum to the logit the model computed. Of a run under edits "edit" is what they did to the stream in
    a layer beside its heads and experts: all that these gave, taken back, where the layer was ablated (and rounding).
    "error" is what the other rows leave unexplained: rounding, and edits behind the last layer. Needs the taps of
    ATTRIBUTION at all layers. Raises KeyError if one is missing, ValueError if a selector cut one, and at the last
    position without a target.
    """
    _refuse_parts(trace)
    config = grok.config
    at = place(trace, position)
    if target is None:
        if at + 1 == len(trace):
            raise ValueError("no token follows the last position; give target=")
        target = int(trace.tokens[at + 1])
    target, against = (None if one is None else token_id(grok, one) for one in (target, against))
    row = grok.weight("embedding/w")[target]
    actual = trace["logits"][at, target]
    if against is not None:
        row = row - grok.weight("embedding/w")[against]
        actual = actual - trace["logits"][at, against]
    last = trace["resid_post", config.num_layers - 1][at]
    direction = row * grok.weight("embedding/final_norm/scale") * config.output_multiplier_scale / _rms(last)
    before = trace["embed"][at]
    rows = [("embed", -1, -1, -1, -1, before @ direction)]
    for layer in range(config.num_layers):
        through = direction * grok.weight("post_attention_norm/scale", layer) / _rms(trace["attn_out", layer][at])
        out = grok.weight("attention/out", layer).reshape(config.num_q_heads, config.key_size, -1)
        logits = np.einsum("hc,hcd,d->h", trace["attn_z", layer][at], out, through)
        of_layer = [("head", layer, head, -1, -1, value) for head, value in enumerate(logits)]
        through = direction * grok.weight("post_moe_norm/scale", layer) / _rms(trace["moe_out", layer][at])
        logits = trace["expert_gate", layer][at] * (trace["expert_out", layer][at] @ through)
        experts = trace["expert_index", layer][at]
        of_layer += [("expert", layer, -1, int(e), rank, logits[rank]) for rank, e in enumerate(experts) if e >= 0]
        if trace.meta["edits"]:
            after = trace["resid_post", layer][at]
            done = (after - before) @ direction
            of_layer.append(("edit", layer, -1, -1, -1, done - sum(value for *_, value in of_layer)))
            before = after
        rows += of_layer
    rows.append(("error", -1, -1, -1, -1, actual - sum(value for *_, value in rows)))
    return pd.DataFrame(rows, columns=["part", "layer", "head", "expert", "rank", "logit"])


def _refuse_parts(trace: Trace) -> None:
    if not isinstance(trace, Trace):
        raise TypeError(f"attribution takes one Trace; got {type(trace).__name__}")
    if missing := [name for name in ATTRIBUTION if name not in trace.taps]:
        raise KeyError(f"attribution needs {', '.join(missing)}; capture grokscope.analysis.ATTRIBUTION")
    for name in ATTRIBUTION:
        if cut := trace.numbers.get(name, {}).keys() - {"L"}:
            parts = " and ".join(f"{COORDINATES[d]}s" for d in sorted(cut))
            raise ValueError(f"attribution needs {name!r} whole; of its {parts} some were selected")


def place(trace: Trace, position: int) -> int:
    """A position counted from the end if negative. Raises IndexError beyond the Trace."""
    if not -len(trace) <= position < len(trace):
        raise IndexError(f"position={position}: the Trace has {len(trace)} tokens")
    return position % len(trace)


def token_id(grok: "Grok", token: int | str) -> int:
    """The id of a token given as such, or as a text of exactly one token. Raises ValueError for others."""
    if not isinstance(token, str):
        if not isinstance(token, int | np.integer) or not 0 <= token < grok.config.vocab_size:
            raise ValueError(
                f"token {token!r}: expected a text of one token, or an id from 0 to {grok.config.vocab_size - 1}"
            )
        return int(token)
    if grok.tokenizer is None:
        raise ValueError(f"{token!r} is a text, and this checkpoint has no tokenizer; give a token id")
    ids = grok.tokenizer.encode(token)
    if len(ids) != 1:
        pieces = [grok.tokenizer.pieces[i] for i in ids]
        raise ValueError(f"{token!r} is {len(ids)} tokens, {pieces}; give a text of one token, or its id")
    return ids[0]


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-5)
