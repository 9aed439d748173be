"""Ids → indices: items and users are numbered in the order of their ids."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.columns import ROW, identifiers, require_columns, titles
from sce_pipeline.interactions.engines import hold
from sce_pipeline.interactions.parts import IN_TIME
from sce_pipeline.interactions.reports import Report, collect_rows
from sce_pipeline.parameters import ItemColumns

_TABLE = "The table of items"
_INTEGER = r"^-?[0-9]{1,18}$"
_NO_DIGIT = "[^-0-9]"  # as $ may match before a line break


def encode_interactions(
    interactions: nw.LazyFrame[Any],
    item_titles: nw.LazyFrame[Any] | None,
    item_columns: ItemColumns,
) -> tuple[nw.LazyFrame[Any], nw.LazyFrame[Any], nw.LazyFrame[Any], Report]:
    """Number the users and the items 0, 1, … and look up the items' titles.

    Args:
        interactions: Columns user, item, timestamp, row and part. The items in it are the
            catalogue.
        item_titles: A table of items with any columns and ``row``, or None.
        item_columns: Which of them are the item's id and title.

    Returns:
        The interactions with user and item (Int32), timestamp, row and part, user after user in
        time; the items: item (Int32), itemid (String) and title (String, null where unknown); the
        users: user (Int32) and userid (String); and the report.

    Raises:
        InteractionsError: The table of items lacks a column or has ids or titles without meaning.
    """
    interactions = interactions.rename({"user": "userid", "item": "itemid"})
    users = number_ids(interactions, "userid", "user")
    items = number_ids(interactions, "itemid", "item")
    repeated = 0
    if item_titles is None:
        items = items.with_columns(title=nw.lit(None, nw.String))
    else:
        known, repeated = _read_titles(item_titles, item_columns)
        items = items.join(known, on="itemid", how="left")
    items = items.select("item", "itemid", "title").sort("item")
    encoded = (
        interactions.join(users, on="userid")
        .join(items.select("item", "itemid"), on="itemid")
        .select("user", "item", "timestamp", "row", "part")
        .sort("user", *IN_TIME)
    )
    (report,) = collect_rows(
        items.select(items=nw.len(), items_without_title=nw.col("title").null_count())
    )
    return encoded, items, users, report | {"repeated_item_rows": repeated}


def number_ids(interactions: nw.LazyFrame[Any], id_name: str, index_name: str) -> nw.LazyFrame[Any]:
    """Number distinct ids in their order: that of numbers if all are integers, else of text.

    Args:
        interactions: Any columns, among them the ids.
        id_name: The column of the ids (String).
        index_name: What to call their numbers.

    Returns:
        The numbers 0, 1, … (Int32) and the ids, in order.
    """
    ids = interactions.select(id_name).unique()
    text = nw.col(id_name).str
    is_integer = text.contains(_INTEGER) & ~text.contains(_NO_DIGIT)
    (are,) = collect_rows(ids.select(integers=is_integer.all()))
    order = [id_name]
    if are["integers"]:
        ids = ids.with_columns(number=nw.col(id_name).cast(nw.Int64))
        order = ["number", id_name]  # 7 and 07 are different ids
    numbered = ids.with_row_index(index_name, order_by=order)
    return hold(numbered.select(nw.col(index_name).cast(nw.Int32), id_name).sort(index_name))


def _read_titles(table: nw.LazyFrame[Any], columns: ItemColumns) -> tuple[nw.LazyFrame[Any], int]:
    """Read the titles, the first row of each id, and count the rows after the first."""
    roles = {
        f"data_processing.item_columns.{role}": name for role, name in columns.model_dump().items()
    }
    require_columns(table, roles, _TABLE)
    read = table.select(
        itemid=identifiers(table, columns.item, _TABLE),
        title=titles(table, columns.title, _TABLE),
        row=nw.col(ROW),
    ).filter(~nw.col("itemid").is_null())
    (size,) = collect_rows(read.select(rows=nw.len(), ids=nw.col("itemid").n_unique()))
    first = read.unique(["itemid"], keep="first", order_by=["row"]).select("itemid", "title")
    return first, size["rows"] - size["ids"]
