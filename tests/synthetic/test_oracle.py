from __future__ import annotations

import numpy as np
import pytest
import torch
from worlds import make_world, next_probabilities

from sce_pipeline.evaluation import metrics
from sce_pipeline.synthetic import protocols
from sce_pipeline.synthetic.histories import draw_histories
from sce_pipeline.synthetic.oracle import (
    NEVER_RANKED,
    history_scales,
    latent_scales,
    measure_ranks,
    target_ranks,
)

N_USERS = 20_000
GAINS = 1 / np.log2(np.arange(2, 12))


def gains(ranks):
    return np.where(ranks <= 10, 1 / np.log2(np.minimum(ranks, 10) + 1), 0.0)


def standard_errors(differences):
    return differences.mean() / (differences.std() / np.sqrt(len(differences)))


def dense_scores(world, histories, scales, transition=None, period_shift=0):
    """The score of every place for every user, float64 [users, n_items]."""
    transition = world.parameters.transition if transition is None else transition
    ends = histories.offsets[1:] - 1
    periods = world.periods(histories.seconds[ends]) + period_shift
    places = np.arange(world.parameters.n_items)
    scores = scales[:, places // world.cluster_size]
    scores *= world.zipf[world.ranks(places[None], periods[:, None])]
    followed = histories.places[ends - 1]
    for number, share in enumerate(world.successor_shares):
        successors = world.successors(followed, np.array(number))
        scores[np.arange(len(ends)), successors] += transition * share
    return scores


def seen_cells(histories):
    owners = np.repeat(np.arange(len(histories.users)), np.diff(histories.offsets))
    is_known = np.ones(len(owners), dtype=bool)
    is_known[histories.offsets[1:] - 1] = False
    return owners[is_known], histories.places[is_known]


def dense_gains(scores, histories):
    """Each user's NDCG@10 when the seen items are left out."""
    scores = scores.copy()
    scores[seen_cells(histories)] = -1
    targets = histories.places[histories.offsets[1:] - 1]
    own = scores[np.arange(len(scores)), targets][:, None]
    return np.where(own[:, 0] < 0, 0.0, gains((scores > own).sum(axis=1) + 1))


@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("leave_out_seen", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cluster_exponent": 0},  # clusters of equal share: ties
        {"cluster": 0, "transition": 0.1},
        {"transition": 0, "n_successors": 1, "drift": 0},
        {"successor_decay": 1, "n_clusters": 1, "n_successors": 7},
        {"n_clusters": 24, "clusters_per_user": 3, "cluster": 0.59, "item_exponent": 0.4},
    ],
    ids=str,
)
def test_ranks_are_those_among_the_probabilities_of_all_items(repeats, leave_out_seen, changes):
    world = make_world(repeats=repeats, **changes)
    histories = draw_histories(world, np.arange(120))
    scales = latent_scales(world, histories.users)
    ranks = target_ranks(world, histories, scales, leave_out_seen or not repeats)
    n_never = 0
    for user in range(120):
        start, end = histories.offsets[user], histories.offsets[user + 1] - 1
        seen, target = set(histories.places[start:end].tolist()), histories.places[end]
        probabilities = next_probabilities(
            world, user, histories.places[end - 1], histories.seconds[end], seen
        )
        assert probabilities.sum() == pytest.approx(1)
        if leave_out_seen and target in seen:
            n_never += 1
            assert ranks[user] == NEVER_RANKED
            continue
        if leave_out_seen:
            probabilities[list(seen)] = 0
        with np.errstate(divide="ignore"):
            order = np.lexsort([np.arange(240), -np.log(probabilities).round(10)])
        assert ranks[user] == np.flatnonzero(order == target)[0] + 1
    assert (n_never > 0) is (repeats and leave_out_seen)


@pytest.mark.parametrize("repeats", [True, False])
def test_the_log_follows_the_probabilities(repeats):
    """What the best ranking gains is what the probabilities promise, item by item of the list."""
    world = make_world(n_users=N_USERS, repeats=repeats)
    histories = draw_histories(world, np.arange(N_USERS))
    probabilities = dense_scores(world, histories, latent_scales(world, histories.users))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    probabilities[seen_cells(histories)] = 0
    if not repeats:
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    top = -np.sort(-probabilities, axis=1)[:, :10]
    ranks = target_ranks(world, histories, latent_scales(world, histories.users), True)
    for place in range(10):
        hits = (ranks == place + 1) - top[:, place]
        assert abs(hits.mean()) < 4.5 * hits.std() / np.sqrt(N_USERS)
    difference = gains(ranks) - top @ GAINS
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(N_USERS)
    assert gains(ranks).mean() > 0.2


def test_no_other_ranker_does_better():
    world = make_world(n_users=N_USERS, n_clusters=12, n_items=480)
    users = np.arange(N_USERS)
    histories = draw_histories(world, users)
    latent, shares = latent_scales(world, users), np.tile(world.shares, (N_USERS, 1))
    guess = history_scales(world, histories)
    np.testing.assert_allclose(guess.sum(axis=1), 1 - world.parameters.transition)
    best = gains(target_ranks(world, histories, latent, True))
    targets = histories.places[histories.offsets[1:] - 1]
    counted = np.bincount(targets, minlength=480) / N_USERS  # with the help of the targets
    others = {
        "counts": np.tile(counted, (N_USERS, 1)),
        "popularity": dense_scores(world, histories, shares, transition=0),
        "tastes": dense_scores(world, histories, latent, transition=0),
        "successors": dense_scores(world, histories, 1e-9 * shares),
        "successors and popularity": dense_scores(world, histories, 0.6 * shares),
        "too many successors": dense_scores(world, histories, latent, transition=4),
        "too few successors": dense_scores(world, histories, latent, transition=0.02),
        "another's tastes": dense_scores(world, histories, latent[::-1]),
        "yesterday's popularity": dense_scores(world, histories, latent, period_shift=-1),
        "counts of clusters": dense_scores(world, histories, guess),
    }
    gained = {name: dense_gains(scores, histories) for name, scores in others.items()}
    behind = {name: standard_errors(best - other) for name, other in gained.items()}
    assert min(behind.values()) > 2, behind
    # A history says more about its user than everybody's taste does.
    assert standard_errors(gained["counts of clusters"] - gained["successors and popularity"]) > 5


def test_what_is_read_from_a_history_does_not_depend_on_others():
    world = make_world(n_items=24, n_clusters=2, longest_history=6)
    together = history_scales(world, draw_histories(world, np.arange(200)))
    alone = [history_scales(world, draw_histories(world, np.array([user]))) for user in range(200)]
    np.testing.assert_allclose(together, np.concatenate(alone))


def test_metrics_are_those_of_evaluation():
    ranks = np.array([1, 2, 3, 10, 11, 500, NEVER_RANKED])
    measured = measure_ranks(ranks, (1, 10), 200, 0.9, 1)
    for cutoff in (1, 10):
        for name, metric in (("hr", metrics.hit_rate), ("ndcg", metrics.ndcg)):
            expected = metric(torch.from_numpy(ranks), cutoff).mean().item()
            interval = measured[f"{name}@{cutoff}"]
            assert interval["value"] == pytest.approx(expected)
            assert interval["low"] <= interval["value"] <= interval["high"]
    assert set(measured) == {"hr@1", "hr@10", "ndcg@1", "ndcg@10"}


SETTINGS = {"cutoffs": (1, 10), "n_bootstrap": 20, "confidence": 0.95, "seed": 1}


def test_protocols_do_not_depend_on_the_blocks(monkeypatch):
    world = make_world()
    best = protocols.measure_best(world, np.arange(300), 0.8, filter_seen=True, **SETTINGS)
    monkeypatch.setattr(protocols, "CELLS_AT_ONCE", 6 * 7)
    again = protocols.measure_best(world, np.arange(300), 0.8, filter_seen=True, **SETTINGS)
    assert best == again
    assert best["leave_one_out"]["n_users"] == 300


def test_temporal_users_are_those_seen_after_the_cut():
    world = make_world()
    histories = draw_histories(world, np.arange(300))
    cut = np.sort(histories.seconds)[round(0.8 * (len(histories.seconds) - 1))]
    is_late = histories.seconds[histories.offsets[1:] - 1] >= cut
    best = protocols.measure_best(world, np.arange(300), 0.8, filter_seen=True, **SETTINGS)
    assert 0 < best["temporal"]["n_users"] == is_late.sum() < 300
    ranks = target_ranks(world, histories, latent_scales(world, histories.users), True)
    assert best["temporal"]["latent"]["ndcg@10"]["value"] == pytest.approx(
        gains(ranks[is_late]).mean()
    )


def test_repeated_targets_count_as_misses_where_seen_items_are_left_out():
    world = make_world(repeats=True)
    out, kept = (
        protocols.measure_best(world, np.arange(300), None, filter_seen=seen, **SETTINGS)
        for seen in (True, False)
    )
    assert out["leave_one_out"]["n_repeated_targets"] > 0
    assert kept["leave_one_out"]["n_repeated_targets"] == 0
    assert set(out) == set(kept) == {"leave_one_out"}


def test_without_repeats_the_best_ranking_leaves_out_seen_items_in_any_case():
    out, kept = (
        protocols.measure_best(make_world(), np.arange(300), None, filter_seen=seen, **SETTINGS)
        for seen in (True, False)
    )
    assert out == kept
