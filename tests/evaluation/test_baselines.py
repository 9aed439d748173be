from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from sce_pipeline.evaluation import baselines as baselines_module
from sce_pipeline.evaluation import held_out as held_out_module
from sce_pipeline.evaluation import ranking as ranking_module
from sce_pipeline.evaluation.baselines import (
    fit_item_knn,
    fit_pure_svd,
    interaction_matrix,
    rank_with_item_knn,
    rank_with_pure_svd,
)
from sce_pipeline.evaluation.ranking import NEVER_RANKED, NO_ITEM

N_USERS, N_ITEMS = 40, 23


@pytest.fixture
def training():
    """Histories with repeated items; item 5 has no user, user 3 a single item."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 12, N_USERS)
    lengths[3] = 1
    items = generator.integers(N_ITEMS, size=lengths.sum())
    items[items == 5] = 6
    return {
        "items": items.astype(np.int32),
        "offsets": np.cumsum([0, *lengths]),
        "n_items": np.array([N_ITEMS]),
    }


@pytest.fixture
def dense(training):
    matrix = np.zeros((N_USERS, N_ITEMS))
    for user, items in enumerate(np.split(training["items"], training["offsets"][1:-1])):
        matrix[user, items] = 1
    return matrix


@pytest.fixture
def test_users(held_out):
    generator = np.random.default_rng(1)
    histories = [generator.integers(N_ITEMS, size=1 + n % 9).tolist() for n in range(30)]
    targets = generator.integers(N_ITEMS, size=30).tolist()
    return held_out(histories, targets, N_ITEMS, max_length=4), histories, targets


def dense_item_knn(dense, k, shrinkage):
    norms = np.linalg.norm(dense, axis=0)
    shared = dense.T @ dense
    similarity = np.zeros((N_ITEMS, N_ITEMS))
    for item in range(N_ITEMS):
        others = [other for other in range(N_ITEMS) if other != item and shared[item, other] > 0]
        values = {
            other: shared[item, other] / (norms[item] * norms[other] + shrinkage)
            for other in others
        }
        for other in sorted(others, key=lambda other: (-values[other], other))[:k]:
            similarity[item, other] = values[other]
    return similarity


def test_interactions_count_once(training, dense):
    matrix = interaction_matrix(training)
    assert len(training["items"]) > dense.sum()
    np.testing.assert_array_equal(matrix.toarray(), dense)


@pytest.mark.parametrize("at_once", [1, 60, 10**6])
@pytest.mark.parametrize(("k", "shrinkage"), [(1, 0.0), (4, 10.0), (100, 2.5)])
def test_similarities_are_those_of_dense_matrices(
    training, dense, k, shrinkage, at_once, monkeypatch
):
    monkeypatch.setattr(baselines_module, "PRODUCTS_AT_ONCE", at_once)
    similarities = fit_item_knn(interaction_matrix(training), k, shrinkage)
    expected = dense_item_knn(dense, k, shrinkage)
    np.testing.assert_allclose(similarities.toarray(), expected, rtol=1e-12)
    assert np.diff(similarities.indptr).max() <= k


def test_blocks_of_items_hold_no_more_products_than_they_may(monkeypatch):
    monkeypatch.setattr(baselines_module, "PRODUCTS_AT_ONCE", 10)
    products = np.array([3, 7, 1, 25, 0, 10, 9, 2])
    cuts = baselines_module._cuts(products)
    assert (cuts[0], cuts[-1]) == (0, len(products))
    for start, stop in pairwise(cuts):
        assert stop == start + 1 or products[start:stop].sum() <= 10


def check_order(rankings, scores, histories, targets, filter_seen):
    """Rankings must be in the order of the scores, up to what float32 can tell apart."""
    for row, (history, target) in enumerate(zip(histories, targets, strict=True)):
        left = [item for item in range(N_ITEMS) if not (filter_seen and item in history)]
        top = rankings["top_items"][row]
        assert sorted(top[top != NO_ITEM]) == left
        ordered = scores[row, top[top != NO_ITEM]]
        assert (np.diff(ordered) <= 1e-5).all()
        rank = rankings["target_ranks"][row]
        assert rank == (list(top).index(target) + 1 if target in left else NEVER_RANKED)


@pytest.mark.parametrize("filter_seen", [False, True])
@pytest.mark.parametrize("users_at_once", [7, 1000])
def test_item_knn_ranks_by_the_sum_over_the_history(
    training, dense, test_users, filter_seen, users_at_once, monkeypatch
):
    monkeypatch.setattr(held_out_module, "USERS_AT_ONCE", users_at_once)
    monkeypatch.setattr(ranking_module, "SCORES_AT_ONCE_ON_CPU", 3 * N_ITEMS)
    monkeypatch.setattr(ranking_module, "USERS_AT_ONCE_ON_CPU", 1)
    sequences, histories, targets = test_users
    similarities = fit_item_knn(interaction_matrix(training), 6, 1.0)
    rankings = rank_with_item_knn(similarities, sequences, N_ITEMS, filter_seen)
    seen = one_hot(histories)
    check_order(rankings, seen @ dense_item_knn(dense, 6, 1.0), histories, targets, filter_seen)


@pytest.mark.parametrize("filter_seen", [False, True])
def test_pure_svd_ranks_by_the_projection_of_the_history(training, dense, test_users, filter_seen):
    sequences, histories, targets = test_users
    vectors = fit_pure_svd(interaction_matrix(training), 8, seed=0)
    right = np.linalg.svd(dense)[2][:8]
    projection = right.T @ right
    np.testing.assert_allclose(vectors @ vectors.T, projection, atol=2e-3)
    device = torch.device("cpu")
    rankings = rank_with_pure_svd(vectors, sequences, N_ITEMS, filter_seen, device)
    scores = one_hot(histories) @ (vectors @ vectors.T).astype(np.float64)
    check_order(rankings, scores, histories, targets, filter_seen)


def one_hot(histories):
    """The last four items of each history, which is as many as reach the models."""
    seen = np.zeros((len(histories), N_ITEMS))
    for row, history in enumerate(histories):
        seen[row, history[-4:]] = 1
    return seen


def test_more_factors_than_the_matrix_has_are_refused(training):
    with pytest.raises(ValueError, match=r"n_factors is 24, but 40 users and 23 items have no"):
        fit_pure_svd(interaction_matrix(training), 24, seed=0)


def test_a_baseline_of_another_catalogue_is_an_error(training, held_out):
    similarities = fit_item_knn(interaction_matrix(training), 2, 0.0)
    with pytest.raises(ValueError, match="the sequences are of 3 items, but 23"):
        rank_with_item_knn(similarities, held_out([[0]], [1], n_items=3), 2, True)
