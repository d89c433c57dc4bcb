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
