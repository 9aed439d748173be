"""Confidence intervals of means over users."""

from __future__ import annotations

import numpy as np


def bootstrap_intervals(
    values: np.ndarray, n_resamples: int, confidence: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return percentile-bootstrap intervals of the columns' means (Efron, 1979).

    All columns share the same resamples of the users. One resample exists at a time.

    Args:
        values: One row for each user, one column for each metric, float64 [users, metrics].
        n_resamples: How often as many users as there are get drawn, with replacement.
        confidence: Share of the resamples' means that the interval spans.
        seed: Seed of the draws.

    Returns:
        Lower and upper ends, float64 [metrics] each.
    """
    n_users, n_metrics = values.shape
    generator = np.random.default_rng(seed)
    means = np.empty((n_resamples, n_metrics))
    for resample in range(n_resamples):
        times_drawn = np.bincount(generator.integers(n_users, size=n_users), minlength=n_users)
        means[resample] = times_drawn @ values / n_users
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high
