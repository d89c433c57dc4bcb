"""The Trace: its axes, tables and its way to disk and back."""

import dataclasses
import resource
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import grokscope as gs


@pytest.fixture(scope="module")
def trace(grok):
    return grok.generate("The old keeper", max_new_tokens=12, stop_at_eos=False, capture=gs.TAPS)


def test_shapes_are_those_of_the_table(trace, grok):
    sizes = grok.config.dims | {"T": len(trace), "S": len(trace)}
    for name, tap in gs.TAPS.items():
        expected = tuple(sizes[d] for d in "L" * tap.layered + tap.dims)
        assert trace[name].shape == expected, name
        assert trace[name].dtype == (np.int32 if name == "expert_index" else np.float32)


def test_one_layer(trace):
    assert (trace["resid_post", 2] == trace["resid_post"][2]).all()
    assert (trace["resid_post", -1] == trace["resid_post"][5]).all()
    for number in (6, -7, "5"):
        with pytest.raises(
            KeyError, match=rf"layer {number} of 'resid_post' was not kept; kept are \[0, 1, 2, 3, 4, 5\]"
        ):
            trace["resid_post", number]
    with pytest.raises(KeyError, match="no layer axis"):
        trace["logits", 0]


def test_taps_that_were_not_captured(grok):
    with pytest.raises(KeyError, match="attn_pattern.*was not captured.*; captured are router_logits"):
        grok.trace("a")["attn_pattern"]


def test_coords(trace):
    coords = trace.coords("attn_pattern")
    assert list(coords) == ["layer", "head", "position", "key_position"]
    assert [len(c) for c in coords.values()] == list(trace["attn_pattern"].shape)
    assert list(trace.coords("router_logits")) == ["layer", "position", "expert"]
    assert list(trace.coords("expert_gate")) == ["layer", "position", "rank"]


def test_impossible_entries(trace):
    above = np.triu(np.ones((len(trace), len(trace)), bool), 1)
    assert (trace["attn_pattern"][..., above] == 0).all()
    assert (trace["attn_scores"][..., above] == np.float32(-1e30)).all()
    np.testing.assert_allclose(trace["attn_pattern"].sum(-1), 1, atol=1e-5)


def test_phase(trace):
    assert list(trace.phase) == ["prefill"] * trace.prompt_length + ["decode"] * 12


def test_router_table(trace):
    frame = trace.to_pandas("router")
    assert list(frame) == ["position", "piece", "phase", "layer", "rank", "expert", "logit", "prob", "gate"]
    assert len(frame) == len(trace) * 6 * 2
    row = frame[(frame.position == 5) & (frame.layer == 3) & (frame["rank"] == 1)].iloc[0]
    expert = trace["expert_index", 3][5, 1]
    assert row.expert == expert
    assert row.logit == trace["router_logits", 3][5, expert]
    assert row.gate == trace["expert_gate", 3][5, 1]
    assert row.piece == trace.pieces[5]
    np.testing.assert_allclose(frame.prob, frame.gate, atol=1e-6)
    wide = trace.to_pandas("router", wide=True)
    assert len(wide) == len(trace)
    assert wide["gate"][3][1].iloc[5] == row.gate
    assert wide["expert"][3][1].dtype == np.int32


def test_token_table(trace):
    frame = trace.to_pandas("tokens")
    assert list(frame) == ["position", "token", "piece", "phase", "logprob"]
    assert pd.isna(frame.logprob[0])
    assert (frame.token == trace.tokens).all()
    with pytest.raises(ValueError, match='tables are "router" and "tokens"'):
        trace.to_pandas("attention")


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_a_dump_opens_again(tmp_path, numerics):
    with gs.load(numerics=numerics) as grok:
        trace = grok.generate("The old", max_new_tokens=4, capture=["resid_post", "expert_index", "logits"])
    again = gs.open(trace.save(tmp_path / "a dump"))
    for tap in trace.taps:
        assert (again[tap] == trace[tap]).all()
        assert again.taps[tap].dtype == trace.taps[tap].dtype
    assert (again.tokens == trace.tokens).all()
    assert (again.text, again.continuation, again.pieces) == (trace.text, trace.continuation, trace.pieces)
    assert again.meta == trace.meta
    assert list(again.taps) == list(trace.taps)
    np.testing.assert_array_equal(again.logprobs, trace.logprobs)
    assert list(again.coords("resid_post")) == list(trace.coords("resid_post"))


def test_dumps_that_cannot_be(trace, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        trace.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        gs.open(tmp_path)
    dump = trace.save(tmp_path / "d")
    part = dump / "act-00000000.safetensors"
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="was changed since"):
        gs.open(dump)
    for damage in ("{", "[]", '{"format": "other"}', '{"format": "grokscope dump 1", "parts": []}'):
        (dump / "manifest.json").write_text(damage)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            gs.open(dump)


def test_opening_a_dump_needs_no_jax(trace, tmp_path):
    trace.save(tmp_path / "d")
    code = (
        "import sys, grokscope as gs; t = gs.open(sys.argv[1]); t.to_pandas('router'); t['resid_post'];"
        "assert 'jax' not in sys.modules and 'haiku' not in sys.modules, 'jax was imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], check=True)


def test_meta_tells_the_run(trace):
    meta = trace.meta
    assert meta["numerics"] == "float32"
    assert meta["finish"] == "length"
    assert meta["sampling"]["temperature"] == 0
    assert len(meta["checkpoint"]["hash"]) == 64
    assert meta["versions"]["grokscope"] == gs.__version__
    assert "The old keeper" in repr(trace)


def test_plots(grok, trace):
    """They draw what they say, on given axes too, at 6 layers and 64."""
    import dataclasses

    import matplotlib.pyplot as plt

    many = dataclasses.replace(
        trace,
        taps={n: np.concatenate([trace.taps[n]] * 11)[:64] for n in ("expert_index", "expert_gate", "router_logits")},
        numbers=dict.fromkeys(("expert_index", "expert_gate", "router_logits"), {"L": list(range(64))}),
    )
    for one in (trace, many, grok.trace("prompt only")):
        for plot in (gs.plot.routing, gs.plot.expert_load):
            _, ax = plt.subplots()
            assert plot(one, ax=ax) is ax
            assert ax.get_title(loc="left")
            assert ax.get_ylabel() == "layer"
            ax.figure.canvas.draw()
            plt.close(ax.figure)
    ax = gs.plot.expert_load(trace)
    shares = [image.get_array() for image in ax.images]
    chosen = trace["expert_index"][:, trace.phase == "decode"]
    np.testing.assert_allclose(shares[1], [[(layer == e).mean() for e in range(8)] for layer in chosen])
    plt.close("all")


def test_pieces_with_dollars_are_drawn_as_they_are(grok, tmp_path):
    """Two of them are no formula."""
    keep = ["router_logits", "attn_pattern", gs.capture("resid_post", reduce="lens", k=2)]
    trace = grok.trace("The old keeper", capture=keep)
    dollars = dataclasses.replace(trace, pieces=["$x$ \\frac$"] * len(trace))
    dollars.meta["words"] = dict.fromkeys(trace.meta["words"], "$\\y$")
    for plot in (gs.plot.routing, gs.plot.token_strip, gs.plot.logit_lens, lambda one: gs.plot.attention(one, 0, 0)):
        plot(dollars).figure.savefig(tmp_path / "p.png")
    gs.plot.compare(gs.compare(dollars, dollars)).figure.savefig(tmp_path / "p.png")


def test_plots_of_nothing(grok):
    with pytest.raises(ValueError, match="no token in common"):
        gs.plot.compare(gs.compare(grok.trace([10, 11]), grok.trace([20, 21])))
    with pytest.raises(ValueError, match="embed has no layers to draw"):
        gs.plot.logit_lens(grok.trace([5, 6], capture=gs.capture("embed", reduce="lens")), "embed")


def test_plots_of_all_positions_refuse_some(grok):
    some = [gs.capture(tap, phase="decode") for tap in ("router_logits", "expert_index", "expert_gate")]
    trace = grok.generate("The old keeper", 4, capture=some)
    for draw in (gs.plot.routing, gs.plot.token_strip):
        with pytest.raises(ValueError, match="routing of some positions"):
            draw(trace)


def test_plots_of_parts(grok):
    """Rows are the positions they are of, a line ends the prompt, and parts that do not belong together are refused."""
    from grokscope import analysis

    late = gs.capture("attn_pattern", positions=slice(8, None), layers=0)
    trace = grok.generate(np.arange(5, 15), 40, stop_at_eos=False, capture=late)
    ax = gs.plot.attention(trace, 0, 1)
    assert [line.get_xdata()[0] for line in ax.lines] == [9.5, 0]
    assert ax.lines[1].get_ydata()[0] == 1.5
    assert [label.get_text() for label in ax.get_yticklabels()] == ["8", "14", "20", "26", "32", "38", "44"]
    apart = [gs.capture("expert_index", layers=[0, 1]), gs.capture("expert_gate", layers=[1, 2])]
    with pytest.raises(ValueError, match=r"experts of layers \[0, 1\] and gates of \[1, 2\]"):
        gs.plot.routing(grok.trace([5, 6], capture=apart))
    gs.plot.routing(grok.trace([5, 6], capture=gs.capture("router_logits", experts=[0, 2])))
    table = analysis.load(trace)
    some = gs.plot.expert_load(table[(table.phase == "decode") & table.expert.isin([1, 3])]).images[0].get_array()
    assert some.shape == (6, 8)
    np.testing.assert_array_equal(np.isnan(some), ~np.isin(np.arange(8), [1, 3])[None].repeat(6, 0))
    with pytest.raises(TypeError, match="expected a Trace; got list"):
        gs.plot.attention([trace], 0, 1)


def test_attention_afterwards_is_that_of_the_run(grok):
    """In bfloat16 scores are rounded."""
    with gs.load(numerics="bfloat16") as rounded:
        for model in (grok, rounded):
            trace = model.trace(
                "The old keeper of the lighthouse went down to the sea", capture=["attn_pattern", "q", "k"]
            )
            np.testing.assert_allclose(trace.attention(), trace["attn_pattern"], atol=1e-4)
    few = grok.trace([5, 6], capture=[gs.capture("q", heads=[0, 3]), gs.capture("k", heads=0)])
    with pytest.raises(KeyError, match=r"kv_head 1 of 'k', which these heads read, was not kept; kept are \[0\]"):
        few.attention()


def test_plots_of_analyses(grok):
    """Every view draws from Traces and from its table, on axes it is given, and says how much is behind it."""
    import matplotlib.pyplot as plt

    from grokscope import analysis

    keep = ["router_logits", gs.capture("attn_pattern", later=True), gs.capture("resid_post", reduce="lens", k=2)]
    traces = grok.generate(["The old keeper", "def f(x):", "In the year"], 8, capture=keep, stop_at_eos=False)
    one = traces[0]
    views = {
        gs.plot.router_entropy: (traces,), gs.plot.coactivation: (traces, 2), gs.plot.transitions: (traces, 2),
        gs.plot.expert_load: (traces,), gs.plot.token_strip: (one, 1), gs.plot.logit_lens: (one,), gs.plot.compare: (gs.compare(*traces[:2]),),
    }  # fmt: skip
    for plot, arguments in views.items():
        _, ax = plt.subplots()
        assert plot(*arguments, ax=ax) is ax
        assert ax.get_title(loc="left")
        plt.close("all")
    tokens = sum(map(len, traces))
    ax = gs.plot.coactivation(analysis.coactivation(traces, phase="all"), 1)
    assert f"{tokens} tokens, 3 prompts" in ax.get_title(loc="left")
    assert ax.images[0].get_array().shape == (8, 8)
    sheet = gs.plot.attention(one, 2)
    assert len(sheet.child_axes) == 6
    head = gs.plot.attention(one, 2, 3)
    np.testing.assert_allclose(head.images[0].get_array().data ** 2, one.attention(layers=2, heads=3)[0, 0], atol=1e-6)
    with pytest.raises(KeyError, match="head 9 of layer 2"):
        gs.plot.attention(one, 2, 9)
    with pytest.raises(ValueError, match="phases prefill, decode"):
        gs.plot.coactivation(analysis.coactivation(traces), 1)
    plt.close("all")


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does, and glibc keeps them")
def test_captures_of_the_next_prompt_find_memory_of_the_last(grok):
    """New pages were a third of the time of a full cache (27,000 pages)."""

    def new_pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        grok.trace(range(5, 517), capture=gs.TAPS)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(new_pages() for _ in range(8)) < 9000
