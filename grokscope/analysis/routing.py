"""What the router does: load, sharpness, which experts go together, and what they are for.

A token chooses a *set* of experts at each layer; everything here is counted as sets, so that the experts of one token,
which are never the same, are not mistaken for independent draws. `share` is of the choices: an expert that is chosen
as often as all others has 1/E. Rows are `layer` x `expert` x `phase`, with the numbers of tokens and prompts behind.
`low` and `high` are 95 % by resampling prompts; of what never occurred, up to what chance leaves out once in 40 times.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import hypergeom, norm, random_table

from grokscope.analysis import resampling
from grokscope.analysis.resampling import ratio
from grokscope.analysis.sequences import Labels, Source, having, number_of_traces, phases, sequences
from grokscope.run.trace import Trace

RARE = "(rare)"
BUFFER = 1 << 22  # numbers that are counted or multiplied at once


def load(source: Source, *, phase: str = "each", seed: int = 0) -> pd.DataFrame:
    """Share of the choices that each expert gets, against 1/E.

    Columns: phase, layer, expert, share, low, high (95 %, prompts resampled), uniform (1/E), count (choices of it),
    tokens, prompts.
    """
    chosen = _Chosen(source)
    frames = []
    for name, tokens, of_expert in chosen.by_prompt(phase, chosen.singles):
        total = of_expert.sum(0)
        low, high = resampling.interval(_shares, of_expert, seed=seed)
        high = resampling.never_seen(high, total, total.sum(-1, keepdims=True))
        frames.append(
            _frame(
                ("layer", "expert"),
                (chosen.layers, range(chosen.num_experts)),
                phase=name,
                share=_shares(total),
                low=low,
                high=high,
                uniform=1 / chosen.num_experts,
                count=total.astype(int),
                tokens=tokens.sum(),
                prompts=len(tokens),
            )
        )
    return pd.concat(frames, ignore_index=True)


def entropy(source: Source, *, phase: str = "each", seed: int = 0) -> pd.DataFrame:
    """Mean entropy of the router's probabilities at each layer, in bits; log2(E) would be no preference at all.

    Columns: phase, layer, entropy, low, high, most (log2 E), tokens, prompts.
    """
    frame = _means(source, lambda p: -np.sum(p * np.log2(np.maximum(p, 1e-30)), axis=-1), "entropy", phase, seed)
    most = np.log2(next(sequences(source)).meta["config"]["num_experts"])
    frame.insert(frame.columns.get_loc("high") + 1, "most", most)
    return frame


def margin(source: Source, *, phase: str = "each", seed: int = 0) -> pd.DataFrame:
    """Mean distance in probability at each layer from the first expert to the second.

    Columns: phase, layer, margin, low, high, tokens, prompts.
    """

    def first_to_second(p: np.ndarray) -> np.ndarray:
        if p.shape[-1] < 2:
            raise ValueError("margin needs a model of two experts or more; this one has 1")
        best = np.partition(p, -2, axis=-1)
        return best[..., -1] - best[..., -2]

    return _means(source, first_to_second, "margin", phase, seed)


def kept_mass(source: Source, *, phase: str = "each", seed: int = 0) -> pd.DataFrame:
    """Mean sum of the gates of the chosen experts at each layer. Grok-1 does not renormalise: the rest is lost.

    Columns: phase, layer, kept_mass, low, high, tokens, prompts.
    """
    return _means(source, lambda gates: gates.sum(-1), "kept_mass", phase, seed, tap="expert_gate")


def coactivation(source: Source, *, phase: str = "each", seed: int = 0) -> pd.DataFrame:
    """How often two experts are chosen by the same token, against independence.

    Independence is the draw of different experts that gives each its share and assumes no more (see
    `resampling.matched`); where tokens chose different numbers of experts, as under `route.force`, of those that chose
    as many. Columns: phase, layer, expert, other (all pairs, expert < other), count, expected, lift (count / expected),
    low, high (of lift; NaN where fewer than five prompts chose one of the two), tokens, prompts.
    """
    chosen = _Chosen(source)
    if chosen.num_experts < 2:
        raise ValueError("coactivation needs a model of two experts or more; this one has 1")
    sizes = np.unique(chosen.member.sum(1).astype(int))
    sizes = sizes[sizes > 1]  # numbers of experts that some tokens choose
    first, other = np.triu_indices(chosen.num_experts, 1)

    def pairs(codes: np.ndarray) -> np.ndarray:
        return chosen.together(codes)[:, first, other]

    def by_size(codes: np.ndarray) -> np.ndarray:
        return chosen.by_size(codes, sizes)

    def lifts(together: np.ndarray, sums: np.ndarray) -> np.ndarray:
        return ratio(together, expected(sums))

    def expected(sums: np.ndarray) -> np.ndarray:
        found = np.zeros((*sums.shape[:-2], len(first)))
        for i, k in enumerate(sizes):
            tokens, chose = sums[..., i, :1], sums[..., i, 1:]
            found += resampling.matched(chose / np.maximum(tokens, 1), k)[..., first, other] * tokens
        return found

    frames = []
    for name, tokens, together, sums in chosen.by_prompt(phase, pairs, by_size):
        count, total = together.sum(0), sums.sum(0)
        taken = np.count_nonzero(sums[..., 1:].sum(-2), axis=0)  # [L, E]: by how many prompts
        units = np.minimum(taken[:, first], taken[:, other])
        low, high = resampling.interval(lifts, together, sums, units=units, seed=seed)
        even = expected(total)
        frame = _frame(
            ("layer", "pair"), (chosen.layers, range(len(first))), phase=name, count=count.astype(int), expected=even,
            lift=ratio(count, even), low=low, high=resampling.never_seen(high, count, even), tokens=tokens.sum(),
            prompts=len(tokens),
        )  # fmt: skip
        pair = frame.pop("pair").to_numpy()
        frame.insert(2, "expert", first[pair])
        frame.insert(3, "other", other[pair])
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def transitions(source: Source, *, phase: str = "each", seed: int = 0) -> pd.DataFrame:
    """From the experts of a layer to those of the next kept one, against independence of the two layers.

    Columns: phase, layer, next_layer, expert, next (its expert), count (tokens that chose both), expected, lift, low,
    high (as in `coactivation`), tokens, prompts.
    """
    chosen = _Chosen(source)
    if len(chosen.layers) < 2:
        raise ValueError(f"transitions need routing of two layers; kept is {chosen.layers}")
    e = chosen.num_experts

    def moves(codes: np.ndarray) -> np.ndarray:
        member = chosen.member[codes]  # [L, T, E]
        return member[:-1].swapaxes(1, 2) @ member[1:]

    def lifts(pairs: np.ndarray, singles: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return ratio(pairs, expected(singles, tokens))

    def expected(singles: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        before, after = singles[..., :-1, :, None], singles[..., 1:, None, :]
        return before * after / np.maximum(tokens, 1)[..., None, None, None]

    frames = []
    for name, tokens, pairs, singles in chosen.by_prompt(phase, moves, chosen.singles):
        total, single, n = pairs.sum(0), singles.sum(0), tokens.sum(0)
        taken = np.count_nonzero(singles, axis=0)  # [L, E]: by how many prompts
        units = np.minimum(taken[:-1, :, None], taken[1:, None])
        low, high = resampling.interval(lifts, pairs, singles, tokens, units=units, seed=seed)
        high = resampling.never_seen(high, total, expected(single, n))
        frame = _frame(
            ("layer", "expert", "next"), (chosen.layers[:-1], range(e), range(e)), phase=name,
            count=total.astype(int), expected=expected(single, n), lift=lifts(total, single, n), low=low, high=high,
            tokens=n, prompts=len(tokens),
        )  # fmt: skip
        at = frame.pop("layer")
        frame.insert(1, "layer", at)
        frame.insert(2, "next_layer", at.map(dict(zip(chosen.layers, chosen.layers[1:], strict=False))))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def specialisation(
    source: Source, by: Any, *, phase: str = "all", min_count: int | None = None, draws: int = 199, seed: int = 0
) -> pd.DataFrame:
    """Does the choice of experts depend on a label of the token or of its prompt, at which layer, beyond chance?

    `by`: "class" (kind of token), "token", "position", an array over the vocabulary, or one label (or an array with
    one a token) for each Trace.
    Labels of fewer than `min_count` tokens (25, or one in 5,000 where that is more) are counted as "(rare)" together.

    Columns: phase, layer, information (between label and expert, bits), null (its mean if labels were shuffled),
    null_high (its 95th percentile), excess (information - null), share (excess / entropy of the experts), p, p_adjusted
    (for all layers of the phase), labels, tokens, prompts. What is shuffled is what has a label: prompts where labels
    are of prompts, else tokens, by drawing tables with the same margins. Tokens of a text are alike, so that labels of
    tokens which change slowly (a chapter, a speaker) look more special than they are: give those by prompt.
    """
    labels = Labels(by, number_of_traces(source))
    chosen = _Chosen(source, labels, min_count, phase)
    _refuse_no_draws(draws)
    member, rng, frames = chosen.member, np.random.default_rng(seed), []
    for name, tokens, tables, of_prompt, counts in chosen.by_label(labels, phase):
        found = _information(tables @ member)
        null = np.empty((draws, len(chosen.layers)))
        if labels.by_prompt:
            for draw in null:
                draw[:] = _information(_summed(counts, rng.permutation(of_prompt), tables.shape[1]) @ member)
        else:
            for layer, table in enumerate(tables):
                null[:, layer] = _shuffled(table, member, draws, rng, found[layer])
        p, adjusted = resampling.p_values(found, null)
        excess = found - null.mean(0)
        most = _entropy((tables @ member).sum(1))
        frames.append(
            _frame(
                ("layer",),
                (chosen.layers,),
                phase=name,
                information=found,
                null=null.mean(0),
                null_high=np.quantile(null, 0.95, axis=0),
                excess=excess,
                share=ratio(excess, most),
                p=p,
                p_adjusted=adjusted,
                labels=np.count_nonzero(tables[0].any(-1)),
                tokens=tokens.sum(),
                prompts=len(tokens),
            )
        )
    return pd.concat(frames, ignore_index=True)


def lift(
    source: Source, by: Any, *, phase: str = "all", min_count: int | None = None, draws: int = 199, seed: int = 0
) -> pd.DataFrame:
    """What each expert is for: how much oftener a label comes to it than chance says.

    `by`, `min_count` and what is shuffled are as in `specialisation`. Columns: phase, layer, expert, label, lift
    (count / expected), count (choices of the expert by tokens of the label), expected, z (distance of count from
    expected in standard deviations of the null), label_count (tokens of the label), tokens, prompts.
    """
    labels = Labels(by, number_of_traces(source))
    chosen = _Chosen(source, labels, min_count, phase)
    _refuse_no_draws(draws)
    rng, frames = np.random.default_rng(seed), []
    for name, tokens, tables, of_prompt, counts in chosen.by_label(labels, phase):
        found, n = tables @ chosen.member, tables.sum((1, 2))[0]  # [L, R, E]
        of_label = tables[0].sum(-1)
        if labels.by_prompt:
            drawn = [_summed(counts, rng.permutation(of_prompt), tables.shape[1]) @ chosen.member for _ in range(draws)]
            expected, spread = np.mean(drawn, 0), np.std(drawn, 0)
        else:  # hypergeometric: of n tokens, `share` of which choose the expert, those of the label are drawn
            share = found.sum(1, keepdims=True) / n
            expected = of_label[:, None] * share
            spread = np.sqrt(expected * (1 - share) * ((n - of_label) / max(n - 1, 1))[:, None])
        frame = _frame(
            ("layer", "label", "expert"), (chosen.layers, range(tables.shape[1]), range(chosen.num_experts)),
            phase=name, lift=ratio(found, expected), count=found.astype(int), expected=expected,
            z=ratio(found - expected, spread), label_count=np.broadcast_to(of_label[:, None], found.shape).astype(int),
            tokens=n, prompts=len(tokens),
        )  # fmt: skip
        frame["label"] = chosen.labels[frame["label"]]
        frames.append(frame[frame.label_count > 0])
    order = ["phase", "layer", "expert", "label"]
    frame = pd.concat(frames, ignore_index=True)
    return frame[[*order, *(c for c in frame if c not in order)]].sort_values(
        order[:3], kind="stable", ignore_index=True
    )


def vocabulary(source: Source, *, top: int = 10, phase: str = "all", min_count: int | None = None) -> pd.DataFrame:
    """For each expert the tokens it takes most beyond chance: the `top` highest lifts with z above 3, of those that
    chance gives as often once in 740 times at most (one token of a rare expert may have such a z).

    Columns as in `lift`, the label being the piece. Empty for experts without such a token.
    """
    frame = lift(source, "token", phase=phase, min_count=min_count)
    frame = frame[(frame.z > 3) & (frame.label != RARE)]
    taken = np.rint(frame.expected * frame.tokens / frame.label_count)  # by the expert, of all tokens
    by_chance = hypergeom.sf(frame["count"] - 1, frame.tokens, taken, frame.label_count)
    frame = frame.loc[by_chance < norm.sf(3)].sort_values("lift", ascending=False, kind="stable")
    best = frame.groupby(["phase", "layer", "expert"], sort=False).head(top)
    return best.sort_values(["phase", "layer", "expert"], kind="stable", ignore_index=True)


class _Chosen:
    """Which sets of experts the tokens of a source choose, counted in passes over it.

    Attributes:
      layers: numbers of the kept layers, the same in all Traces.
      member: float64 [S, E]: the experts of each of the S sets that occur.
      labels: the values of the labels, object [R].
    """

    def __init__(self, source: Source, labels: Labels | None = None, min_count: int | None = None, phase: str = "all"):
        """`phase`: of the tokens that labels are counted of."""
        self._source, self._labels = source, labels
        masks, seen = np.empty(0, np.int64), {}
        self.layers: list[int] = []
        self.num_experts = 0
        for index, trace in having(source, "expert_index"):
            experts, before = trace["expert_index"], self.num_experts
            self.num_experts = trace.meta["config"]["num_experts"]
            if before not in (0, self.num_experts):
                raise ValueError(f"a Trace is of a model of {self.num_experts} experts, those before it of {before}")
            if self.num_experts > 64:
                raise ValueError(
                    f"num_experts={self.num_experts}: sets of up to 64 experts are counted, a bit for each"
                )
            self.layers = _layers(trace, "expert_index", self.layers)
            masks = np.union1d(masks, np.unique(_masks(experts)))
            if labels is not None:
                at = trace.coords("expert_index")["position"]
                at = at[np.any([of(trace.phase)[at] for _, of in phases(phase)], axis=0)]
                for value, count in zip(*np.unique(labels.of(index, trace)[at].astype(str), return_counts=True)):
                    seen[value] = seen.get(value, 0) + count
        self._codes = masks
        self.member = (masks[:, None] >> np.arange(self.num_experts) & 1).astype(np.float64)
        if min_count is None:
            min_count = max(25, sum(seen.values()) // 5000)
        common = sorted(value for value, count in seen.items() if count >= min_count)
        self.labels = np.array(common + [RARE] * (len(common) < len(seen)), object)
        self._label_code = dict(zip(common, range(len(common))))

    def _read(self, phase: str):
        """For each Trace and group of its positions: (name, sets [L, T], labels [T] as numbers)."""
        groups = phases(phase)
        for index, trace in having(self._source, "expert_index"):
            at = trace.coords("expert_index")["position"]
            codes = np.searchsorted(self._codes, _masks(trace["expert_index"]))
            labels = np.zeros(len(at), int)
            if self._labels is not None:
                rare = len(self._label_code)
                values = self._labels.of(index, trace)[at].astype(str)
                unique, inverse = np.unique(values, return_inverse=True)
                labels = np.array([self._label_code.get(v, rare) for v in unique])[inverse]
            for name, of in groups:
                rows = of(trace.phase)[at]
                if rows.any():
                    yield name, codes[:, rows], labels[rows]

    def singles(self, codes: np.ndarray) -> np.ndarray:
        """[L, E]: how many tokens, of these sets [L, T], choose each expert."""
        counts, member = self.counted(codes)
        return counts @ member

    def together(self, codes: np.ndarray) -> np.ndarray:
        """[L, E, E]: how many tokens choose each two experts."""
        counts, member = self.counted(codes)
        at_once = max(1, BUFFER // member.size)  # layers
        found = [(member.T * counts[i : i + at_once, None]) @ member for i in range(0, len(counts), at_once)]
        return np.concatenate(found)

    def by_size(self, codes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """[L, sizes, 1 + E]: how many tokens choose as many experts, and of these how many choose each."""
        counts, member = self.counted(codes)
        own = np.where(member.sum(1) == sizes[:, None], counts[:, None], 0)  # [L, sizes, S]
        return np.concatenate([own.sum(-1, keepdims=True), own @ member], axis=-1)

    def counted(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[L, S], how many of these tokens choose each set, and the members [S, E]. Where sets are many, S are those
        chosen here."""
        member = self.member
        if len(member) > codes.size:
            seen, flat = np.unique(codes, return_inverse=True)
            codes, member = flat.reshape(codes.shape), member[seen]
        return _counts(codes, len(member)), member

    def by_prompt(self, phase: str, *of: Callable):
        """(name, tokens [P], and of each `of` its values of the sets [L, T] of each prompt, stacked)."""
        found: dict[str, list] = {}
        for name, codes, _ in self._read(phase):
            found.setdefault(name, []).append((codes.shape[1], *(one(codes) for one in of)))
        if not found:
            raise ValueError(f"no token with routing belongs to phase {phase!r}")
        for name, rows in found.items():
            yield name, *(np.array(column, np.float64) for column in zip(*rows, strict=True))

    def by_label(self, labels: Labels, phase: str):
        """(name, tokens [P], tables [L, R, S]; and, where labels are of prompts, the label [P], counts [P, L, S])."""
        shape = (len(self.layers), len(self.labels), len(self.member))
        groups: dict[str, tuple] = {}
        for name, codes, of_tokens in self._read(phase):
            flat = (np.arange(shape[0])[:, None] * shape[1] + of_tokens) * shape[2] + codes
            tokens, waiting, tables, of_prompt, counts = groups.setdefault(
                name, ([], [], np.zeros(np.prod(shape)), [], [])
            )
            tokens.append(codes.shape[1])
            waiting.append(flat.ravel())
            if sum(map(len, waiting)) > BUFFER:
                _drain(waiting, tables)
            if labels.by_prompt:
                of_prompt.append(of_tokens[0])
                counts.append(_counts(codes, len(self.member)))
        if not groups:
            raise ValueError(f"no token with routing belongs to phase {phase!r}")
        for name, (tokens, waiting, tables, of_prompt, counts) in groups.items():
            _drain(waiting, tables)
            yield name, np.array(tokens), tables.reshape(shape), np.array(of_prompt), np.array(counts, np.float64)


def _refuse_no_draws(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"draws={draws!r}: a null takes at least one")


def _layers(trace: Trace, tap: str, before: list[int]) -> list[int]:
    """Those kept of a Trace. Raises ValueError unless they are those of the Traces before, if there are any."""
    if before and trace.layers[tap] != before:
        raise ValueError(f"a Trace has {tap} of layers {trace.layers[tap]}, those before it of {before}")
    return trace.layers[tap]


def _masks(experts: np.ndarray) -> np.ndarray:
    """int64 [L, T]: the set of experts of each token, a bit for each; -1 is nobody."""
    return np.where(experts >= 0, 1 << experts.astype(np.int64), 0).sum(-1)


def _counts(codes: np.ndarray, sets: int) -> np.ndarray:
    """[L, sets]: how often each number is in a layer's row of codes [L, T]."""
    flat = codes + np.arange(len(codes))[:, None] * sets
    return np.bincount(flat.ravel(), minlength=len(codes) * sets).reshape(-1, sets)


def _drain(waiting: list[np.ndarray], tables: np.ndarray) -> None:
    if waiting:
        tables += np.bincount(np.concatenate(waiting), minlength=len(tables))
        waiting.clear()


def _summed(counts: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """[L, R, S] of counts [P, L, S], summed over the prompts of each label."""
    return np.tensordot((labels == np.arange(num_labels)[:, None]).astype(np.float64), counts, 1).swapaxes(0, 1)


def _shares(counts: np.ndarray) -> np.ndarray:
    return ratio(counts, counts.sum(-1, keepdims=True))


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Bits of the shares along the last axis."""
    p = _shares(counts)
    return -(p * np.log2(np.maximum(p, 1e-300))).sum(-1)


def _information(tables: np.ndarray) -> np.ndarray:
    """Mutual information in bits between rows and columns of tables [..., R, C]."""
    flat = tables.reshape(*tables.shape[:-2], -1)
    return _entropy(tables.sum(-1)) + _entropy(tables.sum(-2)) - _entropy(flat)


def _shuffled(table: np.ndarray, member: np.ndarray, draws: int, rng, found: float) -> np.ndarray | float:
    """The information in tables [R, S] with the margins of this one; `found`, its own, where there is no other."""
    rows, sets = table.any(1), table.any(0)
    if rows.sum() < 2 or sets.sum() < 2:  # one label, or always the same set; scipy's tables are wrong then
        return found
    table = table[np.ix_(rows, sets)]
    return _information(random_table(table.sum(1), table.sum(0), seed=rng).rvs(draws) @ member[sets])


def _means(source: Source, measure: Callable, name: str, phase: str, seed: int, tap="router_logits") -> pd.DataFrame:
    """The mean over tokens of a measure of a tap [L, T, ...] -> [L, T], layer by layer."""
    sums: dict[str, list] = {}
    layers: list[int] = []
    for _, trace in having(source, tap):
        at, layers = trace.coords(tap)["position"], _layers(trace, tap, layers)
        value = trace[tap]
        if tap == "router_logits":
            if "E" in trace.numbers[tap]:
                raise ValueError(f"{name} needs router_logits of all experts; kept are {trace.numbers[tap]['E']}")
            value = np.exp(value - value.max(-1, keepdims=True))
            value /= value.sum(-1, keepdims=True)
        found = measure(value)
        for group, of in phases(phase):
            rows = of(trace.phase)[at]
            if rows.any():
                sums.setdefault(group, []).append((rows.sum(), found[:, rows].sum(1)))
    if not sums:
        raise ValueError(f"no token with routing belongs to phase {phase!r}")
    frames = []
    for group, rows in sums.items():
        tokens, total = (np.array(column, np.float64) for column in zip(*rows, strict=True))
        low, high = resampling.interval(lambda n, t: t / n[:, None], tokens, total, seed=seed)
        values = {name: total.sum(0) / tokens.sum(), "low": low, "high": high}
        frames.append(_frame(("layer",), (layers,), phase=group, **values, tokens=tokens.sum(), prompts=len(tokens)))
    return pd.concat(frames, ignore_index=True)


def _frame(axes: tuple[str, ...], numbers: tuple, *, phase: str, **columns) -> pd.DataFrame:
    """A row for each combination of the numbers along the axes; columns are arrays over them, or one value."""
    shape = tuple(len(n) for n in numbers)
    grid = np.meshgrid(*(np.asarray(n) for n in numbers), indexing="ij")
    values = {name: np.broadcast_to(value, shape).ravel() for name, value in columns.items()}
    for name in ("tokens", "prompts"):
        values[name] = values[name].astype(int)
    return pd.DataFrame({"phase": phase} | {n: g.ravel() for n, g in zip(axes, grid, strict=True)} | values)
