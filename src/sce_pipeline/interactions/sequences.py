"""Encoded interactions → the flat arrays that training and evaluation read.

A sequence is a slice of one flat array of items, user after user in time, and ``offsets`` say where
each begins and ends. There is no padding.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import narwhals.stable.v2 as nw
import numpy as np

from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.parts import IN_TIME, TEST, TRAIN, VALIDATION
from sce_pipeline.interactions.reports import Report
from sce_pipeline.interactions.statistics import (
    describe_lengths,
    describe_repeats,
    describe_ties,
)

Arrays: TypeAlias = dict[str, np.ndarray]


def build_sequences(
    encoded: nw.LazyFrame[Any], max_length: int, stride: int | None
) -> tuple[Arrays, Arrays, Arrays, Arrays, Report]:
    """Lay out the training windows, the held-out histories and the items' popularity.

    Args:
        encoded: Columns user and item (Int32), timestamp, row and part.
        max_length: Most inputs of a training window, which holds one more item for the last target.
        stride: None for one window a user, the last; otherwise how many items earlier each further
            window ends, at most max_length, until the first item of the user is in one.

    Returns:
        The training sequences: items int32 [rows], users int32 [n_users], offsets int64
        [n_users + 1], window_starts and window_stops int64 [n_windows].
        The validation and the test sequences, each: users int32 [n], items int32 [rows] and offsets
        int64 [n + 1], the whole history before each target; targets int32 [n].
        The popularity: users int32 [n_items], the distinct training users of each item, and
        n_users int64 [1].
        The report.
        All sequences also hold n_items and max_length, int64 [1].

    Raises:
        InteractionsError: No user has two training items.
    """
    parts = {part: nw.col("part") == part for part in (TRAIN, VALIDATION, TEST)}
    log = (
        encoded.with_columns(**parts)
        .sort("user", *IN_TIME)
        .select("user", "item", "timestamp", *parts)
        .collect()
    )
    users, items = log["user"].to_numpy(), log["item"].to_numpy()
    is_train = log[TRAIN].to_numpy()
    sizes = {
        "n_items": np.array([items.max() + 1], dtype=np.int64),
        "max_length": np.array([max_length], dtype=np.int64),
    }
    train = _train_sequences(users[is_train], items[is_train], max_length, stride)
    if train["window_starts"].size == 0:
        raise InteractionsError(
            f"None of the {train['users'].size:,} training users has two training items, so there "
            f"is no next item to learn: raise data_processing.filters.min_items_per_user or choose "
            f"another split"
        )
    report = _describe_windows(train) | {
        "history_lengths": describe_lengths(np.diff(train["offsets"])),
        "repeats": describe_repeats(users, items),
        "ties": describe_ties(users, log["timestamp"].to_numpy()),
    }
    return (
        train | sizes,
        _held_out_sequences(users, items, log[VALIDATION].to_numpy()) | sizes,
        _held_out_sequences(users, items, log[TEST].to_numpy()) | sizes,
        _popularity(train, int(sizes["n_items"][0])),
        report,
    )


def _train_sequences(
    users: np.ndarray, items: np.ndarray, max_length: int, stride: int | None
) -> Arrays:
    distinct, lengths = np.unique(users, return_counts=True)
    offsets = _offsets(lengths)
    starts, stops = _windows(offsets, max_length, stride)
    return {
        "items": items,
        "users": distinct,
        "offsets": offsets,
        "window_starts": starts,
        "window_stops": stops,
    }


def _windows(
    offsets: np.ndarray, max_length: int, stride: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cut each user's items into windows of 2 to max_length + 1 items, in time order."""
    begins, ends = offsets[:-1], offsets[1:]
    lengths = ends - begins
    n_windows = (lengths > 1).astype(np.int64)
    if stride is not None:
        n_windows += np.maximum(0, -(-(lengths - max_length - 1) // stride))
    user = np.repeat(np.arange(lengths.size), n_windows)
    n_later = np.repeat(np.cumsum(n_windows), n_windows) - 1 - np.arange(user.size)
    stops = ends[user] - n_later * (stride or 0)
    return np.maximum(begins[user], stops - max_length - 1), stops


def _describe_windows(train: Arrays) -> Report:
    starts, stops, n_rows = train["window_starts"], train["window_stops"], train["items"].size
    n_open = np.cumsum(
        np.bincount(starts, minlength=n_rows + 1) - np.bincount(stops, minlength=n_rows + 1)
    )
    return {
        "windows": starts.size,
        "targets": int((stops - starts - 1).sum()),
        "users_without_window": int(np.count_nonzero(np.diff(train["offsets"]) == 1)),
        "rows_outside_windows": int(np.count_nonzero(n_open[:-1] == 0)),
    }


def _held_out_sequences(users: np.ndarray, items: np.ndarray, is_target: np.ndarray) -> Arrays:
    targets = np.flatnonzero(is_target)
    lengths = targets - np.searchsorted(users, users[targets])
    offsets = _offsets(lengths)
    # Row r of history h is offsets[h] + r here and targets[h] - lengths[h] + r in the log.
    rows = np.arange(offsets[-1]) + np.repeat(targets - lengths - offsets[:-1], lengths)
    return {
        "users": users[targets],
        "items": items[rows],
        "offsets": offsets,
        "targets": items[targets],
    }


def _popularity(train: Arrays, n_items: int) -> Arrays:
    n_users = train["users"].size
    user = np.repeat(np.arange(n_users), np.diff(train["offsets"]))
    pairs = np.unique(train["items"] * np.int64(n_users) + user)
    return {
        "users": np.bincount(pairs // n_users, minlength=n_items).astype(np.int32),
        "n_users": np.array([n_users], dtype=np.int64),
    }


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])
