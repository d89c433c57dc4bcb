"""Outputs of the released code on small checkpoints (facts in ../shared/grok-1.md, section 5)."""

import numpy as np
import pytest

import grokscope as gs
from grokscope.model.transformer import KVCache
from grokscope.run import steps
from grokscope.run.hooks import PLAIN, CaptureKind, Given, stage

CAPTURE = ["router_logits", "attn_pattern", "resid_post", "logits"]
LENGTHS = (24, 17)  # row 1 is padded from position 17


def rows(expected):
    return [expected["tokens"][row, :length].tolist() for row, length in enumerate(LENGTHS)]


def decoded(grok, ids, prompt_length):
    """Logits from the last prompt position on: the prompt at once, then the given ids one at a time, cached."""
    config, weights = grok.config, grok._weights
    dtype = weights.ends["embedding"]["w"].dtype
    caches = [KVCache.zeros(config, 1, 32, dtype) for _ in weights.layers]
    found = []
    for begin, end in [(0, prompt_length), *((i, i + 1) for i in range(prompt_length, len(ids)))]:
        tokens = np.array([ids[begin:end]], np.int32)
        start, live, bare = np.array([begin], np.int32), np.ones(tokens.shape, bool), ({}, Given())
        x, positions, _ = steps.embed(config, PLAIN, weights.ends, tokens, start, live, *bare)
        at = (positions, tokens, live)
        for i, params in enumerate(weights.layers):
            x, caches[i], _ = steps.layer(config, PLAIN, params, x, caches[i], *at, *bare)
        looking = stage((CaptureKind("logits", "logits", ("logits",)),))
        _, captured = steps.score(config, looking, weights.ends, x, tokens, *at, {}, Given(({},)))
        found.append(np.asarray(captured["logits"])[0, -1].astype(np.float32))
    return np.stack(found)


@pytest.mark.parametrize("case", ["tiny", "deep", pytest.param("blocks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("weights", ["expanded", "int8"])
def test_float32_agrees_with_the_released_code(golden, case, weights):
    expected = np.load(golden(case) / "golden.npz")
    with gs.load(golden(case), numerics="float32", weights=weights) as grok:
        for row, ids in enumerate(rows(expected)):
            n = len(ids)
            trace = grok.trace(ids, capture=CAPTURE)
            close = dict(rtol=0, atol=1e-4)
            np.testing.assert_allclose(trace["logits"], expected["logits"][row, :n], **close)
            np.testing.assert_allclose(trace["router_logits"], expected["router_logits"][:, row, :n], **close)
            np.testing.assert_allclose(trace["attn_pattern"], expected["attn"][:, row, :, :n, :n], **close)
            np.testing.assert_allclose(trace["resid_post"], expected["resid_post"][:, row, :n], **close)
        prompt = rows(expected)[0][:9]
        greedy = grok.generate(prompt, max_new_tokens=24, stop_at_eos=False)
        sure = np.cumprod(expected["greedy_gap"] > 1e-3).astype(bool)
        assert sure.sum() > 8
        assert (greedy.tokens[9:][sure] == expected["greedy_tokens"][9:][sure]).all()
        np.testing.assert_allclose(decoded(grok, rows(expected)[0], 9), expected["decode_logits"], **close)


@pytest.mark.parametrize("weights", ["expanded", pytest.param("int8", marks=pytest.mark.slow)])
def test_bfloat16_agrees_within_its_rounding(golden, weights):
    expected = np.load(golden("bf16") / "golden.npz")
    with gs.load(golden("bf16"), numerics="bfloat16", weights=weights) as grok:
        for row, ids in enumerate(rows(expected)):
            n = len(ids)
            trace = grok.trace(ids, capture=CAPTURE)
            probs = np.sort(expected["router_probs"][:, row, :n], axis=-1)
            sure = (probs[..., -2] - probs[..., -3] > 0.02).all(axis=0)  # near-tied experts may flip
            assert sure.sum() >= 8
            assert np.abs(trace["logits"] - expected["logits"][row, :n])[sure].max() < 0.15
            assert np.abs(trace["router_logits"] - expected["router_logits"][:, row, :n])[:, sure].max() < 0.15
            if row == 0:
                off = np.abs(decoded(grok, ids, 9) - expected["decode_logits"]).max(axis=-1)
                assert (off[sure[8:]] < 0.15).all()
                assert sure[8:].sum() >= 5
