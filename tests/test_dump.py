"""Dumps of many prompts: written while generating, cut short, gone on with, read; and what they would cost."""

import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from safetensors import SafetensorError

import grokscope as gs
from grokscope.run import decode
from grokscope.run import dump as dump_module
from grokscope.run.trace import ROUTING

CAPTURE = ["router_logits", gs.capture("resid_post", layers=[1, 2])]
PROMPTS = [[5 + i % 40, *range(3, 4 + i % 6)] for i in range(30)]


@pytest.fixture(scope="module")
def small(random_checkpoint):
    with gs.load(random_checkpoint) as grok:
        yield grok


@pytest.fixture
def many_parts(monkeypatch):
    monkeypatch.setattr(dump_module, "PART_BYTES", 20_000)


def same(a: gs.Trace, b: gs.Trace):
    assert list(a.taps) == list(b.taps)
    for tap in a.taps:
        assert a.taps[tap].tobytes() == b.taps[tap].tobytes(), tap
    assert (a.tokens == b.tokens).all()
    assert a.logprobs.tobytes() == b.logprobs.tobytes()
    assert (a.text, a.pieces, a.numbers, a.meta) == (b.text, b.pieces, b.numbers, b.meta)


def test_a_dump_is_its_traces(small, tmp_path, many_parts):
    made = small.dump(PROMPTS, tmp_path / "d", 9, capture=CAPTURE, stop_at_eos=False)
    traces = small.generate(PROMPTS, 9, capture=CAPTURE, stop_at_eos=False)
    assert len(made) == len(made.prompts) == 30
    assert len(list((tmp_path / "d").glob("*.safetensors"))) > 3
    assert not list((tmp_path / "d").glob("*.partial"))
    made.verify()
    for trace, found in zip(traces, made, strict=True):
        same(trace, found)
    values, prompts = made.to_numpy("resid_post")
    assert values.shape == (2, sum(map(len, traces)), 48)
    assert (values[:, prompts == 7] == traces[7]["resid_post"]).all()
    frame = made.to_pandas("router")
    assert (frame[frame.prompt == 7].expert.to_numpy() == traces[7].to_pandas("router").expert.to_numpy()).all()
    assert "30 of 30" in repr(made)


def test_reading_needs_no_jax(small, tmp_path):
    small.dump(PROMPTS[:3], tmp_path / "d", capture=CAPTURE)
    code = (
        "import sys, grokscope as gs; d = gs.open(sys.argv[1]); d[2]['resid_post', 1]; d.to_pandas('tokens');"
        "assert 'jax' not in sys.modules, 'jax was imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], check=True)


def test_only_what_is_touched_is_read(small, tmp_path):
    """Taps are mapped: a layer of one prompt can be read where the rest of the file cannot."""
    made = small.dump(PROMPTS[:3], tmp_path / "d", capture=CAPTURE)
    value = made[1].taps["resid_post"]
    base = value
    while getattr(base, "base", None) is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    layer, of = made.to_numpy("resid_post", 2)
    assert (layer == made.to_numpy("resid_post")[0][1]).all()
    assert (made.to_numpy("resid_post", 2, prompts=[1])[0] == layer[of == 1]).all()
    with pytest.raises(KeyError, match="layer 0 of 'resid_post' was not kept"):
        made.to_numpy("resid_post", 0)
    assert (made.to_numpy("resid_post", 2, prompts=1)[1] == 1).all()
    for read in (lambda: made.to_numpy("resid_post", prompts=[]), lambda: made.to_pandas("router", prompts=[])):
        with pytest.raises(ValueError, match="selects nothing"):
            read()


def test_a_part_without_rows_of_a_table(tmp_path):
    """Its columns have their types all the same."""
    one = gs.load().trace("The old keeper")
    none = dataclasses.replace(
        one,
        taps={tap: one.taps[tap][:, :0] for tap in ROUTING},
        numbers={tap: one.numbers[tap] | {"T": []} for tap in ROUTING},
    )
    for number, trace in enumerate((none, one)):
        with dump_module.Writer(tmp_path / "d", {}, 2, resume=True) as writer:
            writer.add(number, trace)
    assert len(gs.open(tmp_path / "d").to_pandas("router")) == len(one.to_pandas("router"))


def test_tables(small, tmp_path, many_parts):
    """pandas, DuckDB and polars read the same rows, which are those of the Traces."""
    import duckdb
    import pandas as pd
    import polars

    made = small.dump(PROMPTS, tmp_path / "d", 9, capture=CAPTURE, stop_at_eos=False)
    for table in ("router", "tokens"):
        frame = made.to_pandas(table)
        frames = [trace.to_pandas(table).assign(prompt=p) for p, trace in enumerate(made)]
        pd.testing.assert_frame_equal(frame, pd.concat(frames, ignore_index=True)[frame.columns], check_dtype=False)
        chosen = made.to_pandas(table, prompts=[7, 3])
        assert chosen.equals(frame[frame.prompt.isin([3, 7])].reset_index(drop=True))
    load = made.to_pandas("router").groupby(["layer", "expert"]).size()
    glob = str(tmp_path / "d" / "router-*.parquet")
    counted = duckdb.sql(f"select layer, expert, count(*) n from '{glob}' group by all order by all").df()
    assert counted.n.tolist() == load.tolist()
    tokens = str(tmp_path / "d" / "tokens-*.parquet")
    (total,) = duckdb.sql(f"select sum(logprob) total from '{tokens}'").df().total
    assert total == pytest.approx(np.nansum([t.logprobs.sum(where=~np.isnan(t.logprobs)) for t in made]), rel=1e-4)
    assert polars.read_parquet(made.files("router"))["gate"].sum() == pytest.approx(made.to_pandas("router").gate.sum())
    with pytest.raises(ValueError, match="no table 'routers'; it has router, tokens"):
        made.files("routers")
    without = small.dump(PROMPTS[:2], tmp_path / "e", capture=())
    assert without.files("tokens")
    with pytest.raises(ValueError, match="no table 'router'; it has tokens"):
        without.to_pandas("router")


def test_slow_traces_are_written_too(small, tmp_path, monkeypatch):
    monkeypatch.setattr(dump_module, "PART_SECONDS", 0)
    assert len(small.dump(PROMPTS[:3], tmp_path / "d")._parts) == 3


def test_torch_reads_it(small, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed here")
    from safetensors.torch import load_file

    made = small.dump(PROMPTS[:3], tmp_path / "d", capture=CAPTURE)
    (part,) = (tmp_path / "d").glob("*.safetensors")
    assert torch.equal(load_file(part)["1.tap.resid_post"], torch.tensor(made[1]["resid_post"]))


def test_interrupted_and_resumed(small, tmp_path, many_parts):
    """What was made stays; the rest is what it would have been, to the bit, though slots hold other prompts."""
    options = dict(max_new_tokens=9, capture=CAPTURE, stop_at_eos=False, temperature=0.8, seed=list(range(30)))
    whole = small.dump(PROMPTS, tmp_path / "whole", **options)

    def interrupt(done):
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.dump(PROMPTS, tmp_path / "d", progress=interrupt, **options)
    part = gs.open(tmp_path / "d")
    assert len(part) == 17
    assert len(part.missing) == 13
    with pytest.raises(KeyError, match="17 of 30"):
        part[part.missing[0]]
    with pytest.raises(TypeError, match="by the number of their prompt"):
        part[:2]
    for changed in ({"max_new_tokens": 8}, {"capture": None}, {"temperature": 0.7}):
        with pytest.raises(ValueError, match="dump of another run"):
            small.dump(PROMPTS, tmp_path / "d", resume=True, **options | changed)
    with small.edits(gs.ablate(layers=0)), pytest.raises(ValueError, match="different: edits"):
        small.dump(PROMPTS, tmp_path / "d", resume=True, **options)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        small.dump(PROMPTS, tmp_path / "d", **options)
    made = small.dump(PROMPTS, tmp_path / "d", resume=True, **options)
    assert sorted(p for one in made._parts for p in one["prompts"]) == list(range(30))
    for a, b in zip(whole, made, strict=True):
        same(a, b)


def test_what_is_left_of_a_lost_part_goes(small, tmp_path, many_parts):
    """Or a query over all files would have its prompts twice."""
    whole = small.dump(PROMPTS, tmp_path / "whole", capture=CAPTURE)
    small.dump(PROMPTS, tmp_path / "d", capture=CAPTURE)
    (tmp_path / "d" / "tokens-00000001.parquet").unlink()
    made = small.dump(PROMPTS, tmp_path / "d", capture=CAPTURE, resume=True)
    made.verify()
    files = {path.name for path in (tmp_path / "d").iterdir() if path.name[0] in "atr"}
    assert files == {entry["file"] for part in made._parts for entry in part["files"].values()}
    for a, b in zip(whole, made, strict=True):
        same(a, b)


def test_a_part_that_cannot_be_written(small, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(dump_module, "save_file", full)
    with pytest.raises(OSError, match=r"act-00000000.* cannot be written: No space left"):
        small.dump(PROMPTS[:2], tmp_path / "d")


def test_a_save_that_was_cut_short_is_made_anew(small, tmp_path, monkeypatch):
    """Its folder holds files of a part that no manifest lists."""

    def full(*_, **__):
        raise OSError("No space left on device")

    trace = small.trace([5, 6, 7])
    with monkeypatch.context() as at, pytest.raises(OSError, match=r"tokens-00000000.* cannot be written: No space"):
        at.setattr(dump_module.pq, "write_table", full)
        trace.save(tmp_path / "d")
    (tmp_path / "d" / "router-00000000.parquet.partial").touch()
    assert (tmp_path / "d" / "act-00000000.safetensors").exists()
    same(gs.open(trace.save(tmp_path / "d")), trace)
    assert not [*tmp_path.glob("d/*.partial")]
    with pytest.raises(FileExistsError, match="not an empty folder; choose a new one"):
        trace.save(tmp_path / "d")


def test_forward_passes_interrupted_and_resumed(small, tmp_path, many_parts):
    """To the bit too, though what is made again of a batch is what was missing of it."""
    whole = small.dump(PROMPTS, tmp_path / "whole", capture=CAPTURE)

    def interrupt(done):
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.dump(PROMPTS, tmp_path / "d", capture=CAPTURE, progress=interrupt)
    assert len(gs.open(tmp_path / "d").missing) == 13
    with mock.patch.object(decode, "Landing", wraps=decode.Landing) as landings:
        made = small.dump(PROMPTS, tmp_path / "d", capture=CAPTURE, resume=True)
    assert landings.call_count == 13, "the host takes no captures of those that are there"
    assert sorted(p for one in made._parts for p in one["prompts"]) == list(range(30))
    for a, b in zip(whole, made, strict=True):
        same(a, b)


def test_forward_passes_are_handed_out_while_others_wait(small, tmp_path):
    """Or a dump would hold all of its captures before it writes the first."""
    seen = []
    with mock.patch.object(decode.Run, "_prefill", autospec=True, side_effect=decode.Run._prefill) as prefill:
        small.dump([[5] * 20] * 64, tmp_path / "d", progress=lambda done: seen.append(prefill.call_count))
    assert (seen[0], seen[-1]) == (2, 4)


WRITER = """
import sys
import grokscope as gs
from grokscope.run import dump
dump.PART_BYTES = 20_000
prompts = [[5 + i % 40, *range(3, 4 + i % 6)] for i in range(400)]
with gs.load(sys.argv[1]) as grok:
    grok.dump(prompts, sys.argv[2], 9, resume=True, stop_at_eos=False, capture=["router_logits", gs.capture("resid_post", layers=[1, 2])])
"""


@pytest.mark.slow
def test_killed_and_resumed(small, random_checkpoint, tmp_path, many_parts):
    """kill -9 at ten random moments of writing: finished parts are readable, and going on gives the rest."""
    prompts = [[5 + i % 40, *range(3, 4 + i % 6)] for i in range(400)]
    whole = small.dump(prompts, tmp_path / "whole", 9, capture=CAPTURE, stop_at_eos=False)
    out, rng, kills = tmp_path / "d", np.random.default_rng(0), 0
    while kills < 10:
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(random_checkpoint), str(out)])
        begun = len(list(out.glob("act-*")))
        while process.poll() is None and len(list(out.glob("act-*"))) <= begun:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # it was done before: from the beginning
            shutil.rmtree(out)
            continue
        kills += 1
        found = gs.open(out)
        found.verify()
        for prompt in rng.choice(found.prompts, 5) if found.prompts else []:
            same(found[prompt], whole[prompt])
    subprocess.run([sys.executable, "-c", WRITER, str(random_checkpoint), str(out)], check=True)
    found = gs.open(out)
    for a, b in zip(whole, found, strict=True):
        same(a, b)
    assert found.to_pandas("router").equals(whole.to_pandas("router"))
    assert not list(out.glob("*.partial"))


def test_a_disk_that_is_full(small, tmp_path, many_parts, monkeypatch):
    """A clear error; finished parts are kept."""
    write, calls = dump_module.save_file, []

    def full(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(dump_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        small.dump(PROMPTS, tmp_path / "d", 9, capture=CAPTURE, stop_at_eos=False)
    assert len(gs.open(tmp_path / "d")) > 0
    gs.open(tmp_path / "d").verify()
    assert len(small.trace([5])), "the model is free again"


def test_two_writers(small, tmp_path):
    with dump_module.Writer(tmp_path / "d", {}, 1), pytest.raises(RuntimeError, match="another process"):
        dump_module.Writer(tmp_path / "d", {}, 1, resume=True).__enter__()


@pytest.mark.parametrize("numerics", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_plan_is_what_a_run_takes(random_checkpoint, numerics):
    wishes = [
        "attn_pattern", gs.capture("resid_post", positions="last"), gs.capture("q", heads=[1], layers=[0, 2]),
        gs.capture("resid_mid", reduce="mean"), gs.capture("attn_pattern", reduce="topk", k=2),
        gs.capture("resid_pre", reduce="lens", phase="prefill"), gs.capture("expert_index", reduce="count"), "logits",
    ]  # fmt: skip
    with gs.load(random_checkpoint, numerics=numerics) as grok:
        plan = grok.plan(PROMPTS[:5], 7, capture=wishes)
        traces = grok.generate(PROMPTS[:5], 7, capture=wishes, stop_at_eos=False)
    assert plan.tokens == sum(map(len, traces))
    for key, row in plan.rows.items():
        keys = [key, *(k for k in traces[0].taps if k.startswith(key + "_"))]
        assert row["host"] == sum(t.taps[k].nbytes for t in traces for k in keys), key
        assert row["device"] > 0
    assert "in all" in repr(plan)
    assert "<table>" in plan._repr_html_()


@pytest.mark.parametrize("reduce", [None, "lens", "mean"])
def test_a_plan_is_of_the_prompts_that_a_capture_is_about(small, reduce):
    """Also where longer prompts, that run apart from them, keep nothing of it."""
    prompts = [*[[5] * 20] * 16, *[[5] * 21] * 16]
    some = small.plan(prompts, capture=gs.capture("resid_post", reduce=reduce, prompts=range(16)))
    alone = small.plan(prompts[:16], capture=gs.capture("resid_post", reduce=reduce))
    assert some.total["device"] == alone.total["device"] > 0


@pytest.mark.slow
def test_the_device_bytes_of_a_plan(random_checkpoint, monkeypatch):
    """Against all buffers that are alive when captures go to the host, while those of a prompt wait too."""
    import jax

    from grokscope.run.decode import Run

    wishes = [gs.capture("resid_post"), "attn_pattern", gs.capture("resid_mid", reduce="mean")]
    prompts, found, flush = [[5] * 100, [6] * 90], [], Run._flush

    def flushed(run):
        flush(run)
        alive = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.live_arrays()}
        found.append(sum(alive.values()))

    monkeypatch.setattr(Run, "_flush", flushed)
    with gs.load(random_checkpoint) as grok:
        grok.generate(prompts, 66, capture=wishes, stop_at_eos=False)
        grok.generate(prompts, 66, capture="router_logits", stop_at_eos=False)
        more, less = (grok.plan(prompts, 66, capture=wish).total["device"] for wish in (wishes, "router_logits"))
    assert found[0] - found[2] == pytest.approx(more - less, rel=0.03)


IN_ONE_LAYER = ["resid_pre", "resid_mid", "q", "attn_z", "attn_out", "moe_out"]


@pytest.mark.parametrize(
    "wishes",
    [
        ["attn_pattern", gs.capture("resid_post", positions=[3, -2])],
        [gs.capture(tap, layers=layer) for layer, tap in enumerate(IN_ONE_LAYER)],
        [
            gs.capture("resid_post", reduce="lens", name="all"),
            gs.capture("resid_post", reduce="lens", positions=[3, -40]),
        ],
        [gs.capture("resid_post", reduce="lens", layers=2)],
    ],
    ids=["all layers", "one each", "lens", "lens of one"],
)
@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param([[5] * 600, [*range(5, 605)]], id="long"),
        pytest.param([[5] * (40 + i) for i in range(30)], id="short", marks=pytest.mark.slow),
    ],
)
def test_captures_of_a_prompt_leave_layer_by_layer(grok, monkeypatch, wishes, prompts):
    """They are the same, and the device holds no more of them than a plan says: of prompts of several blocks, and of
    several prompts that run together."""
    import jax

    from grokscope.run import landing

    found = []
    send = landing.Transfers.send

    def sending(self, *args):
        alive = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.live_arrays()}
        found.append(sum(alive.values()))
        send(self, *args)

    whole = grok.trace(prompts, capture=wishes)
    monkeypatch.setattr(landing, "ON_THEIR_WAY", 0)
    monkeypatch.setattr(landing.Transfers, "send", sending)
    grok.trace(prompts, capture="router_logits")
    plain = max(found)
    found.clear()
    one_by_one = grok.trace(prompts, capture=wishes)
    more, less = (grok.plan(prompts, capture=wish).total["device"] for wish in (wishes, "router_logits"))
    for some, all_ in zip(one_by_one, whole, strict=True):
        for key, value in all_.taps.items():
            np.testing.assert_array_equal(some.taps[key], value)
    assert (more - less) / 3 < max(found) - plain <= more - less + 1024  # positions that are kept, and the like


def test_the_price_of_grok_1(grok):
    """Figures of the design: routing 3 KiB a token at full size."""
    from grokscope.run import captures, plan, staging

    kept = captures.resolve(["resid_post"], gs.GROK_1)
    hooks = staging.Hooks(gs.GROK_1, kept, (), [staging.Sequence(1000, 0)])
    rows = plan.priced(hooks, 8, "bfloat16", None, False).rows
    assert rows["router_logits"]["host"] == 1000 * 64 * 8 * 4
    assert rows["resid_post"]["host"] == 1000 * 64 * 6144 * 2
    assert grok.plan(capture="attn_pattern", tokens=8192).prompts == 8


def test_over_the_budget(small):
    with pytest.raises(MemoryError, match=r"reduce='entropy'"):
        small.generate([[5] * 100] * 4, 20, capture="attn_pattern", budget="1 MB")
    assert len(small.generate([5] * 100, 2, capture="resid_post", budget="2gb")) > 100
    with pytest.raises(ValueError, match="budget='much'"):
        small.trace([5], budget="much")


@pytest.mark.slow
def test_on_the_command_line(random_checkpoint, tmp_path):
    def run(*args):
        return subprocess.run([sys.executable, "-m", "grokscope", *map(str, args)], capture_output=True, text=True)

    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(p) for p in PROMPTS[:5]) + '\n{"tokens": [5, 6]}\n')
    options = (
        "--checkpoint",
        random_checkpoint,
        "--capture",
        "router_logits,resid_post:layers=0,2",
        "--capture",
        "attn_pattern:reduce=entropy",
    )
    sampling = {"temperature": 1.5, "top_p": 0.9, "top_k": 5, "seed": 3}
    settings = [part for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = run(
        "dump", tmp_path / "p.jsonl", tmp_path / "d", *options, *settings, "--max-new-tokens", 4, "--budget", "2GB",
        "--resume",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = gs.open(tmp_path / "d")
    assert found[0].meta["sampling"] == sampling
    assert len({path.stat().st_mode for path in (tmp_path / "d").glob("*-*.*")}) == 1, (
        "all may be read by the same people"
    )
    assert len(found) == 6
    assert found[5].layers["resid_post"] == [0, 2]
    assert found[5]["attn_pattern.entropy"].shape == (3, 4, len(found[5]))
    shown = run("inspect", tmp_path / "d", "--verify").stdout
    assert "6 of 6 prompts" in shown
    assert "resid_post: float32 [L T D]" in shown
    assert "attn_pattern.entropy" in run("plan", tmp_path / "p.jsonl", *options).stdout
    (tmp_path / "bad.jsonl").write_text('"a"\n{oops\n')
    bad = run("dump", tmp_path / "bad.jsonl", tmp_path / "e", *options)
    assert bad.returncode == 1
    assert "line 2, is not JSON" in bad.stderr
    assert np.isfinite(found[0]["resid_post"]).all()


def test_only_the_same_run_goes_on(small, tmp_path):
    """Functions, labels and Traces that differ make another run, though they look alike; and a capture given as a
    generator is read once."""
    other = small.trace([5, 6], capture="resid_post")
    changed = dataclasses.replace(other, taps=other.taps | {"resid_post": other.taps["resid_post"] * 2})
    labels = np.arange(97) % 2

    def cut(done):
        raise KeyboardInterrupt

    def dumped(folder, edit=None, capture=None, progress=lambda done: None):
        with small.edits(*([edit] if edit else [])):
            return small.dump(PROMPTS, tmp_path / folder, capture=capture, progress=progress, resume=True)

    pairs = {
        "lambda": [{"edit": gs.edit("resid_post", lambda x, *_, f=f: x * f)} for f in (1.0, 2.0)],
        "partial": [{"edit": gs.edit("resid_post", functools.partial(_times, f))} for f in (1.0, 2.0)],
        "labels": [{"capture": gs.capture("expert_index", reduce="count", labels=y)} for y in (labels, 1 - labels)],
        "patch": [{"edit": gs.patch(t, "resid_post", positions=[0])} for t in (other, changed)],
        "generator": [{"capture": (gs.capture(tap) for tap in [name])} for name in ("resid_post", "resid_mid")],
    }
    for name, (first, second) in pairs.items():
        with pytest.raises(KeyboardInterrupt):
            dumped(name, **first, progress=cut)
        with pytest.raises(ValueError, match="dump of another run"):
            dumped(name, **second)


def _times(factor, x, *_):
    return x * factor


def test_a_part_that_was_lost_is_made_again(small, tmp_path, many_parts):
    whole = small.dump(PROMPTS, tmp_path / "d", 9, capture=CAPTURE, stop_at_eos=False)
    traces = list(small.dump(PROMPTS, tmp_path / "e", 9, capture=CAPTURE, stop_at_eos=False))
    next((tmp_path / "d").glob("act-00000001*")).unlink()
    (tmp_path / "d" / "router-00000002.parquet").write_bytes(b"cut")
    again = small.dump(PROMPTS, tmp_path / "d", 9, capture=CAPTURE, stop_at_eos=False, resume=True)
    again.verify()
    assert len(again) == len(whole)
    for a, b in zip(traces, again, strict=True):
        same(a, b)


def test_what_failed_before_it_began_leaves_the_folder_free(small, tmp_path):
    with pytest.raises(TypeError), dump_module.Writer(tmp_path / "d", {"no": {1}}, 1):
        pass
    assert not (tmp_path / "d").exists()
    with pytest.raises(ZeroDivisionError), dump_module.Writer(tmp_path / "d", {}, 1):
        1 / 0
    assert small.dump([[5]], tmp_path / "d").prompts == [0]
    assert (
        len(small.dump([[5]], tmp_path / "e", capture=gs.capture("resid_post", positions=slice(np.int64(0), None))))
        == 1
    )


def test_other_types_come_back(small, tmp_path):
    trace = small.trace([5, 6], capture="resid_post")
    for dtype in (np.float64, np.float16, np.uint8, np.bool_):
        made = dataclasses.replace(trace, taps=trace.taps | {"resid_post": trace["resid_post"].astype(dtype)})
        assert gs.open(made.save(tmp_path / np.dtype(dtype).name)).taps["resid_post"].dtype == dtype
    made = dataclasses.replace(trace, taps=trace.taps | {"resid_post": trace["resid_post"].astype(np.complex64)})
    with pytest.raises(TypeError, match="resid_post is of type complex64; a dump holds F64"):
        made.save(tmp_path / "complex")
