from __future__ import annotations

from datetime import datetime

import narwhals.stable.v2 as nw
import polars as pl
import pytest

from sce_pipeline.interactions.encoding import encode_interactions
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.parameters import ItemColumns

COLUMNS = ItemColumns(item="id", title="name")


def encode(pairs, titles=None):
    log = pl.LazyFrame(
        {
            "user": [user for user, _ in pairs],
            "item": [item for _, item in pairs],
            "timestamp": [datetime(2014, 7, 18)] * len(pairs),
            "row": range(len(pairs)),
            "part": ["train"] * len(pairs),
        }
    )
    table = None
    if titles is not None:
        table = nw.from_native(pl.LazyFrame(titles).with_columns(row=pl.int_range(pl.len())))
    *frames, report = encode_interactions(nw.from_native(log), table, COLUMNS)
    return *(frame.collect(backend="polars").to_native() for frame in frames), report


def test_ids_are_numbered_and_everything_else_is_kept():
    encoded, items, users, _ = encode([("b", "10"), ("a", "9"), ("b", "9")])
    assert dict(encoded.schema) == {
        "user": pl.Int32,
        "item": pl.Int32,
        "timestamp": pl.Datetime("us"),
        "row": pl.Int64,
        "part": pl.String,
    }
    assert encoded.select("user", "item", "row").rows() == [(0, 0, 1), (1, 1, 0), (1, 0, 2)]
    assert dict(items.schema) == {"item": pl.Int32, "itemid": pl.String, "title": pl.String}
    assert items.rows() == [(0, "9", None), (1, "10", None)]
    assert dict(users.schema) == {"user": pl.Int32, "userid": pl.String}
    assert users.rows() == [(0, "a"), (1, "b")]


@pytest.mark.parametrize(
    ("ids", "in_order"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["7", "07", "10"], ["07", "7", "10"]),
        (["10", "9", "a"], ["10", "9", "a"]),
        (["10", "9", "1.5"], ["1.5", "10", "9"]),
        (["9", "1" * 30], ["1" * 30, "9"]),
    ],
)
def test_ids_are_ordered_as_numbers_if_all_are_integers(ids, in_order):
    _, items, users, _ = encode([(name, name) for name in ids])
    assert items["itemid"].to_list() == in_order
    assert users["userid"].to_list() == in_order


def test_titles_are_looked_up_and_gaps_counted():
    titles = {
        "id": ["x", "z", "x", None, "y", "unused"],
        "name": ["First", "Zed", "Second", "Nobody", " ", "Unused"],
    }
    encoded, items, _, report = encode([("a", "x"), ("a", "y"), ("a", "z"), ("a", "w")], titles)
    assert items.rows() == [(0, "w", None), (1, "x", "First"), (2, "y", None), (3, "z", "Zed")]
    assert encoded["item"].to_list() == [1, 2, 3, 0]
    assert report == {"items": 4, "items_without_title": 2, "repeated_item_rows": 1}


def test_numbers_in_the_table_of_items_meet_text_in_the_log():
    _, items, _, _ = encode([("a", "1"), ("a", "2")], {"id": [1.0, 2.0], "name": ["One", "Two"]})
    assert items["title"].to_list() == ["One", "Two"]


def test_a_table_of_items_without_the_columns_is_refused():
    message = (
        r"The table of items has no column 'name', which data_processing.item_columns.title asks "
        r"for; .*'id', 't'$"
    )
    with pytest.raises(InteractionsError, match=message):
        encode([("a", "x")], {"id": ["x"], "t": ["X"]})


@pytest.mark.parametrize("title", [["a"], b"a", {"a": "b"}, True, datetime(2014, 7, 18)])
def test_titles_are_text_or_numbers(title):
    message = r"The table of items: column 'name' has the type .*; titles must be text or numbers"
    with pytest.raises(InteractionsError, match=message):
        encode([("a", "x")], {"id": ["x"], "name": [title]})


@pytest.mark.parametrize(
    ("title", "text"), [(1984, "1984"), (0.5, "0.5"), (float("nan"), None), (None, None)]
)
def test_titles_of_numbers_are_spelt_out(title, text):
    _, items, _, _ = encode([("a", "x")], {"id": ["x"], "name": [title]})
    assert items["title"].to_list() == [text]
