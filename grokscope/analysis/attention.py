"""What attention heads do: the standard scores of every head, where they show, and who reads whom.

Traces need "attn_pattern", or "q" and "k" (`capture("attn_pattern", later=True)`), from which rows are computed layer
by layer. Every score stands beside what uniform attention over the same keys would have.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from grokscope.analysis import resampling
from grokscope.analysis.compare import Comparison
from grokscope.analysis.resampling import ratio
from grokscope.analysis.sequences import Labels, Source, having, number_of_traces, phases, sequences
from grokscope.run.trace import Trace

ATTENTION = ("attn_pattern", "q")
"""Taps that attention rows are read from."""

MEASURES = {
    "entropy": "bits of an attention row",
    "distance": "mean number of tokens it looks back",
    "first": "mass on the first token (a sink), from the second token on",
    "previous": "mass on the token before",
    "duplicate": "mass on earlier occurrences of the same token, where there are any",
    "induction": "mass on the tokens that followed earlier occurrences of the same token, where there are any",
}


def heads(source: Source, *, phase: str = "all", seed: int = 0) -> pd.DataFrame:
    """Scores of every head: entropy, distance, first, previous, duplicate and induction (see MEASURES).

    Columns: phase, layer, head, measure, score, low, high (95 %, prompts resampled), uniform (the score of uniform
    attention), positions (rows it is defined at), prompts. `frame.sort_values("score")` of one measure ranks heads;
    `shown` gives the positions behind one.
    """
    sums: dict[tuple, list] = {}
    kept: dict[int, list[int]] = {}
    for _, trace in having(source, *ATTENTION):
        wanted = targets(trace.tokens)
        for layer, numbers, positions, pattern in patterns(trace):
            _refuse_others(kept, layer, numbers)
            found = _scores(pattern, positions, wanted)
            for name, of in phases(phase):
                rows = of(trace.phase)[positions]
                if rows.any():
                    of_prompt = [_summed(rows & defined, score, uniform) for score, uniform, defined in found]
                    sums.setdefault((name, layer, tuple(numbers)), []).append(of_prompt)
    if not sums:
        raise ValueError(f"no position with attention belongs to phase {phase!r}")
    frames = []
    for (name, layer, numbers), of_prompts in sums.items():
        own = np.array(of_prompts, np.float64)  # [P, measure, (score, uniform, positions), H]
        total = own.sum(0)
        units = np.count_nonzero(own[:, :, 2], axis=0)
        low, high = resampling.interval(lambda s: ratio(s[:, :, 0], s[:, :, 2]), own, units=units, seed=seed)
        for m, measure in enumerate(MEASURES):
            columns = {
                "phase": name, "layer": layer, "head": numbers, "measure": measure,
                "score": ratio(total[m, 0], total[m, 2]), "low": low[m], "high": high[m],
                "uniform": ratio(total[m, 1], total[m, 2]), "positions": total[m, 2].astype(int),
                "prompts": units[m],
            }  # fmt: skip
            frames.append(pd.DataFrame(columns))
    order = {name: i for i, name in enumerate(("all", "prefill", "decode"))}
    frame = pd.concat(frames, ignore_index=True)
    return frame.sort_values("phase", key=lambda p: p.map(order), kind="stable", ignore_index=True)


def shown(source: Source, layer: int, head: int, measure: str, *, top: int = 10) -> pd.DataFrame:
    """The positions where a head shows a measure most: the rows with most mass on what "first", "previous",
    "duplicate" or "induction" is about.

    Columns: prompt (its number in its call), position, piece, key_position, key_piece (the strongest key it is about),
    score (mass on all).
    """
    if measure not in ("first", "previous", "duplicate", "induction"):
        raise ValueError(f'measure={measure!r}: expected "first", "previous", "duplicate" or "induction"')
    rows = []
    for _, trace in having(source, *ATTENTION):
        target = targets(trace.tokens)[measure]
        for number, numbers, positions, pattern in patterns(trace, layer):
            if head not in numbers or number != layer:
                raise KeyError(f"head {head} of layer {layer} was not kept; kept are {[*map(int, numbers)]}")
            masked = pattern[list(numbers).index(head)] * target[positions]
            score = masked.sum(-1)
            for row in np.argsort(-score, kind="stable")[:top]:
                if not target[positions[row]].any():
                    continue
                at, key = positions[row], masked[row].argmax()
                rows.append((trace.meta["prompt"], at, trace.pieces[at], key, trace.pieces[key], score[row]))
    columns = ["prompt", "position", "piece", "key_position", "key_piece", "score"]
    frame = pd.DataFrame(rows, columns=columns).sort_values("score", ascending=False, ignore_index=True)
    return pd.DataFrame(frame[:top])


def by_class(source: Source, by: Any = "class", *, phase: str = "all", seed: int = 0) -> pd.DataFrame:
    """Attention of each head from tokens of a class to tokens of a class; labels as in `specialisation`.

    Columns: phase, layer, head, query, key (classes), mass (mean share of a row of the query's class), low, high,
    uniform (of uniform attention), rows (queries), prompts.
    """
    labels = Labels(by, number_of_traces(source))
    names = sorted({v for i, t in enumerate(sequences(source)) for v in np.unique(labels.of(i, t).astype(str))})
    found: dict[tuple, list] = {}
    kept: dict[int, list[int]] = {}
    for index, trace in having(source, *ATTENTION):
        own = (labels.of(index, trace).astype(str)[:, None] == np.array(names)).astype(np.float32)  # [T, Y]
        seen = np.cumsum(own, 0) / np.arange(1, len(trace) + 1)[:, None]  # uniform attention over the keys so far
        for layer, numbers, positions, pattern in patterns(trace):
            _refuse_others(kept, layer, numbers)
            mass = pattern @ own  # [H, T, Y]
            for name, of in phases(phase):
                rows = of(trace.phase)[positions]
                if not rows.any():
                    continue
                query = own[positions][rows]  # [T', Y]
                read = np.einsum("tq,htk->hqk", query, mass[:, rows])
                uniform = np.broadcast_to(query.T @ seen[positions][rows], read.shape)
                number = np.broadcast_to(query.sum(0)[:, None], read.shape)
                found.setdefault((name, layer, tuple(numbers)), []).append((read, uniform, number))
    if not found:
        raise ValueError(f"no position with attention belongs to phase {phase!r}")
    frames = []
    for (name, layer, numbers), of_prompts in found.items():
        own = np.array(of_prompts, np.float64)  # [P, (mass, uniform, rows), H, Y, Y]
        read, uniform, number = own.sum(0)
        units = np.count_nonzero(own[:, 2], axis=0)
        low, high = resampling.interval(lambda s: ratio(s[:, 0], s[:, 2]), own, units=units, seed=seed)
        head, query, key = (axis.ravel() for axis in np.meshgrid(numbers, names, names, indexing="ij"))
        columns = {
            "phase": name, "layer": layer, "head": head, "query": query, "key": key,
            "mass": ratio(read, number).ravel(), "low": low.ravel(), "high": high.ravel(),
            "uniform": ratio(uniform, number).ravel(), "rows": number.ravel().astype(int), "prompts": units.ravel(),
        }  # fmt: skip
        frames.append(pd.DataFrame(columns))
    frame = pd.concat(frames, ignore_index=True)
    return frame.query("rows > 0").reset_index(drop=True)


def read_at_swaps(comparison: Comparison, *, layers: Sequence[int] | None = None) -> pd.DataFrame:
    """What the heads of a layer read, in both runs, at the tokens whose experts differ there.

    Columns: layer, position (in a), piece, routing (distance), head, key_position, key_piece (what the head reads most
    in a), weight_a, weight_b (its weight in b, NaN where b lacks that token), moved (half the sum of the absolute
    differences of the two rows; a token that the other run lacks has weight 0 there). Of heads that both runs kept.
    Needs routing and attention of both; strongest moves first.
    """
    a, b = comparison.a, comparison.b
    if not comparison.layers:
        raise ValueError("there is no layer whose routing both runs have, whole: capture router_logits")
    layers = comparison.layers if layers is None else layers
    if missing := set(layers) - set(comparison.layers):
        raise ValueError(f"layer {min(missing)}: both runs have routing of layers {comparison.layers}")
    there = dict(comparison.pairs.tolist())
    rows = []
    for number in layers:
        swapped = comparison.pairs[comparison.swapped[comparison.layers.index(number)]]
        if not len(swapped):
            continue
        ((_, heads_of, at_a, pattern_a),) = patterns(a, number)
        ((_, heads_b, at_b, pattern_b),) = patterns(b, number)
        heads, own_heads, other_heads = np.intersect1d(heads_of, heads_b, return_indices=True)
        if not len(heads):
            raise ValueError(
                f"layer {number}: a has attention of heads {[*heads_of]}, b of {[*heads_b]}; none in common"
            )
        distance = dict(zip(comparison.pairs[:, 0], comparison.routing[comparison.layers.index(number)], strict=True))
        keys_a = np.array(sorted(there))
        keys_b = np.array([there[key] for key in keys_a])
        for i, j in swapped:
            if i not in at_a or j not in at_b:
                continue
            own, other = (
                pattern_a[own_heads, np.searchsorted(at_a, i)],
                pattern_b[other_heads, np.searchsorted(at_b, j)],
            )
            apart = [rows.sum(-1) - rows[:, keys].sum(-1) for rows, keys in ((own, keys_a), (other, keys_b))]
            moved = (np.abs(own[:, keys_a] - other[:, keys_b]).sum(-1) + sum(apart)) / 2
            for h, head in enumerate(heads):
                key = int(own[h].argmax())
                weight_b = other[h, there[key]] if key in there else np.nan
                rows.append(
                    (number, i, a.pieces[i], distance[i], head, key, a.pieces[key], own[h, key], weight_b, moved[h])
                )
    names = [
        "layer", "position", "piece", "routing", "head", "key_position", "key_piece", "weight_a", "weight_b", "moved",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=names).sort_values("moved", ascending=False, ignore_index=True)


def patterns(trace: Trace, layer: int | None = None) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(layer, head numbers, positions, pattern [H, T, S]) layer by layer."""
    if not isinstance(trace, Trace):
        raise TypeError(f"expected a Trace; got {type(trace).__name__}")
    tap = "attn_pattern" if "attn_pattern" in trace.taps or "q" not in trace.taps else "q"
    if tap not in trace.taps or (tap == "q" and "k" not in trace.taps):
        raise KeyError('attention was not captured; use capture="attn_pattern", or grokscope.capture(..., later=True)')
    held = trace.coords(tap)
    for number in held["layer"] if layer is None else [layer]:
        pattern = trace["attn_pattern", number] if tap == "attn_pattern" else trace.attention(layers=int(number))[0]
        yield int(number), held["head"], held["position"], pattern


def _refuse_others(kept: dict[int, list[int]], layer: int, numbers: np.ndarray) -> None:
    """Raises ValueError unless the heads of a layer are those of the Traces before."""
    before = kept.setdefault(layer, numbers.tolist())
    if before != numbers.tolist():
        raise ValueError(f"a Trace has heads {numbers.tolist()} of layer {layer}, those before it {before}")


def targets(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """bool [T, S] of each mass measure, in the order of MEASURES: the keys that it is about."""
    n = len(tokens)
    earlier = np.tri(n, k=-1, dtype=bool)
    same = (tokens[:, None] == tokens[None, :]) & earlier
    after = np.zeros((n, n), bool)
    after[:, 1:] = same[:, :-1]
    first = earlier & (np.arange(n) == 0)
    return {"first": first, "previous": np.eye(n, k=-1, dtype=bool), "duplicate": same, "induction": after}


def _scores(pattern: np.ndarray, positions: np.ndarray, targets: dict[str, np.ndarray]) -> list[tuple]:
    """(score [H, T], score of uniform attention [T], where it is defined [T]) of each of MEASURES."""
    keys = positions + 1
    always = np.ones(len(positions), bool)
    bits = -(pattern * np.log2(np.maximum(pattern, 1e-30))).sum(-1)
    back = positions[:, None] - np.arange(pattern.shape[-1])
    found = [(bits, np.log2(keys), always), (np.einsum("hts,ts->ht", pattern, back), positions / 2, always)]
    for target in targets.values():
        here = target[positions].astype(np.float32)
        number = here.sum(1)
        found.append((np.einsum("hts,ts->ht", pattern, here), number / keys, number > 0))
    return found


def _summed(rows: np.ndarray, score: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[H] each: sum of the score, of the uniform one, and number of rows."""
    total = score[:, rows].sum(1)
    return total, np.full(total.shape, uniform[rows].sum()), np.full(total.shape, rows.sum())
