from __future__ import annotations

from datetime import datetime, timedelta

import narwhals.stable.v2 as nw
import polars as pl
from hypothesis import strategies as st

EPOCH = datetime(1970, 1, 1)
NOON = datetime(2014, 7, 18, 12, 30, 5)
NOON_SECONDS = 1405686605

TEXTS = [
    (f"{NOON_SECONDS}", NOON),
    (f" {NOON_SECONDS}.0\n", NOON),
    (f"{NOON_SECONDS}.25", NOON + timedelta(seconds=0.25)),
    ("1.000001", datetime(1970, 1, 1, 0, 0, 1, 1)),  # in binary a little less
    ("1.405686605e9", NOON),
    ("-1", datetime(1969, 12, 31, 23, 59, 59)),
    ("2014-07-18", datetime(2014, 7, 18)),
    ("2014-07-18T12:30", datetime(2014, 7, 18, 12, 30)),
    ("2014-07-18 12:30:05", NOON),
    ("2014-07-18T12:30:05.123456", NOON + timedelta(microseconds=123456)),
    ("2014-07-18T12:30:05Z", NOON),
    ("2014-07-18 12:30:05 UTC", NOON),
    ("2014-07-18T14:30:05+02:00", NOON),
    ("2014-07-18T10:00:05-0230", NOON),
    ("2014-07-18T14:30:05.5+02", NOON + timedelta(seconds=0.5)),
    ("2012-02-29", datetime(2012, 2, 29)),
    ("0001-01-01", datetime(1, 1, 1)),
    ("9999-12-31T23:59:59.999999", datetime(9999, 12, 31, 23, 59, 59, 999999)),
    ("2014-02-29", None),
    ("1900-02-29", None),
    ("2014-13-01", None),
    ("2014-04-31", None),
    ("2014-07-18T24:00", None),
    ("2014-07-18T12:30:05+2", None),
    ("0000-01-01", None),
    ("0001-01-01T00:00+01:00", None),
    ("9999-12-31T23:00-01:00", None),
    ("18/07/2014", None),
    ("yesterday", None),
    ("1e30", None),
    ("1e999", None),
    ("nan", None),
    ("١٤٠٥٦٨٦٦٠٥", None),
]
"""Timestamps as text, and the moment that each is, None where it is none."""

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
