"""trace, generate and loss, as their users call them."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config, write_random

import grokscope as gs
from grokscope.model.transformer import KVCache, Positions
from grokscope.run import decode, steps
from grokscope.run.decode import batches, block_lengths, cache_length
from grokscope.run.hooks import PLAIN, Given

PROMPTS = [
    "The",
    "Once upon a time there was",
    "def add(a, b):\n    return",
    "In the beginning " * 12,
    "12 + 7 =",
    "La",
    "#include <",
    "x",
]


LARGE = ("expert_hidden", "expert_out", "moe_out")  # before a norm; these reach 100


def agreeing(a, b):
    """Positions before the first whose experts differ. Another shape of the same sum may flip a near tie, no more."""
    n = min(len(a), len(b))
    flips = np.nonzero((a["expert_index"][:, :n] != b["expert_index"][:, :n]).any(axis=(0, 2)))[0]
    if not len(flips):
        return n
    probs = np.sort(a["router_probs"][:, flips[0]], axis=-1)
    assert (probs[:, -2] - probs[:, -3]).min() < 1e-4 or np.diff(probs[:, -2:]).min() < 1e-4, (
        "experts flipped without a tie"
    )
    return int(flips[0])


def assert_same_run(a, b, taps=("logits", "router_logits")):
    n = agreeing(a, b)
    assert n >= len(a) // 2
    assert (a.tokens[:n] == b.tokens[:n]).all()
    np.testing.assert_allclose(a.logprobs[1:n], b.logprobs[1:n], atol=1e-4)
    for tap in taps:
        one, other = (np.moveaxis(t[tap], t.dims[tap].index("T"), 0)[:n] for t in (a, b))
        scale = max(1.0, np.abs(other).max() / 10) if tap in LARGE else 1.0
        np.testing.assert_allclose(one, other, atol=1e-4 * scale, err_msg=tap)


CAPTURE = ("router_logits", "router_probs", "expert_index", "logits")


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.8])
def test_a_batch_equals_single_runs(grok, temperature):
    options = dict(max_new_tokens=24, temperature=temperature, top_k=50, stop_at_eos=False, capture=CAPTURE)
    seeds = [7, 1, 2, 3, 4, 5, 6, 7]
    together = grok.generate(PROMPTS, seed=seeds, **options)
    assert [t.meta["prompt"] for t in together] == list(range(8))
    for prompt, seed, batched in zip(PROMPTS, seeds, together, strict=True):
        assert_same_run(batched, grok.generate(prompt, seed=seed, **options))


def test_slots_are_refilled(grok):
    """More prompts than slots, of different lengths, ending at different times."""
    prompts = [list(range(20, 21 + i)) for i in range(11)]
    together = grok.generate(prompts, max_new_tokens=70, stop_at_eos=False, capture=CAPTURE)
    assert [t.prompt_length for t in together] == [len(p) for p in prompts]
    for i in (0, 8, 10):
        assert_same_run(together[i], grok.generate(prompts[i], max_new_tokens=70, stop_at_eos=False, capture=CAPTURE))


def test_neighbours_change_nothing(grok):
    """Same shapes, other neighbours and another slot: bit for bit."""
    first = [[30, 31], [40] * 9, [50, 51, 52], [60] * 5]
    other = [[99] * 7, [30, 31], [98] * 3, [97] * 9]
    options = dict(max_new_tokens=20, stop_at_eos=False, capture=CAPTURE)
    a, b = grok.generate(first, **options)[0], grok.generate(other, **options)[1]
    assert (a.tokens == b.tokens).all()
    assert (a["logits"] == b["logits"]).all()
    assert (a.logprobs[1:] == b.logprobs[1:]).all()


@pytest.mark.parametrize("length", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (31, 33, 129, 513, 700))])
def test_generate_equals_trace_of_its_tokens(grok, length):
    ids = np.random.default_rng(length).integers(4, 8192, length)
    made = grok.generate(ids, max_new_tokens=66, temperature=1.0, stop_at_eos=False, capture=gs.TAPS)
    whole = grok.trace(made.tokens, capture=gs.TAPS)
    assert_same_run(made, whole, gs.TAPS)


def test_shapes_of_a_run():
    assert block_lengths(700) == [512, 256]
    assert block_lengths(513) == [512, 1]
    assert [block_lengths(n) for n in (1, 2, 33, 512)] == [[1], [32], [64], [512]]
    assert [cache_length(n) for n in (1, 33, 200, 513)] == [32, 64, 256, 1024]


def test_who_is_prefilled_together():
    """Prompts of one block's length, up to 512 positions and no more than slots; longer ones alone."""
    lengths = [(20, 0)] * 17 + [(40, 0), (300, 0), (60, 0), (5, 0)]
    assert batches(lengths, 0) == [[*range(16)], [16, 20], [17, 19], [18]]
    assert batches([(20, 5)] * 10, 8) == [[*range(8)], [8, 9]]
    assert batches([(20, 5), *[(600, 5)] * 3, (20, 5)], 1) == [[0], [1], [2], [3], [4]]
    assert [len(b) for b in batches([(20, 0), *[(300, 0)] * 63, (20, 0)], 0)] == [1] * 65, "too far apart"


def test_events_tell_the_text(grok):
    events = []
    trace = grok.generate("Once upon a time", max_new_tokens=40, temperature=0.9, seed=5, on_token=events.append)
    assert "".join(e.text for e in events) == trace.continuation
    assert [e.id for e in events] == trace.tokens[trace.prompt_length :].tolist()
    assert [e.position for e in events] == list(range(trace.prompt_length, len(trace)))
    np.testing.assert_allclose([e.logprob for e in events], trace.logprobs[trace.prompt_length :], atol=1e-6)
    assert trace.text == "Once upon a time" + trace.continuation
    assert {e.prompt for e in events} == {0}


def test_events_inside_a_character_have_no_text(grok):
    """Hot sampling meets byte tokens: each event has the characters that it completes, and they add up."""
    events = []
    trace = grok.generate([1], max_new_tokens=400, temperature=3.0, seed=1, stop_at_eos=False, on_token=events.append)
    pieces = [grok.tokenizer.bytes[e.id] for e in events]
    assert any(p and p[0] >= 0x80 and len(p) == 1 for p in pieces), "choose a seed that meets byte tokens"
    assert any(e.text == "" and p for e, p in zip(events, pieces, strict=True))
    assert trace.continuation.startswith("".join(e.text for e in events))


def test_eos(grok):
    """A text ends at EOS; an EOS in the prompt does not end it."""
    assert len(grok.generate([1, 500, 2, 1, 600], max_new_tokens=5, stop_at_eos=False)) == 10
    options = dict(max_new_tokens=120, temperature=1.2)
    tries = (grok.generate("1 + 1 = ", seed=seed, **options) for seed in range(60))
    ended, seed = next((t, t.meta["sampling"]["seed"]) for t in tries if t.meta["finish"] == "eos")
    free = grok.generate("1 + 1 = ", seed=seed, stop_at_eos=False, **options)
    assert free.meta["finish"] == "length"
    assert (free.tokens[: len(ended)] == ended.tokens).all()
    assert ended.tokens[-1] == grok.config.eos_token
    assert (ended.tokens[ended.prompt_length : -1] != grok.config.eos_token).all()
    assert "[EOS]" not in ended.text
    assert "[EOS]" in ended.pieces
    assert ended["router_logits"].shape[1] == len(ended)


def test_stop_strings(grok):
    whole = grok.generate("The old", max_new_tokens=40).continuation
    word = whole[10:16]
    trace = grok.generate("The old", max_new_tokens=40, stop=[word, "never in it"])
    assert trace.meta["finish"] == "stop"
    assert word in trace.continuation
    assert len(trace.continuation) < len(whole)


def test_seeds(grok):
    a, b, c = (grok.generate("A", max_new_tokens=20, temperature=1.0, seed=s).tokens for s in (3, 3, 4))
    assert (a == b).all()
    assert len(a) != len(c) or (a != c).any()


def test_greedy_is_the_argmax(grok):
    trace = grok.generate("The", max_new_tokens=30, stop_at_eos=False, capture="logits")
    predicted = trace["logits"].argmax(-1)
    assert (predicted[trace.prompt_length - 1 : -1] == trace.tokens[trace.prompt_length :]).all()


def test_kinds_of_prompts(grok):
    ids = [562, 3888, 311]
    kinds = [ids, tuple(ids), np.array(ids), np.array(ids, np.uint16), [np.int64(i) for i in ids], jnp.array(ids)]
    for prompt in kinds:
        assert grok.trace(prompt, capture=()).tokens.tolist() == ids
    assert grok.trace(range(5, 9), capture=()).tokens.tolist() == [5, 6, 7, 8]
    assert [len(t) for t in grok.trace(np.array([ids, ids]), capture=())] == [3, 3]
    assert [len(t) for t in grok.trace(["The", ids, tuple(ids)], capture=())] == [2, 3, 3]
    assert isinstance(grok.trace([ids], capture=()), list)
    assert grok.trace(np.str_("The"), capture=()).tokens.tolist() == [1, 562]
    assert [len(t) for t in grok.trace(np.array(["The", "The"]), capture=())] == [2, 2]


def test_bos(grok):
    """A text gets BOS where the model was trained so; ids are never changed."""
    assert grok.trace("The").tokens[0] == 1
    assert grok.trace([562]).tokens.tolist() == [562]


def test_loss(grok):
    text = "The old keeper of the lighthouse."
    found = grok.loss(text)
    trace = grok.trace(text)
    assert found.num_tokens == len(trace) - 1
    assert found.num_bytes == len(text)
    assert found.nats_per_token == pytest.approx(-trace.logprobs[1:].mean(), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(-trace.logprobs[1:].sum() / np.log(2) / len(text), rel=1e-6)
    both = grok.loss([text, "x" * 40])
    assert both.num_tokens > found.num_tokens


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g: g.trace(""), ValueError, "prompt 0 is empty"),
        (lambda g: g.trace([]), ValueError, "an empty list"),
        (lambda g: g.trace(["a", ""]), ValueError, "prompt 1 is empty"),
        (lambda g: g.trace([5] * 9000), ValueError, "9000 tokens; the context holds 1024"),
        (lambda g: g.generate([5] * 1000, max_new_tokens=25), ValueError, "1025 in all; the context holds 1024"),
        (lambda g: g.trace([5, 8192]), ValueError, "id 8192; the vocabulary has ids 0 to 8191"),
        (lambda g: g.trace([5, -1]), ValueError, "id -1"),
        (lambda g: g.trace([5.5]), TypeError, "whole numbers"),
        (lambda g: g.trace(5), TypeError, "got int"),
        (lambda g: g.trace(b"text"), TypeError, "got bytes"),
        (lambda g: g.trace(np.array(5)), TypeError, "got ndarray"),
        (lambda g: g.generate("a", stop=5), TypeError, "stop=5: expected a string"),
        (lambda g: g.generate("a", stop_at_eos="no"), TypeError, "stop_at_eos='no': expected True or False"),
        (lambda g: g.weight("attention/query", 9), KeyError, "no layer 9: this model has layers 0 to 5"),
        (lambda g: g.tokenizer.decode(562), TypeError, "expected a sequence of ids; got 562"),
        (lambda g: g.tokenizer.decode([1.0]), ValueError, "token id 1.0"),
        (lambda g: g.trace(["a", 5]), TypeError, "prompt 1 is one number"),
        (lambda g: g.trace([[1, [2, 3]]]), TypeError, "prompt 0 is neither a text nor a sequence"),
        (lambda g: g.trace([1, [2, 3]]), TypeError, "prompt 0 is neither a text nor a sequence"),
        (lambda g: g.trace("\ud800"), ValueError, "not Unicode at character 0"),
        (lambda g: g.generate(["a", "b"], seed=[1]), ValueError, "1 values for 2 prompts"),
        (lambda g: g.trace(g.trace("a")), TypeError, "trace.tokens"),
        (lambda g: g.trace("a", capture="router_logit"), KeyError, "nearest: router_logits"),
        (lambda g: g.generate("a", max_new_tokens=0), ValueError, "max_new_tokens=0"),
        (lambda g: g.generate("a", temperature=-1), ValueError, "temperature=-1"),
        (lambda g: g.generate("a", top_p=0), ValueError, "top_p=0"),
        (lambda g: g.generate("a", top_k=0), ValueError, "top_k=0"),
        (lambda g: g.generate("a", seed=-3), ValueError, "seed=-3"),
        (lambda g: g.generate(["a", "b"], seed=[1, 2, 3]), ValueError, "3 values for 2 prompts"),
        (lambda g: g.generate("a", stop=[""]), ValueError, "non-empty"),
        (lambda g: gs.load(numerics="float16"), ValueError, "float16"),
        (lambda g: gs.load(weights="int4"), ValueError, "int4"),
        (lambda g: g.loss([5]), ValueError, "at least two tokens"),
    ],
)
def test_clear_errors(grok, call, error, words):
    with pytest.raises(error, match=words):
        call(grok)


def test_the_context_can_be_filled(grok):
    assert len(grok.generate([5] * 1000, max_new_tokens=24, stop_at_eos=False)) == 1024


def test_without_a_tokenizer(random_checkpoint):
    with gs.load(random_checkpoint) as grok:
        trace = grok.generate([5, 6], max_new_tokens=3, stop_at_eos=False)
        assert trace.pieces[:2] == ["<5>", "<6>"]
        assert trace.text == "".join(trace.pieces)
        with pytest.raises(ValueError, match="has no tokenizer.model; give token ids"):
            grok.trace("text")
        assert np.isnan(grok.loss([5, 6, 7]).bits_per_byte)


def test_interrupt_returns_what_there_is(grok):
    def interrupt(event):
        if event.prompt == 1 and event.position >= 12:
            raise KeyboardInterrupt

    traces = grok.generate([[5] * 4, [6] * 4] + [[7] * 4] * 8, max_new_tokens=40, stop_at_eos=False, on_token=interrupt)
    assert [t.meta["prompt"] for t in traces] == list(range(8))  # two never began
    assert {t.meta["finish"] for t in traces} == {"interrupt"}
    for trace in traces:
        assert 12 <= len(trace) <= 14
        assert trace["router_logits"].shape[1] == len(trace)
        assert len(trace.logprobs) == len(trace)
    single = grok.generate([5] * 4, max_new_tokens=40, on_token=lambda e: (_ for _ in ()).throw(KeyboardInterrupt))
    assert single.meta["finish"] == "interrupt"
    np.testing.assert_allclose(grok.trace(single.tokens)["router_logits"], single["router_logits"], atol=1e-4)


def test_ctrl_c_while_it_runs(grok, listening):
    """A real SIGINT, which comes between two steps."""
    import _thread

    def press(event):
        if event.position == 30:
            _thread.interrupt_main()

    trace = grok.generate([5] * 4, max_new_tokens=200, stop_at_eos=False, on_token=press)
    assert trace.meta["finish"] == "interrupt"
    assert 30 < len(trace) < 40


def test_ctrl_c_ends_a_loop_of_traces(grok, listening):
    """It comes in the middle of a forward pass that then finishes: it must not be lost."""
    import _thread

    with pytest.raises(KeyboardInterrupt):
        for i in range(2000):
            if i == 3:
                threading.Timer(0.02, _thread.interrupt_main).start()
            grok.trace([5] * 500, capture=())
    assert i < 1999


def test_ctrl_c_between_two_batches(grok, listening, monkeypatch):
    """What is finished comes back, and the batch that was on its way."""
    import _thread

    made = grok._trace

    def press(job, *args):
        if job.row == 5:
            _thread.interrupt_main()
        return made(job, *args)

    monkeypatch.setattr(grok, "_trace", press)
    assert [t.meta["prompt"] for t in grok.trace([[5] * 20] * 64, capture=())] == list(range(32))
    with pytest.raises(KeyboardInterrupt):
        grok.trace([[5] * 20] * 8, capture=())  # all are finished: there is nothing that says so


def test_ctrl_c_while_a_batch_lands(grok, listening, monkeypatch, tmp_path):
    """The turn finishes that batch, and no other comes after it."""
    import _thread

    land, landed = decode.Run._land, []

    def press(run):
        if run.arriving:
            landed.extend([job.row for job in run.arriving.jobs])
            if landed[-1] < 16:
                _thread.interrupt_main()
        land(run)

    monkeypatch.setattr(decode.Run, "_land", press)
    with pytest.raises(KeyboardInterrupt):
        grok.dump([[5] * 20] * 96, tmp_path / "many", capture="router_logits")
    assert landed == list(range(32)), "one was under way"


def test_a_loss_is_of_all_or_none(grok, monkeypatch):
    whole = grok.trace(["one", "two"], capture=())
    monkeypatch.setattr(grok, "trace", lambda *_, **__: whole[:1])
    with pytest.raises(KeyboardInterrupt):
        grok.loss(["one", "two"])


@pytest.mark.slow
def test_two_models_compile_at_the_same_time(random_checkpoint, tmp_path):
    """Each thread's captures are its own."""
    other = write_random(tmp_path / "other", small_config(num_layers=2, emb_size=32))
    found, errors = {}, []

    def work(directory, taps):
        try:
            with gs.load(directory) as grok:
                found[directory] = grok.generate([5, 6, 7], max_new_tokens=3, stop_at_eos=False, capture=taps)
        except BaseException as err:
            errors.append(err)

    cases = {random_checkpoint: ("q", "resid_mid", "logits"), other: ("attn_pattern", "embed")}
    threads = [threading.Thread(target=work, args=case) for case in cases.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for directory, taps in cases.items():
        assert set(found[directory].taps) == {*taps, "router_logits", "expert_index", "expert_gate"}
        assert found[directory].meta["config"] == gs.load(directory).trace([5]).meta["config"]


def test_a_model_that_runs_is_not_closed(grok):
    with pytest.raises(RuntimeError, match="already running"):
        grok.generate("a", on_token=lambda event: grok.close())
    assert len(grok.trace("b"))


def test_a_second_thread_gets_a_clear_error(grok):
    inside, go_on = threading.Event(), threading.Event()

    def hold(event):
        inside.set()
        go_on.wait(10)

    first = threading.Thread(target=grok.generate, args=("a",), kwargs={"max_new_tokens": 2, "on_token": hold})
    first.start()
    assert inside.wait(30)
    with pytest.raises(RuntimeError, match="another thread"):
        grok.trace("b")
    go_on.set()
    first.join()
    assert len(grok.trace("b"))


def test_an_error_in_on_token_leaves_the_model_usable(grok):
    with pytest.raises(ZeroDivisionError):
        grok.generate("a", on_token=lambda e: 1 / 0)
    assert len(grok.trace("b"))


def test_close(random_checkpoint):
    with gs.load(random_checkpoint) as grok:
        assert "expanded weights" in repr(grok)
    assert "closed" in repr(grok)
    with pytest.raises(RuntimeError, match="closed"):
        grok.trace([5])


def test_display_says_the_numerics(grok):
    assert "9.25 M parameters" in repr(grok)
    assert "float32" in repr(grok)


def test_without_captures_the_plain_model_is_compiled(grok):
    """The jaxpr of a step with no taps is that of the network itself; with taps it is not."""
    import jax

    from grokscope.model import transformer
    from grokscope.run import hooks, steps

    params = grok._weights.layers[0]
    x = np.zeros((1, 4, grok.config.emb_size), np.float32)
    cache = transformer.KVCache.zeros(grok.config, 1, 32, np.float32)
    positions = transformer.Positions.of(grok.config, jnp.zeros(1, jnp.int32), 4)
    tokens, live = np.zeros((1, 4), np.int32), np.ones((1, 4), bool)

    def layer(params, x, cache, positions, tokens, live):
        return transformer.layer(grok.config, params, x, cache, positions, live)[:2]

    def step(stage, given):
        return jax.make_jaxpr(lambda *a: steps._layer(grok.config, stage, *a, {}, given))(*arguments)

    arguments = (params, x, cache, positions, tokens, live)
    plain = jax.make_jaxpr(layer)(*arguments)
    assert str(step(hooks.PLAIN, hooks.Given())) == str(plain)
    looking = hooks.stage((hooks.CaptureKind("attn_pattern", "attn_pattern", ("attn_pattern",)),))
    assert str(step(looking, hooks.Given(({},)))) != str(plain)


def test_only_routing_is_kept_unless_asked(grok):
    routing = ("router_logits", "expert_index", "expert_gate")
    assert tuple(grok.trace("a").taps) == routing
    assert not grok.trace("a", capture=()).taps
    assert tuple(grok.trace("a", capture="attn_pattern").taps) == ("attn_pattern", *routing)


@pytest.mark.slow
def test_other_shapes_generate(tmp_path):
    config = small_config(num_experts=3, num_selected_experts=1, num_q_heads=2, num_kv_heads=1, sequence_len=64)
    with gs.load(write_random(tmp_path / "c", config), numerics="bfloat16") as grok:
        trace = grok.generate(
            [[3, 4, 5], [6]], max_new_tokens=8, stop_at_eos=False, capture=["resid_post", "expert_index"]
        )[1]
        assert trace.taps["resid_post"].dtype.name == "bfloat16"
        assert trace["resid_post"].dtype == np.float32
        assert trace["expert_index"].shape == (3, 9, 1)


@pytest.mark.parametrize("length", [1, 128])
def test_int8_is_widened_one_expert_at_a_time(length):
    with gs.load(weights="int8") as grok:
        config, one = grok.config, 4 * 3 * grok.config.emb_size * grok.config.ffn_size
        x, cache = np.zeros((1, length, config.emb_size), np.float32), KVCache.zeros(config, 1, 128, np.float32)
        positions = Positions.of(config, jnp.zeros(1, jnp.int32), length)
        at = positions, np.zeros((1, length), np.int32), np.ones((1, length), bool)
        lowered = steps.layer.lower(config, PLAIN, grok._weights.layers[0], x, cache, *at, {}, Given())
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * one < config.num_experts * one


@pytest.mark.parametrize("length", [200, 512])
def test_prompts_read_in_parts(grok, length):
    """Each part reads what is before it; where patterns are looked at, all is read at once."""
    ids = np.random.default_rng(0).integers(4, grok.config.vocab_size, length)
    plain, looked = (grok.trace(ids, capture=["resid_post", *more]) for more in ((), ["attn_pattern"]))
    np.testing.assert_allclose(plain["resid_post"], looked["resid_post"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(plain.logprobs[1:], looked.logprobs[1:], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_int8_in_bfloat16_runs_one_prompt_and_many(random_checkpoint):
    grok = gs.load(random_checkpoint, weights="int8", numerics="bfloat16")
    for count in (1, 8):
        assert all(len(trace.tokens) == 6 for trace in grok.generate([[5, 6, 7]] * count, 3, stop_at_eos=False))
