from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sce_pipeline.evaluation import significance as significance_module
from sce_pipeline.evaluation.significance import compare_ndcg, holm, permutation_p_value

SETTINGS = {
    "cutoff": 10,
    "n_bootstrap": 300,
    "confidence": 0.95,
    "n_permutations": 999,
    "seed": 0,
}


def make_rankings(ranks, users=None, targets=None, n_items=50):
    n = len(ranks)
    return {
        "users": np.arange(n, dtype=np.int32) if users is None else users,
        "targets": np.zeros(n, dtype=np.int32) if targets is None else targets,
        "target_ranks": np.asarray(ranks, dtype=np.int64),
        "n_items": np.array([n_items]),
    }


@pytest.mark.parametrize("seed", range(4))
def test_the_p_value_is_that_of_all_signs_and_of_scipy(seed):
    differences = np.random.default_rng(seed).normal(0.5, 1, 11)
    differences[[2, 7]] = 0
    means = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=11)]
    expected = np.mean(np.array(means) >= abs(differences.sum()) - 1e-12)
    by_scipy = stats.permutation_test((differences,), np.sum, permutation_type="samples").pvalue
    assert by_scipy == pytest.approx(expected)
    p_value = permutation_p_value(differences, 40_000, seed=0)
    assert p_value == pytest.approx(expected, abs=0.01)
    assert p_value == permutation_p_value(differences, 40_000, seed=0)


def test_random_signs_come_near_a_t_test_whatever_is_drawn_at_once(monkeypatch):
    differences = np.random.default_rng(0).normal(0.08, 1, 800)
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert 0.01 < expected < 0.2
    for at_once in (2**22, 10_000):
        monkeypatch.setattr(significance_module, "SIGNS_AT_ONCE", at_once)
        assert permutation_p_value(differences, 9999, seed=1) == pytest.approx(expected, abs=0.012)


def test_rankings_that_agree_have_nothing_to_show():
    ranks = [1, 5, 300, 2]
    difference = compare_ndcg(make_rankings(ranks), make_rankings(ranks), ("a", "b"), **SETTINGS)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert difference.p_value == 1


def test_equal_rankers_are_found_to_differ_as_seldom_as_promised():
    generator = np.random.default_rng(0)
    found = covered = 0
    n = 200
    for _ in range(n):
        # What makes a user easy is shared, so that the pairs are correlated.
        base = generator.integers(1, 30, 60)
        first, second = (base + generator.integers(0, 15, 60) for _ in range(2))
        settings = {**SETTINGS, "n_permutations": 199}
        difference = compare_ndcg(
            make_rankings(first), make_rankings(second), ("a", "b"), **settings
        )
        found += difference.p_value <= 0.1
        covered += difference.low <= 0 <= difference.high
    assert found / n == pytest.approx(0.1, abs=0.06)
    assert covered / n == pytest.approx(0.95, abs=0.06)


def test_a_planted_difference_is_found_and_users_are_joined_by_id():
    generator = np.random.default_rng(0)
    ranks = generator.integers(1, 40, 500)
    better = np.where(generator.random(500) < 0.15, np.maximum(1, ranks // 2), ranks)
    order = generator.permutation(500)
    targets = generator.integers(50, size=500)
    first = make_rankings(better[order], order.astype(np.int32), targets[order])
    second = make_rankings(ranks, targets=targets)
    difference = compare_ndcg(first, second, ("a", "b"), **SETTINGS)
    gains = [np.where(each <= 10, 1 / np.log2(each + 1), 0) for each in (better, ranks)]
    assert difference.n_users == 500
    assert difference.first == pytest.approx(gains[0].mean())
    assert difference.second == pytest.approx(gains[1].mean())
    assert difference.value == pytest.approx((gains[0] - gains[1]).mean())
    assert 0 < difference.low < difference.value < difference.high
    assert difference.p_value == pytest.approx(2 / 1000)  # the least that 999 signs can give
    turned = compare_ndcg(second, first, ("b", "a"), **SETTINGS)
    assert (turned.value, turned.low) == pytest.approx((-difference.value, -difference.high))
    # The pairing is what finds it: unpaired, the same means do not differ.
    assert stats.ttest_ind(*gains).pvalue > 0.05
    assert difference.high - difference.low < 4 * (gains[0] - gains[1]).std(ddof=1) / np.sqrt(500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_items": 51}, r"sce of May ranks 50 items and ce of June 51; only .* catalogue"),
        (
            {"users": np.array([0, 1, 9], dtype=np.int32)},
            r"sce of May has 3 test users and ce of June 3, of which they share 2; only",
        ),
        (
            {"targets": np.array([0, 4, 0], dtype=np.int32)},
            r"sce of May and ce of June are to find different items for 1 of 3 test users",
        ),
    ],
    ids=["catalogue", "users", "targets"],
)
def test_runs_that_cannot_be_compared_are_refused_by_name(changes, message):
    first, second = make_rankings([1, 2, 3]), make_rankings([1, 2, 3], **changes)
    with pytest.raises(ValueError, match=message):
        compare_ndcg(first, second, ("sce of May", "ce of June"), **SETTINGS)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5]) == [0.5]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.3]))
def test_holm_rejects_what_its_steps_reject(p_values, level):
    rejected = set()
    for step, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] * (len(p_values) - step) > level:
            break
        rejected.add(place)
    corrected = holm(p_values)
    assert {place for place, p in enumerate(corrected) if p <= level} == rejected
    assert all(p <= q <= 1 for p, q in zip(p_values, corrected, strict=True))
