"""Streamed weights give what resident ones give, and read what they must."""

import numpy as np
import pytest
from conftest import small_config, write_random

import grokscope as gs
from grokscope.checkpoint import ckpt0
from grokscope.checkpoint.tensorfile import Tensor
from grokscope.checkpoint.weights import stored_bytes

MOMENTS, OF_ONE_LAYER = gs.capture("resid_mid", reduce="moments"), gs.capture("q", layers=1)
TAPS = ("resid_post", "attn_pattern", "expert_out", "logits", MOMENTS, OF_ONE_LAYER)
PROMPTS = [np.arange(5, 5 + n) for n in (3, 40, 1, 17, 9)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("streamed") / "ckpt", small_config(num_layers=4))


@pytest.fixture(scope="module")
def sizes(checkpoint):
    return stored_bytes(gs.load(checkpoint).config, np.dtype(np.float32), "int8")


def equal(one: gs.Trace, other: gs.Trace) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    for tap in other.taps:
        np.testing.assert_array_equal(one[tap], other[tap], err_msg=tap)


@pytest.mark.parametrize("experts", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 14))])
def test_streamed_is_resident(checkpoint, sizes, experts):
    """To the bit, whatever the budget keeps."""
    memory = sizes.least + (4 * sizes.attention + experts * sizes.expert if experts else 0)
    resident, streamed = gs.load(checkpoint, weights="int8"), gs.load(checkpoint, weights="streamed", memory=memory)
    for one, other in zip(
        streamed.generate(PROMPTS, 6, capture=TAPS, batch_size=3),
        resident.generate(PROMPTS, 6, capture=TAPS, batch_size=3),
        strict=True,
    ):
        equal(one, other)
    assert streamed._weights.nbytes <= memory


@pytest.mark.slow
def test_hooks_inside_the_experts_and_edits(checkpoint, sizes):
    resident, streamed = (
        gs.load(checkpoint, weights="int8"),
        gs.load(checkpoint, weights="streamed", memory=sizes.least),
    )
    short = PROMPTS[2:]  # one block for all
    for one, other in zip(
        streamed.generate(short, 6, capture="expert_hidden", batch_size=2),
        resident.generate(short, 6, capture="expert_hidden", batch_size=2),
        strict=True,
    ):
        equal(one, other)
    changes = (
        gs.route.ban(layers=slice(1, None), experts=2),
        gs.route.force(layers=0, experts=[1, 2, 3]),
        gs.ablate(experts=1, layers=slice(1, None)),
        gs.patch(resident.trace([9, 8, 7, 6]), "expert_index", layers=1, positions={1: 3, 2: 0}, prompts=1),
        gs.route.swap(3, 4, layers=1),
    )
    with streamed.edits(*changes), resident.edits(*changes):
        for one, other in zip(streamed.trace(short, TAPS), resident.trace(short, TAPS), strict=True):
            equal(one, other)


def test_many_prompts_share_one_reading(checkpoint, sizes):
    streamed = gs.load(checkpoint, weights="streamed", memory=sizes.least)
    on_disk = sum(path.stat().st_size for path in (checkpoint / "ckpt-0").iterdir())
    streamed.trace(PROMPTS * 4)
    assert streamed._weights.bytes_read <= 1.3 * on_disk  # and the first layer's attention, read ahead


def test_a_short_input_reads_the_experts_it_chose(checkpoint, sizes):
    streamed = gs.load(checkpoint, weights="streamed", memory=sizes.least)
    before = streamed._weights.bytes_read
    trace = streamed.trace([7])
    files = {slot.file: slot for own in streamed._weights._slots.values() for slot in own}
    of_expert = (
        sum(
            (checkpoint / "ckpt-0" / file).stat().st_size / 8
            for file, slot in files.items()
            if slot.param.dims[0] == "E"
        )
        / 4
    )
    attention = sum(
        (checkpoint / "ckpt-0" / file).stat().st_size
        for file, slot in files.items() if slot.layer is not None and slot.param.dims[0] != "E"
    ) / 4  # fmt: skip
    read = streamed._weights.bytes_read - before
    assert trace["expert_index"].shape == (4, 1, 2)
    assert read <= 4 * 2 * of_expert + 5 * attention + 1  # one layer's attention is read ahead


def test_what_fits_is_read_once(checkpoint):
    streamed = gs.load(checkpoint, weights="streamed")
    streamed.trace(PROMPTS)
    before = streamed._weights.bytes_read
    streamed.trace(PROMPTS)
    assert streamed._weights.bytes_read == before


def test_budgets_that_are_none(checkpoint, sizes):
    with pytest.raises(MemoryError, match=f"takes {sizes.least} bytes at least"):
        gs.load(checkpoint, weights="streamed", memory=sizes.least - 1)
    with pytest.raises(ValueError, match="streamed"):
        gs.load(checkpoint, memory="20GB")
    with pytest.raises(ValueError, match="memory='much'"):
        gs.load(checkpoint, weights="streamed", memory="much")


def test_matrices_stored_as_floats_stay_within_the_budget(tmp_path):
    def floats(slot):
        value = np.random.default_rng(slot.index).standard_normal(slot.param.shape(config)).astype(np.float32)
        return Tensor(value / 10)

    config = small_config(num_layers=2)
    path = ckpt0.write(tmp_path / "floats", config, floats)
    memory = stored_bytes(config, np.dtype(np.float32), "expanded").least
    with gs.load(path, weights="streamed", memory=memory) as streamed, gs.load(path, weights="expanded") as resident:
        equal(streamed.trace([7, 8, 9]), resident.trace([7, 8, 9]))
        assert streamed._weights.nbytes <= memory
    with pytest.raises(MemoryError, match=f"takes {memory} bytes at least"):
        gs.load(path, weights="streamed", memory=memory - 1)


def test_what_was_read_ahead_and_is_not_needed_is_not_kept(checkpoint, sizes):
    """As where one layer takes all experts and the next does not."""
    streamed = gs.load(checkpoint, weights="streamed", memory=sizes.least)
    with streamed.edits(gs.route.ban(experts=0, layers=[1, 3])):
        taken = streamed.trace(np.arange(60) + 5)["expert_index"]
    assert set(taken[0].ravel()) == set(range(8)), "and so one of layer 1 is read ahead"
    assert set(streamed._weights._reading) <= {(0, None), (0, 0)}


@pytest.mark.parametrize("mesh", ["8x1", pytest.param("2x4", marks=pytest.mark.slow)])
def test_copies_count(checkpoint, sizes, mesh):
    """What is on all devices stays within the budget; a mesh with a data axis has a copy of each weight on each."""
    data = int(mesh[0])
    with pytest.raises(MemoryError, match="at least"):
        gs.load(checkpoint, weights="streamed", memory=sizes.least, mesh=mesh)
    memory = 3 * data * sizes.least
    streamed = gs.load(checkpoint, weights="streamed", memory=memory, mesh=mesh)
    equal(streamed.trace([7, 8, 9]), gs.load(checkpoint, weights="int8", mesh=mesh).trace([7, 8, 9]))
    held = sum(shard.data.nbytes for leaf in streamed._weights._kept() for shard in leaf.addressable_shards)
    assert held == streamed._weights.nbytes <= memory


def test_files_that_change_under_it(tmp_path):
    """Or the answer would be of two models."""
    config = small_config(num_layers=2)
    path, other = (write_random(tmp_path / str(seed), config, seed) for seed in (0, 1))
    grok = gs.load(path, weights="streamed", memory=100_000)
    grok.trace([7, 8])
    for file in (other / "ckpt-0").iterdir():
        file.replace(path / "ckpt-0" / file.name)
    with pytest.raises(
        RuntimeError, match=r"tensor\d+_000 \(.*\) has changed since the model was loaded; load it again"
    ):
        grok.trace([7, 8])


def test_a_file_that_goes_missing_says_so_and_the_model_goes_on(tmp_path):
    path = write_random(tmp_path / "ckpt", small_config(num_layers=2))
    grok = gs.load(path, weights="streamed", memory=100_000)
    wanted = grok.trace([7, 8])
    lost = path / "ckpt-0" / "tensor00002_000"
    lost.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="tensor00002_000"):
        grok.trace([7, 8])
    (tmp_path / "away").rename(lost)
    equal(grok.trace([7, 8]), wanted)


@pytest.mark.slow
def test_a_plan_tells_what_is_read(checkpoint, sizes):
    """Exactly, but for what is read ahead, where all experts are needed and none kept; else at most."""
    streamed = gs.load(checkpoint, weights="streamed", memory=sizes.least)
    long = [np.arange(200) % 90 + 5] * 3
    before = streamed._weights.bytes_read
    planned = streamed.plan(long).read
    streamed.trace(long)
    ahead = streamed._weights._file_bytes(0, experts=False) + streamed._weights._file_bytes(0, experts=True) // 8
    assert planned <= streamed._weights.bytes_read - before <= planned + ahead
    before = streamed._weights.bytes_read
    planned = streamed.plan(PROMPTS, 6, batch_size=3).read
    streamed.generate(PROMPTS, 6, batch_size=3)
    assert streamed._weights.bytes_read - before <= planned + ahead
    assert "GB/s" in repr(streamed.plan(long))
    whole = gs.load(checkpoint, weights="streamed")
    whole.trace(long)
    assert whole.plan(long).read == 0
    assert gs.load(checkpoint).plan(long).read == 0
