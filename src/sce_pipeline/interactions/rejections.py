"""Which rows of a log cannot be used, why, and what they hold."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.columns import ROW, WHITE_SPACE
from sce_pipeline.interactions.reports import Report, collect_rows
from sce_pipeline.parameters import Columns

KEPT = "kept"

TOO_MANY_VALUES = "too many values in record"
MISPLACED_QUOTE = "misplaced quote in record"
NOT_UTF_8 = "bytes that are not UTF-8 in record"
"""With the two before, what may be wrong with a record of a CSV file, for whoever reads it."""

REMEDY = (
    "convert the file from the encoding it was written in, such as latin1, cp1251 or shift-jis, "
    "with iconv -f <encoding> -t utf-8"
)
"""What to do about bytes that are not UTF-8."""

_MISSING = "missing"  # such rows have no value to show
_SHOWN = 200  # characters of an example; an unclosed quote may have swallowed half of the file


def fate() -> nw.Expr:
    """Say of each row whether it is kept, or else the first reason against it.

    A reason ends with the role of the column that it is about, or with ``record`` where it is about
    the whole.
    """
    fate = nw.when(~nw.col("malformed").is_null()).then(nw.col("malformed"))
    fate = fate.when(nw.col("user").is_null()).then(_why_unusable("user"))
    fate = fate.when(nw.col("item").is_null()).then(_why_unusable("item"))
    fate = fate.when(nw.col("is_missing")).then(nw.lit(f"{_MISSING} timestamp"))
    fate = fate.when(nw.col("is_other_unit")).then(nw.lit("other-unit timestamp"))
    fate = fate.when(~nw.col("is_valid")).then(nw.lit("unparseable timestamp"))
    return fate.otherwise(nw.lit(KEPT))


def describe(labelled: nw.LazyFrame[Any], fates: dict[str, dict[str, Any]]) -> dict[str, Report]:
    """Say how many rows were dropped for each reason, where the first of them is and what it holds.

    Args:
        labelled: The log with the columns row, fate, raw_user, raw_item, raw and record.
        fates: Number of ``rows`` and ``first_row`` of each fate.
    """
    dropped: dict[str, Report] = {
        reason: {"rows": int(tally["rows"]), "first_data_row": int(tally["first_row"]) + 1}
        for reason, tally in fates.items()
        if reason != KEPT
    }
    shown = {reason for reason in dropped if not reason.startswith(_MISSING)}
    if shown:
        first_rows = [int(fates[reason]["first_row"]) for reason in shown]
        firsts = labelled.filter(nw.col(ROW).is_in(first_rows)).select(
            "fate", *_raw_values(), "record"
        )
        for first in collect_rows(firsts):
            dropped[first["fate"]]["example"] = first[role_of(first["fate"])][:_SHOWN]
    return dropped


def set_aside(labelled: nw.LazyFrame[Any], dropped: dict[str, Report]) -> nw.LazyFrame[Any]:
    """Pick the rows that are not kept.

    Returns:
        The columns data_row (Int64, counted from 1 below the header), user, item and timestamp as
        the file has them, reason and record, the beginning of a malformed record, whose values are
        null (all String), in the order of the log.
    """
    if not dropped:  # spare a log without such rows the pass
        labelled = labelled.head(0)
    rejected = labelled.filter(nw.col("fate") != KEPT)
    place, reason = nw.col(ROW).alias("data_row") + 1, nw.col("fate").alias("reason")
    return rejected.select(place, *_raw_values(), reason, "record")


def explain(table: str, n_rows: int, dropped: dict[str, Report], columns: Columns) -> str:
    """Say why no row of a table, so called, can be used."""
    reasons = []
    for reason, tally in dropped.items():
        column = columns.model_dump().get(role_of(reason))
        where = f"column {column!r}, " if column else ""
        where += f"first in data row {tally['first_data_row']}"
        value = f": {tally['example']!r}" if "example" in tally else ""
        reasons.append(f"{tally['rows']:,} with {reason} ({where}{value})")
    remedy = f". Where bytes are not UTF-8, {REMEDY}" if NOT_UTF_8 in dropped else ""
    return (
        f"None of the {n_rows:,} rows of {table[0].lower()}{table[1:]} can be used: "
        f"{'; '.join(reasons)}. Timestamps are numbers since 1970 or ISO 8601 dates between the "
        f"years 1 and 9999{remedy}"
    )


def role_of(reason: str) -> str:
    """Tell what a reason is about: the user, the item, the timestamp or the record."""
    return reason.rsplit(maxsplit=1)[-1]


def _why_unusable(role: str) -> nw.Expr:
    found = nw.when(nw.col(role).is_null()).then(nw.col(f"raw_{role}"))  # few rows are looked at
    is_missing = found.is_null() | (found.str.strip_chars(WHITE_SPACE) == "")
    missing, unreadable = nw.lit(f"{_MISSING} {role}"), nw.lit(f"unreadable {role}")
    return nw.when(is_missing).then(missing).otherwise(unreadable)


def _raw_values() -> list[nw.Expr]:
    return [
        nw.col("raw_user").alias("user"),
        nw.col("raw_item").alias("item"),
        nw.col("raw").alias("timestamp"),
    ]
