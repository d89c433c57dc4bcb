"""Many edits in one batch: what depends on which part of the model.

A variant is a list of edits. Variants x prompts run as the prompts of one call, each with its own edits, so that
nothing is compiled after the first. Effects are in nats. All but `path_patching` take `directory=`: a folder of dumps
in which a sweep that was interrupted or killed goes on when it is called again. Edits of a `with grok.edits(...)`
around them apply to every run. On Ctrl-C tables raise KeyboardInterrupt.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grokscope.analysis import resampling
from grokscope.analysis.compare import kl_nats, log_softmax
from grokscope.analysis.lens import place, token_id
from grokscope.analysis.sequences import Labels
from grokscope.run import edits
from grokscope.run.captures import capture
from grokscope.run.edits import Edit
from grokscope.run.engine import Grok, Prompt
from grokscope.run.selectors import chosen, parsed
from grokscope.run.trace import Trace

VARIANTS = 64  # in one call: staging looks at every edit for every prompt
PARTS = ("layers", "heads", "experts")

Progress = Callable[[int, int], object]


def sweep(
    grok: Grok, prompts: Sequence[Prompt], variants: Sequence[Sequence[Edit]], *, keep: Any = (),
    directory: Path | str | None = None, progress: Progress = lambda done, total: None,
) -> list[list[Trace]]:  # fmt: skip
    """Forward passes of every prompt under every variant: a list of Traces for each variant, in order.

    `keep`: captures. `progress(done, total)` counts variants. On Ctrl-C those that are finished come back, unless there
    is a `directory`: then KeyboardInterrupt is raised, and the same call goes on.
    """
    _refuse_one(prompts)
    if any(edit.where.prompts is not None for edit in grok.current_edits):
        raise ValueError("an edit around a sweep, which runs prompts of its own, names prompts; leave prompts= away")
    done: list[list[Trace]] = []
    for first in range(0, len(variants), VARIANTS):
        chunk = variants[first : first + VARIANTS]
        size = len(prompts)
        changes = [_only(e, range(i * size, (i + 1) * size)) for i, variant in enumerate(chunk) for e in variant]
        with grok.edits(*changes):
            if directory is None:
                found = grok.trace([*prompts] * len(chunk), capture=keep)
                assert isinstance(found, list)
                traces = [trace for i, trace in enumerate(found) if trace.meta["prompt"] == i]  # up to the first gap
            else:
                traces = [
                    *grok.dump([*prompts] * len(chunk), Path(directory) / f"{first:06}", capture=keep, resume=True)
                ]
        whole = len(traces) // size
        done += [traces[i * size : (i + 1) * size] for i in range(whole)]
        progress(len(done), len(variants))
        if whole < len(chunk):
            break
    return done


def _whole_sweep(grok: Grok, prompts: Sequence[Prompt], variants: Sequence[Sequence[Edit]], **options):
    """`sweep`; a part of it is no table. Raises KeyboardInterrupt where it was cut short."""
    runs = sweep(grok, prompts, variants, **options)
    if len(runs) < len(variants):
        raise KeyboardInterrupt
    return runs


def _refuse_one(prompts: Sequence[Prompt]) -> None:
    listed = isinstance(prompts, Sequence | np.ndarray) and not isinstance(prompts, str)
    if not listed or not len(prompts) or isinstance(prompts[0], int | np.integer):
        raise TypeError(f"expected a list of prompts; got {prompts!r:.60}")


def _only(change: Edit, prompts: range) -> Edit:
    """The edit for these prompts of a call alone."""
    if change.where.prompts is not None:
        raise ValueError("edits of a sweep are for all its prompts; leave prompts= away")
    where = dataclasses.replace(change.where, prompts=tuple(prompts))
    return dataclasses.replace(change, where=where, args=change.args | {"prompts": where.prompts})


def ablations(
    grok: Grok, prompts: Sequence[Prompt], over: str, *, method: str = "zero", by: Any = None,
    directory: Path | str | None = None, progress: Progress = lambda done, total: None, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """What the loss gains when each layer, head or expert is taken out.

    `over`: "layers", "heads" or "experts". `method`: "zero", or "mean": what it gives on average over the prompts (an
    expert: over the tokens that chose it). `by`: labels of the predicted tokens, as in `analysis.specialisation`.

    Columns: layer, head or expert, label (with `by`), effect (nats a token; above 0, it was of use), low, high (95 %,
    prompts resampled), loss, baseline, tokens, prompts.
    """
    if over not in PARTS:
        raise ValueError(f'over={over!r}: expected "layers", "heads" or "experts"')
    if method not in ("zero", "mean"):
        raise ValueError(f'method={method!r}: expected "zero" or "mean"')
    count = {"layers": 1, "heads": grok.config.num_q_heads, "experts": grok.config.num_experts}[over]
    parts = [(layer, number) for layer in range(grok.config.num_layers) for number in range(count)]
    means = _means(grok, prompts, over) if method == "mean" else None
    variants = [[], *(_without(over, layer, number, means) for layer, number in parts)]
    plain, *others = _whole_sweep(grok, prompts, variants, directory=directory, progress=progress)
    labels = Labels(by, len(plain)) if by is not None else None
    of = [
        np.full(len(t), "all", object) if labels is None else labels.of(i, t).astype(str) for i, t in enumerate(plain)
    ]
    names = sorted({name for own in of for name in own[1:]})
    if not names:
        raise ValueError("no prompt has a second token: there is nothing to predict")
    index = [[own[1:] == name for name in names] for own in of]

    def sums(traces: list[Trace]) -> np.ndarray:
        """[P, Y]: nats of each prompt and label."""
        return np.array([[-t.logprobs[1:][rows].sum() for rows in own] for t, own in zip(traces, index, strict=True)])

    number, base, frames = np.array([[rows.sum() for rows in own] for own in index]), sums(plain), []
    units = np.count_nonzero(number, axis=0)
    for (layer, part), traces in zip(parts, others, strict=True):
        changed = sums(traces)
        low, high = resampling.interval(resampling.ratio, changed - base, number, units=units, seed=seed)
        columns = {"layer": layer} | ({} if over == "layers" else {over[:-1]: part})
        columns |= {} if by is None else {"label": names}
        columns |= {
            "effect": resampling.ratio((changed - base).sum(0), number.sum(0)), "low": low, "high": high,
            "loss": resampling.ratio(changed.sum(0), number.sum(0)),
            "baseline": resampling.ratio(base.sum(0), number.sum(0)),
            "tokens": number.sum(0), "prompts": units,
        }  # fmt: skip
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _without(over: str, layer: int, number: int, means: dict[str, np.ndarray] | None) -> list[Edit]:
    if over == "layers":
        if means is None:
            return [edits.ablate(layers=layer)]
        return [edits.set(tap, means[tap][layer], layers=layer) for tap in ("attn_delta", "moe_delta")]
    if means is None:
        return [edits.ablate(layers=layer, **{over: number})]
    tap = {"heads": "attn_z", "experts": "expert_out"}[over]
    return [edits.set(tap, means[tap][layer, number], layers=layer, **{over: number})]


def _means(grok: Grok, prompts: Sequence[Prompt], over: str) -> dict[str, np.ndarray]:
    """The mean over the tokens of all prompts of what is set: [L, ...] by tap."""
    taps = {"layers": ("attn_delta", "moe_delta"), "heads": ("attn_z",), "experts": ("expert_out", "expert_index")}[
        over
    ]
    (traces,) = sweep(grok, prompts, [[]], keep=taps)
    if over != "experts":
        return {tap: np.concatenate([t[tap] for t in traces], axis=1).mean(1) for tap in taps}
    out = np.concatenate([t["expert_out"] for t in traces], axis=1)  # [L, T, K, D]
    index = np.concatenate([t["expert_index"] for t in traces], axis=1)
    chose = (index[..., None] == np.arange(grok.config.num_experts)).astype(np.float32)  # [L, T, K, E]
    total = np.einsum("ltke,ltkd->led", chose, out)
    return {"expert_out": total / np.maximum(chose.sum((1, 2)), 1)[..., None]}


def patching(
    grok: Grok, clean: Prompt, corrupted: Prompt, answer: int | str, against: int | str, *, over: str = "layers",
    tap: str | None = None, directory: Path | str | None = None, progress: Progress = lambda done, total: None,
) -> pd.DataFrame:  # fmt: skip
    """Activation patching: the corrupted prompt with one part of the clean run put in, for every part.

    The measure is logit(answer) - logit(against) after the last token; `recovered` is 0 where it is the corrupted run's
    and 1 where it is the clean run's. `over`: "layers" (the stream, or another `tap`, by layer and position), "heads"
    (attn_z at all positions), "experts" (which experts run, by layer and position: the router's logits are those of
    the clean run). All take prompts of the same length.

    Columns: layer, and position with piece (of the corrupted prompt), or head; difference, recovered, clean, corrupted.
    """
    ((good, bad),) = sweep(grok, [clean, corrupted], [[]], keep=["logits", _tap(over, tap)])
    if len(good) != len(bad):
        raise ValueError(
            f"the clean prompt has {len(good)} tokens and the corrupted one {len(bad)}; patching puts values where "
            "they were, and needs the same number"
        )
    recovered = _recovery(good, bad, token_id(grok, answer), token_id(grok, against))
    layers = range(grok.config.num_layers)
    if over == "heads":
        columns = ("layer", "head")
        places = [(layer, head) for layer in layers for head in range(grok.config.num_q_heads)]
        variants = [[edits.patch(good, "attn_z", layers=layer, heads=head)] for layer, head in places]
    else:
        columns = ("layer", "position")
        places = [(layer, position) for layer in layers for position in range(len(bad))]
        variants = [[edits.patch(good, _tap(over, tap), layers=layer, positions=[p])] for layer, p in places]
    runs = _whole_sweep(
        grok, [bad.tokens], variants, keep=capture("logits", positions="last"), directory=directory, progress=progress
    )
    frame = pd.DataFrame(places, columns=list(columns))
    if "position" in frame:
        frame["piece"] = [bad.pieces[p] for p in frame.position]
    return recovered(frame, [trace for (trace,) in runs])


def path_patching(
    grok: Grok, clean: Prompt, corrupted: Prompt, sender: tuple[int, int], answer: int | str, against: int | str, *,
    through: str = "q", progress: Progress = lambda done, total: None,
) -> pd.DataFrame:  # fmt: skip
    """Which later heads a head (layer, head) speaks to: its clean output reaches only the `through` ("q", "k" or "v")
    of one head; all else is the corrupted run (Wang et al. 2022, arXiv 2211.00593).

    Between sender and receivers attention and experts give what they gave in the corrupted run, so that only the
    direct path is open. The last row, layer = number of layers and head = -1, is the direct path to the
    logits. Columns: layer, head (of "k" and "v": the first of those that share it), difference, recovered, clean,
    corrupted, as in `patching`.
    """
    if through not in ("q", "k", "v"):
        raise ValueError(f'through={through!r}: expected "q", "k" or "v"')
    sizes = {"layer": grok.config.num_layers, "head": grok.config.num_q_heads}
    if not isinstance(sender, Sequence) or len(sender) != 2:
        raise TypeError(f"sender={sender!r}: expected (layer, head)")
    (layer,), (head,) = (chosen(n, (own,), sizes[n], "this model") for n, own in zip(sizes, sender, strict=True))
    deltas = ["attn_delta", "moe_delta"]
    ((good, bad),) = sweep(grok, [clean, corrupted], [[]], keep=["logits", "attn_z", *deltas])
    if len(good) != len(bad):
        raise ValueError(f"prompts of {len(good)} and {len(bad)} tokens; path patching needs the same number")
    recovered = _recovery(good, bad, token_id(grok, answer), token_id(grok, against))
    later = list(range(layer + 1, grok.config.num_layers))
    frozen = [edits.patch(bad, "attn_delta", layers=later)] if later else []
    frozen.append(edits.patch(bad, "moe_delta", layers=[layer, *later]))
    sent = edits.patch(good, "attn_z", layers=layer, heads=head)
    keep = ["logits", *([capture(through, layers=later)] if later else [])]
    ((direct,),) = sweep(grok, [bad.tokens], [[sent, *frozen]], keep=keep)
    share = 1 if through == "q" else grok.config.num_q_heads // grok.config.num_kv_heads
    places = [(number, h) for number in later for h in range(0, grok.config.num_q_heads, share)]
    variants = [[edits.patch(direct, through, layers=n, heads=h // share)] for n, h in places]
    runs = _whole_sweep(grok, [bad.tokens], variants, keep=capture("logits", positions="last"), progress=progress)
    frame = pd.DataFrame([*places, (grok.config.num_layers, -1)], columns=["layer", "head"])
    return recovered(frame, [*(trace for (trace,) in runs), direct])


def _recovery(good: Trace, bad: Trace, wanted: int, other: int) -> Callable[[pd.DataFrame, list[Trace]], pd.DataFrame]:
    """What gives a table with a row for each run its columns difference, recovered, clean and corrupted.

    Raises ValueError if the clean and the corrupted run do not differ.
    """

    def difference(trace: Trace) -> float:
        return float(trace["logits"][-1, wanted] - trace["logits"][-1, other])

    end, start = difference(good), difference(bad)
    if abs(end - start) < 1e-6:
        raise ValueError(f"clean and corrupted prompts give the same logit difference, {start:.4g}: nothing to recover")

    def recovered(frame: pd.DataFrame, runs: list[Trace]) -> pd.DataFrame:
        values = np.array([difference(trace) for trace in runs])
        return frame.assign(difference=values, recovered=(values - start) / (end - start), clean=end, corrupted=start)

    return recovered


def counterfactuals(
    grok: Grok, prompt: Prompt, *, position: int = -1, layers: Sequence[int] | None = None,
    directory: Path | str | None = None, progress: Progress = lambda done, total: None,
) -> pd.DataFrame:  # fmt: skip
    """What the model would have said had the router sent one token to one expert alone, for each layer and expert.

    `position`: the token, from the end if negative; the next-token distribution after it is looked at. Columns: layer,
    expert, chosen (whether the router takes it by itself), kl (nats, from the plain distribution), token, piece, prob
    (the likeliest token then), plain_token, plain_piece, plain_prob (of the plain run's likeliest token: in the plain
    run, and `still`: under the edit).
    """
    ((plain,),) = sweep(grok, [prompt], [[]], keep="logits")
    at = place(plain, position)
    layers = chosen("layers", parsed("layers", layers), grok.config.num_layers, "this model")
    places = [(layer, expert) for layer in layers for expert in range(grok.config.num_experts)]
    variants = [[edits.route.force(experts=[e], layers=n, positions=[at])] for n, e in places]
    runs = _whole_sweep(
        grok, [plain.tokens], variants, keep=capture("logits", positions=[at]), directory=directory, progress=progress
    )
    before = log_softmax(plain["logits"][at].astype(np.float64))
    usual = int(before.argmax())
    pieces = None if grok.tokenizer is None else grok.tokenizer.pieces

    def piece(token: int) -> str:
        return f"<{token}>" if pieces is None else pieces[token]

    rows = []
    for (layer, expert), (trace,) in zip(places, runs, strict=True):
        after = log_softmax(trace["logits"][-1].astype(np.float64))
        best = int(after.argmax())
        rows.append(
            {"layer": layer, "expert": expert, "chosen": expert in plain["expert_index", layer][at]}
            | {"kl": kl_nats(before, after), "token": best, "piece": piece(best)}
            | {"prob": np.exp(after[best]), "plain_token": usual, "plain_piece": piece(usual)}
            | {"plain_prob": np.exp(before[usual]), "still": np.exp(after[usual])}
        )
    return pd.DataFrame(rows)


def _tap(over: str, tap: str | None) -> str:
    taps = {"layers": "resid_post", "heads": "attn_z", "experts": "router_logits"}
    if over not in taps:
        raise ValueError(f'over={over!r}: expected "layers", "heads" or "experts"')
    if tap is not None and over != "layers":
        raise ValueError(f'tap={tap!r} is for over="layers"')
    return tap or taps[over]
