from __future__ import annotations

from datetime import datetime, timedelta

import narwhals.stable.v2 as nw
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sce_pipeline.interactions import sequences
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.sequences import build_sequences

DTYPES = {
    "items": np.int32,
    "users": np.int32,
    "targets": np.int32,
    "offsets": np.int64,
    "window_starts": np.int64,
    "window_stops": np.int64,
    "n_items": np.int64,
    "max_length": np.int64,
    "n_users": np.int64,
}


def encoded(rows):
    """An encoded log out of (user, item, second, part)."""
    frame = pl.DataFrame(
        {
            "user": pl.Series([row[0] for row in rows], dtype=pl.Int32),
            "item": pl.Series([row[1] for row in rows], dtype=pl.Int32),
            "timestamp": [datetime(1970, 1, 1) + timedelta(seconds=row[2]) for row in rows],
            "row": range(len(rows)),
            "part": [row[3] for row in rows],
        }
    )
    return nw.from_native(frame.sample(fraction=1, shuffle=True, seed=0).lazy())


def some_rows(last_user):
    """Rows of any part, as ``encoded`` takes them."""
    parts = st.sampled_from(["train", "context", "validation", "test"])
    row = st.tuples(st.integers(0, last_user), st.integers(0, 3), st.integers(0, 9), parts)
    return st.lists(row, max_size=40)


def histories(*lengths):
    """Training rows only: user u has items 0, 1, … in this order."""
    return [
        (user, item, item, "train") for user, length in enumerate(lengths) for item in range(length)
    ]


LOG = [
    (0, 2, 1, "train"),
    (0, 0, 0, "train"),
    (0, 1, 1, "train"),
    (0, 2, 2, "validation"),
    (0, 0, 3, "test"),
    (1, 1, 0, "train"),
    (2, 0, 5, "context"),
    (2, 0, 5, "context"),
    (2, 1, 6, "test"),
    (3, 1, 0, "train"),
    (3, 1, 1, "train"),
]


def test_the_arrays_are_those_of_the_contract():
    train, validation, test, popularity, _ = build_sequences(encoded(LOG), 4, None)
    expected = [
        {
            "items": [0, 2, 1, 1, 1, 1],
            "users": [0, 1, 3],
            "offsets": [0, 3, 4, 6],
            "window_starts": [0, 4],
            "window_stops": [3, 6],
            "n_items": [3],
            "max_length": [4],
        },
        {
            "users": [0],
            "items": [0, 2, 1],
            "offsets": [0, 3],
            "targets": [2],
            "n_items": [3],
            "max_length": [4],
        },
        {
            "users": [0, 2],
            "items": [0, 2, 1, 2, 0, 0],
            "offsets": [0, 4, 6],
            "targets": [0, 1],
            "n_items": [3],
            "max_length": [4],
        },
        {"users": [1, 3, 1], "n_users": [3]},
    ]
    for arrays, contract in zip((train, validation, test, popularity), expected, strict=True):
        assert {name: array.tolist() for name, array in arrays.items()} == contract
        for name, array in arrays.items():
            assert array.dtype == DTYPES[name]
            assert array.flags.c_contiguous


def test_the_report_counts_what_training_does_not_see():
    *_, report = build_sequences(encoded([*histories(1, 2, 9), (3, 0, 0, "train")]), 4, None)
    assert report["windows"] == 2
    assert report["targets"] == 1 + 4
    assert report["users_without_window"] == 2
    assert report["rows_outside_windows"] == 2 + (9 - 5)
    assert report["history_lengths"]["max"] == 9


@pytest.mark.parametrize(
    ("stride", "windows"),
    [
        (None, [(4, 9)]),
        (4, [(0, 5), (4, 9)]),
        (3, [(0, 3), (1, 6), (4, 9)]),
        (1, [(0, 5), (1, 6), (2, 7), (3, 8), (4, 9)]),
    ],
)
def test_windows_of_nine_items(stride, windows):
    train, *_ = build_sequences(encoded(histories(9)), 4, stride)
    starts, stops = train["window_starts"].tolist(), train["window_stops"].tolist()
    assert list(zip(starts, stops, strict=True)) == windows


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=6),
    st.integers(1, 8),
    st.none() | st.integers(1, 8),
)
def test_windows_stay_within_a_user_and_cover_the_history(lengths, max_length, stride):
    lengths = [2, *lengths]
    if stride is not None:
        stride = min(stride, max_length)
    train, _, _, popularity, report = build_sequences(
        encoded(histories(*lengths)), max_length, stride
    )
    user_of_row = np.repeat(np.arange(len(lengths)), lengths)
    seen, predicted = set(), set()
    windows = list(zip(train["window_starts"], train["window_stops"], strict=True))
    assert windows == sorted(windows)
    for start, stop in windows:
        assert 2 <= stop - start <= max_length + 1
        assert user_of_row[start] == user_of_row[stop - 1]
        seen |= set(range(start, stop))
        predicted |= set(range(start + 1, stop))
    for user, length in enumerate(lengths):
        stop = train["offsets"][user + 1]
        last = range(max(stop - length, stop - max_length - 1), stop)
        due = set(range(stop - length, stop)) if stride else set(last)
        assert due <= seen or length == 1
        assert due - {min(due)} <= predicted
    assert report["rows_outside_windows"] == sum(lengths) - len(seen)
    assert popularity["users"].tolist() == [
        sum(length > item for length in lengths) for item in range(max(lengths))
    ]


@settings(max_examples=60)
@given(some_rows(last_user=4))
def test_histories_end_right_before_their_targets(rows):
    # Two rows to learn from, and one before everything of every user, for a history.
    rows = [(user, 0, -1, "train") for user in range(5)] + [(9, 0, 0, "train")] * 2 + rows
    _, validation, test, _, _ = build_sequences(encoded(rows), 3, None)
    order = sorted(range(len(rows)), key=lambda place: (rows[place][0], rows[place][2], place))
    for arrays, part in ((validation, "validation"), (test, "test")):
        expected = []
        for place, row in enumerate(order):
            user, item, _, of_part = rows[row]
            if of_part == part:
                before = [rows[other][1] for other in order[:place] if rows[other][0] == user]
                expected.append((user, before, item))
        bounds = arrays["offsets"]
        built = [
            (user, arrays["items"][start:stop].tolist(), target)
            for user, start, stop, target in zip(
                arrays["users"].tolist(),
                bounds[:-1],
                bounds[1:],
                arrays["targets"].tolist(),
                strict=True,
            )
        ]
        assert built == expected


@settings(max_examples=30)
@given(
    some_rows(last_user=6),
    st.integers(1, 30),
)
def test_it_does_not_matter_how_many_rows_are_laid_out_at_a_time(rows, at_once):
    log = encoded([*histories(2, 1, 5), *rows])
    *whole, report = build_sequences(log, 3, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "ROWS_AT_ONCE", at_once)
        *parts, same_report = build_sequences(log, 3, 2)
    assert same_report == report
    for arrays, same in zip(whole, parts, strict=True):
        assert list(arrays) == list(same)
        for name, array in arrays.items():
            assert array.dtype == same[name].dtype
            np.testing.assert_array_equal(array, same[name])


def test_users_of_a_single_item_are_nothing_to_learn_from():
    with pytest.raises(InteractionsError, match="None of the 3 training users has two"):
        build_sequences(encoded(histories(1, 1, 1)), 4, None)
