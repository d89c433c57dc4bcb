"""`grokscope plan --model`: what it says is what a run takes."""

import jax
import numpy as np
import pytest

import grokscope as gs
from grokscope.model.sharding import make_mesh, on
from grokscope.model.transformer import KVCache
from grokscope.run import fit as fit_module
from grokscope.run.decode import cache_length
from grokscope.run.fit import fits, table


def held(tree) -> int:
    """Bytes on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "asked"), [("int8", ["1x1", "2x4", "8x1"]), ("expanded", ["1x2", "1x8"])])
def test_weights_and_cache_are_exact(form, asked):
    config = gs.load(weights="int8").config
    for mesh, fit in zip(asked, fits(config, asked, context=300, batch=4, numerics="float32", form=form), strict=True):
        weights = gs.load(mesh=mesh, weights=form)._weights
        assert fit.weights == held((weights.ends, weights.layers))
        slots = -(-4 // int(mesh[0])) * int(mesh[0])
        with on(make_mesh(mesh, config)):
            caches = [KVCache.zeros(config, slots, 512, np.float32), KVCache.zeros(config, 1, 512, np.float32)]
        assert cache_length(300) == 512
        assert fit.cache == config.num_layers * held(caches)
        assert fit.captures > 0
        assert 0 < fit.temporaries < 100e6


@pytest.mark.slow
def test_grok_1_on_eight_cards_and_from_a_disk():
    text = table(gs.GROK_1, "1x8", context=8192, batch=4)
    assert "39.6 GB" in text  # 318 GB, the embedding in bfloat16
    assert "cards of 48 GB, 80 GB" in text
    assert "a pass over many prompts reads 315 GB" in text
    assert any(line.split()[:2] == ["1", "1x1"] and line.endswith("none") for line in text.splitlines())


@pytest.mark.slow
def test_what_was_compiled_before_says_the_same(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, again = (fits(gs.load().config, ["1x2"], context=300, batch=4) for _ in range(2))
    assert first == again
    assert list(tmp_path.rglob("*-cache"))


def test_what_cannot_be_planned_says_why(monkeypatch):
    monkeypatch.setattr(fit_module, "_compiled_apart", lambda *_: pytest.fail("it compiled first"))
    with pytest.raises(KeyError, match="no tap named"):
        fits(gs.GROK_1, ["1x8"], context=100, batch=1, capture="nope")
    with pytest.raises(ValueError, match=r"divides 32768"):
        fits(gs.GROK_1, ["1x3"], context=100, batch=1)
    with pytest.raises(ValueError, match="data x model"):
        fits(gs.GROK_1, ["eight"], context=100, batch=1)
    with pytest.raises(ValueError, match="2 to 8192"):
        fits(gs.GROK_1, ["1x8"], context=9000, batch=1)
    for wrong in ({"numerics": "float16"}, {"form": "streamed"}):
        with pytest.raises(ValueError, match="expected float32 or bfloat16, and int8 or expanded"):
            fits(gs.GROK_1, ["1x8"], context=100, batch=1, **wrong)
