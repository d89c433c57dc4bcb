"""Random checkpoints: in the released format, with the figures of Grok-1 that are known, at any width."""

import dataclasses

import numpy as np
import pytest
from conftest import small_config

import grokscope as gs
from grokscope.checkpoint import ckpt0, rehearse
from grokscope.model.quant import QuantizedWeight, dequantize, quantize
from grokscope.run.engine import bundled_checkpoint


@pytest.fixture(scope="module")
def config():
    """Of the bundled shape, with a fan in wide enough for the figures to hold closely."""
    return dataclasses.replace(ckpt0.open_checkpoint(bundled_checkpoint()).config, num_layers=2)


@pytest.fixture(scope="module")
def directory(config, tmp_path_factory):
    return rehearse.rehearse(tmp_path_factory.mktemp("rehearsal") / "r", config, seed=1)


def rms(x):
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def test_verifies(directory):
    report = gs.verify(directory)
    assert report.ok, report.problems
    assert "SHA256SUMS compared" in report.notes[0]


def test_seeds(tmp_path):
    """The same seed gives the same bytes, another one none of the weights."""
    sums = [
        (rehearse.rehearse(tmp_path / name, small_config(), seed=seed) / "SHA256SUMS").read_text().splitlines()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert sums[0] == sums[1]
    same = [line for line in sums[0] if line in sums[2]]
    assert [line.split()[1] for line in same] == ["config.json"]
    assert len({line.split()[0] for line in sums[0]}) == len(sums[0])  # no two files alike


def test_weights_are_as_quantisation_leaves_them(directory):
    """Quantising the weights once more gives every int8 and every scale again, and every expert has its own."""
    checkpoint = ckpt0.open_checkpoint(directory)
    for slot in ckpt0.slots(checkpoint.config):
        tensor = checkpoint.read(slot)
        if slot.param.groups is None:
            continue
        assert tensor.scales.shape[-2] == slot.param.groups
        weight = dequantize(QuantizedWeight(tensor.weight, tensor.scales))
        again = quantize(weight, slot.param.groups)
        np.testing.assert_array_equal(again.weight, tensor.weight)
        np.testing.assert_array_equal(again.scales, tensor.scales)
        gain = {"query": 3**0.5, "key": 3**0.5}.get(slot.param.name, 1)
        assert rms(weight) == pytest.approx(gain / weight.shape[-2] ** 0.5, rel=0.05)
        assert len(np.unique(np.abs(tensor.weight.astype(int)))) > 100
        if slot.param.dims[0] == "E":
            assert abs(np.corrcoef(weight[0].ravel(), weight[1].ravel())[0, 1]) < 0.02


def test_figures_of_layer_0(directory, config):
    """Those of grok-1.md: embedding 0.998890, router margin 0.00617, deltas 0.876 and 0.483 of the stream; an even load
    within the range of the real one, 0.102 to 0.166."""
    with gs.load(directory) as grok:
        ids = np.random.default_rng(0).integers(4, config.vocab_size, 512).tolist()
        taps = ("resid_pre", "resid_mid", "attn_delta", "moe_delta", "attn_scores")
        trace = grok.trace(ids, capture=[*taps, "router_probs"])
        first, second = np.sort(trace["router_probs", 0], axis=-1)[:, :-3:-1].T
        assert np.median(first - second) == pytest.approx(0.00617, rel=0.15)
        load = np.bincount(trace["expert_index", 0].ravel(), minlength=8) / (2 * len(ids))
        assert 0.08 < load.min() < load.max() < 0.18
        stream, middle, attention, experts, scores = (trace[tap, 0] for tap in taps)
        assert rms(stream) == pytest.approx(0.99889, rel=0.01)
        assert rms(attention) / rms(stream) == pytest.approx(0.876, rel=0.05)
        assert rms(experts) / rms(middle) == pytest.approx(0.483, rel=0.05)
        assert scores[:, *np.tril_indices(len(ids))].std() == pytest.approx(3, rel=0.15)
        told = grok.generate(ids[:5], max_new_tokens=8).tokens[5:]
        assert len(set(told)) > 4  # not one token for ever


def test_embedding_of_any_width():
    """The figure that `verify` holds against Grok-1's table: it is drawn from a normal variable of that RMS."""
    slot = ckpt0.slots(gs.GROK_1)[0]
    rows = next(iter(rehearse._tensor(slot, gs.GROK_1, 0).weight.pieces))
    assert rms(rows) == pytest.approx(ckpt0.KNOWN_EMBEDDING_RMS, rel=0.01)


def test_shapes_of_grok_1():
    """Every tensor announces the released shape and type, before any of it is drawn."""
    for slot in ckpt0.slots(dataclasses.replace(gs.GROK_1, num_layers=1)):
        if slot.param.name in ("gate", "up", "down", "w"):
            tensor = rehearse._tensor(slot, gs.GROK_1, 0)
            assert tensor.weight.shape == slot.param.shape(gs.GROK_1)
            if tensor.scales is not None:
                assert (tensor.weight.dtype, tensor.scales.dtype.name) == (np.int8, "bfloat16")
                assert tensor.scales.shape[-2] == slot.param.groups


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """Also with the remains of a run that was cut short, which make room."""
    needed = ckpt0.payload_bytes(small_config())
    usage = [needed]
    monkeypatch.setattr(ckpt0.shutil, "disk_usage", lambda path: type("", (), {"free": usage[0]}))
    (tmp_path / "r" / ckpt0.UNFINISHED).mkdir(parents=True)
    with pytest.raises(OSError, match=r"r needs .* more .* its disk has .* free; make room or choose"):
        rehearse.rehearse(tmp_path / "r", small_config())
    assert not list((tmp_path / "r").iterdir())
    usage[0] += needed // 100
    assert gs.verify(rehearse.rehearse(tmp_path / "r", small_config())).ok
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_one_at_a_time(tmp_path):
    """Who comes second is refused, and what the first writes stays."""

    def beside(todo):
        for slot in todo:
            with pytest.raises(RuntimeError, match="another process"):
                rehearse.rehearse(tmp_path / "r", small_config())
            yield slot

    assert gs.verify(rehearse.rehearse(tmp_path / "r", small_config(), progress=beside)).ok
    assert not (tmp_path / "r" / ckpt0.UNFINISHED).exists()


def test_where_it_is_written(tmp_path):
    """Beside what is a user's, through a link, and nothing stays of what failed."""
    (tmp_path / "r.partial").mkdir()
    (tmp_path / "r.partial" / "mine").touch()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for name in ("r", "link"):
        assert gs.verify(rehearse.rehearse(tmp_path / name, small_config())).ok
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "disk" / ckpt0.UNFINISHED).exists()
    assert (tmp_path / "r.partial" / "mine").exists()

    def interrupt(_):
        raise KeyboardInterrupt

    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(KeyboardInterrupt):
            ckpt0.write(tmp_path / name, small_config(), interrupt)
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "empty").iterdir())
