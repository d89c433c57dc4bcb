"""Outputs of the released code on small checkpoints (facts in ../shared/grok-1.md, section 5)."""

import numpy as np
import pytest

import grokscope as gs

CAPTURE = ["router_logits", "attn_pattern", "resid_post", "logits"]
LENGTHS = (24, 17)  # row 1 is padded from position 17


def rows(expected):
    return [expected["tokens"][row, :length].tolist() for row, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("case", ["tiny", "deep", "blocks"])
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
        greedy = grok.generate(prompt, max_new_tokens=24, stop_at_eos=False, capture="logits")
        sure = np.cumprod(expected["greedy_gap"] > 1e-3).astype(bool)
        assert sure.sum() > 8
        assert (greedy.tokens[9:][sure] == expected["greedy_tokens"][9:][sure]).all()
        # Cached decoding of the given tokens, not of our own: what the released decoder saw.
        taught = grok.trace(rows(expected)[0], capture="logits")["logits"][8:]
        np.testing.assert_allclose(taught, expected["decode_logits"], **close)


@pytest.mark.parametrize("weights", ["expanded", "int8"])
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
