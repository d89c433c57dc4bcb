"""Samplers against plain numpy."""

import numpy as np
import pytest

from grokscope.run.sampling import Sampling, choose


def rows(count, vocab, **changes):
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "seed": 0} | changes
    return Sampling.rows(count, vocab, **settings)


def draw(logits, count=4000, **changes):
    """The distribution of draws over `count` positions."""
    vocab = len(logits)
    sampling = rows(count, vocab, **changes)
    method = sampling.method(vocab)
    ids = choose(method, np.tile(np.float32(logits), (count, 1)), np.arange(count, dtype=np.int32), sampling)
    return method, np.bincount(ids, minlength=vocab) / count


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def test_temperature():
    method, found = draw(LOGITS, temperature=0.7)
    assert method == "gumbel"
    np.testing.assert_allclose(found, softmax(LOGITS / 0.7), atol=0.03)


def test_temperatures_that_float32_cannot_divide_by():
    assert draw(LOGITS, temperature=1e-42)[1][0] == 1
    few = rows(1, 6, temperature=1e39, top_k=2)
    ids = {int(choose("filtered", np.float32(LOGITS[None]), np.full(1, p, np.int32), few)[0]) for p in range(30)}
    assert ids == {0, 1}


def test_zero_is_greedy_in_any_company():
    assert draw(LOGITS, temperature=0.0) == ("greedy", pytest.approx([1, 0, 0, 0, 0, 0]))
    sampling = rows(2, 6, temperature=[0.0, 5.0], top_k=[6, 3])
    for position in range(50):
        ids = choose("filtered", np.tile(np.float32(LOGITS), (2, 1)), np.full(2, position, np.int32), sampling)
        assert ids[0] == 0
        assert ids[1] < 3


def test_top_k():
    method, found = draw(LOGITS, top_k=3)
    assert method == "filtered"
    np.testing.assert_allclose(found[:3], softmax(LOGITS[:3]), atol=0.03)
    assert found[3:].sum() == 0


def test_top_p_keeps_the_fewest_that_reach_it():
    mass = np.cumsum(softmax(LOGITS))
    for kept in (1, 2, 4):
        _, found = draw(LOGITS, top_p=float(mass[kept - 1]) - 1e-4)
        assert (found > 0).sum() == kept
        np.testing.assert_allclose(found[:kept], softmax(LOGITS[:kept]), atol=0.03)


def test_a_flat_distribution_needs_the_full_sort():
    """The 1024 candidates hold a quarter of the mass: top_p 0.9 must reach tokens outside them."""
    logits = np.linspace(0.01, 0, 4096)
    _, found = draw(logits, count=3000, top_p=0.9)
    reached = np.nonzero(found)[0].max()
    assert 3500 < reached < 3700


@pytest.mark.slow
def test_a_row_without_filters_is_as_if_alone():
    """In filtered company, and without asking for the full sort."""
    logits = np.random.default_rng(0).standard_normal((2, 3000)).astype(np.float32)
    company = rows(2, 3000, top_k=[3000, 5], seed=9)
    alone = rows(1, 3000, seed=9)
    for position in range(40):
        at = np.full(2, position, np.int32)
        assert choose("filtered", logits, at, company)[0] == choose("gumbel", logits[:1], at[:1], alone)[0]


def test_noise_belongs_to_seed_and_position():
    logits = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)

    def ids(batch, seed):
        many = np.repeat(logits, batch, 0)
        return [
            int(choose("gumbel", many, np.full(batch, p, np.int32), rows(batch, 50, seed=seed))[-1]) for p in range(30)
        ]

    assert ids(1, 3) == ids(5, 3)
    assert ids(1, 3) != ids(1, 4)
    # The two samplers share their noise: a filter that keeps everything changes nothing.
    many = rows(1, 50, seed=3)
    assert ids(1, 3) == [int(choose("filtered", logits, np.array([p], np.int32), many)[0]) for p in range(30)]
