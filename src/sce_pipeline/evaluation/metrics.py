"""Metrics of ranked users with one target each.

HR, NDCG and MRR of a user depend on the rank of the target alone and are 0 where it is beyond the
cutoff. Coverage and surprisal look at the recommended items, whether they are right or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sce_pipeline.evaluation.bootstrap import bootstrap_intervals
from sce_pipeline.evaluation.held_out import check_items
from sce_pipeline.evaluation.ranking import NEVER_RANKED, NO_ITEM


def hit_rate(ranks: Tensor, cutoff: int) -> Tensor:
    """Return each user's HR@cutoff, 1 for a hit: int64 ranks [users] to float64 [users]."""
    return (ranks <= cutoff).double()


def ndcg(ranks: Tensor, cutoff: int) -> Tensor:
    """Return each user's NDCG@cutoff: int64 ranks [users] to float64 [users].

    With one target the ideal gain is 1, so that NDCG is 1 / log2(rank + 1).
    """
    return hit_rate(ranks, cutoff) / torch.log2(ranks.double() + 1)


def reciprocal_rank(ranks: Tensor, cutoff: int) -> Tensor:
    """Return each user's reciprocal rank, whose mean is MRR: int64 to float64 [users]."""
    return hit_rate(ranks, cutoff) / ranks


def item_surprisal(users_of_item: np.ndarray, n_users: int) -> np.ndarray:
    """Return how surprising each item is, from 0, everybody has it, to 1, at most one user has.

    This is the self-information -log2(users of the item / users), divided by its maximum
    log2(users) as in RePlay; an item without users counts as one with a single user. A lone user is
    surprised by nothing.

    Args:
        users_of_item: Distinct users of each item, [n_items].
        n_users: Number of users.

    Returns:
        float64 [n_items].
    """
    return np.log2(n_users / np.maximum(users_of_item, 1)) / np.log2(max(n_users, 2))


def measure(
    rankings: Mapping[str, np.ndarray],
    item_popularity: Mapping[str, np.ndarray],
    cutoffs: Sequence[int],
    n_bootstrap: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Compute all metrics at all cutoffs.

    HR, NDCG, MRR and surprisal are means over users and come with a bootstrap interval. A user's
    surprisal is the sum over the list divided by the cutoff, so that an empty place counts 0.
    Coverage, the share of the catalogue that stands in anybody's list, is no mean over users and
    has no interval. A target that could not be recommended, being in the history, counts as a miss.

    Args:
        rankings: What ``rank_all`` returns.
        item_popularity: Distinct training users of each item, ``users`` [n_items], and the number
            of training users, ``n_users`` [1].
        cutoffs: Lengths of list to measure.
        n_bootstrap: Number of resamples of the users.
        confidence: Share of resamples that an interval spans.
        seed: Seed of the resamples.

    Returns:
        ``n_users``, ``n_items``, ``n_repeated_targets`` (targets that could not be recommended) and
        for every metric and cutoff, as in ``ndcg@10``, its ``value``, ``low`` and ``high``.

    Raises:
        ValueError: There is no user, a cutoff is longer than the lists, or ids or sizes do not fit.
    """
    n_items = int(rankings["n_items"][0])
    _check(rankings, item_popularity, cutoffs, n_items)
    # The resamples draw rows, so rows are put in an order that depends on nothing but the users.
    order = np.argsort(rankings["users"])
    ranks = torch.from_numpy(rankings["target_ranks"][order])
    top_items = rankings["top_items"][order]

    of_users: dict[str, np.ndarray] = {}
    for name, metric in (("hr", hit_rate), ("ndcg", ndcg), ("mrr", reciprocal_rank)):
        for cutoff in cutoffs:
            of_users[f"{name}@{cutoff}"] = metric(ranks, cutoff).numpy()
    surprisal = item_surprisal(item_popularity["users"], int(item_popularity["n_users"][0]))
    # Index -1, an empty place, finds the 0 at the end.
    total_surprisal = np.append(surprisal, 0.0)[top_items].cumsum(axis=1)
    for cutoff in cutoffs:
        of_users[f"surprisal@{cutoff}"] = total_surprisal[:, cutoff - 1] / cutoff

    values = np.stack(list(of_users.values()), axis=1)
    low, high = bootstrap_intervals(values, n_bootstrap, confidence, seed)
    metrics: dict[str, Any] = {
        "n_users": len(ranks),
        "n_items": n_items,
        "n_repeated_targets": int((ranks == NEVER_RANKED).sum()),
    }
    for column, name in enumerate(of_users):
        metrics[name] = {
            "value": float(values[:, column].mean()),
            "low": float(low[column]),
            "high": float(high[column]),
        }
    for cutoff in cutoffs:
        metrics[f"coverage@{cutoff}"] = {"value": _coverage(top_items[:, :cutoff], n_items)}
    return metrics


def _coverage(top_items: np.ndarray, n_items: int) -> float:
    """Return the share of the catalogue that occurs among the items."""
    recommended = np.zeros(n_items, dtype=bool)
    recommended[top_items[top_items != NO_ITEM]] = True
    return float(recommended.mean())


def _check(
    rankings: Mapping[str, np.ndarray],
    item_popularity: Mapping[str, np.ndarray],
    cutoffs: Sequence[int],
    n_items: int,
) -> None:
    n_users, width = rankings["top_items"].shape
    if n_users == 0:
        raise ValueError("there is no user to measure; the split left no held-out user")
    if max(cutoffs) > width:
        raise ValueError(f"cutoff {max(cutoffs)} is longer than the lists of {width} top items")
    for name in ("users", "target_ranks"):
        if len(rankings[name]) != n_users:
            raise ValueError(f"{name} must have {n_users} rows, got {len(rankings[name])}")
    if rankings["target_ranks"].min() < 1:
        raise ValueError(f"target_ranks start at 1, got {rankings['target_ranks'].min()}")
    check_items("top_items", rankings["top_items"], NO_ITEM, n_items)
    if len(item_popularity["users"]) != n_items:
        raise ValueError(
            f"the rankings are of {n_items} items, "
            f"but item_popularity is of {len(item_popularity['users'])}"
        )
