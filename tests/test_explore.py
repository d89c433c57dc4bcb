"""The explorer: what its kernel side sends, and what a user does with it in a real browser."""

import json
import re
import time
import zlib

import lab
import numpy as np
import pytest
from conftest import small_config, write_random

import grokscope as gs
from grokscope.notebook.widgets import explore as module
from grokscope.run.trace import ROUTING

CELL = "import grokscope as gs\ngrok = gs.load()\napp = gs.explore(grok)\napp"
UNHURRIED = """
import time
import grokscope as gs
grok = gs.load()
def stream(*args, on_token, **options):
    unhurried = lambda event: (time.sleep(0.02), on_token(event))
    return gs.Grok.stream(grok, *args, on_token=unhurried, stop_at_eos=False, **options)
grok.stream = stream
app = gs.explore(grok)
hello = app._on_hello
app._on_hello = lambda: (time.sleep(1), hello())
app
"""  # what a busy machine may do; and 900 tokens are made within a second, too soon for a page to stop them

BEYOND = """() => [...document.querySelectorAll('.gs .pane canvas')].filter((one) =>
  one.getBoundingClientRect().right > one.closest('.pane').getBoundingClientRect().right).map((one) => one.id)"""


@pytest.fixture
def app(grok, monkeypatch):
    """An explorer whose messages to the page are kept in `app.sent`."""
    made = gs.explore(grok)
    sent = []
    monkeypatch.setattr(type(made), "send", lambda self, message, buffers=None: sent.append((message, buffers or [])))
    made.sent = sent
    yield made
    made._on_stop()
    if made._worker:
        made._worker.join(60)


def generated(app, edits=(), **options):
    settings = {"max": 12, "temperature": 0.8, "top_p": 0.95, "seed": 7} | options
    app._receive(app, {"kind": "generate", "prompt": "The old keeper", "options": settings, "edits": list(edits)}, [])
    app._worker.join(120)
    return [m for m in app.sent if m[0]["kind"] != "tokens"]


def arrays(buffers, *kinds):
    return [np.frombuffer(data, kind) for data, kind in zip(buffers, kinds, strict=True)]


def test_a_run_as_it_is_sent(app):
    """Begun with the prompt's routing, tokens in batches, then the whole, which is what the Trace holds."""
    (begin, prompt), (run, buffers) = generated(app)
    trace = app.trace
    parts = [prompt, *(data for m, data in app.sent if m["kind"] == "tokens")]
    streamed = [arrays(part, np.int8, np.float32, np.float32) for part in parts]
    for (name, last), own in zip((("expert_index", 2), ("expert_gate", 2), ("router_logits", 8)), zip(*streamed)):
        assert (np.concatenate([part.reshape(6, -1, last) for part in own], axis=1) == trace[name]).all()
    assert run["pieces"] == trace.pieces
    assert begin["total"] == len(trace)
    assert buffers == [b""], "the page has it"
    app._receive(app, {"kind": "whole", "run": 1}, [])
    (data,) = app.sent[-1][1]
    experts = np.frombuffer(zlib.decompress(data), np.int8).reshape(trace["expert_index"].shape)
    assert (experts == trace["expert_index"]).all()
    app._receive(app, {"kind": "cells", "run": 1, "start": 0}, [])
    _, logits = arrays(app.sent[-1][1], np.float32, np.float32)
    assert (logits.reshape(trace["router_logits"].shape) == trace["router_logits"]).all()
    size = sum(len(b) for _, bs in app.sent for b in bs) + len(json.dumps([m for m, _ in app.sent]))
    assert size < 100_000


def test_experts_that_were_forced_are_those_that_are_shown(app):
    """Not those the router would have taken; there is no second."""
    generated(app, [{"kind": "force", "layer": 2, "number": 1}])
    first, second = np.frombuffer(app.sent[0][1][0], np.int8).reshape(6, -1, 2)[2].T
    assert set(first) == {1}
    assert set(second) == {-1}


def test_attention_as_it_is_sent(app):
    """One head exactly to 1/65,535; thumbnails as the largest of their blocks."""
    generated(app, max=80)
    n = len(app.trace)
    pattern = app.trace.attention(layers=2)[0]
    app._receive(app, {"kind": "head", "run": 1, "layer": 2, "head": 4, "start": 0}, [])
    _, (data, at, weight, *_, received) = app.sent[-1]
    found = np.frombuffer(zlib.decompress(data), np.uint16) / 65535
    np.testing.assert_allclose(found, pattern[4][np.tril_indices(n)], atol=1e-5)
    at, weight = np.frombuffer(at, np.int32).reshape(n, -1), np.frombuffer(weight, np.float32).reshape(n, -1)
    assert at[50, 0] == pattern[4, 50].argmax()
    assert weight[50, 0] == pattern[4, 50].max()
    assert (at[0, 1:] == -1).all(), "the first position has one to read"
    received = np.frombuffer(received, np.float32)
    assert received[3] == pytest.approx(pattern[4, 4:, 3].mean(), rel=1e-5)
    app._receive(app, {"kind": "attention", "run": 1, "layer": 2}, [])
    message, (data,) = app.sent[-1]
    assert n > message["size"] == 64
    thumbs = (np.frombuffer(zlib.decompress(data), np.uint8).reshape(6, 64, 64) / 255.0) ** 2
    bounds = [-(-i * n // 64) for i in range(65)]
    for h, q, k in ((0, 3, 1), (4, 63, 0), (5, 40, 39)):
        block = pattern[h, bounds[q] : bounds[q + 1], bounds[k] : bounds[k + 1]]
        assert thumbs[h, q, k] == pytest.approx(block.max(), abs=0.005)
    assert len(message["labels"]) == 6


def test_experts_together_as_they_are_sent(app):
    """The numbers of grokscope.analysis, phase by phase."""
    generated(app, max=40)
    app._receive(app, {"kind": "experts", "run": 1}, [])
    message, buffers = app.sent[-1]
    assert [name for name, _ in message["phases"]] == ["all", "prefill", "decode"]
    found = [np.frombuffer(zlib.decompress(data), np.float32) for data in buffers[6:]]
    for name, own in zip(("entropy", "coactivation", "transitions"), found, strict=True):
        frame = getattr(gs.analysis, name)(app.trace, phase="decode")
        columns = ["entropy"] if name == "entropy" else ["count", "expected", "lift"]
        np.testing.assert_array_equal(own, frame[columns].to_numpy(np.float32).ravel())


def test_a_long_text_is_sent_by_windows(grok, monkeypatch):
    """What the page asks for of 900 tokens is no more than of 256."""
    keep = ["router_logits", gs.capture("attn_pattern", later=True), gs.capture("resid_post", reduce="lens", k=5)]
    trace = grok.trace(np.arange(900) % 500 + 5, capture=keep)
    page, sent = gs.view(trace), []
    monkeypatch.setattr(type(page), "send", lambda self, message, buffers=None: sent.append((message, buffers or [])))
    page._receive(page, {"kind": "hello"}, [])
    asked = [("cells", {"start": 300}), ("lens", {"start": 800}), ("head", {"layer": 1, "head": 2, "start": 300})]
    for kind, more in asked:
        page._receive(page, {"kind": kind, "run": 1, **more}, [])
    assert [m["kind"] for m, _ in sent] == ["model", "run", "cells", "lens", "head"]
    assert [m["count"] for m, _ in sent[2:]] == [256, 100, 256]
    cells, lens, head = (buffers for _, buffers in sent[2:])
    here = slice(300, 556)
    assert (np.frombuffer(cells[1], np.float32).reshape(6, 256, 8) == trace["router_logits"][:, here]).all()
    assert (
        np.frombuffer(zlib.decompress(lens[0]), np.int32).reshape(6, 100, 5) == trace["resid_post.lens"][:, 800:]
    ).all()
    pattern = trace.attention(layers=1, heads=2)[0, 0]
    triangle = np.frombuffer(zlib.decompress(head[0]), np.uint16) / 65535
    np.testing.assert_allclose(triangle, pattern[here, here][np.tril_indices(256)], atol=1e-5)
    assert np.frombuffer(head[1], np.int32).reshape(256, -1)[7, 0] == pattern[307].argmax(), "of the whole text"
    assert sum(len(b) for _, bs in sent for b in bs) < 400_000


def test_kl_of_two_runs(app, grok):
    """As gs.compare has it, of runs that did not keep their logits, each under its own edits."""
    generated(app)
    generated(app, [{"kind": "ban", "layer": 3, "number": 5}])
    a, b = app.runs
    app._receive(app, {"kind": "compare", "a": 1, "b": 2}, [])
    deadline = time.monotonic() + 60
    while app.sent[-1][0]["kind"] != "compare":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = app.sent[-1][0]["kl"]
    plain = grok.trace(a.tokens, capture=["logits"])
    with grok.edits(gs.route.ban(experts=5, layers=3)):
        banned = grok.trace(b.tokens, capture=["logits"])
    comparison = gs.compare(plain, banned)
    until = comparison.divergence or len(found)
    np.testing.assert_allclose(found[:until], comparison.divergence_nats[:until], atol=1e-6)
    assert max(found[:until]) > 1e-3


@pytest.mark.slow
def test_experts_of_a_forced_run_as_they_are_sent(app):
    """One expert a token at a layer and two at the others: all tables, in numbers."""
    generated(app, [{"kind": "force", "layer": 2, "number": 1}])
    app._receive(app, {"kind": "experts", "run": 1}, [])
    message, buffers = app.sent[-1]
    assert message["kind"] == "experts"
    together = np.frombuffer(zlib.decompress(buffers[1]), np.float32).reshape(6, 28, 3)
    assert (together[2, :, :2] == 0).all()
    assert (together[[0, 1, 3, 4, 5], :, 0].sum(1) == len(app.trace)).all()


@pytest.mark.slow
def test_a_steered_run_outlives_those_it_was_steered_by(app, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "RUNS", 2)
    generated(app, max=2)
    generated(app, max=2, seed=1)
    generated(app, [{"kind": "steer", "layer": 2, "number": 0, "factor": 2, "a": 1, "b": 2}], max=2)
    generated(app, max=2)
    assert [run.id for run in app._runs] == [3, 4]
    app._receive(app, {"kind": "export", "run": 3, "taps": [], "directory": str(tmp_path / "d")}, [])
    app._worker.join(60)
    assert app.sent[-1][0]["kind"] == "exported"
    assert gs.open(tmp_path / "d")[0].meta["edits"] == app.runs[0].meta["edits"]


def test_edits_of_the_panel(app):
    """Each kind is the edit it names; a run under it is the run with that edit."""
    generated(app)
    rows = [
        {"kind": "ban", "layer": 3, "number": 5}, {"kind": "force", "layer": 2, "number": 1},
        {"kind": "scale", "layer": 1, "number": 0, "factor": 0.5},
    ]  # fmt: skip
    generated(app, rows)
    assert [e["op"] for e in app.trace.meta["edits"]] == ["route.ban", "route.force", "scale"]
    generated(app, [{"kind": "steer", "layer": 2, "number": 0, "factor": 2, "a": 1, "b": 2}])
    assert [e["op"] for e in app.trace.meta["edits"]] == ["add"]
    assert len(app.runs) == 3


def test_errors_reach_the_page(app):
    app._receive(app, {"kind": "attention", "run": 9, "layer": 0}, [])
    assert "run 9 was forgotten" in app.sent[-1][0]["text"]
    assert "context holds 1024" in generated(app, max=5000)[-1][0]["text"]
    app._receive(app, {"kind": "generate", "prompt": "", "options": {"seed": 0}, "edits": []}, [])
    error = {"kind": "error", "of": "generate", "text": "ValueError: the prompt is empty; type a text"}
    assert app.sent[-1][0] == error, "not `ended`: no run failed"


def test_export(app, tmp_path):
    generated(app)
    app._receive(app, {"kind": "price", "run": 1}, [])
    price = app.sent[-1][0]["bytes"]
    app._receive(app, {"kind": "export", "run": 1, "taps": ["resid_post"], "directory": str(tmp_path / "d")}, [])
    app._worker.join(60)
    assert app.sent[-1][0]["kind"] == "exported"
    dump = gs.open(tmp_path / "d")
    assert dump[0].taps["resid_post"].nbytes == price["resid_post"]
    assert dump[0].to_pandas("tokens").equals(app.trace.to_pandas("tokens")), "prompt and generated tokens too"
    assert (dump[0].text, dump[0].continuation) == (app.trace.text, app.trace.continuation)
    assert dump[0].meta == app.trace.meta
    np.testing.assert_allclose(dump[0]["router_logits"], app.trace["router_logits"], atol=1e-3)
    app._receive(app, {"kind": "export", "run": 1, "taps": ["resid_post"], "directory": str(tmp_path / "d")}, [])
    app._worker.join(60)
    assert "not an empty folder" in app.sent[-1][0]["text"]


def test_what_cannot_be_known_is_not_shown(grok, monkeypatch):
    """No log-probability of the first token, no lens of some positions, no attention whose scores were edited; all
    experts of a token that takes more than two; of several runs the last one's numerics.
    """
    sent = []
    keep = ["router_logits", gs.capture("attn_pattern", later=True)]
    late = gs.capture("resid_post", reduce="lens", positions="last")
    with grok.edits(gs.route.top_k(4, layers=1), gs.scale("attn_scores", 0.5, layers=0)):
        trace = grok.generate("The old keeper", 4, capture=[*keep, late], stop_at_eos=False)
    with gs.load(numerics="bfloat16") as rounded:
        first = rounded.trace("The old keeper")
    page = gs.view(first, trace)
    monkeypatch.setattr(type(page), "send", lambda self, message, buffers=None: sent.append((message, buffers or [])))
    page._receive(page, {"kind": "hello"}, [])
    (model, _), _, (run, (experts,)) = sent
    assert model["numerics"] == "float32"
    assert "attn" not in model["panes"]
    assert run["logprobs"][0] is None
    assert run["logprobs"][1:] == pytest.approx(trace.logprobs[1:].tolist(), abs=1e-4)
    assert run["lens_layers"] == []
    found = np.frombuffer(zlib.decompress(experts), np.int8).reshape(6, len(trace), 4)
    assert (found == trace["expert_index"]).all()
    page._receive(page, {"kind": "cells", "run": 2, "start": 1}, [])
    gates, _ = sent[-1][1]
    assert (np.frombuffer(gates, np.float32).reshape(6, len(trace) - 1, 4) == trace["expert_gate"][:, 1:]).all()
    with pytest.raises(ValueError, match="lacks a lens of all positions"):
        gs.view(trace, panes="logit_lens")
    deep = gs.GrokConfig(**{**first.meta["config"], "num_layers": 20})
    with monkeypatch.context() as patched:
        patched.setattr(grok, "config", deep)
        assert gs.explore(grok)._lens_layers == [7, 15, 19], "what is said to come next is of the last"


def test_a_new_explorer_stops_what_the_old_one_runs(app, grok):
    settings = {"max": 900, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    app._receive(app, {"kind": "generate", "prompt": "The", "options": settings, "edits": []}, [])
    gs.explore(grok)
    app._worker.join(60)
    assert not app._worker.is_alive()
    assert app.trace.meta["finish"] == "interrupt"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """Writes a notebook of these cells, and gives its address."""
    lab.needs_chromium()
    root = tmp_path_factory.mktemp("lab")
    with lab.server(root) as url:

        def written(name: str, *cells: str) -> str:
            lab.write_notebook(root / f"{name}.ipynb", *cells)
            return url(f"{name}.ipynb")

        yield written


def generate(page, text="Done"):
    page.click(".gs #b-gen")
    page.wait_for_function(f"() => document.querySelector('.gs #pgt').textContent.startsWith('{text}')")


def test_in_the_browser(notebook):
    """The shortest use: run, generate, click a token; nothing is asked of any other machine, no error is logged."""
    with lab.page() as page:
        lab.run_all(page, notebook("explore", UNHURRIED))
        page.wait_for_selector(".gs #b-gen")
        said = "getComputedStyle(document.querySelector('.gs #attn'), '::after').content"
        page.wait_for_function(f"() => {said}.includes('Who reads whom')")  # before a run: what will be there
        assert not page.locator(".gs #c-route").is_visible()
        generate(page)
        assert page.evaluate(said) == "none"
        assert page.locator(".gs #c-route").is_visible()
        page.click(".gs .tok >> nth=3")
        assert page.inner_text(".gs #o-t") == "3"
        assert "position 3, prefill" in page.inner_text(".gs #iwhere")
        page.wait_for_function("() => document.querySelectorAll('.gs #t-next tr').length === 5")
        assert not page.locator(".gs-still").is_visible(), "that is for where the widget does not live"
        assert page.errors == []
        assert {re.split("[/:]", url)[3] for url in page.requests if url.startswith("http")} == {"127.0.0.1"}


@pytest.mark.slow
def test_a_view_in_the_browser(notebook):
    """Traces from disk without a model, in panes of choice; a click works as in the explorer."""
    cells = [
        "import grokscope as gs\ngrok = gs.load()\nkeep = ['router_logits', gs.capture('attn_pattern', later=True)]",
        "a, b = grok.generate(['The old keeper', 'The old house'], 12, capture=keep)\na.save('a')",
        "gs.view(gs.open('a'))",
        "gs.view(a, b, panes=['routing', 'compare', 'coactivation', 'transitions', 'router_entropy'])",
        "with grok.edits(gs.route.top_k(4, layers=1)):\n    c = grok.trace('The old keeper')\ngs.view(c)",
    ]
    with lab.page() as page:
        lab.run_all(page, notebook("view", *cells))
        page.wait_for_function("() => document.querySelector('.gs')?.querySelectorAll('.tok').length > 10")
        page.click(".gs .tok >> nth=3")
        assert page.inner_text(".gs #o-t >> nth=0") == "3"
        page.wait_for_function("() => document.querySelectorAll('.gs #t-r tr').length >= 3")
        assert not page.locator(".gs #prompt >> nth=0").is_visible()
        second = page.locator(".gs >> nth=1")
        assert "First divergence" in second.locator("#ckey").inner_text()
        assert not second.locator("#strip").is_visible()
        second.locator("#pairs", has_text="×").wait_for()
        second.locator("#c-coact").hover(position={"x": 80, "y": 40})
        assert "by chance" in second.locator("#tip").inner_text()
        second.locator("#c-ent").hover(position={"x": 40, "y": 60})
        assert "mean entropy" in second.locator("#tip").inner_text()
        plain = page.locator(".gs >> nth=2")
        assert plain.locator("#measure option[value=recv]").get_attribute("hidden") is not None, "there is no attention"
        plain.locator(".phase button", has_text="decode").first.click()
        plain.locator("#c-load").hover(position={"x": 20, "y": 60})
        assert re.search(r"decode\s+0 of 0\s+–", plain.locator("#tip").inner_text())
        plain.locator("#measure").select_option("logp")
        plain.locator("#digits").check()
        assert plain.locator(".tok >> nth=0").inner_text().endswith("–"), "nothing came before the first token"
        ran = []
        for layer in range(2):
            plain.locator("#c-route").hover(position={"x": 60, "y": 30 + 24 * layer})
            ran.append(plain.locator("#tip tr").count() - 1)
        assert ran == [2, 4]
        assert page.errors == []


@pytest.mark.slow
def test_two_explorers_in_one_notebook(notebook):
    """A label of the second is of a field of the second."""
    with lab.page() as page:
        lab.run_all(page, notebook("two", CELL, "gs.explore(grok)"))
        page.wait_for_function("() => document.querySelectorAll('.gs:not(.unknown) #b-gen').length === 2")
        first, second = (page.locator(".gs").nth(i) for i in range(2))
        before = first.locator("#taps input").evaluate_all("all => all.map((one) => one.checked)")
        second.locator("#taps label", has_text="logits").last.click()
        assert second.locator("#taps input").evaluate_all("all => all.map((one) => one.checked)") != before
        assert first.locator("#taps input").evaluate_all("all => all.map((one) => one.checked)") == before
        second.locator(".fields label", has_text="Seed").locator("span").click()
        assert second.locator("#f4").evaluate("one => one === document.activeElement")
        second.locator("#a-add").click()
        second.locator("#elist label").click()
        assert second.locator("#ecount").inner_text() == "0 of 1 on"
        assert first.locator("#ecount").inner_text() == ""
        assert page.errors == []


@pytest.mark.slow
def test_a_long_text_in_the_browser(notebook):
    """The overview moves the window; strip, map and head follow; a read outside of it is one click away."""
    cells = [
        "import grokscope as gs, numpy as np\ngrok = gs.load()",
        "gs.view(grok.trace(np.arange(900) % 500 + 5, capture=['router_logits', gs.capture('attn_pattern', later=True)]))",
    ]
    with lab.page() as page:
        lab.run_all(page, notebook("long", *cells))
        page.wait_for_function("() => document.querySelectorAll('.gs .tok').length === 256")
        assert page.inner_text(".gs #o-w") == "Positions 0–255 of 900"
        box = page.locator(".gs #c-over").bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + 8)
        page.wait_for_function("() => document.querySelector('.gs #o-w').textContent.startsWith('Positions 322')")
        page.wait_for_function("() => document.querySelector('.gs #o-t').textContent === '322'")
        page.wait_for_function("() => document.querySelectorAll('.gs #t-r tr').length === 8")
        far = int(page.inner_text(".gs #t-r tr >> nth=0").split()[0])
        page.click(".gs #t-r tr >> nth=0")
        page.wait_for_function(f"() => document.querySelector('.gs #o-t').textContent === '{far}'")
        assert page.errors == []


@pytest.mark.slow
def test_a_long_prompt_edited_shown_twice_and_loaded_again(notebook):
    """An edited run is looked at where the one before was, once it is done; a second view leaves the first as it is; a
    page that is loaded while a run goes on can stop it, and shows it.
    """
    generating = "() => /^([3-9]|[0-9]{2,}) of 600/.test(document.querySelector('.gs #pgt').textContent)"
    run_cell = """async (i) => { const app = window.jupyterapp; app.shell.currentWidget.content.activeCellIndex = i;
      await app.commands.execute('notebook:run-cell'); }"""
    with lab.page() as page:
        page.set_default_timeout(120_000)
        page.goto(notebook("edited", UNHURRIED.replace("0.02", "0.1"), "app"))
        page.wait_for_function(lab.READY)
        page.evaluate(run_cell, 0)
        page.wait_for_selector(".gs:not(.unknown) #b-gen")
        page.fill(".gs #pbox", "The cat sat on the mat. " * 70)
        page.wait_for_function(
            "() => parseInt(document.querySelector('.gs #ptok').textContent) > 400"
        )  # it moves buttons
        page.fill(".gs #f1", "8")
        generate(page)
        box = page.locator(".gs #c-over").bounding_box()
        page.mouse.click(box["x"] + 2, box["y"] + 8)
        page.wait_for_selector(".gs .tok[data-t='40']")
        page.click(".gs .tok[data-t='40']")
        page.click(".gs #quick [data-q='ban']")
        page.click(".gs #b-run")
        page.wait_for_function("() => document.querySelectorAll('.gs #trun [data-r=A]').length === 2")
        page.wait_for_function("() => document.querySelector('.gs #o-t').textContent === '40'")
        assert "position 40" in page.inner_text(".gs #iwhere")

        page.click(".gs #trun tr:nth-child(1) [data-r='A']")
        page.click(".gs #trun tr:nth-child(2) [data-r='B']")
        assert page.inner_text(".gs #cname").startswith("A: run 2")
        page.evaluate(run_cell, 1)
        page.wait_for_function("() => document.querySelectorAll('.gs:not(.unknown) #trun [data-r=A]').length === 4")
        assert page.locator(".gs #cname").first.inner_text().startswith("A: run 2"), "as it was marked"
        assert page.locator(".gs #cname").last.inner_text().startswith("A: run 1")

        page.locator(".gs #pbox").first.fill("The cat")
        page.wait_for_function("() => parseInt(document.querySelector('.gs #ptok').textContent) < 10")
        page.locator(".gs #f1").first.fill("600")
        page.locator(".gs #b-gen").first.click()
        page.wait_for_function(generating)
        page.evaluate("async () => await window.jupyterapp.commands.execute('docmanager:save')")
        page.reload()
        page.wait_for_function("() => document.querySelector('.gs #pgt')?.textContent === 'Under way'")
        page.locator(".gs #b-stop").first.click()
        page.wait_for_function("() => document.querySelector('.gs #pgt').textContent.startsWith('Stopped at')")
        assert page.errors == []


@pytest.mark.slow
def test_a_session_in_the_browser(notebook, tmp_path):
    """Prompt, stop, layers, heatmap, heads, an edit, compare, export, the page loaded again, the kernel gone."""
    with lab.page() as page:
        lab.run_all(page, notebook("session", UNHURRIED))
        page.wait_for_selector(".gs #b-gen")
        page.fill(".gs #pbox", "The cat sat on the mat. The cat")
        page.wait_for_function("() => document.querySelector('.gs #ptok').textContent.startsWith('1')")
        generate(page)
        assert "The cat sat" in page.inner_text(".gs #strip").replace("\n", "")
        assert page.evaluate(BEYOND) == [], "drawings end where their pane does"

        page.fill(".gs #f1", "900")
        page.click(".gs #b-gen")
        page.wait_for_function("() => /^([5-9]|[0-9]{2,}) of 900/.test(document.querySelector('.gs #pgt').textContent)")
        page.click(".gs #b-stop")
        page.wait_for_function("() => document.querySelector('.gs #pgt').textContent.startsWith('Stopped')")
        made = int(re.search(r"at (\d+) of 900", page.inner_text(".gs #pgt"))[1])
        assert 5 <= made < 900

        page.click(".gs #b-gen")
        page.wait_for_function("() => /^([5-9]|[0-9]{2,}) of 900/.test(document.querySelector('.gs #pgt').textContent)")
        page.click(".gs #trun tr:nth-child(3) button >> nth=0")
        first = int(page.inner_text(".gs #pgt").split()[0])
        page.wait_for_function(f"() => parseInt(document.querySelector('.gs #pgt').textContent) > {first}")
        page.click(".gs #b-stop")
        page.wait_for_function("() => document.querySelector('.gs #pgt').textContent.startsWith('Done: 40 of 40')")
        assert page.locator(".gs #trun tr").count() == 3, "the run that was looked at is not the one that was stopped"
        page.click(".gs #trun tr:nth-child(1) button >> nth=0")
        assert page.inner_text(".gs #pgt").startswith("Stopped at")

        page.click(".gs [data-k='l+']")
        assert page.inner_text(".gs #o-l") == "1"
        page.press(".gs #xkey button >> nth=3", "Enter")
        assert page.evaluate("() => document.activeElement.dataset.e") == "3", "the focus stays"
        page.press(".gs #xkey button >> nth=3", "Enter")
        box = page.locator(".gs #c-map").bounding_box()
        before = len(page.told)
        page.mouse.move(box["x"] + 100, box["y"] + 60)
        assert "Layer" in page.inner_text(".gs #tip")
        assert "gate" in page.inner_text(".gs #tip")
        assert len(page.told) == before, "hovering asks nothing"
        page.click(".gs #c-sheet", position={"x": 120, "y": 30})
        assert page.inner_text(".gs #o-h") == "1.1"
        page.wait_for_function("() => document.querySelectorAll('.gs #t-r tr').length >= 3")

        page.fill(".gs #f1", "20")
        generate(page)
        page.click(".gs .tok >> nth=25")
        page.click(".gs #quick [data-q='ban']")
        assert "Ban expert" in page.inner_text(".gs #elist")
        page.click(".gs #b-run")
        page.wait_for_function("() => document.querySelectorAll('.gs #trun [data-r=A]').length === 5")
        assert page.inner_text(".gs #o-t") == "25", "an edited run is looked at where the one before was"
        page.click(".gs #trun tr:nth-child(2) [data-r='A']")
        page.click(".gs #trun tr:nth-child(1) [data-r='B']")
        assert "ban" in page.inner_text(".gs #cname")
        assert "First divergence" in page.inner_text(".gs #ckey")
        banned = re.search(r"Ban expert (\d)", page.inner_text(".gs #elist"))[1]
        assert page.inner_text(".gs #d-x") == f"gate of expert {banned}"

        page.fill(".gs #dest", str(tmp_path / "d"))
        page.wait_for_function("() => document.querySelector('.gs #taps .tot').textContent.includes('kB')")
        page.click(".gs #b-exp")
        page.wait_for_selector(".gs #xout:not([hidden])")
        assert gs.open(tmp_path / "d").prompts == [0]

        page.evaluate("async () => await window.jupyterapp.commands.execute('docmanager:save')")
        page.reload()
        page.wait_for_function(lab.READY)
        page.wait_for_function("() => document.querySelectorAll('.gs #trun tr').length === 5")
        assert page.input_value(".gs #pbox") == "The cat sat on the mat. The cat"
        assert "Ban expert" in page.inner_text(".gs #elist")
        page.wait_for_selector(".gs .tok >> nth=2")
        assert page.errors == []

        page.evaluate("async () => await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
        page.wait_for_function("() => document.querySelector('.gs #state').textContent === 'No kernel'")
        assert page.is_disabled(".gs #b-gen")
        assert page.inner_text(".gs #pgt") == "Run the cell again to reconnect"
        page.click(".gs .tok >> nth=2")
        assert "position 2" in page.inner_text(".gs #iwhere"), "what is there can be read"


def test_the_page_says_what_went_wrong(app):
    generated(app, max=0)
    assert "max_new_tokens=0" in app.sent[-1][0]["text"]


def test_runs_of_other_prompts_are_told_apart(app):
    for prompt in ("The cat", "The cat", "In the beginning\nwas the word"):
        app._on_generate(prompt, {"max": 2, "temperature": 0, "top_p": 1, "seed": 7}, [])
        app._worker.join(120)
    names = [m["name"] for m, _ in app.sent if m["kind"] == "run"]
    assert names == ["baseline, seed 7"] * 2 + ["In the beginnin…: baseline, seed 7"]


def test_runs_that_are_forgotten(app, monkeypatch):
    monkeypatch.setattr(module, "RUNS", 2)
    for _ in range(3):
        generated(app, max=2)
    assert len(app.runs) == 2


@pytest.mark.slow
def test_a_saved_notebook_has_a_picture(tmp_path):
    """Of what was there when the cell ran, and of the run that was made since."""
    import nbformat
    from nbclient import NotebookClient

    cells = [
        CELL,
        "app._on_generate('The', {'max': 4, 'temperature': 0, 'top_p': 1, 'seed': 0}, [])\n"
        "app._worker.join()\napp._redrawing.join()",
    ]
    lab.write_notebook(tmp_path / "n.ipynb", *cells, "gs.view(app.trace, app.trace)")
    notebook = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell in (notebook.cells[0], notebook.cells[2]):
        widget, still = (output.data for output in cell.outputs)
        assert "application/vnd.jupyter.widget-view+json" in widget
        assert "gs-still" in still["text/html"]
        assert "data:image/png" in still["text/html"]


def test_experts_of_a_model_of_one(tmp_path, monkeypatch):
    """Its entropy is 0; there are no two to be chosen together."""
    with gs.load(write_random(tmp_path / "one", small_config(num_experts=1, num_selected_experts=1))) as one:
        trace = one.trace([5, 6, 7])
    page, sent = gs.view(trace, panes="router_entropy"), []
    monkeypatch.setattr(type(page), "send", lambda self, message, buffers=None: sent.append((message, buffers)))
    page._receive(page, {"kind": "experts", "run": 1}, [])
    ((message, (entropy, together, *_)),) = sent
    assert message["phases"][0] == ["all", 3]
    assert not np.frombuffer(zlib.decompress(entropy), np.float32).any()
    assert zlib.decompress(together) == b""
    gs.plot.router_entropy(trace)


def test_views_that_cannot_be(grok, app):
    with pytest.raises(ValueError, match="lacks routing"):
        gs.view(grok.trace([1, 2], capture=()))
    with pytest.raises(ValueError, match="no pane 'map'"):
        gs.view(grok.trace([1, 2]), panes=["map"])
    with pytest.raises(ValueError, match="Trace 0 lacks a lens"):
        gs.view(grok.trace([1, 2]), panes="logit_lens")
    with pytest.raises(ValueError, match="Trace 0 lacks attention"):
        gs.view(grok.trace([1, 2]), panes=["attention"])
    with pytest.raises(ValueError, match="lacks routing of all layers"):
        gs.view(grok.trace([1, 2], capture=[gs.capture(tap, layers=[2, 5]) for tap in ROUTING]))
    with pytest.raises(ValueError, match="Trace 0 lacks attention"):
        gs.view(grok.trace([1, 2], capture=gs.capture("attn_pattern", layers=2)), panes=["attention"])
    with pytest.raises(ValueError, match="give two"):
        gs.view(grok.trace([1, 2]), panes=["compare"])
    with pytest.raises(TypeError, match="view takes Traces"):
        gs.view("text")
