"""A raw log → interactions: ids as strings, UTC timestamps, and a count of what cannot be used."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.columns import ROW, identifiers, require_columns
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.reports import Report, collect_rows, counts
from sce_pipeline.interactions.timestamps import (
    EPOCH,
    MICROSECOND,
    Unit,
    read_timestamps,
    to_datetime,
    to_microseconds,
    unit_of,
)
from sce_pipeline.parameters import Columns

_KEPT = "kept"
_UNPARSEABLE = "unparseable timestamp"


def clean_interactions(
    log: nw.LazyFrame[Any], columns: Columns, table: str = "The log"
) -> tuple[nw.LazyFrame[Any], Report]:
    """Bring a raw log to the form that all later steps know.

    Args:
        log: Any columns, and ``row``, the place of each row in its file.
        columns: Which of them are the user, the item and the timestamp.
        table: What to call the log in an error.

    Returns:
        The rows that can be used, with the columns user (String), item (String), timestamp
        (Datetime in microseconds, UTC) and row (Int64); and the report.

    Raises:
        InteractionsError: A column is missing or of a type without meaning, or no row can be used.
    """
    roles = {f"data_processing.columns.{role}": name for role, name in columns.model_dump().items()}
    require_columns(log, roles, table)
    read = log.select(
        user=identifiers(log, columns.user, table),
        item=identifiers(log, columns.item, table),
        row=nw.col(ROW).cast(nw.Int64),
        **read_timestamps(log, columns.timestamp),
    )
    raw, unit = _survey(read)
    labelled = read.with_columns(**to_microseconds(unit)).with_columns(fate=_fate())
    fates = _tally(labelled)
    dropped = _describe_dropped(labelled, fates)
    if _KEPT not in fates:
        raise InteractionsError(_nothing_left(table, raw["rows"], dropped, columns))

    interactions = labelled.filter(nw.col("fate") == _KEPT).select(
        "user",
        "item",
        timestamp=to_datetime(nw.col("microseconds")),
        row=nw.col("row"),
    )
    kept = fates[_KEPT]
    report = {
        "raw": raw,
        "kept": counts(kept),
        "dropped": dropped,
        "timestamp_unit": unit.name,
        "first_timestamp": (EPOCH + int(kept["first"]) * MICROSECOND).isoformat(),
        "last_timestamp": (EPOCH + int(kept["last"]) * MICROSECOND).isoformat(),
    }
    return interactions, report


def _survey(read: nw.LazyFrame[Any]) -> tuple[Report, Unit]:
    """Count rows, users and items as they came, and tell the unit of the timestamps."""
    (survey,) = collect_rows(
        read.select(
            rows=nw.len(),
            users=nw.col("user").n_unique(),
            items=nw.col("item").n_unique(),
            missing_users=nw.col("user").null_count(),
            missing_items=nw.col("item").null_count(),
            magnitude=nw.col("number").abs().median(),
        )
    )
    raw = {
        "rows": survey["rows"],
        "users": survey["users"] - (survey["missing_users"] > 0),  # missing counts as one
        "items": survey["items"] - (survey["missing_items"] > 0),
    }
    return raw, unit_of(survey["magnitude"])


def _fate() -> nw.Expr:
    """Say of each row whether it is kept, or else the first reason against it."""
    return (
        nw.when(nw.col("user").is_null())
        .then(nw.lit("missing user"))
        .when(nw.col("item").is_null())
        .then(nw.lit("missing item"))
        .when(nw.col("is_missing"))
        .then(nw.lit("missing timestamp"))
        .when(~nw.col("is_valid"))
        .then(nw.lit(_UNPARSEABLE))
        .otherwise(nw.lit(_KEPT))
    )


def _tally(labelled: nw.LazyFrame[Any]) -> dict[str, dict[str, Any]]:
    """Count the rows of each fate, in one pass over the log."""
    tallies = labelled.group_by("fate").agg(
        rows=nw.len(),
        users=nw.col("user").n_unique(),
        items=nw.col("item").n_unique(),
        first_row=nw.col("row").min(),
        first=nw.col("microseconds").min(),
        last=nw.col("microseconds").max(),
    )
    return {tally["fate"]: tally for tally in collect_rows(tallies.sort("fate"))}


def _describe_dropped(
    labelled: nw.LazyFrame[Any], fates: dict[str, dict[str, Any]]
) -> dict[str, Report]:
    """Say how many rows were dropped for each reason and where the first of them is."""
    dropped: dict[str, Report] = {
        fate: {"rows": int(tally["rows"]), "first_data_row": int(tally["first_row"]) + 1}
        for fate, tally in fates.items()
        if fate != _KEPT
    }
    if _UNPARSEABLE in dropped:
        is_first = nw.col("row") == fates[_UNPARSEABLE]["first_row"]
        (first,) = collect_rows(labelled.filter(is_first).select("raw"))
        dropped[_UNPARSEABLE]["example"] = first["raw"]
    return dropped


def _nothing_left(table: str, n_rows: int, dropped: dict[str, Report], columns: Columns) -> str:
    if n_rows == 0:
        return f"{table} has no rows"
    reasons = []
    for reason, tally in dropped.items():
        role = reason.split()[-1]  # a reason ends with the role of its column
        where = f"column {getattr(columns, role)!r}, first in data row {tally['first_data_row']}"
        value = f": {tally['example']!r}" if "example" in tally else ""
        reasons.append(f"{tally['rows']:,} with {reason} ({where}{value})")
    return (
        f"None of the {n_rows:,} rows of {table[0].lower()}{table[1:]} can be used: "
        f"{'; '.join(reasons)}. Timestamps are numbers since 1970 or ISO 8601 dates between the "
        f"years 1 and 9999"
    )
