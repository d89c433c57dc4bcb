"""Analyses name what was planted, equal direct numpy computations, and do not see what is not there."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import planted
import pytest
from conftest import small_config, write_random

import grokscope as gs
from grokscope import analysis
from grokscope.analysis import resampling
from grokscope.analysis.causal import sweep

LABELS = planted.CLASSES


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with gs.load(planted.write(tmp_path_factory.mktemp("planted") / "checkpoint")) as grok:
        yield grok


@pytest.fixture(scope="module")
def traces(made):
    return made.trace([planted.prompt(60, seed) for seed in range(20)])


@pytest.fixture(scope="module")
def twice(made):
    return made.trace([planted.repeated(20, seed) for seed in range(10)], capture=["attn_pattern", "logits"])


def simulated(prompts: int, length: int, seed: int, taste=0.0, layers=2, experts=8, bias=0.0):
    """Traces with a random router. `taste`: how much prompts differ, which makes tokens of a prompt alike; `bias`: how
    much experts do, [E]."""
    rng = np.random.default_rng(seed)
    config = dataclasses.asdict(dataclasses.replace(gs.GROK_1, num_layers=layers, num_experts=experts, vocab_size=50))
    found = []
    for prompt in range(prompts):
        logits = taste * rng.normal(size=(layers, 1, experts)) + rng.gumbel(size=(layers, length, experts)) + bias
        tokens = rng.integers(0, 50, length).astype(np.int32)
        index = np.argsort(-logits, axis=-1)[..., :2].astype(np.int32)
        trace = gs.Trace(
            tokens=tokens, pieces=[f"p{i}" for i in tokens], text="", continuation="", prompt_length=length,
            logprobs=np.zeros(length, np.float32), taps={"expert_index": index}, dims={"expert_index": "LTK"},
            numbers={"expert_index": {"L": list(range(layers))}}, meta={"config": config, "prompt": prompt},
        )  # fmt: skip
        found.append(trace)
    return found


# What cannot be counted


def test_a_layer_that_always_chooses_the_same_is_not_special(made):
    prompts = [planted.prompt(60, seed) for seed in range(4)]
    with made.edits(gs.route.force(experts=[1, 2], layers=1)):
        forced = made.trace(prompts)
    frame = analysis.specialisation(forced, LABELS, min_count=1).set_index("layer")
    assert (frame.information[1], frame.null[1], frame.p[1], frame.p_adjusted[1]) == pytest.approx((0, 0, 1, 1))
    plain = analysis.specialisation(made.trace(prompts), LABELS, min_count=1).set_index("layer")
    assert frame.p_adjusted.drop(1).tolist() == pytest.approx(plain.p_adjusted.drop(1).tolist(), abs=0.05)


def test_p_of_what_is_not_there():
    rng = np.random.default_rng(0)
    null = rng.normal(size=(199, 3))
    null[:, 1] = np.nan
    p, adjusted = resampling.p_values(np.array([9.0, np.nan, -9.0]), null)
    np.testing.assert_allclose(p, [1 / 200, np.nan, 1])
    np.testing.assert_allclose(adjusted, [1 / 200, np.nan, 1])


def test_prompts_that_lack_the_positions_are_left_out(made):
    """In a batch of different lengths, positions from the end may be none of a short prompt's."""
    late = {"positions": slice(-10, -5)}
    prompts = [planted.prompt(30, 0), planted.prompt(3, 1), planted.prompt(20, 2)]
    routing = [gs.capture(tap, **late) for tap in ("router_logits", "expert_index", "expert_gate")]
    lens = gs.capture("resid_post", reduce="lens", **late)
    found = made.trace(prompts, capture=[*routing, gs.capture("attn_pattern", **late), lens])
    for analyse in (analysis.load, analysis.entropy, analysis.heads, analysis.lens):
        pd.testing.assert_frame_equal(analyse(found), analyse([found[0], found[2]]))
    labels = analysis.specialisation(found, ["a", "b", "a"], min_count=1)
    assert labels.prompts.tolist() == [2] * len(labels)
    with pytest.raises(KeyError, match="expert_index"):
        analysis.load(made.trace(prompts, capture=()))


@pytest.mark.parametrize("measure", [analysis.margin, analysis.coactivation])
def test_a_model_of_one_expert(tmp_path, measure):
    with gs.load(write_random(tmp_path / "one", small_config(num_experts=1, num_selected_experts=1))) as one:
        trace = one.trace([5, 6, 7])
    with pytest.raises(ValueError, match="needs a model of two experts or more"):
        measure(trace)


def test_parts_that_do_not_go_together(made):
    one, other = (made.trace(planted.prompt(20, 0), capture=gs.capture("router_logits", layers=n)) for n in (0, 1))
    for measure in (analysis.entropy, analysis.margin):
        with pytest.raises(ValueError, match=r"of layers \[1\], those before it of \[0\]"):
            measure([one, other])
        with pytest.raises(ValueError, match=r"all experts; kept are \[0, 2\]"):
            measure(made.trace(planted.prompt(20, 0), capture=gs.capture("router_logits", experts=[0, 2])))
    with pytest.raises(IndexError, match="position=60: the Trace has 20 tokens"):
        analysis.counterfactuals(made, planted.prompt(20, 0), position=60)
    for wrong in (-1, 5.7, planted.V):
        with pytest.raises(ValueError, match=f"token {wrong}: expected a text of one token, or an id from 0 to"):
            analysis.patching(made, planted.prompt(20, 0), planted.prompt(20, 1), wrong, 1)
    with pytest.raises(ValueError, match="num_experts=72"):
        analysis.load(simulated(1, 5, 0, experts=72))
    with pytest.raises(ValueError, match="of 4 experts, those before it of 8"):
        analysis.load([*simulated(1, 5, 0), *simulated(1, 5, 0, experts=4)])
    heads = [made.trace([5, 6, 7], capture=gs.capture("attn_pattern", heads=h)) for h in ([0, 1], [1, 2])]
    for analyse in (analysis.heads, lambda t: analysis.by_class(t, LABELS)):
        with pytest.raises(ValueError, match=r"heads \[1, 2\] of layer 0, those before it \[0, 1\]"):
            analyse(heads)
    late = made.trace(
        planted.prompt(20, 0), capture=[gs.capture(tap, positions=slice(3, None)) for tap in analysis.ATTRIBUTION]
    )
    with pytest.raises(ValueError, match="'embed' whole; of its positions"):
        analysis.attribution(made, late, position=5)


# Planted truth


def test_the_planted_heads_are_named(twice):
    """The best head of each measure is the planted one, by far, and of no other layer."""
    frame = analysis.heads(twice)
    for measure, planted_head in (
        ("previous", planted.PREVIOUS), ("duplicate", planted.DUPLICATE), ("induction", planted.INDUCTION),
    ):  # fmt: skip
        own = frame[frame.measure == measure].sort_values("score", ascending=False)
        best, second = own.iloc[0], own.iloc[1]
        assert (best.layer, best["head"]) == planted_head
        assert best.low > 3 * second.high
        others = own.iloc[1:]
        assert (others.score < others.uniform + 0.1).all()


def test_where_induction_shows(twice):
    layer, head = planted.INDUCTION
    shown = analysis.shown(twice, layer, head, "induction", top=20)
    assert len(shown) == 20
    for row in shown.itertuples():
        trace = twice[row.prompt]
        assert trace.tokens[row.position] == trace.tokens[row.key_position - 1]
        assert row.score > 0.9
    with pytest.raises(KeyError, match="head 7"):
        analysis.shown(twice, layer, 7, "induction")


def test_the_planted_experts_are_named(traces):
    """Digits go to one expert and capitals to another, at every layer, and what goes there is nothing else."""
    frame = analysis.lift(traces, LABELS)
    for expert, label in ((planted.DIGITS, "digits"), (planted.CAPITALS, "capital")):
        for layer in range(3):
            own = frame[(frame.expert == expert) & (frame.layer == layer)].sort_values("lift", ascending=False)
            assert own.label.iloc[0] == label
            assert own["count"].iloc[0] == own.label_count.iloc[0] == own["count"].sum()
    assert (frame[frame.expert == planted.DEAD]["count"] == 0).all()
    load = analysis.load(traces)
    assert (load[load.expert == planted.DEAD].share == 0).all()
    assert (load[load.expert != planted.DEAD].share > 0).all()
    special = analysis.specialisation(traces, LABELS)
    assert (special.p_adjusted <= 0.01).all()
    words = analysis.vocabulary(traces, min_count=5)
    digits = {f"<{i}>" for i in range(1, 11)}
    assert set(words[words.expert == planted.DIGITS].label) == digits


# Against numpy


def test_load_is_counted(traces):
    frame = analysis.load(traces)
    index = np.concatenate([t["expert_index"] for t in traces], axis=1)
    for row in frame.itertuples():
        assert row.count == (index[row.layer] == row.expert).sum()
        assert row.share == pytest.approx(row.count / (2 * row.tokens))
        assert row.low <= row.share <= row.high
    dead = frame[frame.expert == planted.DEAD]
    np.testing.assert_allclose(dead.high, -np.log(0.025) / (2 * dead.tokens))
    assert frame.groupby("layer").share.sum().to_numpy() == pytest.approx(1)
    assert (frame.tokens == 1200).all()


def test_coactivation_and_transitions_are_counted():
    traces = simulated(5, 30, 0, taste=1.0, layers=3)
    index = np.concatenate([t["expert_index"] for t in traces], axis=1)
    has = (index[..., None] == np.arange(8)).any(2)  # [L, T, E]
    for row in analysis.coactivation(traces).itertuples():
        assert row.count == (has[row.layer, :, row.expert] & has[row.layer, :, row.other]).sum()
    for row in analysis.transitions(traces).itertuples():
        assert row.count == (has[row.layer, :, row.expert] & has[row.next_layer, :, row.next]).sum()
        assert row.expected == pytest.approx(
            has[row.layer, :, row.expert].mean() * has[row.next_layer, :, row.next].sum()
        )


def test_tokens_that_were_sent_to_one_expert_are_of_no_pair():
    """Beside others at the same layer, as `route.force` leaves them: chance is that of the tokens that chose two."""
    traces = simulated(5, 40, 0, taste=1.0)
    plain = analysis.coactivation(traces)
    for trace in traces:
        half = trace.taps["expert_index"].copy()
        half[1, 20:, 1] = -1
        trace.taps["expert_index"] = half
    frame = analysis.coactivation(traces)
    columns = ["count", "expected", "lift", "low", "high"]
    pd.testing.assert_frame_equal(frame[frame.layer == 0][columns], plain[plain.layer == 0][columns])
    own = frame[frame.layer == 1]
    assert own["count"].sum() == 5 * 20
    assert own.expected.sum() == pytest.approx(5 * 20)


def test_an_expert_of_every_token_is_expected_with_all():
    together = resampling.matched(np.array([1, 0.4, 0.3, 0.2, 0.1]), 2)
    np.testing.assert_allclose(together[0], [1, 0.4, 0.3, 0.2, 0.1], atol=1e-6)


def test_means_of_the_router(made, traces):
    logits = np.concatenate([t["router_logits"] for t in traces], axis=1).astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    ordered = np.sort(p, axis=-1)
    bits = -(p * np.log2(np.maximum(p, 1e-30))).sum(-1)
    for found, name, truth in (
        (analysis.entropy(traces), "entropy", bits), (analysis.margin(traces), "margin", ordered[..., -1] - ordered[..., -2]),
        (analysis.kept_mass(traces), "kept_mass", ordered[..., -2:].sum(-1)),
    ):  # fmt: skip
        np.testing.assert_allclose(found[name], truth.mean(1), atol=1e-5)


def test_information_and_lift_are_counted():
    traces = simulated(4, 100, 1)
    labels = [np.where(t.tokens < 10, "few", "many") for t in traces]
    found = analysis.specialisation(traces, labels, draws=19)
    index = np.concatenate([t["expert_index"] for t in traces], axis=1)
    flat = np.concatenate(labels)
    for layer in range(2):
        joint = np.array([[(index[layer][flat == y] == e).sum() for e in range(8)] for y in ("few", "many")]) / 800
        outer = joint.sum(1, keepdims=True) * joint.sum(0)
        assert found.information[layer] == pytest.approx((joint * np.log2(joint / outer)).sum())
    lift = analysis.lift(traces, labels)
    row = lift[(lift.layer == 1) & (lift.expert == 3) & (lift.label == "few")].iloc[0]
    assert row["count"] == (index[1][flat == "few"] == 3).sum()
    assert row.expected == pytest.approx((index[1] == 3).sum() * (flat == "few").mean())


def test_attention_is_measured(twice):
    frame = analysis.heads(twice).set_index(["layer", "head", "measure"]).sort_index()
    a = np.stack([t["attn_pattern"] for t in twice]).astype(np.float64)  # [P, L, H, T, S]
    n = a.shape[-1]
    back = np.subtract.outer(np.arange(n), np.arange(n))
    for layer in range(3):
        for head in range(4):
            own, score = a[:, layer, head], frame.score[layer, head]
            assert score["entropy"] == pytest.approx(-(own * np.log2(np.maximum(own, 1e-30))).sum(-1).mean(), abs=1e-4)
            assert score["distance"] == pytest.approx((own * back).sum(-1).mean(), abs=1e-4)
            assert score["first"] == pytest.approx(own[:, 1:, 0].mean(), abs=1e-5)
            assert score["previous"] == pytest.approx(np.mean([own[:, i, i - 1] for i in range(1, n)]), abs=1e-5)
            assert score["duplicate"] == pytest.approx(np.mean([own[:, i, i - 20] for i in range(21, n)]), abs=1e-5)
            assert score["induction"] == pytest.approx(np.mean([own[:, i, i - 19] for i in range(21, n)]), abs=1e-5)
    assert frame.loc[(0, 0, "induction"), "positions"] == 200


def test_attention_by_class(twice):
    frame = analysis.by_class(twice, LABELS)
    one = frame[(frame.layer == 0) & (frame["head"] == 1) & (frame["query"] == "digits") & (frame.key == "bos")].iloc[0]
    rows = [t["attn_pattern", 0][1, LABELS[t.tokens] == "digits", 0] for t in twice]
    assert one.mass == pytest.approx(np.concatenate(rows).mean(), abs=1e-5)
    sums = frame.groupby(["layer", "head", "query"]).mass.sum()
    np.testing.assert_allclose(sums, 1, atol=1e-4)


def test_pairs_of_different_experts():
    """The matched draw has the shares asked for, and is what enumeration says."""
    rng = np.random.default_rng(0)
    for number, chosen, *some in ((8, 2), (8, 3), (64, 8), (8, 2, 0.999), (6, 3, 0.99, 0.9999)):
        shares = rng.permutation(np.linspace(0.5, 1.5, number - len(some)))
        shares = np.array([*some, *shares * (chosen - sum(some)) / shares.sum()])
        together = resampling.matched(shares, chosen)
        np.testing.assert_allclose(together.sum(1), chosen * shares, rtol=1e-5)
        np.testing.assert_allclose(together, together.T, rtol=1e-5)
    np.testing.assert_allclose(resampling.matched(np.full(8, 0.25), 2)[0, 1:], 1 / 28)
    odds = np.array([3000, 1, 0.5, 0.2, 0.1])
    sets = np.array([np.isin(np.arange(5), one) for one in itertools.combinations(range(5), 3)], float)
    likely = np.prod(np.where(sets > 0, odds, 1), axis=1)
    exact = (sets * (likely / likely.sum())[:, None]).T @ sets
    np.testing.assert_allclose(resampling.matched(np.diagonal(exact), 3), exact, rtol=1e-5)


# Chance


def test_a_random_router_is_not_special():
    """At level 0.05, at most 20 of 200 seeds; prompts that differ do not pass for tokens that matter."""
    found = [
        analysis.specialisation(simulated(6, 40, s), "token", draws=99, min_count=3).p_adjusted.min()
        for s in range(200)
    ]
    assert sum(p <= 0.05 for p in found) <= 20
    by_prompt = [
        analysis.specialisation(simulated(12, 20, s, taste=1.0), ["a", "b", "c"] * 4, draws=99).p_adjusted.min()
        for s in range(200)
    ]
    assert sum(p <= 0.05 for p in by_prompt) <= 20


def test_intervals_cover():
    """95 % intervals of the load hold the truth at 91 to 98 % of simulated dumps, though tokens of a prompt are alike;
    so do those of pairs that are rare, and often never seen.
    """
    inside, never = [], 0
    for seed in range(30):
        frame = analysis.transitions(simulated(12, 100, seed, bias=(2, 1, 1, 0, 0, -1, -2, -3)))
        rare = frame[(frame.expected > 0.5) & (frame.expected < 2)]
        never += (rare["count"] == 0).sum()
        inside += list((rare.low <= 1) & (rare.high >= 1))
    assert never > 10
    assert np.mean(inside) > 0.88
    inside = []
    for seed in range(150):
        frame = analysis.load(simulated(12, 20, seed, taste=1.0, layers=1))
        inside += list((frame.low <= 1 / 8) & (frame.high >= 1 / 8))  # by symmetry, the truth
    assert 0.91 <= np.mean(inside) <= 0.98


def test_few_prompts_have_no_interval(traces):
    assert analysis.load(traces[0]).low.isna().all()
    assert analysis.load(traces[:4]).high.isna().all()
    assert analysis.load(traces[:5]).low.notna().all()


def test_intervals_of_what_few_prompts_have_cover():
    """The mean of what up to 9 of 40 prompts have, at 88 to 98 %; NaN where less than five have it."""
    rng, inside, asked = np.random.default_rng(0), 0, 0
    for seed in range(300):
        has = np.zeros(40)
        has[: rng.integers(1, 10)] = 1
        value = (1 + rng.normal(size=40)) * has
        low, high = resampling.interval(resampling.ratio, value, has, units=np.array(has.sum()), seed=seed)
        assert np.isnan(low) == np.isnan(high) == (has.sum() < 5)
        if has.sum() >= 5:
            inside, asked = inside + (low <= 1 <= high), asked + 1
    assert 0.88 <= inside / asked <= 0.98


# What is mixed, and what is refused


def test_phases_are_apart(made):
    traces = made.generate([planted.prompt(20, s) for s in range(3)], 15, stop_at_eos=False)
    frame = analysis.load(traces)
    assert frame.groupby("phase").tokens.first().to_dict() == {"prefill": 60, "decode": 45}
    joined = analysis.load(traces, phase="all")
    both = frame.groupby(["layer", "expert"])["count"].sum()
    assert (joined.set_index(["layer", "expert"])["count"] == both).all()
    with pytest.raises(ValueError, match="phase='train'"):
        analysis.load(traces, phase="train")
    with pytest.raises(ValueError, match="no token with routing belongs to phase 'decode'"):
        analysis.load(made.trace([1, 2]), phase="decode")


def test_a_dump_is_read_as_its_traces(made, traces, tmp_path):
    dump = made.dump([t.tokens for t in traces], tmp_path / "d")
    for analyse in (analysis.load, analysis.coactivation, lambda x: analysis.specialisation(x, LABELS)):
        pd.testing.assert_frame_equal(analyse(dump), analyse(traces))


def test_labels_that_do_not_fit(traces):
    with pytest.raises(ValueError, match="labels \"sort\"|labels 'sort'"):
        analysis.specialisation(traces, "sort")
    with pytest.raises(ValueError, match="has no tokenizer"):
        analysis.specialisation(traces, "class")
    with pytest.raises(ValueError, match="3 labels for 20 Traces"):
        analysis.specialisation(traces, ["a", "b", "c"])
    with pytest.raises(ValueError, match="60 tokens and 2 labels"):
        analysis.specialisation(traces, [["a", "b"]] * 20)
    with pytest.raises(TypeError, match="got str"):
        analysis.load("text")
    with pytest.raises(ValueError, match="no Trace"):
        analysis.load([])


def test_labels_are_read_by_place_and_of_the_phase_asked_for(made):
    traces = simulated(6, 40, 0, taste=1.0)
    labels = ["a", "b", "c", "a", "b", "c"]
    turned = pd.Series(labels, index=[5, 4, 3, 2, 1, 0])
    pd.testing.assert_frame_equal(analysis.lift(traces, labels), analysis.lift(traces, turned))
    with pytest.raises(ValueError, match="for as many Traces and tokens of the vocabulary"):
        analysis.lift(simulated(50, 2, 0), np.arange(50) // 10)
    with pytest.raises(TypeError, match="labels 3: expected a name"):
        analysis.lift(traces, 3)
    with pytest.raises(TypeError, match="got generator"):
        analysis.lift((t for t in traces), "token")
    with pytest.raises(ValueError, match="go into a list"):
        analysis.lift(traces[0], np.zeros(40))
    for analyse in (analysis.lift, analysis.specialisation):
        with pytest.raises(ValueError, match="draws=0"):
            analyse(traces, labels, draws=0)
    made = made.generate([5, 6, 7], 12, stop_at_eos=False)
    kinds = [np.where(made.phase == "decode", "late", "early")]
    late = analysis.lift(made, kinds, phase="decode", min_count=1)
    assert set(late.label) == {"late"}
    assert (analysis.specialisation(made, kinds, phase="decode", min_count=1).labels == 1).all()
    apart = analysis.lift(made, kinds, phase="each", min_count=1)
    assert apart.groupby("phase").label.unique().map(list).to_dict() == {"decode": ["late"], "prefill": ["early"]}


def test_a_label_for_each_prompt_cannot_be_special():
    """Shuffled, they are what they were; only rounding differs."""
    for seed in range(20):
        traces = simulated(6, 40, seed, taste=1.0)
        assert (analysis.specialisation(traces, list("abcdef"), min_count=1).p == 1).all()


def test_words_of_a_random_router_are_few():
    """Of (token, expert) pairs that have nothing to do with each other about 1 in 740, of rare experts too."""
    found = rows = 0
    for seed in range(10):
        traces = simulated(10, 400, seed, bias=(2, 1, 1, 0, 0, -1, -3, -5))
        found, rows = found + len(analysis.vocabulary(traces, top=50)), rows + 2 * 8 * 50
    assert found / rows < 0.003


# Two runs


def test_compare(made):
    prompt = planted.repeated(20, 3)[:30]
    layer, head = planted.INDUCTION
    plain = made.generate(prompt, 8, capture=["router_logits", "logits"], stop_at_eos=False)
    with made.edits(gs.ablate(layers=layer, heads=head)):
        other = made.generate(prompt, 8, capture=["router_logits", "logits"], stop_at_eos=False)
    found = gs.compare(plain, other)
    assert found.divergence == 30
    assert (found.pairs[:30] == np.arange(30)[:, None]).all()
    assert (found.routing[0, :30] == 0).all(), "before the head nothing differs"
    assert found.routing[2, 21:30].max() > 0
    p, q = (np.exp(t["logits"][25].astype(np.float64)) for t in (plain, other))
    p, q = p / p.sum(), q / q.sum()
    assert found.divergence_nats[25] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-3)
    frame = found.to_pandas()
    assert (frame.position_a >= 0).sum() == len(plain)
    assert (frame.position_b >= 0).sum() == len(other)
    same = gs.compare(plain, plain)
    assert same.divergence is None
    assert same.routing.max() == 0
    with pytest.raises(TypeError, match="takes two Traces"):
        gs.compare(plain, "text")


def test_a_common_beginning_is_aligned(made):
    """Though a later stretch matches at greater length elsewhere."""
    a, b = made.trace([1, 5, 6, 7, 5, 6, 7, 8, 9, 30, 31]), made.trace([1, 5, 6, 7, 8, 9, 30, 31, 20, 21, 22])
    found = gs.compare(a, b)
    assert found.divergence == 4
    assert found.pairs.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3], [7, 4], [8, 5], [9, 6], [10, 7]]


def test_wider_sets_and_banned_tokens_are_compared(made):
    prompt, keep = planted.repeated(20, 3)[:30], ["router_logits", "logits"]
    bans = np.zeros(made.config.vocab_size)
    bans[7] = -np.inf
    plain = made.trace(prompt, capture=keep)
    with made.edits(gs.route.top_k(3, layers=2), gs.add("logits", bans)):
        wider = made.trace(prompt, capture=keep)
    found = gs.compare(plain, wider)
    assert [of_layer.all() for of_layer in found.swapped[:3]] == [False, False, True]
    assert not found.swapped[:2].any(), "layers before the edit choose the same experts"
    assert np.isinf(found.divergence_nats).all(), "what is likely here is impossible there"
    back = gs.compare(wider, plain)
    assert np.isfinite(back.divergence_nats).all()
    assert (back.divergence_nats >= 0).all()


def test_what_heads_read_where_routing_changed(made):
    prompt = planted.repeated(20, 3)[:30]
    keep = ["router_logits", "attn_pattern"]
    plain = made.trace(prompt, capture=keep)
    with made.edits(gs.ablate(layers=0, heads=planted.PREVIOUS[1]), gs.route.ban(layers=1, experts=planted.DIGITS)):
        other = made.trace(prompt, capture=keep)
    found = gs.compare(plain, other)
    frame = analysis.read_at_swaps(found)
    assert len(frame) == 4 * found.swapped.sum()
    top = frame[(frame.layer == 1) & (frame.position > 20)].iloc[0]
    assert top["head"] == planted.INDUCTION[1], "it read the wrong place without the head it builds on"
    a, b = (t["attn_pattern", 1][top["head"], top.position] for t in (plain, other))
    assert top.moved == pytest.approx(np.abs(a - b).sum() / 2, abs=1e-5)
    assert (top.weight_a, top.weight_b) == (a[top.key_position], b[top.key_position])


def test_heads_are_compared_by_number_and_keys_that_one_run_lacks_count(made):
    prompt = planted.repeated(20, 3)[:30]
    longer = [*prompt[:12], prompt[0], *prompt[12:]]
    whole = made.trace(prompt, capture=["router_logits", "attn_pattern"])
    with made.edits(gs.ablate(layers=0, heads=planted.PREVIOUS[1]), gs.route.ban(layers=1, experts=planted.DIGITS)):
        other = made.trace(longer, capture=["router_logits", "attn_pattern"])
        some, one = (
            made.trace(longer, capture=["router_logits", gs.capture("attn_pattern", heads=h)]) for h in ([3, 1], 1)
        )
    zero = made.trace(prompt, capture=["router_logits", gs.capture("attn_pattern", heads=0)])
    frame = analysis.read_at_swaps(gs.compare(whole, other))
    assert (frame.moved <= 1).all()
    rows = frame[frame.position > 12]
    assert len(rows)
    for row in rows.itertuples():
        a = np.insert(whole["attn_pattern", row.layer][row.head, row.position], 12, 0)
        b = other["attn_pattern", row.layer][row.head, row.position + 1]
        assert row.moved == pytest.approx(np.abs(a - b).sum() / 2, abs=1e-5)
    few = analysis.read_at_swaps(gs.compare(whole, some))
    expected = frame[frame["head"].isin([1, 3])].reset_index(drop=True)
    by = ["layer", "position", "head"]
    pd.testing.assert_frame_equal(
        few.sort_values(by, ignore_index=True),
        expected.sort_values(by, ignore_index=True),
        check_exact=False,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="none in common"):
        analysis.read_at_swaps(gs.compare(zero, one))
    with pytest.raises(ValueError, match="no layer whose routing both runs have"):
        analysis.read_at_swaps(gs.compare(whole, made.trace(prompt, capture=())))
    with pytest.raises(ValueError, match=r"layer 7: both runs have routing of layers \[0, 1, 2\]"):
        analysis.read_at_swaps(gs.compare(whole, other), layers=[7])


def test_runs_are_compared_at_what_both_have(made):
    whole, some = (made.trace([5, 6, 7], capture=gs.capture("expert_index", layers=n)) for n in (None, 1))
    assert gs.compare(whole, some).layers == [1]
    few = dataclasses.replace(whole, meta=whole.meta | {"config": whole.meta["config"] | {"num_experts": 4}})
    assert gs.compare(whole, few).layers == []


# Causes


@pytest.fixture(scope="module")
def pair():
    """A repeated sequence cut before its last token, the same with that token changed at its first occurrence, the
    answer, and what the change makes of it."""
    whole = planted.repeated(12, 1)
    other = next(i for i in range(1, planted.V) if i not in whole)
    return whole[:-1], [*whole[:12], other, *whole[13:-1]], whole[-1], other


@pytest.mark.parametrize("method", ["zero", "mean"])
def test_ablations_name_what_was_planted(made, method):
    prompts = [planted.repeated(20, seed) for seed in range(6)]
    heads = analysis.ablations(made, prompts, "heads", method=method).sort_values("effect", ascending=False)
    assert {(r.layer, r["head"]) for _, r in heads.iloc[:2].iterrows()} == {planted.PREVIOUS, planted.INDUCTION}
    assert heads.effect.iloc[1] > 1
    assert heads.effect.iloc[2:].abs().max() < 1e-3
    layers = analysis.ablations(made, prompts, "layers", method=method)
    assert layers.effect[planted.IDLE_LAYER] == pytest.approx(0, abs=1e-5)
    assert layers.effect.drop(planted.IDLE_LAYER).min() > 1


@pytest.mark.slow
def test_ablations_equal_one_at_a_time(grok):
    """On the bundled model: every row of a sweep is the run with that edit alone; by class, they add up."""
    prompts = ["The old keeper of the lighthouse went down to the sea.", "def area(r):\n    return 3.14 * r ** 2\n"]
    for over, part in (("heads", "head"), ("experts", "expert")):
        frame = analysis.ablations(grok, prompts, over)
        split = analysis.ablations(grok, prompts, over, by="class")
        for row in frame.sample(3, random_state=0).itertuples():
            number = getattr(row, part)
            with grok.edits(gs.ablate(layers=row.layer, **{over: number})):
                assert row.loss == pytest.approx(grok.loss(prompts).nats_per_token, abs=1e-6)
            own = split[(split.layer == row.layer) & (split[part] == number)]
            assert (own.effect * own.tokens).sum() / own.tokens.sum() == pytest.approx(row.effect, abs=1e-6)


def test_twins_are_the_same_expert(made):
    """Forced to either, the model says the same; forced to another, it does not (their outputs differ)."""
    prompt = planted.prompt(12, 3)
    frame = analysis.counterfactuals(made, prompt, layers=[0]).set_index("expert")
    a, b = planted.TWINS
    assert frame.kl[a] == pytest.approx(frame.kl[b], abs=1e-9)
    assert abs(frame.kl[a] - frame.kl[2]) > 1e-7
    assert frame.chosen.sum() == 2
    assert frame.plain_token[0] == made.trace(prompt, capture="logits")["logits"][-1].argmax()
    with made.edits(gs.route.force(experts=[2], layers=0, positions=[11])):
        forced = made.trace(prompt, capture="logits")["logits"][-1].astype(np.float64)
    forced = np.exp(forced - forced.max())
    assert frame.prob[2] == pytest.approx((forced / forced.sum()).max(), rel=1e-5)


@pytest.mark.slow
def test_patching_names_the_place(made, pair):
    clean, corrupted, answer, other = pair
    frame = analysis.patching(made, clean, corrupted, answer, other)
    restored = frame[frame.recovered > 0.5]
    assert list(zip(restored.layer, restored.position)) == [(0, 12), (1, 23), (2, 23)], "its first place, then the last"
    heads = analysis.patching(made, clean, corrupted, answer, other, over="heads")
    assert heads.loc[heads.recovered.idxmax(), ["layer", "head"]].tolist() == list(planted.INDUCTION)
    assert analysis.patching(made, clean, corrupted, answer, other, over="experts").recovered.abs().max() < 0.05
    with pytest.raises(ValueError, match="24 tokens and the corrupted one 23"):
        analysis.patching(made, clean, corrupted[:-1], answer, other)
    with pytest.raises(ValueError, match="nothing to recover"):
        analysis.patching(made, clean, clean, answer, other)


@pytest.mark.slow
def test_the_path_from_head_to_head(made, pair):
    """The previous-token head speaks to the induction head, through its keys alone."""
    clean, _, answer, other = pair
    corrupted = [*clean]
    corrupted[clean.index(clean[-1])] = other
    keys, queries, values = (
        analysis.path_patching(made, clean, corrupted, planted.PREVIOUS, answer, other, through=t) for t in "kqv"
    )
    best = keys.loc[keys.recovered.idxmax()]
    assert (best.layer, best["head"]) == planted.INDUCTION
    assert best.recovered > 0.95
    assert keys.recovered.drop(best.name).abs().max() < 0.01
    assert max(queries.recovered.abs().max(), values.recovered.abs().max()) < 0.01


def test_a_sweep_cut_short_gives_what_is_whole(made, monkeypatch):
    """Prompts of a call may be done in another order: what comes after one that is missing is not counted."""
    trace = made.trace
    monkeypatch.setattr(made, "trace", lambda *args, **kw: [t for t in trace(*args, **kw) if t.meta["prompt"] != 3])
    found = sweep(made, [[5, 6], [7, 8, 9]], [[], [gs.ablate(layers=0)], [gs.ablate(layers=1)]])
    assert [[t.tokens.tolist() for t in of_variant] for of_variant in found] == [[[5, 6], [7, 8, 9]]]


def test_a_table_cut_short_is_none(made, monkeypatch):
    trace = made.trace

    def cut(*args, **options):
        found = trace(*args, **options)
        return found[: len(found) // 2] if len(found) > 2 else found

    monkeypatch.setattr(made, "trace", cut)
    for table in (
        lambda: analysis.ablations(made, [[5, 6], [7, 8]], "layers"),
        lambda: analysis.patching(made, [1, 2], [1, 3], 5, 6),
        lambda: analysis.counterfactuals(made, [1, 2]),
    ):
        with pytest.raises(KeyboardInterrupt):
            table()


def test_causes_that_cannot_be(made):
    with pytest.raises(ValueError, match="nothing to recover"):
        analysis.path_patching(made, [1, 2, 3], [1, 2, 3], (0, 0), 5, 6)
    with pytest.raises(ValueError, match="nothing to predict"):
        analysis.ablations(made, [[5], [6]], "layers")
    with pytest.raises(ValueError, match="phase 'decode'"):
        analysis.by_class(made.trace([1, 2], capture="attn_pattern"), LABELS, phase="decode")


def test_an_edit_around_a_sweep_is_for_all_of_it(made):
    """Its prompts are the variants': one that names some would be in some variants alone."""
    prompts = [planted.repeated(8, seed) for seed in range(2)]
    with made.edits(gs.ablate(layers=1)):
        assert analysis.ablations(made, prompts, "layers").effect[[1, planted.IDLE_LAYER]].abs().max() < 1e-5
    with made.edits(gs.ablate(layers=1, prompts=[0])), pytest.raises(ValueError, match="leave prompts= away"):
        analysis.ablations(made, prompts, "layers")


def test_a_sweep_of_one_prompt_says_so(made):
    for wrong in ("text", [], iter([[5]])):
        with pytest.raises(TypeError, match="expected a list of prompts; got"):
            analysis.ablations(made, wrong, "layers")
    with pytest.raises(TypeError, match="expected a list of prompts; got"):
        analysis.ablations(made, [5, 6, 7], "layers")
    for sender in (1, (1, 2, 3)):
        with pytest.raises(TypeError, match=r"expected \(layer, head\)"):
            analysis.path_patching(made, [1, 2], [1, 3], sender, 5, 6)
    with pytest.raises(TypeError, match=r"expected a list of prompts; got \[5, 6\]"):
        sweep(made, [5, 6], [[]])


def test_a_sweep_goes_on(made, tmp_path, monkeypatch):
    """Stopped between two of its dumps, and called again: the same table, and nothing is run twice."""
    monkeypatch.setattr("grokscope.analysis.causal.VARIANTS", 5)
    prompts = [planted.prompt(12, seed) for seed in range(2)]
    whole = analysis.ablations(made, prompts, "heads")

    def stop(done, total):
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis.ablations(made, prompts, "heads", directory=tmp_path, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["000000"]
    seen = []
    again = analysis.ablations(made, prompts, "heads", directory=tmp_path, progress=lambda *p: seen.append(p))
    pd.testing.assert_frame_equal(whole, again)
    assert seen == [(5, 13), (10, 13), (13, 13)]


# To the vocabulary


def test_attribution_adds_up(made, grok):
    """To the logit, and to nothing unexplained; what it says of a head is what a linear read-out says."""
    for model, prompt in ((made, planted.repeated(20, 0)[:30]), (grok, "The old keeper of the lighthouse went down")):
        trace = model.trace(prompt, capture=analysis.ATTRIBUTION)
        target = int(trace["logits"][-1].argmax())
        frame = analysis.attribution(model, trace, position=-1, target=target, against=7)
        actual = trace["logits"][-1, target] - trace["logits"][-1, 7]
        assert frame.logit.sum() == pytest.approx(actual, abs=1e-3)
        assert abs(frame[frame.part == "error"].logit.iloc[0]) < 1e-3
        assert (frame.part == "expert").sum() == 2 * model.config.num_layers
    frame = analysis.attribution(made, made.trace(planted.repeated(20, 0), capture=analysis.ATTRIBUTION), position=29)
    best = frame.loc[frame.logit.idxmax()]
    assert (best.part, best.layer, best["head"]) == ("head", *planted.INDUCTION)
    with pytest.raises(KeyError, match="attention_z|attn_z"):
        analysis.attribution(made, made.trace([1, 2]))
    with pytest.raises(TypeError, match="takes one Trace; got list"):
        analysis.attribution(made, [made.trace([1, 2])])


def test_attribution_of_an_edited_run(made):
    """A layer that was ablated adds nothing, what is added to the stream stands beside it, and nothing is left over."""
    prompt = planted.repeated(20, 0)[:30]
    towards = np.random.default_rng(0).normal(size=made.config.emb_size).astype(np.float32)
    with made.edits(gs.ablate(layers=1), gs.add("resid_post", 0.1 * towards, layers=2)):
        trace = made.trace(prompt, capture=analysis.ATTRIBUTION)
    frame = analysis.attribution(made, trace)
    assert abs(frame[frame.part == "error"].logit.iloc[0]) < 1e-3
    assert frame.logit.sum() == pytest.approx(trace["logits"][-2, trace.tokens[-1]], abs=1e-3)
    by_layer = frame.groupby("layer").logit.sum()
    assert abs(by_layer[1]) < 1e-3
    assert abs(frame[(frame.layer == 1) & (frame.part == "head")].logit).sum() > 1e-3
    edit = frame[frame.part == "edit"].set_index("layer").logit
    assert abs(edit[0]) < 1e-3 < abs(edit[2])


def test_the_lens_as_a_table(made):
    prompt = planted.repeated(20, 0)
    trace = made.trace(prompt, capture=[gs.capture("resid_post", reduce="lens", k=3), "resid_post", "logits"])
    frame = analysis.lens(trace)
    last = frame[(frame.layer == 2) & (frame.best == 0)]
    assert (last.token.to_numpy() == trace["logits"].argmax(-1)).all()
    e, scale = made.weight("embedding/w"), made.weight("embedding/final_norm/scale")
    x = trace["resid_post", 1]
    logits = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale @ e.T
    middle = frame[(frame.layer == 1) & (frame.best == 0)]
    assert (middle.token.to_numpy() == logits.argmax(-1)).mean() > 0.95
    assert (frame[(frame.layer == 1) & (frame.position > 20) & (frame.position < 40)]["rank"] == 0).all()
    assert (frame[(frame.layer == 0) & (frame.position > 20) & (frame.position < 40)]["rank"] > 0).any()
    with pytest.raises(KeyError, match="lens at 'resid_mid' was not captured"):
        analysis.lens(trace, "resid_mid")


def test_a_weight_by_name(made):
    assert made.weight("attention/key", 1).shape == (planted.D, planted.H * planted.C)
    assert made.weight("experts/down", 0)[planted.TWINS[0]] == pytest.approx(
        made.weight("experts/down", 0)[planted.TWINS[1]]
    )
    with pytest.raises(KeyError, match=r"no weight 'attention/q' of layer 0; there are .*attention/query"):
        made.weight("attention/q", 0)
