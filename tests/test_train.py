"""Training: the right gradient, a falling loss, an exact resume, the released format at the end."""

import dataclasses
import functools
import json
import math
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config, write_random
from safetensors.numpy import load_file, save_file

import grokscope as gs
from grokscope import corpus, train
from grokscope.checkpoint import ckpt0
from grokscope.checkpoint.lock import lock
from grokscope.config import GrokConfig
from grokscope.model import sharding, transformer
from grokscope.model.taps import TAPS
from grokscope.run.engine import bundled_checkpoint
from grokscope.tokenizer import Tokenizer

CONFIG = small_config(vocab_size=64, num_layers=2, embedding_multiplier_scale=48**0.5)
RECIPE = train.Recipe(steps=60, batch=4, sequence_len=32, warmup=5, learning_rate=1e-2)
FEW = dataclasses.replace(CONFIG, num_experts=2, num_layers=1)  # compiles fast
SHORT = dataclasses.replace(RECIPE, steps=3, batch=16, sequence_len=8, warmup=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two domains that a model can learn: counting up, and counting down."""
    directory = tmp_path_factory.mktemp("data")
    meta = {"weights": {"up": 0.7, "down": 0.3}, "bytes_per_token": {"up": 2.0, "down": 4.0}}
    (directory / "meta.json").write_text(json.dumps(meta))
    for split in ("train", "valid"):
        up = (np.arange(5000) % 60 + 4).astype("<u2")
        up.tofile(directory / f"{split}.up.u16")
        up[::-1].tofile(directory / f"{split}.down.u16")
    return directory


def test_gradient_of_experts_is_that_of_all_experts_masked():
    """by_expert's own derivative against autodiff of the dense form, in tiles and at N = 1."""
    rng = np.random.default_rng(0)
    for num_tokens in (1, 5, 300):
        x = jnp.asarray(rng.standard_normal((num_tokens, 6)), jnp.float32)
        chosen = jnp.asarray(rng.choice(3, num_tokens), jnp.int32)
        weights = jnp.asarray(rng.standard_normal((3, 6, 4)), jnp.float32)
        target = jnp.asarray(rng.standard_normal((num_tokens, 4)), jnp.float32)
        tile = transformer.tile_size(num_tokens, weights[0])

        def sparse(x, weights, chosen=chosen, tile=tile, target=target):
            order = jnp.argsort(chosen, stable=True)
            counts = jnp.sum(chosen[:, None] == jnp.arange(3), axis=0)
            groups = transformer.Groups(jnp.cumsum(counts) - counts, counts)
            rows = jnp.pad(x[order], ((0, tile), (0, 0)))
            out = transformer.by_expert(transformer.matmul, tile, rows, (weights,), groups)
            return jnp.sum(jnp.tanh(out[: len(x)]) * target[order])

        def dense(x, weights, chosen=chosen, target=target):
            out = jnp.einsum("nd,edf,ne->nf", x, weights, jax.nn.one_hot(chosen, 3), precision="highest")
            return jnp.sum(jnp.tanh(out) * target)

        np.testing.assert_allclose(sparse(x, weights), dense(x, weights), rtol=1e-5)
        for ours, theirs in zip(jax.grad(sparse, (0, 1))(x, weights), jax.grad(dense, (0, 1))(x, weights), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_losses_are_those_of_the_engine(grok, tmp_path):
    """The training forward pass is the network: same loss as grok.loss on the same ids."""
    checkpoint = grok._checkpoint
    ids = np.array(grok.tokenizer.encode("The old keeper of the lighthouse wrote a letter."), np.int32)
    parts = train.losses(checkpoint.config, train.checkpoint_params(checkpoint), jnp.asarray(ids[None]), "float32")
    assert float(parts["nats"].mean()) == pytest.approx(grok.loss(ids).nats_per_token, abs=1e-4)
    share = np.asarray(parts["share"])
    trace = grok.trace(ids[:-1])
    counts = (trace["expert_index"][..., None] == np.arange(8)).mean((1, 2))
    np.testing.assert_allclose(share, counts, atol=1e-6)


@pytest.mark.slow
def test_a_run_learns_and_writes_the_released_format(data, tmp_path):
    rows = []
    done = train.train(data, tmp_path / "run", RECIPE, start=CONFIG, report=rows.append)
    assert rows[-1]["step"] == 60
    assert rows[-1]["nats"] < 1.0 < math.log(60)
    assert gs.verify(done).ok
    held_out = train.evaluate_checkpoint(done, data, windows=12)
    assert held_out["mixture"]["nats"] < 1.0
    up, down, mixture = (held_out[name] for name in ("up", "down", "mixture"))
    assert up["bits_per_byte"] == pytest.approx(up["nats"] / math.log(2) / 2)
    assert mixture["nats"] == pytest.approx(0.7 * up["nats"] + 0.3 * down["nats"])
    np.testing.assert_allclose(up["share"].sum(-1), 1, rtol=1e-5)
    with gs.load(done) as grok:
        assert grok.generate([10, 11, 12, 13, 14], max_new_tokens=5).tokens.tolist() == list(range(10, 20))
    embedding = ckpt0.open_checkpoint(done).read(ckpt0.slots(CONFIG)[0]).weight
    assert (embedding.view(np.uint32) & 0xFFFF == 0).all()  # representable in bfloat16
    with pytest.raises(FileExistsError, match="is finished"):
        train.train(data, tmp_path / "run", RECIPE, start=CONFIG)
    more = train.train(data, tmp_path / "more", dataclasses.replace(RECIPE, steps=2), start=ckpt0.open_checkpoint(done))
    assert gs.verify(more).ok


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(data, tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=14)
    whole = train.train(data, tmp_path / "whole", recipe, start=CONFIG)

    class Killed(Exception):
        pass

    def killing(steps):
        for step in steps:
            if step == 9:
                raise Killed
            yield step

    with pytest.raises(Killed):
        train.train(data, tmp_path / "cut", recipe, start=CONFIG, save_every=4, progress=killing)
    resumed = train.train(data, tmp_path / "cut", recipe, start=CONFIG, save_every=4)
    for slot in ckpt0.slots(CONFIG):
        assert (resumed / "ckpt-0" / slot.file).read_bytes() == (whole / "ckpt-0" / slot.file).read_bytes()
    with pytest.raises(ValueError, match="another recipe"):
        (tmp_path / "cut" / "checkpoint").rename(tmp_path / "elsewhere")
        train.train(data, tmp_path / "cut", dataclasses.replace(recipe, seed=1), start=CONFIG)


@functools.cache
def fresh(config):
    return jax.tree.map(np.asarray, train.fresh_params(config, 0))


def laid_out(mesh: str | None, config=FEW):
    """Devices, fresh parameters on them, and a batch of random tokens."""
    devices = None if mesh is None else sharding.make_mesh(mesh, config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (SHORT.batch, SHORT.sequence_len + 1), np.int32)
    return devices, train._put(config, devices, fresh(config)), tokens


def gradients(mesh: str | None = None, **changes):
    """Of one batch, with the losses: whole arrays."""
    devices, params, tokens = laid_out(mesh)
    recipe = dataclasses.replace(SHORT, **changes)
    with sharding.on(devices):
        found = jax.jit(train.gradients, static_argnums=(0, 1, 2))(FEW, recipe, "float32", params, tokens)
    return jax.tree.map(np.asarray, found)


def agree(one, other, atol=2e-6):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def single():
    """Gradients of the whole batch on one device, by load_balance."""
    return {weight: gradients(load_balance=weight) for weight in (0.0, 0.5)}


@pytest.mark.parametrize("mesh", [None, pytest.param("2x4", marks=pytest.mark.slow)])
def test_gradients_through_parts_are_those_of_the_whole(monkeypatch, mesh):
    """Two parts of logits and of attention, computed again for the derivative; against neither."""
    recipe = dataclasses.replace(SHORT, batch=2, sequence_len=128)
    config = dataclasses.replace(FEW, sequence_len=128)
    devices = None if mesh is None else sharding.make_mesh(mesh, config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 129), np.int32)
    found, loops = [], []
    for at_once, again in ((1, jax.checkpoint), (1 << 30, lambda fn, **_: fn)):
        monkeypatch.setattr(transformer, "AT_ONCE", at_once)
        monkeypatch.setattr(jax, "checkpoint", again)
        step = jax.jit(lambda *arrays: train.gradients(config, recipe, "float32", *arrays))
        with sharding.on(devices):
            args = train._put(config, devices, fresh(config)), tokens
            found.append(jax.tree.map(np.asarray, step(*args)))
            loops.append(step.lower(*args).as_text().count("stablehlo.while"))
    assert loops[0] > loops[1]
    agree(*found)


def test_a_common_token_learns_from_all_of_its_places():
    """In bfloat16 too, where thousands of small addends would be lost beside their sum."""
    params, rng = fresh(FEW), np.random.default_rng(0)
    tokens = np.where(rng.random((16, 257)) < 0.9, 5, rng.integers(0, FEW.vocab_size, (16, 257))).astype(np.int32)

    def row(dtype):
        gradient = jax.jit(jax.grad(lambda params, tokens: train.losses(FEW, params, tokens, dtype)["nats"].mean()))
        return np.asarray(gradient(params, tokens)["ends"]["embedding"]["w"][5])

    exact = row("float32")
    assert np.linalg.norm(row("bfloat16") - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.slow
def test_a_layer_adds_what_it_keeps():
    """More layers take their gradients, their inputs and what KEPT names, and no attention."""
    batch, length, used = 2, 256, {}
    for layers in (2, 6):
        config = dataclasses.replace(FEW, num_layers=layers, sequence_len=length)
        recipe = train.Recipe(steps=10, batch=batch, sequence_len=length)
        params = jax.eval_shape(lambda config=config: train.fresh_params(config, 0))
        state = {"params": params, "opt": jax.eval_shape(train.optimizer(recipe).init, params)}
        tokens = jax.ShapeDtypeStruct((batch, length + 1), np.int32)
        step = train.train_step.lower(config, recipe, "float32", state, tokens).compile()
        used[layers] = step.memory_analysis().temp_size_in_bytes
    dims = [TAPS[name].dims.replace("T", "") for name in (*train.KEPT, "resid_pre")]
    kept = batch * length * sum(math.prod(FEW.dims[d] for d in own) for own in dims)
    weights = sum(leaf.size // 6 for leaf in jax.tree.leaves(params["layers"]))
    assert (used[6] - used[2]) / 4 < 1.2 * 4 * (kept + weights)


def test_gradients_on_a_mesh_are_those_of_one_device(single):
    agree(gradients("2x4", load_balance=0.5), single[0.5])


@pytest.mark.parametrize(("mesh", "parts"), [(None, 4), pytest.param("2x4", 2, marks=pytest.mark.slow)])
def test_gradients_of_accumulated_parts_are_those_of_the_whole(single, mesh, parts):
    found, losses = gradients(mesh, accumulate=parts, load_balance=0.0)
    agree(found, single[0.0][0])
    for name in ("nats", "router_z", "share"):
        agree(losses[name], single[0.0][1][name])


def state_of(out):
    return train.load_file(out / "state.safetensors")


@pytest.fixture(scope="module")
def random_few(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("few") / "checkpoint", FEW)


def run(data, out, checkpoint, mesh=None):
    """The state at the end, and the nats of the last step."""
    rows, start = [], ckpt0.open_checkpoint(checkpoint)
    train.train(data, out, SHORT, start=start, mesh=mesh, report=rows.append)
    return state_of(out), rows[-1]["nats"]


@pytest.fixture(scope="module")
def single_run(data, random_few, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("single"), random_few)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x4", "8x1", "1x8"])
def test_a_run_on_a_mesh_is_that_of_one_device(data, random_few, single_run, tmp_path, mesh):
    state, nats = run(data, tmp_path, random_few, mesh)
    agree(state, single_run[0], atol=1e-4)
    assert nats == pytest.approx(single_run[1], abs=2e-4)


def test_a_run_goes_on_on_any_mesh(data, random_few, tmp_path):
    """Exactly on its own, within rounding on another; with another `accumulate` it is another run."""
    start = ckpt0.open_checkpoint(random_few)

    def cut_before_the_last(steps):
        yield from steps[:-1]
        raise KeyboardInterrupt

    def run(name, mesh):
        train.train(data, tmp_path / name, SHORT, start=start, mesh=mesh)
        return state_of(tmp_path / name)

    whole = run("whole", "2x4")
    for name in ("again", "other"):
        with pytest.raises(KeyboardInterrupt):
            train.train(
                data, tmp_path / name, SHORT, start=start, mesh="2x4", save_every=1, progress=cut_before_the_last
            )
    again = run("again", "2x4")
    assert all((again[name] == whole[name]).all() for name in whole)
    agree(run("other", None), whole, atol=1e-4)
    (tmp_path / "other" / "checkpoint").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="another recipe"):
        train.train(data, tmp_path / "other", dataclasses.replace(SHORT, accumulate=2), start=start)


@pytest.mark.slow
def test_a_checkpoint_of_the_format_is_fine_tuned_on_a_mesh(data, random_few, tmp_path):
    """Each device holds its part from the start; no updates at all give the checkpoint back, an update another."""
    start = ckpt0.open_checkpoint(random_few)
    loaded = train.checkpoint_params(start, sharding.make_mesh("2x4", FEW))
    for leaf in jax.tree.leaves(loaded["layers"]["layer/experts"]):
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 4}
    agree(loaded, train.checkpoint_params(start), atol=0)

    still = dataclasses.replace(SHORT, steps=1, learning_rate=1e-30)
    after = [train.train(data, tmp_path / str(r.steps), r, start=start, mesh="2x4") for r in (still, SHORT)]
    same = train.checkpoint_params(ckpt0.open_checkpoint(after[0]))
    agree(same["layers"], loaded["layers"], atol=0)
    agree(same["ends"], loaded["ends"], atol=2e-3)  # the embedding is rounded to bfloat16
    traces = [gs.load(path).trace(np.arange(5, 25), capture="logits")["logits"] for path in (random_few, *after)]
    assert np.abs(traces[1] - traces[0]).max() < 0.02
    assert np.abs(traces[2] - traces[0]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x4", "8x1", "1x8"])
def test_weights_stay_where_they_are(mesh):
    """Nothing beyond router logits is gathered, no device sees the stream of all rows, the new state lies as the old."""
    config = dataclasses.replace(FEW, num_q_heads=8, num_kv_heads=8)
    devices, params, tokens = laid_out(mesh, config)
    with sharding.on(devices):
        state = train._put(config, devices, {"params": params, "opt": train.optimizer(SHORT).init(params)})
        lies = [leaf.sharding for leaf in jax.tree.leaves(state)]
        compiled = train.train_step.lower(config, SHORT, "float32", state, tokens).compile()
        state, _ = compiled(state, tokens)
    text, (batch, length) = compiled.as_text(), (SHORT.batch, SHORT.sequence_len)
    gathers = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    sizes = [math.prod(map(int, s.split(","))) for found in gathers for s in re.findall(r"\[([\d,]+)\]", found)]
    assert max(sizes, default=0) <= batch * length * config.num_experts
    streams = {int(rows) for rows in re.findall(rf"f32\[(\d+),{length},{config.emb_size}\]", text)}
    assert max(streams) == batch // int(mesh[0])
    leaves = jax.tree.leaves(state)
    assert all(leaf.sharding.is_equivalent_to(old, leaf.ndim) for leaf, old in zip(leaves, lies, strict=True))


def test_recipes_that_do_not_fit_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="batch=16: expected a multiple of accumulate=3"):
        dataclasses.replace(SHORT, accumulate=3)
    with pytest.raises(ValueError, match="accumulate=0: expected at least 1"):
        dataclasses.replace(SHORT, accumulate=0)
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a number above 0"):
            dataclasses.replace(SHORT, learning_rate=rate)
    for seed in (-1, 1 << 32):
        with pytest.raises(ValueError, match=f"seed={seed}: expected a whole number"):
            dataclasses.replace(SHORT, seed=seed)
    for changes, mesh, why in (
        ({"batch": 12}, "8x1", r"batch=12 on mesh='8x1': .* 1 \* 8"),
        ({"accumulate": 4}, "8x1", r"batch=16 on mesh='8x1': .* 4 \* 8"),
        ({}, "1x3", "3 does not divide the expert width"),
        ({}, "9x1", "9 devices and there are 8"),
    ):
        with pytest.raises(ValueError, match=why):
            train.train(data, tmp_path / "run", dataclasses.replace(SHORT, **changes), start=FEW, mesh=mesh)
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_has_no_jumps():
    for steps in (10, 60, 1000):
        rates = np.array([train.Recipe(steps=steps).schedule()(step) for step in range(steps + 1)])
        assert np.abs(np.diff(rates)).max() <= max(rates.max() / 3, 1e-9)
        assert 0 < rates[0] <= 3e-3 / min(steps // 2, 100)
        assert rates[-1] == pytest.approx(0, abs=1e-9)
        assert rates.max() == pytest.approx(3e-3)
    assert train.Recipe(steps=1).schedule()(0) == pytest.approx(3e-3)  # or one step would change nothing


@pytest.mark.parametrize(("vocab_size", "ending"), [(8192, "u16"), (131072, "u32")])
def test_texts_become_data(tmp_path, vocab_size, ending):
    """All of them, once each, whatever their order; ids that two bytes do not hold in four."""
    tokenizer = Tokenizer(bundled_checkpoint() / "tokenizer.model")
    config = GrokConfig.read(bundled_checkpoint() / "config.json")
    config = dataclasses.replace(config, vocab_size=vocab_size, eos_token=vocab_size - 1)
    texts = {"words": [f"Text number {i}, é {'x' * i}" for i in range(40)], "one": ["A single text."]}
    shuffled = {**texts, "words": ["", *texts["words"][::-1], texts["words"][3]]}
    corpus.write(tmp_path / "pack", texts, tokenizer, config)
    corpus.write(tmp_path / "again", shuffled, tokenizer, config)
    trained, held_out = (corpus.TokenData(tmp_path / "pack", split, vocab_size) for split in ("train", "valid"))
    whole = {domain: np.concatenate([trained.ids[domain], held_out.ids[domain]]) for domain in texts}
    assert len(held_out.ids["words"]) == round(0.05 * len(whole["words"]))
    for domain, ids in whole.items():
        assert trained.weights[domain] == len(ids) / sum(map(len, whole.values()))
        assert trained.bytes_per_token[domain] == sum(len(text.encode()) for text in texts[domain]) / len(ids)
        *documents, rest = np.split(ids, np.flatnonzero(ids == config.eos_token) + 1)
        assert not len(rest)
        assert all(ids[0] == config.bos_token for ids in documents)
        assert sorted(tokenizer.decode(ids[1:-1]) for ids in documents) == sorted(texts[domain])
        assert (tmp_path / "pack" / f"valid.{domain}.{ending}").exists()
    for path in (tmp_path / "pack").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        corpus.write(tmp_path / "pack", texts, tokenizer, config)
    for wrong, error, why in (
        ({"a/b": ["x"]}, ValueError, "expected the name of a file"),
        ({"a": [""]}, ValueError, "domain 'a' has no text"),
        ({"a": [b"x"]}, TypeError, "expected texts"),
        (["x"], TypeError, "expected {domain: texts}"),
        ({}, TypeError, "expected {domain: texts}"),
    ):
        with pytest.raises(error, match=why):
            corpus.write(tmp_path / "new", wrong, tokenizer, config)
    with pytest.raises(ValueError, match="8192 pieces, more than the 97 ids"):
        corpus.write(tmp_path / "new", texts, tokenizer, small_config())
    assert not (tmp_path / "new").exists()


def test_data_that_does_not_fit(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"meta\.json not found"):
        train.TokenData(tmp_path, "train", 64)
    with pytest.raises(ValueError, match="holds id 63; the model's vocabulary has 40"):
        train.TokenData(data, "train", 40)
    for text, why in (
        ('{"weights": {"x": 1}, "bytes_per_token": {"y": 1}}', "bytes_per_token lacks x"),
        ('{"weights": {"x": -1}, "bytes_per_token": {"x": 1}}', "weights of x is -1; expected a number from 0"),
        ('{"weights": {"x": 0}, "bytes_per_token": {"x": 1}}', "expected a weight above 0"),
        ('{"weights": {"x": 1}, "bytes_per_token": {"x": 0}}', "bytes_per_token above 0"),
        ('{"weights": ["x"], "bytes_per_token": {"x": 1}}', r'expected "weights": .*, found \[\'x\'\]'),
        ('{"weights": {"mixture": 1}, "bytes_per_token": {"mixture": 1}}', "a domain is called mixture"),
        ("[]", 'expected "weights": .*, found None'),
        ("{bad", "is not JSON"),
    ):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=rf"meta\.json.*{why}"):
            train.TokenData(tmp_path, "train", 64)
    (tmp_path / "meta.json").write_text('{"weights": {"x": 1}, "bytes_per_token": {"x": 1}}')
    with pytest.raises(FileNotFoundError, match=r"lacks train\.x: expected train\.x\.u16 or \.u32"):
        train.TokenData(tmp_path, "train", 64)
    for split, length in (("train", 9), ("valid", 9000)):
        np.arange(length, dtype="<u2").clip(0, 50).tofile(tmp_path / f"{split}.x.u16")
    with pytest.raises(ValueError, match="domain x has 9 tokens to train, a window needs 10; shorten"):
        train.train(tmp_path, tmp_path / "run", dataclasses.replace(SHORT, sequence_len=9), start=FEW)
    (tmp_path / "train.x.u16").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"train\.x\.u16 holds 3 bytes: expected ids of 2 bytes each"):
        train.TokenData(tmp_path, "train", 64)
    with pytest.raises(ValueError, match="8192 pieces, more than the 64 ids"):
        train.train(data, tmp_path / "run", SHORT, start=FEW, tokenizer=bundled_checkpoint() / "tokenizer.model")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_what_is_done(data, random_few, single_run, tmp_path, listening):
    """The same call goes on from there, to the bit, and the log has each step once."""
    start = ckpt0.open_checkpoint(random_few)

    def pressed(steps):
        for step in steps:
            if step == 1:
                signal.raise_signal(signal.SIGINT)
            yield step

    with pytest.raises(KeyboardInterrupt):
        train.train(data, tmp_path, SHORT, start=start, progress=pressed)
    assert state_of(tmp_path)["step"] == 2
    # As of a run that was killed behind its state, while it wrote: in its log, and in the checkpoint.
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"step": 3}\n{"st')
    (tmp_path / "checkpoint" / ckpt0.UNFINISHED).mkdir(parents=True)
    train.train(data, tmp_path, SHORT, start=start)
    agree(state_of(tmp_path), single_run[0], atol=0)
    assert [json.loads(row)["step"] for row in (tmp_path / "log.jsonl").read_text().splitlines()] == [2, 3]
    assert gs.verify(tmp_path / "checkpoint").ok


def test_the_state_is_saved_every_few_minutes(data, random_few, tmp_path, monkeypatch):
    saved, save = [], train.save_state
    monkeypatch.setattr(train, "save_state", lambda path, step, state: (saved.append(step), save(path, step, state)))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    train.train(data, tmp_path, SHORT, start=ckpt0.open_checkpoint(random_few))
    assert saved[0] == 1
    assert saved[-1] == 3


@pytest.mark.slow
def test_a_run_that_diverges_stops(data, random_few, tmp_path):
    """And says so; no checkpoint is written of what is not finite."""
    start, wild = ckpt0.open_checkpoint(random_few), dataclasses.replace(SHORT, learning_rate=1e30, decay=0.0)
    for every in (1, 500):
        with pytest.raises(RuntimeError, match="not finite|nan at step .* diverged"):
            train.train(data, tmp_path / str(every), wild, start=start, save_every=every)
        assert not (tmp_path / str(every) / "checkpoint").exists()
    assert all(np.isfinite(array).all() for array in state_of(tmp_path / "1").values())


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its recipe.json lacks the settings that came later; a setting that differs is refused all the same."""
    begun = {"recipe": dataclasses.asdict(RECIPE), "dtype": "float32"}
    older = {**begun, "recipe": {k: v for k, v in begun["recipe"].items() if k != "accumulate"}}
    older["data"] = {"x": [0.5, 100]}  # no checksum
    begun["data"] = {"x": [0.5, 100, 1234]}
    other = {**begun, "recipe": {**begun["recipe"], "accumulate": 2}}
    (tmp_path / "state.safetensors").touch()
    (tmp_path / "recipe.json").write_text(json.dumps(older))
    train._same_run(tmp_path, begun)
    two = {**begun, "data": begun["data"] | {"y": [0.5, 100, 1234]}}
    (tmp_path / "recipe.json").write_text(json.dumps(two))
    with pytest.raises(ValueError, match="another order of its data"):
        train._same_run(tmp_path, two | {"data": dict(reversed(two["data"].items()))})
    (tmp_path / "recipe.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match="another recipe"):
        train._same_run(tmp_path, other)
    (tmp_path / "state.safetensors").unlink()  # nothing of it is there: any settings do
    train._same_run(tmp_path, other)
    assert json.loads((tmp_path / "recipe.json").read_text()) == other


def test_ctrl_c_before_the_first_step(data, tmp_path, monkeypatch, listening):
    """While data are read, where a handler that raises may be in code that drops what is raised."""
    monkeypatch.setattr(train.TokenData, "refuse_shorter", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train.train(data, tmp_path / "run", SHORT, start=FEW, progress=lambda steps: pytest.fail("it went on"))


def test_what_lies_beside_a_run(data, random_few, tmp_path):
    """Each is told before a step is taken, by name."""
    start, run = ckpt0.open_checkpoint(random_few), tmp_path / "run"

    def refused(error, words, own=data):
        with pytest.raises(error, match=words):
            train.train(own, run, SHORT, start=start, progress=lambda steps: pytest.fail("it went on"))

    (run / "checkpoint").mkdir(parents=True)
    (run / "checkpoint" / "notes.txt").touch()
    refused(FileExistsError, "checkpoint is not empty")
    (run / "checkpoint" / "notes.txt").unlink()
    train.train(data, run, SHORT, start=start)
    shutil.rmtree(run / "checkpoint")
    other = shutil.copytree(data, tmp_path / "other")
    ids = np.fromfile(next(other.glob("train.*.u16")), "<u2")
    ids[::-1].tofile(next(other.glob("train.*.u16")))
    refused(ValueError, "begun with another data", other)
    with lock(run):
        refused(RuntimeError, "being written by another process")
    assert (run / "state.safetensors").stat().st_mode == (run / "log.jsonl").stat().st_mode
    (run / "recipe.json").unlink()
    state = load_file(run / "state.safetensors")
    save_file(state | {"step": np.array(9)}, run / "state.safetensors")
    refused(ValueError, "holds the state behind step 9, and the recipe has 3 steps")
    save_file({name: array for name, array in state.items() if name != "step"}, run / "state.safetensors")
    refused(ValueError, "step is missing")
    save_file({n: a.astype(np.float16) if a.ndim else a for n, a in state.items()}, run / "state.safetensors")
    refused(ValueError, "another shape or type")
    save_file(state, run / "state.safetensors")
    (run / "log.jsonl").write_text("{bad}\n")
    refused(ValueError, r"log\.jsonl is damaged .* the state is whole")
