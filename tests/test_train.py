"""Training: the right gradient, a falling loss, an exact resume, the released format at the end."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config

import grokscope as gs
from grokscope import train
from grokscope.checkpoint import ckpt0
from grokscope.model import transformer

CONFIG = small_config(vocab_size=64, num_layers=2, embedding_multiplier_scale=48**0.5)
RECIPE = train.Recipe(steps=60, batch=4, sequence_len=32, warmup=5, learning_rate=1e-2)


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
        tile = transformer.tile_size(num_tokens)

        def sparse(x, weights, chosen=chosen, tile=tile, target=target):
            order = jnp.argsort(chosen, stable=True)
            counts = jnp.sum(chosen[:, None] == jnp.arange(3), axis=0)
            groups = transformer.Groups(jnp.cumsum(counts) - counts, counts)
            rows = jnp.pad(x[order], ((0, tile), (0, 0)))
            out = transformer.by_expert(transformer.matmul, tile, rows, tuple((w,) for w in weights), groups)
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


def test_the_learning_rate_has_no_jumps():
    for steps in (10, 60, 1000):
        rates = np.array([train.Recipe(steps=steps).schedule()(step) for step in range(steps + 1)])
        assert np.abs(np.diff(rates)).max() <= max(rates.max() / 3, 1e-9)
        assert rates[0] == 0
        assert rates[-1] == pytest.approx(0, abs=1e-9)
        assert rates.max() == pytest.approx(3e-3)


def test_data_that_does_not_fit(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"meta\.json not found"):
        train.TokenData(tmp_path, "train", 64)
    with pytest.raises(ValueError, match="holds id 63; the model's vocabulary has 40"):
        train.TokenData(data, "train", 40)
    with pytest.raises(ValueError, match="a window needs 6001"):
        train.TokenData(data, "train", 64).batch(0, 0, 1, 6000)
    (tmp_path / "meta.json").write_text('{"weights": {"x": 1}, "bytes_per_token": {"x": 1}}')
    with pytest.raises(FileNotFoundError, match=r"neither .*train\.x\.u16 nor train\.x\.u16\.xz"):
        train.TokenData(tmp_path, "train", 64)


def trained(data, out, mesh: str | None = None, **changes) -> tuple[list[float], dict]:
    """Losses of three updates, and the parameters behind them."""
    recipe = dataclasses.replace(RECIPE, steps=3, batch=8, warmup=1, **changes)
    rows: list[dict] = []
    ids, state = train.TokenData(data, "train", CONFIG.vocab_size), {"params": train.fresh_params(CONFIG, 0)}
    state["opt"] = train.optimizer(recipe).init(state["params"])
    devices = None if mesh is None else train.make_mesh(mesh, CONFIG)
    state = state if devices is None else train._sharded(devices, CONFIG, state)
    for step in range(3):
        with train.on(devices):
            state, parts = train.train_step(CONFIG, recipe, "float32", state, ids.batch(0, step, 8, 32))
        rows.append(parts)
    return [float(row["nats"]) for row in rows], jax.tree.map(np.asarray, state["params"])


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "accumulate"), [("8x1", 1), ("2x4", 1), ("1x8", 1), (None, 2), (None, 8), ("2x4", 2)])
def test_on_a_mesh_and_in_parts_it_is_the_same_training(data, tmp_path, mesh, accumulate):
    """Without the load-balance loss, which is of the parts."""
    wanted, params = trained(data, tmp_path, load_balance=0.0)
    losses, ours = trained(data, tmp_path, mesh, load_balance=0.0, accumulate=accumulate)
    np.testing.assert_allclose(losses, wanted, rtol=2e-5)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)  # Adam divides small gradients by their own size


@pytest.mark.slow
def test_a_checkpoint_is_tuned_on_a_mesh_and_goes_on_on_another(data, tmp_path, random_checkpoint):
    start = ckpt0.open_checkpoint(random_checkpoint)
    recipe = dataclasses.replace(RECIPE, steps=4)

    def stop(done: int):
        def few(steps):
            for step in steps:
                if step == done:
                    raise KeyboardInterrupt
                yield step

        return few

    with pytest.raises(KeyboardInterrupt):
        train.train(data, tmp_path / "two", recipe, start=start, mesh="2x4", save_every=2, progress=stop(2))
    train.train(data, tmp_path / "two", recipe, start=start, mesh="1x2", save_every=2)
    train.train(data, tmp_path / "one", recipe, start=start, save_every=2)
    one, two = (gs.load(tmp_path / name / "checkpoint").trace([5, 6, 7, 8], "logits") for name in ("one", "two"))
    np.testing.assert_allclose(one["logits"], two["logits"], atol=0.05)  # requantised
    assert (one["logits"] != gs.load(random_checkpoint).trace([5, 6, 7, 8], "logits")["logits"]).any()


def test_parts_that_are_none():
    with pytest.raises(ValueError, match="accumulate=3 does not divide batch=4"):
        dataclasses.replace(RECIPE, accumulate=3)
