"""On a mesh everything is as on one device: results, captures, edits, dumps; and weights stay where they are."""

import re

import jax
import numpy as np
import pytest
from conftest import small_config, write_random

import grokscope as gs
from grokscope.model import sharding, transformer
from grokscope.model.transformer import KVCache
from grokscope.run import steps
from grokscope.run.hooks import PLAIN, Given
from grokscope.run.steps import DecodeState

MESHES = ("1x8", "2x4", "8x1", "1x2")
TAPS = ("resid_post", "attn_pattern", "attn_z", "k", "expert_hidden", "expert_out", "moe_out", "logits")
PROMPTS = [np.arange(5, 5 + n) for n in (3, 40, 1, 17, 9)]


def agree(one: gs.Trace, other: gs.Trace) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert one.taps.keys() == other.taps.keys()
    for tap in one.taps:
        np.testing.assert_allclose(one[tap], other[tap], atol=1e-4, rtol=1e-4, err_msg=tap)


@pytest.fixture(scope="module")
def single(random_checkpoint):
    return gs.load(random_checkpoint).generate(PROMPTS, 6, capture=TAPS, batch_size=3)


@pytest.mark.parametrize("mesh", ["2x4", *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES if m != "2x4")])
def test_a_mesh_gives_what_one_device_gives(random_checkpoint, single, mesh):
    grok = gs.load(random_checkpoint, mesh=mesh)
    for one, other in zip(grok.generate(PROMPTS, 6, capture=TAPS, batch_size=3), single, strict=True):
        agree(one, other)
        assert one.meta["mesh"] == mesh
    assert mesh in repr(grok)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x4"])
def test_edits_reductions_and_dumps_on_a_mesh(random_checkpoint, tmp_path, mesh):
    wishes = [
        gs.capture("resid_post", reduce="moments"), gs.capture("expert_index", reduce="count"), "k",
        gs.capture("attn_pattern", heads=[1], reduce="topk", k=3), gs.capture("resid_pre", reduce="lens", k=2),
    ]  # fmt: skip
    found, prompts = [], [PROMPTS[0], PROMPTS[2], PROMPTS[4]]  # one block for all, compiled for each layer's edits
    for kw in ({}, {"mesh": mesh}):
        grok = gs.load(random_checkpoint, **kw)
        changes = (
            gs.route.ban(layers=[1, 2], experts=2),
            gs.ablate(heads=0, layers=[1, 2]),
            gs.route.force(layers=0, experts=[1, 2, 3]),
        )
        with grok.edits(*changes):
            traces = grok.generate(prompts, 5, capture=wishes)
        grok.dump(prompts, tmp_path / str(kw), 3, capture="resid_post", batch_size=2)
        found.append((traces, [gs.open(tmp_path / str(kw))[i] for i in range(len(prompts))]))
    for one, other in zip(found[0][0] + found[0][1], found[1][0] + found[1][1], strict=True):
        agree(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 7, 8])
def test_scale_groups_of_any_number_on_any_model_axis(tmp_path, groups):
    path = write_random(
        tmp_path / "ckpt", small_config(emb_size=56, key_size=14, num_layers=1, widening_factor=1.5), groups=groups
    )
    whole = gs.load(path, weights="int8").trace(PROMPTS[0], capture="logits")
    for mesh, form in (("1x4", "int8"), ("1x8", "expanded"), ("1x7", "int8"), ("1x7", "expanded")):
        agree(gs.load(path, weights=form, mesh=mesh).trace(PROMPTS[0], capture="logits"), whole)


@pytest.mark.slow
def test_fewer_key_value_heads_than_the_model_axis(tmp_path):
    """Eight query heads on two, four on a model axis of eight, and three key-value heads beside six."""
    for sizes in ({"num_q_heads": 8}, {"num_q_heads": 8, "num_kv_heads": 4}, {"num_q_heads": 6, "num_kv_heads": 3}):
        path = write_random(tmp_path / str(sizes), small_config(num_layers=2, **sizes))
        whole = gs.load(path).generate(PROMPTS[1], 4, capture=TAPS)
        agree(gs.load(path, mesh="1x8").generate(PROMPTS[1], 4, capture=TAPS), whole)


@pytest.mark.slow
def test_a_long_prompt_on_a_mesh(tmp_path, monkeypatch):
    """Keys are read in turns on each device, by two and by four heads, and logits come in parts."""
    path = write_random(tmp_path / "ckpt", small_config(num_layers=2, num_q_heads=8, sequence_len=1024))
    prompt = np.arange(700) % 90 + 5
    whole = gs.load(path).trace(prompt, capture=["attn_z", "resid_post"])
    monkeypatch.setattr(transformer, "AT_ONCE", 1 << 14)
    for mesh in ("2x4", "1x2"):
        agree(gs.load(path, mesh=mesh).trace(prompt, capture=["attn_z", "resid_post"]), whole)


def test_a_mesh_that_does_not_fit_is_refused_with_those_that_do(random_checkpoint):
    for mesh, why in (("1x3", "3 does not divide the expert width 56"), ("4x4", "16 devices and there are 8"),
                      ("0x2", "takes 0"), ("eight", "data x model")):  # fmt: skip
        with pytest.raises(ValueError, match=why) as caught:
            gs.load(random_checkpoint, mesh=mesh)
        assert "1x8" in str(caught.value)
        assert "2x4" in str(caught.value)
        assert "1x3" not in str(caught.value).split("fit")[-1]


def test_each_device_holds_its_part_of_the_weights(random_checkpoint):
    for form in ("int8", "expanded"):
        experts = gs.load(random_checkpoint, mesh="2x4", weights=form)._weights.layers[0]["layer/experts"]
        for leaf in jax.tree.leaves(experts):
            sizes = {shard.data.nbytes for shard in leaf.addressable_shards}
            assert len(sizes) == 1
            whole = leaf.nbytes
            assert sizes == {whole // 4}


def collectives(compiled) -> dict[str, list[int]]:
    """{operation: elements of each} of a compiled function."""
    found: dict[str, list[int]] = {}
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for shape, kind in re.findall(rf"= \(?\w+\[([\d,]*)\]\S* .*?({kinds})(?:-start)?\(", compiled.as_text()):
        found.setdefault(kind, []).append(int(np.prod([int(n) for n in shape.split(",") if n])))
    return found


@pytest.mark.parametrize(("mesh", "rows"), [("1x2", 8), ("2x4", 4), ("1x8", 8)])
def test_activations_travel_and_weights_do_not(tmp_path, mesh, rows, monkeypatch):
    """A layer sums twice over its model shards, a stream each time; the embedding once; the head gathers scalars."""
    monkeypatch.setattr(transformer, "AT_ONCE", 1 << 14)  # logits of 128 positions
    path = write_random(tmp_path / "ckpt", small_config(vocab_size=128, num_q_heads=8, num_kv_heads=8))
    grok = gs.load(path, mesh=mesh)
    weights, config, slots = grok._weights, grok.config, 8
    with sharding.on(weights.mesh):
        state, cache = DecodeState.idle(slots), KVCache.zeros(config, slots, 64, np.float32)
        at = (state.positions, state.tokens[:, None], state.live[:, None])
        x, positions, _ = steps.embed(config, PLAIN, weights.ends, at[1], at[0], at[2], {}, Given())
        at = (positions, *at[1:])
        layer = steps.decode_layers.lower(
            config, PLAIN, weights.layers[:1], x, [cache], positions, state, [{}], [Given()], 0
        ).compile()
        prompt, live = np.zeros((1, 512), np.int32), np.ones((1, 512), bool)
        start, long = np.zeros(1, np.int32), KVCache.zeros(config, 1, 1024, np.float32)
        y, positions, _ = steps.embed(config, PLAIN, weights.ends, prompt, start, live, {}, Given())
        place = (positions, prompt, live)
        prefill = steps.layer.lower(config, PLAIN, weights.layers[0], y, long, *place, {}, Given()).compile()
        score = steps.score.lower(config, PLAIN, weights.ends, x, at[1], *at, {}, Given()).compile()
        of_prompt = steps.score.lower(config, PLAIN, weights.ends, y, prompt, *place, {}, Given()).compile()
    found = collectives(layer)
    assert found.pop("all-reduce") == [rows * config.emb_size] * 2
    assert sum(map(sum, found.values())) <= slots * config.num_experts  # router logits, if anything
    assert collectives(prefill) == {"all-reduce": [prompt.size * config.emb_size] * 2}  # attention in parts, too
    assert sum(map(sum, collectives(score).values())) <= 4 * slots
    assert sum(map(sum, collectives(of_prompt).values())) <= 4 * prompt.size
