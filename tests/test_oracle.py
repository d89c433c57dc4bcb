"""Every tap against an independent network in numpy float64."""

import numpy as np
import oracle
import pytest
from conftest import small_config, write_random

import grokscope as gs

SHAPES = {
    "plain": {},
    "one_kv_head": {"num_q_heads": 6, "num_kv_heads": 1, "widening_factor": 2},
    "no_grouping": {"num_q_heads": 3, "num_kv_heads": 3, "key_size": 8},
    "other_experts": {"num_experts": 5, "num_selected_experts": 3, "num_layers": 2},
    "all_experts": {"num_experts": 2, "num_selected_experts": 2, "num_layers": 1},
    "eleven_layers": {"num_layers": 11},  # lexicographic order: 0 1 10 2 3 ...
}


def agree(trace, expected, atol=1e-4):
    for tap in gs.TAPS:
        np.testing.assert_allclose(trace[tap], expected[tap], rtol=1e-5, atol=atol, err_msg=tap)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("weights", "groups"), [("expanded", None), ("int8", 2)])
def test_every_tap(tmp_path, shape, weights, groups):
    config = small_config(**SHAPES[shape])
    directory = write_random(tmp_path / "c", config, seed=len(shape), groups=groups)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 37)
    tokens[5] = 0  # pad inside the true length is an ordinary token
    expected = oracle.forward(*oracle.read_checkpoint(directory), tokens)
    with gs.load(directory, weights=weights) as grok:
        trace = grok.trace(tokens, capture=gs.TAPS)
        agree(trace, expected)
        np.testing.assert_allclose(trace.logprobs, oracle.logprobs(expected["logits"], tokens), atol=1e-4)


def test_every_tap_while_generating(random_checkpoint):
    with gs.load(random_checkpoint) as grok:
        trace = grok.generate([5, 0, 9, 11], max_new_tokens=70, stop_at_eos=False, capture=gs.TAPS)
        expected = oracle.forward(*oracle.read_checkpoint(random_checkpoint), trace.tokens)
        agree(trace, expected)
        assert (expected["logits"][3:-1].argmax(-1) == trace.tokens[4:]).all()


def test_the_bundled_model(grok):
    """A trained model, not only random ones."""
    trace = grok.trace("The old keeper of the lighthouse.", capture=gs.TAPS)
    expected = oracle.forward(*oracle.read_checkpoint(grok._checkpoint.directory), trace.tokens)
    agree(trace, expected, atol=1e-3)  # outputs of experts reach 100
