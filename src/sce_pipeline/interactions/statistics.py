"""What a log looks like: its repeats, its ties and the lengths of its histories."""

from __future__ import annotations

import numpy as np

from sce_pipeline.interactions.reports import Report

_MOST_BINS = 50


def describe_repeats(users: np.ndarray, items: np.ndarray) -> Report:
    """Count rows whose user had the same item before; all arrays have one entry a row."""
    pairs = users * (items.max() + np.int64(1)) + items
    repeated = users.size - np.unique(pairs).size
    return {"rows": repeated, "share_of_rows": repeated / users.size}


def describe_ties(users: np.ndarray, timestamps: np.ndarray) -> Report:
    """Measure how far the order of equal timestamps matters, for rows user after user in time.

    Returns:
        ``share_of_pairs`` is that of consecutive events of a user with equal timestamps,
        ``share_of_users`` that of users whose last two events have, so that the order of the file
        decides which one is the target.
    """
    is_same_user = users[1:] == users[:-1]
    is_tie = is_same_user & (timestamps[1:] == timestamps[:-1])
    is_last = np.append(users[1:] != users[:-1], True)
    n_users = np.count_nonzero(is_last)
    n_pairs = users.size - n_users
    return {
        "share_of_pairs": float(np.count_nonzero(is_tie) / max(n_pairs, 1)),
        "share_of_users": float(np.count_nonzero(is_tie & is_last[1:]) / n_users),
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
