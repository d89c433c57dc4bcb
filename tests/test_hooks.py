"""Captures, reductions and edits, against the numpy oracle and against plain runs."""

import contextlib
import dataclasses
import functools
import gc
import json
import threading
from unittest import mock

import jax
import numpy as np
import oracle
import pytest

import grokscope as gs
from grokscope.run import decode, steps

TOKENS = [5, 0, 9, 11, 44, 8, 96, 3, 7]
NEW = 70  # more than a buffer of decode steps holds


@pytest.fixture(scope="module")
def small(random_checkpoint):
    with gs.load(random_checkpoint) as grok:
        yield grok


@pytest.fixture(scope="module")
def truth(small, random_checkpoint):
    """Generated tokens and the oracle's taps of them."""
    tokens = small.generate(TOKENS, NEW, stop_at_eos=False, capture=()).tokens
    return tokens, oracle.forward(*oracle.read_checkpoint(random_checkpoint), tokens)


def made(small, *wishes):
    return small.generate(TOKENS, NEW, stop_at_eos=False, capture=wishes)


def close(found, expected, atol=1e-4):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol)


# Captures


def test_selectors(small, truth):
    _, taps = truth
    trace = made(
        small,
        gs.capture("attn_pattern", layers=[2, 0], heads=[3, 1], positions=[1, 4, 70]),
        gs.capture("k", heads=-1, phase="decode"),
        gs.capture("resid_post", positions="last"),
        gs.capture("resid_pre", positions=slice(-2, 12), layers=slice(1, None)),
        gs.capture("router_probs", experts=[6, 2], steps=slice(0, None, 30)),
        gs.capture("logits", positions=-1),
    )
    close(trace["attn_pattern"], taps["attn_pattern"][[0, 2]][:, [3, 1]][:, :, [1, 4, 70]])
    close(trace["k"], taps["k"][:, len(TOKENS) :, [1]])
    close(trace["resid_post"], taps["resid_post"][:, [8]])
    close(trace["resid_pre"], taps["resid_pre"][1:, 7:12])
    close(trace["router_probs"], taps["router_probs"][:, [9, 39, 69]][..., [6, 2]])
    close(trace["logits"], taps["logits"][[8]])
    assert trace.coords("attn_pattern")["layer"].tolist() == [0, 2]
    assert trace.coords("attn_pattern")["head"].tolist() == [3, 1]
    assert trace.coords("attn_pattern")["position"].tolist() == [1, 4, 70]
    assert trace.coords("router_probs")["position"].tolist() == [9, 39, 69]
    close(trace["attn_pattern", 2], trace["attn_pattern"][1])


@pytest.mark.slow
def test_positions_of_several_blocks(grok):
    """As many (bucketed) as the second block, of 32, has positions, or as the first has."""
    tokens = np.arange(530) % 700 + 5
    whole = grok.trace(tokens, capture=["resid_post", "attn_pattern"])
    for picked in ([*range(10), *range(514, 524)], [*range(0, 520, 2), 525]):
        some = [gs.capture("resid_post", positions=picked), gs.capture("attn_pattern", layers=3, positions=picked)]
        few = grok.trace(tokens, capture=some)
        close(few["resid_post"], whole["resid_post"][:, picked])
        close(few["attn_pattern", 3], whole["attn_pattern", 3][:, picked])


@pytest.mark.slow
def test_a_lens_of_several_blocks(grok):
    tokens, lens = np.arange(530) % 700 + 5, {"reduce": "lens", "k": 1}
    whole = grok.trace(tokens, capture=["logits", gs.capture("resid_post", **lens)])
    np.testing.assert_array_equal(whole["resid_post.lens"][-1, :, 0], whole["logits"].argmax(-1))
    own = np.take_along_axis(whole["logits"][:-1], tokens[1:, None], axis=-1)
    np.testing.assert_array_equal(whole["resid_post.lens_rank"][-1, :-1], (whole["logits"][:-1] > own).sum(-1))
    for picked in ([*range(10), *range(514, 524)], [*range(0, 520, 2), 525]):
        few = grok.trace(tokens, capture=gs.capture("resid_post", layers=[1, 5], positions=picked, **lens))
        for key in ("resid_post.lens", "resid_post.lens_rank"):
            np.testing.assert_array_equal(few[key], whole[key][[1, 5]][:, picked])


def test_attention_in_parts_is_attention_as_a_whole(grok):
    """Long prompts attend in parts, unless a hook looks at scores or patterns."""
    tokens = np.arange(900) % 700 + 5
    parts = grok.trace(tokens, capture="attn_z")
    whole = grok.trace(tokens, capture=["attn_z", "attn_pattern"])
    close(parts["attn_z"], whole["attn_z"])
    close(parts.logprobs[1:], whole.logprobs[1:])
    with grok.edits(gs.scale("attn_pattern", 0.0, layers=2, heads=1, positions=slice(600, None))):
        edited = grok.trace(tokens, capture="attn_z")
    close(edited["attn_z", 2][:600], whole["attn_z", 2][:600])
    assert (edited["attn_z", 2][600:, 1] == 0).all()


def test_logits_in_parts_are_logits_as_a_whole(grok):
    """Log-probabilities come from parts of a block, unless a hook looks at logits."""
    tokens = np.arange(500) % 700 + 5
    whole = grok.trace(tokens, capture="logits")
    close(grok.trace(tokens).logprobs[1:], whole.logprobs[1:])
    with grok.edits(gs.scale("logits", 0.0, positions=slice(300, None))):
        edited = grok.trace(tokens)
    close(edited.logprobs[1:301], whole.logprobs[1:301])
    close(edited.logprobs[301:], np.full(199, -np.log(grok.config.vocab_size)))


def test_prompts_are_selected(small):
    traces = small.generate(
        [TOKENS, TOKENS[:4], TOKENS], 5, stop_at_eos=False, capture=gs.capture("resid_post", prompts=[0, -1])
    )
    assert ["resid_post" in t.taps for t in traces] == [True, False, True]
    assert traces[0]["resid_post"].shape == (3, 14, 48)


TOGETHER = {
    "positions": gs.capture("q", positions=[0, 3, -2], heads=[1]),
    "last": gs.capture("resid_pre", positions="last"),
    "mean": gs.capture("resid_mid", reduce="mean", positions=slice(2, None)),
    "count": gs.capture("expert_index", reduce="count"),
    "lens": gs.capture("resid_post", reduce="lens", k=2, name="lens"),
    "lens of some": gs.capture("resid_post", reduce="lens", k=2, positions=[1, -1], name="lens of some"),
    "one prompt's": gs.capture("v", prompts=[2], layers=1),
}


@pytest.mark.parametrize("new", [0, 3])
@pytest.mark.slow
def test_prompts_that_run_together(small, new):
    """Of several lengths, with an edit of one of them, each is what it is alone."""
    prompts = [TOKENS, TOKENS[:4], [7] * 40, TOKENS[::-1]] + ([] if new else [[9, 8] * 25, TOKENS[2:], [3]])
    wishes = ["attn_pattern", "resid_post", "logits", *TOGETHER.values()]
    change = dict(layers=1, positions=slice(2, None))

    def run(x):
        return small.generate(x, new, stop_at_eos=False, capture=wishes) if new else small.trace(x, capture=wishes)

    with small.edits(gs.scale("moe_delta", 0.5, prompts=0, **change)):
        together = run(prompts)
    for i, (prompt, trace) in enumerate(zip(prompts, together, strict=True)):
        wishes[-1] = gs.capture("v", layers=1) if i == 2 else "resid_post"
        wishes[3:-1] = [w for name, w in list(TOGETHER.items())[:-1] if len(prompt) > 2 or name in ("last", "count")]
        with small.edits(gs.scale("moe_delta", 0.5, **change)) if i == 0 else contextlib.nullcontext():
            alone = run(prompt)
        if len(prompt) > 2:
            assert alone.taps.keys() == trace.taps.keys()
        assert (alone.tokens == trace.tokens).all()
        close(trace.logprobs[1:], alone.logprobs[1:])
        for key, value in alone.taps.items():
            assert trace.numbers[key] == alone.numbers[key]
            if value.dtype.kind == "f":
                close(trace[key], value)
            else:
                assert (trace[key] != value).mean() < 0.05, key  # near ties


def test_reductions(small, truth):
    tokens, taps = truth
    labels = np.arange(97) % 3 - 1
    trace = made(
        small,
        gs.capture("attn_pattern", reduce="entropy", heads=[1, 2]),
        gs.capture("router_logits", reduce="entropy"),
        gs.capture("attn_pattern", reduce="topk", k=3),
        gs.capture("router_logits", reduce="topk", k=8),
        gs.capture("resid_post", reduce="norm"),
        gs.capture("expert_out", reduce="norm"),
        gs.capture("resid_post", reduce="mean", layers=1),
        gs.capture("attn_z", reduce="moments", positions=slice(2, 50)),
        gs.capture("expert_index", reduce="count"),
        gs.capture("expert_index", reduce="count", labels=labels, name="by_class", phase="decode"),
        gs.capture("resid_mid", reduce="lens", k=4),
        gs.capture("final_norm", reduce="mean"),
        gs.capture("embed", reduce="lens", k=1, positions=[0, 3, 40]),
    )
    pattern, probs = taps["attn_pattern"], taps["router_probs"]
    with np.errstate(divide="ignore", invalid="ignore"):
        close(trace["attn_pattern.entropy"], -np.nansum(pattern * np.log(pattern), -1)[:, [1, 2]])
    close(trace["router_logits.entropy"], -(probs * np.log(probs)).sum(-1))
    order = np.argsort(-pattern, -1, kind="stable")[..., :3]
    later = np.arange(len(tokens)) >= 2
    assert (trace["attn_pattern.topk"][..., later, :] == order[..., later, :]).mean() > 0.99
    close(trace["attn_pattern.topk_value"], -np.sort(-pattern, -1)[..., :3])
    assert (trace["attn_pattern.topk"][:, :, 0] == [0, -1, -1]).all()
    close(trace["router_logits.topk_value"], -np.sort(-taps["router_logits"], -1))
    close(trace["resid_post.norm"], np.linalg.norm(taps["resid_post"], axis=-1))
    close(trace["expert_out.norm"], np.linalg.norm(taps["expert_out"], axis=-1))
    close(trace["resid_post.mean"], taps["resid_post"][1:2].mean(1))
    part = taps["attn_z"][:, 2:50]
    close(trace["attn_z.moments"], np.stack([part.mean(1), part.var(1)], 1))
    assert trace.numbers["attn_z.moments"]["T"] == list(range(2, 50))
    chosen = taps["expert_index"][..., None] == np.arange(8)
    assert (trace["expert_index.count"] == chosen.sum((1, 2))).all()
    by_class = [chosen[:, 9:][:, labels[tokens[9:]] == c].sum((1, 2)) for c in (0, 1)]
    assert (trace["by_class"] == np.stack(by_class, 1)).all()
    close(trace["final_norm.mean"], taps["final_norm"].mean(0))
    lens = oracle_lens(small, taps["resid_mid"])
    assert (trace["resid_mid.lens"] == np.argsort(-lens, -1)[..., :4]).mean() > 0.99
    close(trace["resid_mid.lens_logprob"], -np.sort(-lens, -1)[..., :4])
    target = np.take_along_axis(lens[:, :-1], tokens[None, 1:, None], -1)
    rank = (lens[:, :-1] > target).sum(-1)
    assert (trace["resid_mid.lens_rank"][:, :-1] == rank).mean() > 0.99
    assert (trace["resid_mid.lens_rank"][:, -1] == -1).all()
    close(trace["embed.lens_logprob"][:, 0], oracle_lens(small, taps["embed"]).max(-1)[[0, 3, 40]])


def oracle_lens(grok, stream):
    config, weights = oracle.read_checkpoint(grok._checkpoint.directory)
    logits = oracle.norm(stream, weights["final_norm"]) @ weights["embedding"].T * config.output_multiplier_scale
    return np.log(oracle.softmax(logits))


def test_spellings(small):
    def taps(*wishes):
        return {t: trace.layers.get(t) for t in trace.taps} if (trace := small.trace([5, 6], capture=wishes)) else None

    assert taps("blocks.1.attn.hook_pattern")["attn_pattern"] == [1]
    assert taps("blocks.*.hook_resid_post")["resid_post"] == [0, 1, 2]
    assert {"resid_pre", "resid_mid", "resid_post"} <= set(taps("resid_*"))
    both = taps("*", gs.capture("q", layers=2))
    assert both["q"] == [2]
    assert set(both) == set(gs.TAPS)
    assert taps(gs.capture("router_logits", layers=0))["router_logits"] == [0]


def test_attention_afterwards(small, truth):
    _, taps = truth
    trace = made(small, gs.capture("attn_pattern", later=True, layers=[0, 2]))
    assert "attn_pattern" not in trace.taps
    close(trace.attention(), taps["attn_pattern"][[0, 2]])
    for layers, heads in ((2, [3]), (-1, [-1])):  # of three and four
        some = trace.attention(layers=layers, heads=heads, positions=[4, 70])
        close(some, taps["attn_pattern"][[2]][:, [3]][:, :, [4, 70]])
    with pytest.raises(KeyError, match="needs the taps"):
        made(small).attention()
    with pytest.raises(KeyError, match="layer 1 of 'q' was not kept"):
        trace.attention(layers=1)


@pytest.mark.parametrize(
    ("wish", "error", "words"),
    [
        (lambda: "resid_pots", KeyError, "nearest: resid_post"),
        (lambda: "blocks.3.hook_resid_post", KeyError, "nearest"),
        (lambda: gs.capture("resid_post", layers=3), ValueError, "layers 0 to 2"),
        (lambda: gs.capture("resid_post", heads=0), ValueError, "resid_post has no heads"),
        (lambda: gs.capture("attn_pattern", heads=4), ValueError, "heads 0 to 3"),
        (lambda: gs.capture("resid_post", reduce="entropie"), ValueError, "nearest: entropy"),
        (lambda: gs.capture("resid_post", reduce="entropy"), ValueError, "it has norm, lens, mean, moments"),
        (lambda: gs.capture("resid_post", positions=500), ValueError, "is about no position"),
        (lambda: gs.capture("resid_post", positions="first"), ValueError, '"last"'),
        (lambda: gs.capture("resid_post", layers="all"), TypeError, "an int, a list of ints or a slice"),
        (lambda: gs.capture("resid_post", phase="prefil"), ValueError, "prefill"),
        (lambda: gs.capture("resid_post", prompts=4), ValueError, "prompts 0 to 0"),
        (lambda: gs.capture("resid_post", steps=-1), ValueError, "counted from 0"),
        (lambda: gs.capture("logits", layers=1), ValueError, "has no layers"),
        (lambda: gs.capture("expert_index", reduce="count", labels=[0, 1]), ValueError, "one for each of 97"),
        (lambda: ["resid_post", gs.capture("resid_post", positions=1)], ValueError, "captured twice"),
        (lambda: 7, TypeError, "capture=7: expected names of taps"),
    ],
)
def test_impossible_captures(small, wish, error, words):
    with pytest.raises(error, match=words):
        small.generate([5, 6], 3, capture=wish())


# Edits: the oracle with the edit applied by hand


def edited_oracle(grok, tokens, change):
    """The oracle's taps with change(name, layer, value, taps) -> value at each tap of a layer."""

    config, weights = oracle.read_checkpoint(grok._checkpoint.directory)
    x = weights["embedding"][tokens] * config.embedding_multiplier_scale
    layers = []
    for layer in range(config.num_layers):
        w = {name.split("/")[1]: value for name, value in weights.items() if name.startswith(f"{layer}/")}
        here = {"resid_pre": change("resid_pre", layer, x)}
        x = here["resid_pre"]
        attended = {}
        oracle.attention(attended, config, w, oracle.norm(x, w["norm_0"]))
        z = here["attn_z"] = change("attn_z", layer, attended["attn_z"])
        out = z.reshape(len(tokens), -1) @ w["out"]
        here["attn_delta"] = change("attn_delta", layer, oracle.norm(out, w["norm_1"]))
        x = x + here["attn_delta"]
        normed = oracle.norm(x, w["norm_2"])
        logits = here["router_logits"] = change("router_logits", layer, normed @ w["router"])
        probs = oracle.softmax(logits)
        index = np.argsort(-probs, -1, kind="stable")[:, : config.num_selected_experts]
        choice = [[(e, probs[t, e]) for e in index[t]] for t in range(len(tokens))]
        choice = here["choice"] = change("choice", layer, (choice, probs))[0]
        mixed = np.zeros_like(x)
        for t, pairs in enumerate(choice):
            for e, gate in pairs:
                hidden = oracle.gelu(normed[t] @ w["gate"][e]) * (normed[t] @ w["up"][e])
                mixed[t] += gate * change("expert_out", layer, (hidden @ w["down"][e], t, e))[0]
        here["moe_delta"] = change("moe_delta", layer, oracle.norm(mixed, w["norm_3"]))
        x = x + here["moe_delta"]
        here["resid_post"] = x = change("resid_post", layer, x)
        layers.append(here)
    return {name: [here[name] for here in layers] for name in layers[0]}


def at(tap, layers, fn):
    return lambda name, layer, value: fn(value) if name == tap and layer in layers else value


def rechosen(layers, fn):
    """A change of the choice of experts: fn([(expert, gate)], probs) -> [(expert, gate)]."""

    def change(value):
        choice, probs = value
        return [fn(pairs, p) for pairs, p in zip(choice, probs, strict=True)], probs

    return at("choice", layers, change)


def times(value, factor, index):
    value = value.copy()
    value[index] *= factor
    return value


def forced(experts):
    def choose(pairs, probs):
        mass, total = sum(g for _, g in pairs), probs[experts].sum()
        return [(e, mass * probs[e] / total) for e in sorted(experts, key=lambda e: -probs[e])]

    return choose


VECTOR = np.linspace(-2, 2, 48)

EDITS = {
    "scale": (lambda: gs.scale("moe_delta", 3.0, layers=1), at("moe_delta", [1], lambda v: 3 * v)),
    "scale_head": (lambda: gs.scale("attn_z", -2, heads=1), at("attn_z", [0, 1, 2], lambda v: times(v, -2, np.s_[:, 1]))),
    "add": (lambda: gs.add("resid_post", VECTOR, layers=[0]), at("resid_post", [0], lambda v: v + VECTOR)),
    "set_last": (
        lambda: gs.set("resid_pre", 0.5, layers=-1, positions=[3]),
        at("resid_pre", [2], lambda v: np.where(np.arange(len(v))[:, None] == 3, 0.5, v)),
    ),
    "ablate_heads": (lambda: gs.ablate(heads=[0, 3], layers=1), at("attn_z", [1], lambda v: times(v, 0, np.s_[:, [0, 3]]))),
    "ablate_experts": (
        lambda: gs.ablate(experts=[2, 5], layers=slice(1, 3)),
        at("expert_out", [1, 2], lambda v: (v[0] * (v[2] not in (2, 5)), *v[1:])),
    ),
    "ablate_layers": (
        lambda: gs.ablate(layers=1),
        lambda name, layer, v: v * 0 if layer == 1 and name in ("attn_delta", "moe_delta") else v,
    ),
    "ban": (
        lambda: gs.route.ban(experts=[1, 4], layers=0),
        at("router_logits", [0], lambda v: np.where(np.isin(np.arange(8), [1, 4]), -np.inf, v)),
    ),
    "bias": (lambda: gs.route.bias(np.arange(8) / 4), at("router_logits", [0, 1, 2], lambda v: v + np.arange(8) / 4)),
    "force": (lambda: gs.route.force([3], layers=1), rechosen([1], forced([3]))),
    "force_wide": (lambda: gs.route.force([6, 0, 2], layers=2), rechosen([2], forced([6, 0, 2]))),
    "swap": (
        lambda: gs.route.swap(2, 7),
        rechosen([0, 1, 2], lambda pairs, _: [({2: 7, 7: 2}.get(e, e), g) for e, g in pairs]),
    ),
    "top_1": (lambda: gs.route.top_k(1, layers=1), rechosen([1], lambda pairs, _: pairs[:1])),
    "top_4": (
        lambda: gs.route.top_k(4, layers=1),
        rechosen([1], lambda _, probs: [(e, probs[e]) for e in np.argsort(-probs)[:4]]),
    ),
    "uniform": (lambda: gs.route.gates("uniform"), rechosen([0, 1, 2], lambda pairs, _: [(e, 0.5) for e, _ in pairs])),
    "renormalised": (
        lambda: gs.route.gates("renormalised"),
        rechosen([0, 1, 2], lambda pairs, _: [(e, g / sum(h for _, h in pairs)) for e, g in pairs]),
    ),
    "function": (
        lambda: gs.edit("resid_post", halve_odd_layers),
        at("resid_post", [1], lambda v: v / 2),
    ),
}  # fmt: skip


def halve_odd_layers(value, layer, positions):
    return jax.numpy.where(layer % 2 == 1, value / 2, value)


@pytest.mark.parametrize("name", EDITS)
def test_edits_equal_the_oracle(small, name):
    """Prompt and generated tokens alike."""
    edit, change = EDITS[name]
    with small.edits(edit()):
        trace = small.generate(TOKENS, 6, stop_at_eos=False, capture=["resid_post", "router_logits"])
    expected = edited_oracle(small, trace.tokens, change)
    close(trace["resid_post"], np.stack(expected["resid_post"]), atol=3e-4)
    for layer, choice in enumerate(expected["choice"]):
        found = trace["expert_index", layer]
        assert [[e for e in row if e >= 0] for row in found.tolist()] == [[e for e, _ in row] for row in choice]
    plain = small.trace(trace.tokens, capture="resid_post")
    assert np.abs(plain["resid_post"] - trace["resid_post"]).max() > 1e-3, "the edit does nothing"


def test_patch(small):
    """From another Trace, by a map of positions; a whole patch makes the rest equal."""
    other = small.trace([9, 8, 7, 6], capture="resid_post")
    with small.edits(gs.patch(other, "resid_post", layers=1, positions={5: 2, -1: 3})):
        trace = small.trace(TOKENS, capture="resid_post")
    plain = small.trace(TOKENS, capture="resid_post")
    close(trace["resid_post", 1][[5, 8]], other["resid_post", 1][[2, 3]], atol=0)
    rest = [0, 1, 2, 3, 4, 6, 7]
    close(trace["resid_post", 1][rest], plain["resid_post", 1][rest], atol=0)
    assert np.abs(trace["resid_post", 2] - plain["resid_post", 2])[5:].max() > 1e-3
    with small.edits(gs.patch(other, "resid_post", layers=2)):
        close(
            small.trace([1, 2, 3, 4], capture="logits")["logits"], small.trace([9, 8, 7, 6], capture="logits")["logits"]
        )
    with pytest.raises(KeyError, match="was not captured"), small.edits(gs.patch(other, "q")):
        pass
    with (
        pytest.raises(ValueError, match="reads position 9"),
        small.edits(gs.patch(other, "resid_post", positions={1: 9})),
    ):
        small.trace(TOKENS)
    with (
        pytest.raises(ValueError, match="names one position twice: 8 and -1 of a prompt of 9 tokens"),
        small.edits(gs.patch(other, "resid_post", positions={8: 1, -1: 2})),
    ):
        small.trace(TOKENS)


def test_patched_experts_among_other_edits_of_the_choice(small):
    """In the order given; gates stay, by rank."""
    other = small.trace(TOKENS[::-1], capture="expert_index")
    patch, patched = gs.patch(other, "expert_index", layers=1), other["expert_index", 1]
    plain = small.trace(TOKENS)
    index, gates = plain["expert_index", 1], plain["expert_gate", 1]
    assert (patched != index).any(1).mean() > 0.5
    mass, nobody, none = gates.sum(1), np.full(len(TOKENS), -1), np.zeros(len(TOKENS))
    swapped = np.array([0, 1, 7, 3, 4, 5, 6, 2])[patched]
    swap, force = gs.route.swap(2, 7, layers=1), gs.route.force([3], layers=1)
    expected = [
        ([patch], patched, gates),
        ([patch, swap], swapped, gates),
        ([swap, patch], patched, gates),
        ([patch, force], np.stack([nobody + 4, nobody], 1), np.stack([mass, none], 1)),
        ([force, patch], patched, np.stack([mass, none], 1)),
    ]
    for edits, experts, weights in expected:
        with small.edits(*edits):
            trace = small.trace(TOKENS, capture=["expert_out", "moe_out"])
        assert (trace["expert_index", 1] == experts).all(), edits
        close(trace["expert_gate", 1], weights)
        close(trace["moe_out", 1], (weights[..., None] * trace["expert_out", 1]).sum(1))
    first = gs.patch(other, "expert_index", layers=1, prompts=0, positions=slice(2, None))
    with small.edits(first, gs.route.swap(2, 7, layers=1, prompts=0)):
        made, plain = small.generate([TOKENS[:5], TOKENS[:5]], 4, stop_at_eos=False)
    assert (made["expert_index", 1][2:] == swapped[2:9]).all(), "prompt and generated tokens"
    close(plain["router_logits"], small.trace(plain.tokens)["router_logits"])
    with (
        pytest.raises(ValueError, match="leave experts= away"),
        small.edits(gs.patch(other, "expert_index", experts=2)),
    ):
        small.trace(TOKENS)


def test_an_edit_stays_what_it_was_made(small):
    """Its array is a copy; what a function closes over is read by each call."""
    plain = small.trace(TOKENS, capture="logits")["logits"]
    vector, factor = np.zeros(48, np.float32), [1.0]
    made = [
        gs.add("resid_post", vector),
        gs.scale("attn_z", vector[:1] + 1),
        gs.edit("resid_post", lambda v, *_: v * factor[0]),
    ]
    vector += 50
    with small.edits(*made):
        close(small.trace(TOKENS, capture="logits")["logits"], plain)
        factor[0] = 0.5
        assert np.abs(small.trace(TOKENS, capture="logits")["logits"] - plain).max() > 1e-3
    for wrong in (None, 1j, [[1], [1, 2]]):
        with pytest.raises(TypeError, match="expected a number or an array of numbers"):
            gs.add("resid_post", wrong)
    with pytest.raises(TypeError, match="ablate has no 'layer'"):
        gs.ablate(layer=1)
    with pytest.raises(ValueError, match="force needs the experts"):
        gs.route.force(experts=None)


def test_identities_change_nothing(small):
    wish = ["logits", "resid_post"]
    plain = small.generate(TOKENS, 8, stop_at_eos=False, capture=wish)
    identity = [gs.scale("moe_delta", 1), gs.add("resid_post", 0), gs.route.bias(np.zeros(8)), gs.route.top_k(2),
                gs.patch(small.trace(TOKENS, capture="attn_z"), "attn_z", phase="prefill")]  # fmt: skip
    with small.edits(*identity):
        edited = small.generate(TOKENS, 8, stop_at_eos=False, capture=wish)
    assert (edited.tokens == plain.tokens).all()
    for tap in plain.taps:
        close(edited[tap], plain[tap], atol=2e-5)


@pytest.mark.slow
def test_a_batch_with_an_edit_each(small):
    edits = [gs.scale("moe_delta", 0.1 * i, layers=i % 3, prompts=i, phase="decode") for i in range(10)]
    edits += [gs.route.ban(experts=i % 8, prompts=i) for i in range(10)]
    prompts = [TOKENS[: 2 + i % 5] for i in range(10)]
    with small.edits(*edits):
        together = small.generate(prompts, 12, stop_at_eos=False, capture="resid_post")
    for i in (0, 4, 9):
        with small.edits(gs.scale("moe_delta", 0.1 * i, layers=i % 3, phase="decode"), gs.route.ban(experts=i % 8)):
            alone = small.generate(prompts[i], 12, stop_at_eos=False, capture="resid_post")
        assert (alone.tokens == together[i].tokens).all()
        close(alone["resid_post"], together[i]["resid_post"])


def test_edits_nest_and_end(small):
    plain = small.trace(TOKENS, capture="logits")["logits"]
    with pytest.raises(ZeroDivisionError), small.edits(gs.ablate(layers=0)):
        with small.edits(gs.ablate(layers=1)):
            assert len(small.trace(TOKENS).meta["edits"]) == 2
        assert small.trace(TOKENS).meta["edits"] == [{"op": "ablate", "layers": [0]}]
        found = []
        thread = threading.Thread(target=lambda: found.append(small.trace(TOKENS).meta["edits"]))
        thread.start()
        thread.join()
        assert found == [[]]
        1 / 0
    assert (small.trace(TOKENS, capture="logits")["logits"] == plain).all()


def test_edits_that_end_out_of_turn(small):
    """Each takes away its own, and says that calls in between had more."""

    def lengths(edit):
        with small.edits(edit):
            for _ in range(2):
                yield len(small.current_edits)

    one, other = lengths(gs.ablate(layers=0)), lengths(gs.ablate(layers=1))
    assert [next(one), next(other)] == [1, 2]
    with pytest.raises(RuntimeError, match="calls in between ran with both; a `yield`"):
        list(one)
    assert [edit.json()["layers"] for edit in small.current_edits] == [[1]]
    assert list(other) == [1]
    assert small.current_edits == []


def test_edits_as_json():
    edits = [gs.scale("attn_z", 0.5, heads=[1, 2], positions=slice(2, None)), gs.route.ban(experts=3, layers=1),
             gs.add("resid_post", [1.0, 2.0], phase="decode"), gs.ablate(experts=1), gs.route.force([1, 2])]  # fmt: skip
    for edit in edits:
        text = json.dumps(edit.json())
        assert gs.Edit.from_json(json.loads(text)).json() == edit.json()
    with pytest.raises(ValueError, match="cannot be read back"):
        gs.Edit.from_json(gs.edit("q", halve_odd_layers).json())


def test_decode_edits_spare_the_first_token(small):
    plain = small.generate(TOKENS, 6, stop_at_eos=False)
    with small.edits(gs.set("logits", np.eye(97)[42] * 100, phase="decode")):
        edited = small.generate(TOKENS, 6, stop_at_eos=False)
    assert edited.tokens[9] == plain.tokens[9]
    assert edited.tokens[10:].tolist() == [42] * 5


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda: gs.scale("resid_pots", 2), KeyError, "nearest: resid_post"),
        (lambda: gs.add("resid_post", [1.0, 2.0]), ValueError, "does not fit"),
        (lambda: gs.scale("resid_post", 2, layers=9), ValueError, "layers 0 to 2"),
        (lambda: gs.scale("resid_post", 2, heads=1), ValueError, "has no heads"),
        (lambda: gs.scale("resid_post", "x"), TypeError, "a number"),
        (lambda: gs.scale("resid_post", 2, layer=1), TypeError, "selectors are"),
        (lambda: gs.route.ban(experts=range(7)), ValueError, "leave 1 experts"),
        (lambda: gs.route.top_k(9), ValueError, "8 experts"),
        (lambda: gs.route.top_k(0), ValueError, "from 1"),
        (lambda: gs.route.gates("even"), ValueError, "uniform"),
        (lambda: gs.ablate(), ValueError, "needs heads"),
        (lambda: gs.scale("expert_index", 2), ValueError, "grokscope.route"),
        (lambda: gs.scale("resid_post", 2, positions=300), ValueError, "about no position"),
        (lambda: "ban", TypeError, "not an edit"),
        (lambda: gs.edit("q", lambda v, layer, p: v[:1]), ValueError, "expected the shape it got"),
    ],
)
def test_impossible_edits(small, edit, error, words):
    with pytest.raises(error, match=words), small.edits(edit()):
        small.trace(TOKENS)


def test_forced_and_banned(small):
    with small.edits(gs.route.ban(experts=3), gs.route.force([3])):
        with pytest.raises(ValueError, match="expert 3 is both"):
            small.trace(TOKENS)
        with pytest.raises(ValueError, match="expert 3 is both"):
            small.plan([TOKENS])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"positions": slice(0, 3)}, {"positions": slice(3, None)}),
        ({"positions": slice(0, -1)}, {"positions": -1}),
        ({"steps": 0}, {"steps": 1}),
        ({"phase": "prefill"}, {"steps": slice(0, None)}),
        ({"prompts": slice(0, 1)}, {"prompts": slice(1, 2)}),
        ({"layers": 0}, {"layers": [1, 2]}),
    ],
)
def test_bans_that_do_not_meet(small, one, other):
    """Together they leave one expert, but no token has both; or takes no more."""
    few, more = gs.route.ban(range(4), **one), gs.route.ban([4, 5, 6], **other)
    with small.edits(few, more):
        small.plan([TOKENS, TOKENS], 2)
    with small.edits(few, gs.route.ban([4, 5, 6])):
        with pytest.raises(ValueError, match="leave 1 experts in layer 0; a token takes 2"):
            small.plan([TOKENS, TOKENS], 2)
        with small.edits(gs.route.top_k(1)):
            small.plan([TOKENS, TOKENS], 2)


def test_a_factor_that_a_norm_undoes_warns():
    for spelling in ("moe_out", "blocks.*.hook_mlp_out"):
        with pytest.warns(UserWarning, match="scale moe_delta instead"):
            gs.scale(spelling, 2)
    gs.scale("moe_out", 0)


@pytest.mark.slow
def test_values_for_fewer_experts_than_a_token_takes(small):
    """Where another edit makes room for more, in another layer or of another prompt: what is edited is the same."""
    taps = ["expert_index", "expert_gate", "expert_out", "moe_out"]
    source = small.trace(TOKENS, capture=taps)
    patch = [gs.patch(source, tap, layers=1, prompts=0) for tap in taps[:3]]
    with small.edits(gs.scale("resid_pre", 0.5, layers=1), *patch):
        alone = small.trace([TOKENS], capture=taps)[0]
    np.testing.assert_allclose(alone["moe_out", 1], source["moe_out", 1], atol=1e-6)
    with small.edits(gs.scale("resid_pre", 0.5, layers=1), gs.route.top_k(4, prompts=1), *patch):
        first, second = small.trace([TOKENS, TOKENS], capture=taps)
    assert first["expert_index"].shape[-1] == 4
    for tap in taps[:2]:
        assert (first[tap, 1][:, :2] == source[tap, 1]).all()
    assert (first["expert_index", 1][:, 2:] == -1).all()
    np.testing.assert_allclose(first["moe_out", 1], source["moe_out", 1], atol=1e-6)
    assert (second["expert_index"] >= 0).all()

    with small.edits(gs.route.top_k(4)):
        four = small.trace(TOKENS, capture=taps)
    with small.edits(gs.route.top_k(4), gs.set("expert_gate", [0.5, 0.25], layers=2)):
        gates = small.trace(TOKENS, capture=taps)["expert_gate", 2]
    assert (gates[:, :2] == [0.5, 0.25]).all()
    np.testing.assert_array_equal(gates[:, 2:], four["expert_gate", 2][:, 2:])
    with small.edits(gs.route.top_k(4), gs.patch(four, "expert_out")):
        np.testing.assert_array_equal(small.trace(TOKENS, capture=taps)["moe_out"], four["moe_out"])
    for edit in (gs.patch(four, "expert_out"), gs.set("expert_gate", [0.1] * 4)):
        with small.edits(edit), pytest.raises(ValueError, match=r"for 4 experts .* takes 2; put .*route.top_k\(4\)"):
            small.trace(TOKENS)
    vector = np.ones(small.config.emb_size, np.float32)
    for value, shape in ((vector, (4, 1)), (vector[None], (4, 1)), (np.stack([vector, vector]), (2, 1))):
        with small.edits(gs.route.top_k(4), gs.set("expert_out", value, layers=1)):
            out = small.trace(TOKENS, capture=taps)["expert_out", 1]
        assert (out[:, : shape[0]] == 1).all()
        assert (out[:, shape[0] :] != 1).all()
    with small.edits(gs.set("expert_gate", [0.5, 0.25], prompts=1), gs.patch(source, "expert_gate", prompts=0)):
        first, second = small.trace([TOKENS, TOKENS], capture=taps)
    assert (first["expert_gate"] == source["expert_gate"]).all()
    assert (second["expert_gate"] == [0.5, 0.25]).all()
    both = [gs.patch(one, "expert_gate", prompts=i) for i, one in enumerate((source, four))]  # of two and of four
    with small.edits(gs.route.top_k(4), *both):
        first, second = small.trace([TOKENS, TOKENS], capture=taps)
    assert (first["expert_gate"][..., :2] == source["expert_gate"]).all()
    assert (second["expert_gate"] == four["expert_gate"]).all()


def test_selectors_of_numpy(small):
    where = dict(positions=np.array([1, 2]))
    trace = small.trace(TOKENS, capture=gs.capture("resid_post", **where))
    assert trace.numbers["resid_post"]["T"] == [1, 2]
    with small.edits(gs.scale("resid_post", 0.5, layers=0, **where)):
        edited = small.trace(TOKENS, capture="resid_post")
    whole = small.trace(TOKENS, capture="resid_post")
    np.testing.assert_array_equal(edited["resid_post", 0][[1, 2]], whole["resid_post", 0][[1, 2]] / 2)


def test_a_plan_is_of_the_edits_in_force(small):
    with small.edits(gs.route.top_k(8)):
        plan, trace = (call(TOKENS, capture="expert_out") for call in (small.plan, small.trace))
    assert plan.total["host"] == sum(a.nbytes for a in trace.taps.values())


def test_one_edits_in_two_threads(small):
    """Entered by both before either leaves: each has its own."""
    both = small.edits(gs.ablate(layers=0))
    inside, found = threading.Barrier(2), []

    def run():
        with both:
            inside.wait(10)
            found.append("in")
        inside.wait(10)
        found.append("out")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(found) == ["in", "in", "out", "out"]
    assert small.trace(TOKENS).meta["edits"] == []


def test_functions_are_told_apart():
    """By large arrays that they close over, and by functions inside of them."""

    def closing(array):
        return gs.edit("resid_mid", lambda x, layer, positions: x * array[0])

    def nested(factor):
        source = f"def fn(x, layer, positions):\n    return (lambda y: y * {factor})(x)"
        exec(source, namespace := {"__name__": "nested"})
        return gs.edit("resid_mid", namespace["fn"])

    ones, other = np.ones(5000), np.ones(5000)
    other[2500] = 2

    def calling(*functions):
        def itself(x, layer, positions):
            return itself if x is None else functions[0](x)

        return gs.edit("resid_mid", itself)

    class Scaled:
        def __init__(self, by):
            self.by = by

        def __call__(self, x, *_):
            return x * self.by

    assert closing(ones).json() == closing(ones.copy()).json() != closing(other).json()
    assert calling(np.tanh, len).json() == calling(np.tanh, len).json() != calling(np.sinh, len).json()
    assert calling(Scaled(ones)).json() == calling(Scaled(ones.copy())).json() != calling(Scaled(other)).json()
    partial = [
        gs.edit("resid_mid", functools.partial(lambda x, layer, positions, by: x * by, by=by)).json()
        for by in (ones, ones.copy(), other)
    ]
    assert partial[0] == partial[1] != partial[2]
    methods = [gs.edit("resid_mid", Scaled(by).__call__).json() for by in (ones, ones.copy(), other)]
    assert methods[0] == methods[1] != methods[2]

    class Settings:
        def __init__(self, by):
            self.by, self.own = by, self

    def set_by(settings):
        return gs.edit("resid_mid", lambda x, layer, positions: x * settings.by).json()

    settings = [set_by(Settings(by)) for by in (ones, ones.copy(), other)]
    assert settings[0] == settings[1] != settings[2]
    keys = [
        gs.edit("resid_mid", functools.partial(lambda key, *x: x[0], jax.random.key(seed))).json() for seed in (0, 0, 1)
    ]
    assert keys[0] == keys[1] != keys[2]
    assert nested("2.0").json() == nested("2.0").json() != nested("3.0").json()


FACTOR = 1.0


def by_a_global(x, layer, positions):
    return (lambda: x * FACTOR)()


def test_a_function_is_what_it_has_become(small, monkeypatch):
    """Its object's attributes and its globals may change between runs, as in a sweep."""

    class Scale:
        by = 1.0

        def run(self, x, layer, positions):
            return x * self.by

    scale = Scale()
    plain = small.trace(TOKENS, capture="resid_post")["resid_post", 2]
    for by in (0.5, 2.0, 0.5):
        scale.by = by
        monkeypatch.setitem(globals(), "FACTOR", by)
        for fn in (scale.run, by_a_global):
            with small.edits(gs.edit("resid_post", fn, layers=2)):
                close(small.trace(TOKENS, capture="resid_post")["resid_post", 2], plain * by)


def test_a_sweep_over_functions_does_not_hold_their_code(small, monkeypatch):
    monkeypatch.setattr(steps, "FUNCTIONS", 1)
    monkeypatch.setattr(steps, "_met", set())
    plain = small.trace(TOKENS, capture="resid_post")["resid_post", 2]
    held = []
    for by in (1.0, 0.5, 2.0, 3.0, 4.0):
        with small.edits(gs.edit("resid_post", lambda x, layer, positions, by=by: x * by, layers=2)):
            close(small.trace(TOKENS, capture="resid_post")["resid_post", 2], plain * by)
        gc.collect()
        held.append(len(jax.devices()[0].client.live_executables()))
    assert held[3] == held[2] + 1
    assert held[4] == held[2]


def test_a_function_knows_padding_by_its_positions(small):
    def centre(x, layer, positions):
        there = positions[:, None] >= 0
        return x - jax.numpy.mean(x, 0, where=there, keepdims=True)

    plain = small.trace(TOKENS, capture="resid_post")["resid_post", 2]
    with small.edits(gs.edit("resid_post", centre, layers=2)):
        close(small.trace(TOKENS, capture="resid_post")["resid_post", 2], plain - plain.mean(0))


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda x, layer, positions: np.asarray(x), "use jax.numpy instead of numpy"),
        (lambda x, layer, positions: x if layer else -x, "jax.numpy.where instead of `if`"),
        (lambda x: x, "expected a function of"),
        (lambda x, layer, positions: None, "returned None"),
    ],
)
def test_functions_that_cannot_be_compiled(small, fn, text):
    with pytest.raises((TypeError, ValueError), match=text), small.edits(gs.edit("resid_post", fn)):
        small.trace(TOKENS[:3])


def test_attention_that_was_edited_by_another_name(small):
    with small.edits(gs.scale("blocks.*.attn.hook_pattern", 0.5)):
        trace = small.trace(TOKENS, capture=gs.capture("attn_pattern", later=True))
    with pytest.raises(ValueError, match="edited attn_pattern"):
        trace.attention()


def test_attention_of_one_layer_by_its_other_name(small):
    trace = small.trace(TOKENS, capture=gs.capture("blocks.2.attn.hook_pattern", later=True))
    assert trace.layers["q"] == trace.layers["k"] == [2]


def test_some_experts_are_no_table(small, tmp_path):
    """Of the router's logits: what it would say would be of those alone."""
    for experts in ([0, 1], slice(None, None, -1)):
        trace = small.trace(TOKENS, capture=gs.capture("router_logits", experts=experts))
        assert trace.tables == ["tokens"]
        with pytest.raises(ValueError, match="all experts"):
            trace.to_pandas("router")
    trace.save(tmp_path / "one")
    dump = small.dump([TOKENS], tmp_path / "many", capture=gs.capture("router_logits", experts=[0, 1]))
    assert len(dump.to_pandas("tokens")) == len(TOKENS)


# What it costs


def test_other_values_compile_nothing(small):
    def run(layer, heads, position, factor, prompt, expert):
        wishes = [gs.capture("attn_pattern", layers=layer, heads=heads, positions=[position])]
        with small.edits(gs.scale("moe_delta", factor, layers=layer), gs.route.ban(experts=expert, layers=layer)):
            small.generate(prompt, 4, stop_at_eos=False, capture=wishes)

    run(1, [0, 1], 2, 0.5, TOKENS, 3)
    with compilations() as found:
        run(2, [3, 1], 5, 4.0, TOKENS[::-1], 6)
    assert found == []
    with compilations() as found:
        run(2, [1], 5, 4.0, TOKENS, 6)
    assert sum("_layer" in name for name in found) <= 2, found


@pytest.mark.slow
def test_layers_of_which_different_things_are_kept(small):
    """They are one compiled step, and what is kept is what a capture of all layers has there."""

    def wishes(*layers):
        kinds = [
            ("attn_out", {}),
            ("moe_out", {}),
            ("resid_post", {"reduce": "lens"}),
            ("router_probs", {"reduce": "topk"}),
        ]
        return [gs.capture(tap, layers=at, **of) for (tap, of), at in zip(kinds, layers, strict=True)]

    def run(captures):
        return small.generate([TOKENS, TOKENS[:5]], 70, capture=captures, stop_at_eos=False)

    picked = [[0, 2], [1], [2], [0]]
    with compilations() as found:
        some = run(wishes(*picked))
    assert [sum(step in name for name in found) for step in ("(_layer)", "(decode_layers)")] == [1, 1], found
    for one, whole in zip(some, run(wishes(*[[0, 1, 2]] * 4)), strict=True):
        assert list(one.taps) == list(whole.taps)
        for tap in one.taps:
            np.testing.assert_array_equal(one[tap], whole[tap][one.layers[tap]], err_msg=tap)
        assert [
            one.layers[tap] for tap in ("attn_out", "moe_out", "resid_post.lens_rank", "router_probs.topk")
        ] == picked


def test_a_layer_of_which_something_large_is_kept(small):
    """A step of one token is the same for all layers even then; a prompt's is not."""

    def run(layers):
        captures = [gs.capture("attn_pattern", layers=layers), gs.capture("expert_hidden", layers=layers)]
        return small.generate([TOKENS * 3, TOKENS[:5]], 20, capture=captures, stop_at_eos=False)

    with compilations() as found:
        some = run([1])
    assert [sum(step in name for name in found) for step in ("(_layer)", "(decode_layers)")] == [2, 1], found
    for one, whole in zip(some, run([0, 1, 2]), strict=True):
        for tap in ("attn_pattern", "expert_hidden"):
            np.testing.assert_array_equal(one[tap], whole[tap][[1]], err_msg=tap)


@pytest.mark.parametrize(
    "edited", [[4], pytest.param(range(6), marks=pytest.mark.slow), pytest.param([0, 2, 4], marks=pytest.mark.slow)]
)
def test_layers_that_run_as_one_step(grok, edited, monkeypatch):
    """As on an accelerator: neighbours whose hooks are the same."""

    def run():
        captures = [gs.capture("attn_out", layers=[0, 2]), "router_logits", gs.capture("resid_mid", reduce="mean")]
        with grok.edits(gs.scale("attn_z", 0.5, layers=list(edited))):
            return grok.generate([TOKENS, TOKENS[:5]], NEW, capture=captures, stop_at_eos=False)

    alone = run()
    monkeypatch.setattr(decode, "layers_at_once", lambda num_layers: 2)
    with compilations() as found:
        together = run()
    assert sum("(decode_layers)" in name for name in found) == (edited != [0, 2, 4]), found  # there one by one
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        for tap in other.taps:
            np.testing.assert_allclose(one[tap], other[tap], atol=1e-4, err_msg=tap)


class compilations:
    """Names of what jax compiles meanwhile."""

    def __enter__(self):
        self.found = []
        self.logger = __import__("logging").getLogger("jax._src.interpreters.pxla")
        self.handler = __import__("logging").Handler()
        self.handler.emit = lambda record: self.found.append(record.getMessage())
        self.logger.addHandler(self.handler)
        self.level, self.before = self.logger.level, jax.config.jax_log_compiles
        jax.config.update("jax_log_compiles", True)
        self.propagate, self.logger.propagate = self.logger.propagate, False
        return self.found

    def __exit__(self, *_):
        jax.config.update("jax_log_compiles", self.before)
        self.logger.removeHandler(self.handler)
        self.logger.propagate = self.propagate


def test_routing_adds_no_dispatch_to_a_step(grok, monkeypatch):
    """One transfer more per block of decode steps, and that is all."""
    from grokscope.run import steps

    counts = {}

    def counted(name, fn):
        def call(*args):
            counts[name] = counts.get(name, 0) + 1
            return fn(*args)

        return call

    for name in ("decode_embed", "decode_layers", "readout", "stacked", "seated_pools", "taken", "noted"):
        monkeypatch.setattr(steps, name, counted(name, getattr(steps, name)))
    grok.generate([5], 129, stop_at_eos=False, capture=())
    plain = dict(counts)
    counts.clear()
    grok.generate([5], 129, stop_at_eos=False)
    stacks = counts.pop("stacked")
    plain.pop("stacked", None)
    assert counts == plain
    assert stacks == 3  # chunks of at most 64 steps


# Results as they come


def test_stream(small):
    prompts = [TOKENS[: 1 + i % 4] for i in range(11)]
    options = dict(max_new_tokens=9, stop_at_eos=False, capture="resid_post", batch_size=3)
    whole = small.generate(prompts, **options)
    for ordered in (True, False):
        found = list(small.stream(prompts, ordered=ordered, **options))
        numbers = [t.meta["prompt"] for t in found]
        assert numbers == list(range(11)) if ordered else sorted(numbers) == list(range(11))
        for trace in found:
            assert (trace["resid_post"] == whole[trace.meta["prompt"]]["resid_post"]).all()
    with pytest.raises(ValueError, match="batch_size=0"):
        small.generate(prompts, batch_size=0)
    with pytest.raises(TypeError, match="list of prompts"):
        small.stream(TOKENS)
    stream = small.stream(prompts, **options)
    next(stream)
    stream.close()
    assert len(small.trace([5]))


def test_a_batch_that_keeps_nothing(small):
    """All end at the same step, the prompt read last among them."""
    traces = small.generate([TOKENS] * 8, 5, stop_at_eos=False, capture=())
    assert [len(t) for t in traces] == [14] * 8


def test_an_end_before_the_capture_warns(small):
    """Where nothing came of a capture because every sequence stopped before it."""
    first = small.generate(TOKENS, 1, capture=()).tokens[-1]
    small_eos = dataclasses.replace(small.config, eos_token=int(first))
    with mock.patch.object(small, "config", small_eos), pytest.warns(UserWarning, match="'resid_post' is empty"):
        trace = small.generate(TOKENS, 9, capture=gs.capture("resid_post", steps=[5]))
    assert trace.meta["finish"] == "eos"


def test_captures_are_in_step_with_tokens_when_a_callback_raises(small):
    """A batch cut short by its callback: pools and arrays are of the tokens that the Traces hold, of all rows."""
    prompts = [TOKENS, TOKENS[:5], TOKENS[2:]]

    def stop(event):
        if event.prompt == 1 and event.position == 5 + 3:
            raise KeyboardInterrupt

    wishes = ["resid_post", gs.capture("resid_post", reduce="mean")]
    traces = small.generate(prompts, 12, capture=wishes, on_token=stop, stop_at_eos=False)
    assert [t.meta["finish"] for t in traces] == ["interrupt"] * 3
    for trace in traces:
        assert trace["resid_post"].shape[1] == len(trace)
        np.testing.assert_allclose(trace["resid_post.mean"], trace["resid_post"].mean(1), atol=1e-5)


# What a hostile reader found


def test_a_patch_goes_by_head_numbers(small):
    """Heads captured in another order, or from the end of another prompt, are put where they belong."""
    turned = small.trace(TOKENS, capture=gs.capture("attn_z", heads=[3, 1, 0, 2]))
    plain = small.trace(TOKENS, capture="logits")
    with small.edits(gs.patch(turned, "attn_z")):
        assert np.abs(small.trace(TOKENS, capture="logits")["logits"] - plain["logits"]).max() < 1e-5
    longer = small.trace(TOKENS, capture="resid_post")
    for positions in (-1, "last"):
        with small.edits(gs.patch(longer, "resid_post", layers=1, positions=positions)):
            found = small.trace(TOKENS[:4], capture="resid_post")
        assert (found["resid_post", 1][-1] == longer["resid_post", 1][-1]).all()
    beyond = gs.patch(small.trace([1, 2], capture="resid_post"), "resid_post", positions=[1, 7])
    with small.edits(beyond), pytest.raises(ValueError, match="reads position 7 of a Trace that holds 0 to 1"):
        small.trace(TOKENS)


def test_a_prompt_without_a_pooled_position(small):
    """A reduction over positions that a short prompt has not: that prompt lacks it, the others have it."""
    short, long = small.trace([[1, 2], TOKENS], capture=gs.capture("resid_post", reduce="mean", positions=[5]))
    assert "resid_post.mean" not in short.taps
    assert "resid_post.mean" in long.taps


def test_a_mean_over_nothing_is_nan(small):
    first = small.generate(TOKENS, 1, capture=()).tokens[-1]
    ends = dataclasses.replace(small.config, eos_token=int(first))
    with mock.patch.object(small, "config", ends), pytest.warns(UserWarning, match="is empty"):
        trace = small.generate(TOKENS, 9, capture=gs.capture("resid_post", reduce="mean", steps=[5]))
    assert np.isnan(trace["resid_post.mean"]).all()


def test_later_knows_of_edits_of_attention(small):
    with small.edits(gs.set("attn_scores", 0.0, layers=2)):
        trace = small.trace(TOKENS, capture=gs.capture("attn_pattern", later=True))
    with pytest.raises(ValueError, match="edited attn_scores"):
        trace.attention()


def test_a_patch_beside_a_number_for_another_prompt(small):
    other = small.trace(TOKENS, capture="resid_post")
    edits = gs.set("resid_post", 0.0, layers=2, prompts=0), gs.patch(other, "resid_post", layers=2, prompts=1)
    with small.edits(*edits):
        a, b = small.generate([TOKENS, TOKENS], 3, capture="resid_post", stop_at_eos=False)
    assert (a["resid_post", 2] == 0).all()
    assert (b["resid_post", 2][: len(TOKENS)] == other["resid_post", 2]).all()


def test_transformer_lens_names_of_two_layers_are_one_capture(small):
    trace = small.trace(TOKENS, capture=["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"])
    assert trace.layers["resid_post"] == [0, 2]


def test_edits_may_be_entered_again(small):
    edited = small.edits(gs.ablate(layers=1))
    with edited:
        first = small.trace(TOKENS).meta["edits"]
    with edited, edited:
        assert small.trace(TOKENS).meta["edits"] == first * 2
    assert small.trace(TOKENS).meta["edits"] == []


def test_a_glimpse_is_what_is_kept(small):
    """While it runs, each token's routing, also some tokens later, and the prompt's: the same as in the Trace."""
    seen, later, events = [], [], []

    def look(event):
        events.append(event)
        if event.position == len(TOKENS):
            seen.append(event.glimpse("router_logits", True))
        seen.append(event.glimpse("router_logits", False)[:, None])
        later.append(events[max(len(events) - 5, 0)].glimpse("router_logits", False))

    trace = small.generate(TOKENS, NEW, on_token=look, stop_at_eos=False)
    assert (np.concatenate(seen, axis=1) == trace["router_logits"]).all()
    shown = [max(n - 4, 0) + len(TOKENS) for n in range(NEW)]
    assert (np.stack(later, axis=1) == trace["router_logits"][:, shown]).all()
    for of_prompt in (False, True):
        with pytest.raises(KeyError, match="its Trace has it"):
            events[0].glimpse("router_logits", of_prompt)


@pytest.mark.slow
def test_what_cannot_be_glimpsed(small):
    """A lens, which is read out later; attention, whose keys grow; what is reduced over positions."""
    keep = [gs.capture("resid_post", reduce="lens", k=3), gs.capture("resid_pre", reduce="mean"), "attn_pattern"]
    refused = []

    def look(event):
        for key in ("resid_post.lens", "resid_pre.mean", "attn_pattern"):
            try:
                event.glimpse(key, False)
            except KeyError:
                refused.append(key)

    small.generate(TOKENS, 1, capture=keep, on_token=look, stop_at_eos=False)
    assert refused == ["resid_post.lens", "resid_pre.mean", "attn_pattern"]


def test_a_glimpse_of_what_another_prompt_keeps(small):
    def look(event):
        if event.prompt == 0:
            assert event.glimpse("attn_out", False).shape[0] == 1
        else:
            with pytest.raises(KeyError, match="'attn_out' is not captured of prompt 1"):
                event.glimpse("attn_out", False)

    wish = gs.capture("attn_out", layers=2, prompts=0)
    first, second = small.generate([TOKENS, TOKENS], 3, on_token=look, stop_at_eos=False, capture=wish)
    assert "attn_out" in first.taps
    assert "attn_out" not in second.taps


def test_a_patch_that_makes_nobody(small):
    """An expert that another run did not take adds nothing here: cached as uncached, and as with its gate at 0."""
    with small.edits(gs.route.top_k(1)):
        fewer = small.trace(TOKENS)
    with small.edits(gs.patch(fewer, "expert_index")):
        made = small.generate(TOKENS, 3, stop_at_eos=False)
        whole = small.trace(made.tokens, capture=["expert_out", "expert_gate", "moe_out"])
    index = whole["expert_index"][:, : len(TOKENS)]
    assert (index[..., 1] == -1).all()
    close(made.logprobs[1:], whole.logprobs[1:])
    assert not whole["expert_gate"][:, : len(TOKENS), 1].any()
    assert not whole["expert_out"][:, : len(TOKENS), 1].any()
    close(whole["moe_out"], (whole["expert_gate"][..., None] * whole["expert_out"]).sum(-2))


def test_means_of_banned_logits(small):
    mean = gs.capture("router_logits", reduce="mean")
    with small.edits(gs.route.ban(experts=5, layers=1)):
        made = small.generate(TOKENS, 3, capture=mean, stop_at_eos=False)
        close(made["router_logits.mean"], small.trace(made.tokens, capture=mean)["router_logits.mean"])
    assert np.isneginf(made["router_logits.mean", 1][5])


def test_the_highest_of_negative_weights(small):
    with small.edits(gs.add("attn_pattern", -0.2)):
        trace = small.trace(TOKENS, capture=["attn_pattern", gs.capture("attn_pattern", reduce="topk", k=3)])
    pattern = np.where(np.tril(np.ones((len(TOKENS), len(TOKENS)), bool)), trace["attn_pattern"], -np.inf)
    best = -np.sort(-pattern, axis=-1)[..., :3]
    close(trace["attn_pattern.topk_value"], np.where(np.isfinite(best), best, 0))
    assert ((trace["attn_pattern.topk"] == -1) == np.isinf(best)).all()


def test_names_and_labels_of_captures(small):
    with pytest.raises(ValueError, match="'router_logits' is a tap itself"):
        small.trace(TOKENS, capture=gs.capture("router_probs", name="router_logits"))
    labels = np.zeros(small.config.vocab_size, np.uint8)
    count = small.trace(TOKENS, capture=gs.capture("expert_index", reduce="count", labels=labels))["expert_index.count"]
    assert (count.sum((-1, -2)) == 2 * len(TOKENS)).all()
    with pytest.raises(ValueError, match="one class from 0"):
        gs.capture("expert_index", reduce="count", labels=labels.astype(np.int64) + (1 << 32))
