"""Encoded interactions → the flat arrays that training and evaluation read.

A sequence is a slice of one flat array of items, user after user in time, and ``offsets`` say where
each begins and ends. There is no padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import narwhals.stable.v2 as nw
import numpy as np

from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.parts import IN_TIME, TEST, TRAIN, VALIDATION
from sce_pipeline.interactions.reports import Report, collect_rows
from sce_pipeline.interactions.statistics import (
    count_repeats,
    count_ties,
    describe_lengths,
    describe_repeats,
    describe_ties,
    distinct_pairs,
)

Arrays: TypeAlias = dict[str, np.ndarray]

ROWS_AT_ONCE = 2**22
"""Rows of whole users that are laid out at a time, unless one user has more."""


@dataclass(frozen=True)
class _Layout:
    """The arrays of some users.

    Attributes:
        train: As ``build_sequences`` has them, but ``lengths``, int64 [n_users], for offsets, and
            windows within these items.
        held_out: Likewise, of ``VALIDATION`` and ``TEST``.
        popularity: Distinct users of each item, int64 [n_items].
        counted: Windows, their targets, the rows outside them, and what statistics count.
    """

    train: Arrays
    held_out: dict[str, Arrays]
    popularity: np.ndarray
    counted: Counter[str]


def build_sequences(
    encoded: nw.LazyFrame[Any], max_length: int, stride: int | None
) -> tuple[Arrays, Arrays, Arrays, Arrays, Report]:
    """Lay out the training windows, the held-out histories and the items' popularity.

    Beside the arrays themselves, ``ROWS_AT_ONCE`` rows are in memory.

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
    (known,) = collect_rows(encoded.select(nw.col("item").max()))
    n_items = known["item"] + 1
    sizes = {
        "n_items": np.array([n_items], dtype=np.int64),
        "max_length": np.array([max_length], dtype=np.int64),
    }
    popularity = np.zeros(n_items, dtype=np.int64)
    counted: Counter[str] = Counter()
    layouts = []
    for log in _whole_users(encoded):
        layout = _lay_out(log, n_items, max_length, stride)
        popularity += layout.popularity
        counted += layout.counted
        layouts.append((layout.train, layout.held_out))
    train = _join_train([train for train, _ in layouts])
    if train["window_starts"].size == 0:
        raise InteractionsError(
            f"None of the {train['users'].size:,} training users has two training items, so there "
            f"is no next item to learn: raise data_processing.filters.min_items_per_user or choose "
            f"another split"
        )
    lengths = np.diff(train["offsets"])
    report = {
        "windows": train["window_starts"].size,
        "targets": counted["targets"],
        "users_without_window": int(np.count_nonzero(lengths == 1)),
        "rows_outside_windows": counted["outside"],
        "history_lengths": describe_lengths(lengths),
        "repeats": describe_repeats(counted),
        "ties": describe_ties(counted),
    }
    validation, test = (
        _join([held_out[part] for _, held_out in layouts]) for part in (VALIDATION, TEST)
    )
    of_items: Arrays = {
        "users": popularity.astype(np.int32),
        "n_users": np.array([train["users"].size], dtype=np.int64),
    }
    return train | sizes, validation | sizes, test | sizes, of_items, report


def _whole_users(encoded: nw.LazyFrame[Any]) -> Iterator[nw.DataFrame[Any]]:
    """Yield the log in time, whole users at a time, in the order of their numbers."""
    of_users = encoded.group_by("user").agg(rows=nw.len()).sort("user").collect()
    users, ends = of_users["user"].to_numpy(), np.cumsum(of_users["rows"].to_numpy())
    parts = {part: nw.col("part") == part for part in (TRAIN, VALIDATION, TEST)}
    first = begin = 0
    while first < users.size:
        stop = max(first + 1, int(np.searchsorted(ends, begin + ROWS_AT_ONCE, side="right")))
        is_here = (nw.col("user") >= int(users[first])) & (nw.col("user") <= int(users[stop - 1]))
        yield (
            encoded.filter(is_here)
            .with_columns(**parts)
            .sort("user", *IN_TIME)
            .select("user", "item", "timestamp", *parts)
            .collect()
        )
        first, begin = stop, int(ends[stop - 1])


def _lay_out(log: nw.DataFrame[Any], n_items: int, max_length: int, stride: int | None) -> _Layout:
    """Lay out users whose rows come one user after the other, in time."""
    users, items = log["user"].to_numpy(), log["item"].to_numpy()
    is_train = log[TRAIN].to_numpy()
    train = _train_sequences(users[is_train], items[is_train], max_length, stride)
    held_out = {
        part: _held_out_sequences(users, items, log[part].to_numpy()) for part in (VALIDATION, TEST)
    }
    counted = _count_windows(train) + count_repeats(users, items)
    counted += count_ties(users, log["timestamp"].to_numpy())
    pairs = distinct_pairs(users[is_train], items[is_train], n_items)
    return _Layout(train, held_out, np.bincount(pairs % n_items, minlength=n_items), counted)


def _join(layouts: list[Arrays]) -> Arrays:
    """Put the arrays of some users behind each other, and lengths of their items as offsets.

    The parts are let go of one after the other, as all of them may be most of the memory.
    """
    joined = {}
    for name in list(layouts[0]):
        joined[name] = np.concatenate([layout.pop(name) for layout in layouts])
    joined["offsets"] = _offsets(joined.pop("lengths"))
    return joined


def _join_train(layouts: list[Arrays]) -> Arrays:
    """Do so with training sequences, whose windows are places in the items."""
    begin = 0
    for layout in layouts:
        layout["window_starts"] += begin
        layout["window_stops"] += begin
        begin += layout["items"].size
    return _join(layouts)


def _train_sequences(
    users: np.ndarray, items: np.ndarray, max_length: int, stride: int | None
) -> Arrays:
    distinct, lengths = np.unique(users, return_counts=True)
    starts, stops = cut_windows(_offsets(lengths), max_length, stride)
    return {
        "items": items,
        "users": distinct,
        "lengths": lengths,
        "window_starts": starts,
        "window_stops": stops,
    }


def cut_windows(
    offsets: np.ndarray, max_length: int, stride: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cut each user's items into windows of 2 to max_length + 1 items, in time order.

    Args:
        offsets: Where each user's items begin, and the end: int64 [n_users + 1].
        max_length: As for ``build_sequences``; with it as the stride every item but the first of a
            user is predicted once.
        stride: As for ``build_sequences``.

    Returns:
        Where each window begins and where it ends, int64 [n_windows] each.
    """
    begins, ends = offsets[:-1], offsets[1:]
    lengths = ends - begins
    n_windows = (lengths > 1).astype(np.int64)
    if stride is not None:
        n_windows += np.maximum(0, -(-(lengths - max_length - 1) // stride))
    user = np.repeat(np.arange(lengths.size), n_windows)
    n_later = np.repeat(np.cumsum(n_windows), n_windows) - 1 - np.arange(user.size)
    stops = ends[user] - n_later * (stride or 0)
    return np.maximum(begins[user], stops - max_length - 1), stops


def _count_windows(train: Arrays) -> Counter[str]:
    starts, stops, n_rows = train["window_starts"], train["window_stops"], train["items"].size
    n_open = np.cumsum(
        np.bincount(starts, minlength=n_rows + 1) - np.bincount(stops, minlength=n_rows + 1)
    )
    return Counter(
        targets=int((stops - starts - 1).sum()),
        outside=int(np.count_nonzero(n_open[:-1] == 0)),
    )


def _held_out_sequences(users: np.ndarray, items: np.ndarray, is_target: np.ndarray) -> Arrays:
    targets = np.flatnonzero(is_target)
    lengths = targets - np.searchsorted(users, users[targets])
    offsets = _offsets(lengths)
    # Row r of history h is offsets[h] + r here and targets[h] - lengths[h] + r in the log.
    rows = np.arange(offsets[-1]) + np.repeat(targets - lengths - offsets[:-1], lengths)
    return {
        "users": users[targets],
        "items": items[rows],
        "lengths": lengths,
        "targets": items[targets],
    }


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])
