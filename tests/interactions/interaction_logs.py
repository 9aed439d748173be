from __future__ import annotations

from datetime import datetime, timedelta

import narwhals.stable.v2 as nw
import polars as pl
from hypothesis import strategies as st

EPOCH = datetime(1970, 1, 1)

small_logs = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 15)), min_size=1, max_size=40
)
"""Logs of (user, item, second) with repeats, ties and rows out of order."""

long_logs = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 3), st.integers(0, 12)), min_size=30, max_size=60
).map(lambda rows: [(user, item, second + 4 * user) for user, item, second in rows])
"""Logs that most protocols can split, in which users come and go."""


def interactions(rows):
    """A clean log out of (user, item, second); the place of a row is that in the list."""
    frame = pl.DataFrame(
        {
            "user": [str(user) for user, _, _ in rows],
            "item": [str(item) for _, item, _ in rows],
            "timestamp": [EPOCH + timedelta(seconds=second) for _, _, second in rows],
            "row": list(range(len(rows))),
        },
        schema={
            "user": pl.String,
            "item": pl.String,
            "timestamp": pl.Datetime("us"),
            "row": pl.Int64,
        },
    )
    return nw.from_native(frame.lazy())


def kept_rows(frame):
    return frame.collect()["row"].to_list()


def part_of_rows(frame):
    """The part of each row that was kept."""
    split = frame.collect()
    return dict(zip(split["row"].to_list(), split["part"].to_list(), strict=True))


def n_dropped(report):
    return sum(loss["rows"] for loss in report["dropped"].values())
