from __future__ import annotations

import numpy as np
import pytest

from sce_pipeline.evaluation.bootstrap import bootstrap_intervals


@pytest.fixture
def hits():
    return (np.random.default_rng(0).random((2000, 1)) < 0.1).astype(np.float64)


@pytest.mark.parametrize(("confidence", "deviations"), [(0.95, 1.95996), (0.8, 1.28155)])
def test_intervals_are_as_wide_as_those_of_a_binomial(hits, confidence, deviations):
    (low,), (high,) = bootstrap_intervals(hits, 2000, confidence, seed=1)
    share = hits.mean()
    half_width = deviations * np.sqrt(share * (1 - share) / len(hits))
    assert low < share < high
    assert share - low == pytest.approx(half_width, rel=0.1)
    assert high - share == pytest.approx(half_width, rel=0.1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    # Each column is an experiment of its own with 200 users.
    values = (generator.random((200, 2000)) < 0.4).astype(np.float64)
    low, high = bootstrap_intervals(values, 400, 0.9, seed=0)
    assert ((low <= 0.4) & (high >= 0.4)).mean() == pytest.approx(0.9, abs=0.025)


def test_the_seed_decides(hits):
    first, again, other = (bootstrap_intervals(hits, 50, 0.9, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_columns_share_their_resamples(hits):
    values = np.hstack([hits, 1 - hits])
    low, high = bootstrap_intervals(values, 200, 0.9, seed=0)
    assert low[0] == pytest.approx(1 - high[1], abs=1e-12)
    assert high[0] == pytest.approx(1 - low[1], abs=1e-12)


def test_equal_values_leave_no_doubt():
    low, high = bootstrap_intervals(np.full((30, 1), 0.25), 20, 0.9, seed=0)
    assert low == high == 0.25
