"""The best possible ranking: by the probabilities from which a synthetic log was drawn.

No ranker has a higher expected NDCG or HR than the one that orders items by their true probability
of being next, given all there is to know: parameters, successors, what is popular at the moment
and the user's clusters with their weights. That is ``latent_scales``, an upper bound. A ranker that
sees the history has to guess at the clusters: ``history_scales`` guesses simply, so that the best
that a history allows lies between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sce_pipeline.evaluation.bootstrap import bootstrap_intervals
from sce_pipeline.synthetic.histories import Histories
from sce_pipeline.synthetic.world import World

NEVER_RANKED = np.iinfo(np.int64).max
"""Rank of a target that is left out of the ranking, beyond every cutoff."""

_EQUAL = 1e-12
"""Relative difference up to which probabilities are equal; those of neighbours differ by more."""


def latent_scales(world: World, users: np.ndarray) -> np.ndarray:
    """Return the true probability that a user's next item is what is popular in each cluster.

    Args:
        world: The planted structure.
        users: Numbers of the users, int64 [users].

    Returns:
        float64 [users, clusters]; a row sums to 1 - ``transition``.
    """
    clusters, weights = world.tastes(users)
    parameters = world.parameters
    scales = np.tile(parameters.everybody * world.shares, (len(users), 1))
    rows = np.arange(len(users))[:, None]
    np.add.at(scales, (rows, clusters), parameters.cluster * weights)
    return scales


def history_scales(world: World, histories: Histories) -> np.ndarray:
    """Return a guess at ``latent_scales`` from all but the last item of each history.

    The items that no successor explains are counted by cluster and drawn towards the shares, as if
    the scales had a Dirichlet prior with the second moment that the planted ones have.

    Returns:
        float64 [users, clusters].
    """
    parameters, places, size = world.parameters, histories.places, world.cluster_size
    followers = world.successors(
        np.concatenate([places[:1], places[:-1]])[:, None], np.arange(parameters.n_successors)
    )
    is_explained = (followers == places[:, None]).any(axis=1)
    is_explained[histories.offsets[:-1]] = False
    counted = ~is_explained
    counted[histories.offsets[1:] - 1] = False  # the targets
    cells = _owners(histories) * parameters.n_clusters + places // size
    shape = len(histories.users), parameters.n_clusters
    counts = np.bincount(cells[counted], minlength=shape[0] * shape[1]).reshape(shape)
    popular = 1 - parameters.transition
    trust = 2 / (parameters.clusters_per_user + 1) * (parameters.cluster / popular) ** 2
    guess = trust * counts + (1 - trust) * world.shares
    return popular * guess / guess.sum(axis=1, keepdims=True)


def target_ranks(
    world: World, histories: Histories, scales: np.ndarray, leave_out_seen: bool
) -> np.ndarray:
    """Return the rank of each history's last item when items are ordered by probability.

    Within a cluster, popularity orders the items, so that those of greater probability than the
    target are counted by a search; only successors and seen items are looked at one by one. Equal
    probabilities are ordered by cluster.

    Args:
        world: The planted structure.
        histories: Histories of at least two items; all but the last are known.
        scales: How probable the popular items of each cluster are, float64 [users, clusters].
        leave_out_seen: Whether the items of the history are not ranked.

    Returns:
        int64 [users], from 1; ``NEVER_RANKED`` for a target that is left out.
    """
    parameters, size = world.parameters, world.cluster_size
    ends = histories.offsets[1:] - 1
    targets = histories.places[ends][:, None]
    periods = world.periods(histories.seconds[ends])[:, None]
    owners = np.arange(len(ends))
    followers = world.successors(
        histories.places[ends - 1][:, None], np.arange(parameters.n_successors)
    )
    following = parameters.transition * world.successor_shares

    def popularity(users: np.ndarray, places: np.ndarray) -> np.ndarray:
        return scales[users, places // size] * world.zipf[world.ranks(places, periods[users, 0])]

    def transition(users: np.ndarray, places: np.ndarray) -> np.ndarray:
        return (followers[users] == places[:, None]) @ following

    to_beat = (popularity(owners, targets[:, 0]) + transition(owners, targets[:, 0]))[:, None]

    def margins(clusters: np.ndarray | int, users: np.ndarray) -> np.ndarray:
        is_earlier = clusters < targets[users, 0] // size
        return to_beat[users, 0] * np.where(is_earlier, 1 - _EQUAL, 1 + _EQUAL)

    above = np.zeros(len(ends), dtype=np.int64)
    with np.errstate(divide="ignore"):  # what cannot be is never above
        for cluster in range(parameters.n_clusters):
            thresholds = margins(cluster, owners) / scales[:, cluster]
            above += np.searchsorted(-world.zipf, -thresholds)

    for number in range(parameters.n_successors):
        places = followers[:, number]
        popular, margin = popularity(owners, places), margins(places // size, owners)
        above += (popular <= margin) & (popular + following[number] > margin)

    if leave_out_seen:
        users, places = _seen(world, histories)
        seen = popularity(users, places) + transition(users, places)
        is_above = seen > margins(places // size, users)
        above -= np.bincount(users[is_above], minlength=len(ends))
        above[users[places == targets[users, 0]]] = NEVER_RANKED - 1
    return above + 1


def measure_ranks(
    ranks: np.ndarray, cutoffs: Sequence[int], n_bootstrap: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Return HR and NDCG at the cutoffs, each with its ``value``, ``low`` and ``high``.

    Args:
        ranks: Ranks of the users' targets, int64 [users].
        cutoffs: Lengths of list.
        n_bootstrap: Number of resamples of the users.
        confidence: Share of resamples that an interval spans.
        seed: Seed of the resamples.
    """
    of_users = {}
    gains = 1 / np.log2(ranks.astype(np.float64) + 1)
    for cutoff in cutoffs:
        of_users[f"hr@{cutoff}"] = (ranks <= cutoff).astype(np.float64)
        of_users[f"ndcg@{cutoff}"] = np.where(ranks <= cutoff, gains, 0.0)
    values = np.stack(list(of_users.values()), axis=1)
    low, high = bootstrap_intervals(values, n_bootstrap, confidence, seed)
    return {
        name: {"value": float(value), "low": float(bottom), "high": float(top)}
        for name, value, bottom, top in zip(of_users, values.mean(axis=0), low, high, strict=True)
    }


def _owners(histories: Histories) -> np.ndarray:
    """Return which of the histories each row is in, int64 [rows]."""
    return np.repeat(np.arange(len(histories.users)), np.diff(histories.offsets))


def _seen(world: World, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct items of all histories without their last rows, and whose they are."""
    is_known = np.ones(len(histories.places), dtype=bool)
    is_known[histories.offsets[1:] - 1] = False
    pairs = _owners(histories) * world.parameters.n_items + histories.places
    users, places = np.divmod(np.unique(pairs[is_known]), world.parameters.n_items)
    return users, places
