"""What a log looks like: its repeats, its ties and the lengths of its histories."""

from __future__ import annotations

from collections import Counter

import numpy as np

from sce_pipeline.interactions.reports import Report

_MOST_BINS = 50


def count_repeats(users: np.ndarray, items: np.ndarray) -> Counter[str]:
    """Count ``rows``, and those ``repeated`` whose user had the same item before.

    All arrays have one entry a row, here and below, and whole users; counts of other users add up.
    """
    pairs = distinct_pairs(users, items, int(items.max()) + 1)
    return Counter(rows=users.size, repeated=users.size - pairs.size)


def distinct_pairs(users: np.ndarray, items: np.ndarray, n_items: int) -> np.ndarray:
    """Return the distinct pairs of a user and an item, int64, as user * n_items + item, in order.

    NumPy's unique would put them into a hash table, which takes a hundred times as long as sorting.
    """
    pairs = np.sort(users * np.int64(n_items) + items)
    return pairs[np.diff(pairs, prepend=-1) > 0]


def describe_repeats(counted: Counter[str]) -> Report:
    """Tell the share of the rows that ``count_repeats`` counted."""
    rows = counted["repeated"]
    return {"rows": rows, "share_of_rows": rows / counted["rows"]}


def count_ties(users: np.ndarray, timestamps: np.ndarray) -> Counter[str]:
    """Count equal timestamps, for rows user after user in time.

    Returns:
        The consecutive ``pairs`` of events of a user, those ``tied`` by equal timestamps, the
        ``users``, and those ``users_tied`` at their last two events.
    """
    is_same_user = users[1:] == users[:-1]
    is_tie = is_same_user & (timestamps[1:] == timestamps[:-1])
    is_last = np.append(users[1:] != users[:-1], True)
    n_users = np.count_nonzero(is_last)
    return Counter(
        pairs=int(users.size - n_users),
        tied=int(np.count_nonzero(is_tie)),
        users=int(n_users),
        users_tied=int(np.count_nonzero(is_tie & is_last[1:])),
    )


def describe_ties(counted: Counter[str]) -> Report:
    """Measure how far the order of equal timestamps matters.

    Returns:
        ``share_of_pairs`` is that of consecutive events of a user with equal timestamps,
        ``share_of_users`` that of users whose last two events have, so that the order of the file
        decides which one is the target.
    """
    return {
        "share_of_pairs": counted["tied"] / max(counted["pairs"], 1),
        "share_of_users": counted["users_tied"] / counted["users"],
    }


def describe_lengths(lengths: np.ndarray) -> Report:
    """Describe histories by their length in items, with a histogram of equal bins."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = -(-(longest - shortest + 1) // _MOST_BINS)
    edges = np.arange(shortest, longest + width + 1, width)
    quantiles = {"p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
    return {
        "mean": float(lengths.mean()),
        "min": shortest,
        **{name: float(np.quantile(lengths, level)) for name, level in quantiles.items()},
        "max": longest,
        "bin_edges": edges.tolist(),
        "counts": np.histogram(lengths, edges)[0].tolist(),
    }
