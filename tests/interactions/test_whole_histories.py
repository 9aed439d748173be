from __future__ import annotations

import narwhals.stable.v2 as nw
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from interaction_logs import interactions, small_logs

from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.histories import (
    collect_histories,
    find_users_without_rows,
    read_histories,
)
from sce_pipeline.parameters import Columns

COLUMNS = Columns(user="who", item="what", timestamp="when")
KNOWN = ["0", "2", "4", "9"]
ITEMS = pl.DataFrame(
    {"item": range(len(KNOWN)), "itemid": KNOWN}, schema={"item": pl.Int32, "itemid": pl.String}
)


def collect(frame, items=ITEMS):
    return collect_histories(frame, nw.from_native(items).lazy())


def spell_out(histories, users):
    offsets = histories["offsets"]
    return {
        user: histories["items"][start:stop].tolist()
        for user, start, stop in zip(users, offsets[:-1], offsets[1:], strict=True)
    }


@given(small_logs)
def test_histories_hold_all_known_items_of_each_user_in_time(rows):
    histories, users, report = collect(interactions(rows))
    in_time = sorted(range(len(rows)), key=lambda row: (rows[row][2], row))
    expected = {
        str(user): [
            KNOWN.index(str(rows[row][1]))
            for row in in_time
            if rows[row][0] == user and str(rows[row][1]) in KNOWN
        ]
        for user in sorted({user for user, _, _ in rows})
    }
    assert spell_out(histories, users) == expected
    assert list(expected) == users
    assert histories["items"].dtype == np.int32
    unknown = [str(item) for _, item, _ in rows if str(item) not in KNOWN]
    assert report["unknown_items"]["rows"] == len(unknown)
    assert report["unknown_items"]["items"] == len(set(unknown))
    most = sorted(set(unknown), key=lambda item: (-unknown.count(item), item))
    assert report["unknown_items"]["examples"] == most
    assert report["users"] == len(expected)
    assert report["users_without_known_items"] == sum(not items for items in expected.values())
    assert report["rows"] == len(rows) - len(unknown)


def test_another_engine_gives_the_same():
    rows = [(3, 1, 5), (3, 0, 2), (1, 9, 1), (3, 4, 2), (2, 7, 0)]
    duckdb = pytest.importorskip("duckdb")
    log = interactions(rows).collect().to_native().to_arrow()
    items = nw.from_native(duckdb.from_arrow(ITEMS.to_arrow()))
    found = collect_histories(nw.from_native(duckdb.from_arrow(log)), items)
    histories, users, report = collect(interactions(rows))
    assert spell_out(*found[:2]) == spell_out(histories, users)
    assert found[2] == report


def table(**columns):
    return nw.from_native(pl.DataFrame(columns).with_row_index("row").lazy())


def test_without_timestamps_the_order_of_the_file_is_that_of_time():
    frame = table(who=[7, 7, 8, 7], what=["4", "0", "2", "9"])
    read, report = read_histories(frame, COLUMNS)
    assert report["order"] == "row"
    histories, users, _ = collect(read)
    assert spell_out(histories, users) == {"7": [2, 0, 3], "8": [1]}


def test_without_timestamps_the_report_says_nothing_of_them():
    what = [" 4", "0", None, "9"]
    _, by_row = read_histories(table(who=[7, 7, 8, 7], what=what), COLUMNS)
    assert by_row == {
        "raw": {"rows": 4, "users": 2, "items": 3},
        "kept": {"rows": 3, "users": 1, "items": 3},
        "dropped": {"missing item": {"rows": 1, "first_data_row": 3}},
        "doubtful": {"space around an id": 1},
        "order": "row",
    }
    _, by_time = read_histories(table(who=[7, 7, 8, 7], what=what, when=[0, 1, 2, 3]), COLUMNS)
    assert by_time == by_row | {
        "doubtful": {"space around an id": 1, "timestamp of exactly 0": 1},
        "timestamp_unit": "seconds",
        "first_timestamp": "1970-01-01T00:00:00",
        "last_timestamp": "1970-01-01T00:00:03",
        "order": "timestamp",
    }


def test_with_timestamps_it_is_theirs_and_rows_that_cannot_be_used_are_counted():
    frame = table(who=[7, 7, 8, 7], what=["4", "0", None, "9"], when=[9, 3, 1, 3])
    read, report = read_histories(frame, COLUMNS)
    assert report["order"] == "timestamp"
    assert report["dropped"] == {"missing item": {"rows": 1, "first_data_row": 3}}
    histories, users, _ = collect(read)
    assert spell_out(histories, users) == {"7": [0, 3, 2]}


def test_users_are_without_rows_if_none_of_theirs_can_be_used():
    frame = table(
        who=[7.0, 9.0, 8.0, 7.0, None, 10.0, 9.0, 8.5],
        what=["4", "0", None, None, "9", "4", "2", ""],
        when=["1", "soon", "2", "3", "4", "5", None, "6"],
    )
    read, _ = read_histories(frame, COLUMNS)
    assert find_users_without_rows(frame, read, COLUMNS) == ["8", "8.5", "9"]


def test_errors_are_about_the_table_of_histories():
    with pytest.raises(InteractionsError, match="The table of histories has no column 'what'"):
        read_histories(table(who=[1], item=[2]), COLUMNS)
    with pytest.raises(InteractionsError, match="None of the 1 rows of the table of histories"):
        read_histories(table(who=[1], what=[""]), COLUMNS)
