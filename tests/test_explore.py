"""The explorer: what its kernel side sends, and what a user does with it in a real browser."""

import json
import re
import time
import zlib

import lab
import numpy as np
import pytest

import grokscope as gs
from grokscope.notebook.widgets import explore as module

CELL = "import grokscope as gs\ngrok = gs.load()\napp = gs.explore(grok)\napp"


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


def test_a_run_as_it_is_sent(app):
    """Begun with the prompt's routing, tokens in batches, then the whole, which is what the Trace holds."""
    (begin, (prompt,)), (run, buffers) = generated(app)
    trace = app.trace
    logits = trace["router_logits"]
    assert (np.frombuffer(prompt, np.float32).reshape(6, -1, 8) == logits[:, : trace.prompt_length]).all()
    streamed = [
        np.frombuffer(data, np.float32).reshape(6, -1, 8)
        for m, (data,) in [x for x in app.sent if x[0]["kind"] == "tokens"]
    ]
    assert (np.concatenate(streamed, axis=1) == logits[:, trace.prompt_length :]).all()
    assert run["pieces"] == trace.pieces
    assert begin["total"] == len(trace)
    assert buffers[0] == b"", "the page has it"
    app._receive(app, {"kind": "whole", "run": 1}, [])
    assert (np.frombuffer(app.sent[-1][1][0], np.float32).reshape(logits.shape) == logits).all()
    size = sum(len(b) for _, bs in app.sent for b in bs) + len(json.dumps([m for m, _ in app.sent]))
    assert size < 100_000


def test_attention_as_it_is_sent(app):
    """One head exactly to 1/65,535; thumbnails as the largest of their blocks."""
    generated(app, max=80)
    n = len(app.trace)
    pattern = app.trace.attention(layers=2)[0]
    app._receive(app, {"kind": "head", "run": 1, "layer": 2, "head": 4}, [])
    _, (data,) = app.sent[-1]
    found = np.frombuffer(zlib.decompress(data), np.uint16) / 65535
    np.testing.assert_allclose(found, pattern[4][np.tril_indices(n)], atol=1e-5)
    app._receive(app, {"kind": "attention", "run": 1, "layer": 2}, [])
    message, (data,) = app.sent[-1]
    assert n > message["size"] == 64
    thumbs = (np.frombuffer(zlib.decompress(data), np.uint8).reshape(6, 64, 64) / 255.0) ** 2
    bounds = [-(-i * n // 64) for i in range(65)]
    for h, q, k in ((0, 3, 1), (4, 63, 0), (5, 40, 39)):
        block = pattern[h, bounds[q] : bounds[q + 1], bounds[k] : bounds[k + 1]]
        assert thumbs[h, q, k] == pytest.approx(block.max(), abs=0.005)
    assert len(message["labels"]) == 6


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
    assert app.sent[-1][0] == {
        "kind": "error",
        "pane": "generate",
        "text": "ValueError: the prompt is empty; type a text",
    }


def test_export(app, tmp_path):
    generated(app)
    app._receive(app, {"kind": "price", "run": 1}, [])
    price = app.sent[-1][0]["bytes"]
    app._receive(app, {"kind": "export", "run": 1, "taps": ["resid_post"], "directory": str(tmp_path / "d")}, [])
    app._worker.join(60)
    assert app.sent[-1][0]["kind"] == "exported"
    dump = gs.open(tmp_path / "d")
    assert dump[0].taps["resid_post"].nbytes == price["resid_post"]
    assert (dump[0].tokens == app.trace.tokens).all()
    np.testing.assert_allclose(dump[0]["router_logits"], app.trace["router_logits"], atol=1e-3)


@pytest.fixture(scope="module")
def lab_url(tmp_path_factory):
    lab.needs_chromium()
    root = tmp_path_factory.mktemp("lab")
    lab.write_notebook(root / "explore.ipynb", CELL)
    with lab.server(root) as url:
        yield url("explore.ipynb")


def generate(page, text="Done"):
    page.click(".gs #b-gen")
    page.wait_for_function(f"() => document.querySelector('.gs #pgt').textContent.startsWith('{text}')")


def test_in_the_browser(lab_url):
    """The shortest use: run, generate, click a token; nothing is asked of any other machine, no error is logged."""
    with lab.page() as page:
        lab.run_all(page, lab_url)
        page.wait_for_selector(".gs #b-gen")
        generate(page)
        page.click(".gs .tok >> nth=3")
        assert page.inner_text(".gs #o-t") == "3"
        assert "position 3, prefill" in page.inner_text(".gs #iwhere")
        assert len(page.query_selector_all(".gs #t-next tr")) == 5
        assert page.errors == []
        assert {re.split("[/:]", url)[3] for url in page.requests if url.startswith("http")} == {"127.0.0.1"}


@pytest.mark.slow
def test_a_view_in_the_browser(tmp_path):
    """Traces from disk without a model, in panes of choice; a click works as in the explorer."""
    lab.needs_chromium()
    cells = [
        "import grokscope as gs\ngrok = gs.load()\nkeep = ['router_logits', gs.capture('attn_pattern', later=True)]",
        "a, b = grok.generate(['The old keeper', 'The old house'], 12, capture=keep)\na.save('a')",
        "gs.view(gs.open('a'))",
        "gs.view(a, b, panes=['routing', 'compare'])",
    ]
    lab.write_notebook(tmp_path / "view.ipynb", *cells)
    with lab.server(tmp_path) as url, lab.page() as page:
        lab.run_all(page, url("view.ipynb"))
        page.wait_for_function("() => document.querySelectorAll('.gs .tok').length > 10")
        page.click(".gs .tok >> nth=3")
        assert page.inner_text(".gs #o-t >> nth=0") == "3"
        page.wait_for_function("() => document.querySelectorAll('.gs #t-r tr').length >= 3")
        assert not page.locator(".gs #prompt >> nth=0").is_visible()
        second = page.locator(".gs >> nth=1")
        assert "First divergence" in second.locator("#ckey").inner_text()
        assert not second.locator("#strip").is_visible()
        assert page.errors == []


@pytest.mark.slow
def test_a_session_in_the_browser(lab_url, tmp_path):
    """Prompt, stop, layers, heatmap, heads, an edit, compare, export, and the page loaded again."""
    with lab.page() as page:
        lab.run_all(page, lab_url)
        page.wait_for_selector(".gs #b-gen")
        page.fill(".gs #pbox", "The cat sat on the mat. The cat")
        page.wait_for_function("() => document.querySelector('.gs #ptok').textContent.startsWith('1')")
        generate(page)
        assert "The cat sat" in page.inner_text(".gs #strip").replace("\n", "")

        page.fill(".gs #f1", "400")
        page.click(".gs #b-gen")
        page.wait_for_function(
            "() => /^([5-9]|[1-9][0-9]) of 400/.test(document.querySelector('.gs #pgt').textContent)"
        )
        begun = time.perf_counter()
        page.click(".gs #b-stop")
        page.wait_for_function("() => document.querySelector('.gs #pgt').textContent.startsWith('Stopped')")
        assert time.perf_counter() - begun < 3, "a step and 0.3 s, on a machine that does other things too"
        made = int(re.search(r"at (\d+) of 400", page.inner_text(".gs #pgt"))[1])
        assert 5 <= made < 400

        page.click(".gs [data-k='l+']")
        assert page.inner_text(".gs #o-l") == "1"
        box = page.locator(".gs #c-map").bounding_box()
        before = len(page.requests)
        page.mouse.move(box["x"] + 100, box["y"] + 60)
        assert "Layer" in page.inner_text(".gs #tip")
        assert "gate" in page.inner_text(".gs #tip")
        assert len(page.requests) == before, "hovering asks nothing"
        page.click(".gs #c-sheet", position={"x": 120, "y": 30})
        assert page.inner_text(".gs #o-h") == "1.1"
        page.wait_for_function("() => document.querySelectorAll('.gs #t-r tr').length >= 3")

        page.fill(".gs #f1", "20")
        generate(page)
        page.click(".gs #quick [data-q='ban']")
        assert "Ban expert" in page.inner_text(".gs #elist")
        page.click(".gs #b-run")
        page.wait_for_function("() => document.querySelectorAll('.gs #trun tr').length === 4")
        page.click(".gs #trun tr:nth-child(2) [data-r='A']")
        page.click(".gs #trun tr:nth-child(1) [data-r='B']")
        assert "ban" in page.inner_text(".gs #cname")
        assert "First divergence" in page.inner_text(".gs #ckey")

        page.fill(".gs #dest", str(tmp_path / "d"))
        page.wait_for_function("() => document.querySelector('.gs #taps .tot').textContent.includes('kB')")
        page.click(".gs #b-exp")
        page.wait_for_selector(".gs #xout:not([hidden])")
        assert gs.open(tmp_path / "d").prompts == [0]

        page.evaluate("async () => await window.jupyterapp.commands.execute('docmanager:save')")
        page.reload()
        page.wait_for_function(lab.READY)
        page.wait_for_function("() => document.querySelectorAll('.gs #trun tr').length === 4")
        assert page.input_value(".gs #pbox") == "The cat sat on the mat. The cat"
        assert "Ban expert" in page.inner_text(".gs #elist")
        assert page.errors == []


def test_the_page_says_what_went_wrong(app):
    generated(app, max=0)
    assert "max_new_tokens=0" in app.sent[-1][0]["text"]


def test_runs_that_are_forgotten(app, monkeypatch):
    monkeypatch.setattr(module, "RUNS", 2)
    for _ in range(3):
        generated(app, max=2)
    assert len(app.runs) == 2


def test_views_that_cannot_be(grok, app):
    with pytest.raises(ValueError, match="lacks routing"):
        gs.view(grok.trace([1, 2], capture=()))
    with pytest.raises(ValueError, match="no pane 'map'"):
        gs.view(grok.trace([1, 2]), panes=["map"])
    with pytest.raises(TypeError, match="view takes Traces"):
        gs.view("text")
