"""Synthetic logs of any size as training, validation and test sequences."""

from __future__ import annotations

import argparse

import numpy as np
from presets import read_presets

from sce_pipeline.interactions.sequences import cut_windows
from sce_pipeline.parameters import SyntheticParameters
from sce_pipeline.synthetic.histories import draw_log
from sce_pipeline.synthetic.world import World

ITEMS_AT_ONCE = 16_384 * 200
"""Items of the longest histories that are drawn at once."""

Arrays = dict[str, np.ndarray]


def plant(arguments: argparse.Namespace) -> World:
    """Return a world of the size that the command line asks for.

    The longest history grows with the median one, but to no more than half of the catalogue, which
    is as long as one without repeats may be.
    """
    values = read_presets("synthetic")["_synthetic"]
    longest = round(arguments.history * values["longest_history"] / values["median_history"])
    values |= {"median_history": arguments.history}
    values |= {"longest_history": min(longest, arguments.items // 2)}
    values |= {"seed": arguments.seed, "n_users": arguments.users, "n_items": arguments.items}
    values |= {"n_clusters": arguments.clusters, "oracle_users": arguments.test_users}
    return World(SyntheticParameters.model_validate(values))


def draw_sequences(world: World, n_test_users: int, max_length: int) -> tuple[Arrays, ...]:
    """Draw training, validation and test sequences, as the pipeline's own arrays.

    The held-out users are the first ones: ranking a million users over a million items takes long.
    """
    n_users = world.parameters.n_users
    users_at_once = max(1, ITEMS_AT_ONCE // world.parameters.longest_history)
    items = np.concatenate([drawn for _, drawn, _ in draw_log(world, users_at_once)])
    offsets = np.concatenate([[0], world.lengths(np.arange(n_users)).cumsum()])
    shared = {
        "n_items": np.array([world.parameters.n_items]),
        "max_length": np.array([max_length]),
    }
    kept = np.ones(len(items), dtype=bool)
    kept[offsets[1:] - 1] = kept[offsets[1:] - 2] = False
    ends = np.concatenate([[0], (np.diff(offsets) - 2).cumsum()])
    starts, stops = cut_windows(ends, max_length, stride=max_length)
    train = {
        "items": items[kept],
        "offsets": ends,
        "users": np.arange(n_users, dtype=np.int32),
        "window_starts": starts,
        "window_stops": stops,
        **shared,
    }
    return train, *(hold_out(items, offsets, n_test_users, back) | shared for back in (2, 1))


def hold_out(items: np.ndarray, offsets: np.ndarray, n_users: int, back: int) -> Arrays:
    """Return the first users' histories before their item ``back`` from the end, the target."""
    targets = offsets[1 : n_users + 1] - back
    rows = [items[first:last] for first, last in zip(offsets[:n_users], targets, strict=True)]
    return {
        "users": np.arange(n_users, dtype=np.int32),
        "items": np.concatenate(rows),
        "offsets": np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        "targets": items[targets],
    }
