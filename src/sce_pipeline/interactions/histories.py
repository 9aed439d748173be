"""Interactions → whole histories over a known catalogue, for whoever is to be recommended items."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw
import numpy as np

from sce_pipeline.interactions.cleaning import ZERO_TIMESTAMP, clean_interactions
from sce_pipeline.interactions.columns import ROW, identifiers
from sce_pipeline.interactions.encoding import number_ids
from sce_pipeline.interactions.parts import IN_TIME
from sce_pipeline.interactions.reports import Report, collect_rows
from sce_pipeline.interactions.sequences import Arrays
from sce_pipeline.parameters import Columns

N_EXAMPLES = 10
"""Unknown items that a report names: those with most rows."""

_TABLE = "The table of histories"


def read_histories(table: nw.LazyFrame[Any], columns: Columns) -> tuple[nw.LazyFrame[Any], Report]:
    """Bring a table of histories to the form of cleaned interactions.

    Args:
        table: Any columns, and ``row``, the place of each row in its file.
        columns: Which of them are the user, the item and the timestamp. Where there is no such
            timestamp, the order of the file is the order in time.

    Returns:
        The rows that can be used, as ``clean_interactions`` has them, and its report, which counts
        the others and also says what the ``order`` is by; where that is the row, the report says
        nothing of timestamps.

    Raises:
        InteractionsError: A column is missing or of a type without meaning, or no row can be used.
    """
    has_time = columns.timestamp in table.collect_schema().names()
    if not has_time:
        table = table.with_columns(nw.col(ROW).alias(columns.timestamp))
    interactions, _, report = clean_interactions(table, columns, _TABLE)
    if not has_time:
        report = _leave_out_timestamps(report)
    return interactions, report | {"order": "timestamp" if has_time else "row"}


def find_users_without_rows(
    table: nw.LazyFrame[Any], interactions: nw.LazyFrame[Any], columns: Columns
) -> list[str]:
    """Find the users of a table of histories of whom no row can be used, in the order of ids.

    Args:
        table: As ``read_histories`` takes it.
        interactions: What that made of it.
        columns: Which column is the user.
    """
    named = table.select(user=identifiers(table, columns.user, _TABLE))
    named = named.filter(~nw.col("user").is_null()).unique()
    lost = named.join(interactions.select("user"), on="user", how="anti").sort("user")
    return lost.collect()["user"].to_list()


def collect_histories(
    interactions: nw.LazyFrame[Any], items: nw.LazyFrame[Any]
) -> tuple[Arrays, list[str], Report]:
    """Lay out the whole history of every user, with the numbers of the items that are known.

    Args:
        interactions: Columns user and item (String), timestamp and row.
        items: The catalogue: item (Int32) and itemid (String).

    Returns:
        The histories: items int32 [rows] and offsets int64 [n_users + 1], in which a user without a
        known item has an empty one; the users' ids in the order of ids; and the report.
    """
    events = (
        interactions.select("timestamp", "row", userid="user", itemid="item")
        .join(items.select("item", "itemid"), on="itemid", how="left")
        .join(number_ids(interactions.select(userid="user"), "userid", "user"), on="userid")
    )
    known = events.filter(~nw.col("item").is_null()).sort("user", *IN_TIME)
    log = known.select("user", "item").collect()
    users = number_ids(interactions.select(userid="user"), "userid", "user").collect()
    lengths = np.bincount(log["user"].to_numpy(), minlength=len(users))
    histories = {
        "items": log["item"].to_numpy(),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
    }
    report = {
        "users": len(users),
        "users_without_known_items": int(np.count_nonzero(lengths == 0)),
        "rows": len(log),
        "unknown_items": _describe_unknown(events),
    }
    return histories, users["userid"].to_list(), report


def _leave_out_timestamps(report: Report) -> Report:
    """Drop what a report says of timestamps, where they are only the numbers of rows."""
    of_time = {"timestamp_unit", "first_timestamp", "last_timestamp"}
    doubtful = {
        doubt: rows for doubt, rows in report["doubtful"].items() if doubt != ZERO_TIMESTAMP
    }
    kept = {name: value for name, value in report.items() if name not in of_time}
    return kept | {"doubtful": doubtful}


def _describe_unknown(events: nw.LazyFrame[Any]) -> Report:
    """Count the items that are not in the catalogue, and name those with most rows."""
    rows = (
        events.filter(nw.col("item").is_null())
        .group_by("itemid")
        .agg(rows=nw.len())
        .sort("rows", "itemid", descending=[True, False])
    )
    (counts,) = collect_rows(rows.select(items=nw.len(), rows=nw.col("rows").sum()))
    examples = [row["itemid"] for row in collect_rows(rows.head(N_EXAMPLES))]
    return {"items": int(counts["items"]), "rows": int(counts["rows"] or 0), "examples": examples}
