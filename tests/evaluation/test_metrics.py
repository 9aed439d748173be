from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_reciprocal_rank,
)

from sce_pipeline.evaluation.metrics import (
    hit_rate,
    item_surprisal,
    measure,
    ndcg,
    reciprocal_rank,
)
from sce_pipeline.evaluation.ranking import NEVER_RANKED, rank_block

CUTOFFS = (1, 5, 10)
SETTINGS = {"n_bootstrap": 200, "confidence": 0.95, "seed": 0}


def rankings_of(ranks, top_items, n_items):
    n_users = len(ranks)
    return {
        "users": np.arange(n_users, dtype=np.int32),
        "targets": np.zeros(n_users, dtype=np.int32),
        "target_ranks": np.array(ranks, dtype=np.int64),
        "top_items": np.array(top_items, dtype=np.int32),
        "n_items": np.array([n_items]),
    }


def popularity_of(users, n_users):
    return {"users": np.array(users, dtype=np.int32), "n_users": np.array([n_users])}


@pytest.fixture
def scored():
    """Random scores without ties, targets, and their rankings."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 25, generator=generator)
    targets = torch.randint(25, (60,), generator=generator)
    ranking = rank_block(scores, torch.eye(25), targets, None, k=10)
    rankings = rankings_of(ranking.target_ranks.numpy(), ranking.top_items.numpy(), 25)
    return scores, targets, rankings


@pytest.fixture
def popularity():
    return popularity_of(np.random.default_rng(0).integers(40, size=25), 40)


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_ndcg_is_that_of_scikit_learn(scored, popularity, cutoff):
    scores, targets, rankings = scored
    relevance = torch.nn.functional.one_hot(targets, 25)
    expected = ndcg_score(relevance.numpy(), scores.numpy(), k=cutoff, ignore_ties=True)
    metrics = measure(rankings, popularity, CUTOFFS, **SETTINGS)
    assert metrics[f"ndcg@{cutoff}"]["value"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize(
    ("name", "of_user", "reference"),
    [
        ("hr", hit_rate, retrieval_hit_rate),
        ("ndcg", ndcg, retrieval_normalized_dcg),
        ("mrr", reciprocal_rank, retrieval_reciprocal_rank),
    ],
)
def test_metrics_are_those_of_torchmetrics(scored, popularity, cutoff, name, of_user, reference):
    scores, targets, rankings = scored
    relevant = torch.nn.functional.one_hot(targets, 25).bool()
    expected = [
        float(reference(*user, top_k=cutoff)) for user in zip(scores, relevant, strict=True)
    ]
    values = of_user(torch.from_numpy(rankings["target_ranks"]), cutoff)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    metrics = measure(rankings, popularity, CUTOFFS, **SETTINGS)
    assert metrics[f"{name}@{cutoff}"]["value"] == pytest.approx(np.mean(expected), rel=1e-6)


def test_metrics_of_ranks_by_hand():
    ranks = torch.tensor([1, 3, 4, NEVER_RANKED])
    assert hit_rate(ranks, 3).tolist() == [1, 1, 0, 0]
    assert ndcg(ranks, 3).tolist() == [1, 0.5, 0, 0]
    assert reciprocal_rank(ranks, 3).tolist() == [1, 1 / 3, 0, 0]


def test_a_target_that_is_never_ranked_is_no_hit_in_a_list_longer_than_the_catalogue():
    rankings = rankings_of([NEVER_RANKED, 2], [[1, 2, -1, -1, -1], [0, 1, 2, -1, -1]], 3)
    metrics = measure(rankings, popularity_of([1, 1, 1], 2), [5], **SETTINGS)
    assert metrics["hr@5"]["value"] == 0.5
    assert metrics["n_repeated_targets"] == 1
    assert metrics["n_users"] == 2
    assert metrics["n_items"] == 3


def test_coverage_counts_the_items_in_any_list():
    rankings = rankings_of([1, 1, 1], [[0, 1, 2], [0, 2, -1], [0, -1, -1]], 8)
    metrics = measure(rankings, popularity_of([1] * 8, 4), [1, 2, 3], **SETTINGS)
    assert [metrics[f"coverage@{k}"] for k in (1, 2, 3)] == [
        {"value": 1 / 8},
        {"value": 3 / 8},
        {"value": 3 / 8},
    ]


def test_surprisal_by_hand():
    # Of 16 users 16, 4, 1 and 0 have the items: 0, 2, 4 and 4 of at most 4 bits.
    np.testing.assert_array_equal(item_surprisal(np.array([16, 4, 1, 0]), 16), [0, 0.5, 1, 1])
    rankings = rankings_of([1, 1], [[0, 1, 2, 3], [2, 1, -1, -1]], 4)
    metrics = measure(rankings, popularity_of([16, 4, 1, 0], 16), [1, 2, 4], **SETTINGS)
    expected = [(0 + 1) / 2, (0.25 + 0.75) / 2, (2.5 / 4 + 1.5 / 4) / 2]
    assert [metrics[f"surprisal@{k}"]["value"] for k in (1, 2, 4)] == expected


def test_a_lone_user_is_surprised_by_nothing():
    assert item_surprisal(np.array([1, 0]), 1).tolist() == [0, 0]


def test_intervals_hold_the_value_and_follow_the_users_alone(scored, popularity):
    _, _, rankings = scored
    metrics = measure(rankings, popularity, CUTOFFS, **SETTINGS)
    for name in ("hr@10", "ndcg@10", "mrr@10", "surprisal@10"):
        assert metrics[name]["low"] < metrics[name]["value"] < metrics[name]["high"]
    order = np.random.default_rng(5).permutation(60)
    shuffled = {
        name: array if name == "n_items" else array[order] for name, array in rankings.items()
    }
    assert measure(shuffled, popularity, CUTOFFS, **SETTINGS) == metrics
    other_seed = measure(rankings, popularity, CUTOFFS, **{**SETTINGS, "seed": 1})
    assert other_seed["hr@10"]["value"] == metrics["hr@10"]["value"]
    assert other_seed["ndcg@10"] != metrics["ndcg@10"]


def test_metrics_are_plain_numbers_for_json(scored, popularity):
    metrics = measure(scored[2], popularity, CUTOFFS, **SETTINGS)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    names = ("hr", "ndcg", "mrr", "surprisal", "coverage")
    keys = {f"{name}@{k}" for name in names for k in CUTOFFS}
    assert set(metrics) == keys | {"n_users", "n_items", "n_repeated_targets"}
    assert all(math.isfinite(metrics[key]["value"]) for key in keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_items": np.zeros((60, 9), np.int32)}, "cutoff 10 is longer than the lists of 9"),
        ({"top_items": np.full((60, 10), 25, np.int32)}, r"top_items must lie in -1..24"),
        ({"top_items": np.full((60, 10), -2, np.int32)}, r"top_items must lie in -1..24"),
        ({"top_items": np.zeros((0, 10), np.int32)}, "there is no user to measure"),
        ({"target_ranks": np.zeros(60, np.int64)}, "target_ranks start at 1, got 0"),
        ({"target_ranks": np.ones(59, np.int64)}, "target_ranks must have 60 rows, got 59"),
        ({"users": np.ones(61, np.int32)}, "users must have 60 rows, got 61"),
        ({"n_items": np.array([30])}, "the rankings are of 30 items, but item_popularity is of 25"),
    ],
)
def test_rankings_that_do_not_fit_are_errors(scored, popularity, changes, message):
    with pytest.raises(ValueError, match=message):
        measure(scored[2] | changes, popularity, CUTOFFS, **SETTINGS)
