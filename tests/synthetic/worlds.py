from __future__ import annotations

import numpy as np

from sce_pipeline.parameters import SyntheticParameters
from sce_pipeline.synthetic.histories import START, draw_log
from sce_pipeline.synthetic.world import World


def make_world(**changes):
    values = {
        "seed": 3,
        "n_users": 500,
        "n_items": 240,
        "n_clusters": 6,
        "cluster_exponent": 0.7,
        "item_exponent": 1.1,
        "clusters_per_user": 2,
        "transition": 0.4,
        "cluster": 0.4,
        "n_successors": 3,
        "successor_decay": 0.6,
        "median_history": 12,
        "history_sigma": 0.7,
        "shortest_history": 3,
        "longest_history": 50,
        "days": 100,
        "n_periods": 5,
        "drift": 2,
        "repeats": False,
        "oracle_users": 400,
    }
    return World(SyntheticParameters.model_validate({**values, **changes}))


def next_probabilities(world, user, last, seconds, seen):
    """The probability of each place to be next, written from the docstring of ``World``."""
    parameters = world.parameters
    period = seconds // (parameters.days * 86400 // parameters.n_periods)
    clusters, weights = world.tastes(np.array([user]))
    of_rank = [1 / (rank + 1) ** parameters.item_exponent for rank in range(world.cluster_size)]
    of_cluster = [
        1 / (cluster + 1) ** parameters.cluster_exponent for cluster in range(parameters.n_clusters)
    ]
    everybody = 1 - parameters.transition - parameters.cluster
    probabilities = np.zeros(parameters.n_items)
    for place in range(parameters.n_items):
        cluster, position = divmod(place, world.cluster_size)
        rank = (position + parameters.drift * period) % world.cluster_size
        taste = sum(
            weight for own, weight in zip(clusters[0], weights[0], strict=True) if own == cluster
        )
        share = of_cluster[cluster] / sum(of_cluster)
        probabilities[place] = (
            (parameters.cluster * taste + everybody * share) * of_rank[rank] / sum(of_rank)
        )
    decays = [parameters.successor_decay**number for number in range(parameters.n_successors)]
    for number, decay in enumerate(decays):
        successor = int(world.successors(np.array([last]), np.array([number]))[0])
        probabilities[successor] += parameters.transition * decay / sum(decays)
    if not parameters.repeats:
        probabilities[list(seen)] = 0
        probabilities /= probabilities.sum()
    return probabilities


def read_log(world, users_at_once):
    chunks = list(draw_log(world, users_at_once))
    users, items, timestamps = (np.concatenate(column) for column in zip(*chunks, strict=True))
    return users, items, timestamps - START
