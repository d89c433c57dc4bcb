"""The kernel for int8 on NVIDIA GPUs: as compiled where there is one (JAX_PLATFORMS=cuda), interpreted elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grokscope as gs
from grokscope.model import kernel
from grokscope.model.quant import dequantize, quantize

PROMPT = "It was the best of times, it was the worst of times"


@pytest.fixture
def in_kernel(monkeypatch):
    monkeypatch.setattr(kernel, "available", lambda: True)
    jax.clear_caches()  # of steps that were compiled without it
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("experts", "k", "n", "groups", "rows", "tile"),
    [
        (4, 256, 512, 1, 10, 16),
        (8, 256, 512, 8, 3, 16),
        (4, 4096, 512, 8, 10, 16),  # sums in parts, of a group or less
        (3, 1368, 136, 8, 100, 64),  # nothing divides
        (1, 512, 128, 1, 300, 128),
        (8, 512, 256, 8, 500, 128),  # tiles of less than half their rows
        (1, 2048, 384, 4, 130, 128),
    ],
)
def test_rows_are_multiplied_with_the_weight_of_their_tile(experts, k, n, groups, rows, tile):
    rng = np.random.default_rng(0)
    weights = quantize(rng.normal(size=(experts, k, n)).astype(np.float32), groups)
    weights.scales[:, 0, :3] = 0
    counts = np.bincount(rng.integers(0, max(experts - 1, 1), rows), minlength=experts)  # the last has none
    begins = np.cumsum(counts) - counts
    x = jnp.asarray(rng.normal(size=(rows, k)), jnp.bfloat16)

    @jax.jit
    def products(x, weights, begins, counts):
        return kernel.products(x, weights, kernel.Tiles.of(begins, counts, tile, rows), tile)

    found = np.asarray(products(x, [weights], begins, counts), np.float64)
    alone = products(x, [weights[e][None] for e in range(experts)], begins, counts)
    np.testing.assert_array_equal(np.asarray(alone, np.float64)[: counts.sum()], found[: counts.sum()])
    for e, (begin, count) in enumerate(zip(begins, counts, strict=True)):
        expected = np.asarray(x[begin : begin + count], np.float64) @ dequantize(weights[e]).astype(np.float64)
        np.testing.assert_allclose(found[begin : begin + count], expected, rtol=2**-8, atol=2**-12 * np.sqrt(k))


def test_tiles_hold_each_row_once():
    rng = np.random.default_rng(1)
    for rows, tile in ((1, 16), (2, 16), (16, 16), (100, 16), (1024, 128)):
        counts = np.bincount(rng.integers(0, 8, rows), minlength=8)
        begins = np.cumsum(counts) - counts
        for counts_ in (counts, np.eye(8, dtype=int)[3] * rows, counts * 0):
            tiles = jax.tree.map(np.asarray, kernel.Tiles.of(jnp.asarray(begins), jnp.asarray(counts_), tile, rows))
            assert (tiles.ends - tiles.begins <= tile).all()
            held = [(e, row) for e, begin, end in zip(*tiles, strict=True) for row in range(begin, end)]
            assert sorted(held) == [(e, begins[e] + i) for e in range(8) for i in range(counts_[e])]


def test_the_model_is_the_same_with_and_without(in_kernel, monkeypatch):
    grok = gs.load(numerics="bfloat16", weights="int8")
    inside = grok.trace(PROMPT, capture=["expert_index", "resid_post"])
    monkeypatch.setattr(kernel, "available", lambda: False)
    jax.clear_caches()
    outside = grok.trace(PROMPT, capture=["expert_index", "resid_post"])
    assert (inside["expert_index"] == outside["expert_index"]).mean() > 0.97  # near ties turn over in bfloat16
    np.testing.assert_allclose(inside.logprobs[1:], outside.logprobs[1:], atol=0.1)
    assert np.isfinite(np.asarray(inside["resid_post"], np.float32)).all()


@pytest.mark.slow
def test_a_mesh_uses_it_on_each_device(in_kernel):
    if len(jax.devices()) == 1:
        pytest.skip("this machine has one GPU")
    whole = gs.load(numerics="bfloat16", weights="int8").trace(PROMPT, capture="moe_out")
    cut = gs.load(numerics="bfloat16", weights="int8", mesh="1x2").trace(PROMPT, capture="moe_out")
    np.testing.assert_allclose(cut.logprobs[1:], whole.logprobs[1:], atol=0.1)


@pytest.mark.slow
def test_rows_of_no_expert_become_nothing(in_kernel):
    """What is behind the end of a prompt goes into the cache, where even its weight of 0 would let a NaN through."""
    grok = gs.load(numerics="bfloat16", weights="int8")
    poisoned = grok.generate(PROMPT[:20], max_new_tokens=3, capture="attn_z")
    assert np.isfinite(np.asarray(poisoned["attn_z"], np.float32)).all()


@pytest.mark.slow
def test_streamed_experts_are_multiplied_as_resident_ones(in_kernel):
    """An expert that is not there is stood in for by another, which no tile may take."""
    held = gs.load(numerics="bfloat16", weights="int8").trace(PROMPT, capture="expert_out")
    streamed = gs.load(numerics="bfloat16", weights="streamed", memory="6MB").trace(PROMPT, capture="expert_out")
    np.testing.assert_array_equal(streamed["expert_out"], held["expert_out"])


def test_an_edit_between_the_two_products(in_kernel):
    """Hidden values are unpacked by token, edited, and packed by expert again."""
    grok = gs.load(numerics="bfloat16", weights="int8")
    plain = grok.trace(PROMPT, capture="expert_out")["expert_out"]
    with grok.edits(gs.scale("expert_hidden", 2.0, layers=0)):
        doubled = grok.trace(PROMPT, capture="expert_out")["expert_out"]
    np.testing.assert_array_equal(doubled[0], 2 * plain[0])
