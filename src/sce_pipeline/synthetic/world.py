"""The planted structure: clusters of items, their popularity and its drift, successors, users.

Items are known here by their place, cluster · size of a cluster + position in it. What the log
calls an item is a random relabelling of the places, so that ids say nothing.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from sce_pipeline.parameters import SyntheticParameters
from sce_pipeline.synthetic.randomness import Purpose, streams, uniforms

SECONDS_A_DAY = 86_400


class World:
    """All that is true of a synthetic log before anybody has done anything.

    What follows ``last`` in period ``t`` for a user with the clusters c and the weights v is, with
    the weights ``transition`` a, ``cluster`` b and g = 1 - a - b, item i of cluster k with
    probability::

        P(i) = a · T(last, i) + (b · Σ_j v_j [c_j = k] + g · share_k) · zipf(rank of i in period t)

    and, without repeats, that on the condition that the user does not have i yet.

    Attributes:
        parameters: The numbers behind it.
        cluster_size: Items in each cluster.
        shares: Share of each cluster in what is popular with everybody, float64 [clusters].
        zipf: Probability of each rank within a cluster, decreasing, float64 [cluster_size].
        successor_shares: Probability of each successor of an item, float64 [successors].
    """

    def __init__(self, parameters: SyntheticParameters) -> None:
        self.parameters = parameters
        self.cluster_size = parameters.n_items // parameters.n_clusters
        self.shares = _zipf(parameters.n_clusters, parameters.cluster_exponent)
        self.zipf = _zipf(self.cluster_size, parameters.item_exponent)
        decays = parameters.successor_decay ** np.arange(parameters.n_successors)
        self.successor_shares = decays / decays.sum()
        self._share_steps = np.cumsum(self.shares)[:-1]
        self._zipf_steps = np.cumsum(self.zipf)[:-1]
        self._successor_steps = np.cumsum(self.successor_shares)[:-1]

    @cached_property
    def item_ids(self) -> np.ndarray:
        """The id of the item at each place: a permutation, int32 [n_items]."""
        places = np.arange(self.parameters.n_items)
        numbers = streams(self.parameters.seed, Purpose.ITEM_ID, places)
        return np.argsort(numbers, kind="stable").astype(np.int32)

    def lengths(self, users: np.ndarray) -> np.ndarray:
        """Return how long users' histories are, log-normal and clipped: int64 [users]."""
        parameters, stream = self.parameters, streams(self.parameters.seed, Purpose.LENGTH, users)
        normal = np.sqrt(-2 * np.log(uniforms(stream, 0))) * np.cos(2 * np.pi * uniforms(stream, 1))
        lengths = parameters.median_history * np.exp(parameters.history_sigma * normal)
        bounds = parameters.shortest_history, parameters.longest_history
        return np.rint(np.clip(lengths, *bounds)).astype(np.int64)

    def tastes(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the clusters that users like and how much.

        Clusters are drawn by their shares, so one may come twice, and weights are uniform over all
        that sum to 1.

        Returns:
            Clusters, int64, and weights, float64, [users, clusters_per_user] both.
        """
        seed, n_drawn = self.parameters.seed, range(self.parameters.clusters_per_user)
        stream = streams(seed, Purpose.CLUSTER, users)
        clusters = np.stack([self.draw_clusters(uniforms(stream, n)) for n in n_drawn], axis=1)
        stream = streams(seed, Purpose.CLUSTER_WEIGHT, users)
        weights = np.stack([-np.log(uniforms(stream, n)) for n in n_drawn], axis=1)
        return clusters, weights / weights.sum(axis=1, keepdims=True)

    def draw_clusters(self, heights: np.ndarray) -> np.ndarray:
        """Return the clusters at uniform ``heights`` of the shares' distribution."""
        return np.searchsorted(self._share_steps, heights)

    def draw_ranks(self, heights: np.ndarray) -> np.ndarray:
        """Return the ranks, from 0, at uniform ``heights`` of the popularity in a cluster."""
        return np.searchsorted(self._zipf_steps, heights)

    def draw_successors(self, places: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Return the successors of ``places`` at uniform ``heights``: int64, same shape."""
        return self.successors(places, np.searchsorted(self._successor_steps, heights))

    def successors(self, places: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return successor ``numbers``, from 0, of ``places``; the two broadcast, to int64.

        Successors are of the same cluster, whatever their popularity. Number n lies at a position
        that is n modulo the number of successors, so that an item's successors are distinct.
        """
        places, numbers = np.broadcast_arrays(places, numbers)
        n_successors = self.parameters.n_successors
        keys = places * n_successors + numbers
        heights = uniforms(streams(self.parameters.seed, Purpose.SUCCESSOR, keys), 0)
        strides = (heights * (self.cluster_size // n_successors)).astype(np.int64)
        firsts = places - places % self.cluster_size
        return firsts + strides * n_successors + numbers

    def periods(self, seconds: np.ndarray) -> np.ndarray:
        """Return the period in which a time since the start falls, int64."""
        return seconds * self.parameters.n_periods // (self.parameters.days * SECONDS_A_DAY)

    def places(self, clusters: np.ndarray, ranks: np.ndarray, periods: np.ndarray) -> np.ndarray:
        """Return which items have given ranks in given periods.

        In each period items fall by ``drift`` ranks, and the last of a cluster become its first.
        """
        positions = (ranks - self.parameters.drift * periods) % self.cluster_size
        return clusters * self.cluster_size + positions

    def ranks(self, places: np.ndarray, periods: np.ndarray) -> np.ndarray:
        """Return the ranks, from 0, of items in their clusters in given periods."""
        return (places + self.parameters.drift * periods) % self.cluster_size


def _zipf(size: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, size + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()
