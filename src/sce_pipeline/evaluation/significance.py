"""Whether two rankings of the same users differ: paired intervals and p values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sce_pipeline.evaluation.bootstrap import bootstrap_intervals
from sce_pipeline.evaluation.metrics import ndcg

SIGNS_AT_ONCE = 2**20
"""Most signs that are drawn at once, so that they stay in the cache."""


@dataclass(frozen=True)
class Difference:
    """How much better one ranking is than another, over the users of both.

    Attributes:
        n_users: Number of users.
        first: Mean of the first ranking.
        second: Mean of the second.
        value: Their difference, first − second.
        low: Lower end of its interval.
        high: Upper end.
        p_value: Of the hypothesis that the rankings are exchangeable, two-sided.
    """

    n_users: int
    first: float
    second: float
    value: float
    low: float
    high: float
    p_value: float


def compare_ndcg(
    first: Mapping[str, np.ndarray],
    second: Mapping[str, np.ndarray],
    names: tuple[str, str],
    cutoff: int,
    n_bootstrap: int,
    confidence: float,
    n_permutations: int,
    seed: int,
) -> Difference:
    """Compare the NDCG@cutoff of two rankings, user by user.

    Args:
        first: What ``rank_all`` returns.
        second: Another ranking of the same users and targets, in any order.
        names: What to call the two in an error.
        cutoff: Length of list to measure.
        n_bootstrap: Resamples of the users behind the interval.
        confidence: Share of resamples that the interval spans.
        n_permutations: Random signs of the users' differences behind the p value.
        seed: Seed of both.

    Raises:
        ValueError: The rankings are of other users, targets or catalogues.
    """
    _check(first, second, names)
    of_first, of_second = (
        ndcg(torch.from_numpy(each["target_ranks"][np.argsort(each["users"])]), cutoff).numpy()
        for each in (first, second)
    )
    differences = of_first - of_second
    (low,), (high,) = bootstrap_intervals(differences[:, None], n_bootstrap, confidence, seed)
    return Difference(
        len(differences),
        float(of_first.mean()),
        float(of_second.mean()),
        float(differences.mean()),
        float(low),
        float(high),
        permutation_p_value(differences, n_permutations, seed),
    )


def permutation_p_value(differences: np.ndarray, n_permutations: int, seed: int) -> float:
    """Return the two-sided p value of a mean of paired differences (Fisher's randomisation test).

    Where two rankings are exchangeable, each user's difference is as likely with either sign.
    SciPy's ``permutation_test`` is the same and takes twenty times as long to draw its signs.

    Args:
        differences: One for each user, float64 [users].
        n_permutations: How many random signs of all users are drawn.
        seed: Seed of the signs.
    """
    differing = differences[differences != 0]  # zeros have no sign, and most users have one
    if len(differing) == 0:
        return 1.0
    from scipy import stats  # noqa: PLC0415 - takes half a second

    generator = np.random.default_rng(seed)

    def draw(size: tuple[int, ...]) -> np.ndarray:
        return differing * (2 * generator.integers(2, size=size, dtype=np.int8) - 1)

    test = stats.monte_carlo_test(
        differing,
        draw,
        np.sum,
        vectorized=True,
        n_resamples=n_permutations,
        batch=max(1, SIGNS_AT_ONCE // len(differing)),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values of several hypotheses for their number (Holm, 1979), in their order."""
    n = len(p_values)
    order = np.argsort(p_values, kind="stable")
    scaled = np.array(p_values, dtype=np.float64)[order] * np.arange(n, 0, -1)
    corrected = np.empty(n)
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return corrected.tolist()


def _check(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], names: tuple[str, str]
) -> None:
    sizes = [int(each["n_items"][0]) for each in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{names[0]} ranks {sizes[0]:,} items and {names[1]} {sizes[1]:,}; "
            "only runs over one catalogue can be compared"
        )
    users, others = (np.sort(each["users"]) for each in (first, second))
    if not np.array_equal(users, others):
        shared = len(np.intersect1d(users, others))
        raise ValueError(
            f"{names[0]} has {len(users):,} test users and {names[1]} {len(others):,}, of which "
            f"they share {shared:,}; only runs over the same test users can be compared"
        )
    targets, other_targets = (
        each["targets"][np.argsort(each["users"])] for each in (first, second)
    )
    if differing := int((targets != other_targets).sum()):
        raise ValueError(
            f"{names[0]} and {names[1]} are to find different items for {differing:,} of "
            f"{len(users):,} test users; only runs over one split can be compared"
        )
