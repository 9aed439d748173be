"""A raw log → interactions: ids as strings, UTC timestamps, and a count of what cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.columns import (
    ADDED,
    MALFORMED,
    MALFORMED_RECORD,
    ROW,
    WHITE_SPACE,
    as_found,
    identifiers,
    require_columns,
    require_values,
)
from sce_pipeline.interactions.engines import end_plan
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.rejections import KEPT, describe, explain, fate, set_aside
from sce_pipeline.interactions.reports import Report, collect_rows, counts, tally
from sce_pipeline.interactions.timestamps import (
    EPOCH,
    MICROSECOND,
    Unit,
    reach_units,
    read_timestamps,
    to_datetime,
    to_microseconds,
    unit_of,
)
from sce_pipeline.parameters import Columns

ZERO_TIMESTAMP = "timestamp of exactly 0"
"""The doubt, in a report, about a row of 1 January 1970."""

_NAMES_OF_NOTHING = (
    "nan",
    "NaN",
    "null",
    "NULL",
    "Null",
    "none",
    "None",
    "NONE",
    "NA",
    "N/A",
    "n/a",
)


def clean_interactions(
    log: nw.LazyFrame[Any], columns: Columns, table: str = "The log"
) -> tuple[nw.LazyFrame[Any], nw.LazyFrame[Any], Report]:
    """Bring a raw log to the form that all later steps know.

    Args:
        log: Any columns, and ``row``, the place of each row in its file; where records of it could
            not be read, also what :data:`~sce_pipeline.interactions.columns.ADDED` tells of them.
        columns: Which of them are the user, the item and the timestamp.
        table: What to call the log in an error.

    Returns:
        The rows that can be used, with the columns user (String), item (String), timestamp
        (Datetime in microseconds, UTC) and row (Int64); the others, with what they hold and the
        reason (:func:`~sce_pipeline.interactions.rejections.set_aside`); and the report.

    Raises:
        InteractionsError: A column is missing, empty or of a type without meaning, or no row can
            be used.
    """
    roles = {f"data_processing.columns.{role}": name for role, name in columns.model_dump().items()}
    require_columns(log, roles, table)
    require_values(log, columns.timestamp, table)
    read = log.select(
        user=identifiers(log, columns.user, table),
        item=identifiers(log, columns.item, table),
        raw_user=as_found(log, columns.user),
        raw_item=as_found(log, columns.item),
        row=nw.col(ROW).cast(nw.Int64),
        malformed=_told(log, MALFORMED),
        record=_told(log, MALFORMED_RECORD),
        spans_lines=_spans_lines(log, set(roles.values())),
        timestamp=nw.col(columns.timestamp),
    )
    read = end_plan(read_timestamps(read, "timestamp", columns.timestamp))
    raw, unit = _survey(read)
    if raw["rows"] == 0:
        raise InteractionsError(f"{table} has no rows")
    labelled = to_microseconds(read, unit).with_columns(fate=fate())
    fates = _tally(labelled)
    dropped = describe(labelled, fates)
    if KEPT not in fates:
        raise InteractionsError(explain(table, raw["rows"], dropped, columns))

    interactions = labelled.filter(nw.col("fate") == KEPT).select(
        "user",
        "item",
        timestamp=to_datetime(nw.col("microseconds")),
        row=nw.col("row"),
    )
    kept = fates[KEPT]
    report = {
        "raw": raw,
        "kept": counts(kept),
        "dropped": dropped,
        "doubtful": {doubt: int(kept[doubt]) for doubt in _doubts() if kept[doubt]},
        "timestamp_unit": unit.name,
        "first_timestamp": (EPOCH + int(kept["first"]) * MICROSECOND).isoformat(),
        "last_timestamp": (EPOCH + int(kept["last"]) * MICROSECOND).isoformat(),
    }
    return interactions, set_aside(labelled, dropped), report


def _told(log: nw.LazyFrame[Any], name: str) -> nw.Expr:
    """Whoever reads CSV files tells of malformed records; elsewhere there are none."""
    is_told = name in log.collect_schema().names()
    return nw.col(name) if is_told else nw.lit(None, nw.String)


def _survey(read: nw.LazyFrame[Any]) -> tuple[Report, Unit]:
    """Count rows, users and items as they came, and tell the unit of the timestamps."""
    (survey,) = collect_rows(
        read.select(
            rows=nw.len(),
            users=nw.col("user").n_unique(),
            items=nw.col("item").n_unique(),
            missing_users=nw.col("user").null_count(),
            missing_items=nw.col("item").null_count(),
            numbers=nw.col("number").count(),
            **reach_units(nw.col("number")),
        )
    )
    distinct = {name: survey[name] or 0 for name in ("users", "items")}  # no number if no rows
    raw = {
        "rows": survey["rows"],
        "users": distinct["users"] - (survey["missing_users"] > 0),  # missing counts as one
        "items": distinct["items"] - (survey["missing_items"] > 0),
    }
    return raw, unit_of(survey)


def _tally(labelled: nw.LazyFrame[Any]) -> dict[str, dict[str, Any]]:
    """Count the rows of each fate."""
    doubts = {doubt: is_so.cast(nw.Int64) for doubt, is_so in _doubts().items()}
    return tally(
        labelled.with_columns(**doubts),
        "fate",
        first_row=nw.col("row").min(),
        first=nw.col("microseconds").min(),
        last=nw.col("microseconds").max(),
        **{doubt: nw.col(doubt).sum() for doubt in doubts},
    )


def _doubts() -> dict[str, nw.Expr]:
    """Say what may be wrong with rows that are kept, because it may as well be right."""

    def either(is_doubtful: Callable[[nw.Expr], nw.Expr]) -> nw.Expr:
        in_user, in_item = (is_doubtful(nw.col(role)).fill_null(False) for role in ("user", "item"))
        return in_user | in_item

    return {
        "space around an id": either(lambda text: text != text.str.strip_chars(WHITE_SPACE)),
        "id that says it is missing": either(lambda text: text.is_in(_NAMES_OF_NOTHING)),
        ZERO_TIMESTAMP: nw.col("number").fill_null(1.0) == 0,
        "line break in another column, where a misplaced quote may hide rows": nw.col(
            "spans_lines"
        ),
    }


def _spans_lines(log: nw.LazyFrame[Any], used: set[str]) -> nw.Expr:
    """Say whether a row has a line break in a column that is not used, if all comes from a text.

    In the columns that are used line breaks make ids and timestamps unreadable.
    """
    schema = log.collect_schema()
    columns = [name for name in schema if name not in ADDED]
    others = [name for name in columns if name not in used]
    if not others or any(schema[name] != nw.String for name in columns):
        return nw.lit(False)
    breaks = [nw.col(name).str.contains("\n", literal=True) for name in others]
    return nw.any_horizontal(*breaks, ignore_nulls=True)
